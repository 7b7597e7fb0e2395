"""fuse-layer-norm: which spellings fuse, and which must not."""

import numpy as np
import pytest

from omforge import ir
from omforge.ir import numerics
from omforge.passes.fuse_layer_norm import FuseLayerNorm
from omforge.testing import (
    assert_leaves_alone,
    assert_near_misses_are_safe,
    assert_rewrites,
    parse,
)

STRICT = numerics.Tolerance(rtol=1e-5, atol=1e-6)

HEADER = """<ir_version: 11, opset_import: ["" : 24]>
g (float[N, 8] x, float[8] w, float[8] b) => (float[N, 8] y)
<float eps = {0.00001}, float two = {2.0}, float one = {1.0}, float m_half = {-0.5},
 int64[1] axes = {-1}>
"""
FUSED = """<ir_version: 11, opset_import: ["" : 24]>
g (float[N, 8] x, float[8] w, float[8] b) => (float[N, 8] y) {
    y = LayerNormalization <epsilon = 0.00001> (x, w, b) }"""

START = "m = ReduceMean (x, axes) d = Sub (x, m)"
SPELLINGS = {
    "Pow, Div": f"""{{ {START} s = Pow (d, two) v = ReduceMean (s, axes) e = Add (v, eps)
        r = Sqrt (e) n = Div (d, r) g0 = Mul (n, w) y = Add (g0, b) }}""",
    "Mul, Reciprocal": f"""{{ {START} s = Mul (d, d) v = ReduceMean (s, axes) e = Add (eps, v)
        r = Sqrt (e) i = Reciprocal (r) n = Mul (d, i) g0 = Mul (w, n) y = Add (b, g0) }}""",
    "rsqrt as Pow": f"""{{ {START} s = Pow (d, two) v = ReduceMean (s, axes) e = Add (v, eps)
        i = Pow (e, m_half) n = Mul (d, i) g0 = Mul (n, w) y = Add (g0, b) }}""",
    "another difference is squared": """{
        m = ReduceMean (x, axes) d = Sub (x, m) d2 = Sub (x, m) s = Pow (d2, two)
        v = ReduceMean (s, axes) e = Add (v, eps) r = Sqrt (e) n = Div (d, r) g0 = Mul (n, w)
        y = Add (g0, b) }""",
}


@pytest.mark.parametrize("spelling", [name for name in SPELLINGS if "another" not in name])
def test_fuses_every_spelling(spelling: str) -> None:
    assert_rewrites(FuseLayerNorm(), HEADER + SPELLINGS[spelling], FUSED)


def test_fuses_without_a_bias() -> None:
    body = SPELLINGS["Pow, Div"].replace("g0 = Mul (n, w) y = Add (g0, b)", "y = Mul (n, w)")
    assert_rewrites(FuseLayerNorm(), HEADER + body, FUSED.replace("(x, w, b) }", "(x, w) }"))


ONES = "float[8] ones = {1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0}"


def test_a_norm_without_gamma_gets_ones() -> None:
    body = SPELLINGS["Pow, Div"].replace("n = Div", "y = Div").split("g0 =")[0] + "}"
    after = FUSED.replace("(x, w, b) }", "(x, ones) }").replace("y) {", f"y) <{ONES}> {{")
    header = HEADER.replace("8] x, float[8] w, float[8] b", "8] x")
    after = after.replace("8] x, float[8] w, float[8] b", "8] x")
    assert_rewrites(FuseLayerNorm(), header + body, after)


@pytest.mark.parametrize("gamma", ["[4, 8]", "[1, 4, 8]"])
def test_the_product_with_a_gamma_for_each_head_stays_behind(gamma: str) -> None:
    header = HEADER.replace("[N, 8]", "[N, 4, 8]").replace("float[8] w", f"float{gamma} w")
    after = f"""<ir_version: 11, opset_import: ["" : 24]>
    g (float[N, 4, 8] x, float{gamma} w, float[8] b) => (float[N, 4, 8] y) <{ONES}> {{
        n = LayerNormalization <epsilon = 0.00001> (x, ones) g0 = Mul (n, w) y = Add (g0, b) }}"""
    assert_rewrites(FuseLayerNorm(), header + SPELLINGS["Pow, Div"], after)


