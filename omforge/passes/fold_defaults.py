"""Make constants of inputs that have a default.

Before::

    (tokens, lora [64, 4]) with an initializer `lora`

After::

    (tokens) with an initializer `lora`

An initializer that is an input too is what the input is where nobody feeds it. Before IR version 4
every weight was one, and exporters of adapters still write them. Nobody feeds a bundle such inputs,
and nothing can be raised while any weight might be another.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from omforge import ir
from omforge.rewriting.base import Pass
from omforge.rewriting.events import record

_SHOWN = 4


@dataclass(frozen=True)
class FoldDefaults(Pass):
    """Make constants of inputs that have a default: initializers that are inputs, too."""

    name: ClassVar[str] = "fold-defaults"
    changes_interface: ClassVar[bool] = True

    def run(self, model: ir.Model) -> int:
        """Fold; the number of inputs that are gone. They are one event."""
        graph = model.graph
        found = [value for value in graph.inputs if value.name in graph.initializers]
        for value in found:
            graph.inputs.remove(value)
        if found:
            names = ", ".join(str(value.name) for value in found[:_SHOWN])
            more = f" and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
            record(
                model,
                self.name,
                f"the choice of what has a default ({names}{more})",
                "the default is compiled in, and a caller can no longer set it",
            )
        return len(found)
