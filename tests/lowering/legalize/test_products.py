"""Products of a step: what the cubes compute, matrix by matrix."""

from typing import Any

from omforge import ir
from omforge.lowering.legalize.products import Products, products


def counted(model: ir.Model, **gear: int) -> Products:
    return products(model.graph, gear)


def test_each_product_and_its_sum_are_two(text_to_model: Any) -> None:
    model = text_to_model("""
        g (float16[2,4,8] x, float16[8,16] w) => (float16[2,4,16] y) { y = MatMul (x, w) }
    """)
    assert counted(model) == Products(floats=2 * (2 * 4) * 8 * 16)


def test_at_each_gear_by_its_length(text_to_model: Any) -> None:
    model = text_to_model("""
        g (float16[1,seq,8] x, float16[8,16] w) => (float16[1,seq,16] y) { y = MatMul (x, w) }
    """)
    assert counted(model, seq=6).floats == 6 * counted(model, seq=1).floats == 6 * 2 * 8 * 16


def test_element_wise_operators_are_none(text_to_model: Any) -> None:
    model = text_to_model("g (float16[4,8] x) => (float16[4,8] y) { a = Mul (x, x) y = Neg (a) }")
    assert counted(model) == Products()


def test_what_depends_on_constants_alone_is_computed_by_atc(text_to_model: Any) -> None:
    model = text_to_model("""
        g (float16[1,2] x) => (float16[1,2] y)
        <float16[2,1] a = {1,1}, float16[1,2] b = {1,1}>
        { w = MatMul (a, b)  y = MatMul (x, w) }
    """)
    assert counted(model).floats == 2 * 1 * 2 * 2


def test_int8_by_int8_is_counted_apart(text_to_model: Any) -> None:
    model = text_to_model("""
        g (int8[4,8] x, int8[8,16] w) => (int32[4,16] y) { y = MatMulInteger (x, w) }
    """)
    for node in model.graph:
        node.op_type = "MatMul"
    assert counted(model) == Products(int8=2 * 4 * 8 * 16)
