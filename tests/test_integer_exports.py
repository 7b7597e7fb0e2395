"""Exports whose weights are integers already: compiled as they are, and judged as floats are.

ONNX Runtime's quantiser makes them, in both of its spellings: com.microsoft operators with blocks
of unsigned integers, and `DequantizeLinear`. onnxruntime-genai's builder calls it too.
"""

import dataclasses
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
from onnxruntime.quantization import QuantFormat
from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

from omforge import ir
from omforge.compilation.compile import compile_bundle
from omforge.compilation.options import CompileOptions
from omforge.lowering.legality import check_legal
from omforge.lowering.target import target
from omforge.passes import make_pipeline
from omforge.passes.quantize_weights import QuantizeWeights
from omforge.quantization.linear import stored_as_integers
from omforge.runtime import export as export_module
from omforge.runtime.bundle import Bundle
from omforge.runtime.compare import verify_bundle

Exported = Callable[[str, str], Path]

OPTIONS = CompileOptions("Ascend910B3", context=48, prefill=(4, 16), batch=2)


def quantized(
    source: Path, folder: Path, bits: int, *, symmetric: bool, spelling: QuantFormat
) -> Path:
    """An export with integers in groups of 32, which lets ONNX Runtime round activations too."""
    logging.getLogger("onnxruntime.quantization.matmul_nbits_quantizer").disabled = True
    lookups = ("Gather",) if bits == 4 and spelling == QuantFormat.QOperator else ()
    step = MatMulNBitsQuantizer(
        onnx.load(source),
        bits=bits,
        block_size=32,
        is_symmetric=symmetric,
        accuracy_level=4,
        quant_format=spelling,
        op_types_to_quantize=("MatMul", *lookups),
    )
    step.process()
    folder.mkdir()
    onnx.save(step.model.model, folder / "model.onnx")
    (folder / "config.json").write_bytes((source.parent / "config.json").read_bytes())
    return folder / "model.onnx"


@pytest.mark.parametrize(("route", "family"), [("genai", "qwen3"), ("optimum", "llama_gqa")])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(
    ("bits", "spelling"),
    [(4, QuantFormat.QOperator), (8, QuantFormat.QOperator), (4, QuantFormat.QDQ)],
)
def test_it_compiles_and_agrees(
    exported: Exported,
    tmp_path: Path,
    route: str,
    family: str,
    symmetric: bool,
    bits: int,
    spelling: QuantFormat,
) -> None:
    source = quantized(
        exported(route, family), tmp_path / "export", bits, symmetric=symmetric, spelling=spelling
    )
    result = compile_bundle(source, tmp_path / "bundle", OPTIONS)
    assert result.coverage.complete
    for bucket in result.manifest.buckets:
        graph = ir.load(tmp_path / "bundle" / bucket.file)
        assert check_legal(graph, target(OPTIONS.soc)) == []
        products = [node for node in graph.graph if node.op_type == "NPUWeightQuantBatchMatmulV2"]
        assert len(products) == (11 if route == "genai" else 15)
    # The integers are those of the export, so nothing is lost, and all of it is judged.
    report = verify_bundle(Bundle.open(tmp_path / "bundle", verify_hashes=True), steps=4)
    assert report.ok, report.failures
    assert all(found.judged for found in report.comparisons)
    assert report.worst("canonical").max_abs < 1e-4


