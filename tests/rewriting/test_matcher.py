"""Matching: each rule of the pattern language on a graph that obeys it and on one that does not."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from omforge.rewriting.matcher import Closest, Found, Matcher
from omforge.rewriting.pattern import ANY, Pat, Pattern, PatternOps
from omforge.testing import parse

Function = Callable[..., Any]


def attempt(function: Function, body: str, header: str = "", opset: int = 24) -> Matcher:
    """A matcher that has tried the node that makes `y`."""
    return _attempt(function, body, header, opset)[0]


def matches(function: Function, body: str, header: str = "", opset: int = 24) -> list[Found]:
    return _attempt(function, body, header, opset)[1]


def _attempt(function: Function, body: str, header: str, opset: int) -> tuple[Matcher, list[Found]]:
    model = parse(f"""<ir_version: 8, opset_import: ["" : {opset}]>
    g (float[N, 4] a, float[N, 4] b, float[N, 4] c, float16[N, 4] h) => (float[N, 4] y)
    <float two = {{2.0}}, float one = {{1.0}}, int64[1] last = {{-1}}{header}> {{ {body} }}""")
    matcher = Matcher(Pattern(function), model.opset_imports)
    root = next(node for node in model.graph if node.outputs[0].name == "y")
    return matcher, list(matcher.match(root))


def names(found: Found) -> dict[str, str]:
    return {name: str(value.name) for name, value in found.values.items()}


# --- order and association --------------------------------------------------------------------


def test_commutative_operators_match_both_orders() -> None:
    def function(op: PatternOps, x: Pat, z: Pat) -> Pat:
        return op.Add(op.Exp(x), z)

    for body in ("e = Exp (a) y = Add (e, b)", "e = Exp (a) y = Add (b, e)"):
        (found,) = matches(function, body)
        assert names(found) == {"x": "a", "z": "b"}


def test_other_operators_match_one_order() -> None:
    def function(op: PatternOps, x: Pat, z: Pat) -> Pat:
        return op.Sub(op.Exp(x), z)

    assert matches(function, "e = Exp (a) y = Sub (e, b)")
    assert not matches(function, "e = Exp (a) y = Sub (b, e)")


@pytest.mark.parametrize(
    "body",
    [
        "e = Exp (a) n = Neg (b) p = Mul (e, n) y = Mul (p, c)",
        "e = Exp (a) n = Neg (b) p = Mul (n, e) y = Mul (c, p)",
        "e = Exp (a) n = Neg (b) p = Mul (e, c) y = Mul (p, n)",
        "e = Exp (a) n = Neg (b) p = Mul (n, c) i = Identity (p) y = Mul (e, i)",
    ],
)
def test_chains_match_in_any_association(body: str) -> None:
    def function(op: PatternOps, p: Pat, q: Pat, r: Pat) -> Pat:
        return op.Mul(op.Mul(op.Exp(p), op.Neg(q)), r)

    (found,) = matches(function, body)
    assert names(found) == {"p": "a", "q": "b", "r": "c"}
    assert [node.op_type for node in found.nodes][:2] in (["Mul", "Mul"], ["Mul", "Identity"])


def test_a_chain_of_more_factors_gives_the_rest_to_a_variable() -> None:
    def function(op: PatternOps, p: Pat, r: Pat) -> Pat:
        return op.Mul(op.Exp(p), r)

    body = "e = Exp (a) rest = Mul (b, c) y = Mul (rest, e)"
    (found,) = matches(function, body)
    assert names(found) == {"p": "a", "r": "rest"}


def test_subtraction_is_no_chain() -> None:
    def function(op: PatternOps, p: Pat, q: Pat, r: Pat) -> Pat:
        return op.Sub(op.Sub(p, q), r)

    assert matches(function, "d = Sub (a, b) y = Sub (d, c)")
    assert not matches(function, "d = Sub (b, c) y = Sub (a, d)")


# --- the same value ---------------------------------------------------------------------------


def test_a_repeated_variable_is_one_value() -> None:
    def function(op: PatternOps, x: Pat) -> Pat:
        return op.Mul(x, op.Sigmoid(x))

    assert matches(function, "s = Sigmoid (a) y = Mul (a, s)")
    assert matches(function, "i = Identity (a) s = Sigmoid (i) y = Mul (a, s)")
    assert not matches(function, "s = Sigmoid (a) y = Mul (b, s)")


def test_equal_constants_are_one_value() -> None:
    def function(op: PatternOps, x: Pat, k: Pat) -> Pat:
        return op.Div(op.Sub(x, k), k)

    body = "d = Sub (a, two) k = Constant <value_float = {}> () y = Div (d, k)"
    assert matches(function, body.replace("{}", "2.0"))
    assert not matches(function, body.replace("{}", "2.5"))


def test_a_repeated_part_is_one_value_whichever_alternative_it_was() -> None:
    def function(op: PatternOps, x: Pat) -> Pat:
        wide = op.Cast(x, to=1) | x
        return op.Div(op.Exp(wide), wide)

    (found,) = matches(function, "w = Cast <to = 1> (h) e = Exp (w) y = Div (e, w)")[:1]
    assert names(found) == {"x": "h"}
    assert not matches(function, "w = Cast <to = 1> (h) e = Exp (w) y = Div (e, b)")


def test_outputs_of_one_node_come_from_one_node() -> None:
    def function(op: PatternOps, x: Pat) -> Pat:
        left, right = op.Split(x, num_outputs=2, axis=1, _outputs=2)
        return op.Concat(right, left, axis=1)

    split = (
        "p, q = Split <axis = 1, num_outputs = 2> (a) r, s = Split <axis = 1, num_outputs = 2> (a)"
    )
    assert matches(function, f"{split} y = Concat <axis = 1> (q, p)")
    assert not matches(function, f"{split} y = Concat <axis = 1> (p, q)")
    assert not matches(function, f"{split} y = Concat <axis = 1> (s, p)")


# --- constants --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("constant", "equal"),
    [
        ("float k = {0.1}", True),
        ("float[1] k = {0.1}", True),
        ("float[4] k = {0.1, 0.1, 0.1, 0.1}", True),  # a splat that adds no dimension
        ("float[4] k = {0.1, 0.1, 0.1, 0.2}", False),
        ("float[1, 1, 1] k = {0.1}", False),  # the result would lose a dimension
        ("float k = {0.10001}", False),
        ("double k = {0.1}", True),
    ],
)
def test_a_number_matches_a_constant_of_that_value(constant: str, equal: bool) -> None:
    found = matches(lambda op, x: op.Pow(x, 0.1), "y = Pow (a, k)", f", {constant}")
    assert bool(found) is equal


def test_a_number_matches_what_a_half_precision_constant_holds_of_it() -> None:
    header = ", float16 half = {11878}"  # the bits of float16(0.1), 0.0999755859375
    body = "z = Mul (h, half) y = Cast <to = 1> (z)"
    assert matches(lambda op, x: op.Cast(op.Mul(x, 0.1), to=1), body, header)
    assert not matches(lambda op, x: op.Cast(op.Mul(x, 0.1001), to=1), body, header)


@pytest.mark.parametrize(
    ("body", "by"),
    [
        ("y = Div (a, two)", 0.5),
        ("y = Div (a, k)", 1 / 0.3),
        ("m = Div (a, k) y = Mul (m, two)", 2 / 0.3),
        ("m = Mul (two, a) y = Div (m, k)", 2 / 0.3),
    ],
)
def test_a_product_by_a_number_matches_a_division(body: str, by: float) -> None:
    def function(op: PatternOps, x: Pat) -> Pat:
        return op.Mul(x, by) if "m" not in body else op.Mul(op.Mul(x, 1 / 0.3), 2.0)

    header = ", float k = {0.3}"
    (found,) = matches(function, body, header)
    assert names(found) == {"x": "a"}
    assert not matches(lambda op, x: op.Mul(x, by * 1.00001), body, header)


@pytest.mark.parametrize("body", ["y = Div (two, a)", "y = Div (a, none)", "y = Div (a, b)"])
def test_other_divisions_are_no_product_by_a_number(body: str) -> None:
    header = ", float none = {0.0}"
    assert not matches(lambda op, x, k: op.Mul(x, k), body, header)


def test_a_half_that_was_inverted_twice_is_the_number_still() -> None:
    third = np.float16(1 / 3)
    bits = int(np.reciprocal(third).view(np.uint16))
    header = f", float16 k = {{{bits}}}"
    body = "z = Div (h, k) y = Cast <to = 1> (z)"
    assert matches(lambda op, x: op.Cast(op.Mul(x, 1 / 3), to=1), body, header)
    assert not matches(lambda op, x: op.Cast(op.Mul(x, 1 / 3.01), to=1), body, header)


def test_a_list_matches_a_vector_element_by_element() -> None:
    header = ", int64[2] shape = {-1, 4}"
    assert matches(
        lambda op, x: op.Reshape(op.Exp(x), [-1, 4]), "e = Exp (a) y = Reshape (e, shape)", header
    )
    assert not matches(
        lambda op, x: op.Reshape(op.Exp(x), [-1, 2]), "e = Exp (a) y = Reshape (e, shape)", header
    )


def test_a_number_matches_no_computed_value() -> None:
    assert not matches(lambda op, x: op.Mul(x, 2.0), "k = Neg (two) y = Mul (a, k)")


# --- attributes -------------------------------------------------------------------------------


def test_an_attribute_that_is_mentioned_must_be_equal() -> None:
    body = "e = Exp (a) y = Softmax <axis = 0> (e)"
    assert matches(lambda op, x: op.Softmax(x, axis=0), body)
    assert matches(lambda op, x: op.Softmax(x, axis=-2), body)  # the rank is known
    assert not matches(lambda op, x: op.Softmax(x, axis=1), body)


def test_an_attribute_that_is_not_mentioned_must_have_its_default() -> None:
    def function(op: PatternOps, x: Pat) -> Pat:
        return op.Softmax(x)

    assert matches(function, "y = Softmax (a)")
    assert matches(function, "y = Softmax <axis = -1> (a)")
    assert matches(function, "y = Softmax <axis = 1> (a)")  # the last axis too
    assert not matches(function, "y = Softmax <axis = 0> (a)")


def test_an_attribute_that_is_mentioned_may_be_the_default_of_an_absent_one() -> None:
    assert matches(lambda op, x: op.Softmax(x, axis=-1), "y = Softmax (a)")


def test_a_default_is_that_of_the_models_opset() -> None:
    """Softmax's axis is 1 by default before opset 13, and the last one since."""
    body, header = "r = Reshape (a, s) y = Softmax <axis = 1> (r)", ", int64[3] s = {1, -1, 4}"
    assert matches(lambda op, x: op.Softmax(x), body, header, opset=11)
    assert not matches(lambda op, x: op.Softmax(x), body, header, opset=13)


