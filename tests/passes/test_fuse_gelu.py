"""fuse-gelu: which spellings fuse, and which must not."""

import pytest

from omforge.passes.fuse_gelu import FuseGelu
from omforge.testing import assert_leaves_alone, assert_near_misses_are_safe, assert_rewrites

HEADER = """<ir_version: 11, opset_import: ["" : 24]>
g (float[N, 8] x) => (float[N, 8] y)
<float half = {0.5}, float one = {1.0}, float root2 = {1.41421354}, float root_half = {0.707106769},
 float three = {3.0}, float two = {2.0}, float over_c = {22.3638592}, float over_k = {1.25331414},
 float c = {0.044715}, float k = {0.797884583}>
"""
FUSED = """<ir_version: 11, opset_import: ["" : 24]>
g (float[N, 8] x) => (float[N, 8] y) { y = Gelu <approximate = "%s"> (x) }"""

EXACT = {
    "x/sqrt2 first": """{
        a = Div (x, root2) b = Erf (a) p = Add (b, one) m = Mul (x, p) y = Mul (m, half) }""",
    "half x first": """{
        h = Mul (x, half) a = Mul (x, root_half) b = Erf (a) p = Add (one, b) y = Mul (h, p) }""",
    "divided by the inverses": """{
        a = Div (x, root2) b = Erf (a) p = Add (b, one) m = Mul (x, p) y = Div (m, two) }""",
    "half of the curve": """{
        a = Div (x, root2) b = Erf (a) p = Add (b, one) h = Mul (half, p) y = Mul (h, x) }""",
}
TANH = {
    "Pow": """{
        x3 = Pow (x, three) t = Mul (c, x3) s = Add (x, t) i = Mul (k, s) e = Tanh (i)
        p = Add (e, one) h = Mul (x, half) y = Mul (h, p) }""",
    "x*x*x": """{
        x2 = Mul (x, x) x3 = Mul (x2, x) t = Mul (x3, c) s = Add (t, x) i = Mul (s, k) e = Tanh (i)
        p = Add (one, e) h = Mul (half, x) y = Mul (h, p) }""",
    "x taken out of the sum": """{
        kx = Mul (x, k) cx = Mul (c, x) t = Mul (cx, x) s = Add (t, one) i = Mul (kx, s)
        e = Tanh (i) p = Add (one, e) h = Mul (half, x) y = Mul (h, p) }""",
    "divided by the inverses": """{
        x3 = Pow (x, three) t = Div (x3, over_c) s = Add (x, t) i = Div (s, over_k) e = Tanh (i)
        p = Add (e, one) h = Mul (x, p) y = Div (h, two) }""",
}


@pytest.mark.parametrize("spelling", EXACT)
def test_fuses_the_exact_form(spelling: str) -> None:
    assert_rewrites(FuseGelu(), HEADER + EXACT[spelling], FUSED % "none")


@pytest.mark.parametrize("spelling", TANH)
def test_fuses_the_tanh_form(spelling: str) -> None:
    assert_rewrites(FuseGelu(), HEADER + TANH[spelling], FUSED % "tanh")


def test_leaves_a_curve_of_something_else_alone(caplog: pytest.LogCaptureFixture) -> None:
    other = HEADER.replace("8] x)", "8] x, float[N, 8] z)") + EXACT["x/sqrt2 first"].replace(
        "m = Mul (x, p)", "m = Mul (z, p)"
    )
    assert_leaves_alone(FuseGelu(), other, "", caplog)


@pytest.mark.parametrize("body", [EXACT["x/sqrt2 first"], TANH["Pow"]])
def test_near_misses_are_safe(body: str) -> None:
    assert assert_near_misses_are_safe(FuseGelu(), HEADER + body)
