"""GPTQ: round one input at a time, and let the inputs after it make up for the error.

For a linear layer y = x w with inputs x of a calibration text, what rounding does to the outputs is
e^T H e, where e = w - w' and H = x^T x. With H = R R^T, R upper triangular, that is |R^T e|^2, and
row i of R^T e depends on the first i errors only: so each weight is rounded after what the errors
before it ask of it (Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative
Pre-trained Transformers", ICLR 2023; in this form Chen et al., "The Geometry of LLM Quantization:
GPTQ as Babai's Nearest Plane Algorithm", 2025).

What GPTQ leaves is improved by coordinate descent: each integer is chosen again with all others as
they are (Nair and Suggala, "CDQuant", 2024), and the scales are fitted to the integers by least
squares. Both lessen e^T H e or leave it.

Letters: K inputs of the layer, N outputs, g the group size, G groups, T calibration tokens.
"""

from __future__ import annotations

import dataclasses
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from omforge.ir.errors import InputError
from omforge.ir.streamed import in_order
from omforge.passes.quantization.blockwise import Scheme, decode, quantize, storable

Array = npt.NDArray[Any]

DAMPING = 0.01
"""Share of H's mean diagonal that is added to it: few tokens leave it singular."""

FINE_RATIOS = tuple(np.arange(0.98, 0.59, -0.02))
"""Shares of a group's range to try: there is time, compared with the rest of the method."""

CATCH_UP = 0.5
"""Share of the earlier layers' errors that a layer is made to make up for."""

ROUNDS = 2
"""Of coordinate descent and fitting scales; a third one gains a tenth of what the first did."""

_BLOCK = 64
"""Rows that are corrected one by one before the rest is, by a product of matrices."""

_COLUMNS = 512
"""Outputs that are rounded at once; they do not depend on each other."""

_RIDGE = 1e-4
"""How much a scale is held to what it was, for groups whose inputs say nothing."""


@dataclasses.dataclass(frozen=True)
class Codes:
    """A quantised weight [K, N].

    Attributes:
        codes: int8 [K, N].
        scale: float32 [G, N].
        zero: int8 [G, N].
    """

    codes: Array
    scale: Array
    zero: Array

    def decoded(self, size: int) -> Array:
        """The weight that they stand for, float32 [K, N]."""
        groups = np.arange(len(self.codes)) // size
        return decode(self.codes, self.scale[groups], self.zero[groups])


class Hessian:
    """x^T x over all calibration tokens, float32 [K, K], or its diagonal alone.

    Args:
        inputs: K.
        full: Keep more than the diagonal.

    Attributes:
        matrix: x^T x.
        drift: x^T (u - x), where u is what x was ahead of all quantisation; 0 if nobody told.
        squares: The diagonal of x^T x.
        tokens: T.
    """

    def __init__(self, inputs: int, *, full: bool = True) -> None:
        self.matrix = np.zeros((inputs, inputs) if full else (0, 0), np.float32)
        self.drift = np.zeros_like(self.matrix)
        self.squares = np.zeros(inputs, np.float64)
        self.tokens = 0
        self._full = full

    @property
    def strength(self) -> Array:
        """The inputs' mean squares, float32 [K]."""
        return (self.squares / max(self.tokens, 1)).astype(np.float32)

    def add(self, x: Array, exact: Array | None = None) -> None:
        """Add inputs [.., K], and what they were ahead of all quantisation."""
        flat = np.asarray(x.reshape(-1, x.shape[-1]), np.float32)
        if self._full:
            self.matrix += flat.T @ flat
            if exact is not None:
                self.drift += flat.T @ (exact.reshape(flat.shape).astype(np.float32) - flat)
        self.squares += np.square(flat, dtype=np.float64).sum(0)
        self.tokens += len(flat)


