"""fold-shapes: targets of reshapes and expansions become constants."""

import pytest

from omforge import ir
from omforge.passes.fold_shapes import FoldShapes
from omforge.testing import assert_leaves_alone, assert_rewrites, parse

HEADER = """<ir_version: 11, opset_import: ["" : 24]>
g (float[B, S, 8] x%s) => (float[%s] y)
<int64[1] four = {4}, int64[1] two = {2}, int64[1] eight = {8}, int64[1] one = {1},
 int64[1] rest = {-1}>
"""


def test_a_computed_target_becomes_copies_and_numbers() -> None:
    before = (
        HEADER % ("", "B, S, 4, 2")
        + """{
        b = Shape <start = 0, end = 1> (x) s = Shape <start = 1, end = 2> (x)
        t = Concat <axis = 0> (b, s, four, rest) y = Reshape (x, t) }"""
    )
    after = """<ir_version: 11, opset_import: ["" : 24]>
    g (float[B, S, 8] x) => (float[B, S, 4, 2] y) <int64[4] t = {0, 0, 4, 2}> { y = Reshape (x, t) }"""
    assert_rewrites(FoldShapes(), before, after)


def test_a_chain_of_reshapes_becomes_its_last() -> None:
    before = (
        HEADER % ("", "B, S, 4, 2")
        + """{
        f = Flatten <axis = 2> (x)
        b = Shape <start = 0, end = 1> (x) s = Shape <start = 1, end = 2> (x)
        t = Concat <axis = 0> (b, s, four, two) y = Reshape (f, t) }"""
    )
    after = """<ir_version: 11, opset_import: ["" : 24]>
    g (float[B, S, 8] x) => (float[B, S, 4, 2] y) <int64[4] t = {0, 0, 4, 2}> { y = Reshape (x, t) }"""
    assert_rewrites(FoldShapes(), before, after)


def test_an_expansion_keeps_its_dimensions_by_ones() -> None:
    before = (
        HEADER % ("", "B, S, 8")
        + """{
        s = Shape (x) y = Expand (x, s) }"""
    )
    after = """<ir_version: 11, opset_import: ["" : 24]>
    g (float[B, S, 8] x) => (float[B, S, 8] y) <int64[3] t = {1, 1, 1}> { y = Expand (x, t) }"""
    assert_rewrites(FoldShapes(), before, after)


def test_a_target_with_two_unknowns_is_read_off_the_tokens() -> None:
    model = parse("""<ir_version: 11, opset_import: ["" : 24]>
    g (int64[batch, seq] input_ids, int64[batch, total] attention_mask, float[n, 8] x)
        => (float[batch, seq, 8] y) <int64[1] eight = {8}> {
        b = Shape <start = 0, end = 1> (attention_mask)
        s = Shape <start = 1, end = 2> (input_ids)
        t = Concat <axis = 0> (b, s, eight)
        y = Reshape (x, t) }""")
    assert FoldShapes().run(model) == 1
    mask = next(v for v in model.graph.inputs if v.name == "attention_mask")
    assert not mask.uses(), "the shape must not hold on to the padding mask"
    assert FoldShapes().run(model) == 0


@pytest.mark.parametrize("dims", ["0, 8", "N, 0"])
def test_zero_sizes_are_left_alone(dims: str, caplog: pytest.LogCaptureFixture) -> None:
    text = f"""<ir_version: 11, opset_import: ["" : 24]>
    g (float[{dims}] x) => (float[M] y) <int64[1] t = {{-1}}> {{ y = Reshape (x, t) }}"""
    assert_leaves_alone(FoldShapes(), text, "", caplog)


def test_a_target_that_depends_on_data_is_left_alone(caplog: pytest.LogCaptureFixture) -> None:
    text = HEADER % (", int64[2] t", "M, K") + "{ y = Reshape (x, t) }"
    assert_leaves_alone(FoldShapes(), text, "", caplog)
    assert isinstance(parse(text), ir.Model)


def test_a_size_that_the_tokens_have_is_read_off_them() -> None:
    text = """<ir_version: 11, opset_import: ["" : 24]>
    g (int64[batch, seq] input_ids, float[batch, 2, past, 4] past_key) => (float[batch, n, 4] y)
    <float[1, 3, 4] table = {1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12}, int64[1] one = {1}> {
        rows = Shape <start = 0, end = 1> (%s) times = Concat <axis = 0> (rows, one, one)
        y = Tile (table, times) }"""
    # The cache leaves the interface later; its length stays where it is.
    assert_rewrites(FoldShapes(), text % "past_key", text % "input_ids")
    length = text.replace("start = 0, end = 1", "start = 2, end = 3") % "past_key"
    assert FoldShapes().run(parse(length)) == 0
