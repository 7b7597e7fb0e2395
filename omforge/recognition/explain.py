"""Why a block was not raised: the closest match, where it ended, and in which layers.

A pass that leaves something alone records an event with the node where its match ended, what it
expected there and what it found. Here the events of a whole model are put together: the same miss
in thirty layers is one line, and one layer that differs from the others stands out.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from omforge.recognition.coverage import Coverage
from omforge.rewriting.events import Event, event_kind

KINDS: Mapping[str, tuple[str, ...]] = {
    "attention": ("fuse-attention",),
    "rotary": ("fuse-rotary",),
    "norm": ("fuse-rms-norm", "fuse-layer-norm"),
    "mlp": ("fuse-swish", "fuse-gelu"),
}
"""The passes that raise each kind of block that `coverage` counts."""

# Exporters number layers in module paths and node names: layers.13, h/3, blocks.0, layer_7.
_LAYER = re.compile(r"(?:layers?|blocks?|h)[._/](\d+)")


@dataclass(frozen=True)
class Miss:
    """One reason for which blocks were left alone.

    Attributes:
        pass_name: The pass that left them alone.
        reason: What was expected and what was there, for the first of them.
        places: Where, one entry a block.
        layers: The layers that these belong to, as far as names tell.
    """

    pass_name: str
    reason: str
    places: tuple[str, ...]
    layers: tuple[int, ...]

    def __str__(self) -> str:
        first = next(iter(self.places), "")
        where = _layers_text(self.layers) or first
        more = f" (and {len(self.places) - 1} more)" if len(self.places) > 1 else ""
        return f"{where}: {self.reason}; at {first}{more}"


@dataclass(frozen=True)
class Explanation:
    """What was raised, and every reason why something was not."""

    coverage: Coverage
    misses: tuple[Miss, ...]

    def lines(self) -> list[str]:
        """The explanation as text, one line a kind of block and an indented one a reason."""
        lines: list[str] = []
        shown: set[Miss] = set()
        for name, kind in self.coverage.kinds.items():
            lines.append(f"{name}: {kind.found} of {kind.expected} raised")
            for miss in self.misses:
                if miss.pass_name in KINDS.get(name, ()):
                    shown.add(miss)
                    lines.append(f"  {miss}")
        lines += self.coverage.lost
        lines += [f"unrecognised: {line}" for line in self.coverage.unrecognised]
        rest = [miss for miss in self.misses if miss not in shown]
        if rest:
            lines.append("besides:")
            lines += [f"  {miss.pass_name}: {miss}" for miss in rest]
        return lines

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "coverage": self.coverage.to_json(),
            "misses": [
                {
                    "pass": miss.pass_name,
                    "reason": miss.reason,
                    "places": list(miss.places),
                    "layers": list(miss.layers),
                }
                for miss in self.misses
            ],
        }


def explain(
    coverage: Coverage,
    told: Iterable[Event],
    *,
    pass_name: str | None = None,
    layer: int | None = None,
    at: str | None = None,
) -> Explanation:
    """Put the events of a raised model together.

    Args:
        coverage: What was raised.
        told: The events that the passes recorded on the model.
        pass_name: Only what this pass left alone.
        layer: Only what belongs to this layer.
        at: Only what is at a node or value whose name holds this text.
    """
    groups: dict[tuple[str, bool, str], list[Event]] = {}
    for event in told:
        wanted = pass_name in (None, event.pass_name)
        wanted = wanted and (layer is None or layer_of(event) == layer)
        wanted = wanted and (at is None or at in event.where or at in event.reason)
        if wanted:
            groups.setdefault(event_kind(event), []).append(event)
    misses = tuple(_miss(name, events) for (name, _, _), events in groups.items())
    return Explanation(coverage, misses)


def layer_of(event: Event) -> int | None:
    """The layer that an event is about, if its place or its reason names one."""
    found = _LAYER.search(event.where) or _LAYER.search(event.reason)
    return int(found.group(1)) if found else None


def _miss(pass_name: str, events: list[Event]) -> Miss:
    layers = sorted({n for n in map(layer_of, events) if n is not None})
    places = tuple(event.where for event in events)
    return Miss(pass_name, events[0].reason, places, tuple(layers))


def _layers_text(layers: tuple[int, ...]) -> str:
    """`layer 13`, `layers 0-27` or `layers 1, 3, 5`."""
    if not layers:
        return ""
    if len(layers) == 1:
        return f"layer {layers[0]}"
    if list(layers) == list(range(layers[0], layers[-1] + 1)):
        return f"layers {layers[0]}-{layers[-1]}"
    return f"layers {', '.join(map(str, layers))}"
