"""Weights of experts that a router scatters to the places of its choices."""

from __future__ import annotations

from dataclasses import dataclass

from omforge import ir
from omforge.ir.values import attribute
from omforge.recognition.experts.row_wise import is_zero
from omforge.recognition.views import shape_of
from omforge.rewriting.match import NoMatch


@dataclass(frozen=True)
class Scattered:
    """Zeros but for the choices of a TopK.

    Attributes:
        node: The ScatterElements, [.., E].
        choices: Integer [.., k], each of them once.
        updates: [.., k], what is at their places.
    """

    node: ir.Node
    choices: ir.Value
    updates: ir.Value

    @classmethod
    def of(cls, node: ir.Node) -> Scattered:
        """Raises NoMatch where a node scatters anything else."""
        data, choices, updates = node.inputs
        assert data is not None
        assert choices is not None
        assert updates is not None
        shape, rank = shape_of(data), len(shape_of(data))
        if attribute(node, "axis", 0) not in (-1, rank - 1) or not isinstance(shape[-1], int):
            raise NoMatch("it does not scatter along a last axis of known size", node)
        if attribute(node, "reduction", "none") not in ("none", "add"):
            raise NoMatch(f"it reduces with {attribute(node, 'reduction')}", node)
        if not is_zero(data):
            raise NoMatch("it scatters into what is no zero", data)
        maker = choices.producer()
        if maker is None or maker.op_type != "TopK" or choices is not maker.outputs[1]:
            raise NoMatch("no TopK says where, so one place may be taken twice", choices)
        if attribute(maker, "axis", -1) not in (-1, rank - 1):
            raise NoMatch("the TopK chooses along another axis", maker)
        if shape_of(choices)[:-1] != shape[:-1] or shape_of(updates) != shape_of(choices):
            raise NoMatch("it scatters less than one row for each row of zeros", node)
        return cls(node, choices, updates)
