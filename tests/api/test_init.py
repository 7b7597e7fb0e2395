"""The public names: one page, cheap to import, true in the docs."""

import json
import pydoc
import re
import subprocess
import sys
from pathlib import Path

import pytest

import omforge as of
from omforge.api.results import Result

ROOT = Path(__file__).parent.parent.parent


def test_every_public_name_is_there_and_documented() -> None:
    for name in of.__all__:
        found = getattr(of, name)
        assert name == "__version__" or found.__doc__, name
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = of.nothing


def test_help_shows_them_on_one_page() -> None:
    page = pydoc.plain(pydoc.render_doc(of))
    for name in of.__all__:
        assert name.strip("_") in page
    assert "bundle = of.compile(" in page


def test_the_import_takes_nothing_along() -> None:
    code = (
        "import sys; before = set(sys.modules); import omforge; "
        "print([m for m in set(sys.modules) - before if '.' not in m])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    taken = set(re.findall(r"'(\w+)'", done.stdout))
    assert not taken & {"onnx", "onnx_ir", "onnxruntime", "transformers", "numpy", "typer", "torch"}


def test_the_page_on_python_is_true(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "python.md").read_text(), re.S)
    assert len(blocks) == 3
    scope = {"folder": tmp_path}
    for block in blocks:
        exec(block, scope)
    said = capsys.readouterr().out
    assert "verified" in said
    assert "attention 5 of 5" in said
    assert "a int is no model | taken are" in said


def test_results_are_text_data_and_html() -> None:
    raised = of.raise_(ROOT / "examples" / "models" / "docs-llama-onnx")
    assert isinstance(raised, Result)
    told = json.loads(json.dumps(raised.to_json()))
    assert told["coverage"]
    assert {run["pass"] for run in told["passes"]} >= {"fuse-rms-norm", "fuse-attention"}
    assert raised.seconds > 0
    assert raised._repr_html_().startswith("<pre>pass ")
    assert "-&gt;" in raised._repr_html_()
