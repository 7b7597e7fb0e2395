"""fuse-kv-io: a cache that grows becomes one of fixed capacity."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from omforge import ir
from omforge.ir.infer import infer_model
from omforge.ir.numerics import run, tolerance, within
from omforge.ir.values import dims
from omforge.ir.verify import check
from omforge.passes import make_pipeline
from omforge.passes.fuse_kv_io import FuseKvIo, mask_name
from omforge.passes.last_token_logits import LastTokenLogits
from omforge.rewriting.builder import Builder
from omforge.rewriting.events import events
from omforge.rewriting.splice import insert
from omforge.testing import parse
from tests.passes.blocks import Block
from tests.recognition.test_interface import RECURRENT

Exported = Callable[[str, str], Path]
Array = npt.NDArray[Any]

BATCH, SEQ, PAST, CAPACITY, LAYERS, HEADS, SIZE = 2, 3, 11, 16, 2, 2, 16


def _raised(path: Path) -> ir.Model:
    model = ir.load(path)
    make_pipeline("raise").run(model)
    LastTokenLogits().run(model)
    return model


def _interface(model: ir.Model) -> dict[str, list[str]]:
    values = [*model.graph.inputs, *model.graph.outputs]
    return {v.name or "": [str(dim) for dim in dims(v) or ()] for v in values}


def test_the_cache_becomes_two_tensors(exported: Exported) -> None:
    model = _raised(exported("optimum", "llama_gqa"))
    assert FuseKvIo().run(model) == LAYERS
    check(model)
    assert _interface(model) == {
        "input_ids": ["batch", "seq"],
        "position_ids": ["batch", "seq"],
        "logits_index": ["rows"],
        "attention_mask": ["batch", "1", "seq", "capacity + seq"],
        "past_key_values": ["4*batch", "2", "capacity", "16"],
        "logits": ["rows", "320"],
        "present_key_values": ["4*batch", "2", "seq", "16"],
    }


def test_a_window_names_its_mask(exported: Exported) -> None:
    model = _raised(exported("dynamo", "mistral"))
    FuseKvIo().run(model)
    assert "attention_mask_w8" in _interface(model)
    assert (mask_name(None), mask_name(8)) == ("attention_mask", "attention_mask_w8")


def test_per_layer_keeps_a_tensor_a_layer(exported: Exported) -> None:
    model = _raised(exported("hfexporter", "qwen2"))
    FuseKvIo("per-layer").run(model)
    check(model)
    names = list(_interface(model))
    assert [n for n in names if n.startswith("past")] == [
        f"past_key_values.{layer}.{role}" for layer in range(2) for role in ("key", "value")
    ]
    assert [n for n in names if n.startswith("present")] == [
        f"present.{layer}.{role}" for layer in range(2) for role in ("key", "value")
    ]


@pytest.mark.parametrize("route", ["optimum", "dynamo", "hfexporter", "torchscript-op17"])
@pytest.mark.parametrize("family", ["llama_gqa", "mistral"])
@pytest.mark.parametrize("layout", ["stacked", "per-layer"])
def test_a_step_after_some_tokens_is_the_same(
    exported: Exported, route: str, family: str, layout: str
) -> None:
    path = exported(route, family)
    export, model = ir.load(path), _raised(path)
    window = 8 if family == "mistral" else None
    FuseKvIo(layout).run(model)  # type: ignore[arg-type]
    random = np.random.default_rng(0)
    past = random.standard_normal((LAYERS * 2, BATCH, HEADS, PAST, SIZE)).astype(np.float32)
    ids = random.integers(3, 300, (BATCH, SEQ))
    expected = run(export, _export_feeds(export, ids, past))
    logits = next(v for k, v in expected.items() if "logits" in k)
    got = run(model, _cache_feeds(ids, past, window, layout))
    assert within(got["logits"], logits.reshape(BATCH * SEQ, -1), tolerance("float32"))
    keys = next(v for k, v in expected.items() if "0.key" in k)
    new = got["present_key_values"][:BATCH] if layout == "stacked" else got["present.0.key"]
    assert within(new, keys[:, :, PAST:], tolerance("float32"))


def _export_feeds(model: ir.Model, ids: Array, past: Array) -> dict[str, Array]:
    caches = iter(past)
    feeds: dict[str, Array] = {}
    for value in model.graph.inputs:
        name = value.name or ""
        if name == "input_ids":
            feeds[name] = ids
        elif name == "attention_mask":
            feeds[name] = np.ones((BATCH, PAST + SEQ), np.int64)
        elif name == "position_ids":
            feeds[name] = np.broadcast_to(PAST + np.arange(SEQ), (BATCH, SEQ)).copy()
        elif len(dims(value) or ()) == 4:
            feeds[name] = next(caches)
        else:
            feeds[name] = np.zeros((), np.int64)
    return feeds


def _cache_feeds(ids: Array, past: Array, window: int | None, layout: str) -> dict[str, Array]:
    key = np.concatenate([np.arange(CAPACITY), PAST + np.arange(SEQ)])
    valid = np.concatenate([np.arange(CAPACITY) < PAST, np.ones(SEQ, bool)])
    query = PAST + np.arange(SEQ)[:, None]
    seen = (key <= query) & valid
    if window is not None:
        seen &= query - key < window
    mask = np.where(seen, 0, -30000).astype(np.float32)
    # Slots beyond the valid length hold numbers that must not matter.
    cache = np.full((LAYERS * 2, BATCH, HEADS, CAPACITY, SIZE), 7, np.float32)
    cache[:, :, :, :PAST] = past
    feeds = {
        "input_ids": ids,
        "position_ids": np.broadcast_to(PAST + np.arange(SEQ), (BATCH, SEQ)).copy(),
        "logits_index": np.arange(BATCH * SEQ),
        mask_name(window): np.broadcast_to(mask, (BATCH, 1, *mask.shape)).copy(),
    }
    if layout == "stacked":
        return feeds | {"past_key_values": cache.reshape(-1, HEADS, CAPACITY, SIZE)}
    roles = ("key", "value")
    return feeds | {f"past_key_values.{i // 2}.{roles[i % 2]}": cache[i] for i in range(LAYERS * 2)}


def test_a_model_without_a_cache_is_refused() -> None:
    model = parse("""<ir_version: 11, opset_import: ["" : 24]>
    g (int64[batch, seq] input_ids) => (float[batch, seq, 2] logits)
    <float[4, 2] words = {0, 1, 2, 3, 4, 5, 6, 7}> {
        x = Gather (words, input_ids) logits = Neg (x) }""")
    with pytest.raises(ir.InputError, match="no KV cache"):
        FuseKvIo().run(model)


def test_a_mask_that_the_runtime_cannot_make_is_refused(exported: Exported) -> None:
    model = _raised(exported("dynamo", "llama_mha"))
    for node in model.graph:
        if node.op_type == "Trilu":
            node.attributes["upper"] = ir.AttrInt64("upper", 1)
    with pytest.raises(ir.CheckError, match="not one that the runtime can make"):
        FuseKvIo().run(model)


def test_keys_and_values_of_other_widths_need_a_tensor_each() -> None:
    text = """<ir_version: 11, opset_import: ["" : 24]>
    g (int64[batch, seq] input_ids, int64[batch, total] attention_mask,
       float[batch, 2, past, 4] pk, float[batch, 2, past, 3] pv)
       => (float[batch, seq, 6] logits, float[batch, 2, t, 4] key, float[batch, 2, t, 3] value)
    <float[4, 8] words = {0,1,2,3,4,5,6,7,0,1,2,3,4,5,6,7,0,1,2,3,4,5,6,7,0,1,2,3,4,5,6,7},
     int64[2] six = {6, 2}> {
        q = Gather (words, input_ids)
        v, rest = Split <axis = -1> (q, six)
        logits, key, value = Attention <q_num_heads = 2, kv_num_heads = 2, is_causal = 1>
            (q, q, v, , pk, pv) }"""
    with pytest.raises(ir.CheckError, match="keys of 4 and values of 3"):
        FuseKvIo("stacked").run(parse(text))
    for layout in ("per-layer", "auto"):
        split = parse(text)
        FuseKvIo(layout).run(split)  # type: ignore[arg-type]
        shapes = _interface(split)
        assert shapes["past_key_values.0.key"] == ["batch", "2", "capacity", "4"]
        assert shapes["present.0.value"] == ["batch", "2", "seq", "3"]
        told = [str(event) for event in events(split)]
        assert any("the layout is per-layer" in text for text in told) == (layout == "auto")


def test_one_shape_is_stacked_unless_told_otherwise(exported: Exported) -> None:
    model = _raised(exported("optimum", "qwen2"))
    FuseKvIo("auto").run(model)
    assert "past_key_values" in _interface(model)


@pytest.mark.parametrize("route", ["optimum", "dynamo", "torchscript-op17"])
@pytest.mark.parametrize("family", ["llama_gqa", "mistral"])
@pytest.mark.parametrize("layout", ["stacked", "per-layer"])
@pytest.mark.parametrize("broken", [(0,), (0, 1)])
def test_unraised_attention_is_served_beside_raised(
    exported: Exported, route: str, family: str, layout: str, broken: tuple[int, ...]
) -> None:
    path = exported(route, family)
    export, model = ir.load(path), ir.load(path)
    make_pipeline("canonicalize").run(model)
    _scale_probabilities(export, broken)
    _scale_probabilities(model, broken)
    make_pipeline("raise").run(model)
    LastTokenLogits().run(model)
    assert sum(n.op_type == "Attention" for n in model.graph) == LAYERS - len(broken)
    window = 8 if family == "mistral" else None
    FuseKvIo(layout).run(model)  # type: ignore[arg-type]
    check(model)
    told = [str(event) for event in events(model) if event.pass_name == "fuse-kv-io"]
    assert sum("copies its cache" in text for text in told) == len(broken)
    random = np.random.default_rng(0)
    past = random.standard_normal((LAYERS * 2, BATCH, HEADS, PAST, SIZE)).astype(np.float32)
    ids = random.integers(3, 300, (BATCH, SEQ))
    expected = run(export, _export_feeds(export, ids, past))
    logits = next(v for k, v in expected.items() if "logits" in k)
    got = run(model, _cache_feeds(ids, past, window, layout))
    assert within(got["logits"], logits.reshape(BATCH * SEQ, -1), tolerance("float32"))
    for row, name in enumerate(("0.key", "0.value", "1.key", "1.value")):
        wanted = next(v for k, v in expected.items() if name in k)[:, :, PAST:]
        at = slice(row * BATCH, (row + 1) * BATCH)
        new = got["present_key_values"][at] if layout == "stacked" else got[f"present.{name}"]
        assert within(new, wanted, tolerance("float32"))


def _scale_probabilities(model: ir.Model, layers: tuple[int, ...]) -> None:
    """Weigh the heads' probabilities, which `Attention` cannot express."""
    infer_model(model)
    softmaxes = [n for n in model.graph if n.op_type == "Softmax"]
    for layer in layers:
        old = softmaxes[layer].outputs[0]
        heads = (dims(old) or ())[1]
        assert isinstance(heads, int)
        with Builder(model) as op:
            weights = np.linspace(0.5, 1.5, heads, dtype=np.float32).reshape(-1, 1, 1)
            new = op.Mul(old, weights)
            insert(op, old.consumers()[0], by="test")
        old.replace_all_uses_with(new)
        new.producer().replace_input_with(0, old)  # type: ignore[union-attr]


