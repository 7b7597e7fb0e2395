"""AWQ finds scales with which the layers' outputs change less."""

import numpy as np
import pytest

from omforge.quantization.awq import (
    GROUP_LIMIT,
    group_products,
    round_clipped,
    round_weighted,
    search_scales,
)
from omforge.quantization.blockwise import Scheme
from omforge.quantization.gptq import Codes

RNG = np.random.default_rng(0)
# A few inputs are much larger than the rest, as behind the norms of language models.
STRENGTH = np.where(np.arange(128) % 16 == 3, 20.0, 1.0).astype(np.float32)
X = RNG.normal(size=(400, 128)).astype(np.float32) * STRENGTH
W = [RNG.normal(size=(128, n)).astype(np.float32) for n in (24, 8)]


def error(scales: np.ndarray, scheme: Scheme) -> float:
    total = 0.0
    for weight in W:
        made = round_weighted(weight * scales[:, None], None, scheme).decoded(scheme.group)
        total += float(np.square(X @ (made / scales[:, None] - weight)).sum())
    return total


def test_scales_lessen_the_error_of_the_outputs() -> None:
    scheme = Scheme(4, 64)
    scales = search_scales(X, W, [scheme] * 2)
    assert error(scales, scheme) < 0.7 * error(np.ones(128, np.float32), scheme)
    assert scales[3] > scales[4]


def test_scales_are_ones_where_the_inputs_say_nothing() -> None:
    np.testing.assert_array_equal(search_scales(X * 0, W, [Scheme(4, 64)] * 2), np.ones(128))


def test_clipping_weighs_strong_inputs_more() -> None:
    weight, scheme = W[0], Scheme(4, 64)

    def weighted_error(strength: np.ndarray | None) -> float:
        made = round_weighted(weight, strength, scheme).decoded(64)
        return float(np.square(X @ (made - weight)).sum())

    assert weighted_error(np.square(X).mean(0)) < weighted_error(None)


# Inputs of a group that go together, so that their errors do not simply add up.
MIXED = X @ RNG.normal(size=(128, 128)).astype(np.float32)


def output_error(codes: Codes, size: int, x: np.ndarray = MIXED) -> float:
    return float(np.square(x @ (codes.decoded(size) - W[0])).sum())


@pytest.mark.parametrize("symmetric", [True, False])
def test_clipping_counts_what_a_group_adds_to_the_outputs(symmetric: bool) -> None:
    scheme = Scheme(4, 32, symmetric)
    products = group_products([MIXED[:150], MIXED[150:]], np.ones(128, np.float32), 32)
    clipped = round_clipped(W[0], products, MIXED, scheme)
    alone = round_weighted(W[0], np.square(MIXED).mean(0), scheme)
    assert output_error(clipped, 32) < 0.97 * output_error(alone, 32)


def test_products_are_those_of_the_divided_inputs() -> None:
    scales = np.linspace(0.5, 2, 128, dtype=np.float32)
    products = group_products([MIXED[:150].reshape(2, 75, 128), MIXED[150:]], scales, 48)
    assert [len(product) for product in products] == [48, 48, 32]
    divided = MIXED[:, 96:] / scales[96:]
    np.testing.assert_allclose(products[2], divided.T @ divided, rtol=1e-4, atol=1)


def test_a_large_group_keeps_the_diagonal_alone() -> None:
    count = GROUP_LIMIT + 2
    x = RNG.normal(size=(20, count)).astype(np.float32)
    products = group_products([x], np.ones(count, np.float32), count)
    np.testing.assert_allclose(products[0], np.square(x).sum(0), rtol=1e-5)
    weight, scheme = RNG.normal(size=(count, 4)).astype(np.float32), Scheme(4, 0)
    made = round_clipped(weight, products, x, scheme)
    expected = round_weighted(weight, products[0], scheme)
    np.testing.assert_array_equal(made.codes, expected.codes)


@pytest.mark.parametrize("scheme", [Scheme(8, 32), Scheme(4, 32, clip="none")])
def test_what_is_not_clipped_is_rounded(scheme: Scheme) -> None:
    products = group_products([MIXED], np.ones(128, np.float32), 32)
    made = round_clipped(W[0], products, MIXED, scheme)
    np.testing.assert_array_equal(made.codes, round_weighted(W[0], None, scheme).codes)
