"""Rules for all operators: registration, schemas, dtypes, inputs and outputs."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator

import onnx

from omforge import ir
from omforge.ir.ops import TARGET_OPS
from omforge.lowering.legality.subject import Finding, Rule, Subject, present_inputs
from omforge.lowering.legalize import LEGALIZATIONS, NOT_LEGALIZED
from omforge.lowering.plugins import plugin_facts
from omforge.lowering.target import (
    DEFAULT_DOMAIN,
    EXPANDED,
    dtype_name,
    ge_op,
    registrations,
)

# Expanded, but seen to take an absent input (checked by running the parser).
_TAKES_ABSENT = frozenset(("Clip", "Pad", "Slice"))

# What the prototype requires and the plugin gives by itself.
_GIVEN_BY_PLUGIN = {"QuantBatchMatMul": {"dtype"}}

# What the parser takes without a plugin, at any opset.
_WITHOUT_PLUGIN = frozenset(("Constant", "FileConstant", "Input"))

_REMEDIES = {
    "Loop": "unroll the loop: ATC has no Loop",
    "Scan": "unroll the scan: ATC has no Scan",
    "QuantizeLinear": "quantise weights only, or use AscendQuant: QDQ models do not parse",
    "DequantizeLinear": "compute in floats, or use NPUWeightQuantBatchMatmulV2: QDQ fails to parse",
    "DynamicQuantizeLinear": "quantise weights only",
    "GroupNormalization": "decompose it",
}


def default_domain(subject: Subject) -> Iterator[Finding]:
    """In the dialect every node is in the default domain."""
    for node in subject.nodes:
        if node.domain in ("", DEFAULT_DOMAIN) or subject.plugin(node) is None:
            continue
        yield Finding(
            ir.describe(node),
            f"the node is in domain {node.domain}",
            "a domain needs an import of its own, and the dialect has the default one only",
            "write the op in the default domain, where ATC knows it too",
        )


def imported_domain(subject: Subject) -> Iterator[Finding]:
    """The domain of every node is imported."""
    imports = {domain or DEFAULT_DOMAIN for domain in subject.graph.opset_imports}
    for node in subject.nodes:
        domain = node.domain or DEFAULT_DOMAIN
        if domain not in imports:
            yield Finding(
                ir.describe(node),
                f"the model imports no opset of {domain}",
                "operators are looked up by domain and version",
                "add the opset import, or move the node to the default domain",
            )


def is_registered(subject: Subject) -> Iterator[Finding]:
    """ATC has a plugin for the operator at this opset."""
    for node in subject.nodes:
        if node.op_type in _WITHOUT_PLUGIN and node.domain in ("", DEFAULT_DOMAIN):
            continue
        if subject.plugin(node) is not None:
            continue
        if node.domain in ("", DEFAULT_DOMAIN):
            what = f"no plugin for {node.op_type} at opset {subject.opset}"
        elif node.domain not in subject.graph.opset_imports:
            continue  # reported by imported_domain
        else:
            version = subject.graph.opset_imports[node.domain]
            what = f"no plugin for {node.op_type} of domain {node.domain} at version {version}"
        yield Finding(ir.describe(node), what, _why_unregistered(node), _registration_remedy(node))


def _why_unregistered(node: ir.Node) -> str:
    refusal = node.metadata_props.get(NOT_LEGALIZED)
    if refusal is not None:
        return f"its legalisation refused: {refusal}"
    opsets = sorted(o for row in registrations(node.domain, node.op_type) for o in row.opsets)
    if opsets and node.domain not in ("", DEFAULT_DOMAIN):
        return f"it is registered at version {opsets[0]} of the domain"
    if opsets:
        return f"it is registered at opsets {opsets[0]} to {opsets[-1]}"
    if node.domain == "npu":
        plain = node.op_type if node.op_type.startswith("NPU") else f"NPU{node.op_type}"
        others = [name for name in (plain, plain[3:]) if registrations(node.domain, name)]
        others += [f"{plain} of the default domain"] * bool(registrations("", plain))
        if others:
            return f"ATC knows {' and '.join(others)}"
    elif registrations("npu", node.op_type):
        return "ATC knows it in domain npu only, version 1"
    return "ATC registers it at no opset"


def _registration_remedy(node: ir.Node) -> str:
    if NOT_LEGALIZED in node.metadata_props:
        return "mend what it names"
    if node.op_type in LEGALIZATIONS and node.domain in ("", DEFAULT_DOMAIN):
        return "make the graph by `omforge compile`"
    if node.domain == "com.microsoft":
        return "run `raise-contrib-ops`; ATC knows no operator of that domain"
    return _REMEDIES.get(node.op_type, "rewrite it in operators that ATC registers")


def fits_schema(subject: Subject) -> Iterator[Finding]:
    """The node means at this opset what it was written for: ONNX's schema accepts it."""
    for node in subject.nodes:
        schema = _schema(node.op_type, subject.opset) if node.domain == "" else None
        if schema is None:
            continue
        unknown = sorted(set(node.attributes) - set(schema.attributes))
        if unknown:
            yield Finding(
                ir.describe(node),
                f"{node.op_type} has no attribute {', '.join(unknown)} at opset {subject.opset}",
                "ATC ignores an attribute that it does not know, without a word",
                "respell the node for this opset",
            )
        required = {name for name, item in schema.attributes.items() if item.required}
        missing = sorted(required - set(node.attributes) - _needed(node, subject.opset))
        if missing:
            yield Finding(
                ir.describe(node),
                f"{node.op_type} lacks the attribute {', '.join(missing)}",
                "the schema requires it, and the parser would not say so",
                "give the attribute",
            )
        count = len(node.inputs)
        if not schema.min_input <= count <= schema.max_input:
            yield Finding(
                ir.describe(node),
                f"{node.op_type} has {count} inputs",
                f"at opset {subject.opset} it takes {schema.min_input} to {schema.max_input}",
                "respell the node for this opset",
            )
        yield from _absent_required(node, schema)


