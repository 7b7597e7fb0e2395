"""What the built-in plugins do with single operators, as far as their sources were read or run.

Each check states the plugin's error, or, as a trap, what it gets wrong in silence. Sources: the
`*_onnx_plugin.cpp` named in `lowering/data/onnx_ops.tsv` beside the operator; "seen" means that
CANN's own parser was run on such a node.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NoReturn

import onnx
from onnx import AttributeProto, TensorProto

from omforge.atc.sim.reports import Refused, Report
from omforge.lowering.plugins import (
    Given,
    PluginNode,
    attribute_types,
    plugin_facts,
)
from omforge.lowering.tables import table_rows

EXPANDED = "PartitionedCall"

# Expanded, and seen to take "" for an absent input; the others seen do not, the rest is unknown and
# refused.
_TAKES_ABSENT = frozenset(("Clip",))

_INT32_MAX = 2**31 - 1


@dataclass(frozen=True)
class Call:
    """One node as a plugin sees it."""

    node: onnx.NodeProto
    opset: int
    ge_type: str
    static_inputs: Mapping[str, tuple[int, ...]]
    """Graph inputs (and constants) whose shape the plugin can read."""

    @property
    def attributes(self) -> Mapping[str, AttributeProto]:
        """The node's attributes by name."""
        return {attribute.name: attribute for attribute in self.node.attribute}

    @property
    def given(self) -> int:
        """How many inputs are not absent."""
        return sum(bool(name) for name in self.node.input)

    def place(self) -> str:
        """The node's name and operator, for a message."""
        return f"{self.node.name} ({self.node.op_type})"


Check = Callable[[Call, Report], None]


def check_parameters(call: Call, report: Report) -> None:
    """Run the operator's ParseParams.

    Raises:
        Refused: The plugin fails. (E11010 is raised but not registered, so atc does not print it.)
    """
    _check_attributes(call, report)
    check = _PARAMETERS.get(call.node.op_type)
    if check is not None:
        check(call, report)


def _check_attributes(call: Call, report: Report) -> None:
    """What the table of plugins says of the node, and of how plugins go through attributes."""
    node, place = call.node, call.place()
    counts = Counter(attribute.name for attribute in node.attribute)
    types = attribute_types(node.op_type, call.opset)
    facts = plugin_facts(node.op_type, call.opset)
    reads = [fact.attribute.split(",") for fact in facts if fact.kind == "reads"]
    known = {each.partition(":")[0] for names in reads for each in names}
    for attribute in node.attribute:
        name, given = attribute.name, AttributeProto.AttributeType.Name(attribute.type)
        if counts[name] > 1:
            report.trap("SIM042", f"{place}: {name} is given {counts[name]} times.")
        if given == "UNDEFINED" or types.get(name, given) != given:
            wanted = types.get(name, "another type")
            report.trap("SIM027", f"{place}: {name} is read as {wanted}, and given as {given}.")
        unread = name not in known if reads else bool(types) and name not in types
        if unread and name != "epsilon":
            report.trap("SIM028", f"{place}: the plugin does not read {name}.")
    seen = _seen(call)
    for fact in facts:
        if fact.kind not in ("needs", "refuses", "ignores", "changes") or not fact.broken_by(seen):
            continue
        if fact.atc == "EZ9999":
            _plugin_error(report, f"{fact.told(seen)}: {fact.why}")
        if fact.atc:
            raise Refused  # nothing but the parser's own message is printed (seen)
        report.trap("SIM024", f"{place}: {fact.told(seen)}: {fact.why} ({fact.source}).")


def missing_inputs(node: onnx.NodeProto, opset: int) -> str:
    """What ONNX demands of the inputs and the parser does not look for; "" where all is there."""
    try:
        schema = onnx.defs.get_schema(node.op_type, opset, "")
    except onnx.defs.SchemaError:
        return ""
    count = len(node.input)
    if node.op_type == "If":
        return ""  # it has got what its branches read by now
    if not schema.min_input <= count <= schema.max_input:
        return f"{count} inputs, where ONNX has {schema.min_input} to {schema.max_input}"
    single = onnx.defs.OpSchema.FormalParameterOption.Single
    for name, formal in zip(node.input, schema.inputs, strict=False):
        if not name and formal.option == single:
            return f"no {formal.name}"
    return ""


