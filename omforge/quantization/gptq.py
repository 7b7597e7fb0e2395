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

from omforge.ir.streamed import in_order
from omforge.quantization.blockwise import Scheme, decode, quantize, storable
from omforge.quantization.hessian import Factor, Hessian

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

_COLUMNS, _NUMBERS = 512, 1 << 21
"""Outputs that are rounded at once, fewer where they have many weights: they do not depend on each
other."""

_PANEL = 128
"""Rows of H that are read at once."""

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
    factor = hessian.factor(damping)
    inputs, count = len(weights), weights.shape[1]
    problem = _Problem(factor, hessian.strength, np.arange(inputs) // scheme.size(inputs))
    step = min(_COLUMNS, max(_PANEL, _NUMBERS // inputs))
    starts = range(0, count, step)

    def work(index: int) -> Codes:
        wanted = np.array(weights[:, starts[index] : starts[index] + step], np.float32, order="C")
        if hessian.drift is not None:
            wanted += CATCH_UP * factor.solve(hessian.drift @ wanted)
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
        factor: H, damped, and R.
        strength: H's diagonal ahead of damping [K].
        groups: Of each input [K].
    """

    factor: Factor
    strength: Array
    groups: Array


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
    inputs, factor = len(weights), problem.factor
    root = factor.above
    codes, errors = np.empty_like(weights), np.empty_like(weights)
    for start in range(0, inputs, _BLOCK):
        end = min(start + _BLOCK, inputs)
        owed = root[:start, start:end].T @ errors[:start]
        for row in range(start, end):
            place = factor.order[row]
            group = problem.groups[place]
            wanted = weights[place] + owed[row - start] / factor.diagonal[row]
            made = _encoded(wanted, scale[group], zero[group], scheme)
            errors[row] = weights[place] - (made - zero[group]) * scale[group]
            owed[row + 1 - start :] += root[row, row + 1 : end, None] * errors[row]
            codes[place] = made
    return codes


def _descend(
    weights: Array, problem: _Problem, scheme: Scheme, scale: Array, zero: Array, codes: Array
) -> None:
    """Choose each integer again, with all others as they are; changes `codes`."""
    inputs = len(weights)
    errors = weights - (codes - zero[problem.groups]) * scale[problem.groups]
    for start in range(0, inputs, _BLOCK):
        end = min(start + _BLOCK, inputs)
        rows = problem.factor.rows(start, end)
        slope, square = rows @ errors, rows[:, start:end]
        for row in range(start, end):
            group, own = problem.groups[row], square[row - start, row - start]
            wanted = weights[row] - errors[row] + slope[row - start] / own
            made = _encoded(wanted, scale[group], zero[group], scheme)
            change = (codes[row] - made) * scale[group]
            codes[row] = made
            errors[row] += change
            slope[row + 1 - start :] += square[row + 1 - start :, row - start, None] * change


def _fitted(weights: Array, problem: _Problem, steps: Array, scale: Array) -> Array:
    """The scales [G, n] with which steps [K, n] of them come nearest, by least squares.

    A column's error is w - A s, where A [K, G] has its steps, so s solves A^T H A s = A^T H w.
    """
    groups = problem.groups
    starts: Array = np.flatnonzero(np.diff(groups, prepend=-1))
    ends, count = [*starts[1:], len(weights)], len(starts)
    left = np.zeros((steps.shape[1], count, count))
    for group, (begin, last) in enumerate(zip(starts, ends, strict=True)):
        for start in range(begin, last, _PANEL):
            end = min(start + _PANEL, last)
            part = (problem.factor.rows(start, end).T @ steps[start:end]) * steps
            left[:, :, group] += np.add.reduceat(part, starts).T
    right = np.add.reduceat(problem.factor.times(weights) * steps, starts).T.astype(np.float64)
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