def test_states_beside_the_cache_do_not_stand_for_its_other_half() -> None:
    model = parse(RECURRENT)
    with pytest.raises(ir.CheckError, match=r"no pairs of keys and values: pk"):
        FuseKvIo().run(model)


def test_a_cache_that_comes_back_in_another_dtype_is_refused() -> None:
    model = parse("""<ir_version: 11, opset_import: ["" : 24]>
    g (int64[batch, seq] input_ids, float16[batch, 1, past, 4] past_k, float16[batch, 1, past, 4] past_v)
      => (float[batch, seq, 4] logits, float[batch, 1, total, 4] k, float[batch, 1, total, 4] v)
    <float[2, 4] table = {1, 2, 3, 4, 5, 6, 7, 8}, int64[1] one = {1}> {
        x = Gather (table, input_ids) new = Unsqueeze (x, one)
        a = Cast <to = 1> (past_k) b = Cast <to = 1> (past_v)
        k = Concat <axis = 2> (a, new) v = Concat <axis = 2> (b, new) logits = Neg (x) }""")
    with pytest.raises(ir.CheckError, match="past_k in FLOAT16 and gives it back in FLOAT"):
        FuseKvIo().run(model)


def test_the_interface_gets_the_names_that_the_runtime_knows() -> None:
    """Whatever the export calls it, and whatever else bears these names."""
    text = Block(rotary="half").text()
    for old, new in (
        ("hidden", "rest"),
        ("input_ids", "tokens"),
        ("position_ids", "pos"),
        ("logits", "output"),
        ("seq1", "input_ids"),
        ("rest", "logits"),
    ):
        text = text.replace(old, new)
    model = parse(text)
    make_pipeline("raise,fuse-kv-io").run(model)
    check(model)
    assert _interface(model) == {
        "input_ids": ["batch", "seq"],
        "position_ids": ["batch", "seq"],
        "attention_mask": ["batch", "1", "seq", "capacity + seq"],
        "past_key_values": ["2*batch", "2", "capacity", "4"],
        "logits": ["batch", "seq", "16"],
        "present_key_values": ["2*batch", "2", "seq", "4"],
    }
