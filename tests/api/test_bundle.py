"""A bundle made from memory, and what can be asked of one."""

import json
from pathlib import Path

import pytest

import omforge as of
from omforge import ir
from tests.exports import export

SIZES = {"target": "Ascend910B4", "context": 32, "prefill": [8], "atc": "none"}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export("optimum", "llama_gqa", tmp_path_factory.mktemp("export")).parent


def test_a_model_in_memory_gives_the_graphs_of_its_file(source: Path, tmp_path: Path) -> None:
    of.compile(source, output=tmp_path / "file", **SIZES)
    model = ir.load(source / "model.onnx")
    made = of.compile(model, output=tmp_path / "memory", assets=source, **SIZES)
    one, other = ({f.name: f for f in (tmp_path / n).iterdir()} for n in ("file", "memory"))
    assert set(other) - set(one) == {"exported.onnx", "exported.data"}
    for name in set(one) - {"manifest.json"}:
        assert one[name].read_bytes() == other[name].read_bytes(), name
    assert made.manifest.export.path == "exported.onnx"
    assert sorted(f.name for f in tmp_path.iterdir() if not f.name.startswith(".")) == [
        "file",
        "memory",
    ]
    moved = (tmp_path / "memory").rename(tmp_path / "moved")
    verified = of.Bundle.open(moved).verify(steps=2)
    assert verified.ok
    assert verified.report.reference == "exported"
    assert str(verified).endswith("\nverified")
    json.dumps(verified.to_json())


def test_what_can_be_asked(source: Path, tmp_path: Path) -> None:
    bundle = of.compile(source, output=tmp_path / "b", **SIZES)
    assert bundle.compiled is not None
    assert bundle.compiled.coverage.complete
    told = json.loads(json.dumps(bundle.to_json()))
    assert told["buckets"] == ["prefill_s8_c32", "decode_c32"]
    assert any(run["pass"] == "fuse-attention" for run in told["passes"])
    ids = bundle.generate([1, 2, 3], max_new_tokens=4)
    assert (ids.prompt, len(ids.tokens), ids.text) == ((1, 2, 3), 4, "")
    assert str(ids) == " ".join(map(str, ids.tokens))
    text = bundle.generate("hello", max_new_tokens=4)
    assert text.text == str(text)
    plan = bundle.plan()
    assert plan.plan.memory.weight_bytes == bundle.manifest.quantization.graph_bytes
    assert plan.plan.memory.cache_bytes == bundle.manifest.quantization.cache_bytes
    assert "decode_c32" in str(plan)
    with pytest.raises(of.InputError, match="does not encode"):
        bundle.encode("hello")
    with pytest.raises(of.InputError, match="Leave it away"):
        of.compile(source, output=tmp_path / "c", assets=source, **SIZES)


def test_an_encoder(bert, tmp_path: Path) -> None:
    bundle = of.Bundle.open(bert.folder)
    (outputs,) = [bundle.encode("hello")]
    assert outputs["last_hidden_state"].shape[1] == 64
    with pytest.raises(of.InputError, match="does not generate"):
        bundle.generate("hello")


def test_a_check_of_what_is_in_memory(source: Path) -> None:
    export = of.check(source / "model.onnx", "Ascend910B4")
    model = of.check(ir.load(source / "model.onnx"), "Ascend910B4")
    codes = [[offence.code for offence in found.errors] for found in (export, model)]
    assert codes[0] == codes[1]
    assert model.legal == (not codes[1])
    assert "Ascend910B4" in str(model)
    with pytest.raises(of.InputError, match="not known"):
        of.check(source / "model.onnx", "Ascend9")
