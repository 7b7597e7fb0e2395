"""Layers whose caches have heads and sizes of their own, or are another's: compiled and run."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import pytest

from omforge import ir
from omforge.atc.build import BuildOptions
from omforge.bundle.manifest import LayerSizes, Manifest
from omforge.compilation.compile import compile_bundle
from omforge.compilation.options import CompileOptions
from omforge.ir.dims import Dim, symbol
from omforge.ir.infer import infer_model
from omforge.ir.values import dims, to_shape
from omforge.passes.fuse_kv_io import FuseKvIo
from omforge.recognition.attention import sinks as attention_sinks
from omforge.recognition.interface import cache_layers, find_interface
from omforge.rewriting.builder import Builder
from omforge.rewriting.events import events
from omforge.rewriting.splice import insert
from omforge.runtime.acl_session import AclBackend
from omforge.runtime.acl_sim import simulated_acl
from omforge.runtime.bundle import Bundle
from omforge.runtime.compare import verify_bundle
from omforge.runtime.generate import LanguageModel
from omforge.testing import parse
from tests.quantization.weights import weighted

A2, A310P = "Ascend910B4", "Ascend310P3"

# Layer 0 has N=4, K=2 and keys and values of 4; layer 1 has N=2, K=1, keys of 8 and values of 6;
# layer 2 has N=2 and reads the keys and values of layer 0.
TEXT = """<ir_version: 11, opset_import: ["" : 24]>
g (int64[batch, seq] input_ids, int64[batch, total] attention_mask,
   float[batch, 2, past, 4] pk0, float[batch, 2, past, 4] pv0,
   float[batch, 1, past, 8] pk1, float[batch, 1, past, 6] pv1,
   float[32, 16] words, float[16, 16] q0w, float[16, 8] k0w, float[16, 8] v0w, float[16, 16] o0w,
   float[16, 16] q1w, float[16, 8] k1w, float[16, 6] v1w, float[12, 16] o1w,
   float[16, 8] q2w, float[8, 16] o2w, float[16, 32] head)
   => (float[batch, seq, 32] logits,
       float[batch, 2, t, 4] key0, float[batch, 2, t, 4] value0,
       float[batch, 1, t, 8] key1, float[batch, 1, t, 6] value1) {
    x0 = Gather (words, input_ids)
    q0 = MatMul (x0, q0w)
    k0 = MatMul (x0, k0w)
    v0 = MatMul (x0, v0w)
    y0, key0, value0 = Attention
        <q_num_heads = 4, kv_num_heads = 2, is_causal = 1>
        (q0, k0, v0, , pk0, pv0)
    r0 = MatMul (y0, o0w)
    x1 = Add (x0, r0)
    q1 = MatMul (x1, q1w)
    k1 = MatMul (x1, k1w)
    v1 = MatMul (x1, v1w)
    y1, key1, value1 = Attention
        <q_num_heads = 2, kv_num_heads = 1, is_causal = 1>
        (q1, k1, v1, , pk1, pv1)
    r1 = MatMul (y1, o1w)
    x2 = Add (x1, r1)
    q2 = MatMul (x2, q2w)
    y2, shared_key, shared_value = Attention <q_num_heads = 2, kv_num_heads = 2, is_causal = 1>
        (q2, k0, v0, , pk0, pv0)
    r2 = MatMul (y2, o2w)
    x3 = Add (x2, r2)
    logits = MatMul (x3, head) }"""
PROMPTS = [[3, 1, 4, 1, 5, 9, 2], [6, 5, 3]]


def model_of(text: str) -> ir.Model:
    """With weights so large that logits tell one key from another."""
    model = weighted(parse(text), 6)
    for value in model.graph.initializers.values():
        assert value.const_value is not None
        value.const_value = ir.Tensor(4 * value.const_value.numpy(), name=value.name)
    return model


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("export")
    ir.save(model_of(TEXT), folder / "model.onnx")
    np.save(folder / "tokens.npy", np.random.default_rng(0).integers(0, 32, (8, 24)))
    return folder


def options(soc: str, **changes: object) -> CompileOptions:
    build = BuildOptions(atc="sim")
    return CompileOptions(soc, context=24, prefill=(4,), batch=2, build=build, **changes)  # type: ignore[arg-type]


def logits(bundle: Bundle, backend: AclBackend | None = None) -> list[np.ndarray]:
    with LanguageModel(bundle, batch=2, backend=backend) as model:
        return [model.prefill(PROMPTS), model.decode([7, 8]), model.decode([9, 10])]


@pytest.mark.parametrize(
    ("soc", "gears", "kv_dtype"),
    [(A2, False, "fp16"), (A310P, True, "fp16"), (A310P, False, "int8")],
)
def test_they_compile_verify_and_run_on_a_device(
    export: Path, tmp_path: Path, soc: str, gears: bool, kv_dtype: Literal["fp16", "int8"]
) -> None:
    text = export / "tokens.npy" if kv_dtype == "int8" else None
    given = options(soc, gears=gears, kv_dtype=kv_dtype, calibration=text)
    result = compile_bundle(export, tmp_path / "b", given)
    assert result.coverage.complete
    kv = result.manifest.kv
    assert kv.layout == "per-layer"
    assert kv.layer_sizes == (LayerSizes(2, 4, 4), LayerSizes(1, 8, 6))
    bytes_of = {"fp16": 2, "int8": 1}[kv_dtype]
    numbers = 2 * 24 * (2 * (4 + 4) + 1 * (8 + 6))
    assert result.manifest.quantization.cache_bytes == numbers * bytes_of
    bundle = Bundle.open(tmp_path / "b")
    report = verify_bundle(bundle, steps=4)
    assert report.reference == "exported"
    assert report.ok, report.failures
    acl = simulated_acl(strict=True)
    for host, device in zip(
        logits(bundle), logits(bundle, AclBackend(bundle, 2, acl=acl)), strict=True
    ):
        np.testing.assert_array_equal(device, host)
    assert acl.sim.leaks == []


def test_the_pass_gives_each_layer_tensors_of_its_own_sizes() -> None:
    model = model_of(TEXT)
    FuseKvIo().run(model)
    shapes = {v.name: [str(d) for d in dims(v) or ()] for v in model.graph.inputs}
    assert shapes["past_key_values.0.value"] == ["batch", "2", "capacity", "4"]
    assert shapes["past_key_values.1.key"] == ["batch", "1", "capacity", "8"]
    assert shapes["past_key_values.1.value"] == ["batch", "1", "capacity", "6"]
    assert not any(name and name.startswith("past_key_values.2") for name in shapes)
    assert [str(d) for d in dims(model.graph.outputs[-1]) or ()] == ["batch", "1", "seq", "6"]
    assert any("the layout is per-layer" in event.reason for event in events(model))


def test_another_layers_past_behind_new_keys_of_its_own_is_refused() -> None:
    """The export keeps the one layer's keys, so that no cache is right for the other."""
    model = model_of(TEXT)
    assert [len(x.blocks) for x in cache_layers(model, find_interface(model))] == [2, 1]
    with pytest.raises(ir.CheckError, match=r"reads the cache pk0 of .* behind other new keys"):
        FuseKvIo().run(model_of(TEXT.replace("(q2, k0, v0,", "(q2, v0, v0,")))