def test_a_wildcard_is_asked_for() -> None:
    body = "z = Cast <to = 10> (a) y = Cast <to = 1> (z)"
    assert matches(lambda op, x: op.Cast(op.Cast(x, to=ANY), to=1), body)
    # `to` has no default, so it must be mentioned.
    assert not matches(lambda op, x: op.Cast(op.Cast(x), to=1), body)


@pytest.mark.parametrize(
    ("opset", "mean"),
    [
        (17, "ReduceMean <axes = [-1]> (a)"),
        (17, "ReduceMean <axes = [1]> (a)"),
        (18, "ReduceMean (a, last)"),
        (24, "ReduceMean <keepdims = 1> (a, last)"),
    ],
)
def test_axes_are_an_attribute_or_an_input(opset: int, mean: str) -> None:
    body = f"m = {mean} y = Add (m, b)"
    assert matches(lambda op, x, z: op.Add(op.ReduceMean(x, axes=[-1]), z), body, opset=opset)
    assert not matches(lambda op, x, z: op.Add(op.ReduceMean(x, axes=[0]), z), body, opset=opset)
    assert not matches(lambda op, x, z: op.Add(op.ReduceMean(x), z), body, opset=opset)


# --- inputs -----------------------------------------------------------------------------------


def test_an_input_that_the_pattern_does_not_give_is_absent() -> None:
    body = "y = Clip (a, one, two)"
    assert not matches(lambda op, x: op.Clip(x), body)
    assert not matches(lambda op, x: op.Clip(x, 1.0), body)
    assert matches(lambda op, x: op.Clip(x, 1.0, ANY), body)
    assert not matches(lambda op, x: op.Clip(x, None, 2.0), body)
    assert matches(lambda op, x: op.Clip(x, None, 2.0), "y = Clip (a, , two)")


