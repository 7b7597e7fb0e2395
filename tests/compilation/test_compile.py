"""compile: from an export to a bundle that talks like it."""

import dataclasses
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest

from omforge import ir
from omforge.atc.build import BuildOptions
from omforge.atc.command import find_atc
from omforge.bundle.manifest import Manifest
from omforge.compilation import buckets
from omforge.compilation.compile import compile_bundle
from omforge.compilation.options import CompileOptions
from omforge.ir import numerics
from omforge.ir.ops import reference_model
from omforge.ir.values import dims
from omforge.lowering.legality import check_legal
from omforge.lowering.legalize import legalize
from omforge.lowering.target import target
from omforge.passes import make_pipeline
from omforge.rewriting.builder import Builder
from omforge.rewriting.splice import insert
from omforge.runtime.bundle import Bundle
from omforge.runtime.compare import verify_bundle
from omforge.testing import parse
from tests.exports import FAMILIES, ROUTES
from tests.passes.blocks import LONGEST, Block

Exported = Callable[[str, str], Path]

SMALL = CompileOptions("Ascend310P3", context=48, prefill=(4, 16), batch=2)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("route", ROUTES)
def test_every_export_compiles_and_agrees(
    exported: Exported, tmp_path: Path, route: str, family: str
) -> None:
    soc = "Ascend310P3" if route in ("optimum", "hfexporter") else "Ascend910B4"
    options = CompileOptions(soc, context=48, prefill=(4, 16), batch=2)
    result = compile_bundle(exported(route, family), tmp_path / "bundle", options)
    assert result.coverage.complete
    assert result.nodes["canonical"] <= 60
    for bucket in result.manifest.buckets:
        graph = ir.load(tmp_path / "bundle" / bucket.file)
        assert check_legal(graph, target(soc)) == []
    report = verify_bundle(Bundle.open(tmp_path / "bundle", verify_hashes=True), steps=8)
    assert report.ok, report.failures
    assert report.worst("canonical").max_abs < 1e-4
    # Of float16, `report.ok` says that another token was chosen only where two were a tie.
    canonical = [found for found in report.comparisons if found.level == "canonical"]
    assert canonical
    assert all(found.divergence is None for found in canonical)


@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
@pytest.mark.parametrize("route", ["optimum", "dynamo"])
def test_alibi_compiles_and_agrees(
    exported: Exported, tmp_path: Path, route: str, dtype: Literal["fp32", "fp16"]
) -> None:
    """The bias is made in the graph, of the positions that the runtime gives the keys."""
    options = dataclasses.replace(SMALL, dtype=dtype)
    result = compile_bundle(exported(route, "bloom"), tmp_path / "bundle", options)
    assert result.coverage.complete
    (mask,) = result.manifest.masks
    assert (mask.name, mask.window) == ("attention_mask", None)
    shapes = {spec.name: spec.shape for spec in result.manifest.buckets[0].inputs}
    assert shapes["attention_mask"] == (2, 1, 4, 52)
    assert shapes["key_positions"] == (1, 1, 1, 52)
    assert "position_ids" not in shapes
    report = verify_bundle(Bundle.open(tmp_path / "bundle"), steps=8)
    assert report.ok, report.failures
    assert report.worst("canonical").max_abs < 1e-4


@pytest.mark.parametrize("layout", ["auto", "per-layer"])
@pytest.mark.parametrize(("route", "family"), [("optimum", "llama_gqa"), ("dynamo", "mistral")])
def test_attention_that_is_not_raised_compiles_and_agrees(
    exported: Exported, tmp_path: Path, route: str, family: str, layout: Literal["auto"]
) -> None:
    model = ir.load(exported(route, family))
    make_pipeline("canonicalize").run(model)
    softmax = next(node for node in model.graph if node.op_type == "Softmax")
    old = softmax.outputs[0]
    with Builder(model) as op:
        # Heads that are weighed behind their softmax: `Attention` has no place for it.
        new = op.Mul(old, np.linspace(0.5, 1.5, 4, dtype=np.float32).reshape(4, 1, 1))
        insert(op, old.consumers()[0], by="test")
    users = [node for node in old.consumers() if node is not new.producer()]
    for node in users:
        node.replace_input_with(list(node.inputs).index(old), new)
    (tmp_path / "export").mkdir()
    ir.save(model, tmp_path / "export" / "model.onnx")
    options = dataclasses.replace(SMALL, layout=layout)
    with pytest.raises(ir.CheckError, match="coverage is not complete: attention: 1 of 2"):
        compile_bundle(tmp_path / "export", tmp_path / "bundle", options)
    options = dataclasses.replace(options, allow_partial=True)
    result = compile_bundle(tmp_path / "export", tmp_path / "bundle", options)
    assert result.manifest.kv.layers == 2
    assert result.manifest.kv.layout == "per-layer"  # which moves the fewer bytes
    assert any("copies its cache" in event.reason for event in result.events)
    report = verify_bundle(Bundle.open(tmp_path / "bundle"), steps=4)
    assert {len(found.lengths) for found in report.comparisons} == {2}
    assert any("padded" in found.case for found in report.comparisons)
    assert report.ok, report.failures
    assert report.worst("canonical").max_abs < 1e-4


