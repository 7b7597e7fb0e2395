"""fuse-rms-norm: which exported forms fuse, and which must not."""

from collections.abc import Callable
from pathlib import Path

import pytest

from omforge import ir
from omforge.passes import make_pipeline
from omforge.passes.fuse_rms_norm import FuseRmsNorm
from omforge.rewriting.events import events
from omforge.testing import (
    assert_leaves_alone,
    assert_near_misses_are_safe,
    assert_rewrites,
    assert_same_numbers,
    example_feeds,
)

FLOAT = """<ir_version: 11, opset_import: ["" : 24]>
g (float[N, S, 8] x, float[8] w) => (float[N, S, 8] y)
<float two = {2.0}, float half = {0.5}, float minus_half = {-0.5}, float one = {1.0},
 float eps = {0.00001}, int64[1] last = {-1}>
"""
FUSED = """<ir_version: 11, opset_import: ["" : 24]>
g (float[N, S, 8] x, float[8] w) => (float[N, S, 8] y) {
    y = RMSNormalization <axis = -1, epsilon = 0.00001> (x, w)
}"""

# A square, what follows the mean, and how the norm is scaled: every exporter has its own mix.
SQUARES = {"pow": "sq = Pow (x, two)", "mul": "sq = Mul (x, x)"}
NORMS = {
    "reciprocal": "rms = Sqrt (var) inv = Reciprocal (rms) n = Mul (x, inv)",
    "one-over": "rms = Sqrt (var) inv = Div (one, rms) n = Mul (inv, x)",
    "div": "rms = Sqrt (var) n = Div (x, rms)",
    "pow-root": "rms = Pow (var, half) n = Div (x, rms)",
    "rsqrt": "inv = Pow (var, minus_half) n = Mul (x, inv)",
}
SCALES = {
    "gamma-first": "y = Mul (w, n)",
    "gamma-last": "y = Mul (n, w)",
    "identity": "i = Identity (n) y = Mul (i, w)",
}


def norm(square: str = "pow", inverse: str = "reciprocal", scale: str = "gamma-last") -> str:
    mean = "ms = ReduceMean (sq, last) var = Add (ms, eps)"
    return f"{{ {SQUARES[square]} {mean} {NORMS[inverse]} {SCALES[scale]} }}"


@pytest.mark.parametrize("square", SQUARES)
@pytest.mark.parametrize("inverse", NORMS)
@pytest.mark.parametrize("scale", SCALES)
def test_fuses_every_spelling(square: str, inverse: str, scale: str) -> None:
    assert_rewrites(FuseRmsNorm(), FLOAT + norm(square, inverse, scale), FUSED)


def test_fuses_the_product_in_any_association() -> None:
    # x * (gamma / rms) is the same chain of three factors.
    body = norm().replace("n = Mul (x, inv) y = Mul (n, w)", "n = Mul (inv, w) y = Mul (x, n)")
    assert "Mul (inv, w)" in body
    assert_rewrites(FuseRmsNorm(), FLOAT + body, FUSED)


def test_fuses_constants_that_are_nodes() -> None:
    """TorchScript writes every number as a Constant node."""
    before = """<ir_version: 11, opset_import: ["" : 24]>
    g (float[N, S, 8] x, float[8] w) => (float[N, S, 8] y) {
        two = Constant <value = float {2.0}> ()
        sq = Pow (x, two)
        last = Constant <value_ints = [-1]> ()
        ms = ReduceMean (sq, last)
        eps = Constant <value_float = 0.00001> ()
        var = Add (ms, eps)
        rms = Sqrt (var)
        n = Div (x, rms)
        y = Mul (n, w)
    }"""
    assert_rewrites(FuseRmsNorm(), before, FUSED)


def test_fuses_an_axis_counted_from_the_front() -> None:
    assert_rewrites(FuseRmsNorm(), FLOAT.replace("{-1}", "{2}") + norm(), FUSED)


def test_keeps_gamma_that_is_computed() -> None:
    """Gemma's 1 + w, where nothing has folded it."""
    after = FUSED.replace("(x, w)", "(x, gamma)").replace("y = RMS", "gamma = Add (w, one) y = RMS")
    after = after.replace("y) {", "y) <float one = {1.0}> {")
    body = norm().replace("{ sq", "{ gamma = Add (w, one) sq").replace("(n, w)", "(n, gamma)")
    assert_rewrites(FuseRmsNorm(), FLOAT + body, after)


