"""The rewrite driver and the builder: transactions, names, shapes, provenance, refusals."""

import re
import textwrap
from pathlib import Path

import numpy as np
import pytest

from omforge import ir
from omforge.ir.errors import CheckError, InputError
from omforge.ir.values import dims
from omforge.rewriting import pattern, rewrite
from omforge.rewriting.events import events
from omforge.rewriting.pass_error import PassError
from omforge.rewriting.pipeline import Pipeline
from omforge.rewriting.rewrite import (
    ANY,
    Builder,
    Match,
    NoMatch,
    Pat,
    PatternOps,
    RewritePass,
    splice,
)
from omforge.testing import assert_leaves_alone, assert_rewrites, outline, parse

HEADER = """<ir_version: 11, opset_import: ["" : 24]>
g (float[N, 4] a, float[N, 4] b) => (float[N, 4] y) <float two = {2.0}>
"""


class SquareToPow(RewritePass):
    """Rewrite Mul(x, x) as Pow(x, 2)."""

    name = "square-to-pow"

    def pattern(self, op: PatternOps, x: Pat) -> Pat:
        return op.Mul(x, x)

    def rewrite(self, op: Builder, m: Match) -> ir.Value:
        return op.Pow(m.x, 2.0)


class DropDoubleNeg(RewritePass):
    """Rewrite Neg(Neg(x)) as x."""

    name = "drop-double-neg"

    def pattern(self, op: PatternOps, x: Pat) -> Pat:
        return op.Neg(op.Neg(x))

    def rewrite(self, op: Builder, m: Match) -> ir.Value:
        return m.x


def rewritten(step: RewritePass, text: str) -> ir.Model:
    model = parse(text)
    assert step.run(model) > 0
    return model


# --- what a rewrite leaves behind -------------------------------------------------------------


def test_a_number_has_the_dtype_of_a_value_that_was_just_recorded() -> None:
    model = parse("""<ir_version: 11, opset_import: ["" : 24]>
g (float16[N] a, int32[N] b) => (float16[N] y) { y = Abs (a) }
""")
    a, b = model.graph.inputs
    with Builder(model) as op:
        clipped = op.Clip(op.Round(op.Neg(a)), -128.0, 127.0)
        halved = op.Mul(op.Cast(b, to=ir.DataType.FLOAT16), 0.5)
        counted = op.Add(op.Shape(a), 1)
        numbers = [*clipped.producer().inputs[1:], halved.producer().inputs[1]]
        assert [number.dtype for number in numbers] == [ir.DataType.FLOAT16] * 3
        assert counted.producer().inputs[1].dtype == ir.DataType.INT64


def test_a_number_becomes_an_initializer_that_equal_numbers_share() -> None:
    text = HEADER + "{ p = Mul (a, a) q = Mul (b, b) y = Sub (p, q) }"
    after = HEADER + "{ p = Pow (a, two) q = Pow (b, two) y = Sub (p, q) }"
    model = assert_rewrites(SquareToPow(), text, after)
    assert sorted(model.graph.initializers) == ["const_float_2.0", "two"]


def test_a_graph_output_keeps_its_name_type_and_shape() -> None:
    model = rewritten(SquareToPow(), HEADER + "{ y = Mul (a, a) }")
    (output,) = model.graph.outputs
    node = output.producer()
    assert node is not None
    assert (node.op_type, output.name, output.dtype) == ("Pow", "y", ir.DataType.FLOAT)
    assert str(output.shape) == "[N,4]"


def test_an_inner_value_keeps_its_name_too() -> None:
    model = rewritten(SquareToPow(), HEADER + "{ square = Mul (a, a) y = Neg (square) }")
    assert [value.name for node in model.graph for value in node.outputs] == ["square", "y"]


def test_new_values_inside_get_shapes_and_unique_names() -> None:
    class ToExp(RewritePass):
        name = "to-exp"

        def pattern(self, op: PatternOps, x: Pat) -> Pat:
            return op.Mul(x, x)

        def rewrite(self, op: Builder, m: Match) -> ir.Value:
            return op.Exp(op.Mul(op.Log(m.x), 2.0))

    model = rewritten(ToExp(), HEADER + "{ p = Mul (a, a) q = Mul (b, b) y = Add (p, q) }")
    log, again = (node for node in model.graph if node.op_type == "Log")
    assert log.outputs[0].name != again.outputs[0].name
    assert dims(log.outputs[0]) == dims(model.graph.inputs[0])
    assert len({node.name for node in model.graph}) == len(model.graph)