def _seen(call: Call) -> PluginNode:
    attributes: dict[str, Given] = {}
    for attribute in call.node.attribute:
        kind = AttributeProto.AttributeType.Name(attribute.type)
        raw = kind != "TENSOR" or attribute.t.data_type in _TYPED or bool(attribute.t.raw_data)
        attributes[attribute.name] = Given(kind, _value(attribute), raw)
    shapes = [call.static_inputs.get(name) for name in call.node.input]
    return PluginNode(
        op=call.node.op_type,
        attributes=attributes,
        inputs=[bool(name) for name in call.node.input],
        outputs=[bool(name) for name in call.node.output],
        ranks=[None if shape is None else len(shape) for shape in shapes],
    )


# What the plugin of ConstantOfShape reads of a tensor that is not raw.
_TYPED = (TensorProto.FLOAT, TensorProto.DOUBLE, TensorProto.INT32, TensorProto.INT64)


def _value(attribute: AttributeProto) -> object:
    if attribute.type == AttributeProto.UNDEFINED:
        return None
    value = onnx.helper.get_attribute_value(attribute)
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else value


def check_expansion(call: Call, report: Report) -> None:
    """Expand a node into its subgraph (parser_utils.cc:ExpandOneToManyGraph).

    Raises:
        Refused: An input that the subgraph has is absent.
    """
    if call.ge_type != EXPANDED or call.node.op_type in _TAKES_ABSENT:
        return
    node = call.node
    if call.node.op_type == "NPUPromptFlashAttention" and len(node.input) not in (3, 5, 7, 9, 12):
        _fail_slot(len(node.input), node.name, report)
    if call.node.op_type == "NPUFlashAttention" and len(node.input) < 9:
        _fail_slot(8, node.name, report)
    if call.given != len(node.input):
        report.inner(
            "Assert ((src_out_anchor) != nullptr) failed[FUNC:ReLinkInputDataEdge]"
            f"[FILE:graph_utils.cc][LINE:112] node {node.name}, input "
            f"{list(node.input).index('')}"
        )
        _fail_expansion(report)


def _fail_slot(index: int, name: str, report: Report) -> NoReturn:
    report.inner(
        f"Attr index[{index}] of node: {name} cannot larger than input num: {index} of target "
        f"node: {name}[FUNC:ReLinkInputDataEdge][FILE:graph_utils.cc][LINE:104]"
    )
    _fail_expansion(report)


def _fail_expansion(report: Report) -> NoReturn:
    report.inner(
        "Assert ((GraphUtils::ExpandNodeWithGraph(node, sub_compute_graph)) == ge::SUCCESS) "
        "failed[FUNC:ExpandNodeToSubgraph]"
    )
    raise Refused


def _plugin_error(report: Report, text: str) -> NoReturn:
    report.inner(text, "EZ9999")
    raise Refused


def _prompt_flash_attention(call: Call, report: Report) -> None:
    attributes = call.attributes
    for name in ("scale_value", "pre_tokens"):
        if name not in attributes:
            report.trap("SIM020", f"{call.place()}: without {name} the plugin takes 1.0 or 0.")
    for name in ("pre_tokens", "next_tokens"):
        if name in attributes and attributes[name].i > _INT32_MAX:
            report.trap("SIM021", f"{call.place()}: {name} is cut to int32.")


def _incre_flash_attention(call: Call, report: Report) -> None:
    if len(call.node.input) != 6:
        _plugin_error(report, "dynamic size error.")
    report.trap(
        "SIM022",
        f"{call.place()}: E18888 Find input index by name failed. name[key1]: the plugin leaves "
        "key and value unconnected, and atc succeeds (seen).",
    )


def _flash_attention(call: Call, report: Report) -> None:
    layout = call.attributes.get("input_layout")
    if layout is not None and layout.s not in (b"BSH", b"SBH"):
        _plugin_error(report, "The value of input_layout must be BSH or SBH")
    if call.node.input and call.node.input[0] not in call.static_inputs:
        report.inner(f"{call.place()}: the plugin reads dims of an unknown shape: SIGSEGV (seen).")
        raise Refused