HALF = FLOAT.replace(
    "(float[N, S, 8] x, float[8] w)", "(float16[N, S, 8] x, float16[8] w)"
).replace("(float[N, S, 8] y)", "(float16[N, S, 8] y)")
HALF_FUSED = FUSED.replace("float[", "float16[")
IN_FLOAT = """
    xf = Cast <to = 1> (x)
    sq = Pow (xf, two)
    ms = ReduceMean (sq, last)
    var = Add (ms, eps)
    rms = Sqrt (var)
    n = Div (xf, rms)
"""


BETWEEN_CASTS = """
    xf = Cast <to = 1> (x)
    sq = Pow (xf, two)
    sq_h = Cast <to = 10> (sq)
    sq_f = Cast <to = 1> (sq_h)
    ms = ReduceMean (sq_f, last)
    ms_h = Cast <to = 10> (ms)
    var = Add (ms_h, eps)
    var_f = Cast <to = 1> (var)
    rms = Sqrt (var_f)
    rms_h = Cast <to = 10> (rms)
    n = Div (x, rms_h)
"""
EPS_HALF = ("float eps = {0.00001}", "float16 eps = {5120}")
"""By its bits: 2 ** -10."""


def test_takes_in_the_casts_around_each_operator_that_a_converter_kept_in_float() -> None:
    body = f"{{ {BETWEEN_CASTS} y = Mul (w, n) }}"
    after = HALF_FUSED.replace("0.00001", str(2**-10))
    assert_rewrites(FuseRmsNorm(), HALF.replace(*EPS_HALF) + body, after)


def test_leaves_a_norm_rounded_to_less_than_its_input(caplog: pytest.LogCaptureFixture) -> None:
    in_float = BETWEEN_CASTS.replace(
        "var = Add (ms_h", "ms_f = Cast <to = 1> (ms_h) var = Add (ms_f"
    )
    in_float = in_float.replace("var_f = Cast <to = 1> (var)", "var_f = Identity (var)")
    in_float = in_float.replace("(x, rms_h)", "(x, rms)").replace(
        "rms_h = Cast <to = 10> (rms)", ""
    )
    in_float = in_float.replace("xf = Cast <to = 1> (x)", "xf = Identity (x)")
    for body in (in_float, in_float.replace("to = 10", "to = 16")):
        assert_leaves_alone(
            FuseRmsNorm(), FLOAT + f"{{ {body} y = Mul (w, n) }}", "it goes through", caplog
        )


def test_takes_in_the_casts_of_a_half_precision_norm() -> None:
    body = f"{{ {IN_FLOAT} h = Cast <to = 10> (n) y = Mul (w, h) }}"
    assert_rewrites(FuseRmsNorm(), HALF + body, HALF_FUSED)


def test_keeps_the_casts_where_gamma_multiplies_in_float() -> None:
    """The operator would round before gamma; the model rounds after."""
    body = f"{{ {IN_FLOAT} wf = Cast <to = 1> (w) s = Mul (n, wf) y = Cast <to = 10> (s) }}"
    after = HALF_FUSED.replace(
        "y = RMSNormalization <axis = -1, epsilon = 0.00001> (x, w)",
        """xf = Cast <to = 1> (x)
        wf = Cast <to = 1> (w)
        s = RMSNormalization <axis = -1, epsilon = 0.00001> (xf, wf)
        y = Cast <to = 10> (s)""",
    )
    assert_rewrites(FuseRmsNorm(), HALF + body, after)


def test_stashes_in_half_where_the_model_computes_in_half() -> None:
    before = """<ir_version: 11, opset_import: ["" : 24]>
    g (float16[N, S, 8] x, float16[8] w) => (float16[N, S, 8] y)
    <int64[1] last = {-1}, float16 eps = {5120}> {  # the bits of 2 ** -10
        sq = Mul (x, x)
        ms = ReduceMean (sq, last)
        var = Add (ms, eps)
        rms = Sqrt (var)
        n = Div (x, rms)
        y = Mul (n, w)
    }""".replace("  # the bits of 2 ** -10", "")
    after = HALF_FUSED.replace("epsilon = 0.00001", "epsilon = 0.0009765625, stash_type = 10")
    assert_rewrites(FuseRmsNorm(), before, after)


