"""fuse-attention: which spellings become one `Attention`, and which must not."""

import dataclasses
import logging
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from omforge import ir
from omforge.ir import numerics
from omforge.ir.values import attribute
from omforge.passes import make_pipeline
from omforge.passes.fuse_attention import FuseAttention
from omforge.rewriting.events import events
from tests.passes.blocks import (
    LOW,
    Block,
    fused,
    named,
    ops,
    steps,
)

INFINITE = -float("inf")


def attention(model: ir.Model) -> ir.Node:
    """The one block of a model; nothing of the exported one is left."""
    left = {"Softmax", "IsNaN", "Tanh", "Range"} & set(ops(model))
    assert not left
    (node,) = [node for node in model.graph if node.op_type == "Attention"]
    return node


def edited(block: Block, changes: dict[str, str]) -> Block:
    """The block with its text changed."""
    return dataclasses.replace(block, edits=tuple(changes.items()))


def inputs(node: ir.Node) -> list[str]:
    return [value.name if value is not None and value.name else "" for value in node.inputs]


def is_windowed(node: ir.Node) -> bool:
    """Whether its mask cuts off old keys: two triangles make a band."""
    pending, found = [node.inputs[3]], 0
    while pending:
        value = pending.pop()
        maker = None if value is None else value.producer()
        if maker is not None:
            found += maker.op_type == "Trilu"
            pending += maker.inputs
    return found == 2


# --- the whole of it --------------------------------------------------------------------------


def test_raises_a_block() -> None:
    node = attention(fused(FuseAttention(), Block()))
    assert inputs(node)[:3] == ["q", "k", "v"]
    assert inputs(node)[4:] == ["past_key", "past_value"]
    assert [value.name for value in node.outputs[1:]] == ["present_key", "present_value"]
    options = {name: found.value for name, found in node.attributes.items()}
    assert options == {"q_num_heads": 4, "kv_num_heads": 2, "scale": pytest.approx(0.6)}
    assert not is_windowed(node)


def test_finds_nothing_in_a_second_run() -> None:
    model = named(Block())
    assert FuseAttention().run(model) == 1
    assert FuseAttention().run(model) == 0


def test_leaves_a_graph_without_softmax_alone() -> None:
    text = '<ir_version: 11, opset_import: ["" : 24]> g (float[2] x) => (float[2] y) {y = Neg (x)}'
    assert FuseAttention().run(ir.from_onnx_text(text)) == 0


# --- spellings --------------------------------------------------------------------------------

HEADS = {
    "multi-head": Block(kv_heads=4),
    "grouped": Block(kv_heads=2),
    "multi-query": Block(kv_heads=1),
    "repeated by Concat": Block(repeat="concat"),
    "repeated by Gather": Block(repeat="gather"),
    "one head": Block(heads=1, kv_heads=1),
    "wider values": Block(value_size=6),
    "keys transposed in two steps": Block(keys="twice"),
    "keys transposed as [B*N, T, D]": Block(keys="flat"),
    "one product for QKV": Block(split="fused"),
}


@pytest.mark.parametrize("case", HEADS)
def test_raises_every_arrangement_of_heads(case: str) -> None:
    block = HEADS[case]
    node = attention(fused(FuseAttention(), block))
    assert node.attributes["kv_num_heads"].as_int() == block.kv_heads
    assert inputs(node)[:3] == ["q", "k", "v"]
    assert len(node.inputs) == 6


@pytest.mark.parametrize(
    ("scale", "expected"), [("mul", 0.6), ("div", 0.6), ("query", 0.6), ("both", 0.6), ("", 1.0)]
)
def test_collects_the_scale_wherever_it_is(scale: str, expected: float) -> None:
    node = attention(fused(FuseAttention(), Block(scale=scale)))
    assert node.attributes["scale"].as_float() == pytest.approx(expected)


@pytest.mark.parametrize("applied", ["added", "where", "inverted"])
@pytest.mark.parametrize("visible", ["causal", "trilu", "table", "window"])
@pytest.mark.parametrize("padding", [True, False])
def test_rebuilds_every_mask(applied: str, visible: str, padding: bool) -> None:
    block = Block(applied=applied, visible=visible, padding=padding)
    model = fused(FuseAttention(), block)
    assert is_windowed(attention(model)) == (visible == "window")
    assert not events(model)


