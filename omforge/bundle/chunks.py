"""How a prompt is cut into chunks: by what each takes where that is known, or by its tokens."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence


def cheapest_chunks(length: int, costs: Mapping[int, float]) -> list[tuple[int, int]]:
    """Cut tokens into the chunks that cost the least: (the chunk's size, how many are real).

    It is an unbounded knapsack: `best[n] = min over s of cost[s] + best[n - s]`. Of equally cheap
    ones it takes those of the fewest tokens, then the fewest chunks. The largest come first, so
    that padding is in the smallest.

    Args:
        length: Tokens of the prompt.
        costs: Of each size that a chunk may have, above 0.
    """
    unit = math.gcd(*costs)
    best: list[tuple[float, int, int, int]] = [(0.0, 0, 0, 0)]
    for left in range(1, -(-length // unit) + 1):
        options: list[tuple[float, int, int, int]] = []
        for size, cost in costs.items():
            before = best[max(0, left - size // unit)]
            options.append((before[0] + cost, before[1] + size, before[2] + 1, size))
        best.append(min(options))
    sizes: list[int] = []
    left = -(-length // unit)
    while left > 0:
        sizes.append(best[left][3])
        left -= sizes[-1] // unit
    chunks: list[tuple[int, int]] = []
    for size in sorted(sizes, reverse=True):
        chunks.append((size, min(size, length)))
        length -= size
    return chunks


def plan_chunks(length: int, sizes: Sequence[int]) -> list[tuple[int, int]]:
    """Cut `length` tokens into chunks: (the bucket's tokens, how many of them are real).

    The largest bucket that fits, again and again; the rest goes into the smallest one that holds
    it, as soon as that computes no more tokens than going on with smaller ones would.
    """
    chunks: list[tuple[int, int]] = []
    while length > 0:
        fitting = max((size for size in sizes if size <= length), default=0)
        holding = min((size for size in sizes if size >= length), default=0)
        going_on = -(-length // fitting) * fitting if fitting else holding
        if holding and holding <= going_on:
            return [*chunks, (holding, length)]
        chunks.append((fitting, fitting))
        length -= fitting
    return chunks
