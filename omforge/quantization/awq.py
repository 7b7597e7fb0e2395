"""AWQ: let the inputs that matter most round best, by making their weights larger.

y = x w is (x / s) (s w) for any s > 0, and rounding s w errs less where s is large. The inputs'
mean magnitudes, raised to a power that is searched for, are the s; layers that read the same x
share it. Then each group's range is clipped for the least error of what the group adds to the
outputs (Lin et al., "AWQ: Activation-aware Weight Quantization for On-Device LLM Compression and
Acceleration", MLSys 2024, sections 3.2 and 3.3, and its "clip" step).

Letters: K inputs of the layers, N outputs of one, g weights of a group, T calibration tokens.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from omforge.ir.streamed import in_order
from omforge.quantization.blockwise import RATIOS, Quantized, Scheme, quantize, tried
from omforge.quantization.gptq import FINE_RATIOS, Codes

Array = npt.NDArray[Any]

POWERS = tuple(np.arange(0, 1.0, 0.1))

GROUP_LIMIT = 512
"""Weights of a group above which clipping takes its inputs for uncorrelated."""


def search_scales(x: Array, weights: Sequence[Array], schemes: Sequence[Scheme]) -> Array:
    """The factors s, float32 [K], with which the layers' outputs change least.

    Args:
        x: Inputs on the calibration text, float32 [T, K].
        weights: float32 [K, N] each.
        schemes: How to store each.
    """
    magnitude = np.abs(x).mean(0, dtype=np.float64)
    strength = np.square(x).mean(0)
    best = np.ones(x.shape[1], np.float32)
    if not magnitude.any():
        return best
    magnitude = np.maximum(magnitude, magnitude.max() * 1e-4)
    least = np.inf
    for power in POWERS:
        scales = magnitude**power
        # Neither end far from 1, so that float16 holds both x / s and s w.
        scales = (scales / np.sqrt(scales.max() * scales.min())).astype(np.float32)
        error = 0.0
        for weight, scheme in zip(weights, schemes, strict=True):
            made = round_weighted(
                weight * scales[:, None], strength / np.square(scales), scheme, ratios=RATIOS
            )
            rest = made.decoded(scheme.size(len(weight))) / scales[:, None] - weight
            error += float(np.square(x @ rest).sum())
        if error < least:
            least, best = error, scales
    return best


def group_products(pieces: Sequence[Array], scales: Array, size: int) -> list[Array]:
    """x^T x of the inputs of each group, float32 [g, g]; its diagonal alone for large groups.

    Args:
        pieces: Inputs [.., K] ahead of the division.
        scales: What they are divided by [K].
        size: Of a group.
    """
    inputs = pieces[0].shape[-1]
    made: list[Array] = []
    for start in range(0, inputs, size):
        width = min(size, inputs - start)
        large = width > GROUP_LIMIT
        product = np.zeros(width if large else (width, width), np.float32)
        for piece in pieces:
            part = piece[..., start : start + width].reshape(-1, width).astype(np.float32)
            part /= scales[start : start + width]
            product += np.square(part).sum(0) if large else part.T @ part
        made.append(product)
    return made


def round_clipped(weight: Array, products: Sequence[Array], x: Array, scheme: Scheme) -> Codes:
    """Round a weight [K, N], each group clipped for the least error of the outputs.

    A group by itself takes the other groups' errors for unrelated to its own, and an input by
    itself those of its own group too. Which of the two is nearer to the truth differs, so that each
    output takes what errs less on a sample of the text.

    Args:
        weight: float32 [K, N].
        products: x^T x of each group, as `group_products` makes them.
        x: Some inputs [T, K].
        scheme: How to store.
    """
    size = scheme.size(len(weight))
    large = products[0].ndim == 1
    strength = np.concatenate([part if large else np.diag(part) for part in products])
    alone = round_weighted(weight, strength, scheme)
    if large or len(tried(scheme)) == 1:
        return alone

    def clipped(group: int) -> Codes:
        return _clipped(weight[group * size : (group + 1) * size], products[group], scheme)

    together = _joined(list(in_order(clipped, len(products))))
    errors = [np.square(x @ (codes.decoded(size) - weight)).sum(0) for codes in (alone, together)]
    better = errors[1] < errors[0]
    return Codes(
        np.where(better, together.codes, alone.codes),
        np.where(better, together.scale, alone.scale),
        np.where(better, together.zero, alone.zero),
    )


def _clipped(weight: Array, product: Array, scheme: Scheme) -> Codes:
    """One group [g, N], its range cut for the least e^T (x^T x) e, where e is its error."""
    plain = dataclasses.replace(scheme, clip="none")
    low, high = weight.min(0), weight.max(0)
    best: Codes | None = None
    least = np.zeros(0)
    for ratio in (1.0, *FINE_RATIOS[1::2]):
        share = np.float32(ratio)
        part = quantize(np.clip(weight, low * share, high * share), 0, plain)
        made = Codes(part.codes, part.scale, part.zero)
        rest = made.decoded(len(weight)) - weight
        error = np.einsum("kn,kn->n", product @ rest, rest)
        if best is None:
            best, least = made, error
            continue
        better = error < least
        np.copyto(least, error, where=better)
        np.copyto(best.codes, made.codes, where=better)
        np.copyto(best.scale, made.scale, where=better)
        np.copyto(best.zero, made.zero, where=better)
    assert best is not None
    return best


def round_weighted(
    weight: Array,
    strength: Array | None,
    scheme: Scheme,
    *,
    ratios: Sequence[float] = FINE_RATIOS,
) -> Codes:
    """Round a weight [K, N], clipped for the least error of its outputs.

    Args:
        weight: float32 [K, N].
        strength: The inputs' mean squares [K]; None weighs all alike, and tries fewer clippings.
        scheme: How to store.
        ratios: Shares of a group's range that clipping tries, where there is a strength.
    """
    size = scheme.size(len(weight))
    return _joined(
        [
            quantize(weight[k : k + size], 0, scheme)
            if strength is None
            else quantize(
                weight[k : k + size],
                0,
                scheme,
                importance=strength[k : k + size, None],
                ratios=ratios,
            )
            for k in range(0, len(weight), size)
        ]
    )


def _joined(parts: Sequence[Quantized] | Sequence[Codes]) -> Codes:
    """Groups [g, N] behind each other."""
    return Codes(
        np.concatenate([part.codes for part in parts]),
        np.concatenate([part.scale for part in parts]),
        np.concatenate([part.zero for part in parts]),
    )
