"""--dtype bf16: both fronts agree with the export, device included; what has none says why."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import pytest

import omforge
from omforge import ir
from omforge.air.files import read_air
from omforge.compilation.compile import compile_bundle
from omforge.compilation.options import CompileOptions
from omforge.ir.errors import InputError
from omforge.ir.fronts import Front
from omforge.runtime.backends import open_model
from omforge.runtime.bundle import Bundle
from omforge.runtime.compare import verify_bundle
from omforge.runtime.compare_encode import verify_encoder

Exported = Callable[[str, str], Path]

SMALL = CompileOptions("Ascend910B4", context=48, prefill=(4, 16), batch=2, dtype="bf16")


@pytest.mark.parametrize("front", ["onnx", "air"])
@pytest.mark.parametrize(
    ("route", "family"), [("optimum", "llama_gqa"), ("dynamo", "qwen2"), ("optimum", "gemma2")]
)
def test_an_export_compiles_and_agrees(
    exported: Exported, tmp_path: Path, route: str, family: str, front: Front
) -> None:
    options = dataclasses.replace(SMALL, front=front)
    made = compile_bundle(exported(route, family), tmp_path / "b", options).manifest
    assert (made.dtype, made.kv.dtype) == ("bfloat16", "bfloat16")
    assert _floats(tmp_path / "b" / made.buckets[0].file) == {"bfloat16"}
    assert all("--precision_mode_v2=origin" in bucket.command for bucket in made.buckets)
    report = verify_bundle(Bundle.open(tmp_path / "b", verify_hashes=True), steps=4)
    assert report.ok, report.failures
    assert report.worst("canonical").max_abs < 1e-4
    assert report.worst("lowered").max_abs > 1e-3


def _floats(file: Path) -> set[str]:
    """The dtypes of float inputs and outputs."""
    if file.suffix == ".air":
        data = [op.output_desc[0].dtype for op in read_air(file).graph.ops if "Data" in op.type]
        return {dtype for dtype in data if "float" in dtype}
    graph = ir.load(file).graph
    found = [v.dtype for v in (*graph.inputs, *graph.outputs) if v.dtype is not None]
    return {dtype.name.lower() for dtype in found if dtype.is_floating_point()}


@pytest.mark.parametrize("front", ["onnx", "air"])
def test_the_simulated_device_computes_what_the_cpu_does(
    exported: Exported, tmp_path: Path, front: Front
) -> None:
    bundle = omforge.compile(
        exported("optimum", "llama_gqa"),
        target="Ascend910B4",
        output=tmp_path / "b",
        context=32,
        prefill=(8,),
        dtype="bf16",
        front=front,
        atc="sim",
    )
    found: list[list[int]] = []
    for backend in ("cpu", "sim"):
        with open_model(bundle.inner, backend=backend) as model:
            found.append(list(model.generate([3, 1, 4, 1, 5], max_new_tokens=12)))
    assert found[0] == found[1]
    inputs = json.loads((bundle.folder / "manifest.json").read_text())["buckets"][0]["inputs"]
    assert {spec["dtype"] for spec in inputs if "past" in spec["name"]} == {"bfloat16"}


def test_an_encoder_folds_its_constants_in_bfloat16(encoder: Exported, tmp_path: Path) -> None:
    options = dataclasses.replace(SMALL, context=32, prefill=(16,))
    made = compile_bundle(encoder("optimum", "bert"), tmp_path / "b", options).manifest
    assert (made.task, made.dtype) == ("encode", "bfloat16")
    report = verify_encoder(Bundle.open(tmp_path / "b"))
    assert report.ok, report.failures


def test_weights_of_int4_have_scales_of_bfloat16(exported: Exported, tmp_path: Path) -> None:
    options = dataclasses.replace(SMALL, quantize="int4:g32", batch=1, prefill=(8,))
    made = compile_bundle(exported("optimum", "llama_gqa"), tmp_path / "b", options).manifest
    graph = ir.load(tmp_path / "b" / made.buckets[-1].file).graph
    products = [n for n in graph if n.op_type == "NPUWeightQuantBatchMatmulV2"]
    assert products
    scales = {n.inputs[2].dtype for n in products if n.inputs[2] is not None}
    assert scales == {ir.DataType.BFLOAT16}
    report = verify_bundle(Bundle.open(tmp_path / "b"), steps=4)
    assert report.ok, report.failures


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"soc": "Ascend310P3"}, "no bfloat16 compute"),
        ({"soc": "Ascend310B4", "front": "air"}, "no bfloat16 kernel of GatherV2"),
        ({"kv_dtype": "int8", "calibration": "text"}, "AscendQuant"),
        ({"quantize": "w8a8", "calibration": "text"}, "kernels for products of int8 give float16"),
    ],
)
def test_what_cannot_be_is_refused_with_its_reason(
    exported: Exported, tmp_path: Path, changes: dict[str, str], why: str
) -> None:
    options = dataclasses.replace(SMALL, **changes)  # type: ignore[arg-type]
    with pytest.raises(InputError, match=why):
        compile_bundle(exported("optimum", "llama_gqa"), tmp_path / "b", options)
    assert not (tmp_path / "b").exists()
