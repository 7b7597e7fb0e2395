"""convert-opset: one spelling of each op, from 11, 13 and 17 upwards."""

import numpy as np
import pytest

from omforge import ir
from omforge.ir import numerics
from omforge.passes.convert_opset import CANONICAL_OPSET, ConvertOpset
from omforge.testing import assert_rewrites, assert_same_numbers


def graph(opset: int, body: str, header: str = "(float[N, S, 8] x) => (float y)") -> str:
    return f'<ir_version: 7, opset_import: ["" : {opset}]>\ng {header} {{ {body} }}'


CANONICAL = '<ir_version: 11, opset_import: ["" : 24]>\n'

ADAPTED = {
    "reductions": (
        17,
        "y = ReduceMean <axes = [-1]> (x)",
        "<int64[1] axes = {-1}> { y = ReduceMean (x, axes) }",
    ),
    "reductions of all": (17, "y = ReduceMax <keepdims = 0> (x)", None),
    "ReduceSum, that came earlier": (
        11,
        "y = ReduceSum <axes = [1, 2], keepdims = 0> (x)",
        "<int64[2] axes = {1, 2}> { y = ReduceSum <keepdims = 0> (x, axes) }",
    ),
    "Unsqueeze": (
        11,
        "y = Unsqueeze <axes = [1]> (x)",
        "<int64[1] axes = {1}> { y = Unsqueeze (x, axes) }",
    ),
    "Squeeze": (
        12,
        "a = Unsqueeze <axes = [1]> (x) y = Squeeze <axes = [1]> (a)",
        "<int64[1] axes = {1}> { a = Unsqueeze (x, axes) y = Squeeze (a, axes) }",
    ),
    "Split by sizes": (
        11,
        "a, b = Split <axis = 2, split = [2, 6]> (x) y = Neg (b)",
        "<int64[2] sizes = {2, 6}> { a, b = Split <axis = 2> (x, sizes) y = Neg (b) }",
    ),
    "Split in equal parts": (
        13,
        "a, b = Split <axis = 2> (x) y = Neg (b)",
        "{ a, b = Split <axis = 2, num_outputs = 2> (x) y = Neg (b) }",
    ),
    "Softmax over the last axis": (
        11,
        "y = Softmax <axis = 2> (x)",
        "{ y = Softmax (x) }",
    ),
    "LogSoftmax, counted from the end": (
        11,
        "y = LogSoftmax <axis = -1> (x)",
        "{ y = LogSoftmax (x) }",
    ),
}


@pytest.mark.parametrize("case", ADAPTED)
def test_rewrites(case: str) -> None:
    opset, before, after = ADAPTED[case]
    header = "g (float[N, S, 8] x) => (float y) "
    expected = after or f"{{ {before} }}"
    assert_rewrites(ConvertOpset(), graph(opset, before), CANONICAL + header + expected)


@pytest.mark.parametrize("opset", [11, 13, 14, 17, 18, 21, 23])
def test_keeps_the_numbers_of_what_only_grew(opset: int) -> None:
    body = """a = MatMul (x, w) b = Add (a, x) c = Transpose <perm = [0, 2, 1]> (b)
        d = Cast <to = 11> (c) e = Cast <to = 1> (d) z = Shape (x) y = Reshape (e, z)"""
    header = "(float[N, S, 8] x, float[8, 8] w) => (float y)"
    model = ir.from_onnx_text(graph(opset, body, header))
    original = model.clone()
    assert ConvertOpset().run(model) == 1  # no node changed, and the model is not as it was
    assert model.opset_imports == {"": CANONICAL_OPSET}
    assert model.ir_version >= 11
    ir.check(model)
    assert_same_numbers(original, model)


def test_leaves_a_canonical_model_alone() -> None:
    model = ir.from_onnx_text(graph(24, "y = Neg (x)"))
    assert ConvertOpset().run(model) == 0


def test_names_constants_apart() -> None:
    """Two reductions, one of whose new axes would take the name of a value."""
    body = """m_axes = Neg (x) m = ReduceMean <axes = [2]> (m_axes)
        n = ReduceMean <axes = [2]> (x) y = Add (m, n)"""
    model = ir.from_onnx_text(graph(17, body))
    original = model.clone()
    assert ConvertOpset().run(model) == 2
    ir.check(model)
    assert_same_numbers(original, model)


def test_scatter_is_scatter_elements() -> None:
    header = "(float[3, 4] x, int64[1, 4] at, float[1, 4] new) => (float[3, 4] y)"
    model = ir.from_onnx_text(graph(10, "y = Scatter <axis = 0> (x, at, new)", header))
    ConvertOpset().run(model)
    ir.check(model)
    feeds = {
        "x": np.zeros((3, 4), np.float32),
        "at": np.array([[0, 2, 1, 0]]),
        "new": np.arange(1, 5, dtype=np.float32)[None],
    }
    expected = [[1, 0, 0, 4], [0, 0, 3, 0], [0, 2, 0, 0]]
    np.testing.assert_array_equal(numerics.run(model, feeds)["y"], expected)


def test_leaves_other_domains_alone() -> None:
    text = """<ir_version: 7, opset_import: ["" : 13, "com.microsoft" : 1]>
    g (float[4] x) => (float[4] y) { a = com.microsoft.Gelu <axes = [1]> (x) y = Neg (a) }"""
    model = ir.from_onnx_text(text)
    ConvertOpset().run(model)
    assert model.opset_imports == {"": 24, "com.microsoft": 1}
    assert list(next(iter(model.graph)).attributes) == ["axes"]


def test_converts_inside_subgraphs() -> None:
    text = """<ir_version: 7, opset_import: ["" : 13]>
    g (float[4] x, bool c) => (float[1] y) {
        y = If (c) <then_branch = t () => (float[1] a) { a = ReduceMean <axes = [0]> (x) },
                    else_branch = e () => (float[1] b) { b = ReduceMax <axes = [0]> (x) }>
    }"""
    model = ir.from_onnx_text(text)
    original = model.clone()
    assert ConvertOpset().run(model) == 2
    ir.check(model)
    assert_same_numbers(original, model)


REFUSED = {
    "a newer opset": (29, "y = Neg (x)", "the model is of opset 29"),
    "what came later than it says": (18, "y = Gelu (x)", "and has Gelu, which came later"),
    "softmax over several axes": (11, "y = Softmax <axis = 1> (x)", "flattens from axis 1"),
    "softmax by its old default": (11, "y = Softmax (x)", "flattens from axis 1"),
    "another meaning": (10, "y = Clip <min = 0.0> (x)", "its meaning changed at opset 11"),
    "a deprecated op": (9, "y = Upsample (x, s)", "the op is deprecated"),
    "an attribute that is gone": (13, "y = Neg <axis = 1> (x)", "attribute axis is gone"),
    "an input that is gone": (13, "y = Neg (x, s)", "it takes at most 1 inputs"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refuses(case: str) -> None:
    opset, body, why = REFUSED[case]
    header = "(float[N, S, 8] x, float[3] s) => (float[N, S, 8] y)"
    model = ir.from_onnx_text(graph(opset, body, header))
    with pytest.raises(ir.InputError, match=why):
        ConvertOpset().run(model)


def test_an_unknown_op_is_left_to_the_verifier() -> None:
    model = ir.from_onnx_text(graph(13, "y = Frobnicate (x)"))
    assert ConvertOpset().run(model) == 1
    assert "Frobnicate" in str(ir.verify(model)[0])
