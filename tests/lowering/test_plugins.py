"""The table of plugins: each row is a fault that our check and the simulated atc both name."""

import re
from pathlib import Path
from typing import Any

import onnx
import pytest
from onnx import AttributeProto, TensorProto, helper

from omforge import ir
from omforge.atc.sim import plugins as simulated
from omforge.atc.sim.reports import Refused, Report
from omforge.lowering.legality import attribute_rules, plugin_rules
from omforge.lowering.legality.file_subject import FileSubject
from omforge.lowering.legality.subject import Subject
from omforge.lowering.plugins import PluginFact, all_plugin_facts, plugin_facts
from omforge.lowering.target import all_registrations, registered, target

RULES = {
    "needs": plugin_rules.needed,
    "refuses": plugin_rules.refused,
    "ignores": plugin_rules.ignored,
    "changes": plugin_rules.changed,
}
FAULTS = [fact for fact in all_plugin_facts() if fact.kind in RULES]


def opset_of(fact: PluginFact) -> tuple[str, int]:
    """A domain and version that registers the operator, and for which the row holds."""
    for domain, opsets in (("", range(18, 7, -1)), ("npu", (1,)), ("mmdeploy", (1,))):
        for opset in opsets:
            held = fact.opsets is None or opset in fact.opsets or domain
            if held and registered(domain, fact.op, opset) is not None:
                return domain, opset
    raise AssertionError(fact.op)


def violation(fact: PluginFact) -> onnx.NodeProto:
    """A node that the row describes, made of its condition."""
    inputs, outputs, attributes, ranks = 3, 1, dict[str, Any](), 2
    schema = onnx.defs.get_schema(fact.op) if onnx.defs.has(fact.op) else None
    absent: set[int] = set()
    for clause in fact.when.split(" and ") if fact.when else ():
        if found := re.fullmatch(r"(absent|given) (\w+)", clause):
            if found[1] == "given":
                attributes.setdefault(found[2], default_of(schema, found[2]))
        elif found := re.fullmatch(r"present-input (\d)", clause):
            inputs = int(found[1]) + 1
        elif found := re.fullmatch(r"absent-input (\d)", clause):
            absent.add(int(found[1]))
        elif found := re.fullmatch(r"present-output (\d)", clause):
            outputs = int(found[1]) + 1
        elif found := re.fullmatch(r"odd len\((\w+)\)", clause):
            attributes[found[1]] = [1, 1, 1]
        elif found := re.fullmatch(r"even (\w+)", clause):
            attributes[found[1]] = 4
        elif found := re.fullmatch(r"far (\w+) ([\d.]+)", clause):
            attributes[found[1]] = float(found[2]) + 1
        elif found := re.fullmatch(r"typed (\w+)", clause):
            tensor = TensorProto(data_type=TensorProto.FLOAT16, dims=[1], int32_data=[1])
            attributes[found[1]] = tensor
        elif re.fullmatch(r"inner-axis \d", clause):
            attributes["axis"] = 0
        elif found := re.fullmatch(r"rank 0 (>|!=|<) (\d)", clause):
            ranks = int(found[2]) + (-1 if found[1] == "<" else 1)
        elif found := re.fullmatch(r"inputs (<|>) (\d)", clause):
            inputs = int(found[2]) + (-1 if found[1] == "<" else 1)
        elif found := re.fullmatch(r"outputs > (\d)", clause):
            outputs = int(found[1]) + 1
        elif found := re.fullmatch(r"(any )?(len\()?(\w+)\)? (=|!=|<|>|in|not in) (.+)", clause):
            words = [str(outputs) if word == "outputs" else word for word in found[5].split()]
            value = satisfying(found[4], [literal(word) for word in words])
            attributes[found[3]] = [1] * value if found[2] else [value] if found[1] else value
        else:
            raise AssertionError(clause)
    names = ["" if at in absent else f"x{at}" for at in range(inputs)]
    while names and not names[-1]:
        names.pop()
    if "alpha" in attributes and fact.op == "Gemm":
        attributes["alpha"] = 0.5
    node = helper.make_node(
        fact.op, names or ["x0"], [f"y{at}" for at in range(outputs)], fact.op, **attributes
    )
    node.doc_string = str(ranks)
    return node


def default_of(schema: Any, name: str) -> Any:
    kind = schema.attributes[name].type.name if schema is not None else "INT"
    values = {"INTS": [1], "FLOATS": [1.0], "STRINGS": ["a"], "FLOAT": 1.0, "STRING": "a"}
    return values.get(kind, 1)


