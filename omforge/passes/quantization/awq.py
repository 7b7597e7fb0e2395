"""AWQ: let the inputs that matter most round best, by making their weights larger.

y = x w is (x / s) (s w) for any s > 0, and rounding s w errs less where s is large. The inputs'
mean magnitudes, raised to a power that is searched for, are the s (Lin et al., "AWQ:
Activation-aware Weight Quantization for On-Device LLM Compression and Acceleration", MLSys 2024,
sections 3.2 and 3.3); layers that read the same x share it.

Letters: K inputs of the layers, N outputs of one, T calibration tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from omforge.passes.quantization.blockwise import Scheme, quantize
from omforge.passes.quantization.gptq import FINE_RATIOS, Codes

Array = npt.NDArray[Any]

POWERS = tuple(np.arange(0, 1.0, 0.1))


def search_scales(x: Array, weights: Sequence[Array], scheme: Scheme) -> Array:
    """The factors s, float32 [K], with which the layers' outputs change least.

    Args:
        x: Inputs on the calibration text, float32 [T, K].
        weights: float32 [K, N] each.
        scheme: How to store.
    """
    magnitude = np.abs(x).mean(0, dtype=np.float64)
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
        for weight in weights:
            made = round_weighted(weight * scales[:, None], None, scheme)
            rest = made.decoded(scheme.size(len(weight))) / scales[:, None] - weight
            error += float(np.square(x @ rest).sum())
        if error < least:
            least, best = error, scales
    return best


def round_weighted(weight: Array, strength: Array | None, scheme: Scheme) -> Codes:
    """Round a weight [K, N], clipped for the least error of its outputs.

    Args:
        weight: float32 [K, N].
        strength: The inputs' mean squares [K]; None weighs all alike, and tries fewer clippings.
        scheme: How to store.
    """
    size = scheme.size(len(weight))
    parts = [
        quantize(weight[k : k + size], 0, scheme)
        if strength is None
        else quantize(
            weight[k : k + size],
            0,
            scheme,
            importance=strength[k : k + size, None],
            ratios=FINE_RATIOS,
        )
        for k in range(0, len(weight), size)
    ]
    return Codes(
        np.concatenate([part.codes for part in parts]),
        np.concatenate([part.scale for part in parts]),
        np.concatenate([part.zero for part in parts]),
    )