# --- noise ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "noise",
    [
        "n = Identity (e)",
        "n = Cast <to = 1> (e)",
        "s = Shape (a) n = Reshape (e, s)",
        "i = Identity (e) n = Cast <to = 1> (i)",
    ],
)
def test_noise_is_looked_through(noise: str) -> None:
    (found,) = matches(lambda op, x: op.Neg(op.Exp(x)), f"e = Exp (a) {noise} y = Neg (n)")
    assert {node.op_type for node in found.nodes} > {"Neg", "Exp"}


@pytest.mark.parametrize(
    "change",
    [
        "n = Cast <to = 11> (e)",
        "t = Cast <to = 10> (e) n = Cast <to = 1> (t)",
        "n = Reshape (e, s)",
    ],
)
def test_what_changes_the_value_is_not(change: str) -> None:
    header = ", int64[3] s = {1, -1, 4}"
    assert not matches(lambda op, x: op.Neg(op.Exp(x)), f"e = Exp (a) {change} y = Neg (n)", header)


def test_a_pattern_may_name_the_noise() -> None:
    body = "e = Exp (a) n = Cast <to = 1> (e) y = Neg (n)"
    found = matches(lambda op, x: op.Neg(op.Cast(op.Exp(x), to=1)), body)
    assert len(found) == 1


