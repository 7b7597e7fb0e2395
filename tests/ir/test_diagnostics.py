"""Where a node comes from, and how faults are grouped and printed."""

import pytest

from omforge import ir
from omforge.ir.diagnostics import NAME_SCOPES, group


def node(name: str = "", scopes: str = "") -> ir.Node:
    made = ir.node("Softmax", [ir.val("x")], name=name)
    if scopes:
        made.metadata_props[NAME_SCOPES] = scopes
    return made


@pytest.mark.parametrize(
    ("name", "scopes", "path"),
    [
        ("/model/layers.0/self_attn/Softmax", "", "model.layers.0.self_attn"),
        ("/model/layers.0/self_attn/q_proj/MatMul", "", "model.layers.0.self_attn.q_proj"),
        ("/Softmax", "", ""),
        ("node_Softmax_12", "", ""),
        ("", "", ""),
        ("node_Softmax_12", "['', 'm', 'm.layers.0', 'softmax']", "m.layers.0"),
        ("/model/other/Softmax", "['', 'm', 'm.layers.0', 'softmax']", "m.layers.0"),
        ("node_Softmax_12", "['softmax']", ""),
        ("node_Softmax_12", "not a list", ""),
        ("node_Softmax_12", "{'a': 1}", ""),
    ],
)
def test_layer_path(name, scopes, path):
    assert ir.layer_path(node(name, scopes)) == path


@pytest.mark.parametrize("route", ["optimum", "dynamo", "hfexporter", "torchscript-op17"])
def test_every_exporters_softmax_has_its_layer(exported, route):
    model = ir.load(exported(route, "llama_gqa"))
    paths = [ir.layer_path(n) for n in model.graph if n.op_type == "Softmax"]
    assert [path.removeprefix("m.") for path in paths] == [
        "model.layers.0.self_attn",
        "model.layers.1.self_attn",
    ]


def test_describe_names_operator_node_and_layer():
    assert ir.describe(node("/a/b/Softmax")) == "Softmax /a/b/Softmax"
    assert ir.describe(node("n", "['', 'm.layers.0', 's']")) == "Softmax n in m.layers.0"
    nameless = ir.node("Softmax", [ir.val("x")])
    nameless.outputs[0].name = "probs"
    assert ir.describe(nameless) == "Softmax -> probs"


def fault(where: str, what: str = "Trilu is illegal") -> ir.Diagnostic:
    return ir.Diagnostic(where, what, "ATC has no Trilu", "Run fold-constants", "illegal")


def test_str_is_one_line_with_place_reason_and_remedy():
    assert str(fault("layer 0")) == (
        "layer 0: Trilu is illegal: ATC has no Trilu. Run fold-constants"
    )


def test_the_same_fault_is_grouped_in_order_of_appearance():
    faults = [fault("a"), fault("b", "other"), fault("c")]
    assert group(faults) == [(faults[0], ("a", "c")), (faults[1], ("b",))]


def test_format_writes_a_fault_once_and_limits_the_places():
    text = ir.format_diagnostics([fault(f"layer {i}") for i in range(4)], places=2)
    assert text == (
        "4 x Trilu is illegal [illegal]\n"
        "    at layer 0\n"
        "    at layer 1\n"
        "    and 2 more\n"
        "    why: ATC has no Trilu\n"
        "    do: Run fold-constants"
    )