def test_a_bias_for_each_head_stays_behind_a_gamma_that_does_not() -> None:
    header = HEADER.replace("[N, 8]", "[N, 4, 8]").replace("float[8] b", "float[4, 8] b")
    after = """<ir_version: 11, opset_import: ["" : 24]>
    g (float[N, 4, 8] x, float[8] w, float[4, 8] b) => (float[N, 4, 8] y) {
        g0 = LayerNormalization <epsilon = 0.00001> (x, w) y = Add (g0, b) }"""
    assert_rewrites(FuseLayerNorm(), header + SPELLINGS["Pow, Div"], after)


LEFT_ALONE = {
    "another mean is taken off": ("Sub (x, m)", "Sub (x, m2)", "m2 = ReduceMean (b)"),
    "epsilon outside the root": (
        "e = Add (v, eps)\n        r = Sqrt (e)", "q = Sqrt (v) r = Add (q, eps)", ""),
    "what is divided is not centred": ("n = Div (d, r)", "n = Div (x, r)", ""),
}  # fmt: skip


@pytest.mark.parametrize("case", LEFT_ALONE)
def test_leaves_alone(case: str, caplog: pytest.LogCaptureFixture) -> None:
    old, new, before = LEFT_ALONE[case]
    body = SPELLINGS["Pow, Div"]
    assert old in body or case == "epsilon outside the root"
    body = body.replace("e = Add (v, eps)\n        r = Sqrt (e)", "e = Add (v, eps) r = Sqrt (e)")
    body = body.replace(old.replace("\n        ", " "), new).replace("{ ", f"{{ {before} ", 1)
    assert_leaves_alone(FuseLayerNorm(), HEADER + body, "", caplog)


def test_leaves_a_norm_over_another_axis_alone(caplog: pytest.LogCaptureFixture) -> None:
    text = HEADER.replace("axes = {-1}", "axes = {0}") + SPELLINGS["Pow, Div"]
    assert_leaves_alone(FuseLayerNorm(), text, "left Sqrt", caplog)


def test_near_misses_are_safe() -> None:
    assert assert_near_misses_are_safe(FuseLayerNorm(), HEADER + SPELLINGS["Pow, Div"])


def test_keeps_a_norm_whose_casts_are_around_its_gamma() -> None:
    """The operator would round before gamma; the model rounds after."""
    half = """<ir_version: 11, opset_import: ["" : 24]>
    g (float16[N, 8] x, float[8] w, float[8] b) => (float[N, 8] y)
    <float eps = {0.00001}, float two = {2.0}, int64[1] axes = {-1}> {
        xf = Cast <to = 1> (x) m = ReduceMean (xf, axes) d = Sub (xf, m) s = Pow (d, two)
        v = ReduceMean (s, axes) e = Add (v, eps) r = Sqrt (e) n = Div (d, r)
        g0 = Mul (n, w) y = Add (g0, b) }"""
    after = """<ir_version: 11, opset_import: ["" : 24]>
    g (float16[N, 8] x, float[8] w, float[8] b) => (float[N, 8] y) {
        xf = Cast <to = 1> (x)
        y = LayerNormalization <epsilon = 0.00001> (xf, w, b) }"""
    assert_rewrites(FuseLayerNorm(), half, after)


# --- RMSNormalization of what is centred, as exporters of opset 23 write it -------------------


def test_a_norm_of_squares_of_what_is_centred_is_a_layer_norm() -> None:
    given = "RMSNormalization <axis = -1, epsilon = 0.00001> (d, w)"
    assert_rewrites(FuseLayerNorm(), f"{HEADER}{{ {START} n = {given} y = Add (n, b) }}", FUSED)
    after = FUSED.replace("(x, w, b) }", "(x, w) }")
    assert_rewrites(FuseLayerNorm(), f"{HEADER}{{ {START} y = {given} }}", after)


@pytest.mark.parametrize(
    ("old", "new"), [("axis = -1", "axis = 0"), ("Sub (x, m)", "Sub (m, x)"), ("(d, w)", "(x, w)")]
)
def test_leaves_other_norms_of_squares_alone(old: str, new: str) -> None:
    text = f"{HEADER}{{ {START} y = RMSNormalization <axis = -1, epsilon = 0.00001> (d, w) }}"
    text = text.replace("[N, 8] x", "[8, 8] x").replace("[N, 8] y", "[8, 8] y")
    if new == "axis = 0":
        text = text.replace("float[8] w", "float[8, 8] w")
    model = parse(text.replace(old, new))
    assert FuseLayerNorm().run(model) == 0