# --- alternatives, marks, several roots -------------------------------------------------------


def test_every_alternative_is_tried() -> None:
    def function(op: PatternOps, x: Pat) -> Pat:
        return op.Neg(op.Cast(x, to=1) | x)

    found = matches(function, "w = Cast <to = 1> (h) y = Neg (w)")
    assert [names(one) for one in found] == [{"x": "h"}, {"x": "w"}]


def test_a_match_is_yielded_once() -> None:
    assert len(matches(lambda op, x: op.Mul(x, x), "y = Mul (a, a)")) == 1


def test_named_and_shared_parts_are_reported() -> None:
    def function(op: PatternOps, x: Pat) -> Pat:
        return op.Neg(op.Exp(x).named("e").shared())

    (found,) = matches(function, "e0 = Exp (a) y = Neg (e0)")
    assert names(found) == {"x": "a", "e": "e0"}
    assert {value.name for value in found.may_escape} == {"e0"}


def test_further_roots_are_parts_or_neighbours() -> None:
    def part(op: PatternOps, x: Pat, z: Pat) -> tuple[Pat, Pat]:
        total = op.Add(x, z)
        return op.Exp(total), total

    (found, _) = matches(part, "s = Add (a, b) y = Exp (s)")
    assert [value.name for value in found.outputs] == ["y", "s"]

    def neighbour(op: PatternOps, x: Pat) -> tuple[Pat, Pat]:
        return op.Exp(x), op.Neg(x)

    (found,) = matches(neighbour, "n = Neg (a) other = Neg (b) y = Exp (a)")
    assert [value.name for value in found.outputs] == ["y", "n"]


# --- how far it came --------------------------------------------------------------------------


def closest(function: Function, body: str) -> Closest:
    found = attempt(function, body).closest
    assert found is not None
    return found


def test_the_deepest_partial_match_is_kept() -> None:
    def function(op: PatternOps, x: Pat, z: Pat) -> Pat:
        return op.Add(z, op.Sqrt(op.Exp(op.Softmax(x, axis=0))))

    found = closest(function, "s = Softmax (a) e = Exp (s) r = Sqrt (e) y = Add (b, r)")
    assert [node.op_type for node in found.matched] == ["Add", "Sqrt", "Exp"]
    assert found.part == "Softmax(x)"
    assert str(found) == "expected Softmax with axis=0 at s, got axis=-1"


@pytest.mark.parametrize(
    ("function", "body", "text"),
    [
        (lambda op, x: op.Neg(op.Exp(x)), "e = Log (a) y = Neg (e)", "expected Exp at e, got Log"),
        (lambda op, x: op.Neg(op.Exp(x)), "y = Neg (a)", "expected Exp at a, got the input a"),
        (
            lambda op, x: op.Neg(op.Exp(x)),
            "y = Neg (two)",
            "expected Exp at two, got the constant two",
        ),
        (
            lambda op, x: op.Pow(x, 3.0),
            "y = Pow (a, two)",
            "expected the constant 3.0 at two, got 2.0",
        ),
        (
            lambda op, x: op.Pow(x, 3.0),
            "y = Pow (a, b)",
            "expected the constant 3.0 at b, got the input b",
        ),
        (lambda op, x: op.Clip(x), "y = Clip (a, one)", "expected Clip of 1 inputs at y, got 2"),
        (
            lambda op, x: op.Sub(x, op.Exp(x)),
            "e = Exp (a) y = Sub (b, e)",
            "expected x, which is b at a, got a",
        ),
        (
            lambda op, p, q, r: op.Mul(op.Mul(p, q), r),
            "y = Mul (a, b)",
            "expected 3 operands of Mul at y, got 2",
        ),
    ],
)
def test_the_reason_has_both_sides(function: Function, body: str, text: str) -> None:
    assert str(closest(function, body)) == text


def test_another_root_is_rejected_without_a_word() -> None:
    assert attempt(lambda op, x: op.Neg(x), "y = Exp (a)").closest is None
