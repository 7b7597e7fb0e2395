"""fold-constants: what depends on nothing but constants is one, and nothing else."""

import numpy as np
import pytest

from omforge import ir
from omforge.ir.values import constant
from omforge.passes.fold_constants import FoldConstants
from omforge.rewriting.events import events
from omforge.testing import assert_leaves_alone, assert_rewrites, parse

OPEN = '<ir_version: 11, opset_import: ["" : 24]>\n'
HEADER = OPEN + "g (float[N, 8] x) => (float y)\n"

FOLDED = {
    "a chain": (
        "<float two = {2.0}> { a = Mul (two, two) b = Sqrt (a) y = Mul (x, b) }",
        "<float two = {2.0}> { y = Mul (x, two) }",
    ),
    "Constant nodes": (
        "{ a = Constant <value_float = 3.0> () b = Neg (a) y = Mul (x, b) }",
        "<float b = {-3.0}> { y = Mul (x, b) }",
    ),
    "a size that is a number": (
        """<int64 at = {1}> { s = Shape (x) d = Gather (s, at) f = Cast <to = 1> (d)
            r = Sqrt (f) y = Div (x, r) }""",
        "<float r = {2.828427125}> { y = Div (x, r) }",
    ),
    "part of an output's operands": (
        "<float two = {2.0}> { a = Add (two, two) y = Mul (a, x) }",
        "<float four = {4.0}> { y = Mul (four, x) }",
    ),
    "several outputs of a node": (
        "<float[4] f = {1, 2, 3, 4}> { a, b = Split <num_outputs = 2> (f) c = ReduceSum (b)"
        " d = ReduceSum (a) e = Mul (x, c) y = Mul (e, d) }",
        "<float[1] c = {7}, float[1] d = {3}> { e = Mul (x, c) y = Mul (e, d) }",
    ),
}


@pytest.mark.parametrize("case", FOLDED)
def test_folds(case: str) -> None:
    before, after = FOLDED[case]
    assert_rewrites(FoldConstants(), HEADER + before, HEADER + after)


ALONE = {
    "random numbers": "<float[8] f = {0, 0, 0, 0, 0, 0, 0, 0}>"
    " { r = RandomNormalLike (f) y = Add (x, r) }",
    "dropout in training": "<float[1] f = {1}, float half = {0.5}, bool yes = {1}>"
    " { r = Dropout (f, half, yes) y = Mul (x, r) }",
    "a quantised weight": "<int8[8] q = {0, 1, 2, 3, 4, 5, 6, 7}, float s = {0.1}>"
    " { w = DequantizeLinear (q, s) y = Mul (x, w) }",
    "a symbolic size": "{ s = Shape <end = 1> (x) f = Cast <to = 1> (s) y = Mul (x, f) }",
    "an output": "<float two = {2.0}> { y = Neg (two) }",
    "what depends on an input": "<float two = {2.0}> { a = Mul (x, two) y = Neg (a) }",
}


@pytest.mark.parametrize("case", ALONE)
def test_leaves_alone(case: str, caplog: pytest.LogCaptureFixture) -> None:
    assert_leaves_alone(FoldConstants(), HEADER + ALONE[case], "", caplog)
    assert not caplog.text  # nothing was tried and refused


def test_an_initializer_that_callers_may_override_is_no_constant() -> None:
    text = (
        OPEN + "g (float[N, 8] x, float two = {2.0}) => (float y) { a = Neg (two) y = Mul (x, a) }"
    )
    model = ir.from_onnx_text(text.replace(" = {2.0}", ""))
    value = model.graph.inputs[1]
    value.const_value = ir.tensor(np.float32(2), name="two")
    model.graph.register_initializer(value)
    assert FoldConstants().run(model) == 0


@pytest.mark.parametrize(("limit", "left"), [(7, ["Neg", "Mul"]), (8, ["Mul"])])
def test_larger_tensors_stay_computed(limit: int, left: list[str]) -> None:
    """A weight that is moved at run time is not stored twice."""
    text = HEADER + "<float[8] f = {1, 2, 3, 4, 5, 6, 7, 8}> { a = Neg (f) y = Mul (x, a) }"
    model = ir.from_onnx_text(text)
    FoldConstants(limit=limit).run(model)
    assert [node.op_type for node in model.graph] == left


def test_a_large_result_of_small_operands_stays_computed() -> None:
    text = HEADER + """<int64[2] shape = {1000, 1000}> {
        a = ConstantOfShape (shape) b = ReduceMax (a) y = Mul (x, b) }"""  # fmt: skip
    model = ir.from_onnx_text(text)
    assert FoldConstants().run(model) == 0
    assert [node.op_type for node in model.graph] == ["ConstantOfShape", "ReduceMax", "Mul"]


def test_one_node_that_fails_does_not_stop_the_others() -> None:
    text = (
        HEADER
        + """<float two = {2.0}, float[3] three = {1, 2, 3}, int64[1] four = {4}> {
        a = Neg (two) b = Reshape (three, four) c = ReduceMax (b) d = Mul (x, a) y = Mul (d, c) }"""
    )
    model = ir.from_onnx_text(text)
    assert FoldConstants().run(model) == 1
    assert [node.op_type for node in model.graph] == ["Reshape", "ReduceMax", "Mul", "Mul"]
    (event,) = events(model)
    assert "ONNX Runtime refuses the cut-out" in event.reason


@pytest.mark.parametrize(("big", "to", "wrapped"), [(300, 2, 300 - 256), (2**33 + 5, 6, 5)])
def test_numbers_that_wrap_around_are_left_to_the_model(big: int, to: int, wrapped: int) -> None:
    """Inference counts without end; a Cast to eight or 32 bits does not."""
    text = (
        OPEN
        + f"""g (float[N, 8] x) => (float y) <int64 big = {{{big}}}> {{
        small = Cast <to = {to}> (big) f = Cast <to = 1> (small) y = Mul (x, f) }}"""
    )
    model = parse(text)
    FoldConstants().run(model)
    (node,) = model.graph
    array = constant(node.inputs[1])
    assert array is not None
    assert float(array) == wrapped


def test_graph_outputs_stay_the_values_of_nodes() -> None:
    """ATC wants an output to be computed; and an initializer's name would become the output's."""
    text = OPEN + """g (float[N, 8] x) => (float y, float z) <float two = {2.0}> {
        z = Neg (two) y = Mul (x, z) }"""  # fmt: skip
    model = ir.from_onnx_text(text)
    assert FoldConstants().run(model) == 0
    assert [value.name for value in model.graph.outputs] == ["y", "z"]
