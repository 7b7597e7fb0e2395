"""GPTQ changes a layer's outputs less than rounding each weight alone."""

import numpy as np
import pytest

from omforge import ir
from omforge.quantization.blockwise import Scheme
from omforge.quantization.gptq import CATCH_UP, quantize_gptq
from omforge.quantization.hessian import Hessian

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


def textbook(w: np.ndarray, x: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """Algorithm 1 of the paper for one symmetric scale a column, by the inverse of H."""
    matrix = x.T @ x
    matrix += np.eye(len(w)) * 0.01 * np.diag(matrix).mean()
    order = np.argsort(-np.diag(x.T @ x), kind="stable")
    upper = np.linalg.cholesky(np.linalg.inv(matrix[np.ix_(order, order)])).T
    left, codes = w[order].astype(np.float64), np.empty(w.shape)
    for row in range(len(w)):
        codes[order[row]] = np.clip(np.rint(left[row] / scale), -8, 7)
        error = (left[row] - codes[order[row]] * scale) / upper[row, row]
        left[row + 1 :] -= np.outer(upper[row, row + 1 :], error)
    return codes


def test_without_rounds_it_is_the_published_algorithm() -> None:
    made = quantize_gptq(W, hessian(X), Scheme(4, 0), rounds=0)
    expected = textbook(W, X.astype(np.float64), made.scale[0])
    assert (made.codes == expected).mean() > 0.99  # but for rounding of what is all but a tie


def test_each_round_lessens_the_error() -> None:
    scheme = Scheme(4, 32, symmetric=False)
    errors = [
        output_error(quantize_gptq(W, hessian(X), scheme, rounds=n).decoded(32)) for n in (0, 1, 2)
    ]
    assert errors[1] < 0.97 * errors[0]
    assert errors[2] < errors[1]


def test_damping_keeps_the_weights_nearer() -> None:
    def weight_error(damping: float) -> float:
        made = quantize_gptq(W, hessian(X), Scheme(4, 32), damping=damping).decoded(32)
        return float(np.linalg.norm(made - W))

    assert weight_error(1.0) < 0.9 * weight_error(0.01)


def test_columns_do_not_depend_on_each_other() -> None:
    wide = np.tile(W, (1, 20))  # more than are rounded at once
    made = quantize_gptq(wide, hessian(X), Scheme(4, 32))
    alone = quantize_gptq(W, hessian(X), Scheme(4, 32))
    np.testing.assert_array_equal(made.scale, np.tile(alone.scale, (1, 20)))
    assert (made.codes == np.tile(alone.codes, (1, 20))).mean() > 0.999


def test_errors_of_earlier_layers_are_made_up_for() -> None:
    # The text reads the layer's inputs after an earlier layer mixed a third of them up.
    off = np.eye(96) + 0.3 * RNG.normal(size=(96, 96)) / np.sqrt(96)
    now = (X @ off).astype(np.float32)

    def error(**exact: np.ndarray) -> float:
        found = Hessian(96)
        found.add(now, **exact)
        made = quantize_gptq(W, found, Scheme(8, 0)).decoded(96)
        return float(np.linalg.norm(now @ made - X @ W))

    assert error(exact=X) < (1 - 0.8 * CATCH_UP) * error()