@pytest.mark.parametrize("applied", ["two", "sum", "product"])
@pytest.mark.parametrize("visible", ["causal", "window"])
def test_rebuilds_masks_for_order_and_padding(applied: str, visible: str) -> None:
    model = fused(FuseAttention(), Block(applied=applied, visible=visible), padding_rows=False)
    assert is_windowed(attention(model)) == (visible == "window")


@pytest.mark.parametrize(
    "block",
    [
        Block(low=INFINITE),
        Block(low=INFINITE, guard="nan"),
        Block(low=INFINITE, applied="inverted", guard="nan"),
        Block(guard="rows"),
        Block(guard="rows", low=INFINITE, applied="where"),
    ],
)
def test_gives_zeros_to_rows_that_see_nothing(block: Block) -> None:
    """`Attention` does so for a boolean mask; a finite one would give them a mean of all values."""
    mask = attention(fused(FuseAttention(), block)).inputs[3]
    assert mask is not None
    assert mask.dtype == ir.DataType.BOOL


def test_a_guard_that_gives_something_else_stays() -> None:
    changes = {"Where (empty, zero, mixed)": "Where (empty, scale, mixed)"}
    model = fused(FuseAttention(), edited(Block(guard="rows"), changes))
    assert "Attention" in ops(model)
    assert "guarded" in [value.name for node in model.graph for value in node.outputs]


def test_keeps_the_mean_of_rows_that_see_nothing() -> None:
    mask = attention(fused(FuseAttention(), Block())).inputs[3]
    assert mask is not None
    assert mask.dtype == ir.DataType.FLOAT


@pytest.mark.parametrize("low", [-1e4, -65504.0, LOW])
def test_takes_any_low_number_for_hidden(low: float) -> None:
    attention(fused(FuseAttention(), Block(low=low), padding_rows=False))


def test_caps_scores_before_the_mask() -> None:
    node = attention(fused(FuseAttention(), Block(softcap=2.0)))
    assert node.attributes["softcap"].as_float() == 2.0


@pytest.mark.parametrize("visible", ["causal", "window", ""])
def test_raises_a_block_without_a_cache(visible: str) -> None:
    node = attention(fused(FuseAttention(), Block(cache=False, visible=visible)))
    assert inputs(node)[:3] == ["q", "k", "v"]  # before heads are split and repeated
    assert len(node.inputs) == (4 if visible else 3)
    assert len(node.outputs) == 1


def test_raises_a_block_without_a_mask() -> None:
    node = attention(fused(FuseAttention(), Block(visible="")))
    assert inputs(node)[3] == ""


@pytest.mark.parametrize(
    "block",
    [
        Block(seq="1"),
        Block(batch="1"),
        Block(batch="1", padding=False),
        Block(past="5"),
        Block(batch="2", seq="3", past="4"),
        Block(batch="1", seq="1", past="6", visible="window"),
        Block(cache=False, batch="1", seq="6"),
        Block(positions=False),
    ],
    ids=str,
)
def test_raises_exports_with_fixed_sizes(block: Block) -> None:
    attention(fused(FuseAttention(), block))


def test_raises_keys_however_they_are_made() -> None:
    changes = {"scores = MatMul (q4, kt)": "other = Abs (kt) scores = MatMul (q4, other)"}
    node = attention(fused(FuseAttention(), edited(Block(), changes)))
    assert node.attributes["kv_num_heads"].as_int() == 4


def test_raises_one_key_head_that_the_products_broadcast() -> None:
    changes = {
        "(present_key_n)": "(present_key)",
        "MatMul (probs, present_value_n)": "MatMul (probs, present_value)",
    }
    node = attention(fused(FuseAttention(), edited(Block(kv_heads=1), changes)))
    assert node.attributes["kv_num_heads"].as_int() == 1
    assert len(node.inputs) == 6


