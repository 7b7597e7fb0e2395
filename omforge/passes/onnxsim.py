"""Run onnxsim on the model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from omforge import ir
from omforge.rewriting.base import Pass


@dataclass(frozen=True)
class Onnxsim(Pass):
    """Simplify the graph by onnxsim, its weights shared and its metadata kept."""

    name: ClassVar[str] = "onnxsim"

    def run(self, model: ir.Model) -> int:
        """Simplify; the number of nodes gone, or 1, since what a guest changed is not counted.

        Raises:
            OmforgeError: onnxsim failed.
        """
        before = model.graph.num_nodes()
        ir.via_onnxsim(model)
        return max(1, before - model.graph.num_nodes())
