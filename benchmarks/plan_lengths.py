"""Prefill lengths chosen for three distributions of real texts, beside powers of two.

Run by hand, with an export whose full-size weights need not be there but as a file of holes:

    python benchmarks/plan_lengths.py EXPORT --target Ascend910B4 [--context 2048] [--graphs 4]

No public log of prompts comes with Python or with this repository, so that these are what real
texts are cut into where models read them, and no server's traffic:

* docstrings: of all modules, classes and functions of the standard library that have one, as a tool
  that explains code would send them;
* functions: the source of the same functions and methods, as a completion would;
* paragraphs: of the texts of Python's manual in examples/texts, joined in runs of one to eight, as
  passages that retrieval finds.

Each is read by the tokenizer of the example's model; longer ones than the context are left out.
"""

import argparse
import ast
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from tokenizers import Tokenizer

from omforge.compilation.options import CompileOptions
from omforge.lowering.devices import device
from omforge.planning.chosen import plan_lengths
from omforge.planning.lengths import read_lengths
from omforge.planning.subject import open_subject

EXAMPLES = Path(__file__).parent.parent / "examples"


def modules() -> Iterator[str]:
    """The standard library's own modules, without its tests."""
    for file in sorted(Path(sysconfig.get_paths()["stdlib"]).rglob("*.py")):
        if not {"site-packages", "test", "tests", "idlelib", "lib2to3"} & set(file.parts):
            yield file.read_text(encoding="utf-8", errors="replace")


def docstrings() -> Iterator[str]:
    for text in modules():
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                yield ast.get_docstring(node) or ""


def functions() -> Iterator[str]:
    for text in modules():
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                yield ast.get_source_segment(text, node) or ""


def paragraphs() -> Iterator[str]:
    for file in sorted((EXAMPLES / "texts").glob("*.txt")):
        parts = [part for part in file.read_text(encoding="utf-8").split("\n\n") if part.strip()]
        for run in range(1, 9):
            for at in range(0, len(parts) - run + 1, run):
                yield "\n\n".join(parts[at : at + run])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("export", type=Path)
    parser.add_argument("--target", default="Ascend910B4")
    parser.add_argument("--context", type=int, default=2048)
    parser.add_argument("--graphs", type=int, default=4)
    parser.add_argument("--quantize", default="")
    parser.add_argument("--keep", type=Path, help="a folder for the three files of lengths")
    given = parser.parse_args()
    tokenizer = Tokenizer.from_file(str(EXAMPLES / "models" / "docs-llama-onnx" / "tokenizer.json"))
    folder = given.keep or Path.cwd()
    folder.mkdir(parents=True, exist_ok=True)
    subject = open_subject(
        given.export, CompileOptions(given.target, context=given.context, quantize=given.quantize)
    )
    known = device(subject.soc)
    print("| texts | number | median, 90%, longest | lengths | graphs | padding | a prompt |")
    print("|---|---|---|---|---|---|---|")
    for texts in (docstrings, functions, paragraphs):
        encoded = tokenizer.encode_batch([text for text in texts() if text.strip()])
        counts = sorted(len(ids.ids) for ids in encoded)
        counts = [count for count in counts if 0 < count <= given.context]
        file = folder / f"{texts.__name__}.txt"
        file.write_text("".join(f"{count}\n" for count in counts))
        found = plan_lengths(subject, subject.options, known, read_lengths(file), given.graphs)
        shape = f"{counts[len(counts) // 2]}, {counts[len(counts) * 9 // 10]}, {counts[-1]}"
        for usage in (found.chosen, *found.others):
            sizes = ", ".join(map(str, usage.lengths))
            print(
                f"| {texts.__name__} | {len(counts):,} | {shape} | {usage.name}: {sizes} "
                f"| {len(usage.lengths)} | {usage.padding:.1%} | {1000 * usage.seconds:.2f} ms |"
            )
        error = f"at {found.curve.checked} tokens the model is {found.curve.error:.1%} off"
        print(f"| {texts.__name__} | | | {error} | | | |")


if __name__ == "__main__":
    main()
