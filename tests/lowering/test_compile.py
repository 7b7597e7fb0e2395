"""compile: from an export to a bundle that talks like it."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from omforge import ir
from omforge.lowering.atc import find_atc
from omforge.lowering.compile import CompileOptions, compile_bundle
from omforge.lowering.legality import check_legal
from omforge.lowering.manifest import Manifest
from omforge.lowering.target import target
from omforge.runtime.bundle import Bundle
from omforge.runtime.compare import verify_bundle
from tests.exports import FAMILIES, ROUTES

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
    assert all(found.divergence is None for found in report.comparisons)


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
        (CompileOptions("Ascend310P3", context=100000), "config.json says that the model has 256"),
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