def test_a_graph_output_that_becomes_an_input_goes_through_an_identity() -> None:
    before = HEADER + "{ n = Neg (a) y = Neg (n) }"
    assert_rewrites(DropDoubleNeg(), before, HEADER + "{ y = Identity (a) }")


def test_an_existing_value_may_be_the_replacement() -> None:
    before = HEADER + "{ e = Exp (a) n = Neg (e) m = Neg (n) y = Log (m) }"
    assert_rewrites(DropDoubleNeg(), before, HEADER + "{ e = Exp (a) y = Log (e) }")


def test_what_only_the_match_used_goes_and_the_rest_stays() -> None:
    class DropScale(RewritePass):
        name = "drop-scale"

        def pattern(self, op: PatternOps, x: Pat, k: Pat) -> Pat:
            return op.Exp(op.Mul(op.Abs(x), k))

        def rewrite(self, op: Builder, m: Match) -> ir.Value:
            return op.Exp(op.Abs(m.x))

    model = rewritten(
        DropScale(),
        HEADER
        + """{
        k = Constant <value_float = 1.0> ()
        k2 = Neg (k)
        k3 = Neg (k2)
        p = Abs (a)
        q = Mul (p, k3)
        r = Exp (q)
        y = Mul (r, two)
    }""",
    )
    assert [node.op_type for node in model.graph] == ["Abs", "Exp", "Mul"]
    assert list(model.graph.initializers) == ["two"]


def test_provenance_is_carried_over() -> None:
    model = parse(HEADER + "{ p = Mul (a, a) y = Neg (p) }")
    square = model.graph[0]
    square.name = "/model/layers.0/mlp/Mul_1"
    square.metadata_props["pkg.torch.onnx.name_scopes"] = "['', 'layers.0', 'layers.0.mlp', 'mul']"
    square.metadata_props["rewritten_by"] = "canonicalize"
    SquareToPow().run(model)
    power = model.graph[0]
    assert power.name == "/model/layers.0/mlp/Pow"
    assert power.metadata_props["rewritten_by"] == "canonicalize,square-to-pow"
    assert ir.layer_path(power) == "layers.0.mlp"


def test_the_layer_path_is_what_all_matched_nodes_share() -> None:
    model = parse(HEADER + "{ p = Neg (a) q = Neg (p) y = Exp (q) }")
    inner, outer, _ = model.graph
    key = "pkg.torch.onnx.name_scopes"
    inner.metadata_props[key] = "['', 'layers.0', 'layers.0.mlp', 'layers.0.mlp.act', 'neg']"
    outer.metadata_props[key] = "['', 'layers.0', 'layers.0.mlp', 'neg_1']"

    class ToAbs(DropDoubleNeg):
        name = "to-abs"

        def rewrite(self, op: Builder, m: Match) -> ir.Value:
            return op.Abs(m.x)

    assert ToAbs().run(model) == 1
    assert ir.layer_path(model.graph[0]) == "layers.0.mlp"


def test_the_same_run_gives_the_same_bytes() -> None:
    text = HEADER + "{ p = Mul (a, a) q = Mul (b, b) y = Sub (p, q) }"
    first, second = (ir.to_proto(rewritten(SquareToPow(), text)) for _ in range(2))
    assert first.SerializeToString(deterministic=True) == second.SerializeToString(
        deterministic=True
    )


def test_a_constant_that_nothing_uses_is_not_left_behind() -> None:
    class Wasteful(SquareToPow):
        name = "wasteful"

        def rewrite(self, op: Builder, m: Match) -> ir.Value:
            op.Exp(op.constant(np.float32(3.0)))
            op.constant(np.float32(4.0))
            return op.Pow(m.x, 2.0)

    model = rewritten(Wasteful(), HEADER + "{ y = Mul (a, a) }")
    assert [node.op_type for node in model.graph] == ["Pow"]
    assert sorted(model.graph.initializers) == ["const_float_2.0", "two"]


