"""The assertions catch what they are for: each is shown a pass that breaks its rule."""

from collections.abc import Callable

import pytest

from omforge import ir
from omforge.rewriting.base import Pass
from omforge.rewriting.rewrite import Builder, Match, Pat, PatternOps, RewritePass
from omforge.testing import (
    assert_leaves_alone,
    assert_rewrites,
    assert_same_numbers,
    outline,
    parse,
)

HEADER = """<ir_version: 11, opset_import: ["" : 24]>
g (float[N, 4] x) => (float[N, 4] y) """
BEFORE = HEADER + "{ h = Neg (x) y = Neg (h) }"


class Rewrite(Pass):
    """Run a function."""

    name = "rewrite"

    def __init__(self, function: Callable[[ir.Model], int]) -> None:
        object.__setattr__(self, "function", function)

    def run(self, model: ir.Model) -> int:
        return self.function(model)  # type: ignore[attr-defined]


class ToExp(RewritePass):
    """Rewrite Neg(Neg(x)) as Exp(x)."""

    name = "to-exp"

    def pattern(self, op: PatternOps, x: Pat) -> Pat:
        return op.Neg(op.Neg(x))

    def rewrite(self, op: Builder, m: Match) -> ir.Value:
        return op.Exp(m.x)


def test_another_graph_is_shown_as_a_difference() -> None:
    with pytest.raises(AssertionError) as caught:
        assert_rewrites(ToExp(), BEFORE, HEADER + "{ y = Log (x) }")
    assert "-y = Log(x)\n+y = Exp(x)" in str(caught.value)


def test_other_numbers_are_an_error() -> None:
    with pytest.raises(AssertionError, match="y differs by"):
        assert_rewrites(ToExp(), BEFORE, HEADER + "{ y = Exp (x) }")


def test_a_pass_that_finds_nothing_is_an_error() -> None:
    with pytest.raises(AssertionError, match="rewrite found nothing"):
        assert_rewrites(Rewrite(lambda _: 0), BEFORE, BEFORE)


def test_how_far_the_closest_attempt_came_is_told() -> None:
    """With the node at which the pattern ended, and what was expected of it."""

    class Gelu(ToExp):
        name = "sigmoid-of-neg"

        def pattern(self, op: PatternOps, x: Pat) -> Pat:
            return op.Sigmoid(op.Neg(op.Exp(x)))

    text = HEADER + "{ h = Abs (x) i = Neg (h) y = Sigmoid (i) }"
    with pytest.raises(AssertionError) as caught:
        assert_rewrites(Gelu(), text, text)
    said = str(caught.value)
    assert "sigmoid-of-neg found nothing to rewrite" in said
    assert "at Sigmoid -> y, of which 3 nodes fit: " in said
    assert "Exp" in said
    other = text.replace("Sigmoid", "Tanh")
    with pytest.raises(AssertionError, match="no node is a Sigmoid, its last operator"):
        assert_rewrites(Gelu(), other, other)


def test_a_pass_that_finds_more_each_time_is_an_error() -> None:
    with pytest.raises(AssertionError, match="found 1 more rewrites in a second run"):
        assert_rewrites(Rewrite(lambda _: 1), BEFORE, BEFORE)


def test_another_interface_is_an_error() -> None:
    def retype(model: ir.Model) -> int:
        model.graph.outputs[0].shape = ir.Shape(["M", 4])
        return 1

    with pytest.raises(AssertionError, match="outputs were"):
        assert_rewrites(Rewrite(retype), BEFORE, BEFORE.replace("[N, 4] y", "[M, 4] y"))


def test_leaving_alone_means_every_byte(caplog: pytest.LogCaptureFixture) -> None:
    def rename(model: ir.Model) -> int:
        model.graph[0].name = "another"
        return 0

    with pytest.raises(AssertionError, match="rewrote nothing, and changed the model"):
        assert_leaves_alone(Rewrite(rename), BEFORE, "", caplog)
    with pytest.raises(AssertionError, match=r"to-exp rewrote:"):
        assert_leaves_alone(ToExp(), BEFORE, "", caplog)
    with pytest.raises(AssertionError):
        assert_leaves_alone(Rewrite(lambda _: 0), BEFORE, "a reason that is not told", caplog)


def test_same_numbers_looks_at_small_inputs_too() -> None:
    """An epsilon shows on small numbers only."""
    body = "{ s = Mul (x, x) t = Add (s, eps) r = Sqrt (t) y = Div (x, r) }"
    first, second = (
        parse(f"{HEADER} <float eps = {{{eps}}}> {body}") for eps in ("0.000001", "0.00001")
    )
    with pytest.raises(AssertionError, match="y differs by"):
        assert_same_numbers(first, second)


def test_an_outline_forgets_inner_names_and_defaults() -> None:
    first = HEADER + "<float k = {2.0}> { h = Mul (x, k) y = Softmax <axis = -1> (h) }"
    second = HEADER + "{ two = Constant <value_float = 2.0> () z = Mul (x, two) y = Softmax (z) }"
    assert outline(parse(first)) == outline(parse(second))
    assert outline(parse(first)) == [
        "input x: FLOAT[N,4]",
        "%2 = Mul(x, float[]{2})",
        "y = Softmax(%2)",
        "output y: FLOAT[N,4]",
    ]


@pytest.mark.parametrize("change", ["axis = 0", "k = {2.5}", "Mul (k, x)", "Neg"])
def test_an_outline_keeps_what_matters(change: str) -> None:
    text = HEADER + "<float k = {2.0}> { h = Mul (x, k) e = Exp (h) y = Softmax <axis = -1> (e) }"
    old = {
        "axis = 0": "axis = -1",
        "k = {2.5}": "k = {2.0}",
        "Mul (k, x)": "Mul (x, k)",
        "Neg": "Exp",
    }
    assert outline(parse(text)) != outline(parse(text.replace(old[change], change)))
