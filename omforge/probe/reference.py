"""What kernels should compute, in float32 and rounded once: what answers are held against."""

from __future__ import annotations

import numpy as np

from omforge.probe.onnx_models import exact
from omforge.probe.record import Array


def softmax(x: Array) -> Array:
    """Over the last axis, in float32."""
    high = np.exp(x - x.max(-1, keepdims=True))
    return high / high.sum(-1, keepdims=True)


def attention(q: Array, k: Array, v: Array, hidden: Array | None = None) -> Array:
    """Of q [B, N, S, D] over k, v [B, K, T, D]; `hidden` is true where a key is not seen."""
    k, v = (np.repeat(exact(each), q.shape[1] // each.shape[1], axis=1) for each in (k, v))
    scores = exact(q) @ k.swapaxes(-1, -2) / np.sqrt(np.float32(q.shape[-1]))
    if hidden is not None:
        scores = np.where(hidden, np.float32(-1e30), scores)
    return (softmax(scores) @ v).astype(np.float16)


def rotated(x: Array, cos: Array, sin: Array) -> Array:
    """Rotation by halves."""
    low, high = np.split(exact(x), 2, axis=-1)
    turned = np.concatenate([-high, low], axis=-1)
    return (exact(x) * exact(cos) + turned * exact(sin)).astype(np.float16)
