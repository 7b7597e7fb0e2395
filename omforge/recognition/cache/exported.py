"""What the cache of an export was before a pass gave it another form.

The export is what a bundle is compared with, so whoever runs it must know its own interface. This
is kept on the model, in memory, as events are.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

from omforge import ir

_KEY, _COUNTERS = "omforge.exported_caches", "omforge.exported_counters"

Returns = Literal["whole", "rows"]


@dataclass(frozen=True)
class ExportedCache:
    """One cache tensor of an export.

    Attributes:
        input: The graph input.
        shape: Its sizes, as numbers or expressions of `batch` and `past`.
        output: The graph output that renews it.
        returns: `whole`: past and new; `rows`: the new ones alone, to be appended along `axis`.
        axis: The axis of the tokens.
        serves: The inputs [B, K, P, D] that stand in its place.
    """

    input: str
    shape: tuple[int | str, ...]
    output: str
    returns: Returns
    axis: int
    serves: tuple[str, ...] = ()


@dataclass(frozen=True)
class ExportedCounter:
    """An integer input of an export that counts the slots of a cache of fixed size.

    Attributes:
        input: The graph input.
        counts: `slots`: those that the new tokens go to, [S]; `start`: the first of them, a number
            or [B]; `end`: how many are valid with the new tokens.
    """

    input: str
    counts: Literal["slots", "start", "end"]


def keep_counters(model: ir.Model, counters: Iterable[ExportedCounter]) -> None:
    """Keep what counted slots on a model."""
    model.meta[_COUNTERS] = tuple(counters)


def exported_counters(model: ir.Model) -> tuple[ExportedCounter, ...]:
    """What was kept of them."""
    kept: Any = model.meta
    return kept.get(_COUNTERS, ())


def keep(model: ir.Model, caches: Iterable[ExportedCache]) -> None:
    """Add to what is kept on a model."""
    model.meta[_KEY] = (*exported_caches(model), *caches)


def exported_caches(model: ir.Model) -> tuple[ExportedCache, ...]:
    """What was kept on a model; the caches that are not among them are as they were."""
    kept: Any = model.meta
    return kept.get(_KEY, ())
