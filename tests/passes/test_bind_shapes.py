"""bind-shapes: numbers in place of symbols."""

import pytest

from omforge import ir
from omforge.ir.infer import dims
from omforge.passes.bind_shapes import BindShapes
from omforge.testing import parse

MODEL = """<ir_version: 11, opset_import: ["" : 24]>
g (int64[batch, seq] input_ids, int64[rows] logits_index, float[batch, 2, capacity, 4] past)
  => (float[r, c] y)
<float[8, 4] words = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 1},
 int64[1] four = {4}, int64[1] rest = {-1}> {
    x = Gather (words, input_ids)
    s = Shape <start = 1, end = 2> (input_ids)
    t = Concat <axis = 0> (rest, four)
    flat = Reshape (x, t)
    sf = Cast <to = 1> (s)
    picked = Gather (flat, logits_index)
    y = Mul (picked, sf)
}"""


def test_every_value_becomes_static() -> None:
    model = parse(MODEL)
    assert BindShapes(batch=2, seq=3, capacity=16).run(model) == 3
    shapes = {v.name: dims(v) for v in [*model.graph.inputs, *model.graph.outputs]}
    assert shapes == {
        "input_ids": (2, 3),
        "logits_index": (2,),
        "past": (2, 2, 16, 4),
        "y": (2, 4),
    }
    assert all(
        isinstance(dim, int) for node in model.graph for v in node.outputs for dim in dims(v) or ()
    )


def test_shape_arithmetic_is_folded() -> None:
    model = parse(MODEL)
    BindShapes(batch=2, seq=3, capacity=16).run(model)
    assert [node.op_type for node in model.graph] == ["Gather", "Reshape", "Gather", "Mul"]


def test_rows_can_differ_from_the_batch() -> None:
    model = parse(MODEL)
    BindShapes(batch=2, seq=3, capacity=16, rows=6).run(model)
    assert dims(model.graph.outputs[0]) == (6, 4)


def test_a_symbol_without_a_number_is_refused() -> None:
    model = parse(MODEL.replace("2, capacity, 4", "2, length, 4"))
    with pytest.raises(ir.InputError, match="past keeps the dimension 'length'"):
        BindShapes().run(model)