def test_an_export_behind_links_is_found_again(exported: Exported, tmp_path: Path) -> None:
    """The Hugging Face cache: a folder of links into a store, where no file has its own name."""
    (tmp_path / "store").mkdir()
    (tmp_path / "export").mkdir()
    ir.save(ir.load(exported("optimum", "llama_gqa")), tmp_path / "whole.onnx", external="w.data")
    for name, stored in (("whole.onnx", "a1"), ("w.data", "b2")):
        (tmp_path / name).rename(tmp_path / "store" / stored)
        (tmp_path / "export" / name).symlink_to(Path("..") / "store" / stored)
    result = compile_bundle(tmp_path / "export", tmp_path / "bundle", SMALL)
    assert result.manifest.export.path == str(tmp_path / "export" / "whole.onnx")
    report = verify_bundle(Bundle.open(tmp_path / "bundle"), steps=2)
    assert report.reference == "exported"
    assert report.ok, report.failures


def test_the_same_input_gives_the_same_bytes(exported: Exported, tmp_path: Path) -> None:
    source = exported("optimum", "llama_gqa")
    for name in ("one", "two"):
        compile_bundle(source, tmp_path / name, SMALL)
    one, two = ({f.name: f.read_bytes() for f in (tmp_path / n).iterdir()} for n in ("one", "two"))
    assert sorted(one) == sorted(two)
    assert [name for name in one if one[name] != two[name]] == []


def test_the_manifest_describes_the_files(exported: Exported, tmp_path: Path) -> None:
    compile_bundle(exported("dynamo", "mistral"), tmp_path / "b", SMALL)
    manifest = Manifest.load(tmp_path / "b")
    assert [b.name for b in manifest.buckets] == [
        "prefill_s4_c48_b2",
        "prefill_s16_c48_b2",
        "decode_c48_b2",
    ]
    assert [(mask.name, mask.window) for mask in manifest.masks] == [("attention_mask_w8", 8)]
    assert (manifest.kv.layers, manifest.kv.kv_heads, manifest.kv.capacity) == (2, 2, 48)
    assert set(manifest.files) == {
        f.name for f in (tmp_path / "b").iterdir() if f.name != "manifest.json"
    }
    for bucket in manifest.buckets:
        graph = ir.load(tmp_path / "b" / bucket.file).graph
        assert [v.name for v in graph.inputs] == [spec.name for spec in bucket.inputs]
        assert [v.name for v in graph.outputs] == [spec.name for spec in bucket.outputs]


def test_graphs_share_one_weight_file(exported: Exported, tmp_path: Path) -> None:
    options = CompileOptions("Ascend310P3", context=48, prefill=(4,), dtype="fp32")
    compile_bundle(exported("optimum", "llama_mha"), tmp_path / "b", options)
    weights = (tmp_path / "b" / "weights.bin").stat().st_size
    export = exported("optimum", "llama_mha").stat().st_size
    # Canonical and both buckets refer to the same float32 weights.
    assert weights < 1.1 * export


def test_epsilon_of_1e_5_survives_an_operator_that_ignores_it(
    exported: Exported, tmp_path: Path
) -> None:
    source = tmp_path / "export"
    source.mkdir()
    model = ir.load(exported("dynamo", "llama_mha"))
    eps = next(
        v
        for v in model.graph.initializers.values()
        if v.const_value is not None
        and v.const_value.size == 1
        and 0 < abs(float(v.const_value.numpy().item())) < 1e-4
    )
    eps.const_value = ir.tensor([1e-2], dtype=ir.DataType.FLOAT, name=eps.name)
    eps.shape = ir.Shape([1])
    ir.save(model, source / "model.onnx")
    options = CompileOptions("Ascend310P3", context=32, prefill=(8,), dtype="fp32")
    result = compile_bundle(source, tmp_path / "b", options)
    graph = ir.load(tmp_path / "b" / result.manifest.buckets[0].file).graph
    assert {node.op_type for node in graph} >= {"NPURmsNorm"}
    report = verify_bundle(Bundle.open(tmp_path / "b"), steps=4)
    assert report.ok, report.failures


