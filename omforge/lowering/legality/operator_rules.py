"""Rules for all operators: registration, schemas, dtypes, inputs and outputs."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import onnx

from omforge import ir
from omforge.ir.ops import TARGET_OPS
from omforge.lowering.legality.subject import Finding, Rule, Subject, present_inputs
from omforge.lowering.legalize import LEGALIZATIONS, NOT_LEGALIZED
from omforge.lowering.target import (
    DEFAULT_DOMAIN,
    EXPANDED,
    dtype_name,
    ge_op,
    registered,
    registrations,
)

# Expanded, but seen to take an absent input (checked by running the parser).
_TAKES_ABSENT = frozenset(("Clip", "Pad", "Slice"))

# What the prototype requires and the plugin gives by itself.
_GIVEN_BY_PLUGIN = {"QuantBatchMatMul": {"dtype"}}

_REMEDIES = {
    "Loop": "unroll the loop: ATC has no Loop",
    "Scan": "unroll the scan: ATC has no Scan",
    "QuantizeLinear": "quantise weights only, or use AscendQuant: QDQ models do not parse",
    "DequantizeLinear": "compute in floats, or use NPUWeightQuantBatchMatmulV2: QDQ fails to parse",
    "DynamicQuantizeLinear": "quantise weights only",
    "GroupNormalization": "decompose it",
}


def default_domain(subject: Subject) -> Iterator[Finding]:
    """Every node is in the default domain."""
    for node in subject.nodes:
        if node.domain in ("", DEFAULT_DOMAIN):
            continue
        if node.domain == "npu":
            remedy = "write the op in the default domain, where ATC knows it too"
        else:
            remedy = "raise it to standard ONNX; ATC knows no op of that domain"
        yield Finding(
            ir.describe(node),
            f"the node is in domain {node.domain}",
            "a domain needs an import of its own, and the dialect has the default one only",
            remedy,
        )


def is_registered(subject: Subject) -> Iterator[Finding]:
    """ATC has a plugin for the operator at this opset."""
    for node in subject.nodes:
        if node.domain not in ("", DEFAULT_DOMAIN) or node.op_type == "Constant":
            continue
        if registered("", node.op_type, subject.opset) is not None:
            continue
        yield Finding(
            ir.describe(node),
            f"no plugin for {node.op_type} at opset {subject.opset}",
            _why_unregistered(node),
            _registration_remedy(node),
        )


def _why_unregistered(node: ir.Node) -> str:
    refusal = node.metadata_props.get(NOT_LEGALIZED)
    if refusal is not None:
        return f"its legalisation refused: {refusal}"
    opsets = sorted(opset for row in registrations("", node.op_type) for opset in row.opsets)
    if opsets:
        return f"it is registered at opsets {opsets[0]} to {opsets[-1]}"
    return "ATC registers it at no opset"


def _registration_remedy(node: ir.Node) -> str:
    if NOT_LEGALIZED in node.metadata_props:
        return "mend what it names, before `legalize`"
    if node.op_type in LEGALIZATIONS:
        return "run `legalize`"
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
        missing = sorted(required - set(node.attributes))
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
        if node.domain != "" or _schema(node.op_type, subject.opset) is not None:
            continue  # a standard op: fits_schema, since its plugin translates names
        inputs, attributes = _required(node, subject.opset)
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


def _required(node: ir.Node, opset: int) -> tuple[int, set[str]]:
    ours = TARGET_OPS.get(node.op_type)
    if ours is not None:
        return ours.required_inputs, {item.name for item in ours.attributes if item.required}
    prototype = ge_op(registered("", node.op_type, opset) or "")
    if prototype is None:
        return 0, set()
    names = {item.name for item in prototype.attributes if item.required}
    return prototype.required_inputs, names - _GIVEN_BY_PLUGIN.get(node.op_type, set())


def ge_dtypes(subject: Subject) -> Iterator[Finding]:
    """Inputs have a dtype that the GE operator's prototype lists."""
    for node in subject.nodes:
        prototype = ge_op(registered(node.domain, node.op_type, subject.opset) or "")
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


def target_op_dtypes(subject: Subject) -> Iterator[Finding]:
    """Target ops have the dtypes that the SoC's kernels take."""
    family = subject.target.family.name
    for node in subject.nodes:
        op = TARGET_OPS.get(node.op_type) if node.domain == "" else None
        if op is None:
            continue
        for value, formal in zip(node.inputs, op.inputs, strict=False):
            allowed = formal.dtypes.get(family, frozenset[str]())
            if value is None or value.dtype is None or dtype_name(value.dtype) in allowed:
                continue
            yield Finding(
                ir.describe(node),
                f"{op.name} with {dtype_name(value.dtype)} at {formal.name}",
                f"on {family} it takes {', '.join(sorted(allowed)) or 'nothing'}",
                "run `convert-precision`, or decompose the op",
            )


def no_absent_inputs(subject: Subject) -> Iterator[Finding]:
    """An operator that is expanded into a subgraph has all its inputs."""
    for node in subject.nodes:
        if node.op_type in _TAKES_ABSENT or all(value is not None for value in node.inputs):
            continue
        if registered(node.domain, node.op_type, subject.opset) == EXPANDED:
            yield Finding(
                ir.describe(node),
                f'{node.op_type} with an absent input ""',
                "its plugin expands it into a subgraph, and each listed input needs a producer",
                "drop trailing inputs, or give a real tensor",
            )


def outputs_are_named(subject: Subject) -> Iterator[Finding]:
    """No output is named ""."""
    for node in subject.nodes:
        for index, value in enumerate(node.outputs):
            if not value.name:
                yield Finding(
                    ir.describe(node),
                    f'output {index} is named ""',
                    'every absent input "" of the whole graph would be wired to it',
                    "run `legalize`, which names it",
                )


_PARSER = "hicann/ge:parser/parser/onnx/onnx_parser.cc"
_PROTOTYPES = "the operators' prototypes (*_proto.h), see ge_ops.tsv"

RULES = (
    Rule("default-domain", "E19999: the domain has no version", _PARSER, default_domain),
    Rule("registered", "E13010", _PARSER, is_registered),
    Rule("onnx-schema", "silently another meaning", _PARSER, fits_schema),
    Rule("ge-requirements", "accepted, then fails or is wrong later", _PROTOTYPES, ge_requirements),
    Rule("ge-dtypes", "no kernel", _PROTOTYPES, ge_dtypes),
    Rule(
        "target-op-dtypes",
        "no kernel",
        "CANN 8.1.RC1:opp/built-in/op_impl/ai_core/tbe/config/<soc>/aic-<soc>-ops-info.json",
        target_op_dtypes,
    ),
    Rule(
        "no-absent-inputs",
        "E19999 ReLinkInputDataEdge",
        "hicann/ge:graph_metadef (graph_utils.cc, ExpandNodeWithGraph)",
        no_absent_inputs,
    ),
    Rule("outputs-named", "inputs wired to a wrong tensor", _PARSER, outputs_are_named),
)
