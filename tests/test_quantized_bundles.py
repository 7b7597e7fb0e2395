"""Bundles with integers: what is stored, that it runs, and what is refused."""

import dataclasses
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
from typer.testing import CliRunner

from omforge import ir
from omforge.atc.build import BuildOptions
from omforge.cli.app import app
from omforge.compilation.compile import compile_bundle
from omforge.compilation.options import CompileOptions
from omforge.compilation.quantize_options import quantization_text
from omforge.ir.numerics import tolerance
from omforge.lowering.legality import check_file
from omforge.lowering.target import target
from omforge.runtime.bundle import Bundle
from omforge.runtime.compare import verify_bundle

Exported = Callable[[str, str], Path]

A2, A310P = "Ascend910B4", "Ascend310P3"
SMALL = CompileOptions(A2, context=48, prefill=(4, 16), batch=2)
WQBM = "NPUWeightQuantBatchMatmulV2"


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Token numbers to calibrate on."""
    path = tmp_path_factory.mktemp("text") / "tokens.npy"
    np.save(path, np.random.default_rng(0).integers(3, 300, (24, 40)))
    return path


@pytest.mark.parametrize(
    ("route", "family", "soc", "quantize", "kv", "layout"),
    [
        ("optimum", "llama_gqa", A310P, "int8", "fp16", "auto"),
        ("optimum", "llama_gqa", A310P, "int8:asym", "int8", "stacked"),
        ("optimum", "llama_gqa", "Ascend310B1", "", "int8", "auto"),
        ("dynamo", "mistral", A2, "int4:g32:asym", "int8", "auto"),
        ("dynamo", "qwen2", A2, "int4:g32:gptq", "fp16", "stacked"),
        ("hfexporter", "phi3", "Ascend910_95", "int4:g64:hqq", "int8", "stacked"),
        ("optimum", "gpt2", "Ascend910_9391", "int8:g32", "int8", "auto"),
    ],
)
def test_a_quantised_bundle_is_legal_and_runs_as_its_canonical_graph(
    exported: Exported,
    tmp_path: Path,
    text: Path,
    route: str,
    family: str,
    soc: str,
    quantize: str,
    kv: Literal["fp16", "int8"],
    layout: Literal["auto"],
) -> None:
    options = dataclasses.replace(
        SMALL, soc=soc, quantize=quantize, kv_dtype=kv, layout=layout, calibration=text
    )
    result = compile_bundle(exported(route, family), tmp_path / "b", options)
    made = result.manifest
    assert made.kv.dtype == ("int8" if kv == "int8" else "float16")
    assert made.quantization.matrices == made.quantization.all_matrices
    for bucket in made.buckets:
        assert check_file(tmp_path / "b" / bucket.file, target(soc)).errors == ()
        ops = [node.op_type for node in ir.load(tmp_path / "b" / bucket.file).graph]
        assert ops.count(WQBM) >= made.quantization.matrices - 1  # a tied weight is one
        if quantize:
            assert ops.count("MatMul") == 4 * made.kv.layers, "attention's own"
        caches = [
            s
            for s in (*bucket.inputs, *bucket.outputs)
            if s.name.startswith("p") and "id" not in s.name
        ]
        assert {spec.dtype for spec in caches} == {made.kv.dtype}
    report = verify_bundle(Bundle.open(tmp_path / "b", verify_hashes=True), steps=6)
    assert report.ok, report.failures
    made = [each for each in report.comparisons if each.level != "exported, in pieces"]
    assert {each.judged for each in made if each.reference == "exported"} == {False}
    judged = {(each.level, each.reference) for each in made if each.judged}
    if kv == "int8":
        same = ("lowered", "canonical, same cache")
        assert judged == {same, ("lowered, unrounded", "canonical, unrounded")}
    else:
        assert judged == {("lowered", "canonical")}


def test_integers_are_stored_once_for_all_graphs(exported: Exported, tmp_path: Path) -> None:
    for name, quantize in (("plain", ""), ("integers", "int4:g32")):
        options = dataclasses.replace(SMALL, quantize=quantize)
        compile_bundle(exported("optimum", "llama_gqa"), tmp_path / name, options)
    made = Bundle.open(tmp_path / "integers").manifest
    found = made.quantization
    assert (found.weights, found.matrices, found.all_matrices) == ("int4:g32:rtn", 15, 15)
    assert found.bytes_after < found.bytes_before / 6
    canonical = places(tmp_path / "integers" / made.canonical, ir.DataType.INT4)
    assert len(canonical) == 15
    for bucket in made.buckets:
        assert places(tmp_path / "integers" / bucket.file, ir.DataType.INT32) == canonical
    one, two = ((tmp_path / n / "weights.bin").stat().st_size for n in ("plain", "integers"))
    assert two < one / 3


def places(path: Path, dtype: ir.DataType) -> set[tuple[int, int]]:
    """Where the large initializers of a dtype lie in the file of weights."""
    tensors = [value.const_value for value in ir.load(path).graph.initializers.values()]
    return {
        (tensor.offset or 0, tensor.nbytes)
        for tensor in tensors
        if isinstance(tensor, ir.ExternalTensor) and tensor.dtype == dtype
    }


def test_the_same_input_gives_the_same_bytes(
    exported: Exported, tmp_path: Path, text: Path
) -> None:
    options = dataclasses.replace(SMALL, quantize="int4:g32", kv_dtype="int8", calibration=text)
    for name in ("one", "two"):
        compile_bundle(exported("optimum", "llama_gqa"), tmp_path / name, options)
    one, two = ({f.name: f.read_bytes() for f in (tmp_path / n).iterdir()} for n in ("one", "two"))
    assert [name for name in one if one[name] != two.get(name)] == []


def test_int8_halves_the_cache(exported: Exported, tmp_path: Path, text: Path) -> None:
    made: dict[str, int] = {}
    for kv in ("fp16", "int8"):
        options = dataclasses.replace(SMALL, kv_dtype=kv, calibration=text)  # type: ignore[arg-type]
        result = compile_bundle(exported("optimum", "llama_gqa"), tmp_path / kv, options)
        made[kv] = result.manifest.quantization.cache_bytes
    assert made["fp16"] == 2 * made["int8"] == 2 * (2 * 2 * 2 * 2 * 48 * 16)


def test_int4_may_be_stored_under_its_own_dtype(exported: Exported, tmp_path: Path) -> None:
    options = dataclasses.replace(
        SMALL, quantize="int4:g32", forms=(("QuantizedMatMul", f"{WQBM}-INT4"),)
    )
    compile_bundle(exported("optimum", "llama_gqa"), tmp_path / "b", options)
    graph = ir.load(tmp_path / "b" / "decode_c48_b2.onnx").graph
    weights = {node.inputs[1].dtype for node in graph if node.op_type == WQBM}
    assert weights == {ir.DataType.INT4}
    assert verify_bundle(Bundle.open(tmp_path / "b"), steps=2).ok


def test_the_simulated_atc_takes_it(exported: Exported, tmp_path: Path, text: Path) -> None:
    options = dataclasses.replace(
        SMALL,
        soc=A310P,
        quantize="int8",
        kv_dtype="int8",
        calibration=text,
        build=BuildOptions(atc="sim", cache=None),
    )
    result = compile_bundle(exported("optimum", "llama_gqa"), tmp_path / "b", options)
    assert all(bucket.om for bucket in result.manifest.buckets)


def test_what_the_soc_lacks_is_refused_before_anything_is_written(
    exported: Exported, tmp_path: Path
) -> None:
    for soc, quantize, message in (
        ("Ascend310B1", "int8", "no kernel for products with quantised weights"),
        (A310P, "int4", "310P has NPUWeightQuantBatchMatmulV2 for int8 weights"),
    ):
        options = dataclasses.replace(SMALL, soc=soc, quantize=quantize)
        with pytest.raises(ir.InputError, match=message):
            compile_bundle(exported("optimum", "llama_gqa"), tmp_path / "b", options)
    assert list(tmp_path.iterdir()) == []


def test_the_command_says_what_became_integers(
    exported: Exported, tmp_path: Path, text: Path
) -> None:
    words = ["compile", str(exported("optimum", "llama_gqa")), "--target", A310P, "--atc", "none"]
    words += ["-o", str(tmp_path / "b"), "--context", "48", "--prefill", "8"]
    words += ["--quantize", "int8", "--kv-dtype", "int8", "--calibration", str(text)]
    run: Any = CliRunner().invoke(app, words)
    assert run.exit_code == 0, run.output
    shown = " ".join(run.output.split())
    assert "int8:rtn: 15 of 15 matrices, 425,984 bytes -> 112,384; int8 cache" in shown
    # 2 layers of keys and values of 48 tokens, 2 heads of 16.
    assert re.search(r"memory weights 0\.\d\d MiB \+ cache of 48 tokens 0\.01 MiB = 0\.\d\d", shown)
    run = CliRunner().invoke(app, [*words, "--json"])
    found = json.loads(run.output)["quantization"]
    assert (found["weights"], found["kv"], found["matrices"]) == ("int8:rtn", "int8", 15)
    assert quantization_text(Bundle.open(tmp_path / "b").manifest) in shown


def test_without_a_calibration_text_the_command_says_what_it_needs(
    exported: Exported, tmp_path: Path
) -> None:
    words = ["compile", str(exported("optimum", "llama_gqa")), "--target", A310P]
    words += ["-o", str(tmp_path / "b"), "--kv-dtype", "int8"]
    run: Any = CliRunner().invoke(app, words)
    assert run.exit_code == 2
    assert "needs a calibration text" in " ".join(run.output.split())


def budget_size(folder: Path) -> int:
    return Bundle.open(folder).manifest.quantization.graph_bytes


@pytest.mark.parametrize(
    ("route", "family", "soc", "quantize", "kv", "budget"),
    [
        ("optimum", "llama_gqa", A2, "int4:g32:gptq", "fp16", 122_650),
        ("dynamo", "qwen2", A2, "int4:g32:asym:hqq", "int8", 130_522),
        ("optimum", "gpt2", A310P, "int8", "fp16", 213_950),
    ],
)
def test_a_budget_mixes_what_the_soc_has(
    exported: Exported,
    tmp_path: Path,
    text: Path,
    route: str,
    family: str,
    soc: str,
    quantize: str,
    kv: Literal["fp16", "int8"],
    budget: int,
) -> None:
    options = dataclasses.replace(
        SMALL,
        soc=soc,
        quantize=quantize,
        kv_dtype=kv,
        calibration=text,
        prefill=(4,),
        budget=str(budget),
    )
    result = compile_bundle(exported(route, family), tmp_path / "b", options)
    found, plan = result.manifest.quantization, result.budget
    assert plan is not None
    assert plan.least < found.graph_bytes <= budget == found.budget < plan.most
    # What is predicted is what is there, but for the scales of an int8 cache.
    assert plan.nbytes - found.graph_bytes == pytest.approx(0, abs=0 if kv == "fp16" else 8192)
    kinds = dict(found.kinds)
    assert sum(kinds.values()) == found.all_matrices
    assert found.matrices == found.all_matrices - kinds["fp16"]
    assert len([kind for kind, count in kinds.items() if count]) >= 2, kinds
    ops = {A310P: {ir.DataType.INT8}}.get(soc, {ir.DataType.INT8, ir.DataType.INT32})
    for bucket in result.manifest.buckets:
        assert check_file(tmp_path / "b" / bucket.file, target(soc)).errors == ()
        graph = ir.load(tmp_path / "b" / bucket.file).graph
        assert {node.inputs[1].dtype for node in graph if node.op_type == WQBM} == ops
    floats = [layer.name for layer in plan.layers if layer.chosen == "fp16"]
    told = [event.where for event in result.events if event.pass_name == "quantize-weights"]
    assert told == floats
    report = json.loads((tmp_path / "b" / "report.json").read_text())["quantization"]
    assert report["budget"]["budget"] == budget
    assert [layer["chosen"] for layer in report["budget"]["layers"]] == [
        layer.chosen for layer in plan.layers
    ]
    assert len(report["layers"]) == found.matrices
    checked = verify_bundle(Bundle.open(tmp_path / "b", verify_hashes=True), steps=4)
    assert checked.ok, checked.failures


def test_a_budget_is_shown(exported: Exported, tmp_path: Path, text: Path) -> None:
    words = ["compile", str(exported("optimum", "llama_gqa")), "--target", A2, "--atc", "none"]
    words += ["-o", str(tmp_path / "b"), "--context", "48", "--prefill", "8"]
    words += ["--quantize", "int4:g32", "--budget", "150KB"]
    run: Any = CliRunner().invoke(app, [*words, "--calibration", str(text)])
    assert run.exit_code == 0, run.output
    shown = " ".join(run.output.split())
    assert "of 146.48 KiB (150,000 bytes)" in shown
    assert "nats a token; the least possible is" in shown
    assert "most sensitive chosen as int4:g32 as int8 as fp16" in shown
    assert budget_size(tmp_path / "b") <= 150_000
    run = CliRunner().invoke(app, [*words, "--json"])
    found = json.loads(run.output)
    assert found["budget"]["measure"] == "weights"
    assert found["quantization"]["budget"] == 150_000


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--budget", "100MB"], "--budget 100MB without --quantize"),
        (["--quantize", "int4:g32", "--budget", "lots"], "'lots' is no size"),
        (["--quantize", "int4:g32", "--budget", "9KB"], "a budget of 8.79 KiB (9,000 bytes) does"),
    ],
)
def test_budgets_that_cannot_be(
    exported: Exported, tmp_path: Path, words: list[str], message: str
) -> None:
    line = ["compile", str(exported("optimum", "llama_gqa")), "--target", A2, "--atc", "none"]
    run: Any = CliRunner().invoke(app, [*line, "-o", str(tmp_path / "b"), "--prefill", "8", *words])
    assert run.exit_code == 2
    assert message in " ".join(run.output.split())
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize("soc", [A310P, "Ascend310B1"])
def test_a_bundle_of_int8_products_is_legal_and_runs(
    exported: Exported, tmp_path: Path, text: Path, soc: str
) -> None:
    options = dataclasses.replace(SMALL, soc=soc, quantize="w8a8:limit=1", calibration=text)
    result = compile_bundle(exported("optimum", "llama_gqa"), tmp_path / "b", options)
    made = result.manifest
    assert made.quantization.int8_inputs
    assert made.quantization.matrices == made.quantization.all_matrices
    for bucket in made.buckets:
        assert check_file(tmp_path / "b" / bucket.file, target(soc)).errors == ()
        assert "--precision_mode_v2=mixed_float16" in bucket.command
        ops = [node.op_type for node in ir.load(tmp_path / "b" / bucket.file).graph]
        kernel = "QuantBatchMatMul" if soc == A310P else "AscendDequant"
        assert ops.count(kernel) == made.quantization.matrices, "the head included"
        assert not {"QuantizeLinear", "DequantizeLinear", WQBM} & set(ops)
        assert 0 < ops.count("AscendQuant") < ops.count(kernel), "layers share their inputs"
    report = verify_bundle(Bundle.open(tmp_path / "b", verify_hashes=True), steps=6)
    assert report.ok, report.failures
    assert any("layers read int8" in note for note in report.notes)
    judged = {(each.level, each.reference) for each in report.comparisons if each.judged}
    assert judged == {
        ("exported, in pieces", "exported"),
        ("lowered, unrounded", "canonical, unrounded"),
    }


@pytest.mark.parametrize("soc", [A310P, "Ascend310B1"])
def test_a_wrong_scale_of_an_int8_product_fails(
    exported: Exported, tmp_path: Path, text: Path, soc: str
) -> None:
    """As a rounding error of float16 may be a step of int8, the graphs are compared without it."""
    options = dataclasses.replace(SMALL, soc=soc, quantize="w8a8:limit=1", calibration=text)
    made = compile_bundle(exported("optimum", "llama_gqa"), tmp_path / "b", options).manifest
    kernel, place = ("QuantBatchMatMul", 2) if soc == A310P else ("AscendDequant", 1)
    for bucket in made.buckets:
        model = ir.load(tmp_path / "b" / bucket.file)
        node = next(node for node in model.graph if node.op_type == kernel)
        scale = node.inputs[place]
        assert scale is not None
        assert scale.const_value is not None
        doubled = scale.const_value.numpy() + np.uint64(1 << 23)  # the exponent's last bit
        scale.const_value = ir.Tensor(doubled, name=scale.name)
        ir.save(model, tmp_path / "b" / bucket.file, external=None)
    report = verify_bundle(Bundle.open(tmp_path / "b", verify_hashes=False), steps=2)
    assert {each.what.split(" differs")[0] for each in report.failures} == {"lowered, unrounded"}


@pytest.mark.parametrize("layout", ["stacked", "per-layer"])
@pytest.mark.parametrize("factor", [2, 8])
def test_a_wrong_scale_of_an_int8_cache_fails(
    exported: Exported, tmp_path: Path, text: Path, layout: Literal["stacked"], factor: int
) -> None:
    options = dataclasses.replace(SMALL, kv_dtype="int8", calibration=text, layout=layout)
    made = compile_bundle(exported("optimum", "llama_gqa"), tmp_path / "b", options).manifest
    for bucket in made.buckets:
        model = ir.load(tmp_path / "b" / bucket.file)
        rounding = next(node for node in model.graph if node.op_type == "Round")
        division = rounding.inputs[0].producer().inputs[0].producer()  # behind a Clip
        scale = division.inputs[1]
        scale.const_value = ir.Tensor(
            scale.const_value.numpy() * np.float16(factor), name=scale.name
        )
        ir.save(model, tmp_path / "b" / bucket.file, external=None)
    report = verify_bundle(Bundle.open(tmp_path / "b", verify_hashes=False), steps=2)
    failed = {each.what.split(" differs")[0] for each in report.failures}
    assert failed == {"lowered", "lowered, unrounded", "the cache of lowered"}
    limits = report.tolerances
    assert limits["lowered, unrounded"] == limits["lowered"] == tolerance("float16")
    assert any("the cache is int8" in note for note in report.notes)


@pytest.mark.parametrize("family", ["gpt2", "gemma2", "llama_gqa"])
@pytest.mark.parametrize("kv", ["int8", "int8:head"])
def test_keys_beyond_a_poor_calibration_text_are_cut_off_alike_in_all_chunks(
    exported: Exported, tmp_path: Path, family: str, kv: Literal["int8"]
) -> None:
    np.save(tmp_path / "tokens.npy", np.array([[7, 9]]))
    options = dataclasses.replace(
        SMALL, kv_dtype=kv, calibration=tmp_path / "tokens.npy", context=64
    )
    compile_bundle(exported("optimum", family), tmp_path / "b", options)
    report = verify_bundle(Bundle.open(tmp_path / "b"), steps=2)
    assert report.ok, report.failures


@pytest.mark.parametrize("layout", ["stacked", "per-layer"])
def test_a_cache_that_is_not_rounded_to_nearest_fails(
    exported: Exported, tmp_path: Path, text: Path, layout: Literal["stacked"]
) -> None:
    options = dataclasses.replace(SMALL, kv_dtype="int8", calibration=text, layout=layout)
    made = compile_bundle(exported("optimum", "llama_gqa"), tmp_path / "b", options).manifest
    for bucket in made.buckets:
        model = ir.load(tmp_path / "b" / bucket.file)
        next(node for node in model.graph if node.op_type == "Round").op_type = "Floor"
        ir.save(model, tmp_path / "b" / bucket.file, external=None)
    report = verify_bundle(Bundle.open(tmp_path / "b", verify_hashes=False), steps=2)
    (unknown,) = [each for each in report.failures if "without the rounding" in each.what]
    assert "Cast(Round(Clip(x)))" in unknown.next_step
    tips = max(report.tips.values(), key=lambda tips: tips.mean)
    assert tips.mean == pytest.approx(0.5, abs=0.1)
    assert tips.where.endswith("row 0" if layout == "stacked" else "0.key, row 0")


@pytest.mark.parametrize("reader", ["keys", "values"])
def test_a_wrong_scale_of_what_reads_an_int8_cache_fails(
    exported: Exported, tmp_path: Path, text: Path, reader: str
) -> None:
    options = dataclasses.replace(SMALL, kv_dtype="int8", calibration=text)
    made = compile_bundle(exported("optimum", "llama_gqa"), tmp_path / "b", options).manifest
    for bucket in made.buckets:
        model = ir.load(tmp_path / "b" / bucket.file)
        casts = [n for n in model.graph if n.op_type == "Cast" and n.inputs[0].dtype.name == "INT8"]
        cast = casts[reader == "values"]
        value = ir.Value(name="half", const_value=ir.Tensor(np.array(0.5, np.float16), name="half"))
        model.graph.register_initializer(value)
        halved = ir.node("Mul", [cast.outputs[0], value])
        model.graph.insert_after(cast, halved)
        cast.outputs[0].replace_all_uses_with(halved.outputs[0])
        halved.replace_input_with(0, cast.outputs[0])
        ir.save(model, tmp_path / "b" / bucket.file, external=None)
    report = verify_bundle(Bundle.open(tmp_path / "b", verify_hashes=False), steps=2)
    assert {each.what.split(" differs")[0] for each in report.failures} >= {"lowered"}
