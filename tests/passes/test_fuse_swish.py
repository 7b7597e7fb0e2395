"""fuse-swish: which gates fuse, and which must not."""

import pytest

from omforge.passes.fuse_swish import FuseSwish
from omforge.testing import assert_leaves_alone, assert_near_misses_are_safe, assert_rewrites

HEADER = """<ir_version: 11, opset_import: ["" : 24]>
g (float[N, 8] x) => (float[N, 8] y) <float alpha = {1.702}, float one = {1.0},
 float over = {0.5875441}>
"""
FUSED = """<ir_version: 11, opset_import: ["" : 24]>
g (float[N, 8] x) => (float[N, 8] y) { y = Swish (x) }"""

SILU = {
    "silu": "{ s = Sigmoid (x) y = Mul (x, s) }",
    "sigmoid first": "{ s = Sigmoid (x) y = Mul (s, x) }",
    "identity": "{ i = Identity (x) s = Sigmoid (i) y = Mul (x, s) }",
    "exp": "{ m = Neg (x) e = Exp (m) d = Add (one, e) y = Div (x, d) }",
}
QUICK_GELU = {
    "sigmoid": "{ a = Mul (alpha, x) s = Sigmoid (a) y = Mul (x, s) }",
    "exp": "{ a = Mul (x, alpha) m = Neg (a) e = Exp (m) d = Add (one, e) y = Div (x, d) }",
    "divided": "{ a = Div (x, over) s = Sigmoid (a) y = Mul (x, s) }",
}


@pytest.mark.parametrize("spelling", SILU)
def test_fuses_silu(spelling: str) -> None:
    assert_rewrites(FuseSwish(), HEADER + SILU[spelling], FUSED)


@pytest.mark.parametrize("spelling", QUICK_GELU)
def test_fuses_quick_gelu(spelling: str) -> None:
    assert_rewrites(
        FuseSwish(),
        HEADER + QUICK_GELU[spelling],
        FUSED.replace("Swish (", "Swish <alpha = 1.702> ("),
    )


def test_fuses_the_gate_inside_a_gated_mlp() -> None:
    before = """<ir_version: 11, opset_import: ["" : 24]>
    g (float[N, 8] gate, float[N, 8] up) => (float[N, 8] y) {
        s = Sigmoid (gate)
        swish = Mul (gate, s)
        y = Mul (swish, up)
    }"""
    after = """<ir_version: 11, opset_import: ["" : 24]>
    g (float[N, 8] gate, float[N, 8] up) => (float[N, 8] y) {
        swish = Swish (gate)
        y = Mul (swish, up)
    }"""
    assert_rewrites(FuseSwish(), before, after)


LEFT_ALONE = {
    "a gate of something else": (
        HEADER.replace("8] x)", "8] x, float[N, 8] up)") + "{ s = Sigmoid (x) y = Mul (up, s) }",
        "",
    ),
    "the sigmoid is used elsewhere": (
        HEADER.replace("8] y)", "8] y, float[N, 8] s)") + SILU["silu"],
        "s is also an output of the graph",
    ),
    "alpha that is an input": (
        HEADER.replace("8] x)", "8] x, float a0)") + QUICK_GELU["sigmoid"].replace("alpha", "a0"),
        "alpha (a0) is not a constant",
    ),
    "alpha per channel": (
        HEADER.replace("float alpha = {1.702}", "float[8] alpha = {1,2,3,4,5,6,7,8}")
        + QUICK_GELU["sigmoid"],
        "alpha (alpha) has shape [8], not one number",
    ),
    "alpha that adds a dimension": (
        HEADER.replace("float alpha", "float[1,1,1] alpha").replace("[N, 8] y", "[1, N, 8] y")
        + QUICK_GELU["sigmoid"],
        "the result would be [N, 8], not [1, N, 8]",
    ),
}


@pytest.mark.parametrize("case", LEFT_ALONE)
def test_leaves_alone(case: str, caplog: pytest.LogCaptureFixture) -> None:
    text, reason = LEFT_ALONE[case]
    assert_leaves_alone(FuseSwish(), text, reason, caplog)


@pytest.mark.parametrize("body", [SILU["silu"], SILU["exp"], *QUICK_GELU.values()])
def test_near_misses_are_safe(body: str) -> None:
    assert assert_near_misses_are_safe(FuseSwish(), HEADER + body)
