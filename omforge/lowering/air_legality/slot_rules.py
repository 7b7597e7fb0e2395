"""Rules for operators and their slots: GE knows the operator, and each slot by name and order."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping

from omforge.air.graph import DATA_TYPES, NET_OUTPUT
from omforge.air.names import by_slot, input_names
from omforge.air.prototypes import prototypes
from omforge.lowering.air_legality.kernel_table import is_newer
from omforge.lowering.air_legality.subject import AirSubject, is_left_out, naming_fault
from omforge.lowering.legality.subject import Finding, Rule

NEWER: Mapping[str, str] = {
    "ScatterPaKvCache": "mirror-cann/ops-transformer:attention/scatter_pa_kv_cache/op_graph/"
    "scatter_pa_kv_cache_proto.h",
    "QuantBatchMatmulV4": "hicann/ops-nn:matmul/quant_batch_matmul_v4/op_graph/"
    "quant_batch_matmul_v4_proto.h",
}
"""Operators that releases behind CANN 8.1.RC1 register, and where."""


def operators_are_known(subject: AirSubject) -> Iterator[Finding]:
    """CANN 8.1.RC1 registers the operator."""
    for call in subject.calls:
        kind = call.op.type
        if call.prototype is None and kind != NET_OUTPUT and kind not in NEWER:
            near = difflib.get_close_matches(kind, prototypes(), n=2)
            hint = f"; near: {', '.join(near)}" if near else ""
            yield Finding(
                call.where,
                f"GE has no operator {kind}",
                f"no REG_OP of CANN 8.1.RC1 names it{hint}",
                "use an operator that it has",
            )


def newer_operators_are_there(subject: AirSubject) -> Iterator[Finding]:
    """The operator, and its kernel on the SoC, are not newer than CANN 8.1.RC1."""
    for call in subject.calls:
        kind, family = call.op.type, subject.target.family.name
        if call.prototype is None and kind in NEWER:
            what, source = f"{kind} is newer than CANN 8.1.RC1", NEWER[kind]
        elif is_newer(kind, subject.target):
            what, source = f"{family} has {kind} in releases behind CANN 8.1.RC1 alone", None
        else:
            continue
        yield Finding(
            call.where,
            what,
            "",
            "settle it with a probe on the CANN that compiles it",
            source=source,
        )


def inputs_are_named(subject: AirSubject) -> Iterator[Finding]:
    """Each input has the name that the prototype gives it, in its order."""
    yield from _misnamed(subject, "inputs")


def outputs_are_named(subject: AirSubject) -> Iterator[Finding]:
    """Each output is there, with the name that the prototype gives it, in its order."""
    yield from _misnamed(subject, "outputs")


def _misnamed(subject: AirSubject, side: str) -> Iterator[Finding]:
    for call in subject.calls:
        fault = None if call.prototype is None else naming_fault(call.op, call.prototype, side)
        if fault is not None:
            key = side[:-1]
            yield Finding(
                call.where,
                f"its {side} bear other names than the operator's: {fault}",
                f"GE finds slots by _{key}_name_key and _{key}_name_value",
                "name every slot as the prototype does, of a dynamic one with its number",
            )


def required_inputs_are_connected(subject: AirSubject) -> Iterator[Finding]:
    """Whatever is not optional is connected, each member of a dynamic input too."""
    for call in subject.calls:
        if call.prototype is None or not call.named or call.op.type in DATA_TYPES:
            continue
        names, edges = input_names(call.op), call.op.edges
        places = by_slot(call.prototype.inputs, names)
        for slot in call.prototype.inputs:
            for at in () if slot.optional else places[slot.name]:
                if at >= len(edges) or edges[at] is None:
                    yield Finding(
                        call.where, f"its input {names[at]} is not connected", "", "connect it"
                    )


def what_is_left_out_is_undefined(subject: AirSubject) -> Iterator[Finding]:
    """An input that is not connected is described with dtype undefined and no layout."""
    for call in subject.calls:
        if call.op.type in (*DATA_TYPES, NET_OUTPUT):
            continue
        edges, names = call.op.edges, input_names(call.op)
        for at, desc in enumerate(call.op.input_desc):
            if (at >= len(edges) or edges[at] is None) and not is_left_out(desc):
                yield Finding(
                    call.where,
                    f"input {names.get(at, at)} is not connected, and described",
                    "GE takes it for one that is there, and counts the later ones wrongly",
                    "give it dtype undefined and an empty layout",
                )


_LOADER = "hicann/ge:graph_metadef/graph/serialization/model_serialize.cc"
_PROTOTYPES = "CANN 8.1.RC1:opp/built-in/op_proto/inc"
_RECOVERY = "hicann/ge:graph_metadef/graph/ir/ir_definitions_recover.cc"

RULES = (
    Rule("air-op-known", "EZ3003, or EZ9999 in shape inference", _PROTOTYPES, operators_are_known),
    Rule(
        "air-op-release",
        "EZ3003 with CANN 8.1.RC1",
        _PROTOTYPES,
        newer_operators_are_there,
        certainty="inferred",
    ),
    Rule(
        "air-slot-names",
        "it is loaded, and no slot is what it should be: EZ9999 in inference or tiling, or never",
        f"{_LOADER} (DeserializeAllAttrsToAttrHolder); {_PROTOTYPES}",
        inputs_are_named,
        certainty="seen",
    ),
    Rule(
        "air-output-slots",
        "it is loaded; EZ9999 in inference, or results that are lost",
        f"{_LOADER}; {_PROTOTYPES}",
        outputs_are_named,
    ),
    Rule(
        "air-required-inputs",
        "it is loaded; EZ9999 in inference or tiling, or never",
        _PROTOTYPES,
        required_inputs_are_connected,
        certainty="seen",
    ),
    Rule(
        "air-optional-inputs",
        "it is loaded, and inputs are taken for others",
        _RECOVERY,
        what_is_left_out_is_undefined,
    ),
)
