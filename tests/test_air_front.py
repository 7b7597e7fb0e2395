"""compile --front air: GE graphs that write their cache, and say the same as the export."""

import dataclasses
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import numpy as np
import pytest

from omforge import ir
from omforge.air.files import read_air
from omforge.air.graph import Air
from omforge.bundle.manifest import Manifest
from omforge.compilation.canonical import float_canonical
from omforge.compilation.compile import compile_bundle
from omforge.compilation.options import CompileOptions
from omforge.compilation.why import explain_choices
from omforge.ir.errors import InputError
from omforge.lowering.air_legality import check_air_file
from omforge.lowering.target import target
from omforge.runtime.bundle import Bundle
from omforge.runtime.compare import verify_bundle
from omforge.runtime.compare_encode import verify_encoder
from omforge.runtime.quality import measure_quality

Exported = Callable[[str, str], Path]

SMALL = CompileOptions("Ascend310P3", context=48, prefill=(4, 16), batch=2, front="air")


def _graphs(folder: Path) -> dict[str, Air]:
    return {b.name: read_air(folder / b.file) for b in Manifest.load(folder).buckets}


def _types(air: Air) -> Counter[str]:
    return Counter(op.type for op in air.graph.ops)


@pytest.mark.parametrize(
    ("route", "family", "soc"),
    [
        ("optimum", "llama_mha", "Ascend310P3"),
        ("dynamo", "mistral", "Ascend310P3"),
        ("torchscript-op17", "qwen2", "Ascend910B4"),
        ("hfexporter", "qwen3", "Ascend310B4"),
        ("optimum", "gemma2", "Ascend910B4"),
        ("dynamo", "phi3", "Ascend310B4"),
        ("optimum", "bloom", "Ascend910B4"),
        ("hfexporter", "gpt2", "Ascend310P3"),
    ],
)
def test_an_export_compiles_and_agrees(
    exported: Exported, tmp_path: Path, route: str, family: str, soc: str
) -> None:
    options = dataclasses.replace(SMALL, soc=soc)
    result = compile_bundle(exported(route, family), tmp_path / "b", options)
    assert result.manifest.front == "air"
    assert result.manifest.kv.in_place
    for bucket in result.manifest.buckets:
        assert check_air_file(tmp_path / "b" / bucket.file, target(soc)).errors == ()
        assert [spec.name for spec in bucket.outputs] == ["logits"]
    report = verify_bundle(Bundle.open(tmp_path / "b", verify_hashes=True), steps=8)
    assert report.ok, report.failures
    assert report.worst("canonical").max_abs < 1e-4


@pytest.mark.parametrize(
    ("soc", "written", "attention"),
    [
        ("Ascend310P3", "Scatter", "IncreFlashAttention"),
        ("Ascend910B4", "Scatter", "IncreFlashAttention"),
        ("Ascend310B4", "ScatterNdUpdate", "BatchMatMulV2"),
    ],
)
def test_what_a_step_is_made_of(
    exported: Exported, tmp_path: Path, soc: str, written: str, attention: str
) -> None:
    options = dataclasses.replace(SMALL, soc=soc)
    compile_bundle(exported("optimum", "llama_mha"), tmp_path / "b", options)
    decode = _graphs(tmp_path / "b")["decode_c48_b2"]
    types = _types(decode)
    assert types[written] == types["RefData"] == 4
    assert types[attention] >= 2
    # Every weight is in the bundle's one file, and nothing joins or copies the cache.
    places = {
        op.attributes["location"].value for op in decode.graph.ops if op.type == "FileConstant"
    }
    assert places == {"weights.bin"}
    concats = [op for op in decode.graph.ops if op.type == "ConcatD"]
    assert all(48 not in (op.output_desc[0].shape or ()) for op in concats)


def test_the_models_own_epsilon(exported: Exported, tmp_path: Path) -> None:
    """By ATC's ONNX plugin it would be 1e-6 whatever the model has."""
    path = exported("optimum", "llama_mha")
    model = ir.load(path)
    for node in model.graph:
        if node.op_type == "Constant" and (node.name or "").endswith("norm/Constant_2"):
            node.attributes["value"] = ir.AttrTensor("value", ir.tensor(np.float32(5e-4)))
    folder = tmp_path / "export"
    folder.mkdir()
    ir.save(model, folder / "model.onnx")
    compile_bundle(folder, tmp_path / "b", dataclasses.replace(SMALL, soc="Ascend910B4"))
    ops = _graphs(tmp_path / "b")["decode_c48_b2"].graph.ops
    norms = [op for op in ops if op.type in ("RmsNorm", "AddRmsNorm")]
    assert len(norms) == 5
    assert [op.attributes["epsilon"].value for op in norms] == pytest.approx([5e-4] * 5)
    assert verify_bundle(Bundle.open(tmp_path / "b"), steps=4).ok


