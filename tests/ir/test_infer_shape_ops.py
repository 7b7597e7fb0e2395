"""Ops that make shapes and move data: what is inferred, and that ONNX Runtime returns just that."""

import pytest

from tests.ir.symbolic import BINDINGS, assert_onnxruntime_agrees, elements, inferred, shape

X = "float[n, s, 8] x"

# (inputs, body, constants, shape of y, elements of y)
CASES = {
    "shape": (X, "y = Shape (x)", "", "3", "n, s, 8"),
    "shape, part": (X, "y = Shape <start = 1, end = -1> (x)", "", "1", "s"),
    "shape, part beyond the rank": (X, "y = Shape <start = -9, end = 9> (x)", "", "3", "n, s, 8"),
    "shape, empty part": (X, "y = Shape <start = 2, end = 1> (x)", "", "0", ""),
    "size": (X, "y = Size (x)", "", "", "8*n*s"),
    "constant": (X, "y = Constant <value = int64[2] {3, 4}> ()", "", "2", "3, 4"),
    "constant_int": (X, "y = Constant <value_int = 3> ()", "", "", "3"),
    "constant_ints": (X, "y = Constant <value_ints = [3]> ()", "", "1", "3"),
    "constant_float": (X, "y = Constant <value_float = 3.0> ()", "", "", None),
    "constant_of_shape": (
        X,
        "d = Shape (x) y = ConstantOfShape <value = int64[1] {7}> (d)",
        "",
        "n, s, 8",
        None,
    ),
    "constant_of_shape, tracked": (
        X,
        "y = ConstantOfShape <value = int64[1] {7}> (d)",
        "int64[1] d = {2}",
        "2",
        "7, 7",
    ),
    "constant_of_shape, scalar": (X, "y = ConstantOfShape (d)", "int64[0] d = {}", "", None),
    "constant_of_shape, empty": (
        X,
        "y = ConstantOfShape <value = int64[1] {7}> (d)",
        "int64[2] d = {0, 4}",
        "0, 4",
        "",
    ),
    # range
    "range": (
        X,
        "y = Range (a, b, c)",
        "int64 a = {1}, int64 b = {8}, int64 c = {3}",
        "3",
        "1, 4, 7",
    ),
    "range, downwards": (
        X,
        "y = Range (a, b, c)",
        "int64 a = {5}, int64 b = {0}, int64 c = {-2}",
        "3",
        "5, 3, 1",
    ),
    "range, the other way": (
        X,
        "y = Range (a, b, c)",
        "int64 a = {5}, int64 b = {0}, int64 c = {1}",
        "0",
        "",
    ),
    "range, float": (
        X,
        "y = Range (a, b, c)",
        "float a = {0}, float b = {1}, float c = {0.3}",
        "4",
        None,
    ),
    "range, symbolic": (
        "float[p, 8] c, float[s, 8] x",
        """a = Shape <end = 1> (c)  past = Squeeze (a, zero)  b = Shape <end = 1> (x)
           seq = Squeeze (b, zero)  total = Add (past, seq)  y = Range (past, total, one)""",
        "int64[1] zero = {0}, int64 one = {1}",
        "s",
        None,
    ),
    "range, symbolic steps": (
        X,
        "a = Shape <start = 1, end = 2> (x) e = Squeeze (a, z) y = Range (o, e, t)",
        "int64[1] z = {0}, int64 o = {0}, int64 t = {2}",
        "floordiv(s + 1, 2)",
        None,
    ),
    "range, symbolic downwards": (
        X,
        "a = Shape <start = 1, end = 2> (x) e = Squeeze (a, z) y = Range (e, o, t)",
        "int64[1] z = {0}, int64 o = {0}, int64 t = {-1}",
        "s",
        None,
    ),
    "range, maybe the other way": (
        "float[n, p] x",
        """a = Shape <end = 1> (x) b = Shape <start = 1> (x) i = Squeeze (a, z)
           j = Squeeze (b, z) y = Range (i, j, o)""",
        "int64[1] z = {0}, int64 o = {1}",
        "max(-n + p, 0)",
        None,
    ),
    # unsqueeze, squeeze, flatten, transpose
    "unsqueeze": (X, "y = Unsqueeze (x, a)", "int64[2] a = {0, -1}", "1, n, s, 8, 1", None),
    "squeeze": ("float[1, n, 1, s] x", "y = Squeeze (x, a)", "int64[1] a = {-2}", "1, n, s", None),
    "squeeze, all": ("float[1, 4, 1] x", "y = Squeeze (x)", "", "4", None),
    "squeeze, tracked": (X, "d = Shape <end = 1> (x) y = Squeeze (d)", "", "", "n"),
    "flatten": (X, "y = Flatten (x)", "", "n, 8*s", None),
    "flatten, 0": (X, "y = Flatten <axis = 0> (x)", "", "1, 8*n*s", None),
    "flatten, all": (X, "y = Flatten <axis = 3> (x)", "", "8*n*s, 1", None),
    "flatten, from the end": (X, "y = Flatten <axis = -1> (x)", "", "n*s, 8", None),
    "transpose": (X, "y = Transpose (x)", "", "8, s, n", None),
    "transpose, perm": (X, "y = Transpose <perm = [1, 0, 2]> (x)", "", "s, n, 8", None),
    # reshape
    "reshape": (X, "y = Reshape (x, d)", "int64[4] d = {0, 0, 2, 4}", "n, s, 2, 4", None),
    "reshape, rest": (X, "y = Reshape (x, d)", "int64[2] d = {-1, 4}", "2*n*s, 4", None),
    "reshape, copy and rest": (X, "y = Reshape (x, d)", "int64[2] d = {0, -1}", "n, 8*s", None),
    "reshape, to a scalar": (
        "float[1, 1] x",
        "y = Reshape (x, d)",
        "int64[0] d = {}",
        "",
        None,
    ),
    "reshape, zero": (
        "float[0, 4] x",
        "y = Reshape <allowzero = 1> (x, d)",
        "int64[2] d = {3, 0}",
        "3, 0",
        None,
    ),
    "reshape, computed": (
        X,
        """b = Shape <end = 1> (x)  t = Shape <start = 1, end = 2> (x)  m = Mul (b, t)
           d = Concat <axis = 0> (m, rest)  f = Reshape (x, d)
           e = Concat <axis = 0> (b, rest, two)  y = Reshape (f, e)""",
        "int64[1] rest = {-1}, int64[1] two = {2}",
        "n, 4*s, 2",
        None,
    ),
    "reshape, sum over sum": (
        "float[p, 8] a, float[s, 8] b",
        """c = Concat <axis = 0> (a, b)  t = Shape <end = 1> (c)
           d = Concat <axis = 0> (rest, t)  y = Reshape (c, d)""",
        "int64[1] rest = {-1}",
        "8, p + s",
        None,
    ),
    "reshape, tracked": (
        X,
        "d = Shape <start = 1> (x) y = Reshape (d, t)",
        "int64[2] t = {2, 1}",
        "2, 1",
        "s, 8",
    ),
    # slice
    "slice": (
        X,
        "y = Slice (x, a, b, i)",
        "int64[1] a = {2}, int64[1] b = {6}, int64[1] i = {-1}",
        "n, s, 4",
        None,
    ),
    "slice, beyond the end": (
        X,
        "y = Slice (x, a, b, i)",
        "int64[1] a = {-100}, int64[1] b = {9223372036854775807}, int64[1] i = {2}",
        "n, s, 8",
        None,
    ),
    "slice, steps": (
        X,
        "y = Slice (x, a, b, i, k)",
        "int64[1] a = {1}, int64[1] b = {8}, int64[1] i = {2}, int64[1] k = {3}",
        "n, s, 3",
        None,
    ),
    "slice, reversed": (
        X,
        "y = Slice (x, a, b, i, k)",
        """int64[2] a = {-1, 6}, int64[2] b = {-9223372036854775807, 1}, int64[2] i = {1, 2},
           int64[2] k = {-1, -2}""",
        "n, s, 3",
        None,
    ),
    "slice, reversed from before the start": (
        X,
        "y = Slice (x, a, b, i, k)",
        "int64[1] a = {-100}, int64[1] b = {-100}, int64[1] i = {2}, int64[1] k = {-1}",
        "n, s, 1",
        None,
    ),
    "slice, every other of a symbol": (
        X,
        "y = Slice (x, a, b, i, k)",
        "int64[1] a = {0}, int64[1] b = {2147483647}, int64[1] i = {1}, int64[1] k = {2}",
        "n, floordiv(s + 1, 2), 8",
        None,
    ),
    "slice, empty": (
        X,
        "y = Slice (x, a, b, i)",
        "int64[1] a = {5}, int64[1] b = {5}, int64[1] i = {2}",
        "n, s, 0",
        None,
    ),
    "slice, the last": (
        X,
        "y = Slice (x, a, b, i)",
        "int64[1] a = {-1}, int64[1] b = {9223372036854775807}, int64[1] i = {1}",
        "n, 1, 8",
        None,
    ),
    "slice, the first": (
        X,
        "y = Slice (x, a, b, i)",
        "int64[1] a = {0}, int64[1] b = {1}, int64[1] i = {1}",
        "n, 1, 8",
        None,
    ),
    "slice, at most the last few": (
        X,
        "y = Slice (x, a, b, i)",
        "int64[1] a = {-4}, int64[1] b = {9223372036854775807}, int64[1] i = {1}",
        "n, min(4, s), 8",
        None,
    ),
    "slice, at most the first few": (
        X,
        "y = Slice (x, a, b, i)",
        "int64[1] a = {0}, int64[1] b = {4}, int64[1] i = {1}",
        "n, min(4, s), 8",
        None,
    ),
    "slice, all but the last": (
        X,
        "y = Slice (x, a, b, i)",
        "int64[1] a = {0}, int64[1] b = {-1}, int64[1] i = {1}",
        "n, max(0, s - 1), 8",
        None,
    ),
    "slice, a table": (
        X,
        "e = Shape <start = 1, end = 2> (x) y = Slice (t, z, e)",
        "int64[1] z = {0}, float[4] t = {1, 2, 3, 4}",
        "min(4, s)",
        None,
    ),
    "slice, the new tokens": (
        "float[p, 8] c, float[s, 8] x",
        """a = Shape <end = 1> (c)  m = Concat <axis = 0> (c, x)  e = Shape <end = 1> (m)
           y = Slice (m, a, e, z)""",
        "int64[1] z = {0}",
        "s, 8",
        None,
    ),
    "slice, counted from the end by a symbol": (
        "float[p, 8] c, float[s, 8] x",
        """m = Concat <axis = 0> (c, x)  b = Shape <end = 1> (x)  a = Neg (b)
           e = Shape <end = 1> (m)  y = Slice (m, a, e, z)""",
        "int64[1] z = {0}",
        "s, 8",
        None,
    ),
    "slice, up to the last but one, computed": (
        X,
        "a = Shape <start = 1, end = 2> (x) e = Sub (a, o) y = Slice (x, z, e, o)",
        "int64[1] z = {0}, int64[1] o = {1}",
        "n, max(0, s - 1), 8",
        None,
    ),
    "slice, of unknown sign": (
        "float[n, p] x",
        """a = Shape <end = 1> (x)  b = Shape <start = 1> (x)  k = Sub (b, a)
           y = Slice (x, k, b, o)""",
        "int64[1] o = {1}",
        "n, unknown_y_1",
        None,
    ),
    "slice, unknown start": (
        f"{X}, int64[1] k",
        "y = Slice (x, k, e, o)",
        "int64[1] e = {3}, int64[1] o = {1}",
        "n, unknown_y_1, 8",
        None,
    ),
    "slice, tracked": (
        X,
        "d = Shape (x) y = Slice (d, a, e, z, k)",
        "int64[1] a = {-1}, int64[1] e = {-100}, int64[1] z = {0}, int64[1] k = {-2}",
        "2",
        "8, n",
    ),
    # expand, tile, concat, split, pad
    "expand": (
        "float[n, 1, 1] x, float[p, s] t",
        "d = Shape (t) y = Expand (x, d)",
        "",
        "n, p, s",
        None,
    ),
    "expand, ones keep": (X, "y = Expand (x, d)", "int64[4] d = {3, 1, 1, 1}", "3, n, s, 8", None),
    "expand, tracked": (
        X,
        "b = Shape <end = 1> (x) y = Expand (b, d)",
        "int64[1] d = {3}",
        "3",
        "n, n, n",
    ),
    "tile": (X, "y = Tile (x, r)", "int64[3] r = {1, 2, 3}", "n, 2*s, 24", None),
    "tile, tracked": (
        X,
        "b = Shape <end = 2> (x) y = Tile (b, r)",
        "int64[1] r = {2}",
        "4",
        "n, s, n, s",
    ),
    "concat": (
        "float[n, p, 4] c, float[n, s, 4] x",
        "y = Concat <axis = -2> (c, x)",
        "",
        "n, p + s, 4",
        None,
    ),
    "concat, tracked": (
        X,
        "a = Shape <end = 1> (x) y = Concat <axis = 0> (a, m, a)",
        "int64[2] m = {-1, 4}",
        "4",
        "n, -1, 4, n",
    ),
    "split, sizes": (
        X,
        "y, z = Split <axis = -1> (x, k)",
        "int64[2] k = {5, 3}",
        "n, s, 5",
        None,
    ),
    "split, last smaller": (
        "float[7] x",
        "a, b, y = Split <num_outputs = 3> (x)",
        "",
        "1",
        None,
    ),
    "split, equal parts of a symbol": (
        "float[n, s] x",
        "t = Concat <axis = 0> (x, x) a, y = Split <num_outputs = 2> (t)",
        "",
        "n, s",
        None,
    ),
    "split, tracked": (
        X,
        "d = Shape (x) a, y = Split (d, k)",
        "int64[2] k = {1, 2}",
        "2",
        "s, 8",
    ),
    "split, empty part": (X, "d = Shape (x) a, y = Split (d, k)", "int64[2] k = {3, 0}", "0", ""),
    "pad": (X, "y = Pad (x, k)", "int64[6] k = {0, 1, -2, 0, 2, 1}", "n, s + 3, 7", None),
    "pad, axes": (
        X,
        "y = Pad (x, k, , i)",
        "int64[2] k = {1, 2}, int64[1] i = {-1}",
        "n, s, 11",
        None,
    ),
    # gather
    "gather": (
        "float[9, 4] t, int64[n, s] i",
        "y = Gather (t, i)",
        "",
        "n, s, 4",
        None,
    ),
    "gather, from the end": (
        "float[n, s, 8] x, int64[p] i",
        "y = Gather <axis = -1> (x, i)",
        "",
        "n, s, p",
        None,
    ),
    "gather, scalar index": (X, "d = Shape (x) y = Gather (d, i)", "int64 i = {-2}", "", "s"),
    "gather, tracked": (
        X,
        "d = Shape (x) y = Gather (d, i)",
        "int64[1, 2] i = {2, 0}",
        "1, 2",
        "8, n",
    ),
    "gather_nd": ("float[9, 4] x, int64[n, 1] i", "y = GatherND (x, i)", "", "n, 4", None),
    "gather_nd, batched": (
        "float[n, 9, 4] x, int64[n, 1] i",
        "y = GatherND <batch_dims = 1> (x, i)",
        "",
        "n, 4",
        None,
    ),
    "gather_elements": (
        "float[n, 9] x, int64[n, s] i",
        "y = GatherElements <axis = 1> (x, i)",
        "",
        "n, s",
        None,
    ),
    "top_k": (X, "v, y = TopK (x, k)", "int64[1] k = {3}", "n, s, 3", None),
    "top_k, axis": (
        X,
        "y, i = TopK <axis = 1> (x, k)",
        "int64[1] k = {1}",
        "n, 1, 8",
        None,
    ),
    "top_k, unknown": (
        f"{X}, int64[1] k",
        "y, i = TopK (x, k)",
        "",
        "n, s, unknown_y_2",
        None,
    ),
    "non_zero": (X, "y = NonZero (x)", "", "3, unknown_y_1", None),
}


