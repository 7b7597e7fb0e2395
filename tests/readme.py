"""The parts of README.md that commands wrote; `make readme` writes them again."""

import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from omforge.cli.registry import pass_rows
from omforge.passes import PASSES, PIPELINES
from tests.matrix import measure_all, table

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
MODEL = "examples/models/docs-llama-onnx"
PROMPT = "This method raises ValueError if"
SHOWN = "out/docs-llama"  # what the reader's own commands will say


def blocks(text: str) -> dict[str, str]:
    """Return what stands between each pair of markers, by name."""
    return dict(re.findall(r"<!-- (\w+) -->\n(.*?)<!-- /\1 -->", text, re.DOTALL))


def pass_table() -> str:
    """The passes, from their docstrings, and the pipelines."""
    lines = ["| pass | options | what it does |", "|---|---|---|"]
    for name, options, summary in pass_rows(PASSES):
        given = f"`{options}`".replace("|", "\\|") if options else ""
        lines.append(f"| `{name}` | {given} | {summary} |")
    lines += ["", "| pipeline | passes |", "|---|---|"]
    lines += [f"| `{name}` | {text.replace(',', ', ')} |" for name, text in PIPELINES.items()]
    return "\n".join(lines) + "\n"


def omforge(*arguments: str) -> str:
    """Return what a command prints to stdout, run from the project's root."""
    command = [sys.executable, "-m", "omforge", *arguments]
    return subprocess.run(command, cwd=ROOT, text=True, check=True, stdout=subprocess.PIPE).stdout


def compile_output(bundle: str, *more: str) -> str:
    """What `compile` prints for the example's model."""
    given = ("compile", MODEL, "--target", "Ascend310P3", "--atc", "sim", *more)
    return _console(f"{' '.join(given)} -o {SHOWN}", omforge(*given, "-o", bundle), bundle)


def verify_output(bundle: str) -> str:
    """What `verify` prints for it."""
    return _console(f"verify {SHOWN}", omforge("verify", bundle), bundle)


def run_output(bundle: str) -> str:
    """The text that it generates."""
    text = omforge("run", bundle, "--prompt", PROMPT, "--max-new-tokens", "64")
    return _console(f'run {SHOWN} --prompt "{PROMPT}" --max-new-tokens 64', text, bundle)


def om_output(bundle: str) -> str:
    """What is in the .om file of its decode graph."""
    file = "om/decode_c512.om"
    return _console(f"om {SHOWN}/{file}", omforge("om", f"{bundle}/{file}"), bundle)


def _console(command: str, output: str, bundle: str) -> str:
    shown = output.replace(bundle, SHOWN)
    # git and editors remove blanks at the end of a line.
    lines = [line.rstrip() for line in shown.rstrip().splitlines()]
    return "\n".join(["```console", f"$ omforge {command}", *lines, "```", ""])


def update() -> None:
    """Write the blocks of README.md again."""
    text = README.read_text(encoding="utf-8")
    with tempfile.TemporaryDirectory() as folder:
        bundle = f"{folder}/docs-llama"
        # In this order: the later commands need the bundle.
        made: dict[str, Callable[[], str]] = {
            "compile": lambda: compile_output(bundle, "--compare-each"),
            "verify": lambda: verify_output(bundle),
            "run": lambda: run_output(bundle),
            "om": lambda: om_output(bundle),
            "passes": pass_table,
            "matrix": lambda: table(measure_all()),
        }
        for name, make in made.items():
            start, end = f"<!-- {name} -->\n", f"<!-- /{name} -->"
            before, _, rest = text.partition(start)
            _, _, after = rest.partition(end)
            text = f"{before}{start}{make()}{end}{after}"
    README.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    update()
