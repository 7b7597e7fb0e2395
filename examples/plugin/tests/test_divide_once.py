"""ONNX text in, ONNX text out; the numbers are compared, too."""

from omforge_divide_once import DivideOnce

from omforge.testing import assert_near_misses_are_safe, assert_rewrites

BEFORE = """<ir_version: 10, opset_import: ["" : 18]>
g (float[N, 4] x, float[N, 1] y) => (float[N, 4] z) { r = Reciprocal (y) z = Mul (x, r) }"""

AFTER = """<ir_version: 10, opset_import: ["" : 18]>
g (float[N, 4] x, float[N, 1] y) => (float[N, 4] z) { z = Div (x, y) }"""


def test_divides_once() -> None:
    assert_rewrites(DivideOnce(), BEFORE, AFTER)
    assert_near_misses_are_safe(DivideOnce(), BEFORE)
