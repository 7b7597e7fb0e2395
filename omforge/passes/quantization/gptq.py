"""GPTQ: round one input at a time, and let the inputs after it make up for the error.

For a linear layer y = x w with inputs x of a calibration text, the rounding of row k of w is paid
back by the rows behind it, as the inverse of H = x^T x says (Frantar et al., "GPTQ: Accurate
Post-Training Quantization for Generative Pre-trained Transformers", ICLR 2023, algorithm 1).

Letters: K inputs of the layer, N outputs, g the group size, T calibration tokens.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import numpy.typing as npt

from omforge.ir.errors import InputError
from omforge.passes.quantization.blockwise import Scheme, decode, encode, quantize

Array = npt.NDArray[Any]

DAMPING = 0.01
"""Share of H's mean diagonal that is added to it: few tokens leave it singular."""

FINE_RATIOS = tuple(np.arange(0.98, 0.59, -0.02))
"""Shares of a group's range to try: there is time, compared with the rest of the method."""

_BLOCK = 128


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
    """

    def __init__(self, inputs: int, *, full: bool = True) -> None:
        self.matrix = np.zeros((inputs, inputs) if full else (0, 0), np.float32)
        self.squares = np.zeros(inputs, np.float64)
        self.tokens = 0
        self._full = full

    @property
    def strength(self) -> Array:
        """The inputs' mean squares, float32 [K]."""
        return (self.squares / max(self.tokens, 1)).astype(np.float32)

    def add(self, x: Array) -> None:
        """Add inputs [.., K]."""
        flat = np.asarray(x.reshape(-1, x.shape[-1]), np.float32)
        if self._full:
            self.matrix += flat.T @ flat
        self.squares += np.square(flat, dtype=np.float64).sum(0)
        self.tokens += len(flat)


def quantize_gptq(weights: Array, hessian: Hessian, scheme: Scheme) -> Codes:
    """Round a weight [K, N] so that the layer's outputs on the calibration text change least.

    Inputs are taken in falling order of their strength, and keep the scale of the group that they
    are in: the scales are fixed before the first row is rounded.

    Args:
        weights: float32 [K, N]; changed by nobody.
        hessian: Of the layer's inputs.
        scheme: How to store.

    Raises:
        InputError: A weight or an input is not finite.
    """
    inputs = len(weights)
    size = scheme.size(inputs)
    groups = np.arange(inputs) // size
    strength = hessian.strength[:, None]
    parts = [
        quantize(
            weights[k : k + size], 0, scheme, importance=strength[k : k + size], ratios=FINE_RATIOS
        )
        for k in range(0, inputs, size)
    ]
    scale = np.concatenate([part.scale for part in parts])
    zero = np.concatenate([part.zero for part in parts])

    matrix = hessian.matrix.astype(np.float64) / max(hessian.tokens, 1)
    if not np.isfinite(matrix).all():
        raise InputError("the layer's inputs on the calibration text are not all finite")
    diagonal = np.diag(matrix).copy()
    dead = diagonal == 0
    order = np.argsort(-diagonal, kind="stable")
    matrix[dead, dead] = 1
    matrix[np.diag_indices(inputs)] += DAMPING * diagonal.mean() + 1e-10
    root = _inverse_root(matrix[np.ix_(order, order)])

    work = weights[order].astype(np.float32)
    work[dead[order]] = 0
    codes = np.empty(weights.shape, np.int8)
    for start in range(0, inputs, _BLOCK):
        end = min(start + _BLOCK, inputs)
        errors = np.empty((end - start, work.shape[1]), np.float32)
        for row in range(start, end):
            group = groups[order[row]]
            made = encode(work[row], scale[group], zero[group].astype(np.float32), scheme)
            codes[order[row]] = made
            off = (work[row] - decode(made, scale[group], zero[group])) / root[row, row]
            work[row + 1 : end] -= np.outer(root[row, row + 1 : end], off)
            errors[row - start] = off
        work[end:] -= root[start:end, end:].T @ errors
    return Codes(codes, scale, zero)


def _inverse_root(matrix: Array) -> Array:
    """The upper factor U of the inverse, matrix^-1 = U^T U, float32."""
    inverse = np.linalg.inv(matrix)
    lower = np.linalg.cholesky((inverse + inverse.T) / 2)
    return np.ascontiguousarray(lower.T).astype(np.float32)
