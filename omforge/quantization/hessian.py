"""What a layer's outputs depend on: x^T x of its inputs, and a triangular root of it.

The outputs of a linear layer change by e^T H e, H = x^T x, when its weights change by e. H is
symmetric and its root triangular, so one array [K, K] holds both: H below the diagonal and on it,
the root above. At K = 11,008 that is 0.5 GB, and the factorisation adds some panels only.

Letters: K inputs of the layer, N outputs, T calibration tokens.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from omforge.ir.errors import InputError

Array = npt.NDArray[Any]

DRIFT_LIMIT = 8192
"""Inputs above which nobody keeps account of earlier layers' errors: another array [K, K]."""

_PANEL = 128
"""Columns that are factored or solved at once."""

_ROWS = 256
"""Rows of a product that are computed at once."""


class Hessian:
    """x^T x over all calibration tokens, or its diagonal alone.

    Args:
        inputs: K.
        full: Keep more than the diagonal.

    Attributes:
        matrix: float32 [K, K], x^T x below the diagonal and on it; `factor` fills what is above.
        drift: x^T (u - x), float32 [K, K], where u is what x was ahead of all quantisation; None if
            nobody told, or K is above `DRIFT_LIMIT`.
        squares: The diagonal of x^T x, float64 [K].
        tokens: T.
    """

    def __init__(self, inputs: int, *, full: bool = True) -> None:
        self.matrix = np.zeros((inputs, inputs) if full else (0, 0), np.float32)
        self.drift: Array | None = None
        self.squares = np.zeros(inputs, np.float64)
        self.tokens = 0
        self._full = full
        self._factor: tuple[float, Factor] | None = None

    @property
    def strength(self) -> Array:
        """The inputs' mean squares, float32 [K]."""
        return (self.squares / max(self.tokens, 1)).astype(np.float32)

    def add(self, x: Array, exact: Array | None = None) -> None:
        """Add inputs [.., K], and what they were ahead of all quantisation."""
        flat = np.asarray(x.reshape(-1, x.shape[-1]), np.float32)
        if self._full:
            self._factor = None
            gap = None
            if exact is not None and len(self.matrix) <= DRIFT_LIMIT:
                gap = exact.reshape(flat.shape).astype(np.float32) - flat
                if self.drift is None:
                    self.drift = np.zeros_like(self.matrix)
            for start in range(0, len(self.matrix), _ROWS):
                rows = slice(start, start + _ROWS)
                self.matrix[rows, : rows.stop] += flat[:, rows].T @ flat[:, : rows.stop]
                if gap is not None and self.drift is not None:
                    self.drift[rows] += flat[:, rows].T @ gap
        self.squares += np.square(flat, dtype=np.float64).sum(0)
        self.tokens += len(flat)

    def factor(self, damping: float) -> Factor:
        """Factor it, with a share of the mean of its diagonal added to that.

        Raises:
            InputError: The inputs were not all finite.
        """
        if self._factor is not None and self._factor[0] == damping:
            return self._factor[1]
        if not (self.squares < np.finfo(np.float32).max).all():
            raise InputError("the layer's inputs on the calibration text are not all finite")
        share = damping
        while True:
            diagonal = self.squares + (share * self.squares.mean() or 1.0)
            np.fill_diagonal(self.matrix, diagonal)
            order = np.argsort(-self.squares, kind="stable")
            try:
                roots = _factored(self.matrix, diagonal, order)
                break
            except np.linalg.LinAlgError:  # float32 has lost what is small beside the rest
                share *= 10
        found = Factor(self.matrix, roots, order)
        self._factor = (damping, found)
        return found


