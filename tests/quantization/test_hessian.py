"""One array holds x^T x and a root of it."""

import tracemalloc

import numpy as np
import pytest

from omforge import ir
from omforge.quantization import hessian
from omforge.quantization.hessian import Hessian

RNG = np.random.default_rng(0)
INPUTS = 300  # more than two panels, and no multiple of one
MIX = RNG.normal(size=(INPUTS, INPUTS)) * np.linspace(0.1, 3, INPUTS)
X = (RNG.normal(size=(900, INPUTS)) @ MIX).astype(np.float32)


def made(x: np.ndarray = X) -> Hessian:
    found = Hessian(x.shape[1])
    for piece in np.array_split(x, 3):
        found.add(piece.reshape(1, *piece.shape))
    return found


def exact(damping: float, x: np.ndarray = X) -> np.ndarray:
    wide = x.astype(np.float64)
    matrix = wide.T @ wide
    return matrix + np.eye(len(matrix)) * damping * np.diag(matrix).mean()


def root(factor: hessian.Factor) -> np.ndarray:
    return np.triu(factor.above, 1).astype(np.float64) + np.diag(factor.diagonal)


@pytest.mark.parametrize("damping", [0.01, 1.0])
def test_the_root_times_itself_is_the_matrix_in_the_order_of_strength(damping: float) -> None:
    factor = made().factor(damping)
    expected = exact(damping)
    order = np.argsort(-np.square(X, dtype=np.float64).sum(0), kind="stable")
    np.testing.assert_array_equal(factor.order, order)
    product = root(factor) @ root(factor).T
    worst = np.abs(product - expected[np.ix_(order, order)]).max()
    assert worst < 1e-6 * expected.max()


@pytest.mark.parametrize(("start", "end"), [(0, 1), (0, INPUTS), (100, 164), (290, INPUTS)])
def test_rows_are_the_matrix(start: int, end: int) -> None:
    factor, expected = made().factor(0.01), exact(0.01)
    np.testing.assert_allclose(
        factor.rows(start, end), expected[start:end], atol=1e-6 * expected.max()
    )


def test_products_and_solutions() -> None:
    factor, expected = made().factor(0.05), exact(0.05)
    right = RNG.normal(size=(INPUTS, 7)).astype(np.float32)
    wanted = expected @ right
    np.testing.assert_allclose(factor.times(right), wanted, atol=1e-5 * np.abs(wanted).max())
    solved = np.linalg.solve(expected, right)
    np.testing.assert_allclose(factor.solve(right), solved, atol=1e-3 * np.abs(solved).max())


def test_another_damping_begins_from_the_matrix_again() -> None:
    twice, once = made(), made()
    twice.factor(1.0)
    np.testing.assert_array_equal(root(twice.factor(0.01)), root(once.factor(0.01)))
    assert twice.factor(0.01) is twice.factor(0.01)


def test_more_inputs_than_were_factored() -> None:
    grown, once = made(X[:600]), made(X[:600])
    grown.factor(0.01)
    for each in (grown, once):
        each.add(X[600:])
    np.testing.assert_array_equal(root(grown.factor(0.01)), root(once.factor(0.01)))


def test_the_factorisation_needs_panels_and_no_second_array(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(hessian, "_PANEL", 32)
    monkeypatch.setattr(hessian, "_ROWS", 64)
    found = Hessian(1200)
    found.add(RNG.normal(size=(64, 1200)).astype(np.float32))
    tracemalloc.start()
    factor = found.factor(0.01)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert factor.above is found.matrix
    assert peak < found.matrix.nbytes / 2


def test_inputs_that_say_the_same_are_damped_until_there_is_a_root() -> None:
    same = np.repeat(RNG.normal(size=(50, 1)) * 1e3, INPUTS, 1).astype(np.float32)
    factor = made(same).factor(1e-12)
    assert np.isfinite(root(factor)).all()


def test_inputs_of_zero() -> None:
    factor = made(np.zeros_like(X)).factor(0.01)
    np.testing.assert_array_equal(root(factor), np.eye(INPUTS))


@pytest.mark.parametrize("wrong", [np.inf, np.nan])
def test_inputs_that_are_not_finite(wrong: float) -> None:
    x = X.copy()
    x[3, 4] = wrong
    with np.errstate(invalid="ignore"), pytest.raises(ir.InputError, match="not all finite"):
        made(x).factor(0.01)


def test_the_diagonal_alone() -> None:
    found = Hessian(INPUTS, full=False)
    found.add(X)
    assert found.matrix.size == 0
    np.testing.assert_allclose(found.strength, np.square(X).mean(0), rtol=1e-4)


def test_drift_is_kept_up_to_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    found = Hessian(INPUTS)
    assert found.drift is None
    found.add(X, X + 1)
    np.testing.assert_allclose(found.drift, X.T @ np.ones_like(X), atol=1e-2)
    monkeypatch.setattr(hessian, "DRIFT_LIMIT", INPUTS - 1)
    large = Hessian(INPUTS)
    large.add(X, X + 1)
    assert large.drift is None
