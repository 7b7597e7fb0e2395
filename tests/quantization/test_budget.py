"""Choosing options within bytes: never above the budget, and near the best there is."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from omforge.ir.errors import InputError
from omforge.quantization.budget import Option, assign, parse_size, size_text

LAYERS = st.lists(
    st.lists(
        st.builds(Option, st.integers(1, 60), st.floats(0, 10, width=16)), min_size=1, max_size=3
    ),
    min_size=1,
    max_size=6,
)


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("3.9GiB", int(3.9 * 2**30)),
        ("120MB", 120_000_000),
        ("90 mib", 90 * 2**20),
        ("1000", 1000),
        ("2kb", 2000),
        (".5TiB", 2**39),
    ],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GiB", "4 bytes", "0", "-3MB", "1e9", "0.1", "3..9GB"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(InputError, match="is no size"):
        parse_size(text)


def test_a_size_is_told_as_people_read_it() -> None:
    assert size_text(3 << 30) == "3.00 GiB (3,221,225,472 bytes)"
    assert size_text(1536) == "1.50 KiB (1,536 bytes)"
    assert size_text(9) == "9 bytes"


@given(LAYERS, st.integers(0, 300))
@settings(max_examples=300, deadline=None)
def test_it_fits_and_is_between_the_bound_and_the_best(
    layers: list[list[Option]], more: int
) -> None:
    budget = sum(min(option.nbytes for option in options) for options in layers) + more
    made = assign(layers, budget)
    taken = [options[i] for options, i in zip(layers, made.chosen, strict=True)]
    assert made.nbytes == sum(option.nbytes for option in taken) <= budget
    assert made.cost == pytest.approx(sum(option.cost for option in taken))
    best = min(
        sum(option.cost for option in choice)
        for choice in itertools.product(*layers)
        if sum(option.nbytes for option in choice) <= budget
    )
    assert made.bound <= best + 1e-9
    assert best <= made.cost + 1e-9


def test_it_is_near_the_bound_where_layers_are_many() -> None:
    rng = np.random.default_rng(0)
    layers = [
        [Option(4 * size, float(cost)), Option(8 * size, float(cost) / 200), Option(16 * size, 0)]
        for size, cost in zip(rng.choice([3, 9, 27], 200), rng.lognormal(size=200), strict=True)
    ]
    budget = 6 * sum(options[0].nbytes for options in layers) // 4
    made = assign(layers, budget)
    assert made.cost <= 1.002 * made.bound
    assert made == assign(layers, budget)


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(InputError, match="they take 12 at the least"):
        assign([[Option(5, 1), Option(9, 0)], [Option(7, 1)]], 11)


def test_an_exchange_uses_what_the_upgrades_leave() -> None:
    # By gain a byte the small one is first, but the large one alone is better.
    layers = [[Option(1, 10), Option(3, 5)], [Option(1, 20), Option(11, 0)]]
    assert assign(layers, 12).chosen == (0, 1)
