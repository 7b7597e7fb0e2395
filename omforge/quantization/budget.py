"""Choose how each layer is stored, for the least cost within a number of bytes.

Each layer takes one of a few options, and the sums of bytes and of costs count: the multiple-choice
knapsack problem (Kellerer, Pferschy and Pisinger, "Knapsack Problems", 2004, chapter 11). The first
answer takes upgrades in falling order of what they gain a byte, as the problem's relaxation does,
in which one option may be taken in part; what is left of the budget is then used by exchanges. The
relaxation's cost is a bound that no choice can be below, and tells how near the answer is to it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from omforge.ir.errors import InputError

Array = npt.NDArray[Any]

_UNITS = {
    "": 1,
    "b": 1,
    **{f"{letter}b": 1000**power for power, letter in enumerate("kmgt", 1)},
    **{f"{letter}ib": 1024**power for power, letter in enumerate("kmgt", 1)},
}

_EXCHANGES = 10_000
"""Each one lessens the cost, so they end by themselves; this is for costs that hardly differ."""


@dataclass(frozen=True)
class Option:
    """One way to store a layer."""

    nbytes: int
    cost: float


@dataclass(frozen=True)
class Assignment:
    """What was chosen.

    Attributes:
        chosen: The number of each layer's option.
        nbytes: Of all layers.
        cost: Of all layers.
        bound: No choice within the budget costs less.
    """

    chosen: tuple[int, ...]
    nbytes: int
    cost: float
    bound: float


def parse_size(text: str) -> int:
    """Return the bytes that a text such as `3.9GiB`, `120MB` or `1000` says.

    Raises:
        InputError: It says none, or not one byte.
    """
    found = re.fullmatch(r"\s*(\d+\.?\d*|\.\d+)\s*([a-z]*)\s*", text.lower())
    size = 0
    if found is not None and found[2] in _UNITS:
        size = int(float(found[1]) * _UNITS[found[2]])
    if size < 1:
        raise InputError(
            f"{text!r} is no size",
            "it is a number above 0 and a unit: KB, MB and GB are powers of 1,000, "
            "KiB, MiB and GiB of 1,024",
            "For example 3.9GiB, 120MB",
        )
    return size


def size_text(size: int) -> str:
    """Return a size as people read it, and to the byte."""
    for unit, scale in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if size >= scale:
            return f"{size / scale:.2f} {unit} ({size:,} bytes)"
    return f"{size} bytes"


def assign(layers: Sequence[Sequence[Option]], budget: int) -> Assignment:
    """Choose an option for each layer; the same arguments give the same choice.

    Args:
        layers: The options of each, at least one.
        budget: Bytes of all layers.

    Raises:
        InputError: The smallest options together have more bytes.
    """
    chosen = [min(range(len(x)), key=lambda i: (x[i].nbytes, x[i].cost)) for x in layers]
    left = budget - sum(x[i].nbytes for x, i in zip(layers, chosen, strict=True))
    if left < 0:
        raise InputError(
            f"{budget} bytes do not hold the layers", f"they take {budget - left} at the least"
        )
    cost = sum(x[i].cost for x, i in zip(layers, chosen, strict=True))
    steps = sorted(_steps(layers, chosen), key=lambda step: (-step.rate, step.layer, step.option))
    bound, passed, room = cost, False, left
    for step in steps:
        if step.nbytes <= room and not passed:
            room -= step.nbytes
            bound -= step.gain
        elif not passed:
            passed = True
            bound -= step.rate * room
        if step.nbytes <= left and step.start == chosen[step.layer]:
            left -= step.nbytes
            chosen[step.layer] = step.option
    for _ in range(_EXCHANGES):
        change = _best_exchange(layers, chosen, left)
        if not change:
            break
        for layer, option in change:
            left += layers[layer][chosen[layer]].nbytes - layers[layer][option].nbytes
            chosen[layer] = option
    cost = sum(x[i].cost for x, i in zip(layers, chosen, strict=True))
    return Assignment(tuple(chosen), budget - left, cost, min(bound, cost))


@dataclass(frozen=True)
class _Step:
    """An upgrade of a layer from one option to the next one that the relaxation takes."""

    layer: int
    start: int
    option: int
    nbytes: int
    gain: float

    @property
    def rate(self) -> float:
        return self.gain / self.nbytes


def _steps(layers: Sequence[Sequence[Option]], chosen: Sequence[int]) -> Iterator[_Step]:
    """The upgrades of each layer along its convex hull: each gains less a byte than the last."""
    for layer, (options, start) in enumerate(zip(layers, chosen, strict=True)):
        at = start
        while True:
            better = [
                _Step(layer, at, i, x.nbytes - options[at].nbytes, options[at].cost - x.cost)
                for i, x in enumerate(options)
                if x.nbytes > options[at].nbytes and x.cost < options[at].cost
            ]
            if not better:
                break
            best = max(better, key=lambda step: (step.rate, step.nbytes))
            yield best
            at = best.option


def _best_exchange(
    layers: Sequence[Sequence[Option]], chosen: Sequence[int], left: int
) -> list[tuple[int, int]]:
    """The change of one layer, or of two, that fits and gains most; nothing if none gains."""
    moves = [
        (layer, option, x.nbytes - options[now].nbytes, options[now].cost - x.cost)
        for layer, (options, now) in enumerate(zip(layers, chosen, strict=True))
        for option, x in enumerate(options)
        if option != now
    ]
    # Upgrades in order of their bytes, and the best one that is no larger than each.
    ups = sorted((m for m in moves if m[3] > 0), key=lambda m: (m[2], m[0], m[1]))
    if not ups:
        return []
    sizes = np.array([m[2] for m in ups], np.int64)
    gains = np.array([m[3] for m in ups])
    highest: Array = np.maximum.accumulate(gains)
    index: Array = np.maximum.accumulate(np.where(gains == highest, np.arange(len(ups)), 0))
    best, change = 1e-12 * float(highest[-1]), list[tuple[int, int]]()
    downs = [m for m in moves if m[3] <= 0 and m[2] < 0]
    for down in (None, *downs):
        room, lost = (left, 0.0) if down is None else (left - down[2], -down[3])
        place = int(np.searchsorted(sizes, room, side="right")) - 1
        if place < 0:
            continue
        up = ups[int(index[place])]
        if up[3] - lost > best and (down is None or up[0] != down[0]):
            best = up[3] - lost
            change = [(m[0], m[1]) for m in (down, up) if m is not None]
    return change
