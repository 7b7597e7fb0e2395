"""Attention that no pass understands, served from a cache of fixed capacity."""

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from omforge import ir
from omforge.ir.numerics import run, tolerance, within
from omforge.ir.values import dims
from omforge.ir.verify import check
from omforge.passes import make_pipeline
from omforge.passes.fuse_kv_io import FuseKvIo
from omforge.testing import parse

Array = npt.NDArray[Any]

# One layer of two heads of four; its heads' probabilities are weighed, so that it is not raised.
MODEL = """<ir_version: 11, opset_import: ["" : 24]>
g (int64[batch, seq] input_ids, int64[batch, total] attention_mask,
   float[batch, 2, past, 4] pk, float[batch, 2, past, 4] pv)
   => (float[batch, seq, 8] logits, float[batch, 2, t, 4] key, float[batch, 2, t, 4] value)
<int64[4] heads = {0, 0, 2, 4}, int64[3] flat = {0, 0, 8}, int64[1] one = {1}, int64[1] two = {2},
 int64[2] one_two = {1, 2}, int64 zero = {0}, int64 step = {1}, int64[1] begin = {0},
 int64[1] axis = {-1}, float shown = {0}, float hidden = {-1e30}, float[2, 1, 1] shares = {0.5, 1.5},
 float[8, 8] words = {%s}> {
    x = Gather (words, input_ids)
    split = Reshape (x, heads)
    k = Transpose <perm = [0, 2, 1, 3]> (split)
    v = Neg (k)
    q = Sin (k)
    key = Concat <axis = 2> (pk, k)
    value = Concat <axis = -2> (pv, v)
    turned = Transpose <perm = [0, 1, 3, 2]> (key)
    scores = MatMul (q, turned)
    mask_shape = Shape <start = 1> (attention_mask)
    total_length = Squeeze (mask_shape)
    past_shape = Shape <start = 2, end = 3> (pk)
    past_length = Squeeze (past_shape)
    query = Range (past_length, total_length, step)
    rows = Unsqueeze (query, one)
    keys = Range (zero, total_length, step)
    causal = LessOrEqual (keys, rows)
    truths = Cast <to = 9> (attention_mask)
    padding = Unsqueeze (truths, one_two)
    %s
    weighed = Mul (p, shares)
    mixed = MatMul (weighed, value)
    back = Transpose <perm = [0, 2, 1, 3]> (mixed)
    y = Reshape (back, flat)
    logits = Tanh (y)
}"""

ADDED = """seen = And (causal, padding)
    mask = Where (seen, shown, hidden)
    masked = Add (scores, mask)
    p = Softmax (masked)"""
REPLACED = """seen = And (causal, padding)
    masked = Where (seen, scores, hidden)
    p = Softmax (masked)"""
INVERTED = """seen = And (causal, padding)
    unseen = Not (seen)
    masked = Where (unseen, hidden, scores)
    p = Softmax (masked)"""
ONE_AFTER_THE_OTHER = """earlier = Where (causal, scores, hidden)
    mask = Where (padding, shown, hidden)
    masked = Add (earlier, mask)
    p = Softmax (masked)"""
SUNK = """seen = And (causal, padding)
    mask = Where (seen, shown, hidden)
    masked = Add (mask, scores)
    largest = ReduceMax (masked, axis)
    centred = Sub (masked, largest)
    powers = Exp (centred)
    sum = ReduceSum (powers, axis)
    sink = Exp (largest)
    divisor = Add (sum, sink)
    p = Div (powers, divisor)"""


BATCH, SEQ, PAST, CAPACITY = 2, 3, 5, 9


def _model(between: str) -> ir.Model:
    words = np.random.default_rng(0).standard_normal(64).round(3)
    model = parse(MODEL % (", ".join(map(str, words)), between))
    make_pipeline("raise").run(model)
    assert "Attention" not in {node.op_type for node in model.graph}
    return model


def _export_feeds(padding: int) -> dict[str, Array]:
    random = np.random.default_rng(1)
    attention_mask = np.ones((BATCH, PAST + SEQ), np.int64)
    attention_mask[1, :padding] = 0
    past = random.standard_normal((2, BATCH, 2, PAST, 4)).astype(np.float32)
    return {
        "input_ids": random.integers(0, 8, (BATCH, SEQ)),
        "attention_mask": attention_mask,
        "pk": past[0],
        "pv": past[1],
    }


def _served_feeds(feeds: dict[str, Array]) -> dict[str, Array]:
    slots = np.full((2, BATCH, 2, CAPACITY, 4), 9, np.float32)
    slots[:, :, :, :PAST] = feeds["pk"], feeds["pv"]
    hidden = np.zeros((BATCH, CAPACITY - PAST), np.int64)
    real = np.concatenate(
        [feeds["attention_mask"][:, :PAST], hidden, feeds["attention_mask"][:, PAST:]], axis=1
    )
    earlier = np.concatenate([np.ones((SEQ, CAPACITY)), np.tri(SEQ)], axis=1)
    seen = (real[:, None, None] * earlier) != 0
    return {
        "input_ids": feeds["input_ids"],
        "attention_mask": np.where(seen, 0, -30000).astype(np.float32),
        "past_key_values": slots.reshape(-1, 2, CAPACITY, 4),
    }