def satisfying(operator: str, words: list[Any]) -> Any:
    first = words[0]
    if operator in ("=", "in"):
        return first
    if operator in ("<", ">"):
        return first - 1 if operator == "<" else first + 1
    return f"{first}x" if isinstance(first, str) else max(words) + 1


def literal(word: str) -> Any:
    return int(word) if re.fullmatch(r"-?\d+", word) else float(word) if "." in word else word


def model_of(node: onnx.NodeProto, domain: str, opset: int, rank: int) -> onnx.ModelProto:
    node.domain = domain
    inputs = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, [2] * rank)
        for name in node.input
        if name
    ]
    outputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in node.output]
    graph = helper.make_graph([node], "g", inputs, outputs)
    imports = [helper.make_opsetid(domain, opset)]
    if domain:
        imports.append(helper.make_opsetid("", 16))
    return helper.make_model(graph, opset_imports=imports)


def simulate(node: onnx.NodeProto, opset: int, rank: int) -> tuple[str, ...]:
    report = Report()
    shapes = dict.fromkeys(node.input, (2,) * rank)
    try:
        simulated.check_parameters(simulated.Call(node, opset, "", shapes), report)
    except Refused:
        return (*report.codes, "refused")
    return report.codes


@pytest.mark.parametrize("fact", FAULTS, ids=lambda fact: f"{fact.op}-{fact.kind}-{fact.attribute}")
def test_each_fault_is_named_by_both(fact: PluginFact) -> None:
    domain, opset = opset_of(fact)
    node = violation(fact)
    rank = int(node.doc_string)
    model = ir.from_proto(model_of(node, domain, opset, rank))
    subject = Subject(model, target("Ascend910B4"), opset if not domain else 16)
    found = list(RULES[fact.kind](subject))
    assert any(item.why == fact.why and item.source == fact.source for item in found), node
    theirs = simulate(node, opset, rank)
    assert theirs, node
    if fact.atc == "EZ9999":
        assert theirs[0] == "EZ9999"
    if not fact.atc:
        assert "EZ9999" in theirs or "SIM024" in theirs


def test_rows_name_what_atc_registers() -> None:
    for fact in all_plugin_facts():
        rows = [row for row in all_registrations() if row.op == fact.op]
        assert fact.source in {row.source for row in rows}
        opsets = {opset for row in rows for opset in row.opsets}
        assert fact.opsets is None or set(fact.opsets) & opsets, fact


def attribute_of_another_type(kind: str, name: str) -> AttributeProto:
    return helper.make_attribute(name, 1.5 if kind == "INT" else 1)


def test_every_attribute_of_another_type_is_named_by_both() -> None:
    count = 0
    for row in all_registrations():
        opset = max(row.opsets, default=0)
        if row.domain != "ai.onnx" or row.experimental:
            continue
        try:
            schema: Any = onnx.defs.get_schema(row.op, opset, "")
        except onnx.defs.SchemaError:
            continue  # ATC's own, at this opset
        for name, item in schema.attributes.items():
            node = helper.make_node(row.op, ["x"], ["y"], row.op)
            node.attribute.append(attribute_of_another_type(item.type.name, name))
            subject = FileSubject(Path(), 0, model_of(node, "", opset, 2))
            (found,) = attribute_rules.attributes_are_typed(subject)
            assert f"{name} as " in found.what
            assert {"SIM027", "EZ9999"} & set(simulate(node, opset, 2))
            count += 1
    assert count > 150


def test_an_operator_of_atcs_own_has_only_what_its_plugin_reads() -> None:
    reads = [fact for fact in all_plugin_facts() if fact.kind == "reads"]
    assert len(reads) > 80
    for fact in reads:
        domain, opset = opset_of(fact)
        node = helper.make_node(fact.op, ["x"], ["y"], fact.op, nobody_reads_this=1)
        assert {"SIM028", "EZ9999"} & set(simulate(node, opset, 2)), fact.op
        subject = FileSubject(Path(), 0, model_of(node, domain, opset, 2))
        found = [item.source for item in attribute_rules.own_attributes_are_read(subject)]
        assert fact.source in found or fact.op in attribute_rules.JUDGED_LOADED


def test_a_row_holds_at_its_opsets_only() -> None:
    assert [f.kind for f in plugin_facts("Clip", 10)] == ["output"]
    assert [f.kind for f in plugin_facts("Clip", 16)] == ["refuses"]