def quantize_gptq(
    weights: Array,
    hessian: Hessian,
    scheme: Scheme,
    *,
    damping: float = DAMPING,
    rounds: int = ROUNDS,
) -> Codes:
    """Round a weight [K, N] so that the layer's outputs on the calibration text change least.

    Inputs are taken in falling order of their strength, and keep the scale of the group that they
    are in: the scales are fixed before the first row is rounded.

    Args:
        weights: float32 [K, N]; changed by nobody.
        hessian: Of the layer's inputs.
        scheme: How to store.
        damping: Share of H's mean diagonal that is added to it: how much the weights themselves
            count, beside the outputs.
        rounds: Of what improves on GPTQ; 0 is GPTQ alone.

    Raises:
        InputError: A weight or an input is not finite.
    """
    problem = _problem(hessian, scheme, damping)
    count = weights.shape[1]
    starts = range(0, count, _COLUMNS)

    def work(index: int) -> Codes:
        columns = weights[:, starts[index] : starts[index] + _COLUMNS]
        wanted = np.array(columns, np.float32, order="C")
        if problem.catch_up is not None:
            wanted += problem.catch_up @ wanted
        return _solved(wanted, problem, scheme, rounds)

    parts = list(in_order(work, len(starts)))
    return Codes(
        np.concatenate([part.codes for part in parts], 1),
        np.concatenate([part.scale for part in parts], 1),
        np.concatenate([part.zero for part in parts], 1),
    )


@dataclasses.dataclass(frozen=True)
class _Problem:
    """What all outputs of a layer share.

    Attributes:
        matrix: H, damped, float32 [K, K].
        strength: Its diagonal ahead of damping [K].
        order: In which the inputs are taken [K].
        root: R of H in that order, float32 [K, K].
        groups: Of each input [K].
        catch_up: What makes up for the errors of earlier layers, by w + catch_up w, [K, K].
    """

    matrix: Array
    strength: Array
    order: Array
    root: Array
    groups: Array
    catch_up: Array | None


def _problem(hessian: Hessian, scheme: Scheme, damping: float) -> _Problem:
    matrix = hessian.matrix.astype(np.float64) / max(hessian.tokens, 1)
    if not np.isfinite(matrix).all():
        raise InputError("the layer's inputs on the calibration text are not all finite")
    inputs = len(matrix)
    diagonal = np.diag(matrix).copy()
    matrix[np.diag_indices(inputs)] += damping * diagonal.mean() + 1e-10
    order = np.argsort(-diagonal, kind="stable")
    # An upper root is the lower root of the matrix turned round.
    lower = np.linalg.cholesky(matrix[np.ix_(order, order)][::-1, ::-1])
    return _Problem(
        matrix.astype(np.float32),
        diagonal.astype(np.float32),
        order,
        np.ascontiguousarray(lower[::-1, ::-1], np.float32),
        np.arange(inputs) // scheme.size(inputs),
        _catch_up(hessian, matrix),
    )


def _catch_up(hessian: Hessian, matrix: Array) -> Array | None:
    """The correction for inputs x that were u: H^-1 x^T (u - x), float32 [K, K].

    The outputs should be u w, and the weights that come nearest to it with x are w + H^-1 x^T (u -
    x) w (Li et al., "GPTAQ: Efficient Finetuning-Free Quantization for Asymmetric Calibration",
    ICML 2025). Taken by a share only, since some of it fits the text alone.
    """
    if not hessian.drift.any():
        return None
    drift = hessian.drift / np.float32(max(hessian.tokens, 1))
    return (CATCH_UP * np.linalg.solve(matrix, drift.astype(np.float64))).astype(np.float32)


