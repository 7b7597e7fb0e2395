"""Attention sinks: a learned score of each head, which takes a share of the softmax and no value."""

import dataclasses

import numpy as np
import pytest

from omforge import ir
from omforge.passes.fuse_attention import FuseAttention
from omforge.passes.fuse_kv_io import FuseKvIo
from omforge.recognition.attention.sinks import find, mask_of
from omforge.recognition.config import ModelConfig
from omforge.recognition.coverage import measure
from omforge.rewriting.events import events
from tests.passes.blocks import Block, assert_same_for_all_steps, fused, named, ops

NUMBERS = [0.3, -0.2, 1.5, 0.5]
JOIN = "masked = Concat <axis = 3> (late, sink)"
CUT = "kept = Slice (probs, j_0, j_m1, j_3)"
SPREAD = "sink = Expand (sinks, s_s)"
SINK = {
    "masked = Add (scaled, bias)": (
        "late = Add (scaled, bias) s_s = Concat <axis = 0> (batch1, j_4, seq1, j_1)"
        f" {SPREAD} {JOIN}"
    ),
    "mixed = MatMul (probs,": f"{CUT} mixed = MatMul (kept,",
    "float scale =": (
        f"float[1, 4, 1, 1] sinks = {{{', '.join(map(str, NUMBERS))}}}, int64[1] j_4 = {{4}},"
        " int64[1] j_1 = {1}, int64[1] j_0 = {0}, int64[1] j_3 = {3}, int64[1] j_m1 = {-1},"
        " float scale ="
    ),
}


def sinking(*changes: tuple[str, str], **fields: object) -> Block:
    """A block with sinks, its text changed."""
    return dataclasses.replace(Block(**fields), edits=(*SINK.items(), *changes))  # pyright: ignore[reportArgumentType]


def attention(model: ir.Model) -> ir.Node:
    assert "Softmax" not in ops(model)
    (node,) = [node for node in model.graph if node.op_type == "Attention"]
    return node


SPELLINGS = {
    "as it is": sinking(),
    "one key head for each": sinking(kv_heads=4),
    "a window": sinking(visible="window"),
    "the largest taken off": sinking(
        (JOIN, f"{JOIN.replace('masked', 'wide')} most = ReduceMax <keepdims = 1> (wide, j_m1)"
               " masked = Sub (wide, most)"),
    ),
    "one number for all heads": sinking(
        (SPREAD, "first = Slice (sinks, j_1, j_4, j_1) one = ReduceSum (first, j_1)"
                 " sink = Expand (one, s_s)"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", SPELLINGS)
def test_raises_a_sink_to_one_more_key(case: str) -> None:
    model = fused(FuseAttention(), SPELLINGS[case])
    assert not events(model)
    node = attention(model)
    found = find(node)
    assert found is not None
    assert (found.key.name, found.value.name) == ("k", "v")
    assert found.mask is mask_of(node)
    assert [v.name for v in node.inputs[4:] if v is not None] == ["past_key", "past_value"]
    # The cache that the model returns is without the extra row.
    assert [value.name for value in model.graph.outputs] == [
        "logits", "present_key", "present_value"]  # fmt: skip
    coverage = measure(model, ModelConfig(layers=1))
    assert (coverage.kinds["attention"].found, coverage.kinds["attention"].expected) == (1, 1)
    assert not coverage.unrecognised
    assert FuseAttention().run(model) == 0


def test_a_fixed_capacity_keeps_the_sink_and_returns_no_row_of_it() -> None:
    model = fused(FuseAttention(), sinking())
    FuseKvIo().run(model)
    ir.check(model)
    found = find(attention(model))
    assert found is not None
    assert found.mask.is_graph_input()
    present = model.graph.outputs[1]
    assert str(present.shape) == "[2*batch,2,seq,4]"


GATE = {
    "mixed = MatMul (probs,": "every = MatMul (probs,",
    "back = Transpose": (
        "total_s = ReduceLogSumExp <keepdims = 0> (masked, j_m1) rest = Sub (total_s, sinks)"
        " share = Sigmoid (rest) share_u = Unsqueeze (share, j_m1) mixed = Mul (every, share_u)"
        " back = Transpose"
    ),
    "float scale =": (
        f"float[1, 4, 1] sinks = {{{', '.join(map(str, NUMBERS))}}}, int64[1] j_m1 = {{-1}},"
        " int64[1] j_1 = {1}, float scale ="
    ),
}


def gated(*changes: tuple[str, str]) -> Block:
    """A block whose values are multiplied by the share that a sink leaves them."""
    return Block(edits=(*GATE.items(), *changes))


def test_a_gate_of_what_a_sink_leaves_is_a_sink() -> None:
    model = fused(FuseAttention(), gated())
    found = find(attention(model))
    assert found is not None
    assert (found.key.name, found.value.name) == ("k", "v")
    assert "Sigmoid" not in ops(model)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("(masked, j_m1)", "(scaled, j_m1)"),
        ("Sub (total_s, sinks)", "Sub (sinks, total_s)"),
        ("Sub (total_s, sinks)", "Add (total_s, sinks)"),
        ("share = Sigmoid (rest)", "share = HardSigmoid (rest)"),
    ],
)
def test_no_other_gate_is_a_sink(old: str, new: str) -> None:
    model = named(gated((old, new)))
    FuseAttention().run(model)
    assert all(find(node) is None for node in model.graph if node.op_type == "Attention")


NOT = {
    "a score of the tokens": (
        (SPREAD, "sink = ReduceMax <keepdims = 1> (late, j_m1)"), "Concat, not from a product"),
    "joined in front": (
        (JOIN, JOIN.replace("late, sink", "sink, late")), "Concat, not from a product"),
    "the scores twice": (
        (JOIN, JOIN.replace("late, sink", "late, late")), "Concat, not from a product"),
    "its share meets a value": (
        ("mixed = MatMul (kept,", "kept_p = Identity (kept) mixed = MatMul (kept_p,"), None),
    "another share is cut off": (
        (CUT, "kept = Slice (probs, j_1, j_n, j_3)"), "go into Slice"),
    "scaled with the scores": (
        (JOIN, f"{JOIN.replace('masked', 'wide')} masked = Mul (wide, scale)"), "is scaled"),
    "other numbers for other tokens": (
        (SPREAD, "n_s = Expand (sinks, s_s) ages = Range (past0, total0, n_1)"
                 " ages_f = Cast <to = 1> (ages) ages_u = Unsqueeze (ages_f, j_1)"
                 " sink = Add (n_s, ages_u)"), "is no constant"),
}  # fmt: skip


@pytest.mark.parametrize("case", [case for case in NOT if NOT[case][1]])
def test_takes_nothing_else_for_a_sink(case: str) -> None:
    change, why = NOT[case]
    constants = ("int64[1] j_4", "int64[1] j_n = {9999}, int64[1] j_4")
    model = named(sinking(change, constants))
    before = model.graph.num_nodes()
    assert FuseAttention().run(model) == 0
    assert model.graph.num_nodes() == before
    (event,) = events(model)
    assert why is not None
    assert why in event.reason


def test_a_row_that_sees_nothing_gives_all_to_the_sink() -> None:
    """Padding in front of a row: nothing is visible there, and nothing comes out."""
    block = sinking(guard="rows")
    before, after = named(block), named(block)
    assert FuseAttention().run(after) == 1
    assert_same_for_all_steps(before, after, block)
    mask = mask_of(attention(after))
    assert mask is not None
    assert mask.dtype == ir.DataType.FLOAT
    assert np.isfinite(float(ir.DataType.FLOAT.min) / 2)