# --- in double, as old exporters write it ------------------------------------------------------

HALF = """<ir_version: 11, opset_import: ["" : 24]>
g (float16[N, 8] x, float16[8] w, float16[8] b) => (float16[N, 8] y)
<double eps = {0.00001}, double two = {2.0}, int64[1] axes = {-1}>
"""
WIDE = "s = Pow (c, two) v = ReduceMean (s, axes) e = Add (v, eps) r = Sqrt (e) q = Div (c, r)"
FUSED_HALF = FUSED.replace("float[", "float16[")


@pytest.mark.parametrize(
    "body",
    [
        f"{START} c = Cast <to = 11> (d) {WIDE} n = Cast <to = 10> (q)",
        f"u = Cast <to = 11> (x) m = ReduceMean (u, axes) c = Sub (u, m) {WIDE}"
        " n = Cast <to = 10> (q)",
    ],
)
def test_a_norm_in_double_is_one_in_the_type_of_its_input(body: str) -> None:
    assert_rewrites(
        FuseLayerNorm(), f"{HALF}{{ {body} g0 = Mul (n, w) y = Add (g0, b) }}", FUSED_HALF
    )


@pytest.mark.parametrize("narrow", ["float", "float16"])
def test_a_norm_whose_gamma_is_in_double_is_one_in_float(narrow: str) -> None:
    kind = {"float": 1, "float16": 10}[narrow]
    before = HALF.replace("float16[8] w, float16[8] b", "double[8] w, double[8] b")
    before = f"""{before.replace("float16", narrow)} {{ u = Cast <to = 11> (x)
        m = ReduceMean (u, axes) c = Sub (u, m) {WIDE} g0 = Mul (q, w) g1 = Add (g0, b)
        y = Cast <to = {kind}> (g1) }}"""
    model = parse(before)
    assert FuseLayerNorm().run(model) == 1
    ir.check(model)
    assert all(value.dtype != ir.DataType.DOUBLE for node in model.graph for value in node.outputs)
    random = np.random.default_rng(0)
    feeds = {
        "x": random.standard_normal((3, 8)).astype(np.float32 if narrow == "float" else np.float16),
        "w": random.standard_normal(8),
        "b": random.standard_normal(8),
    }
    expected = numerics.run(parse(before), feeds)["y"]
    allowed = numerics.Tolerance(rtol=2e-3, atol=2e-3) if narrow == "float16" else STRICT
    assert numerics.within(numerics.run(model, feeds)["y"], expected, allowed)


def test_leaves_what_is_rounded_in_between_alone() -> None:
    """A norm in half precision of a float: to raise it in float would keep what it rounds off."""
    constants = "eh = Cast <to = 10> (eps) th = Cast <to = 10> (two)"
    wide = WIDE.replace("(c, two)", "(c, th)").replace("(v, eps)", "(v, eh)")
    text = f"""{HEADER}{{ {START} {constants} c = Cast <to = 10> (d) {wide} n = Cast <to = 1> (q)
        g0 = Mul (n, w) y = Add (g0, b) }}"""
    assert FuseLayerNorm().run(parse(text)) == 0


def test_takes_in_the_casts_around_each_operator_that_a_converter_kept_in_float() -> None:
    before = """<ir_version: 11, opset_import: ["" : 24]>
    g (float16[N, 8] x, float16[8] w, float16[8] b) => (float16[N, 8] y)
    <float16 eps = {5120}, float two = {2.0}, int64[1] axes = {-1}> {
        x_f = Cast <to = 1> (x)
        m = ReduceMean (x_f, axes)
        m_h = Cast <to = 10> (m)
        d = Sub (x, m_h)
        d_f = Cast <to = 1> (d)
        s = Pow (d_f, two)
        s_h = Cast <to = 10> (s)
        s_f = Cast <to = 1> (s_h)
        v = ReduceMean (s_f, axes)
        v_h = Cast <to = 10> (v)
        e = Add (v_h, eps)
        e_f = Cast <to = 1> (e)
        r = Sqrt (e_f)
        r_h = Cast <to = 10> (r)
        n = Div (d, r_h)
        g0 = Mul (n, w)
        y = Add (g0, b)
    }"""
    after = FUSED.replace("float[", "float16[").replace("0.00001", str(2**-10))
    assert_rewrites(FuseLayerNorm(), before, after)
