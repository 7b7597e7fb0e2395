"""What GE finds in a loaded graph before it has kernels for it, and what it does not find.

It is lenient: what its loader, the recovery of IR definitions and its checks let pass is let pass
here, and told of as a trap where it is wrong without a word. Sources beside each rule; where none
is, docs of hicann/ge were read that way.
"""

from __future__ import annotations

import graphlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NoReturn

from omforge.air.ge_types import byte_size
from omforge.air.graph import Attr, Edge, Graph, Op, Tensor
from omforge.air.names import by_slot, input_names, output_names
from omforge.air.prototypes import Attribute, Prototype, Slot, prototype
from omforge.atc.sim.air_loader import LoadedAir
from omforge.atc.sim.reports import Refused, Report

_CONSTANTS = ("Const", "Constant", "FileConstant")
_VIEWS = ("Reshape", "Squeeze", "Unsqueeze", "ExpandDims", "Flatten", "Identity", "TensorMove")
_SOURCES = ("Data", "RefData", "NetOutput", *_CONSTANTS)


def check_graph(loaded: LoadedAir, report: Report) -> None:
    """Check what GE's preparation checks ahead of inference, in its order (graph_prepare.cc:Init).

    Raises:
        Refused: GE stops.
    """
    graph = loaded.graph
    for op in graph.ops:
        if op.type == "FileConstant":
            _check_file_constant(op, report)
    behind = _ancestors(graph, report)
    _check_ref_inputs(graph, report)
    _check_outputs(graph, report)
    for op in graph.ops:
        if op.type in ("Const", "Constant"):
            _check_constant(op, report)
        elif op.type not in _SOURCES:
            _check_recovery(op, report)
    _check_writers(graph, behind, report)


def _check_file_constant(op: Op, report: Report) -> None:
    """file_constant_utils.cc:ConvertFileConstToConst: paths are meant from atc's own folder."""
    shape, dtype = op.attributes.get("shape"), op.attributes.get("dtype")
    path = _text(op, "location") or _text(op, "file_path")
    if dtype is None or not isinstance(dtype.value, str) or shape is None or shape.items is None:
        _inner(f"Failed to get weight size of {op.name}: no dtype or shape.", report)
    if not path:
        report.trap(
            "SIM081",
            f"FileConstant {op.name} names no file: atc leaves it to be found when the .om is "
            "loaded (file_constant_utils.cc:ConvertFileConstToConst).",
        )
        raise Refused
    dims = [item for item in shape.items if isinstance(item, int)]
    size = byte_size(dtype.value, tuple(dims))
    start, length = _number(op, "offset"), _number(op, "length") or size
    file = Path(path)
    if not file.is_file():
        _inner(f"Failed to get real path of {path}", report)
    if min(start, length) < 0 or start + length > file.stat().st_size:
        _inner(f"Failed to read external weight from file:{path}", report)
    if length != size:
        _check_size(op, size, length, report)


def _check_outputs(graph: Graph, report: Report) -> None:
    """net_output_pass.cc; a graph without outputs has nothing to do, and is pruned away."""
    ends = [edge for op in graph.ops if op.type == "NetOutput" for edge in op.edges]
    if None in ends:
        _inner(f"Param peer_out_anchor of output {ends.index(None)} is nullptr.", report)
    if not ends:
        report.trap("SIM084", "the graph has no outputs: atc prunes all of it away.")


def _check_constant(op: Op, report: Report) -> None:
    """graph_prepare.cc:VerifyConstOp."""
    value = op.attributes.get("value")
    if value is None or not isinstance(value.value, Tensor):
        _inner(f"Get Attr:value of op:{op.name}({op.type}) failed", report)
    desc = value.value.desc
    _check_size(op, byte_size(desc.dtype, desc.shape or ()), len(value.value.data), report)


def _check_size(op: Op, wanted: int, found: int, report: Report) -> None:
    """graph_prepare.cc:CheckTensorIsValid."""
    if wanted != found:
        _inner(
            f"Const:{op.name}({op.type}) has {found} bytes, its shape and dtype say {wanted}",
            report,
        )


def _inner(text: str, report: Report) -> NoReturn:
    report.inner(text)
    report.inner("GE GenerateOfflineModel execute failed.")
    raise Refused