def _split(call: Call, report: Report) -> None:
    if call.opset < 18 or len([name for name in call.node.input if name]) > 1:
        return
    axis = call.attributes.get("axis")
    if call.node.input[0] not in call.static_inputs:
        report.inner(f"{call.place()}: the plugin reads dims of an unknown shape: SIGSEGV (seen).")
        raise Refused
    if axis is not None and axis.i < 0:
        _plugin_error(report, f"dim_size[{axis.i}] can not be evenly divided")


def _ascend_quant(call: Call, report: Report) -> None:
    if "scale" not in call.attributes:
        report.trap("SIM020", f"{call.place()}: without scale the plugin takes 0 (seen).")


def _ascend_dequant(call: Call, report: Report) -> None:
    dtype = call.attributes.get("dtype")
    if dtype is None or dtype.i != 1:
        report.trap(
            "SIM020", f"{call.place()}: without dtype 1 the plugin takes 0, float32 (seen)."
        )


def _rms_norm(call: Call, report: Report) -> None:
    epsilon = call.attributes.get("epsilon")
    if epsilon is not None and not math.isclose(epsilon.f, 1e-6, rel_tol=1e-5):
        report.trap(
            "SIM025",
            f"{call.place()}: the plugin ignores the epsilon of {epsilon.f:g} and takes 1e-6 "
            "(seen).",
        )


def _dtype_cast(call: Call, report: Report) -> None:
    report.trap("SIM026", f"{call.place()}: becomes a Cast without a destination type.")


def _format_cast(call: Call, report: Report) -> None:
    report.trap("SIM026", f"{call.place()}: becomes an Identity; acl_format is ignored.")


def _scatter(call: Call, report: Report) -> None:
    report.trap("SIM026", f"{call.place()}: maps to ArgMaxGrad, another operator.")


def _quantize(call: Call, report: Report) -> None:
    if "dtype" not in call.attributes:
        report.trap("SIM020", f"{call.place()}: without dtype the plugin sets none (seen).")


_PARAMETERS: Mapping[str, Check] = {
    "NPUPromptFlashAttention": _prompt_flash_attention,
    "NPUIncreFlashAttention": _incre_flash_attention,
    "NPUFlashAttention": _flash_attention,
    "Split": _split,
    "AscendQuant": _ascend_quant,
    "AscendDequant": _ascend_dequant,
    "NPURmsNorm": _rms_norm,
    "NPUAddRmsNorm": _rms_norm,
    "NPUDtypeCast": _dtype_cast,
    "NPUFormatCast": _format_cast,
    "NPUScatter": _scatter,
    "NPUQuantize": _quantize,
}


@dataclass(frozen=True)
class Slots:
    """How many inputs and outputs a GE operator has; None where one of them is dynamic."""

    required: int
    inputs: int | None
    outputs: int | None


class Registry:
    """The operators that the parser knows, read from the raw tables."""

    def __init__(self) -> None:
        self._types: dict[str, str] = {}
        for row in table_rows("onnx_ops.tsv"):
            # The experimental rows are in custom builds only.
            if "experimental/" in row["source"] or row["opset_versions"] == "(none)":
                continue
            for version in _versions(row["opset_versions"]):
                key = f"{row['domain']}::{version}::{row['onnx_op_type']}"
                # The first registration wins (graph_metadef/register/register.cpp).
                self._types.setdefault(key, row["ge_op_type"])
        kinds: dict[str, list[str]] = {}
        for row in table_rows("ge_ops.tsv"):
            kinds.setdefault(row["ge_op"], []).append(row["kind"])
        self._slots = {name: _slots(each) for name, each in kinds.items()}

    def ge_type(self, key: str) -> str | None:
        """The GE type of `domain::opset::op`, exactly so spelled."""
        return self._types.get(key)

    def slots(self, ge_type: str) -> Slots | None:
        """The slots of a GE operator; None for one whose prototype the table does not have."""
        return self._slots.get(ge_type)


def _slots(kinds: list[str]) -> Slots:
    inputs = [kind for kind in kinds if kind.endswith("input")]
    outputs = [kind for kind in kinds if kind.endswith("output")]
    return Slots(
        required=inputs.count("input"),
        inputs=None if "dynamic_input" in inputs else len(inputs),
        outputs=None if "dynamic_output" in outputs else len(outputs),
    )


def _versions(text: str) -> list[int]:
    found: list[int] = []
    for part in text.split(","):
        low, _, high = part.partition("-")
        found += range(int(low), int(high or low) + 1)
    return found
