"""Standard operators in GE's: the GE graph computes what the ONNX node does."""

import numpy as np
import pytest

from omforge import ir
from omforge.ir.infer import infer_model
from omforge.ir.numerics import run, tolerance, within
from omforge.lowering.air_legality import check_air
from omforge.lowering.emit import emit
from omforge.lowering.emit.standard import STANDARD
from omforge.lowering.target import target
from omforge.testing import parse
from tests.lowering.emit.twins import computed, emitted, random

X = "float16[2, 3, 4] x"
CASES = {
    "Abs": (X, "Abs (x)"),
    "Add": (f"{X}, float16[4] y", "Add (x, y)"),
    "And": ("bool[2, 3] x, bool[2, 3] y", "And (x, y)"),
    "ArgMax": (X, "ArgMax <axis = 1> (x)"),
    "ArgMax flat": (X, "ArgMax <axis = -1, keepdims = 0> (x)"),
    "Cast": (X, "Cast <to = 1> (x)"),
    "Ceil": (X, "Ceil (x)"),
    "Clip": (X, "Clip (x, low, high)"),
    "Clip below": (X, 'Clip (x, low, "")'),
    "Concat": (f"{X}, float16[2, 3, 2] y", "Concat <axis = -1> (x, y, x)"),
    "Cos": (X, "Cos (x)"),
    "CumSum": (X, "CumSum <reverse = 1> (x, one)"),
    "Div": (f"{X}, float16[2, 1, 4] y", "Div (x, y)"),
    "Einsum": (f"{X}, float16[2, 4] y", 'Einsum <equation = "bst,bt->bs"> (x, y)'),
    "Equal": ("int64[2, 3] x, int64[3] y", "Equal (x, y)"),
    "Erf": (X, "Erf (x)"),
    "Exp": (X, "Exp (x)"),
    "Expand": ("float16[2, 1, 4] x", "Expand (x, sizes)"),
    "Flatten": (X, "Flatten <axis = 1> (x)"),
    "Floor": (X, "Floor (x)"),
    "Gather": (f"{X}, int64[5] i", "Gather <axis = -2> (x, i)"),
    "GatherElements": ("float16[2, 3, 4] x, int64[2, 3, 2] i", "GatherElements <axis = 2> (x, i)"),
    "GatherND": ("float16[3, 3, 4] x, int64[2, 2] i", "GatherND (x, i)"),
    "Gemm": ("float16[2, 4] x, float16[3, 4] y, float16[3] z", "Gemm <transB = 1> (x, y, z)"),
    "Gemm added": ("float16[2, 4] x, float16[4, 3] y, float16[2, 3] z", "Gemm (x, y, z)"),
    "Gemm bare": ("float16[4, 2] x, float16[4, 3] y", "Gemm <transA = 1> (x, y)"),
    "Greater": (f"{X}, float16[4] y", "Greater (x, y)"),
    "GreaterOrEqual": (f"{X}, float16[4] y", "GreaterOrEqual (x, y)"),
    "Identity": (X, "Identity (x)"),
    "Less": (f"{X}, float16[4] y", "Less (x, y)"),
    "LessOrEqual": (f"{X}, float16[4] y", "LessOrEqual (x, y)"),
    "Log": ("float[2, 3] p", "Log (p)"),
    "MatMul": (f"{X}, float16[4, 5] y", "MatMul (x, y)"),
    "Max": (f"{X}, float16[4] y, float16[3, 1] z", "Max (x, y, z)"),
    "Max alone": (X, "Max (x)"),
    "Min": (f"{X}, float16[4] y", "Min (x, y)"),
    "Mod": ("int32[2, 3] x, int32[3] q", "Mod <fmod = 1> (x, q)"),
    "Mul": (f"{X}, float16[2, 3, 1] y", "Mul (x, y)"),
    "Neg": (X, "Neg (x)"),
    "Not": ("bool[2, 3] x", "Not (x)"),
    "OneHot": ("int64[2, 3] i", "OneHot (i, depth, values)"),
    "Or": ("bool[2, 3] x, bool[2, 3] y", "Or (x, y)"),
    "Pad": (X, 'Pad <mode = "constant"> (x, pads, low)'),
    "Pow": ("float[2, 3] p, float[3] y", "Pow (p, y)"),
    "Range": ("float16[2] unused", "Range (zero, depth, one)"),
    "Reciprocal": ("float[2, 3] p", "Reciprocal (p)"),
    "ReduceMax": (X, "ReduceMax <axes = [1]> (x)"),
    "ReduceMean": (X, "ReduceMean <axes = [-1], keepdims = 0> (x)"),
    "ReduceMin": (X, "ReduceMin (x)"),
    "ReduceProd": (X, "ReduceProd <axes = [0, 2]> (x)"),
    "ReduceSum": (X, "ReduceSum (x, ones)"),
    "Relu": (X, "Relu (x)"),
    "Reshape": (X, "Reshape (x, shape)"),
    "Round": ("float[2, 3] x", "Round (x)"),
    "ScatterElements": (
        "float[2, 3] x, int64[2, 2] i, float[2, 2] y",
        'ScatterElements <axis = 1, reduction = "add"> (x, i, y)',
    ),
    "ScatterND": ("float16[3, 4] x, int64[1, 1] i, float16[1, 4] y", "ScatterND (x, i, y)"),
    "Shape": (X, "Shape (x)"),
    "Sigmoid": (X, "Sigmoid (x)"),
    "Sign": (X, "Sign (x)"),
    "Sin": (X, "Sin (x)"),
    "Slice": (X, "Slice (x, starts, ends, axes, steps)"),
    "Slice plain": (X, "Slice (x, starts, ends)"),
    "Softmax": (X, "Softmax <axis = 1> (x)"),
    "Softplus": (X, "Softplus (x)"),
    "Split": ("float16[2, 3, 4] x", "Split <axis = -1> (x, parts)"),
    "Sqrt": ("float[2, 3] p", "Sqrt (p)"),
    "Squeeze": ("float16[2, 1, 4] x", "Squeeze (x, ones)"),
    "Squeeze all": ("float16[1, 1, 4] x", "Squeeze (x)"),
    "Sub": (f"{X}, float16[4] y", "Sub (x, y)"),
    "Sum": (f"{X}, float16[4] y, float16[1] z", "Sum (x, y, z)"),
    "Tanh": (X, "Tanh (x)"),
    "Tile": ("float16[2, 3] x", "Tile (x, parts)"),
    "TopK": (X, "TopK <axis = 1> (x, count)"),
    "Transpose": (X, "Transpose <perm = [2, 0, 1]> (x)"),
    "Transpose whole": (X, "Transpose (x)"),
    "Trilu": (X, "Trilu <upper = 0> (x, one)"),
    "Trilu above": (X, "Trilu (x)"),
    "Unsqueeze": (X, "Unsqueeze (x, axes2)"),
    "Where": (f"bool[2, 3, 4] c, {X}, float16[4] y", "Where (c, x, y)"),
}
# float16 by its bits: -0.5, 0.75; and 0 and 1.
CONSTANTS = """
    float16 low = {47104}, float16 high = {14848}, int64 one = {1}, int64 zero = {0},
    int64[3] sizes = {2, 3, 4}, int64 depth = {4}, float16[2] values = {0, 15360},
    int64[6] pads = {0, 1, 0, 1, 0, 2}, int64[1] ones = {1}, int64[2] shape = {6, -1},
    int64[2] starts = {1, 0}, int64[2] ends = {9, -1}, int64[2] axes = {1, 2},
    int64[2] steps = {1, 2}, int64[2] parts = {1, 3}, int64[1] count = {2},
    int64[2] axes2 = {0, -1}
"""
TWO = {"Split": "u, v", "TopK": "u, v"}


