"""The verifier: a valid model passes, and each fault is found, named and explained."""

import time

import numpy as np
import pytest

from omforge import ir

VALID = """<ir_version: 10, opset_import: ["" : 20]>
g (float[N, 4] x, bool c) => (float[N, 4] y) <float[4] b = {1, 2, 3, 4}> {
    [add] h = Add (x, b)
    [norm] n = LayerNormalization <axis = -1> (h, b)
    [if] y = If (c) <
        then_branch = then () => (float[N, 4] t) { t = Mul (n, b) },
        else_branch = other () => (float[N, 4] t) { t = Neg (h) }>
}"""


def valid() -> ir.Model:
    return ir.from_onnx_text(VALID)


def node(model: ir.Model, name: str) -> ir.Node:
    return next(n for n in model.graph if n.name == name)


def only(model: ir.Model) -> ir.Diagnostic:
    """The single diagnostic of a model with one fault, complete in all its parts."""
    diagnostics = ir.verify(model)
    assert len(diagnostics) == 1, ir.format_diagnostics(diagnostics)
    (found,) = diagnostics
    assert found.where
    assert found.why
    assert found.remedy
    return found


def text(body: str, header: str = '<ir_version: 10, opset_import: ["" : 20]>') -> ir.Model:
    return ir.from_onnx_text(f"{header}\ng (float[4] x, int64[4] i) => (float[4] y) {{ {body} }}")


def test_a_valid_model_has_nothing_to_say():
    assert ir.verify(valid()) == []
    ir.check(valid())


@pytest.mark.parametrize("route", ["optimum", "dynamo", "hfexporter", "torchscript-op17"])
@pytest.mark.parametrize("family", ["llama_gqa", "mistral"])
def test_real_exports_are_valid(exported, route, family):
    assert ir.verify(ir.load(exported(route, family))) == []


def test_duplicate_value_name():
    model = valid()
    node(model, "norm").outputs[0].name = "h"
    found = only(model)
    assert found.code == "duplicate-value-name"
    assert found.where == "value h of LayerNormalization norm"


def test_a_branch_may_not_hide_an_outer_name_but_branches_may_agree():
    model = valid()
    branch = node(model, "if").attributes["then_branch"].as_graph()
    branch.outputs[0].name = "h"
    assert only(model).code == "duplicate-value-name"


def test_duplicate_node_name():
    model = valid()
    node(model, "norm").name = "add"
    assert only(model).code == "duplicate-node-name"


def test_unnamed_value():
    model = valid()
    node(model, "add").outputs[0].name = None
    assert only(model).code == "unnamed-value"


def test_use_before_definition():
    model = valid()
    norm = node(model, "norm")
    model.graph.remove(norm)
    model.graph.insert_before(node(model, "add"), norm)
    found = only(model)
    assert found.code == "use-before-definition"
    assert found.where == "LayerNormalization norm input h"
    model.graph.sort()
    assert ir.verify(model) == []


def test_undefined_value():
    model = valid()
    node(model, "add").replace_input_with(1, ir.val("nowhere"))
    found = only(model)
    assert found.code == "undefined-value"
    assert found.where == "Add add input nowhere"


def test_dangling_edge_left_by_an_unsafe_remove():
    model = valid()
    model.graph.remove(node(model, "norm"))  # onnx-ir's default is unsafe
    *stale, found = ir.verify(model)
    assert {each.code for each in stale} == {"stale-use"}
    assert found.code == "dangling-edge"
    assert "input n" in found.where


def test_missing_output_and_type():
    model = valid()
    model.graph.outputs[0] = ir.val("z")
    codes = [d.code for d in ir.verify(model)]
    assert codes == ["missing-type", "missing-output"]


def test_initializer_without_value():
    model = valid()
    model.graph.initializers["b"].const_value = None
    assert only(model).code == "empty-initializer"


@pytest.mark.parametrize(
    ("body", "code", "what"),
    [
        ("y = Add (x)", "arity", "Add has 1 inputs"),
        ("y = Add (x, x, x)", "arity", "Add has 3 inputs"),
        ("y, z = Add (x, x)", "arity", "Add has 2 outputs"),
        ('y = Clip ("", x)', "missing-input", "Clip lacks its input input"),
        ("y = Softmax <axes = -1> (x)", "unknown-attribute", "Softmax has no attribute axes"),
        ("y = Softmax <axis = 1.0> (x)", "attribute-type", "attribute axis of Softmax is of type"),
        ("y = Cast (x)", "missing-attribute", "Cast lacks its attribute to"),
        ("y = Sofmax (x)", "unknown-op", "operator Sofmax is unknown"),
        ("y = Swish (x)", "unknown-op", "operator Swish is unknown"),
        ("y = Scatter (x, i, x)", "deprecated-op", "Scatter is deprecated at this opset"),
        ("y = my.Op (x)", "missing-opset-import", "domain 'my' is used but not imported"),
        ("y = Sqrt (i)", "input-type", "Sqrt does not take INT64 as X"),
        ("y = Add (x, i)", "mixed-types", "inputs of Add have different types"),
        ("y = Concat <axis = 0> (x, x, i)", "mixed-types", "inputs of Concat have different types"),
        ("y = NPURmsNorm (x)", "arity", "NPURmsNorm has 1 inputs"),
    ],
)
def test_nodes_are_held_against_their_schema(body, code, what):
    found = only(text(body))
    assert found.code == code
    assert found.what.startswith(what)


