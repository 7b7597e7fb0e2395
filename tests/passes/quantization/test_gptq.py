"""GPTQ changes a layer's outputs less than rounding each weight alone."""

import numpy as np
import pytest

from omforge import ir
from omforge.passes.quantization.blockwise import Scheme
from omforge.passes.quantization.gptq import Hessian, quantize_gptq

RNG = np.random.default_rng(0)
MIX = RNG.normal(size=(96, 96)).astype(np.float32)
X = (RNG.normal(size=(2000, 96)).astype(np.float32) @ MIX) * np.linspace(0.1, 3, 96, dtype="f4")
W = RNG.standard_t(4, (96, 40)).astype(np.float32)


def hessian(x: np.ndarray) -> Hessian:
    found = Hessian(x.shape[1])
    for piece in np.array_split(x, 3):
        found.add(piece.reshape(1, *piece.shape))
    return found


def output_error(decoded: np.ndarray) -> float:
    return float(np.linalg.norm(X @ (decoded - W)) / np.linalg.norm(X @ W))


def nearest(scheme: Scheme) -> np.ndarray:
    """Every weight alone: what GPTQ is where inputs have nothing to do with each other."""
    alone = hessian(np.eye(96, dtype=np.float32))
    return quantize_gptq(W, alone, scheme).decoded(scheme.size(96))


@pytest.mark.parametrize(
    "scheme", [Scheme(4, 32), Scheme(4, 32, symmetric=False), Scheme(4, 0), Scheme(8, 0)]
)
def test_outputs_change_less(scheme: Scheme) -> None:
    made = quantize_gptq(W, hessian(X), scheme)
    assert scheme.low <= made.codes.min()
    assert made.codes.max() <= scheme.high
    assert output_error(made.decoded(scheme.size(96))) < 0.8 * output_error(nearest(scheme))


def test_the_last_group_may_be_shorter() -> None:
    made = quantize_gptq(W, hessian(X), Scheme(4, 64))
    assert made.scale.shape == (2, 40)
    assert output_error(made.decoded(64)) < output_error(nearest(Scheme(4, 64)))


def test_inputs_that_are_always_zero_do_no_harm() -> None:
    x = X.copy()
    x[:, 5] = 0
    made = quantize_gptq(W, hessian(x), Scheme(4, 32))
    assert np.isfinite(made.decoded(32)).all()


def test_inputs_that_are_not_finite_are_refused() -> None:
    x = X.copy()
    x[0, 0] = np.inf
    with (
        pytest.raises(ir.InputError, match="not all finite"),
        np.errstate(invalid="ignore"),
    ):
        quantize_gptq(W, hessian(x), Scheme(4, 32))


def test_the_strength_of_inputs_is_their_mean_square() -> None:
    diagonal = Hessian(96, full=False)
    diagonal.add(X)
    np.testing.assert_allclose(diagonal.strength, np.square(X).mean(0), rtol=1e-4)
    np.testing.assert_allclose(hessian(X).strength, diagonal.strength, rtol=1e-6)