def test_commands_are_in_the_script(exported: Exported, tmp_path: Path) -> None:
    result = compile_bundle(exported("optimum", "qwen2"), tmp_path / "b", SMALL)
    script = (tmp_path / "b" / "compile.sh").read_text()
    assert script.count("--soc_version=Ascend310P3") == len(result.manifest.buckets)
    assert all(f"--output=om/{b.name}" in script for b in result.manifest.buckets)
    assert str(tmp_path) not in script


def test_the_report_holds_no_times(exported: Exported, tmp_path: Path) -> None:
    compile_bundle(exported("optimum", "qwen2"), tmp_path / "b", SMALL)
    report = json.loads((tmp_path / "b" / "report.json").read_text())
    assert report["nodes"]["exported"] > report["nodes"]["canonical"]
    assert not re.search(r"second|time", json.dumps(report["passes"]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (CompileOptions("Ascend310P9"), "Ascend310P"),
        (
            CompileOptions("Ascend310P3", context=100000),
            "config.json says max_position_embeddings = 256",
        ),
        (CompileOptions("Ascend310P3", context=16, prefill=(32,)), "bucket of 32 tokens"),
        (CompileOptions("Ascend310P3", prefill=(1,)), "bucket of 1 tokens"),
        (CompileOptions("Ascend310P3", batch=0), "batch of 0"),
    ],
)
def test_wrong_options(
    exported: Exported, tmp_path: Path, options: CompileOptions, message: str
) -> None:
    with pytest.raises(ir.InputError, match=message):
        compile_bundle(exported("dynamo", "llama_mha"), tmp_path / "b", options)
    assert list(tmp_path.iterdir()) == []


def test_other_files_are_never_replaced(exported: Exported, tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "thesis.tex").write_text("years of work")
    with pytest.raises(ir.InputError, match="holds other files"):
        compile_bundle(exported("dynamo", "llama_mha"), tmp_path / "b", SMALL)
    assert (tmp_path / "b" / "thesis.tex").read_text() == "years of work"


def test_an_interrupt_leaves_the_old_bundle_and_nothing_else(
    exported: Exported, tmp_path: Path
) -> None:
    source = exported("dynamo", "llama_mha")
    compile_bundle(source, tmp_path / "b", SMALL)
    before = {f.name: f.read_bytes() for f in (tmp_path / "b").iterdir()}

    def interrupt(step: str, done: int, total: int) -> None:
        if step.startswith("write decode"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compile_bundle(source, tmp_path / "b", SMALL, progress=interrupt)
    assert [f.name for f in tmp_path.iterdir()] == ["b"]
    assert {f.name: f.read_bytes() for f in (tmp_path / "b").iterdir()} == before


def test_lost_coverage_stops_the_compilation(exported: Exported, tmp_path: Path) -> None:
    source = tmp_path / "export"
    source.mkdir()
    (source / "model.onnx").write_bytes(exported("dynamo", "llama_mha").read_bytes())
    config = json.loads((exported("dynamo", "llama_mha").parent / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"sliding_window": 8}))
    with pytest.raises(ir.CheckError, match="sliding window of 8"):
        compile_bundle(source, tmp_path / "b", SMALL)
    assert not (tmp_path / "b").exists()


def test_atc_is_not_needed() -> None:
    assert find_atc({"PATH": ""}) is None