def _needed(node: ir.Node, opset: int) -> set[str]:
    """The attributes without which the plugin fails, of which plugin_rules speaks."""
    facts = (fact for fact in plugin_facts(node.op_type, opset) if fact.kind == "needs")
    parts = (part for fact in facts for part in re.split(r"[,|]", fact.attribute))
    return {part.partition(":")[0] for part in parts}


def _absent_required(node: ir.Node, schema: onnx.defs.OpSchema) -> Iterator[Finding]:
    single = onnx.defs.OpSchema.FormalParameterOption.Single
    for index, (value, formal) in enumerate(zip(node.inputs, schema.inputs, strict=False)):
        if value is None and formal.option == single:
            yield Finding(
                ir.describe(node),
                f"input {index}, {formal.name}, is absent",
                "the schema requires it, and the parser would not say so",
                "connect it",
            )


@functools.cache
def _schema(op_type: str, opset: int) -> onnx.defs.OpSchema | None:
    try:
        return onnx.defs.get_schema(op_type, opset, "")
    except onnx.defs.SchemaError:
        return None  # not an operator of ONNX at this opset: is_registered judges it


def ge_requirements(subject: Subject) -> Iterator[Finding]:
    """An operator of ATC's own has the inputs and attributes that its GE prototype requires."""
    for node in subject.nodes:
        ge_type = subject.plugin(node)
        standard = node.domain == "" and _schema(node.op_type, subject.opset) is not None
        if ge_type is None or standard:
            continue  # of a standard op fits_schema judges, since its plugin translates names
        inputs, attributes = _required(node, ge_type)
        if present_inputs(node) < inputs:
            yield Finding(
                ir.describe(node),
                f"{node.op_type} has {present_inputs(node)} inputs",
                f"its GE operator requires {inputs}, and the parser would not say so",
                "connect them",
            )
        missing = sorted(attributes - set(node.attributes))
        if missing:
            yield Finding(
                ir.describe(node),
                f"{node.op_type} lacks the attribute {', '.join(missing)}",
                "its GE operator requires it, and the parser would not say so",
                "give the attribute",
            )


def _required(node: ir.Node, ge_type: str) -> tuple[int, set[str]]:
    ours = TARGET_OPS.get(node.op_type)
    if ours is not None:
        return ours.required_inputs, {item.name for item in ours.attributes if item.required}
    prototype = ge_op(ge_type)
    if prototype is None:
        return 0, set()
    names = {item.name for item in prototype.attributes if item.required}
    return prototype.required_inputs, names - _GIVEN_BY_PLUGIN.get(node.op_type, set())


