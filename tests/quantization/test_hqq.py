"""Half-quadratic quantisation lessens the loss that it is made for."""

import numpy as np
import pytest

from omforge.quantization.blockwise import Scheme, decode, quantize
from omforge.quantization.hqq import quantize_hqq


def loss(weights: np.ndarray, quantizer, scheme: Scheme) -> np.ndarray:
    made = quantizer(weights, 0, scheme)
    return (np.abs(weights - decode(made.codes, made.scale, made.zero)) ** 0.7).sum(0)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [4, 8])
def test_no_group_is_worse_than_nearest_and_many_are_better(bits: int, symmetric: bool) -> None:
    weights = np.random.default_rng(0).standard_t(3, (64, 200)).astype(np.float32)
    scheme = Scheme(bits, 64, symmetric)
    nearest, found = loss(weights, quantize, scheme), loss(weights, quantize_hqq, scheme)
    assert np.all(found <= nearest * (1 + 1e-6))
    assert np.mean(found < nearest) > 0.3


@pytest.mark.parametrize("symmetric", [True, False])
def test_outliers_are_not_given_up(symmetric: bool) -> None:
    """The loss hardly notices a clipped outlier, and the model does: squared errors may not rise."""
    weights = (np.random.default_rng(0).laplace(size=(128, 1000)) ** 3).astype(np.float32)
    scheme = Scheme(4, 128, symmetric)

    def squares(quantizer) -> np.ndarray:
        made = quantizer(weights, 0, scheme)
        return np.square(weights - decode(made.codes, made.scale, made.zero)).sum(0)

    assert np.all(squares(quantize_hqq) <= squares(quantize) * (1 + 1e-6))


def test_integers_stay_in_range() -> None:
    weights = np.random.default_rng(1).normal(3, 1, (32, 20)).astype(np.float32)
    made = quantize_hqq(weights, 0, Scheme(4, 32, symmetric=False))
    for integers in (made.codes, made.zero):
        assert integers.dtype == np.int8
        assert -8 <= integers.min() <= integers.max() <= 7
