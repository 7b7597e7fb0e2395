"""Sampling: what can be drawn, how often, and that it can be repeated."""

import numpy as np
import pytest

from omforge.ir.errors import CheckError, InputError
from omforge.runtime.sampling import Sampler, Sampling, distribution

LOGITS = np.log(np.array([0.1, 0.4, 0.2, 0.3], np.float32))


def test_greedy_takes_the_largest_and_the_lowest_of_equals():
    logits = np.array([[0, 2, 1], [3, 3, 1]], np.float32)
    assert Sampler(Sampling())(logits).tolist() == [1, 0]


@pytest.mark.parametrize(
    ("sampling", "tokens", "shares"),
    [
        (Sampling(temperature=1.0), [1, 3, 2, 0], [0.4, 0.3, 0.2, 0.1]),
        (Sampling(temperature=0.5), [1, 3, 2, 0], [16 / 30, 9 / 30, 4 / 30, 1 / 30]),
        (Sampling(temperature=1.0, top_k=2), [1, 3], [4 / 7, 3 / 7]),
        (Sampling(temperature=1.0, top_p=0.6), [1, 3], [4 / 7, 3 / 7]),
        (Sampling(temperature=1.0, top_p=0.01), [1], [1.0]),
        (Sampling(temperature=1.0, top_k=3, top_p=0.7), [1, 3], [4 / 7, 3 / 7]),
        (Sampling(temperature=1e-30), [1, 3, 2, 0], [1, 0, 0, 0]),
    ],
)
def test_the_distribution(sampling: Sampling, tokens: list[int], shares: list[float]):
    order, share = distribution(LOGITS, sampling)
    assert order.tolist() == tokens
    assert share == pytest.approx(shares, abs=1e-6)


def test_draws_follow_the_distribution():
    sampler = Sampler(Sampling(temperature=1.0, seed=3))
    drawn = [int(sampler(LOGITS[None])[0]) for _ in range(4000)]
    assert np.bincount(drawn, minlength=4) / 4000 == pytest.approx([0.1, 0.4, 0.2, 0.3], abs=0.03)


def test_a_seed_repeats_and_another_does_not():
    def draw(seed: int) -> list[int]:
        sampler = Sampler(Sampling(temperature=1.0, seed=seed))
        return [int(sampler(LOGITS[None])[0]) for _ in range(20)]

    assert draw(1) == draw(1)
    assert draw(1) != draw(2)


def test_a_row_draws_the_same_in_any_batch_and_rows_differ():
    alone, pair = (Sampler(Sampling(temperature=1.0)) for _ in range(2))
    single = [alone(LOGITS[None])[0] for _ in range(20)]
    both = [pair(np.stack([LOGITS, LOGITS])) for _ in range(20)]
    assert [rows[0] for rows in both] == single
    assert [rows[1] for rows in both] != single


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_logits_that_overflowed_are_refused(bad: float):
    logits = np.zeros((2, 4), np.float32)
    logits[1] = bad
    with pytest.raises(CheckError, match=r"the logits of row 1 hold .*float16 ends at 65504"):
        Sampler(Sampling())(logits)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -1.0}, "temperature is -1.0: it must be 0 or more"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"top_k": -1}, "top_k is -1: it must be 0"),
        ({"top_p": 0.0}, "top_p is 0.0: it must be above 0 and at most 1"),
        ({"top_p": 1.5}, "top_p is 1.5"),
        ({"seed": -1}, "seed is -1"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, float], message: str):
    with pytest.raises(InputError, match=message):
        Sampling(**options)