@pytest.mark.parametrize("between", [ADDED, REPLACED, INVERTED, ONE_AFTER_THE_OTHER, SUNK])
def test_the_numbers_stay_and_slots_behind_the_valid_ones_do_not_matter(between: str) -> None:
    export, model = _model(between), _model(between)
    assert FuseKvIo().run(model) == 1
    check(model)
    shapes = {v.name: [str(n) for n in dims(v) or ()] for v in model.graph.inputs}
    assert shapes == {
        "input_ids": ["batch", "seq"],
        "attention_mask": ["batch", "1", "seq", "capacity + seq"],
        "past_key_values": ["2*batch", "2", "capacity", "4"],
    }
    for padding in (0, 2):
        feeds = _export_feeds(padding)
        expected, got = run(export, feeds), run(model, _served_feeds(feeds))
        assert within(got["logits"], expected["logits"], tolerance("float32"))
        new = np.concatenate([expected["key"], expected["value"]])[:, :, PAST:]
        assert within(got["present_key_values"], new, tolerance("float32"))


BIASED = """seen = And (causal, padding)
    mask = Where (seen, shown, hidden)
    masked = Add (scores, mask)
    numbers = Cast <to = 1> (keys)
    squares = Mul (numbers, numbers)
    biased = Add (masked, squares)
    p = Softmax (biased)"""
BIASED_AND_SUNK = SUNK.replace(
    "largest = ReduceMax (masked, axis)",
    """numbers = Cast <to = 1> (keys)
    steps = Neg (shares)
    bias = Mul (steps, numbers)
    near = Add (masked, bias)
    largest = ReduceMax (near, axis)""",
).replace("Sub (masked", "Sub (near")
AVERAGED = """seen = And (causal, padding)
    mask = Where (seen, shown, hidden)
    masked = Add (scores, mask)
    mean = ReduceMean (masked, axis)
    centred = Sub (masked, mean)
    weights = Softmax (masked)
    p = Mul (weights, mean)"""
NOT_CAUSAL = """later = Not (causal)
    seen = And (later, padding)
    mask = Where (seen, shown, hidden)
    masked = Add (scores, mask)
    p = Softmax (masked)"""
MULTIPLIED = """seen = And (causal, padding)
    ones = Cast <to = 1> (seen)
    masked = Mul (scores, ones)
    p = Softmax (masked)"""
COUNTED = """seen = And (causal, padding)
    mask = Where (seen, shown, hidden)
    masked = Add (scores, mask)
    weights = Softmax (masked)
    end = Add (past_shape, one)
    from_table = Slice (words, past_shape, end, begin)
    mean = ReduceMean (from_table)
    p = Mul (weights, mean)"""


@pytest.mark.parametrize(
    ("between", "message"),
    [
        (BIASED_AND_SUNK, "depends on the number or the order of the keys"),
        (BIASED, "depends on the number or the order of the keys"),
        (AVERAGED, "depends on the number or the order of the keys"),
        (NOT_CAUSAL, "expected a causal mask"),
        (MULTIPLIED, "no mask is applied between pk and"),
        (COUNTED, "depends on the number or the order of the keys"),
    ],
)
def test_what_would_give_other_numbers_is_refused(between: str, message: str) -> None:
    model = _model(between)
    with pytest.raises(ir.CheckError, match=message):
        FuseKvIo().run(model)


def test_a_count_of_the_tokens_elsewhere_is_refused() -> None:
    counting = """end = Add (past_shape, one)
    from_table = Slice (words, past_shape, end, begin)
    mean = ReduceMean (from_table)
    logits = Mul (y, mean)"""
    model = parse((MODEL % (", ".join(["1"] * 64), ADDED)).replace("logits = Tanh (y)", counting))
    make_pipeline("raise").run(model)
    with pytest.raises(ir.CheckError, match="Slice -> from_table counts the tokens in the cache"):
        FuseKvIo().run(model)


def test_a_cache_that_is_joined_in_another_way_is_named() -> None:
    model = _model(ADDED)
    join = next(n for n in model.graph if n.outputs[0].name == "key")
    old = join.inputs[0]
    join.replace_input_with(0, join.inputs[1])
    join.replace_input_with(1, old)
    with pytest.raises(ir.CheckError, match=r"expected: Concat\(pk \[B, K, P, D\]"):
        FuseKvIo().run(model)


def test_a_cache_of_fixed_length_is_refused() -> None:
    text = MODEL.replace("batch, 2, past, 4", "batch, 2, 5, 4")
    model = parse(text % (", ".join(["1"] * 64), ADDED))
    make_pipeline("raise").run(model)
    with pytest.raises(ir.CheckError, match="its length is 5, not a symbol"):
        FuseKvIo().run(model)


ALIBI = """numbers = Cast <to = 1> (keys)
    slopes = Neg (shares)
    steps = Neg (slopes)
    bias = Mul (steps, numbers)
    near = Add (scores, bias)
    seen = And (causal, padding)
    mask = Where (seen, shown, hidden)
    masked = Add (near, mask)
    p = Softmax (masked)"""


def test_a_bias_by_the_positions_of_keys_is_made_of_what_the_runtime_gives() -> None:
    export, model = _model(ALIBI), _model(ALIBI)
    FuseKvIo().run(model)
    check(model)
    feeds = _export_feeds(2)
    behind = np.zeros(CAPACITY - PAST)
    numbers = np.arange(PAST + SEQ) - (PAST + SEQ - 1)
    numbers = np.concatenate([numbers[:PAST], behind, numbers[PAST:]])
    served = _served_feeds(feeds) | {"key_positions": numbers.astype(np.float32)[None, None, None]}
    got = run(model, served)
    assert within(got["logits"], run(export, feeds)["logits"], tolerance("float32"))
