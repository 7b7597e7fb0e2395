"""unflatten-gemm: a product on flattened rows becomes one on [B, S, H]."""

import pytest

from omforge.passes.unflatten_gemm import UnflattenGemm
from omforge.testing import assert_leaves_alone, assert_rewrites

BEFORE = """<ir_version: 11, opset_import: ["" : 24]>
g (float[B, S, 8] x, float[8, 4] w, float[4] b) => (float[R, 4] y) <int64[2] t = {-1, 8}> {
    rows = Reshape (x, t)
    y = Gemm %s (rows, %s)
}"""
AFTER = """<ir_version: 11, opset_import: ["" : 24]>
g (float[B, S, 8] x, float[8, 4] w, float[4] b) => (float[R, 4] y) <int64[2] t = {-1, 4}> {
    m = MatMul (x, w)
    a = Add (m, b)
    y = Reshape (a, t)
}"""


def test_gemm_becomes_matmul_and_add() -> None:
    assert_rewrites(UnflattenGemm(), BEFORE % ("", "w, b"), AFTER)


def test_without_a_bias() -> None:
    after = AFTER.replace("a = Add (m, b)\n", "").replace("Reshape (a, t)", "Reshape (m, t)")
    assert_rewrites(UnflattenGemm(), BEFORE % ("", "w"), after)


def test_a_transposed_weight_is_transposed_on_the_way() -> None:
    before = (BEFORE % ("<transB = 1>", "w, b")).replace("float[8, 4] w", "float[4, 8] w")
    after = AFTER.replace("float[8, 4] w", "float[4, 8] w").replace(
        "m = MatMul (x, w)", "wt = Transpose <perm = [1, 0]> (w) m = MatMul (x, wt)"
    )
    assert_rewrites(UnflattenGemm(), before, after)


@pytest.mark.parametrize("attributes", ["<alpha = 2.0>", "<beta = 0.5>"])
def test_a_scaled_gemm_is_left_alone(attributes: str, caplog: pytest.LogCaptureFixture) -> None:
    assert_leaves_alone(UnflattenGemm(), BEFORE % (attributes, "w, b"), "", caplog)


def test_a_gemm_on_a_matrix_is_left_alone(caplog: pytest.LogCaptureFixture) -> None:
    text = """<ir_version: 11, opset_import: ["" : 24]>
    g (float[R, 8] x, float[8, 4] w) => (float[R, 4] y) { y = Gemm (x, w) }"""
    assert_leaves_alone(UnflattenGemm(), text, "", caplog)


def test_rows_that_mix_the_last_axis_are_left_alone(caplog: pytest.LogCaptureFixture) -> None:
    text = (BEFORE % ("", "w, b")).replace("B, S, 8", "B, S, 4")
    assert_leaves_alone(UnflattenGemm(), text, "", caplog)
