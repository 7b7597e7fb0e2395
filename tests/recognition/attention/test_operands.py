"""Queries, keys and values whose heads are joined to the batch, as products of three axes want."""

import dataclasses

import pytest

from omforge import ir
from omforge.passes.fuse_attention import FuseAttention
from omforge.rewriting.events import events
from tests.passes.blocks import Block, fused, named, ops

SCORES = (
    "q_s = Concat <axis = 0> (j_m1, seq1, j_4) q3 = Reshape (q4, q_s)"
    " n_all = Mul (batch1, j_4) t_s = Concat <axis = 0> (n_all, j_m1, j_4)"
    " k3 = Reshape (KEYS, t_s) k3_t = Transpose <perm = [0, 2, 1]> (k3)"
    " s3 = MatMul (q3, k3_t)"
)
BY_HEAD = " s_s = Concat <axis = 0> (batch1, j_4, seq1, total1) scores = Reshape (s3, s_s)"
VALUES = (
    "p_s = Concat <axis = 0> (j_m1, seq1, total1) p3 = Reshape (probs, p_s)"
    " v3 = Reshape (VALUES, t_s) m3 = MatMul (p3, v3)"
    " m_s = Concat <axis = 0> (batch1, j_4, seq1, j_4) mixed = Reshape (m3, m_s)"
)
CONSTANTS = (
    "<float[16, 8] table",
    "<int64[1] j_m1 = {-1}, int64[1] j_4 = {4}, int64[3] j_heads = {0, 2, 1}, float[16, 8] table",
)


def joined(block: Block, **changes: str) -> Block:
    """The block with both products on [B*N, .., ..], and edits by what they replace."""
    repeated = "" if block.kv_heads == block.heads else "_n"
    keys = f"present_key{repeated}" if block.cache else f"k4{repeated}"
    values = f"present_value{repeated}" if block.cache else f"v4{repeated}"
    scores, mixed = SCORES.replace("KEYS", keys) + BY_HEAD, VALUES.replace("VALUES", values)
    edits = [
        ("scores = MatMul (q4, kt)", scores),
        (f"mixed = MatMul (probs, {values})", mixed),
        CONSTANTS,
        *((old, new) for old, new in changes.values()),  # type: ignore[misc]
    ]
    return dataclasses.replace(block, edits=tuple(edits))


def attention(model: ir.Model) -> ir.Node:
    (node,) = [node for node in model.graph if node.op_type == "Attention"]
    return node


BLOCKS = {
    "multi-head": Block(kv_heads=4),
    "grouped": Block(kv_heads=2),
    "multi-query": Block(kv_heads=1),
    "without a cache": Block(kv_heads=4, cache=False),
    "one row": Block(kv_heads=4, batch="1"),
    "two rows": Block(kv_heads=2, batch="2"),
    "one product for QKV": Block(split="fused"),
}


@pytest.mark.parametrize("case", BLOCKS)
def test_raises_heads_that_are_joined_to_the_batch(case: str) -> None:
    block = BLOCKS[case]
    model = fused(FuseAttention(), joined(block))
    node = attention(model)
    assert "Softmax" not in ops(model)
    assert not events(model)
    assert [value.name for value in node.inputs[:3] if value is not None] == ["q", "k", "v"]
    assert node.attributes["kv_num_heads"].as_int() == block.kv_heads
    assert len(node.inputs) == (6 if block.cache else 4)


def test_raises_a_mask_on_joined_scores() -> None:
    """Bloom adds its bias there; here a mask of [B*N, S, T]."""
    block = joined(Block(kv_heads=4))
    tiled = (
        "b_s = Concat <axis = 0> (batch1, j_4, seq1, total1) b_4 = Expand (bias, b_s)"
        " b_t = Concat <axis = 0> (n_all, seq1, total1) b_3 = Reshape (b_4, b_t)"
        " s_m = Add (s3, b_3)"
    )
    edits = []
    for old, new in block.edits:
        new = new.replace(" scores = Reshape (s3, s_s)", "")
        edits.append((old, new))
    edits += [
        ("scaled = Mul (scores, scale)", ""),
        (
            "masked = Add (scaled, bias)",
            f"{tiled} s_x = Mul (s_m, scale) masked = Reshape (s_x, s_s)",
        ),
    ]
    model = fused(FuseAttention(), dataclasses.replace(block, edits=tuple(edits)))
    assert not events(model)
    assert len(attention(model).inputs) == 6


def test_heads_before_the_batch_are_not_taken_for_heads() -> None:
    """[N*B, S, D]: still an attention, though one whose cache is not recognised."""
    block = joined(Block(kv_heads=4))
    turned = "k_t = Transpose <perm = [1, 0, 2, 3]> (present_key) k3 = Reshape (k_t, t_s)"
    edits = tuple(
        (old, new.replace("k3 = Reshape (present_key, t_s)", turned)) for old, new in block.edits
    )
    model = fused(FuseAttention(), dataclasses.replace(block, edits=edits))
    assert len(attention(model).inputs) == 4


def test_a_first_axis_that_is_no_multiple_of_the_batch_is_left_alone() -> None:
    """Queries as [B*S, N, D]: heads attend to heads there."""
    block = Block(kv_heads=4, visible="", cache=False)
    changes = {
        "scores = MatMul (q4, kt)": (
            "rows = Mul (batch1, seq1) r_s = Concat <axis = 0> (rows, j_4, j_4)"
            " q3 = Reshape (qs, r_s) k3 = Reshape (ks, r_s) v3 = Reshape (vs, r_s)"
            " k3_t = Transpose <perm = [0, 2, 1]> (k3) scores = MatMul (q3, k3_t)"
        ),
        "mixed = MatMul (probs, v4)": (
            "m3 = MatMul (probs, v3) mixed_a = Reshape (m3, m_s) "
            "mixed = Transpose <perm = [0, 2, 1, 3]> (mixed_a)"
        ),
        "x = Gather (table, input_ids)": (
            "x = Gather (table, input_ids) b_1 = Shape <end = 1> (input_ids)"
            " s_1 = Shape <start = 1> (input_ids) m_s = Concat <axis = 0> (b_1, s_1, j_4, j_4)"
        ),
    }
    model = named(dataclasses.replace(block, edits=(*changes.items(), CONSTANTS)))
    assert FuseAttention().run(model) == 0
    (event,) = events(model)
    assert "not [B, N, S, D]" in event.reason