# --- several outputs --------------------------------------------------------------------------


class FuseAddExp(RewritePass):
    """Rewrite Exp(a + b) and a + b as outputs of one sum."""

    name = "fuse-add-exp"

    def pattern(self, op: PatternOps, x: Pat, z: Pat) -> tuple[Pat, Pat]:
        total = op.Add(x, z)
        return op.Exp(total), total

    def rewrite(self, op: Builder, m: Match) -> tuple[ir.Value, ir.Value]:
        total = op.Sum(m.x, m.z)
        return op.Exp(total), total


def test_several_roots_are_replaced_at_once() -> None:
    before = HEADER + "{ s = Add (a, b) n = Neg (s) e = Exp (s) y = Mul (n, e) }"
    after = HEADER + "{ s = Sum (a, b) n = Neg (s) e = Exp (s) y = Mul (n, e) }"
    assert_rewrites(FuseAddExp(), before, after)


class FuseSplit(RewritePass):
    """Rewrite Neg(x) and Exp(z) as outputs of one node, wherever they stand."""

    name = "fuse-split"

    def pattern(self, op: PatternOps, x: Pat, z: Pat) -> tuple[Pat, Pat]:
        return op.Exp(op.Add(x, z)), op.Neg(x)

    def rewrite(self, op: Builder, m: Match) -> tuple[ir.Value, ...]:
        double = op.Concat(m.z, m.x, axis=1)
        return op.Split(double, axis=1, num_outputs=2, _outputs=2)


def test_a_splice_that_would_close_a_cycle_is_refused(caplog: pytest.LogCaptureFixture) -> None:
    # z is computed from Neg(x), so no node can give both Neg(x) and something of z.
    text = HEADER + "{ n = Neg (a) z = Abs (n) s = Add (a, z) e = Exp (s) y = Mul (n, e) }"
    assert_leaves_alone(FuseSplit(), text, "z depends on n, and would feed it", caplog)


# --- refusals ---------------------------------------------------------------------------------


class RefuseB(SquareToPow):
    """Rewrite squares, but not of b."""

    name = "refuse-b"

    def rewrite(self, op: Builder, m: Match) -> ir.Value:
        result = op.Pow(m.x, 2.0)
        if m.x.name == "b":
            raise NoMatch("b is holy", m.x)
        return result


def test_a_refusal_leaves_no_trace_but_an_event(caplog: pytest.LogCaptureFixture) -> None:
    text = HEADER + "{ s = Mul (b, b) y = Neg (s) }"
    assert_leaves_alone(RefuseB(), text, "b is holy", caplog)
    model = parse(text)
    RefuseB().run(model)
    (event,) = events(model)
    assert (event.pass_name, event.reason) == ("refuse-b", "b is holy")
    # What had been recorded before the refusal no longer uses b.
    assert [node.op_type for node, _ in model.graph.inputs[1].uses()] == ["Mul", "Mul"]


def test_a_refusal_tries_the_next_alternative() -> None:
    class PreferA(RewritePass):
        name = "prefer-a"

        def pattern(self, op: PatternOps, x: Pat, z: Pat) -> Pat:
            return op.Add(x, z)

        def rewrite(self, op: Builder, m: Match) -> ir.Value:
            if m.x.name != "a":
                raise NoMatch(f"x is {m.x.name}", m.x)
            return op.Sub(m.x, op.Neg(m.z))

    after = HEADER + "{ n = Neg (b) y = Sub (a, n) }"
    assert_rewrites(PreferA(), HEADER + "{ y = Add (b, a) }", after)


def test_an_inner_value_that_is_used_elsewhere_is_refused(caplog: pytest.LogCaptureFixture) -> None:
    text = HEADER + "{ n = Neg (a) m = Neg (n) e = Exp (n) y = Mul (m, e) }"
    assert_leaves_alone(DropDoubleNeg(), text, "n is also used by Exp", caplog)


