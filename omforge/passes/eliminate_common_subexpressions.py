"""Merge nodes that compute the same thing twice."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from omforge import ir
from omforge.passes.pipeline import Pass


@dataclass(frozen=True)
class EliminateCommonSubexpressions(Pass):
    """Merge equal nodes, and equal small initializers before them.

    The work is onnx-ir's own; TorchScript writes the same Shape and Gather for every use.
    """

    name: ClassVar[str] = "eliminate-common-subexpressions"

    def run(self, model: ir.Model) -> int:
        """Merge; the number of nodes and initializers gone."""
        before = _size(model)
        ir.common_passes.DeduplicateInitializersPass(size_limit=16)(model)
        ir.common_passes.CommonSubexpressionEliminationPass()(model)
        return before - _size(model)


def _size(model: ir.Model) -> int:
    return model.graph.num_nodes() + len(model.graph.initializers)