def _text(op: Op, name: str) -> str:
    attribute = op.attributes.get(name)
    value = None if attribute is None else attribute.value
    return value if isinstance(value, str) else ""


def _number(op: Op, name: str) -> int:
    attribute = op.attributes.get(name)
    value = None if attribute is None else attribute.value
    return value if isinstance(value, int) else 0


def _ancestors(graph: Graph, report: Report) -> Mapping[str, frozenset[str]]:
    """By operator all that run ahead of it (compute_graph.cc:TopologicalSorting)."""
    needs = {
        op.name: {edge.producer for edge in op.edges if edge is not None} | {*op.controls}
        for op in graph.ops
    }
    found: dict[str, frozenset[str]] = {}
    try:
        for name in graphlib.TopologicalSorter(needs).static_order():
            ahead = frozenset(needs[name])
            found[name] = ahead.union(*(found[one] for one in ahead))
    except graphlib.CycleError:
        _inner(f"Graph[{graph.name}] topological sort failed: it has a circle.", report)
    return found


def _check_ref_inputs(graph: Graph, report: Report) -> None:
    """graph_prepare.cc:CheckRefOp: what an operator writes is there, and no constant."""
    by_name = graph.by_name()
    for op in graph.ops:
        for name, edge in _written(op):
            if edge is None:
                _inner(f"Param peer_out_anchor is nullptr: {op.name} writes its {name}.", report)
            source = by_name[edge.producer]
            if source.type in _CONSTANTS:
                _inner(
                    f"The ref input memory of ref node {op.name}[{op.type}] cannot be referenced "
                    f"from const node, but node {source.name}[{source.type}] is const",
                    report,
                )


def _written(op: Op) -> Iterator[tuple[str, Edge | None]]:
    """The inputs with an output of their name, as the file has them, and what they read."""
    made, edges = set(output_names(op).values()), op.edges
    for at, name in sorted(input_names(op).items()):
        if name in made and op.type not in _SOURCES:
            yield name, edges[at] if at < len(edges) else None


# IR definitions


def _check_recovery(op: Op, report: Report) -> None:
    """RecoverIrDefinitions: names of slots and attributes by the operator that is registered."""
    of = prototype(op.type)
    if of is None:
        return  # skipped there too: no kernel will be found
    stated = op.attributes.get("_ir_inputs_key")
    if stated is not None and stated.items is not None:
        names = [str(item) for item in stated.items]
        known = [slot.name for slot in of.inputs]
        if names != known[: len(names)]:
            report.inner(f"Compatibility failed for node {op.name}: ir inputs {names}, {known}")
            raise Refused
    for side, slots, names, count in (
        ("inputs", of.inputs, input_names(op), len(op.input_desc)),
        ("outputs", of.outputs, output_names(op), len(op.output_desc)),
    ):
        lost = _unmapped(slots, names, count, op if side == "inputs" else None)
        if lost:
            report.trap(
                "SIM074",
                f"{op.type} {op.name}: of its {side} {', '.join(lost)} map to no slot of the "
                f"operator, which has {', '.join(slot.name for slot in slots)}: atc takes them "
                "for absent (model_serialize.cc: _input_name_key).",
            )
    _check_attributes(op, of, report)
    places, edges = by_slot(of.inputs, input_names(op)), op.edges
    for slot in of.inputs:
        fed = [at for at in places[slot.name] if at < len(edges) and edges[at] is not None]
        # A dynamic input may stand for no tensor at all, as GroupedMatmul's bias does.
        wanted = len(places[slot.name]) if slot.dynamic else 0 if slot.optional else 1
        if len(fed) < wanted:
            report.inner(
                f"Call InferShapeAndType for node:{op.name}({op.type}) failed: its input "
                f"{slot.name} is not connected",
                "EZ9999",
            )
            raise Refused


def _unmapped(
    slots: tuple[Slot, ...], names: Mapping[int, str], count: int, op: Op | None
) -> list[str]:
    mapped = {at for places in by_slot(slots, names).values() for at in places}
    edges = () if op is None else op.edges
    lost: list[str] = []
    for at in range(count):
        unfed = op is not None and (at >= len(edges) or edges[at] is None)
        if at not in mapped and not unfed:
            lost.append(names.get(at, f"number {at}"))
    return lost