# --- kept as it stands ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("visible", "why"),
    [
        ("chunk", "it is no causal mask for 3 tokens after"),
        ("all", "it is no causal mask for 3 tokens after"),
        ("alibi", "it is no causal mask for 3 tokens after"),
    ],
)
def test_keeps_a_mask_that_it_does_not_know(visible: str, why: str) -> None:
    block = Block(visible=visible)
    model = fused(FuseAttention(), block)
    assert "Attention" in ops(model)
    (event,) = events(model)
    assert "its mask is kept as it stands" in event.reason
    assert why in event.reason


@pytest.mark.parametrize("visible", ["all", "causal"])
def test_a_bias_by_position_and_a_mask_are_one_sum(visible: str) -> None:
    """MPNet and T5's encoder learn a bias by distance, and add it beside the mask."""
    edits = (
        (
            "masked = Add (scaled, bias)",
            "far_f = Cast <to = 1> (key) waves = Sin (far_f) biased = Add (scaled, waves)"
            " masked = Add (biased, bias)",
        ),
    )
    model = fused(FuseAttention(), Block(visible=visible, cache=False, edits=edits))
    assert ops(model).count("Attention") == 1
    assert "Softmax" not in ops(model)
    (event,) = events(model)
    assert "its mask is kept as it stands: it adds more than a mask" in event.reason


def test_keys_that_are_repeated_over_and_over_move_the_queries() -> None:
    """Tile gives heads 0 1 0 1, grouped heads are 0 0 1 1: the queries change places instead."""
    model = fused(FuseAttention(), Block(repeat="tile"))
    node = attention(model)
    assert node.attributes["kv_num_heads"].as_int() == 2
    assert len(node.inputs) == 6
    assert ops(model).count("Transpose") == 2 + 2  # queries and what comes out; two without it


UNCACHED = {
    "new before past": {
        "(past_key, k4)": "(k4, past_key)",
        "(past_value, v4)": "(v4, past_value)",
    },
    "a cache that is scaled": {
        "present_key = Concat <axis = 2> (past_key,": (
            "old_keys = Mul (past_key, scale) present_key = Concat <axis = 2> (old_keys,"
        ),
        "present_value = Concat <axis = 2> (past_value,": (
            "old_values = Mul (past_value, scale) present_value = Concat <axis = 2> (old_values,"
        ),
    },
    "keys alone have one": {
        "present_value = Concat <axis = 2> (past_value,": (
            "old_values = Abs (past_value) present_value = Concat <axis = 2> (old_values,"
        ),
    },
}


@pytest.mark.parametrize("case", UNCACHED)
def test_takes_for_a_cache_only_an_input_with_new_keys_behind_it(case: str) -> None:
    model = fused(FuseAttention(), edited(Block(), UNCACHED[case]))
    (node,) = [node for node in model.graph if node.op_type == "Attention"]
    assert len(node.inputs) == 4


def test_takes_for_a_cache_only_what_is_joined_along_the_tokens() -> None:
    """Halves of heads joined to whole ones, of as many tokens in both."""
    block = Block(kv_heads=4, visible="", padding=False, seq="3", past="3")
    changes = {
        "float[batch, 4, 3, 4] past_key": "float[batch, 4, 3, 2] past_key",
        "float[batch, 4, 3, 4] past_value": "float[batch, 4, 3, 2] past_value",
        "float[batch, 4, 6, 4] present_key": "float[batch, 4, 3, 4] present_key",
        "float[batch, 4, 6, 4] present_value": "float[batch, 4, 3, 4] present_value",
        "present_key = Concat <axis = 2> (past_key, k4)": (
            "half_k = Slice (k4, i_from, i_to, i_axis)"
            " present_key = Concat <axis = 3> (past_key, half_k)"
        ),
        "present_value = Concat <axis = 2> (past_value, v4)": (
            "half_v = Slice (v4, i_from, i_to, i_axis)"
            " present_value = Concat <axis = 3> (past_value, half_v)"
        ),
        "float scale =": (
            "int64[1] i_from = {0}, int64[1] i_to = {2}, int64[1] i_axis = {3}, float scale ="
        ),
    }
    model = named(edited(block, changes))
    assert FuseAttention().run(model) == 1
    assert len(attention(model).inputs) == 3