class Factor:
    """H, damped, and R, upper triangular, with R R^T = H in the order that the inputs are taken in.

    Args:
        matrix: float32 [K, K]: H on the diagonal and below it, R above it.
        diagonal: R's, float32 [K].
        order: The place in H of each row of R.
    """

    def __init__(self, matrix: Array, diagonal: Array, order: Array) -> None:
        self._matrix = matrix
        self.order = order
        self.diagonal = diagonal

    def __len__(self) -> int:
        """K."""
        return len(self._matrix)

    @property
    def above(self) -> Array:
        """R above its diagonal; on it and below it is something else."""
        return self._matrix

    def rows(self, start: int, end: int) -> Array:
        """Rows of H, float32 [end - start, K]."""
        made = np.empty((end - start, len(self)), np.float32)
        made[:, :start] = self._matrix[start:end, :start]
        square = np.tril(self._matrix[start:end, start:end])
        made[:, start:end] = square + np.tril(square, -1).T
        made[:, end:] = self._matrix[end:, start:end].T
        return made

    def times(self, right: Array) -> Array:
        """H @ right, float32 [K, n]."""
        return np.concatenate(
            [
                self.rows(start, min(start + _ROWS, len(self))) @ right
                for start in range(0, len(self), _ROWS)
            ]
        )

    def solve(self, right: Array) -> Array:
        """H^-1 @ right, float32 [K, n]."""
        count, found = len(self), np.array(right[self.order], np.float32)
        starts = range(0, count, _PANEL)
        for start in reversed(starts):
            end = min(start + _PANEL, count)
            found[start:end] -= self._matrix[start:end, end:] @ found[end:]
            found[start:end] = np.linalg.solve(self._square(start, end), found[start:end])
        for start in starts:
            end = min(start + _PANEL, count)
            found[start:end] -= self._matrix[:start, start:end].T @ found[:start]
            found[start:end] = np.linalg.solve(self._square(start, end).T, found[start:end])
        made = np.empty_like(found)
        made[self.order] = found
        return made

    def _square(self, start: int, end: int) -> Array:
        """A square of R on the diagonal."""
        made = np.triu(self._matrix[start:end, start:end], 1)
        np.fill_diagonal(made, self.diagonal[start:end])
        return made


def _factored(matrix: Array, diagonal: Array, order: Array) -> Array:
    """Put R above the diagonal of H; R's own diagonal, float32 [K].

    From the last panel of columns to the first: what is left of a panel, once the panels after it
    have been taken off, is a square times its transposed root. Sums are float64, as H is all but
    singular.

    Raises:
        numpy.linalg.LinAlgError: H is not positive definite.
    """
    count = len(order)
    for start in range(0, count, _PANEL):  # the upper half becomes H in the other order
        rows, columns = order[start : start + _PANEL, None], order[None, start:]
        part = matrix[np.maximum(rows, columns), np.minimum(rows, columns)]
        end = start + len(rows)
        _put_above(matrix, start, end, part[:, : end - start])
        matrix[start:end, end:] = part[:, end - start :]
    roots = np.empty(count, np.float32)
    for start in reversed(range(0, count, _PANEL)):
        end = min(start + _PANEL, count)
        panel = matrix[:end, start:end].astype(np.float64)
        square = np.triu(panel[start:], 1)
        panel[start:] = square + square.T + np.diag(diagonal[order[start:end]])
        right = matrix[start:end, end:].astype(np.float64).T
        for row in range(0, end, _ROWS):
            rows = slice(row, min(row + _ROWS, end))
            panel[rows] -= matrix[rows, end:].astype(np.float64) @ right
        root = np.linalg.cholesky(panel[start:][::-1, ::-1])[::-1, ::-1]
        matrix[:start, start:end] = np.linalg.solve(root, panel[:start].T).T
        _put_above(matrix, start, end, root)
        roots[start:end] = np.diag(root)
    return roots


def _put_above(matrix: Array, start: int, end: int, square: Array) -> None:
    """Write what is above the diagonal of a square on the diagonal, and nothing else."""
    part = matrix[start:end, start:end]
    np.copyto(part, square, where=np.triu(np.ones(part.shape, bool), 1), casting="same_kind")