def test_a_cast_that_two_norms_share_stays_for_the_second() -> None:
    """Attention and MLP in parallel: common subexpressions leave one cast."""
    header = HALF.replace("float16[8] w)", "float16[8] w, float16[8] v)").replace(
        "(float16[N, S, 8] y)", "(float16[N, S, 8] y, float16[N, S, 8] z)"
    )
    second = "".join(
        line.replace(" = ", "2 = ", 1) for line in IN_FLOAT.splitlines(keepends=True)[2:]
    )
    for name in ("sq", "ms", "var", "rms"):
        second = second.replace(f"({name}", f"({name}2").replace(f", {name})", f", {name}2)")
    body = f"""{{ {IN_FLOAT} {second}
        h = Cast <to = 10> (n) y = Mul (w, h)
        h2 = Cast <to = 10> (n2) z = Mul (h2, v) }}"""
    after = """<ir_version: 11, opset_import: ["" : 24]>
    g (float16[N, S, 8] x, float16[8] w, float16[8] v)
        => (float16[N, S, 8] y, float16[N, S, 8] z) {
        y = RMSNormalization <axis = -1, epsilon = 0.00001> (x, w)
        z = RMSNormalization <axis = -1, epsilon = 0.00001> (x, v)
    }"""
    assert_rewrites(FuseRmsNorm(), header + body, after)


# --- no gamma, or another than [H] ------------------------------------------------------------

ONES = "float[8] ones = {1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0}"
WITH_ONES = "n = RMSNormalization <axis = -1, epsilon = 0.00001> (x, ones)"


@pytest.mark.parametrize("inverse", NORMS)
def test_a_norm_without_gamma_gets_ones(inverse: str) -> None:
    header = FLOAT.replace(", float[8] w", "")
    before = header + norm("pow", inverse, "identity").replace(
        "i = Identity (n) y = Mul (i, w)", ""
    )
    after = f"""<ir_version: 11, opset_import: ["" : 24]>
    g (float[N, S, 8] x) => (float[N, S, 8] y) <{ONES}> {{
        y = RMSNormalization <axis = -1, epsilon = 0.00001> (x, ones)
    }}"""
    assert_rewrites(FuseRmsNorm(), before.replace(" n = ", " y = "), after)


OTHER_GAMMAS = {
    "one for each head": "[4, 8]",
    "one for each head of tokens behind": "[1, 4, 1, 8]",
    "one element": "[1]",
}


@pytest.mark.parametrize("gamma", OTHER_GAMMAS.values(), ids=list(OTHER_GAMMAS))
def test_the_product_with_another_gamma_stays_behind(gamma: str) -> None:
    rank = "N, 4, S, 8" if gamma == "[1, 4, 1, 8]" else "N, S, 4, 8"
    header = FLOAT.replace("N, S, 8", rank).replace("float[8] w", f"float{gamma} w")
    after = f"""<ir_version: 11, opset_import: ["" : 24]>
    g (float[{rank}] x, float{gamma} w) => (float[{rank}] y) <{ONES}> {{
        {WITH_ONES} y = Mul (n, w)
    }}"""
    assert_rewrites(FuseRmsNorm(), header + norm(), after)


@pytest.mark.parametrize("also", ["z = Neg (n)", "z = Identity (n)"])
def test_the_product_stays_where_the_norm_is_needed_too(also: str) -> None:
    header = FLOAT.replace("8] y)", "8] y, float[N, S, 8] z)")
    after = f"""<ir_version: 11, opset_import: ["" : 24]>
    g (float[N, S, 8] x, float[8] w) => (float[N, S, 8] y, float[N, S, 8] z) <{ONES}> {{
        {WITH_ONES} y = Mul (n, w) {also}
    }}"""
    assert_rewrites(FuseRmsNorm(), header + norm().replace("}", f"{also} }}"), after)


def test_a_norm_in_float_of_a_half_precision_gamma_keeps_the_cast() -> None:
    """Where the residual stream is in float, and the weights are not."""
    header = HALF.replace("float16[N, S, 8] x", "float[N, S, 8] x")
    body = IN_FLOAT.replace("xf = Cast <to = 1> (x)", "xf = Identity (x)")
    after = f"""<ir_version: 11, opset_import: ["" : 24]>
    g (float[N, S, 8] x, float16[8] w) => (float16[N, S, 8] y) <{ONES}> {{
        n = RMSNormalization <axis = -1, epsilon = 0.00001> (x, ones)
        h = Cast <to = 10> (n)
        y = Mul (w, h)
    }}"""
    assert_rewrites(
        FuseRmsNorm(), f"{header}{{ {body} h = Cast <to = 10> (n) y = Mul (w, h) }}", after
    )