# --- left alone -------------------------------------------------------------------------------

LEFT_ALONE: dict[str, tuple[Block, dict[str, str], str]] = {
    "softmax over queries": (
        Block(),
        {"Softmax <axis = -1>": "Softmax <axis = 2>"},
        "the softmax is over axis 2",
    ),
    "probabilities are an output": (
        Block(outputs=("float[batch, 4, seq, total] probs",)),
        {},
        "the probabilities probs are an output of the graph",
    ),
    "probabilities are used elsewhere": (
        Block(outputs=("float[batch, 4, seq, total] other",)),
        {"logits =": "other = Neg (probs) logits ="},
        "the probabilities are used by MatMul, Neg",
    ),
    "probabilities are hidden": (
        Block(),
        {"mixed = MatMul (probs,": "kept = Where (seen, probs, zero) mixed = MatMul (kept,"},
        "the probabilities go into Where",
    ),
    "probabilities are scaled": (
        Block(),
        {"mixed = MatMul (probs,": "kept = Mul (probs, scale) mixed = MatMul (kept,"},
        "the probabilities go into Mul",
    ),
    "probabilities are rounded": (
        Block(),
        {
            "mixed = MatMul (probs,": (
                "whole = Cast <to = 7> (probs) kept = Cast <to = 1> (whole) mixed = MatMul (kept,"
            )
        },
        "the probabilities are cast to INT64",
    ),
    "NaN becomes something": (
        Block(low=INFINITE, guard="nan"),
        {"Where (isnan, zero, probs)": "Where (isnan, scale, probs)"},
        "the probabilities are used by IsNaN, Where",
    ),
    "another row is guarded": (
        Block(guard="rows"),
        {"Equal (most, zero)": "GreaterOrEqual (most, zero)"},
        "rows are zeroed that do see keys",
    ),
    "a mask is capped": (
        Block(softcap=2.0),
        {
            "capped_a = Div (scaled, cap)": "",
            "capped_b = Tanh (capped_a)": "",
            "capped = Mul (capped_b, cap)": "",
            "masked = Add (capped, bias)": (
                "early = Add (scaled, bias) capped_a = Div (early, cap)"
                " capped_b = Tanh (capped_a) masked = Mul (capped_b, cap)"
            ),
        },
        "the mask is applied before the scores are capped",
    ),
    "scaled after the cap": (
        Block(softcap=2.0),
        {"masked = Add (capped,": "late = Mul (capped, scale) masked = Add (late,"},
        "the scores are capped before they are scaled",
    ),
    "moved before the cap": (
        Block(softcap=1.0, visible="", scale="", kv_heads=4),
        {"Div (scores, cap)": "Transpose <perm = [1, 0, 2, 3]> (scores)"},
        "the scores come from Transpose, not from a product",
    ),
    "a negative scale": (
        Block(),
        {"float scale = {0.6}": "float scale = {-0.6}"},
        "the scores go through Mul by -0.6",
    ),
    "a scale of 0": (
        Block(scale="div"),
        {"float scale = {1.6666666666666667}": "float scale = {0.0}"},
        "the scores go through Div by 0",
    ),
    "a negative scale of queries": (
        Block(scale="query"),
        {"float scale = {0.6}": "float scale = {-0.6}"},
        "its scale is -0.6, and `Attention` takes a positive one",
    ),
    "a scale for each head": (
        Block(),
        {"float scale = {0.6}": "float[4, 1, 1] scale = {0.1, 0.2, 0.3, 0.4}"},
        "the scores are multiplied by more than zeros and ones",
    ),
    "hidden scores are 0": (
        Block(applied="where"),
        {"Where (seen, scaled, low)": "Where (seen, scaled, zero)"},
        "it is no causal mask",
    ),
    "hidden scores are small": (
        Block(applied="where", low=-5.0),
        {},
        "it adds more than a mask to the scores",
    ),
    "hidden scores have other scores": (
        Block(applied="where"),
        {"Where (seen, scaled, low)": "Where (seen, scaled, scores)"},
        "hidden scores are replaced by something other than one number",
    ),
    "a mask of the tokens": (
        Block(),
        {"masked = Add (scaled, bias)": "masked = Add (scaled, scores)"},
        "what is added to the scores depends on the tokens",
    ),
    "tokens choose what is hidden": (
        Block(applied="where"),
        {"masked = Where (seen,": "odd = Greater (scaled, zero) masked = Where (odd,"},
        "which scores are hidden depends on the tokens",
    ),
    "a softmax over several axes": (
        Block(visible=""),
        {
            "masked = Identity (scaled)": "masked = Reshape (scaled, i_rows)",
            "probs = Softmax <axis = -1> (masked)": (
                "flat_probs = Softmax <axis = -1> (masked) whole = Shape (scaled)"
                " probs = Reshape (flat_probs, whole)"
            ),
            "float scale =": "int64[3] i_rows = {0, 4, -1}, float scale =",
        },
        "scores of [batch, 4, seq, past + seq] become [batch, 4, past*seq + seq*seq]",
    ),
    "a mask on scores of another shape": (
        Block(visible="", seq="2"),
        {
            "masked = Identity (scaled)": (
                "i_all = Concat <axis = 0> (i_rows, total1) rows = Reshape (scaled, i_all)"
                " tilted = Add (rows, tilt) whole = Shape (scaled) masked = Reshape (tilted, whole)"
            ),
            "float scale =": (
                "int64[2] i_rows = {0, 8}, float[8, 1] tilt = {1, 2, 3, 4, 5, 6, 7, 8},"
                " float scale ="
            ),
        },
        "scores of [batch, 4, 2, past + 2] are masked as [batch, 8, past + 2]",
    ),
    "a mask that makes two of one": (
        Block(visible="", batch="1"),
        {
            "masked = Identity (scaled)": "masked = Add (scaled, tall)",
            "float scale =": "float[2, 1, 1, 1] tall = {0, 0}, float scale =",
            "back = Transpose <perm = [0, 2, 1, 3]> (mixed)": (
                "one = ReduceMean <keepdims = 1> (mixed, i_0)"
                " back = Transpose <perm = [0, 2, 1, 3]> (one)"
            ),
            "int64[4] i_0_0_4_4": "int64[1] i_0 = {0}, int64[4] i_0_0_4_4",
        },
        "become [2, 4, seq, past + seq]",
    ),
    "scores of no product": (
        Block(),
        {"scaled = Mul (scores, scale)": "scaled = Abs (scores)"},
        "the scores come from Abs, not from a product",
    ),
}