@pytest.mark.parametrize("case", CASES)
def test_rule(case):
    inputs, body, constants, wanted, value = CASES[case]
    model = inferred(inputs, body, constants)
    assert shape(model) == wanted
    assert elements(model) == value


@pytest.mark.parametrize("case", CASES)
def test_onnxruntime_agrees(case):
    inputs, body, constants, *_ = CASES[case]
    model = inferred(inputs, body, constants)
    for bindings in BINDINGS:
        assert assert_onnxruntime_agrees(model, bindings)


OLDER = {
    "unsqueeze": (12, X, "y = Unsqueeze <axes = [0, 2]> (x)", "1, n, 1, s, 8"),
    "squeeze": (12, "float[n, 1] x", "y = Squeeze <axes = [1]> (x)", "n"),
    "slice": (
        9,
        X,
        "y = Slice <starts = [1, 0], ends = [7, 2], axes = [2, 0]> (x)",
        "min(2, n), s, 6",
    ),
    "slice, axes by default": (9, X, "y = Slice <starts = [0, 0, 1], ends = [9, 9, 4]> (x)", None),
    "split": (12, X, "y, z = Split <axis = 2, split = [5, 3]> (x)", "n, s, 5"),
    "split, equal": (12, X, "y, z = Split <axis = 2> (x)", "n, s, 4"),
    "pad": (10, X, "y = Pad <pads = [0, 0, 1, 0, 0, 2]> (x)", "n, s, 11"),
    "top_k": (9, X, "y, i = TopK <k = 2> (x)", "n, s, 2"),
}