def test_a_replacement_of_another_type_or_shape_is_refused(
    caplog: pytest.LogCaptureFixture,
) -> None:
    class Narrow(SquareToPow):
        name = "narrow"

        def rewrite(self, op: Builder, m: Match) -> ir.Value:
            return op.Cast(op.Pow(m.x, 2.0), to=ir.DataType.FLOAT16)

    class Widen(SquareToPow):
        name = "widen"

        def rewrite(self, op: Builder, m: Match) -> ir.Value:
            return op.Unsqueeze(m.x, [0])

    text = HEADER + "{ s = Mul (a, a) y = Neg (s) }"
    assert_leaves_alone(Narrow(), text, "the result would be FLOAT16, not FLOAT", caplog)
    assert_leaves_alone(Widen(), text, "the result would be [1, N, 4], not [N, 4]", caplog)


def test_a_near_miss_is_told_with_what_came_closest(caplog: pytest.LogCaptureFixture) -> None:
    class Told(RewritePass):
        name = "told"

        def pattern(self, op: PatternOps, x: Pat) -> Pat:
            return op.Neg(op.Sqrt(op.Softmax(x, axis=0)))

        def near_miss(self, op: PatternOps) -> Pat:
            return op.Sqrt(op.Softmax(ANY, axis=ANY))

    text = HEADER + "{ s = Softmax (a) r = Sqrt (s) y = Neg (r) }"
    assert_leaves_alone(Told(), text, "expected Softmax with axis=0 at s, got axis=-1", caplog)
    alone = HEADER + "{ s = Softmax (a) r = Sqrt (s) y = Exp (r) }"
    assert_leaves_alone(Told(), alone, "nothing that uses it completes the pattern", caplog)


def test_a_pass_that_feeds_itself_is_an_error_that_names_it() -> None:
    class PingPong(RewritePass):
        name = "ping-pong"

        def pattern(self, op: PatternOps, x: Pat, z: Pat) -> Pat:
            return op.Add(x, z)

        def rewrite(self, op: Builder, m: Match) -> ir.Value:
            return op.Add(m.z, m.x)

    with pytest.raises(CheckError, match="ping-pong rewrites its own output without end at Add"):
        PingPong().run(parse(HEADER + "{ y = Add (a, b) }"))


def test_the_larger_of_two_matches_wins() -> None:
    class WithTail(RewritePass):
        name = "with-tail"

        def pattern(self, op: PatternOps, x: Pat, tail: Pat) -> Pat:
            negated = op.Neg(op.Abs(x))
            return op.Add(negated, tail) | negated

        def rewrite(self, op: Builder, m: Match) -> ir.Value:
            absolute = op.Abs(m.x)
            return op.Sub(m.tail, absolute) if "tail" in m else op.Mul(absolute, -1.0)

    before = HEADER + "{ p = Abs (a) n = Neg (p) y = Add (n, b) }"
    assert_rewrites(WithTail(), before, HEADER + "{ p = Abs (a) y = Sub (b, p) }")


def test_subgraphs_are_searched() -> None:
    model = parse("""<ir_version: 11, opset_import: ["" : 24]>
    g (bool c, float[N, 4] a) => (float[N, 4] y) {
        y = If (c) <
            then_branch = t () => (float[N, 4] p) { p = Mul (a, a) },
            else_branch = e () => (float[N, 4] q) { q = Neg (a) }
        >
    }""")
    assert SquareToPow().run(model) == 1
    assert [node.op_type for node in model.graph.all_nodes()] == ["If", "Pow", "Neg"]


# --- Match ------------------------------------------------------------------------------------


class Scale(RewritePass):
    """Rewrite x * k as Sum(x, k), if k suits."""

    name = "scale"

    def pattern(self, op: PatternOps, x: Pat, k: Pat) -> Pat:
        return op.Sub(x, k)

    def rewrite(self, op: Builder, m: Match) -> ir.Value:
        assert m["x"] is m.x
        assert "k" in m
        assert m.get("other") is None
        assert m.root.op_type == "Sub"
        return op.Add(m.x, -m.const("k"))


