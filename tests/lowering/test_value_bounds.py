"""Bounds of integers: what Mod and OneHot need to know."""

import pytest

from omforge.ir.infer import infer_model
from omforge.lowering.value_bounds import UNKNOWN, bounds, one_hot_may_wrap, sign_of_mod_differs
from tests.lowering.test_legality import parse


@pytest.mark.parametrize(
    ("body", "found"),
    [
        ("y = Identity (n)", UNKNOWN),
        ("y = Abs (n)", (0, None)),
        ("y = Cast <to = 7> (u)", (0, None)),
        ("y = Clip (n, low, high)", (2, 9)),
        ("y = Min (n, high)", (None, 9)),
        ("a = Abs (n) y = Add (a, low)", (2, None)),
        ("a = Clip (n, low, high) y = Sub (a, high)", (-7, 0)),
        ("a = Clip (n, low, high) y = Mul (a, a)", (4, 81)),
        ("a = Clip (n, low, high) y = Div (a, low)", (0, 4)),
        ("y = Mod (n, high)", (0, 8)),
        ("y = Mod <fmod = 1> (n, high)", (None, 8)),
        ("y = ArgMax <axis = 1> (x)", (0, 7)),
        ("v, y = TopK (x, k)", (0, 7)),
        ("v, i = TopK (x, k) y = Concat <axis = 0> (i, i)", (0, 7)),
        ("y = Range (low, high, low)", (2, 8)),
        ("s = Shape (x) y = Neg (s)", (-8, -2)),
    ],
)
def test_bounds(body: str, found: object) -> None:
    model = parse(f"""
        g (float[2,8] x, int64[3] n, uint8[3] u) => (int64[a] y)
        <int64 low = {{2}}, int64 high = {{9}}, int64[1] k = {{2}}> {{ {body} }}
    """)
    infer_model(model)
    assert bounds(model.graph.outputs[0]) == found


def test_a_value_of_topk_is_no_index() -> None:
    model = parse("""
        g (int64[2,8] x) => (int64[2,2] y) <int64[1] k = {2}> { y, i = TopK (x, k) }
    """)
    infer_model(model)
    assert bounds(model.graph.outputs[0]) == UNKNOWN


@pytest.mark.parametrize(
    ("operands", "differs"),
    [("n, high", True), ("a, high", False), ("a, n", True), ("high, low", False)],
)
def test_the_sign_of_mod(operands: str, differs: bool) -> None:
    model = parse(f"""
        g (int64[3] n) => (int64[3] y) <int64 low = {{2}}, int64 high = {{9}}>
        {{ a = Abs (n) y = Mod ({operands}) }}
    """)
    infer_model(model)
    assert [sign_of_mod_differs(node) for node in model.graph] == [False, differs]


def test_an_index_of_one_hot() -> None:
    for depth, wraps in ((7, True), (8, False)):
        model = parse(f"""
            g (float[2,8] x) => (float[2,8] y) <int64 d = {{{depth}}}, float[2] v = {{0.0, 1.0}}>
            {{ i = ArgMax <axis = 1, keepdims = 0> (x) y = OneHot (i, d, v) }}
        """)
        infer_model(model)
        assert one_hot_may_wrap(model.graph[1]) is wraps