@pytest.mark.parametrize(
    "body",
    [
        'y = Clip (x, "", x)',
        "y = Softmax <axis = -1> (x)",
        "c = Cast <to = 9> (x) y = Where (c, x, x)",
        "y = SimplifiedLayerNormalization (x, x)",
        "y, z = NPURmsNorm (x, x)",
    ],
)
def test_optional_inputs_and_known_exceptions_pass(body):
    assert ir.verify(text(body)) == []


def test_an_unknown_op_says_which_opset_has_it():
    found = only(text("y = Swish (x)"))
    assert found.why == "the model imports opset 20 of ai.onnx, and Swish came with 24"
    assert found.remedy == "Convert the model's opset first"


def test_other_vendors_ops_and_model_functions_have_no_schema():
    model = ir.from_onnx_text("""<ir_version: 10, opset_import: ["" : 20, "my" : 1, "v" : 1]>
g (float[4] x) => (float[4] y) { h = my.Twice (x) y = v.Anything <a = 1> (h, h) }
<domain: "my", opset_import: ["" : 20]> Twice (a) => (b) { b = Add (a, a) }""")
    assert ir.verify(model) == []
    function = next(iter(model.functions.values()))
    function[0].op_type = "Addd"
    assert only(model).code == "unknown-op"


def test_names_the_nearest_operator():
    """A misspelt one has it; what came with a later opset is known."""
    model = ir.from_onnx_text("""<ir_version: 10, opset_import: ["" : 20]>
g (float[4] x) => (float[4] y) { h = Sofmax (x) y = Qwertyuiop (h) }""")
    first, second = ir.verify(model)
    assert first.remedy == "Did you mean Softmax?"
    assert second.remedy == "Check its spelling and domain"


def test_a_node_that_was_removed_and_still_uses_a_value():
    """onnx-ir's own remove() leaves the inputs of a node as they are, unless it is told `safe`."""
    model = ir.from_onnx_text("""<ir_version: 10, opset_import: ["" : 20]>
g (float[4] x) => (float[4] y) { h = Relu (x) y = Neg (x) }""")
    model.graph.remove(model.graph[0])
    found = only(model)
    assert found.code == "stale-use"
    assert "used by Relu -> h, which is in no graph" in found.what


def test_collects_every_fault():
    model = valid()
    node(model, "norm").outputs[0].name = "h"
    node(model, "if").attributes["then_branch"].as_graph()[0].op_type = "Mull"
    assert [d.code for d in ir.verify(model)] == ["duplicate-value-name", "unknown-op"]


def test_check_lists_all_faults_and_shows_the_neighbours_of_the_first():
    model = valid()
    node(model, "add").op_type = "Ad"
    node(model, "norm").op_type = "Norm"
    with pytest.raises(ir.CheckError) as error:
        ir.check(model)
    message = str(error.value)
    assert message.startswith("the model has 2 faults")
    assert "operator Ad is unknown" in message
    assert "operator Norm is unknown" in message
    assert "> h = Ad(x, b)\n  n = Norm(h, b)\n  y = If(c)" in message
    assert error.value.exit_status == 1


def test_six_thousand_nodes_take_less_than_half_a_second():
    x = ir.val("x", ir.DataType.FLOAT, [4])
    b = ir.val("b", const_value=ir.tensor(np.ones(4, np.float32), name="b"))
    nodes: list[ir.Node] = []
    last = x
    for index in range(6000):
        nodes.append(ir.node("Add", [last, b], name=f"n{index}"))
        last = nodes[-1].outputs[0]
        last.name = f"v{index}"
    last.type = x.type
    graph = ir.Graph([x], [last], nodes=nodes, initializers=[b], opset_imports={"": 20})
    model = ir.Model(graph, ir_version=10)
    start = time.perf_counter()
    assert ir.verify(model) == []
    assert time.perf_counter() - start < 0.5