def test_a_norm_of_half_precision_takes_the_casts_in_without_gamma_too() -> None:
    """The norm goes to half precision, and gamma brings it back to float."""
    header = FLOAT.replace("float[N, S, 8] x", "float16[N, S, 8] x")
    body = f"{{ {IN_FLOAT} h = Cast <to = 10> (n) hf = Cast <to = 1> (h) y = Mul (w, hf) }}"
    ones = "float16[8] ones = {15360, 15360, 15360, 15360, 15360, 15360, 15360, 15360}"
    after = f"""<ir_version: 11, opset_import: ["" : 24]>
    g (float16[N, S, 8] x, float[8] w) => (float[N, S, 8] y) <{ones}> {{
        h = RMSNormalization <axis = -1, epsilon = 0.00001> (x, ones)
        hf = Cast <to = 1> (h)
        y = Mul (w, hf)
    }}"""
    assert_rewrites(FuseRmsNorm(), header + body, after)


def test_a_norm_that_stays_in_float_takes_no_cast_in() -> None:
    header = FLOAT.replace("(float[N, S, 8] x, float[8] w)", "(float16[N, S, 8] x)")
    after = f"""<ir_version: 11, opset_import: ["" : 24]>
    g (float16[N, S, 8] x) => (float[N, S, 8] y) <{ONES}> {{
        xf = Cast <to = 1> (x)
        y = RMSNormalization <axis = -1, epsilon = 0.00001> (xf, ones)
    }}"""
    assert_rewrites(FuseRmsNorm(), f"{header}{{ {IN_FLOAT.replace('n = Div', 'y = Div')} }}", after)


# --- what must be left alone ------------------------------------------------------------------

LEFT_ALONE = {
    "epsilon outside the root": (
        FLOAT
        + norm().replace(
            "var = Add (ms, eps) rms = Sqrt (var)", "r = Sqrt (ms) rms = Add (r, eps)"
        ),
        "fuse-rms-norm: left Sqrt",
    ),
    "epsilon before the mean": (
        FLOAT
        + norm().replace(
            "ms = ReduceMean (sq, last) var = Add (ms, eps)",
            "se = Add (sq, eps) var = ReduceMean (se, last)",
        ),
        "",
    ),
    "no root": (
        FLOAT + norm().replace("rms = Sqrt (var)", "rms = Identity (var) other = Sqrt (var)"),
        "fuse-rms-norm: left Sqrt",
    ),
    "of a size that is not known": (
        FLOAT.replace("[N, S, 8]", "[N, S, H]") + norm().replace("y = Mul (n, w)", "y = Abs (n)"),
        "the size of x, H, is not a number",
    ),
    "another axis": (
        FLOAT.replace("{-1}", "{1}") + norm(),
        "expected ReduceMean with axes=[-1] at ms, got axes=(1,)",
    ),
    "no keepdims": (
        FLOAT.replace("[N, S, 8] y", "[N, 8, 8] y").replace("[N, S, 8] x", "[8, 8] x")
        + norm().replace("ReduceMean (", "ReduceMean <keepdims = 0> ("),
        "expected ReduceMean with keepdims=1 (the default) at ms, got keepdims=0",
    ),
    "epsilon per channel": (
        FLOAT.replace("float eps = {0.00001}", "float[8] eps = {1,2,3,4,5,6,7,8}") + norm(),
        "eps (eps) has shape [8], not one number",
    ),
    "epsilon that is an input": (
        FLOAT.replace("float[8] w)", "float[8] w, float e)")
        + norm().replace("(ms, eps)", "(ms, e)"),
        "eps (e) is not a constant",
    ),
    "a layer norm": (
        FLOAT
        + norm()
        .replace("x,", "d,")
        .replace("{ sq", "{ m = ReduceMean (x, last) d = Sub (x, m) sq"),
        "d is centred on its mean: a layer norm",
    ),
    "another x is divided": (
        FLOAT.replace("float[8] w)", "float[8] w, float[N, S, 8] x2)")
        + norm().replace("Mul (x, inv)", "Mul (x2, inv)"),
        "fuse-rms-norm: left Sqrt",
    ),
}


@pytest.mark.parametrize("case", LEFT_ALONE)
def test_leaves_alone(case: str, caplog: pytest.LogCaptureFixture) -> None:
    text, reason = LEFT_ALONE[case]
    assert_leaves_alone(FuseRmsNorm(), text, reason, caplog)