@pytest.mark.parametrize("layout", ["stacked", "per-layer"])
@pytest.mark.parametrize(
    ("route", "family", "soc", "dtype"),
    [
        ("optimum", "llama_gqa", "Ascend310P3", "fp16"),
        ("dynamo", "mistral", "Ascend910B4", "fp32"),
        ("hfexporter", "gemma2", "Ascend910B4", "fp32"),
        ("optimum", "gpt_neox", "Ascend310P3", "fp32"),
    ],
)
def test_one_graph_with_gears_gives_what_the_static_graphs_give(
    exported: Exported,
    tmp_path: Path,
    route: str,
    family: str,
    soc: str,
    dtype: Literal["fp16", "fp32"],
    layout: Literal["stacked", "per-layer"],
) -> None:
    source = exported(route, family)
    options = CompileOptions(
        soc, context=32, prefill=(8, 16), batch=2, dtype=dtype, layout=layout, gears=True
    )
    (gears,) = compile_bundle(source, tmp_path / "g", options).manifest.buckets
    static = compile_bundle(source, tmp_path / "s", dataclasses.replace(options, gears=False))
    assert (gears.kind, gears.seq, gears.gears) == ("gears", 16, (1, 8, 16))
    one = ir.load(tmp_path / "g" / gears.file)
    assert {node.op_type for node in one.graph}.isdisjoint({"Shape", "ConstantOfShape", "Range"})
    for bucket in static.manifest.buckets:
        other = ir.load(tmp_path / "s" / bucket.file)
        given = _step(other, bucket.seq, capacity=32)
        expected = numerics.run(reference_model(other), given)
        found = numerics.run(reference_model(one), given)
        for name, array in expected.items():
            allowed = numerics.tolerance(str(array.dtype))
            assert numerics.within(found[name], array, allowed), (bucket.name, name)


def _step(model: ir.Model, seq: int, capacity: int) -> dict[str, numerics.Array]:
    """Inputs behind five tokens; what lies behind them in the cache is masked garbage."""
    random = np.random.default_rng(seq)
    made: dict[str, numerics.Array] = {}
    for value in model.graph.inputs:
        name, shape = value.name or "", [int(dim) for dim in dims(value) or ()]
        assert value.dtype is not None
        if name.startswith("attention_mask"):
            array = np.zeros(shape)
            array[..., 5:capacity] = -30000
            array[..., capacity:] += np.triu(np.full((seq, seq), -30000.0), 1)
        elif name == "position_ids":
            array = np.broadcast_to(np.arange(5, 5 + seq), shape)
        elif name == "logits_index":
            array = np.arange(shape[0]) * seq + seq - 1
        elif name == "input_ids":
            array = random.integers(0, 320, shape)
        else:
            array = random.standard_normal(shape)
        made[name] = array.astype(value.dtype.numpy())
    return made


def test_the_command_lists_the_gears_in_the_order_of_the_open_dims(
    exported: Exported, tmp_path: Path
) -> None:
    options = CompileOptions("Ascend310P3", context=32, prefill=(16, 8), gears=True)
    result = compile_bundle(exported("optimum", "llama_gqa"), tmp_path / "b", options)
    (bucket,) = result.manifest.buckets
    assert "--dynamic_dims=1,1,1,33;8,8,8,40;16,16,16,48" in bucket.command
    shapes = next(part for part in bucket.command if part.startswith("--input_shape"))
    assert shapes.startswith(
        "--input_shape=input_ids:1,-1;position_ids:1,-1;logits_index:1;attention_mask:1,1,-1,-1;"
    )
    assert shapes.count("-1") == 4
    assert Manifest.load(tmp_path / "b").buckets[0].gears == (1, 8, 16)


def test_forms_that_are_asked_for_reach_the_graphs(exported: Exported, tmp_path: Path) -> None:
    options = CompileOptions(
        "Ascend310P3",
        context=32,
        prefill=(32,),
        forms=(("Attention", "NPUScaledMaskedSoftmax"), ("RMSNormalization", "decomposed")),
    )
    result = compile_bundle(exported("optimum", "llama_gqa"), tmp_path / "b", options)
    prefill, decode = (ir.load(tmp_path / "b" / b.file).graph for b in result.manifest.buckets)
    assert "NPUScaledMaskedSoftmax" in {node.op_type for node in prefill}
    assert "Softmax" in {node.op_type for node in decode}  # S = 1 is beyond the fused one
    assert "NPURmsNorm" not in {node.op_type for node in decode}