def test_the_reference_does_not_round_what_layers_read(
    exported: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether ONNX Runtime does at level 4 depends on its options, and on the machine."""
    source = quantized(
        exported("optimum", "llama_gqa"),
        tmp_path / "export",
        4,
        symmetric=True,
        spelling=QuantFormat.QOperator,
    )
    made = compile_bundle(source, tmp_path / "bundle", OPTIONS).manifest
    given: list[Any] = []
    real = export_module.OrtSession
    monkeypatch.setattr(
        export_module,
        "OrtSession",
        lambda model, **more: given.append(model) or real(model, **more),
    )
    export_module.ExportModel(source, made.export, made.kv).close()
    (model,) = given
    products = [node for node in model.graph if node.op_type == "MatMulNBits"]
    assert products
    assert not any("accuracy_level" in node.attributes for node in products)


def test_the_bundle_is_as_small_as_the_export(exported: Exported, tmp_path: Path) -> None:
    source = quantized(
        exported("genai", "llama_gqa"),
        tmp_path / "export",
        4,
        symmetric=True,
        spelling=QuantFormat.QOperator,
    )
    compile_bundle(source, tmp_path / "bundle", OPTIONS)
    # Beside float16 scales: float32 ones of the canonical graph, tables of positions.
    written = (tmp_path / "bundle" / "weights.bin").stat().st_size
    assert written < 1.5 * source.stat().st_size


def test_what_stays_as_onnxruntime_has_it_is_named(exported: Exported, tmp_path: Path) -> None:
    """Without the product behind it attention is not raised either, and that is not the reason."""
    source = quantized(
        exported("genai", "llama_gqa"),
        tmp_path / "export",
        4,
        symmetric=True,
        spelling=QuantFormat.QOperator,
    )
    model = onnx.load(source)
    node = next(n for n in model.graph.node if n.op_type == "MatMulNBits" and "gate" in n.name)
    next(given for given in node.attribute if given.name == "bits").i = 2
    onnx.save(model, source)
    with pytest.raises(
        ir.CheckError, match=r"MatMulNBits .*is not standard ONNX.*: its integers have 2 bits"
    ):
        compile_bundle(source, tmp_path / "bundle", OPTIONS)
    # In the MLP it hides no block that is counted, but the size of all that is behind it.
    node.op_type = "MatMulBnb4"
    onnx.save(model, source)
    partial = dataclasses.replace(OPTIONS, allow_partial=True)
    for options in (OPTIONS, partial):
        with pytest.raises(ir.CheckError, match=r"MatMulBnb4 .*: no standard form of MatMulBnb4"):
            compile_bundle(source, tmp_path / "bundle", options)


def test_a_soc_without_such_a_kernel_says_what_it_has(exported: Exported, tmp_path: Path) -> None:
    source = quantized(
        exported("genai", "llama_gqa"),
        tmp_path / "export",
        4,
        symmetric=True,
        spelling=QuantFormat.QOperator,
    )
    for options, message in (
        (dataclasses.replace(OPTIONS, soc="Ascend310P3"), "11 int4 weights, and Ascend310P3 has"),
        (dataclasses.replace(OPTIONS, soc="Ascend310B1"), "11 int4 weights, and Ascend310B1 has"),
        (dataclasses.replace(OPTIONS, dtype="fp32"), "11 int4 weights, with --dtype fp32"),
    ):
        with pytest.raises(ir.InputError, match=message):
            compile_bundle(source, tmp_path / "bundle", options)
    assert not (tmp_path / "bundle").exists()


def test_a_weight_is_turned_for_the_soc_that_wants_it_so(
    exported: Exported, tmp_path: Path
) -> None:
    """310P takes [N, K] alone, and an export may have int8 with a scale per channel as [K, N]."""
    model = ir.load(exported("optimum", "llama_gqa"))
    make_pipeline("canonicalize").run(model)
    QuantizeWeights().run(model)
    (tmp_path / "export").mkdir()
    ir.save(model, tmp_path / "export" / "model.onnx")
    options = CompileOptions("Ascend310P3", context=48, prefill=(4,))
    result = compile_bundle(tmp_path / "export", tmp_path / "bundle", options)
    assert result.coverage.complete
    report = verify_bundle(Bundle.open(tmp_path / "bundle"), steps=4)
    assert report.ok, report.failures


def test_integers_are_not_quantised_again(exported: Exported, tmp_path: Path) -> None:
    source = quantized(
        exported("optimum", "llama_gqa"),
        tmp_path / "export",
        4,
        symmetric=False,
        spelling=QuantFormat.QDQ,
    )
    model = ir.load(source)
    make_pipeline("canonicalize").run(model)
    assert len(stored_as_integers(model)) == 15
    with pytest.raises(ir.InputError, match="15 weights of products are integers already"):
        QuantizeWeights().run(model)