@pytest.mark.parametrize("case", LEFT_ALONE)
def test_leaves_alone(case: str, caplog: pytest.LogCaptureFixture) -> None:
    block, changes, why = LEFT_ALONE[case]
    model = named(edited(block, changes))
    before = ir.to_proto(model).SerializeToString(deterministic=True)
    with caplog.at_level(logging.INFO, logger="omforge"):
        assert FuseAttention().run(model) == 0
    assert ir.to_proto(model).SerializeToString(deterministic=True) == before
    assert why in caplog.text


# --- half precision ---------------------------------------------------------------------------


IN_FLOAT = {
    "scores = MatMul (q4, kt)": (
        "q_h = Cast <to = 10> (q4) k_h = Cast <to = 10> (kt) scores_h = MatMul (q_h, k_h)"
        " scores = Cast <to = 1> (scores_h)"
    ),
    "mixed = MatMul (probs, present_value_n)": (
        "p_h = Cast <to = 10> (probs) v_h = Cast <to = 10> (present_value_n)"
        " mixed_h = MatMul (p_h, v_h) mixed = Cast <to = 1> (mixed_h)"
    ),
}


def test_says_that_a_cache_stays_outside() -> None:
    """Heads that are repeated in no order, 1 0 0 1, are no groups of a key's queries."""
    mixed = [
        (
            f"present_{name}_n = Reshape (present_{name}_e, present_{name}_h)",
            f"present_{name}_n = Gather <axis = 1> (present_{name}, i_1_0_0_1)",
        )
        for name in ("key", "value")
    ]
    more = ("<float[16, 8] table", "<int64[4] i_1_0_0_1 = {1, 0, 0, 1}, float[16, 8] table")
    model = fused(FuseAttention(), Block(edits=(*mixed, more)))
    assert any("it stays outside" in event.reason for event in events(model))


