"""Patterns: what the expressions mean before any graph is seen."""

import pytest

from omforge.rewriting.pattern import ANY, Marked, Or, Output, Pat, Pattern, PatternOps, Var


def test_a_pattern_reads_like_the_model() -> None:
    def function(op: PatternOps, x: Pat, eps: Pat) -> Pat:
        return op.Sqrt(op.Add(op.ReduceMean(op.Mul(x, x), axes=[-1]), eps))

    (root,) = Pattern(function).roots
    assert isinstance(root, Output)
    assert root.call.op_type == "Sqrt"
    assert str(root) == "Sqrt(Add(…))"


def test_parameters_after_op_are_variables() -> None:
    (root,) = Pattern(lambda op, x: x).roots
    assert isinstance(root, Var)
    assert root.name == "x"


def test_numbers_and_lists_stand_for_constants() -> None:
    (root,) = Pattern(lambda op, x: op.Reshape(op.Mul(x, 2), [0, -1])).roots
    assert str(root) == "Reshape(Mul(…), [0, -1])"


def test_alternatives_of_the_root_decide_where_to_look() -> None:
    assert Pattern(lambda op, x: op.Mul(x, 2.0) | op.Cast(op.Exp(x), to=ANY)).root_ops == {
        "Mul",
        "Div",  # by a number: a product
        "Cast",
    }
    assert Pattern(lambda op, x: op.Mul(x, 2.0).named("y").shared()).root_ops == {"Mul", "Div"}
    assert Pattern(lambda op, x: op.Mul(x, 2.0) | x).root_ops is None


def test_a_tuple_has_several_roots() -> None:
    def function(op: PatternOps, x: Pat) -> tuple[Pat, Pat]:
        total = op.Add(x, 1.0)
        return op.Exp(total), total

    pattern = Pattern(function)
    assert len(pattern.roots) == 2
    assert pattern.root_ops == {"Exp"}


def test_outputs_of_one_node_are_patterns_of_one_node() -> None:
    def function(op: PatternOps, x: Pat) -> Pat:
        left, right = op.Split(x, num_outputs=2, _outputs=2)
        return op.Mul(left, right)

    pattern = Pattern(function)
    (root,) = pattern.roots
    assert isinstance(root, Output)
    left, right = root.call.inputs
    assert isinstance(left, Output)
    assert isinstance(right, Output)
    assert left.call is right.call
    assert (left.index, right.index) == (0, 1)
    assert left.call in pattern.shared


def test_a_part_of_two_alternatives_stands_in_one_place() -> None:
    def function(op: PatternOps, x: Pat) -> Pat:
        norm = op.Exp(x)
        return op.Cast(norm, to=ANY) | norm

    assert not Pattern(function).shared & {Pattern(function).roots[0]}
    pattern = Pattern(function)
    assert not any(isinstance(key, Output) for key in pattern.shared)


def test_a_part_that_stands_twice_is_shared() -> None:
    def function(op: PatternOps, x: Pat) -> Pat:
        wide = op.Cast(x, to=1) | x
        return op.Div(wide, op.Sqrt(wide))

    assert any(isinstance(key, Or) for key in Pattern(function).shared)


def chains(function: object) -> list[list[str]]:
    pattern = Pattern(function)  # type: ignore[arg-type]
    (root,) = pattern.roots
    assert isinstance(root, Output)
    return [sorted(map(str, operands)) for operands in pattern.chains(root.call)]


def test_nested_products_are_one_chain() -> None:
    assert chains(lambda op, a, b, c: op.Mul(op.Mul(a, b), c)) == [["a", "b", "c"]]
    assert chains(lambda op, a, b, c: op.Mul(op.Add(a, b), c)) == [["Add(a, b)", "c"]]
    assert chains(lambda op, a, b, c: op.Max(op.Max(a, b), c)) == [["Max(a, b)", "c"]]


def test_each_alternative_of_a_factor_is_a_chain() -> None:
    found = chains(lambda op, a, b, c: op.Mul(op.Mul(a, b) | op.Div(a, b), c))
    assert found == [["a", "b", "c"], ["Div(a, b)", "c"]]


def test_a_named_or_repeated_factor_is_one_operand() -> None:
    assert chains(lambda op, a, b, c: op.Mul(op.Mul(a, b).named("ab"), c)) == [["ab", "c"]]

    def repeated(op: PatternOps, a: Pat, b: Pat) -> Pat:
        ab = op.Mul(a, b)
        return op.Mul(ab, op.Exp(ab))

    assert chains(repeated) == [["Exp(Mul(…))", "Mul(a, b)"]]


def test_marks_wrap_a_pattern() -> None:
    (root,) = Pattern(lambda op, x: op.Exp(x).shared()).roots
    assert isinstance(root, Marked)
    assert root.may_escape


def test_an_attribute_that_the_operator_never_had_is_an_error() -> None:
    with pytest.raises(TypeError, match="ReduceMean has no attribute 'axis', only"):
        Pattern(lambda op, x: op.ReduceMean(x, axis=-1))
    # An attribute of an older opset is fine, and so is any of an operator that ONNX does not have.
    Pattern(lambda op, x: op.ReduceMean(x, axes=[-1]))
    Pattern(lambda op, x: op.FastGelu(x, fast=1, _domain="com.microsoft"))


@pytest.mark.parametrize(
    ("made", "why"),
    [
        (lambda op: op.Sigmiod("x"), "ONNX has no operator 'Sigmiod': did you mean Sigmoid?"),
        (lambda op: op.MyOwn(1.0), "ONNX has no operator 'MyOwn': name its domain with _domain="),
        (lambda op: op.Add(1.0, 2.0, 3.0), "Add takes 2 inputs, and not 3"),
        (lambda op: op.Where(1.0), "Where takes 3 inputs, and not 1"),
        (lambda op: op.TopK(1.0, 2, _outputs=3), "TopK has 2 outputs, and not 3"),
        (lambda op: op.NPURmsNorm(1.0), "NPURmsNorm takes 2 inputs, and not 1"),
    ],
)
def test_what_no_node_can_be_is_an_error(made, why: str) -> None:
    with pytest.raises(TypeError) as caught:
        Pattern(lambda op: made(op))
    assert str(caught.value) == why


def test_operators_of_other_domains_and_of_any_opset_are_taken() -> None:
    for made in (
        lambda op: op.MyOwn(1.0, 2.0, _domain="mine"),
        lambda op: op.Scatter(1.0, 2, 3.0),
        lambda op: op.Squeeze(1.0, axes=[0]),
        lambda op: op.Concat(1.0, 2.0, 3.0, axis=0),
        lambda op: op.SkipLayerNormalization(1.0, 2.0, 3.0, _domain="com.microsoft"),
    ):
        Pattern(made)
