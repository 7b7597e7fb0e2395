"""The whole program: on what omforge compiles, and as the script `omforge-atc-sim`."""

import ast
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from omforge.atc import sim as atc_sim
from omforge.atc.sim.main import run
from omforge.atc.sim.reports import Report, templates
from omforge.compilation.compile import compile_bundle
from omforge.compilation.options import CompileOptions
from tests.atc.sim.models import RELU, save


@pytest.mark.parametrize("soc", ["Ascend310P3", "Ascend910B4"])
@pytest.mark.parametrize(
    ("family", "layout"),
    [
        ("llama_mha", "stacked"),
        ("qwen2", "per-layer"),
        ("mistral", "stacked"),
        ("llama_gqa", "stacked"),
    ],
)
def test_lowered_graphs_parse(
    exported: Callable[[str, str], Path],
    family: str,
    layout: str,
    soc: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    options = CompileOptions(soc, context=32, prefill=(8,), layout=layout)  # pyright: ignore[reportArgumentType]
    bundle = compile_bundle(exported("dynamo", family), tmp_path / "b", options)
    monkeypatch.chdir(bundle.folder)
    for bucket in bundle.manifest.buckets:
        result = run(bucket.command[1:])
        assert (result.exit_status, result.codes) == (0, ()), result.text


def test_the_program(tmp_path: Path) -> None:
    save(RELU, tmp_path, 20)
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            "from omforge.atc.sim.main import main; main()",
            "--model=model.onnx",
            "--framework=5",
            "--output=o",
            "--soc_version=Ascend310P3",
        ],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 255
    assert "ATC run failed" in done.stdout
    assert "(E13010): No operator plugin is registered for Op: Relu_0" in done.stdout


def test_the_text_of_errors() -> None:
    """hicann/metadef:error_manager/error_manager.cc: one code, the rest under TraceBack."""
    report = Report()
    report.error("E13010", opname="a", optype="ai.onnx::16::Foo")
    report.error("E13010", opname="b", optype="ai.onnx::16::Foo")
    report.error("E13010", opname="b", optype="ai.onnx::16::Foo")  # the same one counts once
    report.inner("Model parse to graph failed, graph name:m.")
    lines = report.error_text().splitlines()
    assert lines[0].endswith(
        "Not_Supported_Operator(E13010): No operator plugin is registered for Op: a, "
        "optype: ai.onnx::16::Foo."
    )
    assert lines[1:] == [
        "        TraceBack (most recent call last):",
        "        No operator plugin is registered for Op: b, optype: ai.onnx::16::Foo.",
        "        Model parse to graph failed, graph name:m.",
    ]


def test_inner_errors_come_first_only_where_nothing_else_is() -> None:
    report = Report()
    report.inner("one")
    report.inner("two", "EZ9999")
    assert report.error_text().startswith("E19999: Inner Error!\nE19999[PID: ")
    report.error("E16004")
    assert "Invalid_Argument_ONNX_Model_Data(E16004)" in report.error_text().splitlines()[0]


def test_every_registered_text_takes_its_arguments() -> None:
    for template in templates().values():
        count = len([name for name in template.arguments if name])
        assert template.message.count("%s") in (count, 0), template


def test_the_simulation_shares_no_rule_with_our_check() -> None:
    """One tests the other: only the raw tables in omforge/lowering/data are common."""
    folder = Path(atc_sim.__file__).parent
    for file in folder.glob("*.py"):
        names = {
            alias.name if isinstance(node, ast.Import) else node.module or ""
            for node in ast.walk(ast.parse(file.read_text()))
            if isinstance(node, ast.Import | ast.ImportFrom)
            for alias in node.names
        }
        rooms = (
            "omforge.lowering.legality",
            "omforge.lowering.legalize",
            "omforge.lowering.target",
        )
        assert not [name for name in names if name.startswith(rooms)], file


def test_a_folder_that_cannot_be_written_is_an_error_and_no_traceback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device", "model.om")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("omforge.atc.sim.emit.write_model", full)
    result = run(
        [
            f"--model={save(RELU, tmp_path)}",
            "--framework=5",
            "--output=model",
            "--soc_version=Ascend310P3",
        ]
    )
    assert (result.exit_status, result.codes) == (255, ("E19999",))
    assert "No space left on device: model.om" in result.text
