"""ALiBi: what a model adds to the scores in place of positions, `slope * position of the key`.

A softmax does not see what is added to all scores of a query. So it is the same whether a key's
position is counted from the row's first token, from the newest key (0, -1, -2 ...) or from the
query, and whether it is counted over slots or over the tokens of a padded row: what matters is that
it grows by one slope from each visible key to the next.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from omforge import ir
from omforge.rewriting.builder import Builder

Array = npt.NDArray[Any]

KEY_POSITIONS = "key_positions"
"""The canonical input, float [1, 1, 1, C + S]: where each key stands, up to one constant."""

HIDDEN = -1e3
"""Below this, within the short probes, a score is masked and not biased."""


@dataclass(frozen=True)
class Bias:
    """A bias of `slopes[head] * position of the key`.

    Attributes:
        slopes: float32 numbers, one for each of N heads.
        counts: `slot`: positions are counted over all keys; `token`: over those that are no
            padding. The two differ where padding lies between tokens.
    """

    slopes: tuple[float, ...]
    counts: Literal["slot", "token"]

    def at(self, attention_mask: Array) -> Array:
        """The bias for int64 [B, T]: float64 [B, N, 1, T]."""
        ones = attention_mask if self.counts == "token" else np.ones_like(attention_mask)
        positions: Array = np.add.accumulate(ones, axis=1) - 1
        slopes = np.array(self.slopes, dtype=np.float64)[:, None, None]
        return slopes * positions[:, None, None, :]


def read_slopes(scores: Array) -> tuple[float, ...] | None:
    """The slopes that one query's scores [N, T] would have; None where nothing is biased.

    Exactly, where a key has a bias of nought: at its neighbour the bias is the slope itself.
    """
    scores = scores.astype(np.float32)
    seen: Array = np.all(scores > HIDDEN, axis=0)
    pairs = np.flatnonzero(np.logical_and(seen[:-1], seen[1:]))
    if not pairs.size or not scores[:, seen].any():
        return None
    for left in pairs.tolist():
        if not scores[:, left].any():
            return tuple(scores[:, left + 1].tolist())
        if not scores[:, left + 1].any():
            return tuple((-scores[:, left]).tolist())
    last = int(pairs[-1])
    rise = scores[:, last + 1] - scores[:, last]
    return tuple(rise.tolist()) if rise.any() else None


def build(
    op: Builder, bias: Bias, attention_mask: ir.Value | None, total: ir.Value, dtype: ir.DataType
) -> ir.Value:
    """The bias in the graph, float [B or 1, N, 1, T].

    Args:
        op: Records the nodes.
        bias: What to build.
        attention_mask: Integer or boolean [B, T].
        total: int64 [1], T.
        dtype: Of the scores.
    """
    real = ir.DataType.FLOAT
    if bias.counts == "token" and attention_mask is not None:
        ones = op.Cast(attention_mask, to=int(real))
        axis = op.constant(np.array(1, dtype=np.int64))
        positions = op.Unsqueeze(op.Sub(op.CumSum(ones, axis), 1.0), [1, 2])
    else:
        # Counted in floats: integers that become floats are taken for positions of tokens.
        nought, one = (op.constant(np.array(n, dtype=np.float32)) for n in (0, 1))
        positions = op.Range(nought, op.Cast(op.Squeeze(total), to=int(real)), one)
        positions = op.Unsqueeze(positions, [0, 1, 2])
    return times_slopes(op, bias, positions, dtype)


def times_slopes(op: Builder, bias: Bias, positions: ir.Value, dtype: ir.DataType) -> ir.Value:
    """Float positions [B or 1, 1, 1, T] as a bias [B or 1, N, 1, T] of `dtype`."""
    made = positions.dtype or ir.DataType.FLOAT
    slopes = np.array(bias.slopes, dtype=np.float32).astype(made.numpy())
    found = op.Mul(positions, op.constant(slopes[None, :, None, None]))
    return found if made == dtype else op.Cast(found, to=int(dtype))
