"""Edits leave a graph whole: names unique, interfaces as they were, nothing dangling."""

import numpy as np
import pytest

from omforge import ir
from omforge.ir.edit import (
    add_initializer,
    fresh_name,
    remove_dead,
    replace_value,
    take_name,
    value_names,
)
from omforge.testing import parse
from tests.ir.symbolic import inferred, value


def nodes(model: ir.Model) -> list[str]:
    return [node.op_type for node in model.graph]


def interface(model: ir.Model) -> tuple[list[str], list[str]]:
    return [v.name for v in model.graph.inputs], [v.name for v in model.graph.outputs]


# -- replace_value


def test_all_uses_use_the_new_value():
    model = inferred("float[n] x", "a = Neg (x) b = Abs (a) y = Add (a, b)")
    assert replace_value(value(model, "a"), model.graph.inputs[0])
    assert [v.name for v in model.graph[2].inputs] == ["x", "b"]
    assert not value(model, "a").uses()
    assert remove_dead(model) == 1
    ir.check(model)


def test_uses_inside_subgraphs_follow():
    model = inferred(
        "float[n] x, bool c",
        """a = Neg (x)
           y = If (c) <
            then_branch = t () => (float[n] u) { u = Neg (a) },
            else_branch = e () => (float[n] w) { w = Abs (x) }>""",
    )
    assert replace_value(value(model, "a"), model.graph.inputs[0])
    branch = model.graph[1].attributes["then_branch"].as_graph()
    assert branch[0].inputs[0] is model.graph.inputs[0]
    assert remove_dead(model) == 1


def test_a_graph_output_keeps_its_name():
    model = inferred("float[n] x", "a = Abs (x) y = Neg (a)")
    assert replace_value(value(model, "y"), value(model, "a"))
    remove_dead(model)
    assert (nodes(model), interface(model)) == (["Abs"], (["x"], ["y"]))
    ir.check(model)


def test_an_output_replaced_twice_leaves_unique_names():
    model = inferred("float[n] x", "a = Abs (x) b = Neg (a) y = Exp (b)")
    assert replace_value(value(model, "y"), value(model, "b"))
    assert replace_value(value(model, "y"), value(model, "a"))
    names = [v.name for node in model.graph for v in node.outputs]
    assert len(set(names)) == 3
    assert interface(model) == (["x"], ["y"])
    ir.check(model)


def test_a_new_output_has_a_type_and_a_shape():
    model = inferred("float[n] x", "y = Abs (x)")
    new = ir.node("Neg", [model.graph.inputs[0]])
    model.graph.append(new)
    old = value(model)
    assert replace_value(old, new.outputs[0])
    (output,) = model.graph.outputs
    assert (output.name, output.dtype, output.shape) == ("y", ir.DataType.FLOAT, ["n"])


def test_an_output_stays_where_it_would_lose_its_name():
    model = ir.from_onnx_text("""<ir_version: 10, opset_import: ["" : 20]>
        g (float[2] x) => (float[2] y, float[2] z) <float[2] w = {1, 2}> {
            y = Identity (x)
            z = Add (x, w)
        }""")
    before = ir.to_text(model)
    y = model.graph.outputs[0]
    for new in (model.graph.inputs[0], model.graph.outputs[1], model.graph.initializers["w"]):
        assert not replace_value(y, new)
    assert ir.to_text(model) == before


def test_an_input_that_is_an_output_stays():
    model = ir.from_onnx_text("""<ir_version: 10, opset_import: ["" : 20]>
        g (float[2] x) => (float[2] x, float[2] y) { a = Abs (x) y = Neg (a) }""")
    assert not replace_value(model.graph.inputs[0], value(model, "a"))
    assert interface(model) == (["x"], ["x", "y"])


# -- remove_dead


def test_removes_chains_that_no_output_depends_on_and_their_constants():
    model = inferred(
        "float[n] x, float[n] unused",
        "a = Mul (x, w) b = Neg (a) c = Abs (b) y = Add (x, v)",
        "float w = {2}, float v = {3}",
    )
    assert remove_dead(model) == 3
    assert (nodes(model), list(model.graph.initializers)) == (["Add"], ["v"])
    assert interface(model) == (["x", "unused"], ["y"])  # an input is a promise
    assert remove_dead(model) == 0


def test_keeps_a_node_of_which_any_output_is_used():
    model = inferred("float[n, 4] x", "a, y = Split <axis = 1, num_outputs = 2> (x)")
    assert remove_dead(model) == 0
    assert [v.name for v in model.graph[0].outputs] == ["a", "y"]


def test_keeps_what_only_a_subgraph_uses():
    model = inferred(
        "float[n] x, bool c",
        """a = Mul (x, w)
           y = If (c) <
            then_branch = t () => (float[n] u) { u = Neg (a) },
            else_branch = e () => (float[n] v) { v = Add (x, k) }>""",
        "float w = {2}, float k = {3}",
    )
    assert remove_dead(model) == 0
    assert sorted(model.graph.initializers) == ["k", "w"]


# -- names and initializers


@pytest.fixture
def branching() -> ir.Model:
    return inferred(
        "float[n] x, bool c",
        """a = Mul (x, w)
           y = If (c) <
            then_branch = t () => (float[n] inner) <float two = {2}> { inner = Mul (a, two) },
            else_branch = e () => (float[n] other) { other = Neg (x) }>""",
        "float w = {2}",
    )


def test_names_of_subgraphs_count(branching):
    names = {"x", "c", "w", "a", "y", "inner", "two", "other"}
    assert value_names(branching.graph) == names
    assert [fresh_name(branching.graph, stem) for stem in ("z", "w", "inner")] == [
        "z",
        "w_1",
        "inner_1",
    ]


def test_new_names_are_taken_at_once(branching):
    taken = value_names(branching.graph)
    assert [fresh_name(branching.graph, "w", taken) for _ in range(3)] == ["w_1", "w_2", "w_3"]
    assert {"w_1", "w_2", "w_3"} <= taken


def test_an_initializer_is_typed_registered_and_new(branching):
    array = np.arange(6, dtype=np.float16).reshape(2, 3)
    first = add_initializer(branching.graph, "w", array.T)
    assert first.name == "w_1"
    assert branching.graph.initializers["w_1"] is first
    assert (first.dtype, first.shape) == (ir.DataType.FLOAT16, [3, 2])
    np.testing.assert_array_equal(first.const_value.numpy(), array.T)
    taken = value_names(branching.graph)
    assert add_initializer(branching.graph, "w", array, taken).name == "w_2"
    assert add_initializer(branching.graph, "w", np.float32(1), taken).shape == []
    ir.check(branching)


def test_whatever_bears_a_name_gives_way() -> None:
    text = """<ir_version: 11, opset_import: ["" : 24]>
    g (float[2] x) => (float[2] y) <float[2] ids = {1, 2}> { z = Add (x, ids) y = Neg (z) }"""
    model = parse(text)
    graph = model.graph
    take_name(graph, graph.inputs[0], "ids")
    take_name(graph, graph.outputs[0], "z")
    ir.check(model)
    assert [value.name for value in (*graph.inputs, *graph.outputs)] == ["ids", "z"]
    assert list(graph.initializers) == ["ids_exported"]
    assert [node.outputs[0].name for node in graph] == ["z_exported", "z"]