def _solved(weights: Array, problem: _Problem, scheme: Scheme, rounds: int) -> Codes:
    """Some outputs of a layer [K, n]."""
    size = scheme.size(len(weights))
    parts = [
        quantize(
            weights[k : k + size],
            0,
            scheme,
            importance=problem.strength[k : k + size, None],
            ratios=FINE_RATIOS,
        )
        for k in range(0, len(weights), size)
    ]
    scale = np.concatenate([part.scale for part in parts])
    zero = np.concatenate([part.zero for part in parts]).astype(np.float32)
    codes = _nearest_plane(weights, problem, scheme, scale, zero)
    for _ in range(rounds):
        _descend(weights, problem, scheme, scale, zero, codes)
        scale = _fitted(weights, problem, codes - zero[problem.groups], scale)
    if rounds:
        _descend(weights, problem, scheme, scale, zero, codes)
    return Codes(codes.astype(np.int8), scale, zero.astype(np.int8))


def _nearest_plane(
    weights: Array, problem: _Problem, scheme: Scheme, scale: Array, zero: Array
) -> Array:
    """GPTQ itself: the integers as float32 [K, n]."""
    inputs, root = len(weights), problem.root
    codes, errors = np.empty_like(weights), np.empty_like(weights)
    for start in range(0, inputs, _BLOCK):
        end = min(start + _BLOCK, inputs)
        owed = root[:start, start:end].T @ errors[:start]
        for row in range(start, end):
            place = problem.order[row]
            group = problem.groups[place]
            wanted = weights[place] + owed[row - start] / root[row, row]
            made = _encoded(wanted, scale[group], zero[group], scheme)
            errors[row] = weights[place] - (made - zero[group]) * scale[group]
            owed[row + 1 - start :] += root[row, row + 1 : end, None] * errors[row]
            codes[place] = made
    return codes


def _descend(
    weights: Array, problem: _Problem, scheme: Scheme, scale: Array, zero: Array, codes: Array
) -> None:
    """Choose each integer again, with all others as they are; changes `codes`."""
    inputs, matrix = len(weights), problem.matrix
    errors = weights - (codes - zero[problem.groups]) * scale[problem.groups]
    for start in range(0, inputs, _BLOCK):
        end = min(start + _BLOCK, inputs)
        slope = matrix[start:end] @ errors
        for row in range(start, end):
            group = problem.groups[row]
            wanted = weights[row] - errors[row] + slope[row - start] / matrix[row, row]
            made = _encoded(wanted, scale[group], zero[group], scheme)
            change = (codes[row] - made) * scale[group]
            codes[row] = made
            errors[row] += change
            slope[row + 1 - start :] += matrix[row + 1 : end, row, None] * change


def _fitted(weights: Array, problem: _Problem, steps: Array, scale: Array) -> Array:
    """The scales [G, n] with which steps [K, n] of them come nearest, by least squares.

    A column's error is w - A s, where A [K, G] has its steps, so s solves A^T H A s = A^T H w.
    """
    groups = problem.groups
    starts: Array = np.flatnonzero(np.diff(groups, prepend=-1))
    ends = [*starts[1:], len(weights)]
    count = len(starts)
    left = np.empty((steps.shape[1], count, count))
    for group, (start, end) in enumerate(zip(starts, ends, strict=True)):
        part = (problem.matrix[:, start:end] @ steps[start:end]) * steps
        left[:, :, group] = np.add.reduceat(part, starts).T
    right = np.add.reduceat((problem.matrix @ weights) * steps, starts).T.astype(np.float64)
    hold = _RIDGE * np.trace(left, axis1=1, axis2=2) / count + 1e-12
    left[:, np.arange(count), np.arange(count)] += hold[:, None]
    right += hold[:, None] * scale.T
    solved = cast("Array", np.linalg.solve(left, right[..., None]))  # numpy's stub is vague
    found = solved[..., 0].T
    # Far from where it was, a scale fits the text and nothing else.
    near = (found > 0.3 * scale) & (found < 3 * scale)
    return storable(np.where(near, found, scale).astype(np.float32))


def _encoded(wanted: Array, scale: Array, zero: Array, scheme: Scheme) -> Array:
    return np.clip(np.rint(wanted / scale + zero), scheme.low, scheme.high)
