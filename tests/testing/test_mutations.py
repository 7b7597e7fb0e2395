"""Mutants: which changes are made, and that a matcher which is too loose is caught by each kind."""

import pytest

from omforge import ir
from omforge.rewriting.rewrite import ANY, Builder, Match, Pat, PatternOps, RewritePass
from omforge.testing import assert_near_misses_are_safe, mutants

TEXT = """<ir_version: 11, opset_import: ["" : 24]>
g (float[N, 4] x, float[N, 4] z) => (float[N, 4] y) <float two = {2.0}> {
    p = Pow (x, two)
    s = Softmax (p)
    y = Sub (s, z)
}"""


def test_everything_is_changed_in_turn() -> None:
    changes = [mutant.change for mutant in mutants(ir.from_onnx_text(TEXT))]
    assert "Softmax.axis=0" in changes  # an attribute that the node leaves out
    assert "Softmax.axis=-2" in changes
    assert "two[0]=5.0" in changes
    assert "input 0 of Pow is z" in changes
    assert "Softmax dropped for its input 0" in changes
    assert "p is an output too" in changes
    assert "Sub of y swapped" in changes


def test_mutants_are_valid_and_one_change_away() -> None:
    for mutant in mutants(ir.from_onnx_text(TEXT)):
        assert len(mutant.model.graph) in (2, 3)
        assert {value.name for value in mutant.model.graph.inputs} == {"x", "z"}


class Fuse(RewritePass):
    """Rewrite softmax(x^2) - z, exactly."""

    name = "fuse"

    def pattern(self, op: PatternOps, x: Pat, z: Pat) -> Pat:
        return op.Sub(op.Softmax(op.Pow(x, 2.0)), z)

    def rewrite(self, op: Builder, m: Match) -> ir.Value:
        return op.Sub(op.Softmax(op.Mul(m.x, m.x)), m.z)


class AnyAxis(Fuse):
    """As if every attribute were a wildcard."""

    name = "any-axis"

    def pattern(self, op: PatternOps, x: Pat, z: Pat) -> Pat:
        return op.Sub(op.Softmax(op.Pow(x, 2.0), axis=ANY), z)


class AnyExponent(Fuse):
    """As if every constant were a wildcard."""

    name = "any-exponent"

    def pattern(self, op: PatternOps, x: Pat, z: Pat) -> Pat:
        return op.Sub(op.Softmax(op.Pow(x, ANY)), z)


class AnyOrder(Fuse):
    """As if Sub were commutative."""

    name = "any-order"

    def pattern(self, op: PatternOps, x: Pat, z: Pat) -> Pat:
        softmax = op.Softmax(op.Pow(x, 2.0))
        return op.Sub(softmax, z) | op.Sub(z, softmax)


def test_an_exact_pattern_is_safe() -> None:
    assert assert_near_misses_are_safe(Fuse(), TEXT) > 5


@pytest.mark.parametrize(
    ("step", "change"),
    [
        (AnyAxis(), r"Softmax\.axis="),
        (AnyExponent(), "input 1 of Pow is|Pow of p swapped"),
        (AnyOrder(), "Sub of"),
    ],
)
def test_a_pattern_that_is_too_loose_is_caught(step: RewritePass, change: str) -> None:
    with pytest.raises(AssertionError, match=f"rewrote a near miss, {change}"):
        assert_near_misses_are_safe(step, TEXT)
