"""Merge nodes that compute the same thing twice."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from omforge import ir
from omforge.rewriting.base import Pass
from omforge.rewriting.matcher import SMALL
from omforge.rewriting.pattern import COMMUTATIVE


@dataclass(frozen=True)
class EliminateCommonSubexpressions(Pass):
    """Merge equal nodes, and equal small initializers before them.

    The work is onnx-ir's own, once operands that commute are in one order; TorchScript writes the
    same Shape and Gather for every use.
    """

    name: ClassVar[str] = "eliminate-common-subexpressions"

    def run(self, model: ir.Model) -> int:
        """Merge; the number of nodes and initializers gone, or of operands put in order."""
        before = _size(model)
        ir.common_passes.DeduplicateInitializersPass(size_limit=SMALL)(model)
        ir.common_passes.CommonSubexpressionEliminationPass()(model)
        aligned = 0
        # Merging makes operands equal, and more nodes comparable.
        while count := _align_operands(model):
            aligned += count
            ir.common_passes.CommonSubexpressionEliminationPass()(model)
        return before - _size(model) or aligned


def _align_operands(model: ir.Model) -> int:
    """Order the operands of `b + a` as those of an `a + b` before it; the number of nodes."""
    first: dict[tuple[str, frozenset[ir.Value | None]], ir.Node] = {}
    count = 0
    for node in model.graph:
        if node.domain != "" or node.op_type not in COMMUTATIVE or len(node.inputs) != 2:
            continue
        like = first.setdefault((node.op_type, frozenset(node.inputs)), node)
        if tuple(like.inputs) != tuple(node.inputs):
            for index, value in enumerate(like.inputs):
                node.replace_input_with(index, value)
            count += 1
    return count


def _size(model: ir.Model) -> int:
    return sum(len(graph) + len(graph.initializers) for graph in ir.all_graphs(model))