@pytest.mark.parametrize(
    "router",
    [
        "best, chosen = TopK (logits, i_1)\n r = Softmax (best)",
        "r = Softmax (logits)\n b, c = TopK (r, i_1)",
    ],
)
def test_a_router_is_no_attention_that_was_left(router: str) -> None:
    edits = (("logits = MatMul (hidden, head)", f"logits = MatMul (hidden, head)\n {router}"),)
    model = named(Block(edits=edits))
    assert FuseAttention().run(model) == 1
    assert not events(model)


def test_says_that_the_softmax_is_in_float() -> None:
    model = named(edited(Block(), IN_FLOAT))
    assert FuseAttention().run(model) == 1
    node = attention(model)
    assert node.attributes["softmax_precision"].as_int() == ir.DataType.FLOAT
    assert all(v.dtype == ir.DataType.FLOAT16 for v in node.inputs if v is not None)
    ir.check(model)


WIDENED = {
    **IN_FLOAT,
    "mixed = MatMul (probs, present_value_n)": (
        "v_h = Cast <to = 10> (present_value_n) v_f = Cast <to = 1> (v_h)"
        " mixed = MatMul (probs, v_f)"
    ),
}


def test_looks_through_values_that_are_widened_for_the_product() -> None:
    """Where an exporter runs the softmax in float, and leaves the probabilities so."""
    model = named(edited(Block(), WIDENED))
    original = named(edited(Block(), WIDENED))
    assert FuseAttention().run(model) == 1
    node = attention(model)
    assert node.attributes["softmax_precision"].as_int() == ir.DataType.FLOAT
    assert all(v.dtype == ir.DataType.FLOAT16 for v in node.inputs if v is not None)
    ir.check(model)
    for feeds in steps(Block()):
        expected, actual = numerics.run(original, feeds), numerics.run(model, feeds)
        real = feeds["attention_mask"][:, -feeds["input_ids"].shape[1] :] != 0
        difference = np.abs(expected["logits"] - actual["logits"])[real]
        assert difference.max() < 0.02


def test_values_that_are_wider_than_the_queries_are_left_alone() -> None:
    """Not widened, but float from the start: nothing is to be looked through."""
    changes = {key: text for key, text in IN_FLOAT.items() if key.startswith("scores")}
    model = named(edited(Block(), changes))
    assert FuseAttention().run(model) == 0
    (event,) = events(model)
    assert "queries are FLOAT16, keys FLOAT16 and values FLOAT" in event.reason


def test_leaves_operands_of_two_dtypes_alone(caplog: pytest.LogCaptureFixture) -> None:
    """Scores in float and values in half: `Attention` has one dtype for all."""
    only_values = {key: text for key, text in IN_FLOAT.items() if key.startswith("mixed")}
    model = named(edited(Block(), only_values))
    with caplog.at_level(logging.INFO, logger="omforge"):
        assert FuseAttention().run(model) == 0
    assert "queries are FLOAT, keys FLOAT and values FLOAT16" in caplog.text


# --- real exports -----------------------------------------------------------------------------


@pytest.mark.parametrize("route", ["optimum", "dynamo", "hfexporter", "torchscript-op17"])
def test_raises_every_block_of_an_export(route: str, exported: Callable[[str, str], Path]) -> None:
    model = ir.load(exported(route, "mistral"))
    make_pipeline("canonicalize,fuse-attention").run(model)
    blocks = [node for node in model.graph if node.op_type == "Attention"]
    assert len(blocks) == 2
    assert blocks[0].inputs[3] is blocks[1].inputs[3]
    assert is_windowed(blocks[0])
    assert all(attribute(node, "kv_num_heads") == 2 for node in blocks)
