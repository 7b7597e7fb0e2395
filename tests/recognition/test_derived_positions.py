"""derived-positions: positions that a model counts itself."""

import numpy as np
import pytest

from omforge import ir
from omforge.ir import numerics
from omforge.ir.edit import remove_dead
from omforge.ir.infer import infer_model
from omforge.passes.name_dims import NameDims
from omforge.recognition.attention.masks import Prober
from omforge.recognition.derived_positions import (
    Counted,
    are_flags,
    are_of_all_rows,
    as_shape_of,
    follows_input,
    is_fixed,
    pick_for_each_row,
    position_values,
    recognise,
)
from omforge.recognition.interface import find_interface
from omforge.rewriting.match import NoMatch
from omforge.testing import parse

MODEL = """<ir_version: 11, opset_import: ["" : 24]>
g (int64[batch, seq] input_ids, int64[batch, total] attention_mask,
   int64[batch, seq] position_ids, float[batch, 2, past, 4] past_key)
   => (float[batch, seq, 2] logits, float[batch, 2, t, 4] present)
<float[4, 2] words = {0, 1, 2, 3, 4, 5, 6, 7}, float[4, 2] places = {0, 1, 2, 3, 4, 5, 6, 7},
 float[1, 2, 1, 4] key = {1, 2, 3, 4, 5, 6, 7, 8}, int64 zero = {0}, int64 one = {1}, int64 two = {2},
 int64[1] axis = {1}, int64[1] first = {0}, int64[1] end = {1000}> {
    word = Gather (words, input_ids)
    present = Concat <axis = 2> (past_key, key)
    %s
    place = Gather (places, p)
    logits = Add (word, place) }"""

SLOTS = """a = Shape <start = 2, end = 3> (past_key) past = Squeeze (a)
    b = Shape <start = 1, end = 2> (input_ids) seq = Squeeze (b)
    total = Add (past, seq)
    r = Range (past, total, one)"""
TOKENS = """a = Shape <start = 2, end = 3> (past_key)
    c = CumSum (attention_mask, one)
    d = Sub (c, one)
    r = Slice (d, a, end, axis)"""


def _value(body: str) -> tuple[Prober, ir.Value]:
    model = parse(MODEL % body)
    NameDims().run(model)
    (value,) = list(position_values(model))
    return Prober(model, find_interface(model)), value


def test_slots_are_counted_from_the_length_of_the_cache() -> None:
    assert recognise(*_value(f"{SLOTS} p = Unsqueeze (r, first)")) == Counted("slot", 0)


def test_tokens_are_counted_over_the_padding_mask() -> None:
    assert recognise(*_value(f"{TOKENS} p = Add (r, zero)")) == Counted("token", 0)


def test_an_offset_is_kept() -> None:
    assert recognise(*_value(f"{TOKENS} p = Add (r, two)")) == Counted("token", 2)


def test_the_callers_positions_are_recognised_as_such() -> None:
    assert follows_input(*_value("p = Add (position_ids, two)"))
    assert not follows_input(*_value(f"{SLOTS} p = Unsqueeze (r, first)"))


def test_other_numbers_are_refused() -> None:
    with pytest.raises(NoMatch, match="neither tokens nor slots"):
        recognise(*_value(f"{SLOTS} q = Mul (r, two) p = Unsqueeze (q, first)"))


def test_zeros_and_ones_that_tell_padding_are_no_positions() -> None:
    flags = """a = Shape <start = 2, end = 3> (past_key)
        r = Slice (attention_mask, a, end, axis)"""
    for text, expected in ((flags, True), (TOKENS, False), (SLOTS, False)):
        assert are_flags(*_value(f"{text} p = Add (r, zero)")) is expected


def test_numbers_that_no_past_changes_are_no_positions() -> None:
    experts = """a = Shape (input_ids) n = ReduceProd <keepdims = 0> (a)
        r = Range (zero, n, one) q = Mod (r, two)"""
    assert is_fixed(*_value(f"{experts} p = Add (q, zero)"))
    for text in (TOKENS, SLOTS):
        assert not is_fixed(*_value(f"{text} p = Add (r, zero)"))


def test_axes_are_put_where_the_derived_positions_have_them() -> None:
    model = parse("""<ir_version: 11, opset_import: ["" : 24]>
    g (int64[batch, seq] a, int64[1, 1, seq] b, int64[batch, seq, 1] c) => (int64[batch, seq] y)
    { y = Neg (a) }""")
    assert [as_shape_of(value) for value in model.graph.inputs] == [None, [0, 1, -1], [0, -1, 1]]


OF_ALL_ROWS = f"{SLOTS} p = Identity (r)"


@pytest.mark.parametrize(
    "place", ["Gather (places, p)", "GatherND (places, i)"], ids=["Gather", "GatherND"]
)
def test_one_count_for_all_rows_becomes_a_position_for_each(place: str) -> None:
    """Marian adds rows [S, H] of its table; the rows of a padded batch have counts of their own."""
    ahead = "i = Unsqueeze (p, axis) " if "ND" in place else ""
    text = (MODEL % OF_ALL_ROWS).replace("place = Gather (places, p)", f"{ahead}place = {place}")
    model = parse(text)
    NameDims().run(model)
    (value,) = [v for v in position_values(model) if v.name in ("p", "i")]
    assert are_of_all_rows(value)
    ids = next(v for v in model.graph.inputs if v.name == "position_ids")
    pick_for_each_row(model, value, Counted("slot", 1), ids, by="t")
    infer_model(model)
    remove_dead(model)
    tokens, past = np.array([[0, 1], [2, 3]]), np.zeros((1, 2, 1, 4), np.float32)
    mask = np.ones((2, 2), np.int64)
    feeds = {
        "input_ids": tokens,
        "attention_mask": mask,
        "position_ids": np.array([[0, 1], [1, 2]]),
        "past_key": past,
    }
    words = np.arange(8).reshape(4, 2)
    logits = numerics.run(model, feeds)["logits"]
    assert np.array_equal(logits, words[tokens] + words[np.array([[1, 2], [2, 3]])])


def test_one_count_that_picks_for_something_else_is_declined() -> None:
    model = parse(
        (MODEL % OF_ALL_ROWS).replace(
            "logits = Add (word, place)", "o = Unsqueeze (place, first) logits = Add (word, o)"
        )
    )
    NameDims().run(model)
    (value,) = list(position_values(model))
    ids = next(v for v in model.graph.inputs if v.name == "position_ids")
    with pytest.raises(NoMatch, match="is not added to hidden states"):
        pick_for_each_row(model, value, Counted("slot", 0), ids, by="t")
