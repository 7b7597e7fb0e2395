"""An existing onnx-graphsurgeon function as a pass."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from omforge import ir
from omforge.rewriting.base import Pass


@dataclass(frozen=True)
class GraphSurgeonPass(Pass):
    """Run a function on the model as a `gs.Graph`: verified, timed and compared like any pass.

    Weights are shared with the function, not copied, and the metadata that graphsurgeon drops is
    restored; see `omforge.ir.interop`.

    Attributes:
        name: What reports call the pass.
        function: Edits the graph in place and returns None, or returns another.
        changes_interface: Whether it adds, removes or reshapes inputs or outputs.
    """

    # A guest is named, and says what it changes, where it is made: it has no class of its own.
    name: str = "graphsurgeon"  # pyright: ignore[reportIncompatibleVariableOverride]
    function: Callable[[Any], Any] = field(kw_only=True)
    changes_interface: bool = False  # pyright: ignore[reportIncompatibleVariableOverride]

    def run(self, model: ir.Model) -> int:
        """Run the function; 1, since what a guest changed is not counted.

        Raises:
            OmforgeError: The function failed, or what it made cannot be exported.
        """
        ir.via_graphsurgeon(model, self.function)
        return 1