_UNREGISTERED = (("Reshape", "allowzero"),)
"""hicann/ops-math:conversion/reshape/framework/reshape_onnx_plugin.cpp writes it."""

_KINDS = {"Int": "i", "Float": "f", "Bool": "b", "String": "s", "Type": "dt", "Tensor": "t"}


def _check_attributes(op: Op, of: Prototype, report: Report) -> None:
    known = {attribute.name: attribute for attribute in of.attributes}
    for attribute in of.attributes:
        found = op.attributes.get(attribute.name)
        if found is None and attribute.required:
            what = "is not there"
        elif found is not None and not _is_of(found, attribute):
            what = f"is no {attribute.type}"
        else:
            continue
        report.trap(
            "SIM075",
            f"{op.type} {op.name}: its attribute {attribute.name} {what}; atc logs that at most, "
            "and what the operator then does is not said.",
        )
    unknown = [
        name
        for name in op.attributes
        if name not in known and not name.startswith("_") and (op.type, name) not in _UNREGISTERED
    ]
    if unknown:
        report.note(
            "SIM076", f"{op.type} {op.name}: nobody reads its attributes {', '.join(unknown)}."
        )


def _is_of(found: Attr, attribute: Attribute) -> bool:
    kind = attribute.type.removeprefix("List")
    if found.kind == "raw" or kind not in _KINDS:
        return True
    return found.kind == _KINDS[kind] and (found.items is not None) == ("List" in attribute.type)


# What is written


def _check_writers(graph: Graph, behind: Mapping[str, frozenset[str]], report: Report) -> None:
    """What GE leaves to whoever makes the graph (mem_rw_conflict_optimize.cc: NoAction)."""
    by_name = graph.by_name()
    owners: dict[tuple[str, int], str] = {}
    writers: dict[str, list[str]] = {}
    order = sorted(graph.ops, key=lambda op: len(behind[op.name]))
    for op in order:
        if op.type in ("Data", "RefData"):
            owners[op.name, 0] = op.name
        outputs = {name: at for at, name in output_names(op).items()}
        for name, edge in _written(op):
            owner = None if edge is None else owners.get((edge.producer, edge.output))
            if edge is not None and owner is None and _seen_through(edge, owners, by_name):
                report.trap(
                    "SIM085",
                    f"{op.name} writes a view of {_seen_through(edge, owners, by_name)}: whether "
                    "that is its own memory or a copy is up to the memory planner.",
                )
            if owner is not None:
                writers.setdefault(owner, []).append(op.name)
                owners[op.name, outputs[name]] = owner
    for owner, names in writers.items():
        if by_name[owner].type == "Data":
            report.trap(
                "SIM078",
                f"{names[0]} writes Data {owner}: where atc's runtime copies that input, what was "
                "written stays in the model's own memory, and is lost. Write a RefData.",
            )
        for op in graph.ops:
            _check_order(op, owner, names, owners, behind, report)


def _seen_through(
    edge: Edge, owners: Mapping[tuple[str, int], str], by_name: Mapping[str, Op]
) -> str:
    """The input of the model that a value is a view of, "" where it is of none."""
    op = by_name[edge.producer]
    while op.type in _VIEWS:
        source = next((item for item in op.edges if item is not None), None)
        if source is None:
            return ""
        if (source.producer, source.output) in owners:
            return owners[source.producer, source.output]
        op = by_name[source.producer]
    return ""


def _check_order(
    op: Op,
    owner: str,
    writers: list[str],
    owners: Mapping[tuple[str, int], str],
    behind: Mapping[str, frozenset[str]],
    report: Report,
) -> None:
    for edge in op.edges:
        if edge is None or owners.get((edge.producer, edge.output)) != owner:
            continue
        if op.type == "NetOutput":
            report.trap(
                "SIM077",
                f"{edge.producer} gives {owner}, which the graph writes, as an output of the "
                "model: atc warns that zero copy cannot be turned off, and of its precision.",
            )
            continue
        others = [name for name in writers if name not in (op.name, edge.producer)]
        loose = [n for n in others if n not in behind[op.name] and op.name not in behind[n]]
        if loose:
            report.trap(
                "SIM082",
                f"{op.type} {op.name} reads {owner} in no order with {loose[0]}, which writes it: "
                "it may find it half written. Let it read what the writer gives.",
            )
