"""derived-positions: positions that a model counts itself."""

import pytest

from omforge import ir
from omforge.passes.derived_positions import (
    Counted,
    are_flags,
    as_shape_of,
    follows_input,
    is_fixed,
    position_values,
    recognise,
)
from omforge.passes.interface import find_interface
from omforge.passes.masks import Prober
from omforge.passes.match import NoMatch
from omforge.passes.name_dims import NameDims
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
