"""fuse-rotary of what an exporter wrote as `RotaryEmbedding` itself."""

import pytest

from omforge import ir
from omforge.passes import make_pipeline
from omforge.passes.fuse_rotary import FuseRotary
from omforge.recognition.rotary.operator import is_own
from omforge.rewriting.events import events
from omforge.testing import assert_same_numbers, parse

HEADER = """<ir_version: 11, opset_import: ["" : 24]>
g (int64[batch, seq] input_ids, int64[batch, seq] position_ids) => (float[batch, seq, 8] logits)
<float[9, 8] table = {%s}, float[1] inv_freq = {0.5}, int64[1] two = {2}, int64[1] three = {3},
 int64[1] first = {0}, int64[1] half = {2}, int64[1] end = {9999}, float[16, 1] cos_cache = {%s},
 float[16, 1] sin_cache = {%s}, float[8, 8] head = {%s},
 int64[4] split = {0, 0, 2, 4}, int64[3] join = {0, 0, 8}> {
    x = Gather (table, input_ids) xs = Reshape (x, split) x4 = Transpose <perm = [0, 2, 1, 3]> (xs)
    p = Cast <to = 1> (position_ids) pu = Unsqueeze (p, two) angle = Mul (pu, inv_freq)
    cos = Cos (angle) sin = Sin (angle)
    %s
    back = Transpose <perm = [0, 2, 1, 3]> (y4) y = Reshape (back, join) logits = MatMul (y, head) }
"""


def model(rotation: str) -> ir.Model:
    """Two heads of 4, of which 2 or all are rotated."""
    numbers = ", ".join(f"{(7 * i) % 11 / 5 - 1}" for i in range(72))
    tables = [", ".join(f"{(i * k) % 7 / 7}" for i in range(16)) for k in (3, 5)]
    head = ", ".join(f"{(5 * i) % 13 / 6 - 1}" for i in range(64))
    return parse(HEADER % (numbers, *tables, head, rotation))


PARTS = """a = Slice (x4, first, half, three) o = Slice (x4, half, end, three)
    r = RotaryEmbedding {} (a, cos, sin) y4 = Concat <axis = -1> ({})"""
RAISED = {
    "a part, by attribute": "y4 = RotaryEmbedding <rotary_embedding_dim = 2> (x4, cos, sin)",
    "a part, cut off and joined": PARTS.format("", "r, o"),
    "neighbours": PARTS.format("<interleaved = 1>", "r, o"),
    "by positions": """y4 = RotaryEmbedding <rotary_embedding_dim = 2>
        (x4, cos_cache, sin_cache, position_ids)""",
    "3-D, by positions": """y3 = RotaryEmbedding <rotary_embedding_dim = 2, num_heads = 2>
        (x, cos_cache, sin_cache, position_ids)
        ys = Reshape (y3, split) y4 = Transpose <perm = [0, 2, 1, 3]> (ys)""",
}


@pytest.mark.parametrize("case", RAISED)
def test_brings_it_to_the_canonical_layout(case: str) -> None:
    before, after = model(RAISED[case]), model(RAISED[case])
    make_pipeline("canonicalize,fuse-rotary").run(after)
    (node,) = [node for node in after.graph if node.op_type == "RotaryEmbedding"]
    assert not is_own(node)
    assert node.inputs[0] is not None
    assert node.inputs[0].name == "x"
    assert node.attributes["num_heads"].as_int() == 2
    assert node.attributes["rotary_embedding_dim"].as_int() == 2
    assert ("interleaved" in node.attributes) == (case == "neighbours")
    assert FuseRotary().run(after) == 0
    ir.check(after)
    assert_same_numbers(before, after)


def test_what_is_joined_in_another_order_is_no_part_of_a_head() -> None:
    text = PARTS.format("", "o, r")
    before, after = model(text), model(text)
    make_pipeline("canonicalize,fuse-rotary").run(after)
    (node,) = [node for node in after.graph if node.op_type == "RotaryEmbedding"]
    assert "rotary_embedding_dim" not in node.attributes
    assert_same_numbers(before, after)


def test_a_table_that_runs_over_something_else_is_named() -> None:
    text = "c = Unsqueeze (cos, two) y4 = RotaryEmbedding <rotary_embedding_dim = 2> (x4, c, sin)"
    found = model(text)
    assert FuseRotary().run(found) == 0
    assert ["not [B, S, R / 2]" in event.reason for event in events(found)] == [True]
