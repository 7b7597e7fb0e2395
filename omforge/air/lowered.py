"""How a lowered ONNX graph says an operator of GE's own: what legalises and what emits agree on."""

from __future__ import annotations

from omforge import ir
from omforge.air.prototypes import prototype

GE = "ge"
"""The domain of nodes that are GE operators, under GE's names."""

SLOTS = "slots"
"""The attribute of such a node that names the input of each of its operands."""


def slots(node: ir.Node) -> tuple[str, ...]:
    """The input of each operand of a GE operator."""
    return tuple(node.attributes[SLOTS].as_strings())


def written_slot(node: ir.Node) -> int | None:
    """The place of the operand that a node writes; None for most nodes."""
    of = prototype(node.op_type) if node.domain == GE else None
    if of is None or not of.refs:
        return None
    return next((at for at, slot in enumerate(slots(node)) if slot in of.refs), None)
