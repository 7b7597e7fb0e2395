"""Lengths and capacities: the cheapest there are, against all sets there are."""

import itertools
import random

import pytest

from omforge.planning.buckets import choose_capacities, choose_lengths, padding


def cheapest(length: int, costs: dict[int, float]) -> float:
    """Every sequence of chunks, one by one."""
    if length <= 0:
        return 0.0
    return min(cost + cheapest(length - size, costs) for size, cost in costs.items())


def expected(prompts: dict[int, int], costs: dict[int, float]) -> float:
    total = sum(prompts.values())
    return sum(n * cheapest(length, costs) for length, n in prompts.items()) / total


@pytest.mark.parametrize("seed", range(40))
def test_the_lengths_are_those_of_least_time_of_all_sets(seed: int) -> None:
    draw = random.Random(seed)
    unit = draw.choice((1, 3))
    sizes = sorted(draw.sample(range(1, 13), draw.randint(2, 7)))
    # A launch, tokens, attention; or any costs at all.
    costs = {unit * s: 2 + s + 0.1 * s * s if seed % 2 else draw.uniform(1, 9) for s in sizes}
    prompts = {unit * draw.randint(1, 14): draw.randint(1, 5) for _ in range(draw.randint(1, 6))}
    most = draw.randint(1, 4)
    found = choose_lengths(prompts, costs, most)
    sets = [s for k in range(1, most + 1) for s in itertools.combinations(costs, k)]
    least = min(expected(prompts, {s: costs[s] for s in chosen}) for chosen in sets)
    assert found.cost == pytest.approx(least)
    assert expected(prompts, {s: costs[s] for s in found.sizes}) == pytest.approx(least)
    assert len(found.sizes) <= most


def test_more_lengths_are_never_slower() -> None:
    prompts = {n: 1 for n in range(5, 200, 7)}
    costs = {16 * k: 3.0 + 16 * k for k in range(1, 14)}
    times = [choose_lengths(prompts, costs, most).cost for most in (1, 2, 3, 4)]
    assert times == sorted(times, reverse=True)
    assert times[3] < times[0]


@pytest.mark.parametrize("seed", range(20))
def test_the_capacities_are_those_of_least_time_of_all_sets(seed: int) -> None:
    draw = random.Random(seed)
    steps = {draw.randint(1, 20): draw.randint(1, 5) for _ in range(6)}
    costs = {c: 5 + c * draw.uniform(0.5, 1.5) for c in (4, 8, 12, 16, 20)}
    most = draw.randint(1, 4)

    def of(chosen: tuple[int, ...]) -> float:
        total = sum(steps.values())
        return sum(n * costs[min(c for c in chosen if c >= t)] for t, n in steps.items()) / total

    sets = [s for k in range(1, most + 1) for s in itertools.combinations(costs, k)]
    least = min(of(s) for s in sets if s[-1] >= max(steps))
    found = choose_capacities(steps, costs, most)
    assert found.cost == pytest.approx(least)
    assert of(found.sizes) == pytest.approx(least)


def test_padding_is_the_share_of_tokens_that_are_none() -> None:
    assert padding({6: 2, 8: 1}, {6: (8,), 8: (8,)}) == pytest.approx(4 / 24)