def ge_dtypes(subject: Subject) -> Iterator[Finding]:
    """Inputs have a dtype that the GE operator's prototype lists."""
    for node in subject.nodes:
        prototype = ge_op(subject.plugin(node) or "")
        if prototype is None:
            continue
        for value, formal in zip(node.inputs, prototype.inputs, strict=False):
            if value is None or value.dtype is None or formal.dtypes is None:
                continue
            if _is_parameter(node, value):
                continue
            name = dtype_name(value.dtype)
            if name not in formal.dtypes:
                yield Finding(
                    ir.describe(node),
                    f"{node.op_type} with {name} at {formal.name}",
                    f"{prototype.name} takes {', '.join(sorted(formal.dtypes))}",
                    "cast the input, or compute in another dtype",
                )


def _is_parameter(node: ir.Node, value: ir.Value) -> bool:
    """Constant integers (axes, k, sizes) are translated by the plugins."""
    integers = value.dtype in (ir.DataType.INT64, ir.DataType.INT32)
    return integers and (value.const_value is not None or node.op_type == "TopK")


def no_absent_inputs(subject: Subject) -> Iterator[Finding]:
    """An operator that is expanded into a subgraph has all its inputs."""
    for node in subject.nodes:
        if node.op_type in _TAKES_ABSENT or all(value is not None for value in node.inputs):
            continue
        if subject.plugin(node) == EXPANDED:
            yield Finding(
                ir.describe(node),
                f'{node.op_type} with an absent input ""',
                "its plugin expands it into a subgraph, and each listed input needs a producer",
                "drop trailing inputs, or give a real tensor",
            )


def outputs_are_named(subject: Subject) -> Iterator[Finding]:
    """No output is named ""."""
    absent = any(value is None for node in subject.nodes for value in node.inputs)
    for node in subject.nodes:
        for index, value in enumerate(node.outputs):
            if not value.name:
                yield Finding(
                    ir.describe(node),
                    f'output {index} is named ""',
                    'every absent input "" of the whole graph would be wired to it'
                    + ("" if absent else " (this graph has none)"),
                    "make the graph by `omforge compile`, which names it, or drop trailing outputs",
                    level=None if absent else "advice",
                )


def only_known_slots(subject: Subject) -> Iterator[Finding]:
    """An operator has no more inputs, and no more outputs in use, than its GE operator knows."""
    for node in subject.nodes:
        prototype = ge_op(subject.plugin(node) or "")
        if prototype is None or any("dynamic" in item.kind for item in prototype.inputs):
            continue
        if any(value is not None for value in node.inputs[len(prototype.inputs) :]):
            yield Finding(
                ir.describe(node),
                f"{node.op_type} has {len(node.inputs)} inputs",
                f"{prototype.name} has {len(prototype.inputs)}: "
                + ", ".join(item.name for item in prototype.inputs),
                "drop the others, or write the node as its opset has it",
            )
        for index, value in enumerate(node.outputs):
            used = bool(value.uses()) or value.is_graph_output()
            if used and index >= len(prototype.outputs) and not prototype.dynamic_outputs:
                yield Finding(
                    ir.describe(node),
                    f"output {index} of {node.op_type} is read",
                    f"{prototype.name} has {len(prototype.outputs)}: "
                    + ", ".join(prototype.outputs),
                    "read another output",
                )


_PARSER = "hicann/ge:parser/parser/onnx/onnx_parser.cc"
_PROTOTYPES = "the operators' prototypes (*_proto.h), see ge_ops.tsv"

RULES = (
    Rule(
        "default-domain",
        "E16005 in older releases",
        _PARSER,
        default_domain,
        certainty="inferred",
        level="advice",
    ),
    Rule("imported-domain", "E19999: the domain has no version", _PARSER, imported_domain, "seen"),
    Rule("registered", "E13010", _PARSER, is_registered, "seen"),
    Rule("onnx-schema", "silently another meaning", _PARSER, fits_schema),
    Rule(
        "ge-requirements",
        "accepted, then fails or is wrong later",
        _PROTOTYPES,
        ge_requirements,
        "seen",
    ),
    Rule("ge-dtypes", "no kernel", _PROTOTYPES, ge_dtypes, "inferred"),
    Rule(
        "no-absent-inputs",
        "E19999 ReLinkInputDataEdge",
        "hicann/ge:graph_metadef (graph_utils.cc, ExpandNodeWithGraph)",
        no_absent_inputs,
        "seen",
    ),
    Rule("outputs-named", "inputs wired to a wrong tensor", _PARSER, outputs_are_named, "seen"),
    Rule(
        "known-slots",
        "E19999: Resolve operator IO name failed",
        _PARSER,
        only_known_slots,
        "seen",
    ),
)