def given(model: ir.Model, name: str, shape: Sequence[Dim]) -> ir.Value:
    """A further input."""
    value = ir.Value(name=name, shape=to_shape(shape), type=ir.TensorType(ir.DataType.FLOAT))
    model.graph.inputs.append(value)
    return value


def test_layers_with_sinks_of_their_own_share_what_is_behind_the_extra_row() -> None:
    model = model_of(TEXT)
    infer_model(model)
    batch, seq, total = symbol("batch"), symbol("seq"), symbol("total")
    mask = given(model, "mask", [batch, 1, seq, total])
    readers = [node for node in model.graph if "pk0" in {v.name for v in node.inputs if v}]
    for node, heads in zip(readers, (4, 2), strict=True):
        key, value = node.inputs[1:3]
        assert key is not None
        assert value is not None
        column = given(model, f"column{heads}", [batch, heads, seq, 1])
        with Builder(model) as op:
            padded = attention_sinks.append(op, key, value, mask, column)
            insert(op, node, by="test")
        for at, value in enumerate(padded, 1):
            node.replace_input_with(at, value)
    infer_model(model)
    assert len({node.inputs[1] for node in readers}) == 2
    layers = cache_layers(model, find_interface(model))
    assert [list(layer.blocks) for layer in layers if layer.block in readers] == [readers]


def test_they_cannot_be_stacked(export: Path, tmp_path: Path) -> None:
    with pytest.raises(ir.CheckError) as caught:
        compile_bundle(export, tmp_path / "b", options(A2, layout="stacked"))
    assert str(caught.value).startswith(
        "the layers' caches cannot be stacked: their heads or sizes differ: 1 heads with keys of 8 "
        "and values of 6, 2 heads with keys of 4 and values of 4"
    )


def test_sizes_of_a_layer_that_its_graphs_do_not_have_are_refused(
    export: Path, tmp_path: Path
) -> None:
    made = compile_bundle(export, tmp_path / "b", options(A2)).manifest
    data: Mapping[str, dict[str, object]] = json.loads(made.to_json())
    assert data["kv"]["layer_sizes"] == [
        {"head_size": 4, "kv_heads": 2, "value_head_size": 4},
        {"head_size": 8, "kv_heads": 1, "value_head_size": 6},
    ]
    assert Manifest.from_json(data) == made
    swapped = (LayerSizes(2, 4, 4), LayerSizes(1, 6, 8))
    kv = dataclasses.replace(made.kv, layer_sizes=swapped)
    dataclasses.replace(made, kv=kv).save(tmp_path / "b")
    with pytest.raises(ir.InputError, match=r"past_key_values\.1\.key"):
        Bundle.open(tmp_path / "b")