def test_a_constant_is_a_python_number() -> None:
    text = HEADER + "{ y = Sub (a, two) }"
    model = assert_rewrites(
        Scale(), text, HEADER.replace("{2.0}", "{-2.0}") + "{ y = Add (a, two) }"
    )
    assert list(model.graph.initializers) == ["const_float_-2.0"]


def test_a_variable_that_is_no_one_number_is_refused(caplog: pytest.LogCaptureFixture) -> None:
    assert_leaves_alone(Scale(), HEADER + "{ y = Sub (a, b) }", "k (b) is not a constant", caplog)
    vector = HEADER.replace("float two = {2.0}", "float[4] two = {1,2,3,4}")
    assert_leaves_alone(
        Scale(), vector + "{ y = Sub (a, two) }", "k (two) has shape [4], not one number", caplog
    )


def test_an_unknown_variable_is_an_attribute_error() -> None:
    class Typo(SquareToPow):
        name = "typo"

        def rewrite(self, op: Builder, m: Match) -> ir.Value:
            return m.z

    with pytest.raises(AttributeError, match="the match has no 'z', only x"):
        Typo().run(parse(HEADER + "{ y = Mul (a, a) }"))


@pytest.mark.parametrize(
    ("x", "z", "why"),
    [
        ("B H S D", "B H D S", ""),
        ("... S D", "B H D S", ""),
        ("B H S D", "B H S D", "z (z) is [2, 3, 5, S], not [B H S D] with S = S"),
        ("B 4 S D", "B _ D S", "x (x) is [2, 3, S, 5], not [B 4 S D] with 4 = 4"),
        ("B S D", "_ _ _ _", "x (x) is [2, 3, S, 5], not [B S D]"),
    ],
)
def test_shapes_are_held_against_letters(x: str, z: str, why: str) -> None:
    class Shapes(RewritePass):
        name = "shapes"

        def pattern(self, op: PatternOps, x: Pat, z: Pat) -> Pat:
            return op.MatMul(x, z)

        def rewrite(self, op: Builder, m: Match) -> ir.Value:
            m.shape("x", x)
            m.shape("z", z)
            raise NoMatch("they agree")

    model = parse("""<ir_version: 11, opset_import: ["" : 24]>
    g (float[2, 3, S, 5] x, float[2, 3, 5, S] z) => (float[2, 3, S, S] y) { y = MatMul (x, z) }""")
    Shapes().run(model)
    (event,) = events(model)
    assert event.reason == (why or "they agree")


# --- Builder ----------------------------------------------------------------------------------


@pytest.fixture
def model() -> ir.Model:
    return parse(HEADER.replace("b)", "b, float16[N, 4] h, int64[N] i)") + "{ y = Mul (a, b) }")


def inputs(model: ir.Model) -> dict[str, ir.Value]:
    return {str(value.name): value for value in model.graph.inputs}


def test_numbers_take_the_type_that_the_operator_asks_for(model: ir.Model) -> None:
    given = inputs(model)
    with Builder(model) as op:
        op.Mul(given["h"], 2.0)  # as the other operand
        op.Mul(given["i"], 2)
        op.Mul(2, given["a"])
        op.Unsqueeze(given["h"], [0])  # axes are int64 whatever x is
        op.Reshape(given["a"], [-1])
        op.Pow(given["h"], 2.0)  # the exponent has a type of its own
        op.Concat(given["i"], [1], axis=0)  # variadic
        op.Add(given["a"], np.array([1, 2], dtype=np.int32))  # an array stays as it is
    assert list(op.constants) == [
        "const_float16_2.0",
        "const_int64_2",
        "const_float_2.0",
        "const_int64_[0]",
        "const_int64_[-1]",
        "const_int64_[1]",
        "const_int32_[1,2]",
    ]


def test_attributes_take_the_type_that_the_operator_asks_for(model: ir.Model) -> None:
    a = inputs(model)["a"]
    with Builder(model) as op:
        op.RMSNormalization(a, a, axis=-1, epsilon=1, stash_type=ir.DataType.FLOAT)
        op.Gelu(a, approximate="tanh")
        op.Transpose(a, perm=())
        op.Split(a, num_outputs=None, axis=True)
        norm, gelu, transpose, split = op.nodes
    assert norm.attributes["epsilon"].type is ir.AttributeType.FLOAT
    assert norm.attributes["stash_type"].value == 1
    assert gelu.attributes["approximate"].value == "tanh"
    assert transpose.attributes["perm"].type is ir.AttributeType.INTS
    assert [(name, a.value) for name, a in split.attributes.items()] == [("axis", 1)]


