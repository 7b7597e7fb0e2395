"""SmoothQuant: layers whose inputs are int8 as well as their weights.

y = x w is (x / s) (s w) for any s > 0. Inputs of a layer differ far more between channels than its
weights do, and one scale for all of them leaves few integers for most: dividing by

    s_j = max|x_j|^a / max|w_j|^(1 - a)

moves a share of that into the weights, which have a scale for each output (Xiao et al.,
"SmoothQuant: Accurate and Efficient Post-Training Quantization for Large Language Models", ICML
2023, section 4). The power a is searched for, by the outputs of the layers that read x.

Errors are relative to the output of their own token: some tokens, the first above all, are a
hundred times as loud as the others, and would drown them in a sum over the text. And they are
averaged in the fourth power: a model leans on those few tokens, and they must not be cut off for
the sake of all the others.

Letters: K inputs of the layers, N outputs of one, R sampled tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from omforge.quantization.awq import round_weighted
from omforge.quantization.blockwise import Scheme, storable
from omforge.quantization.gptq import Codes

Array = npt.NDArray[Any]

SCHEME = Scheme(8, 0, True)
"""Of the weights: one scale for each output."""

POWERS = (0.2, 0.35, 0.5, 0.65, 0.8)
LIMITS = (-128, 127)

_RATIOS = tuple(0.5**i for i in range(9))
"""Shares of the inputs' range that clipping tries."""

_NEARBY = (0.6, 0.7, 0.85)
"""Shares of the best of them that are tried then."""

_TOKENS = 512
"""Sampled tokens that a search multiplies again and again."""

_LOUD = 32
"""The loudest tokens are always among them: they are what clipping cuts."""

_LEAST = 2.0**-15
"""Of a step: kernels multiply by 1/step in float16."""


@dataclass(frozen=True)
class Sample:
    """What a group of layers reads on a text.

    Attributes:
        rows: Some of its tokens, float32 [R, K].
        shares: The share of the text that each of them stands for, float32 [R].
        peaks: The largest magnitudes in all of it, float32 [K].
    """

    rows: Array
    shares: Array
    peaks: Array


@dataclass(frozen=True)
class Smoothing:
    """How a group's inputs become int8.

    Attributes:
        scales: s, float32 [K]; None where nothing is divided.
        step: Of the integers of x / s.
        weights: The integers of s w, one for each layer.
        errors: Of each layer's outputs, relative: the fourth root of the mean fourth power over
            tokens.
    """

    scales: Array | None
    step: float
    weights: tuple[Codes, ...]
    errors: tuple[float, ...]


def sample(inputs: Sequence[Array]) -> Sample:
    """Choose tokens of all pieces, [.., K] each."""
    pieces = [piece.reshape(-1, piece.shape[-1]) for piece in inputs]
    peaks = np.max([np.abs(piece).max(0) for piece in pieces], 0).astype(np.float32)
    loudness = np.concatenate([np.abs(piece).max(1) for piece in pieces])
    count = len(loudness)
    chosen = np.zeros(count, bool)
    chosen[:: max(1, count // _TOKENS)] = True
    loudest = np.argsort(loudness, kind="stable")[::-1][:_LOUD]
    chosen[loudest] = False
    others = max(1, int(chosen.sum()))
    shares = np.where(chosen, (count - len(loudest)) / others, 0) / count
    shares[loudest] = 1 / count
    ends = np.cumsum([len(piece) for piece in pieces])
    rows = [
        piece[shares[end - len(piece) : end] > 0].astype(np.float32)
        for piece, end in zip(pieces, ends, strict=True)
    ]
    return Sample(np.concatenate(rows), shares[shares > 0].astype(np.float32), peaks)


def search_smoothing(
    x: Sample, weights: Sequence[Array], powers: Sequence[float] = POWERS
) -> Smoothing:
    """Find what the outputs of the layers change least with.

    Args:
        x: What all of them read.
        weights: float32 [K, N] each.
        powers: Of the inputs' peaks, to try; the inputs as they are are tried in any case.
    """
    exact = [x.rows @ weight for weight in weights]
    # What a squared error counts, by layer and token; a token without an output counts nothing.
    counts = [_reciprocal(np.square(outputs).sum(1)) for outputs in exact]
    best: Smoothing | None = None
    of_tokens = np.mean(counts, 0)
    for scales in (None, *(factors(x.peaks, weights, power) for power in powers)):
        by = np.ones_like(x.peaks) if scales is None else scales
        rows = x.rows / by
        scaled = [weight * by[:, None] for weight in weights]
        codes = tuple(round_weighted(weight, None, SCHEME) for weight in scaled)
        whole = storable_step(float((x.peaks / by).max()) / LIMITS[1])
        strength = np.sum([np.square(weight).sum(1) for weight in scaled], 0)
        for step in dict.fromkeys((whole, _clipped(rows, whole, x.shares, of_tokens, strength))):
            inputs = rounded(rows, step)
            errors = tuple(
                _error(inputs @ made.decoded(len(made.codes)) - want, x.shares, count)
                for made, want, count in zip(codes, exact, counts, strict=True)
            )
            if best is None or sum(errors) < sum(best.errors):
                best = Smoothing(scales, step, codes, errors)
    assert best is not None
    return best


def factors(peaks: Array, weights: Sequence[Array], power: float) -> Array:
    """s, float32 [K], for inputs of these peaks."""
    largest = np.max([np.abs(weight).max(1) for weight in weights], 0).astype(np.float64)
    wide = peaks.astype(np.float64)
    # A channel that is silent on the text, or that no layer listens to, is left near the others.
    wide = np.maximum(wide, wide.max() * 1e-4 or 1.0)
    largest = np.maximum(largest, largest.max() * 1e-4 or 1.0)
    scales = wide**power / largest ** (1 - power)
    # Neither end far from 1, so that float16 holds both x / s and s w.
    return (scales / np.sqrt(scales.max() * scales.min())).astype(np.float32)


def rounded(x: Array, step: float) -> Array:
    """What the integers of x stand for, float32."""
    codes = np.rint(x * np.float32(1 / step))
    return np.clip(codes, *LIMITS, out=codes) * np.float32(step)


def storable_step(step: float) -> float:
    """The nearest step that float16 holds, and whose reciprocal it holds too."""
    return float(storable(np.array([max(step, _LEAST)], np.float32))[0])


def _error(off: Array, shares: Array, counts: Array) -> float:
    return float(shares @ np.square(np.square(off).sum(1) * counts)) ** 0.25


def _reciprocal(numbers: Array) -> Array:
    """1/n, and 0 for 0."""
    return np.divide(1, numbers, out=np.zeros_like(numbers), where=numbers > 0)


def _clipped(rows: Array, whole: float, shares: Array, counts: Array, strength: Array) -> float:
    """The step with the least error of the inputs, each as the outputs feel it."""
    errors: dict[float, float] = {}

    def least(ratios: Sequence[float]) -> float:
        for ratio in ratios:
            step = storable_step(whole * ratio)
            off = np.square(rounded(rows, step) - rows) @ strength
            errors[ratio] = float(shares @ np.square(off * counts))
        return min(errors, key=lambda ratio: errors[ratio])

    coarse = least(_RATIOS)
    return storable_step(whole * least([coarse * nearby for nearby in _NEARBY]))
