"""Elementwise ops, reductions, layers and control flow: inferred, and what ONNX Runtime returns."""

import pytest

from omforge import ir
from omforge.ir.infer_rules import RULES
from tests.ir.symbolic import (
    BINDINGS,
    assert_onnxruntime_agrees,
    elements,
    inferred,
    shape,
    value,
)

X = "float[n, s, 8] x"
AB = "float[n, s] ab, float[s, p] bc"
DIMS = "a = Shape <end = 1> (x) b = Shape <start = 1, end = 2> (x)"  # [n] and [s]
ATTENTION = "q_num_heads = 4, kv_num_heads = 2"

# (inputs, body, constants, shape of y, elements of y)
CASES = {
    # broadcasting
    "unary": (X, "y = Sigmoid (x)", "", "n, s, 8", None),
    "add": (f"{X}, float[s, 1] z", "y = Add (x, z)", "", "n, s, 8", None),
    "add, both ways": ("float[n, 1] x, float[1, s] z", "y = Add (x, z)", "", "n, s", None),
    "add, rank 0": (X, "y = Add (one, x)", "float one = {1}", "n, s, 8", None),
    "add, empty": ("float[n, 0] x, float[1, 1] z", "y = Add (x, z)", "", "n, 0", None),
    "pow": (X, "y = Pow (x, two)", "int64 two = {2}", "n, s, 8", None),
    "where": (f"{X}, bool[s, 1] c", "y = Where (c, x, zero)", "float zero = {0}", "n, s, 8", None),
    # arithmetic on sizes
    "sum": (X, f"{DIMS} y = Add (a, b)", "", "1", "n + s"),
    "difference": (X, f"{DIMS} y = Sub (a, b)", "", "1", "n - s"),
    "product": (X, f"{DIMS} y = Mul (a, b)", "", "1", "n*s"),
    "negation": (X, f"{DIMS} y = Neg (a)", "", "1", "-n"),
    "several": (X, f"{DIMS} y = Max (a, b, a, z)", "int64[1] z = {0}", "1", "max(max(n, s), n)"),
    "maximum": (X, f"{DIMS} c = Add (a, b) y = Max (a, c)", "", "1", "n + s"),
    "minimum": (X, f"{DIMS} y = Min (a, z)", "int64[1] z = {4}", "1", "min(4, n)"),
    "several numbers": (X, "y = Sum (z, z, z)", "float[1] z = {4}", "1", None),
    "quotient": (
        X,
        f"{DIMS} m = Mul (a, four) y = Div (m, two)",
        "int64[1] two = {2}, int64[1] four = {4}",
        "1",
        "2*n",
    ),
    "quotient, not exact": (
        X,
        f"{DIMS} y = Div (b, two)",
        "int64[1] two = {2}",
        "1",
        "floordiv(s, 2)",
    ),
    "quotient, of numbers": (
        X,
        "y = Div (m, k)",
        "int64[4] m = {-7, 7, -7, 7}, int64[4] k = {2, 2, -2, -2}",
        "4",
        "-3, 3, 3, -3",
    ),
    "quotient, of a large number": (
        X,
        "y = Div (m, k)",
        "int64[1] m = {9223372036854775807}, int64[1] k = {1}",
        "1",
        "9223372036854775807",
    ),
    "quotient, of a negative size": (
        X,
        f"{DIMS} m = Neg (b) y = Div (m, two)",
        "int64[1] two = {2}",
        "1",
        "-floordiv(s, 2)",
    ),
    "quotient, by a negative number": (
        X,
        f"{DIMS} y = Div (b, k)",
        "int64[1] k = {-2}",
        "1",
        "-floordiv(s, 2)",
    ),
    "quotient, of unknown sign": (
        X,
        f"{DIMS} c = Sub (a, b) y = Div (c, two)",
        "int64[1] two = {2}",
        "1",
        None,
    ),
    "remainder": (
        X,
        "y = Mod (m, k)",
        "int64[4] m = {-7, 7, -7, 7}, int64[4] k = {3, 3, -3, -3}",
        "4",
        "2, 1, -1, -2",
    ),
    "remainder, as in C": (
        X,
        "y = Mod <fmod = 1> (m, k)",
        "int64[4] m = {-7, 7, -7, 7}, int64[4] k = {3, 3, -3, -3}",
        "4",
        "-1, 1, -1, 1",
    ),
    "remainder, of a size": (X, f"{DIMS} y = Mod (b, k)", "int64[1] k = {4}", "1", "mod(s, 4)"),
    "remainder, of a size as in C": (
        X,
        f"{DIMS} y = Mod <fmod = 1> (b, k)",
        "int64[1] k = {4}",
        "1",
        "mod(s, 4)",
    ),
    "quotient, by a divisor of unknown sign": (
        X,
        f"{DIMS} c = Sub (a, b) d = Add (c, k) y = Div (k, d)",
        "int64[1] k = {100}",
        "1",
        None,
    ),
    # comparisons
    "equal, known": (
        X,
        "d = Shape (x) y = Equal (d, m)",
        "int64[1] m = {-1}",
        "3",
        "False, False, False",
    ),
    "equal, unknown": (X, f"{DIMS} y = Equal (a, b)", "", "1", None),
    "less, known": (X, f"{DIMS} y = Less (b, z)", "int64[1] z = {0}", "1", "False"),
    "less, unknown": (X, f"{DIMS} y = Less (b, z)", "int64[1] z = {1}", "1", None),
    "greater": (X, f"{DIMS} c = Add (b, o) y = Greater (c, b)", "int64[1] o = {1}", "1", "True"),
    "greater or equal": (X, f"{DIMS} y = GreaterOrEqual (b, z)", "int64[1] z = {0}", "1", "True"),
    "less or equal": (X, f"{DIMS} c = Add (a, b) y = LessOrEqual (c, b)", "", "1", None),
    "and, or, xor, not": (
        X,
        "a = Or (t, f) b = And (t, f) c = Not (b) d = And (a, c) y = Xor (d, f)",
        "bool[1] t = {1}, bool[1] f = {0}",
        "1",
        "True",
    ),
    "where, on sizes": (
        X,
        "d = Shape (x) c = Equal (m, e) y = Where (c, d, m)",
        "int64[3] m = {-1, 4, -1}, int64[1] e = {-1}",
        "3",
        "n, 4, 8",
    ),
    "where, unknown": (X, f"{DIMS} c = Equal (a, b) y = Where (c, a, b)", "", "1", None),
    "is_nan": (X, "y = IsNaN (x)", "", "n, s, 8", None),
    # dtypes
    "cast": (X, "d = Shape (x) y = Cast <to = 6> (d)", "", "3", "n, s, 8"),
    "cast, to float": (X, "d = Shape (x) y = Cast <to = 1> (d)", "", "3", None),
    "cast, to bool": (
        X,
        "y = Cast <to = 9> (m)",
        "int64[3] m = {-1, 0, 2}",
        "3",
        "True, False, True",
    ),
    "cast, to bool, unknown": (X, "d = Shape (x) y = Cast <to = 9> (d)", "", "3", None),
    "cast, from bool": (X, "y = Cast <to = 7> (m)", "bool[2] m = {1, 0}", "2", "1, 0"),
    "cast, wrapping": (X, "y = Cast <to = 2> (m)", "int64[1] m = {300}", "1", None),
    "cast, of a size to 8 bits": (X, "d = Shape (x) y = Cast <to = 2> (d)", "", "3", None),
    "cast_like, to bool": (
        X,
        "y = CastLike (m, t)",
        "int64[2] m = {0, 2}, bool t = {1}",
        "2",
        "False, True",
    ),
    "cast_like, from bool": (X, "y = CastLike (t, m)", "int64 m = {0}, bool t = {1}", "", "1"),
    "identity": (X, "d = Shape (x) y = Identity (d)", "", "3", "n, s, 8"),
    "dropout": (X, "a, y = Dropout (x)", "", "n, s, 8", None),
    "quantize": (X, "y = QuantizeLinear (x, k)", "float k = {0.5}", "n, s, 8", None),
    "quantize, zero point": (
        X,
        "y = QuantizeLinear (x, k, z)",
        "float k = {0.5}, int8 z = {0}",
        "n, s, 8",
        None,
    ),
    "quantize, dtype": (
        X,
        "y = QuantizeLinear <output_dtype = 3> (x, k)",
        "float k = {0.5}",
        "n, s, 8",
        None,
    ),
    "dequantize": (
        "uint8[n, s] x",
        "y = DequantizeLinear (x, k)",
        "float k = {0.5}",
        "n, s",
        None,
    ),
    # shapes that stay
    "cum_sum": (X, "y = CumSum (x, k)", "int64 k = {1}", "n, s, 8", None),
    "trilu": (X, "y = Trilu <upper = 0> (x)", "", "n, s, 8", None),
    "softmax": (X, "y = Softmax <axis = 1> (x)", "", "n, s, 8", None),
    "clip": (X, "y = Clip (x, , o)", "float o = {1}", "n, s, 8", None),
    # reductions
    "reduce": (X, "y = ReduceMean (x, i)", "int64[1] i = {-1}", "n, s, 1", None),
    "reduce, dropped": (
        X,
        "y = ReduceMax <keepdims = 0> (x, i)",
        "int64[2] i = {0, -1}",
        "s",
        None,
    ),
    "reduce, all": (X, "y = ReduceSum <keepdims = 0> (x)", "", "", None),
    "reduce, all kept": (X, "y = ReduceSum (x)", "", "1, 1, 1", None),
    "reduce, no axes": (X, "y = ReduceSum (x, i)", "int64[0] i = {}", "1, 1, 1", None),
    "reduce, no-op": (
        X,
        "y = ReduceSum <noop_with_empty_axes = 1> (x, i)",
        "int64[0] i = {}",
        "n, s, 8",
        None,
    ),
    "reduce, computed axes": (
        f"{X}, bool[3] c",
        "i = NonZero (c) z = Squeeze (i, o) y = ReduceSum (x, z)",
        "int64[1] o = {0}",
        "unknown_y_0, unknown_y_1, unknown_y_2",
        None,
    ),
    "reduce, sizes": (X, "d = Shape (x) y = ReduceProd <keepdims = 0> (d)", "", "", "8*n*s"),
    "reduce, sum of sizes": (X, "d = Shape (x) y = ReduceSum (d)", "", "1", "n + s + 8"),
    "arg_max": (X, "y = ArgMax <axis = -1> (x)", "", "n, s, 1", None),
    "arg_min": (X, "y = ArgMin <axis = 1, keepdims = 0> (x)", "", "n, 8", None),
    # layers
    "matmul": (AB, "y = MatMul (ab, bc)", "", "n, p", None),
    "matmul, batched": (f"{X}, float[8, p] z", "y = MatMul (x, z)", "", "n, s, p", None),
    "matmul, broadcast": (
        "float[n, 1, s, 8] x, float[4, 8, p] z",
        "y = MatMul (x, z)",
        "",
        "n, 4, s, p",
        None,
    ),
    "matmul, row": ("float[8] x, float[n, 8, s] z", "y = MatMul (x, z)", "", "n, s", None),
    "matmul, column": ("float[n, s, 8] x, float[8] z", "y = MatMul (x, z)", "", "n, s", None),
    "matmul, dot": ("float[s] x, float[s] z", "y = MatMul (x, z)", "", "", None),
    "gemm": (
        "float[8, n] a, float[p, 8] b",
        "y = Gemm <transA = 1, transB = 1> (a, b)",
        "",
        "n, p",
        None,
    ),
    "layer_norm": (
        X,
        "y = LayerNormalization (x, g)",
        "float[8] g = {1, 1, 1, 1, 1, 1, 1, 1}",
        "n, s, 8",
        None,
    ),
    "layer_norm, mean": (
        X,
        "a, b, y = LayerNormalization (x, g)",
        "float[8] g = {1, 1, 1, 1, 1, 1, 1, 1}",
        "n, s, 1",
        None,
    ),
    "rms_norm": (
        X,
        "y = RMSNormalization (x, g)",
        "float[8] g = {1, 1, 1, 1, 1, 1, 1, 1}",
        "n, s, 8",
        None,
    ),
    "rotary": (
        "float[n, s, 16] x, float[n, s, 4] c",
        "y = RotaryEmbedding <num_heads = 2> (x, c, c)",
        "",
        "n, s, 16",
        None,
    ),
    "attention, 4-D": (
        "float[n, 4, s, 8] q, float[n, 2, p, 8] k, float[n, 2, p, 6] v",
        "y, a, b, c = Attention <qk_matmul_output_mode = 0> (q, k, v)",
        "",
        "n, 4, s, 6",
        None,
    ),
    "attention, 4-D with past": (
        """float[n, 4, s, 8] q, float[n, 2, s, 8] k, float[n, 2, s, 8] v,
           float[n, 2, p, 8] pk, float[n, 2, p, 8] pv""",
        "z, y, b = Attention (q, k, v, , pk, pv)",
        "",
        "n, 2, p + s, 8",
        None,
    ),
    "attention, 3-D": (
        "float[n, s, 32] q, float[n, p, 16] k, float[n, p, 12] v",
        f"y, a, b = Attention <{ATTENTION}> (q, k, v)",
        "",
        "n, s, 24",
        None,
    ),
    "attention, 3-D with past": (
        """float[n, s, 32] q, float[n, s, 16] k, float[n, s, 12] v,
           float[n, 2, p, 8] pk, float[n, 2, p, 6] pv""",
        f"z, a, y = Attention <{ATTENTION}> (q, k, v, , pk, pv)",
        "",
        "n, 2, p + s, 6",
        None,
    ),
    # control flow
    "if": (
        f"{X}, bool c",
        """y = If (c) <
            then_branch = t () => (float[] u) { u = Neg (x) },
            else_branch = e () => (float[] w) { w = Mul (x, x) }>""",
        "",
        "n, s, 8",
        None,
    ),
    "if, of two lengths": (
        f"{X}, float[p, s, 8] z, bool c",
        """y = If (c) <
            then_branch = t () => (float[] u) { u = Neg (x) },
            else_branch = e () => (float[] w) { w = Neg (z) }>""",
        "",
        "unknown_y_0, s, 8",
        None,
    ),
    "if, decided": (
        f"{X}, float[p] z",
        """r = Shape <end = 1> (x)  a = Greater (r, m)  c = Squeeze (a)  y = If (c) <
            then_branch = t () => (float[] u) { u = Neg (x) },
            else_branch = e () => (float[] w) { w = Neg (z) }>""",
        "int64[1] m = {-1}",
        "n, s, 8",
        None,
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_rule(case):
    inputs, body, constants, wanted, known = CASES[case]
    model = inferred(inputs, body, constants)
    assert shape(model) == wanted
    assert elements(model) == known


@pytest.mark.parametrize("case", CASES)
def test_onnxruntime_agrees(case):
    inputs, body, constants, *_ = CASES[case]
    model = inferred(inputs, body, constants)
    for bindings in BINDINGS:
        assert assert_onnxruntime_agrees(model, bindings)


def test_every_op_of_the_table_is_one_of_onnx_or_onnxruntime():
    import onnx

    assert RULES.keys() - {schema.name for schema in onnx.defs.get_all_schemas()} == {
        "SimplifiedLayerNormalization"
    }


# -- what ONNX Runtime does not run


@pytest.mark.parametrize(
    ("body", "opset", "wanted"),
    [
        ("y = ReduceSum <axes = [-1], keepdims = 0> (x)", 11, "n, s"),
        ("y = ReduceMean <axes = [1]> (x)", 17, "n, 1, 8"),
        ("y = ReduceMean (x)", 17, "1, 1, 1"),
    ],
)
def test_axes_of_older_opsets(body, opset, wanted):
    assert shape(inferred(X, body, opset=opset)) == wanted


def test_norms_take_their_dtypes_from_where_onnx_says():
    model = inferred(
        "float16[n, 8] x, float[8] g, float16[8] h",
        "y = RMSNormalization (x, g) a, m = LayerNormalization (x, h)",
    )
    assert value(model, "y").dtype == ir.DataType.FLOAT  # the scale's
    assert value(model, "a").dtype == ir.DataType.FLOAT16
    assert value(model, "m").dtype == ir.DataType.FLOAT  # the stash type's


def test_random_numbers_may_have_a_dtype_of_their_own():
    model = inferred(X, "y = RandomNormalLike <dtype = 11> (x) z = RandomUniformLike (x)")
    assert (value(model, "y").dtype, shape(model, "y")) == (ir.DataType.DOUBLE, "n, s, 8")
    assert value(model, "z").dtype == ir.DataType.FLOAT


def test_division_by_zero_has_no_value():
    zero = "int64[1] z = {0}"
    for body in ("y = Div (a, z)", "y = Mod (a, z)", "y = Mod <fmod = 1> (a, z)"):
        model = inferred(X, f"{DIMS} {body}", zero)
        assert (shape(model), elements(model)) == ("1", None)


def test_a_sum_that_overflows_has_no_value():
    model = inferred(X, "y = Add (m, m)", "int64[1] m = {9223372036854775807}")
    assert (shape(model), elements(model)) == ("1", None)


def test_a_broadcast_that_is_too_large_to_track_has_no_value():
    model = inferred(
        X,
        "r = Range (z, k, o) c = Unsqueeze (r, i) y = Mul (r, c)",
        "int64 z = {0}, int64 k = {200}, int64 o = {1}, int64[1] i = {1}",
    )
    assert (shape(model), elements(model)) == ("200, 200", None)
    assert elements(model, "r") is not None


def test_operands_of_unknown_rank():
    for body in ("y = Add (x, x)", "y = MatMul (x, x)", "y = ReduceSum (x)", "y = ArgMax (x)"):
        assert shape(inferred("float[] x", body)) is None
    assert shape(inferred("float[] x", "y = Gemm (x, x)")) == "unknown_y_0, unknown_y_1"
    assert shape(inferred("float[n, 2, s, 8] q, float[] k", "y = Attention (q, k, k)")) == (
        "unknown_y_0, unknown_y_1, unknown_y_2, unknown_y_3"
    )


LOOP = """
    y, z = Loop (trips, , x) <
        body = step (int64 i, bool c, float[] old) => (bool d, float[] new, float[] sum) {
            d = Identity (c)
            new = Concat <axis = 0> (old, old)
            sum = Constant <value = float {1}> ()
        }>"""


def test_a_loop_may_change_shapes_from_round_to_round():
    model = inferred("float[n, s] x, int64 trips", LOOP)
    assert shape(model) is None
    assert (value(model).dtype, value(model, "z").dtype) == (ir.DataType.FLOAT,) * 2
    body = next(iter(model.graph)).attributes["body"].as_graph()
    assert list(body.outputs[2].shape) == []  # inside the body too


def test_branches_are_inferred_with_the_models_opset():
    """A subgraph imports no opset of its own; ReduceSum took its axes as an attribute before 13."""
    model = inferred(
        f"{X}, bool c",
        """y = If (c) <
            then_branch = t () => (float[] u) { u = ReduceSum <axes = [0]> (x) },
            else_branch = e () => (float[] w) { w = Trilu (x) }>""",
        opset=12,
    )
    assert shape(model) == "unknown_y_0, s, 8"