@pytest.mark.parametrize("case", OLDER)
def test_attributes_of_older_opsets(case):
    opset, inputs, body, wanted = OLDER[case]
    model = inferred(inputs, body, opset=opset)
    assert shape(model) == (wanted or "min(9, n), min(9, s), 3")


def test_split_in_equal_parts_gives_the_last_what_is_left():
    model = inferred(X, "y, z = Split <axis = 1, num_outputs = 2> (x)")
    assert shape(model, "y") == "n, floordiv(s + 1, 2), 8"
    sizes = {"n": 2, "s": 7}
    assert assert_onnxruntime_agrees(model, sizes)


# -- what is not known


@pytest.mark.parametrize(
    ("inputs", "body", "wanted"),
    [
        (f"{X}, int64[2] d", "y = Reshape (x, d)", "unknown_y_0, unknown_y_1"),
        (
            "float[] x",
            "d = Constant <value_ints = [0, -1, 4]> () y = Reshape (x, d)",
            "unknown_y_0, unknown_y_1, 4",
        ),
        (f"{X}, int64[n] d", "y = Reshape (x, d)", None),
        (f"{X}, int64[4] d", "y = Expand (x, d)", ", ".join(f"unknown_y_{i}" for i in range(4))),
        (f"{X}, int64[3] r", "y = Tile (x, r)", "unknown_y_0, unknown_y_1, unknown_y_2"),
        ("int64[2] d", "y = ConstantOfShape (d)", "unknown_y_0, unknown_y_1"),
        ("int64 a, int64 b, int64 c", "y = Range (a, b, c)", "unknown_y_0"),
        (f"{X}, int64 a", "d = Constant <value_int = 2> () y = Range (a, d, d)", "unknown_y_0"),
        (
            "float[s, p, n] x, int64[1] z",
            """a = Shape <end = 1> (x) b = Shape <start = 1, end = 2> (x) i = Squeeze (a)
               j = Squeeze (b) k = Sub (i, j) y = Range (i, j, k)""",
            "unknown_y_0",
        ),
        ("float[] x", "y = Flatten (x)", "unknown_y_0, unknown_y_1"),
        ("float[] x", "y = Squeeze (x)", None),
        ("float[] x", "d = Constant <value_ints = [0]> () y = Slice (x, d, d)", None),
        ("float[] x", "y, z = Split <num_outputs = 2> (x)", None),
        ("float[] x, int64[2] k", "y = Pad (x, k)", None),
        ("float[] x, int64[n] i", "y = Gather (x, i)", None),
        ("float[] x, int64[n, s] i", "y = GatherND (x, i)", None),
        ("float[] x", "y = Shape (x)", "unknown_y_0"),
        ("float[] x", "y = Transpose <perm = [1, 0]> (x)", "unknown_y_0, unknown_y_1"),
        ("float[] x, float[n, s] z", "y = Concat <axis = 1> (z, x)", "n, unknown_y_1"),
        (f"{X}, int64[2] k", "y, z = Split <axis = 2> (x, k)", "n, s, unknown_y_2"),
        (
            f"{X}, int64[1] i",
            "d = Constant <value_ints = [0]> () y = Slice (x, d, d, i)",
            "unknown_y_0, unknown_y_1, unknown_y_2",
        ),
        (f"{X}, int64[6] k", "y = Pad (x, k)", "unknown_y_0, unknown_y_1, unknown_y_2"),
        # A symbol may be 1, so how many axes go is not known.
        ("float[n, 1] x", "y = Squeeze (x)", None),
        (f"{X}, int64[1] a", "y = Unsqueeze (x, a)", None),
    ],
)
def test_as_much_is_inferred_as_can_be(inputs, body, wanted):
    assert shape(inferred(inputs, body)) == wanted


def test_an_axis_is_not_taken_to_be_as_long_as_its_slice():
    """`x[:, -4:]` of 3 tokens has 3, and a sliding window's cache is cut in just this way."""
    last = "int64[1] a = {-4}, int64[1] b = {9223372036854775807}, int64[1] i = {1}"
    model = inferred(X, "y = Slice (x, a, b, i)", last)
    assert shape(model) == "n, min(4, s), 8"
