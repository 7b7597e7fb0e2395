"""ONNX text of a model that does something by position, a part of it open."""

from omforge import ir
from omforge.passes.name_dims import NameDims
from omforge.testing import parse

ROWS = 8
"""Of the table `places`."""

TEXT = """<ir_version: 11, opset_import: ["" : 24]>
g (int64[batch, seq] input_ids, int64[batch, total] attention_mask,
   int64[batch, seq] position_ids, float[batch, 2, past, 4] past_key)
   => (float[batch, seq, 2] logits, float[batch, 2, t, 4] present)
<float[4, 2] words = {0, 1, 2, 3, 4, 5, 6, 7},
 float[8, 2] places = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15},
 float[1, 2, 1, 4] key = {1, 2, 3, 4, 5, 6, 7, 8}, float[1, 2] slow = {1, 2}, float[1, 2] fast = {3, 4},
 int64 zero = {0}, int64 one = {1}, int64 two = {2}, int64 six = {6}, int64[1] axis = {1},
 int64[1] first = {0}, int64[1] last = {-1}, int64[1] heads = {2},
 int64[1] size = {4}> {
    word = Gather (words, input_ids)
    rows = Shape <start = 0, end = 1> (input_ids)
    tokens = Shape <start = 1, end = 2> (input_ids)
    sizes = Concat <axis = 0> (rows, heads, tokens, size)
    keys = Expand (key, sizes)
    present = Concat <axis = 2> (past_key, keys)
    total = Shape <start = 1, end = 2> (attention_mask)
    seen = Squeeze (total)
    BODY
    logits = Add (word, place) }"""

COUNTED = """
    counted = CumSum (attention_mask, one)
    places_of = Sub (counted, one)
    new = Shape <start = 1, end = 2> (input_ids)
    begin = Sub (total, new)
    """
LOOKED_UP = "place = Gather (places, position_ids)"
BEHIND_TWO = "row = Add (position_ids, two) place = Gather (places, row)"
SLICED = (
    COUNTED
    + """some = Slice (places, first, total, first)
    p = Slice (places_of, begin, total, axis)
    place = Gather (some, p)"""
)
TURNED = """p = Unsqueeze (position_ids, last)
    angle = Cast <to = 1> (p)
    turned = Mul (angle, frequency)
    place = Cos (turned)"""
FLATTENED = (
    COUNTED
    + """flat = Flatten <axis = 2> (attention_mask)
    keys_of = Range (zero, seen, one)
    shown = Gather (flat, keys_of)
    some = ReduceSum <keepdims = 0> (shown)
    place = Cast <to = 1> (some)"""
)
LONGEST = """most = ReduceMax <keepdims = 0> (position_ids)
    long = Greater (most, six)
    frequency = Where (long, slow, fast)
    """
BRANCHES = """long = Greater (seen, six)
    frequency = If (long) <
        then_branch = a () => (float[1, 2] x) { x = Constant <value = float[1, 2] {1, 2}> () },
        else_branch = b () => (float[1, 2] y) { y = Neg (fast) }>
    """
SCALED = """length = Max (seen, six)
    factor = Cast <to = 1> (length)
    frequency = Mul (fast, factor)
    """


def model(body: str) -> ir.Model:
    """The model, its dimensions named."""
    made = parse(TEXT.replace("BODY", body))
    NameDims().run(made)
    return made
