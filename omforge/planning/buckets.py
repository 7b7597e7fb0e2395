"""Choose prefill lengths and cache capacities, for the least expected time.

A prompt is covered by the cheapest sequence of chunks (`bundle.chunks`). Which lengths to have is
searched exactly, by branch and bound: lengths are chosen from the longest to the shortest, and a
choice is left aside when not even all shorter lengths together would make it better than the best
so far. (The covers of a set are no sum over its members, so that no recursion over them is exact.)

Capacities are a recursion: a step at n tokens runs at the least capacity that holds them, so that
the capacities cut the range of lengths into segments, and each segment's cost is its own.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Choice:
    """What was chosen.

    Attributes:
        sizes: In ascending order.
        cost: Expected, over the histogram: its mean.
    """

    sizes: tuple[int, ...]
    cost: float


def choose_lengths(prompts: Mapping[int, int], costs: Mapping[int, float], most: int) -> Choice:
    """Return the lengths that cover prompts in the least expected time.

    Args:
        prompts: How many there are of each length.
        costs: Of a chunk, by each length that may be chosen.
        most: How many may be chosen.
    """
    search = _Search(prompts, costs)
    search.choose(most)
    chosen = tuple(sorted(search.sizes[at] for at in search.best))
    return Choice(chosen, search.least)


class _Search:
    """Branch and bound over sets of lengths; tokens are counted in the largest unit of all."""

    def __init__(self, prompts: Mapping[int, int], costs: Mapping[int, float]) -> None:
        unit = math.gcd(*costs)
        self.sizes = sorted(costs)
        self._steps = np.array([size // unit for size in self.sizes])
        self._costs = np.array([costs[size] for size in self.sizes])
        longest = -(-max(prompts) // unit)
        self._weights = np.zeros(longest + 1)
        for length, count in prompts.items():
            self._weights[-(-length // unit)] += count / sum(prompts.values())
        # Row j: covers by the first j lengths alone; no length covers nothing.
        rows = [np.full(longest + 1, np.inf)]
        rows[0][0] = 0.0
        for at in range(len(self.sizes)):
            rows.append(self._with(rows[-1][None], np.array([at]))[0])
        self._shorter = np.stack(rows)
        self.best: tuple[int, ...] = ()
        self.least = math.inf

    def _with(self, covers: Array, added: Array) -> Array:
        """Covers [R, n] when each row may also use the length of that number, `added` [R]."""
        found, rows = covers.copy(), np.arange(len(added))
        steps, costs = self._steps[added], self._costs[added]
        for left in range(1, covers.shape[1]):
            before = found[rows, np.maximum(0, left - steps)]
            np.minimum(found[:, left], before + costs, out=found[:, left])
        return found

    def choose(self, most: int) -> None:
        self._extend((), self._shorter[0], len(self.sizes), most)

    def _extend(self, chosen: tuple[int, ...], covers: Array, below: int, most: int) -> None:
        if most == 0 or below == 0:
            return
        candidates = np.arange(below)
        alone = self._with(np.repeat(covers[None], below, 0), candidates)
        expected = alone @ self._weights
        first = int(np.argmin(expected))
        if expected[first] < self.least:
            self.least, self.best = float(expected[first]), (*chosen, first)
        if most == 1:
            return
        # At best all shorter lengths were there too.
        bounds = self._with(self._shorter[:below], candidates)
        for at in chosen:
            bounds = self._with(bounds, np.full(below, at))
        least = bounds @ self._weights
        for at in np.argsort(least, kind="stable"):
            if least[at] >= self.least:
                return
            self._extend((*chosen, int(at)), alone[at], int(at), most - 1)


def choose_capacities(steps: Mapping[int, int], costs: Mapping[int, float], most: int) -> Choice:
    """Return the capacities at which decode steps take the least expected time.

    Args:
        steps: How many there are behind each number of tokens.
        costs: Of a step, by each capacity that may be chosen; the largest holds every step.
        most: How many may be chosen.
    """
    sizes = sorted(costs)
    total = sum(steps.values())
    held = [sum(n for length, n in steps.items() if length <= size) / total for size in sizes]
    # Row k: the least cost of k capacities whose largest is the one of that number, and the others.
    best = [(held[at] * costs[size], (size,)) for at, size in enumerate(sizes)]
    for _ in range(1, most):
        longer = [
            (best[before][0] + (held[at] - held[before]) * costs[size], (*best[before][1], size))
            for at, size in enumerate(sizes)
            for before in range(at)
        ]
        best = [
            min([best[at], *(each for each in longer if each[1][-1] == size)])
            for at, size in enumerate(sizes)
        ]
    whole = [best[at] for at, share in enumerate(held) if share == held[-1]]
    cost, chosen = min(whole)
    return Choice(chosen, cost)


def padding(prompts: Mapping[int, int], covers: Mapping[int, Sequence[int]]) -> float:
    """Return the share of computed tokens that are padding."""
    computed = sum(sum(covers[length]) * count for length, count in prompts.items())
    return 1 - sum(length * count for length, count in prompts.items()) / computed