def test_a_misspelt_attribute_is_an_error(model: ir.Model) -> None:
    with Builder(model) as op, pytest.raises(TypeError, match="no attribute 'eps'; did you mean"):
        op.RMSNormalization(inputs(model)["a"], inputs(model)["a"], eps=1e-5)


def test_an_operator_that_came_later_is_an_error() -> None:
    model = parse(HEADER.replace("24", "20") + "{ y = Mul (a, a) }")
    with Builder(model) as op, pytest.raises(InputError) as caught:
        op.Swish(model.graph.inputs[0])
    assert str(caught.value) == (
        "a rewrite makes Swish: it came with opset 24, and the model has opset 20. "
        "Run convert-opset before"
    )


def test_large_constants_are_named_by_hash_or_by_the_caller(model: ir.Model) -> None:
    with Builder(model) as op:
        table = np.arange(12, dtype=np.float32).reshape(3, 4)
        assert op.constant(table) is op.constant(table.copy())
        assert str(op.constant(table).name).startswith("const_float_3x4_")
        assert op.constant(table, "cos").name == "cos"
        assert op.constant(table + 1, "cos").name == "cos_1"
        assert op.constant(np.float32(2.0), "two").name == "two_1"  # the graph has a `two`


def test_a_builder_that_is_not_spliced_leaves_no_uses(model: ir.Model) -> None:
    a = inputs(model)["a"]
    with Builder(model) as op:
        op.Exp(op.Neg(a))
        assert len(a.uses()) == 2
    assert [node.op_type for node, _ in a.uses()] == ["Mul"]


def test_nodes_of_another_domain_import_it(model: ir.Model) -> None:
    (product,) = model.graph
    with Builder(model) as op:
        a = inputs(model)["a"]
        new, extra = op.NPURmsNorm(a, a, _domain="npu", _outputs=2)
        splice(op, product.outputs, [new], by="lower")
    assert model.opset_imports == {"": 24, "npu": 1}
    assert extra.producer() is new.producer()
    assert outline(model)[-2] == "y, %5 = npu.NPURmsNorm(a, a)"


def test_a_named_constant_does_not_take_the_name_of_a_value() -> None:
    model = parse("""<ir_version: 11, opset_import: ["" : 24]>
        g (float[N] x) => (float[N] y) { w = Neg (x) y = Neg (w) }""")
    op = Builder(model)
    assert op.constant(np.ones(3, np.float32), "w").name == "w_1"
    assert op.constant(np.ones(3, np.float32), "x").name == "x_1"
    assert op.constant(np.ones(3, np.float32), "v").name == "v"


# --- where a new author stumbles --------------------------------------------------------------


class Misspelt(SquareToPow):
    """Names an operator that ONNX does not have."""

    name = "misspelt"

    def pattern(self, op: PatternOps, x: Pat) -> Pat:
        return op.Sigmiod(op.Neg(x))


def test_a_pattern_that_can_match_nothing_is_an_error_when_the_pass_is_made() -> None:
    with pytest.raises(InputError) as caught:
        Misspelt()
    assert caught.value.what == "the pattern of Misspelt can match nothing"
    assert "ONNX has no operator 'Sigmiod': did you mean Sigmoid?" in caught.value.why
    assert caught.value.next_step == "Mend Misspelt.pattern, or near_miss"


def test_a_pattern_that_is_none_is_an_error_too() -> None:
    class Forgets(SquareToPow):
        name = "forgets"

        def pattern(self, op: PatternOps, x: Pat):  # type: ignore[override]
            op.Mul(x, x)

    with pytest.raises(InputError, match=r"the function returned nothing \(None\)"):
        Forgets()


