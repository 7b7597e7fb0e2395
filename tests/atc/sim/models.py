"""Small models for the simulated atc, and one way to run it."""

import shutil
from pathlib import Path

import onnx

from omforge.atc.sim.main import AtcSimResult, run

RELU = "(float[1,4] x) => (float[1,4] y) { y = Relu (x) }"


def model(body: str, opset: int | str = 16) -> onnx.ModelProto:
    """A model from ONNX text: `opset` is a number, or whole `"domain" : version` entries."""
    imports = opset if isinstance(opset, str) else f'"" : {opset}'
    return onnx.parser.parse_model(f"<ir_version: 8, opset_import: [{imports}]>\nagraph {body}")


def save(what: str | onnx.ModelProto, folder: Path, opset: int | str = 16) -> Path:
    path = folder / "model.onnx"
    proto = what if isinstance(what, onnx.ModelProto) else model(what, opset)
    path.write_bytes(proto.SerializeToString())
    return path


def atc(path: Path, *flags: str, soc: str = "Ascend310P3") -> AtcSimResult:
    """Run --mode=0 on a model, its .om going beside it; a flag given replaces the usual one."""
    usual = {
        "--model": str(path),
        "--framework": "5",
        "--output": str(path.parent / "out" / "model"),
        "--soc_version": soc,
        "--input_format": "ND",
        "--precision_mode_v2": "origin",
        "--check_report": str(path.parent / "check_result.json"),
    }
    for flag in flags:
        usual.pop(flag.partition("=")[0], None)
    return run([*(f"{name}={value}" for name, value in usual.items()), *flags])


def refused(
    what: str | onnx.ModelProto, folder: Path, *flags: str, opset: int | str = 16
) -> tuple[str, ...]:
    """The codes with which a model is refused."""
    shutil.rmtree(folder / "out", ignore_errors=True)
    result = atc(save(what, folder, opset), *flags)
    assert result.exit_status == 255, result.text
    assert "ATC run failed, Please check the detail log" in result.text
    assert not list((folder / "out").glob("*.om"))
    return result.codes
