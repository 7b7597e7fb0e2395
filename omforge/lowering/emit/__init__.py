"""From a lowered graph to a GE graph: each node by the table of its operator.

A lowered graph is the same for both fronts but for the forms that were chosen: what has a GE
operator of its own (domain `ge`, made by `Builder.ge`) is laid out as it is, standard operators and
target ops by `standard` and `target_ops`.

A cache that the graph writes in place is an input that a writing operator takes as what it writes:
it becomes a RefData, behind all other inputs, and what is written is no output of the model.
"""

from __future__ import annotations

from dataclasses import dataclass

from omforge import ir
from omforge.air.graph import Air, Graph
from omforge.air.lowered import GE, SLOTS, slots, written_slot
from omforge.air.prototypes import prototype
from omforge.lowering.emit.emission import AttributeValue, Emission, NotEmittedError, Place
from omforge.lowering.emit.standard import STANDARD
from omforge.lowering.emit.target_ops import TARGET
from omforge.lowering.legalize.builder import NOT_LEGALIZED

__all__ = ["INLINE", "Emitted", "emit", "ref_inputs"]

INLINE = 1024
"""Bytes from which a constant is kept outside the file."""


@dataclass(frozen=True)
class Emitted:
    """A GE graph, and its interface by the names of the lowered graph.

    Attributes:
        air: The file's content.
        inputs: In the order of their indices.
        outputs: In the order of NetOutput.
    """

    air: Air
    inputs: tuple[ir.Value, ...]
    outputs: tuple[ir.Value, ...]


def emit(model: ir.Model, name: str, place: Place) -> Emitted:
    """Return a lowered graph as a GE graph.

    Args:
        model: In the dialect, its nodes named (`legalize`).
        name: Of the graph and the model.
        place: Says where each constant's bytes are.

    Raises:
        CheckError: Nodes cannot be said in GE's operators; the message names them all.
    """
    graph = model.graph
    written = ref_inputs(graph)
    inputs = [value for value in graph.inputs if value not in written] + written
    to = Emission(place)
    for index, value in enumerate(inputs):
        to.input(value, index, written=value in written)
    faults: list[str] = []
    lost: set[ir.Value] = set()
    for node in graph:
        if lost.intersection(value for value in node.inputs if value is not None):
            lost.update(node.outputs)
            continue
        try:
            _emit_node(to, node)
        except NotEmittedError as fault:
            reason = node.metadata_props.get(NOT_LEGALIZED) or fault
            faults.append(f"{node.op_type} {node.name}: {reason}")
            lost.update(node.outputs)
    if faults:
        raise ir.CheckError(
            f"{name} has {len(faults)} nodes that the front air cannot say",
            "\n" + "\n".join(f"- {fault}" for fault in faults) + "\n",
            "Choose what the lines above allow, or compile with --front onnx",
        )
    writers = {id(node.outputs[0]): node for node in graph if written_slot(node) is not None}
    outputs = [value for value in graph.outputs if id(value) not in writers]
    to.end(outputs, [node.name or "" for node in writers.values()])
    fed = tuple(to.edge(value) for value in inputs)
    air = Air(name, (Graph(name, tuple(to.ops), fed),))
    return Emitted(air, tuple(inputs), tuple(outputs))


def ref_inputs(graph: ir.Graph) -> list[ir.Value]:
    """The inputs that the graph writes, in its order."""
    found: list[ir.Value] = []
    for node in graph:
        at = written_slot(node)
        value = None if at is None else node.inputs[at]
        if value is not None and value.is_graph_input():
            found.append(value)
    return [value for value in graph.inputs if value in found]


def _emit_node(to: Emission, node: ir.Node) -> None:
    if node.domain == GE:
        _emit_ge(to, node)
        return
    table = TARGET if node.op_type in TARGET else STANDARD
    found = table.get(node.op_type) if node.domain == "" else None
    if found is None:
        place = f"{node.domain}::" if node.domain else ""
        raise NotEmittedError(f"there is no GE operator for {place}{node.op_type} in the table")
    found(to, node)


def _emit_ge(to: Emission, node: ir.Node) -> None:
    operands: dict[str, list[str]] = {}
    for slot, value in zip(slots(node), node.inputs, strict=True):
        operands.setdefault(slot, []).append(to.edge(value))
    attributes: dict[str, AttributeValue] = {}
    for name, attribute in node.attributes.items():
        if name == SLOTS:
            continue
        value = attribute.value
        attributes[name] = value if isinstance(value, int | float | str) else tuple(value)
    of = prototype(node.op_type)
    flags = {item.name for item in of.attributes if item.type == "Bool"} if of else set[str]()
    made = {name: bool(v) if name in flags else v for name, v in attributes.items()}
    to.add(node.op_type, node.name or node.op_type, operands, list(node.outputs), made)