def test_a_node_of_the_wrong_arity_is_an_error_where_it_is_made() -> None:
    class Half(SquareToPow):
        name = "half"

        def rewrite(self, op: Builder, m: Match) -> ir.Value:
            return op.Mul(m.x)

    with pytest.raises(TypeError, match="Mul takes 2 inputs, and not 1") as caught:
        Half().run(parse(HEADER + "{ y = Mul (a, a) }"))
    assert caught.value.__notes__ == ["at Mul -> y"]


@pytest.mark.parametrize(
    ("made", "what"),
    [
        (None, "returned nothing (None) at Mul -> y"),
        (lambda m: (m.x, m.x), "returned 2 results (Value, Value) at Mul -> y"),
        (lambda m: 3, "returned 1 results (int) at Mul -> y"),
        (lambda m: m.root, "returned 1 results (Node) at Mul -> y"),
    ],
)
def test_what_is_no_replacement_names_pass_and_place(made, what: str) -> None:
    class Odd(SquareToPow):
        name = "odd"

        def rewrite(self, op: Builder, m: Match):  # type: ignore[override]
            return made(m) if made else None

    with pytest.raises(CheckError) as caught:
        Odd().run(parse(HEADER + "{ y = Mul (a, a) }"))
    assert caught.value.what == f"odd {what}"
    assert "one value for each root of the pattern, which has 1" in caught.value.why
    assert "raise NoMatch" in caught.value.next_step


def test_what_a_rewrite_raises_names_pass_and_place() -> None:
    class Fails(SquareToPow):
        name = "fails"

        def rewrite(self, op: Builder, m: Match) -> ir.Value:
            raise KeyError("a bug")

    with pytest.raises(PassError) as caught:
        Pipeline((Fails(),)).run(parse(HEADER + "{ y = Mul (a, a) }"))
    assert caught.value.what == "the pass fails failed with KeyError: 'a bug'"
    assert caught.value.why.startswith(f"at Mul -> y; that is a fault of {__name__}:test_what_a_")
    assert caught.value.why.endswith(" in rewrite")
    assert caught.value.__notes__ == ["in pass 1 of 1, fails"]


def code_of(text: str) -> str:
    """The first block of code in a docstring or a page, as it stands there."""
    block = re.search(r"::\n\n((?:    .*\n|\n)+)|```python\n((?:.*\n)*?)```", text)
    assert block is not None
    return textwrap.dedent(block.group(1) or block.group(2))


def test_the_example_of_the_pattern_language_is_real() -> None:
    """The docstring's pattern, as the method of a pass, matches an RMS norm."""
    method = textwrap.indent(code_of(pattern.__doc__ or ""), "    ")
    code = f'class Norm(RewritePass):\n    name = "norm"\n{method}\n'
    code += "    def rewrite(self, op, m):\n"
    code += "        return op.RMSNormalization(m.x, m.gamma, epsilon=m.const('eps'))\n"
    scope = {"RewritePass": RewritePass, "PatternOps": PatternOps, "Pat": Pat}
    exec(code, scope)
    before = """<ir_version: 11, opset_import: ["" : 24]>
g (float[N, 4] x) => (float[N, 4] y)
<float two = {2.0}, float eps = {0.001}, float[4] gamma = {1, 2, 3, 4}, int64[1] last = {-1}> {
    s = Pow (x, two) m = ReduceMean (s, last) e = Add (m, eps) r = Sqrt (e)
    d = Div (x, r) y = Mul (d, gamma) }"""
    after = """<ir_version: 11, opset_import: ["" : 24]>
g (float[N, 4] x) => (float[N, 4] y) <float[4] gamma = {1, 2, 3, 4}>
{ y = RMSNormalization <epsilon = 0.001> (x, gamma) }"""
    assert_rewrites(scope["Norm"](), before, after)


def test_the_example_of_the_rules_is_real() -> None:
    page = Path(rewrite.__file__).parent.parent / "passes" / "README.md"
    scope = dict(vars(rewrite)) | {"ir": ir}
    exec(code_of(page.read_text()), scope)
    before = HEADER + "{ g = Sigmoid (a) y = Mul (a, g) }"
    assert_rewrites(scope["FuseSwish"](), before, HEADER + "{ y = Swish (a) }")