def test_quantised_activations_and_gears_exclude_each_other(
    exported: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No pass of ours quantises activations yet, so that a legalisation does it here."""

    def quantise(model: ir.Model, *args: Any, **options: Any) -> int:
        count = legalize(model, *args, **options)
        node = next(node for node in model.graph if node.op_type == "Sigmoid")
        node.op_type = "AscendQuant"
        return count

    monkeypatch.setattr(buckets, "legalize", quantise)
    monkeypatch.setattr(buckets, "check_legal", lambda *_: [])
    options = CompileOptions("Ascend310P3", context=32, prefill=(8,), gears=True)
    with pytest.raises(ir.InputError, match="quantised activations cannot have gears"):
        compile_bundle(exported("optimum", "llama_gqa"), tmp_path / "b", options)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("gears", [False, True])
@pytest.mark.parametrize("layout", ["stacked", "per-layer"])
def test_no_step_joins_or_turns_the_cache(
    exported: Exported, tmp_path: Path, layout: Literal["stacked", "per-layer"], gears: bool
) -> None:
    """Products read it as it lies; a stacked one is taken apart by one Split, which copies it."""
    options = CompileOptions("Ascend310P3", context=32, prefill=(8,), layout=layout, gears=gears)
    result = compile_bundle(exported("optimum", "llama_gqa"), tmp_path / "b", options)
    for bucket in result.manifest.buckets:
        graph = ir.load(tmp_path / "b" / bucket.file).graph
        parts = [v for v in graph.inputs if (v.name or "").startswith("past_key_values")]
        if layout == "stacked":
            (split,) = parts[0].consumers()
            assert split.op_type == "Split"
            parts = list(split.outputs)
        assert len(parts) == 4
        assert {node.op_type for part in parts for node in part.consumers()} == {"MatMul"}


def test_a_table_in_the_graph_bounds_the_context(tmp_path: Path) -> None:
    model = parse(Block(rotary="half", tables="gathered").text())
    ir.save(model, tmp_path / "model.onnx")
    result = compile_bundle(tmp_path, tmp_path / "b", CompileOptions("Ascend310P3"))
    made = result.manifest
    assert (made.context, made.model.max_positions) == (LONGEST, LONGEST)
    assert made.bucket(f"prefill_s{LONGEST}_c{LONGEST}").seq == LONGEST
    assert [bound.why for bound in result.bounds] == [
        "the table cos_table in the graph has 32 rows"
    ]
    with pytest.raises(ir.InputError, match="a context of 33 tokens is too long") as told:
        compile_bundle(tmp_path, tmp_path / "c", CompileOptions("Ascend310P3", context=33))
    assert told.value.why == "the table cos_table in the graph has 32 rows"
    assert told.value.next_step == "Choose --context 32 or less"


def test_a_choice_by_length_is_bound_below_it(tmp_path: Path) -> None:
    """LongRoPE: once a text is longer than 20 tokens, its keys turn faster."""
    turn = "angle = Mul (position_u, inv_freq)"
    chosen = """most = ReduceMax <keepdims = 0> (position_ids)
        long = Greater (most, n_19)
        fast = Add (inv_freq, inv_freq)
        chosen = Where (long, fast, inv_freq)
        angle = Mul (position_u, chosen)"""
    block = Block(
        rotary="half", edits=((turn, chosen), ("int64 n_0", "int64 n_19 = {19}, int64 n_0"))
    )
    ir.save(parse(block.text()), tmp_path / "model.onnx")
    with pytest.raises(ir.InputError, match="too long") as told:
        compile_bundle(tmp_path, tmp_path / "b", CompileOptions("Ascend310P3", context=21))
    assert "beyond 20 tokens" in told.value.why
    result = compile_bundle(tmp_path, tmp_path / "b", CompileOptions("Ascend310P3", prefill=(6,)))
    assert result.manifest.context == 20
    assert ["always takes inv_freq" in e.reason for e in result.events if e.done] == [True]
    report = verify_bundle(Bundle.open(tmp_path / "b"))
    assert report.ok, report.failures


def test_a_weight_that_holds_nan_is_named(exported: Exported, tmp_path: Path) -> None:
    """The export computes NaN as well, and verify finds them equal."""
    folder = shutil.copytree(exported("optimum", "llama_gqa").parent, tmp_path / "in")
    model = ir.load(folder / "model.onnx")
    weight = model.graph.initializers["model.norm.weight"]
    array = weight.const_value.numpy().copy()
    array[3] = np.nan
    weight.const_value = ir.tensor(array, name=weight.name)
    ir.save(model, folder / "model.onnx")
    options = CompileOptions("Ascend310P3", context=32, prefill=(8,), build=BuildOptions("none"))
    result = compile_bundle(folder, tmp_path / "out" / "b", options)  # `out` is made with it
    assert list(result.nonfinite.values()) == ["NaN"]
    assert any(event.reason == "it holds NaN" for event in result.events)