@pytest.mark.parametrize("inverse", NORMS)
def test_near_misses_are_safe(inverse: str) -> None:
    assert assert_near_misses_are_safe(FuseRmsNorm(), FLOAT + norm("mul", inverse)) > 20


def test_near_misses_of_half_precision_are_safe() -> None:
    body = f"{{ {IN_FLOAT} h = Cast <to = 10> (n) y = Mul (w, h) }}"
    assert assert_near_misses_are_safe(FuseRmsNorm(), HALF + body) > 20


# --- real exports -----------------------------------------------------------------------------


@pytest.mark.parametrize("route", ["optimum", "dynamo", "hfexporter", "torchscript-op17"])
def test_fuses_every_norm_and_gate_of_an_export(
    route: str, exported: Callable[[str, str], Path]
) -> None:
    model = ir.load(exported(route, "llama_gqa"))
    make_pipeline("canonicalize").run(model)
    original = model.clone()
    norms, gates = make_pipeline("fuse-rms-norm,fuse-swish").run(model).passes
    assert norms.rewrites == 5  # two in each of two layers, and the last
    assert gates.rewrites == 2
    assert not events(model)
    feeds = example_feeds(original)
    feeds["attention_mask"][:] = 1
    assert_same_numbers(original, model, [feeds])


# --- in double, as old exporters write it ------------------------------------------------------


def test_a_norm_in_double_is_one_in_the_type_of_its_input() -> None:
    before = """<ir_version: 11, opset_import: ["" : 24]>
    g (float16[N, 8] x, float16[8] w) => (float16[N, 8] y)
    <double eps = {0.00001}, double two = {2.0}, int64[1] axes = {-1}> {
        c = Cast <to = 11> (x) s = Pow (c, two) v = ReduceMean (s, axes) e = Add (v, eps)
        r = Sqrt (e) q = Div (c, r) n = Cast <to = 10> (q) y = Mul (n, w) }"""
    after = """<ir_version: 11, opset_import: ["" : 24]>
    g (float16[N, 8] x, float16[8] w) => (float16[N, 8] y) {
        y = RMSNormalization <axis = -1, epsilon = 0.00001> (x, w) }"""
    assert_rewrites(FuseRmsNorm(), before, after)
    wide = before.replace("float16[8] w", "double[8] w").replace(
        "n = Cast <to = 10> (q) y = Mul (n, w)", "n = Mul (q, w) y = Cast <to = 10> (n)"
    )
    inside = """<ir_version: 11, opset_import: ["" : 24]>
    g (float16[N, 8] x, double[8] w) => (float16[N, 8] y) {
        xf = Cast <to = 1> (x) wf = Cast <to = 1> (w)
        n = RMSNormalization <axis = -1, epsilon = 0.00001> (xf, wf) y = Cast <to = 10> (n) }"""
    assert_rewrites(FuseRmsNorm(), wide, inside)


def test_fuses_a_norm_that_a_tool_rounds_between_its_nodes() -> None:
    """A converter to float16 that leaves some operators in float32 puts casts around each."""
    before = """<ir_version: 11, opset_import: ["" : 24]>
    g (float16[N, S, 8] x, float16[8] w) => (float16[N, S, 8] y)
    <float two = {2.0}, float one = {1.0}, float16 eps = {168}, int64[1] last = {-1}> {
        wide = Cast <to = 1> (x)
        sq = Pow (wide, two)
        sq16 = Cast <to = 10> (sq)  sq32 = Cast <to = 1> (sq16)
        ms = ReduceMean (sq32, last)
        ms16 = Cast <to = 10> (ms)
        var = Add (ms16, eps)
        var32 = Cast <to = 1> (var)
        rms = Sqrt (var32)
        rms16 = Cast <to = 10> (rms)  rms32 = Cast <to = 1> (rms16)
        inv = Div (one, rms32)
        inv16 = Cast <to = 10> (inv)
        n = Mul (x, inv16)
        y = Mul (w, n)
    }"""
    after = """<ir_version: 11, opset_import: ["" : 24]>
    g (float16[N, S, 8] x, float16[8] w) => (float16[N, S, 8] y) {
        y = RMSNormalization <axis = -1, epsilon = 0.0000100135803> (x, w)
    }"""
    assert_rewrites(FuseRmsNorm(), before, after)