def _model(inputs: str, node: str) -> ir.Model:
    results = TWO.get(node.split()[0], "u")
    text = f"""<ir_version: 8, opset_import: ["" : 16]>
        g ({inputs}) => ({results}) <{CONSTANTS}> {{ {results} = {node} }}"""
    model = parse(text)
    infer_model(model)
    for number, made in enumerate(model.graph):
        made.name = f"node{number}"
    return model


@pytest.mark.parametrize("case", CASES)
def test_the_same_numbers(case: str) -> None:
    inputs, node = CASES[case]
    model = _model(inputs, node)
    feeds = {}
    for seed, value in enumerate(model.graph.inputs):
        name = value.name or ""
        dtype = (value.dtype or ir.DataType.FLOAT).numpy().name
        array = random(seed, tuple(value.shape.numpy()), dtype)
        feeds[name] = np.abs(array) + 1 if name in ("p", "q") else array
    expected = run(model, feeds)
    air, names = emitted(model)
    found = computed(air, feeds, names)
    for name, array in expected.items():
        assert found[name].dtype == array.dtype
        assert within(found[name], array, tolerance(array.dtype.name)), name
    errors = [
        item for item in check_air(air, target("Ascend910B4"), path=None) if item.level == "error"
    ]  # type: ignore[arg-type]
    assert errors == []


def test_every_operator_of_the_table_is_here() -> None:
    assert {case.split()[0] for case in CASES} == set(STANDARD)


@pytest.mark.parametrize(
    ("inputs", "node", "reason"),
    [
        (X, "Slice (x, starts, ends, axes, back)", "backwards"),
        ("float16[4] x, float16[4] y", "MatMul (x, y)", "vector"),
        ("float16[2, 4] x, float16[4, 3] y", "Gemm <alpha = 2.0> (x, y)", "alpha"),
        (X, "Selu (x)", "no GE operator"),
    ],
)
def test_what_cannot_be_said_is_named(inputs: str, node: str, reason: str) -> None:
    text = f"""<ir_version: 8, opset_import: ["" : 16]>
        g ({inputs}) => (u) <{CONSTANTS}, int64[2] back = {{-1, 1}}> {{ u = {node} }}"""
    model = parse(text)
    infer_model(model)
    with pytest.raises(ir.CheckError, match="cannot say") as error:
        emit(model, "graph", lambda _: None)
    assert reason in str(error.value)