def test_the_same_input_gives_the_same_bytes(exported: Exported, tmp_path: Path) -> None:
    for name in ("a", "b"):
        compile_bundle(exported("optimum", "llama_gqa"), tmp_path / name, SMALL)
    files = sorted(file.name for file in (tmp_path / "a").iterdir())
    assert files == sorted(file.name for file in (tmp_path / "b").iterdir())
    same = [(tmp_path / "a" / f).read_bytes() == (tmp_path / "b" / f).read_bytes() for f in files]
    assert all(same)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Token numbers to calibrate on."""
    path = tmp_path_factory.mktemp("text") / "tokens.npy"
    np.save(path, np.random.default_rng(0).integers(3, 300, (24, 40)))
    return path


ONE = dataclasses.replace(SMALL, prefill=(4,), batch=1)
UNROUNDED = ("lowered, unrounded", "canonical, unrounded")
SAME_CACHE = ("lowered", "canonical, same cache")


@pytest.mark.parametrize(
    ("soc", "quantize", "kv", "ops", "judged"),
    [
        ("Ascend310P3", "w8a8", "fp16", "AscendDequant", {UNROUNDED}),
        ("Ascend910B4", "int4:g32", "int8", "WeightQuantBatchMatmulV2", {UNROUNDED, SAME_CACHE}),
    ],
)
def test_a_quantised_bundle_is_judged_as_one_of_onnx_graphs(
    exported: Exported,
    tmp_path: Path,
    text: Path,
    soc: str,
    quantize: str,
    kv: Literal["fp16", "int8"],
    ops: str,
    judged: set[tuple[str, str]],
) -> None:
    options = dataclasses.replace(ONE, soc=soc, quantize=quantize, kv_dtype=kv, calibration=text)
    result = compile_bundle(exported("optimum", "llama_gqa"), tmp_path / "b", options)
    assert result.manifest.kv.in_place
    for graph in _graphs(tmp_path / "b").values():
        assert _types(graph)[ops] == 15
        caches = [op.output_desc[0].dtype for op in graph.graph.ops if op.type == "RefData"]
        assert caches == [result.manifest.kv.dtype] * 4
    report = verify_bundle(Bundle.open(tmp_path / "b", verify_hashes=True), steps=3)
    assert report.ok, report.failures
    assert {
        (each.level, each.reference)
        for each in report.comparisons
        if each.judged and each.level != "exported, in pieces"
    } == judged


def test_an_int8_cache_that_no_operator_writes_is_the_runtimes(
    exported: Exported, tmp_path: Path, text: Path
) -> None:
    options = dataclasses.replace(ONE, soc="Ascend310B4", kv_dtype="int8", calibration=text)
    result = compile_bundle(exported("optimum", "llama_gqa"), tmp_path / "b", options)
    assert not result.manifest.kv.in_place
    (told,) = [event for event in result.events if event.pass_name == "cache-in-place"]
    assert told.reason.endswith("310b has no Scatter, and ScatterNdUpdate for no int8")
    report = verify_bundle(Bundle.open(tmp_path / "b"), steps=3)
    assert report.ok, report.failures
    assert {each.level for each in report.comparisons if each.judged} >= {"lowered, unrounded"}
    (why, _) = explain_choices(tmp_path / "b", target("Ascend310B4"))
    assert why.layout == "per-layer"


def test_the_quality_of_a_bundle_that_writes_its_cache(
    exported: Exported, tmp_path: Path, text: Path
) -> None:
    options = dataclasses.replace(ONE, quantize="int8")
    made = compile_bundle(exported("optimum", "llama_gqa"), tmp_path / "b", options).manifest
    bundle = Bundle.open(tmp_path / "b")
    report = measure_quality(
        bundle,
        np.load(text)[0].tolist(),
        float_canonical=float_canonical(bundle.export, made),
        piece_tokens=20,
        new_tokens=4,
    )
    assert report.layers is not None
    assert len(report.layers.layers) == 15
    assert report.level("lowered").perplexity == pytest.approx(
        report.level("canonical").perplexity, rel=1e-2
    )
    assert report.level("canonical").kl_mean > 0


def test_stacked_layers_are_written_by_the_runtime(exported: Exported, tmp_path: Path) -> None:
    options = dataclasses.replace(SMALL, layout="stacked")
    result = compile_bundle(exported("optimum", "llama_gqa"), tmp_path / "b", options)
    assert not result.manifest.kv.in_place
    assert any("not written in place" in event.reason for event in result.events)
    assert _types(_graphs(tmp_path / "b")["decode_c48_b2"])["RefData"] == 0
    assert verify_bundle(Bundle.open(tmp_path / "b"), steps=4).ok


@pytest.mark.parametrize("soc", ["Ascend910B4", "Ascend310B4"])
def test_gears_share_one_graph(exported: Exported, tmp_path: Path, soc: str) -> None:
    options = dataclasses.replace(SMALL, gears=True, soc=soc)
    result = compile_bundle(exported("optimum", "llama_gqa"), tmp_path / "b", options)
    (bucket,) = result.manifest.buckets
    assert bucket.gears == (1, 4, 16)
    shapes = {spec.name: spec.shape for spec in bucket.inputs}
    assert shapes["attention_mask"] == (2, 1, "seq", 48)
    (command,) = [word for word in bucket.command if word.startswith("--input_shape")]
    assert "input_ids:2,-1" in command
    assert verify_bundle(Bundle.open(tmp_path / "b"), steps=4).ok


def test_a_model_without_a_cache(encoder: Exported, tmp_path: Path) -> None:
    options = CompileOptions("Ascend310P3", prefill=(8, 16), batch=2, front="air")
    result = compile_bundle(encoder("optimum", "bert"), tmp_path / "b", options)
    assert result.manifest.task == "encode"
    assert all(_types(air)["RefData"] == 0 for air in _graphs(tmp_path / "b").values())
    report = verify_encoder(Bundle.open(tmp_path / "b"))
    assert report.ok, report.failures


def test_a_bundle_without_its_weights_is_refused(exported: Exported, tmp_path: Path) -> None:
    compile_bundle(exported("optimum", "llama_gqa"), tmp_path / "b", SMALL)
    weights = tmp_path / "b" / "weights.bin"
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(InputError, match=r"weight .* is missing"):
        Bundle.open(tmp_path / "b", verify_hashes=False)
