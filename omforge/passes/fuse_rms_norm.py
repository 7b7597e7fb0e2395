"""Raise an exported RMS norm to one `RMSNormalization`.

Before::

    rms = Sqrt(Add(ReduceMean(Pow(x, 2), -1), eps))
    y   = Mul(Mul(x, Reciprocal(rms)), gamma)

After::

    y = RMSNormalization<axis=-1, epsilon=eps>(x, gamma)

A half-precision model casts x to float before, and the norm back before or after it is scaled. The
operator casts back before (its `Normalized` has the type of x), so only that form takes the casts
in; where gamma multiplies in float, the casts stay around a norm in float.

A norm without gamma, or with one that is not [H] (one for each head, or of another dtype), becomes
one with a gamma of ones, and the product stays behind it.
"""

from typing import Any

import numpy as np
import numpy.typing as npt

from omforge import ir
from omforge.passes.rewrite import ANY, Builder, Match, NoMatch, Pat, PatternOps, RewritePass

FLOAT = ir.DataType.FLOAT


class FuseRmsNorm(RewritePass):
    """Raise the nodes of an RMS norm to one `RMSNormalization`."""

    name = "fuse-rms-norm"

    def pattern(self, op: PatternOps, x: Pat, gamma: Pat, eps: Pat) -> Pat:
        """Match gamma * x / sqrt(mean(x^2) + eps), and the same without gamma."""
        wide = op.Cast(x, to=FLOAT).named("wide").shared() | x
        variance = op.Add(op.ReduceMean(self.square(op, wide), axes=[-1]), eps)
        rms = op.Sqrt(variance) | op.Pow(variance, 0.5)
        inverse = op.Reciprocal(rms) | op.Div(1.0, rms) | op.Pow(variance, -0.5)
        norm = op.Mul(wide, inverse) | op.Div(wide, rms)
        whole = op.Mul(wide, op.Div(gamma, rms)) | op.Div(op.Mul(wide, gamma), rms)
        normed = op.Cast(norm, to=ANY) | norm
        return op.Mul(normed, gamma) | whole | normed

    def square(self, op: PatternOps, x: Pat) -> Pat:
        """Match x squared."""
        return op.Pow(x, 2.0) | op.Mul(x, x)

    def near_miss(self, op: PatternOps) -> Pat:
        """The root of a mean of squares, which is a norm of some kind."""
        mean = op.ReduceMean(self.square(op, ANY), axes=ANY, keepdims=ANY)
        variance = op.Add(mean, ANY) | mean
        return op.Sqrt(variance) | op.Pow(variance, ANY)

    def rewrite(self, op: Builder, m: Match) -> ir.Value:
        """Return the norm."""
        wide = m.get("wide")
        x, stash = m.x, (wide or m.x).dtype
        if "gamma" not in m and wide is not None and wide.dtype == m.output.dtype:
            x = wide  # nothing casts the norm back
        if x.dtype != m.output.dtype:
            raise NoMatch(f"x is {x.dtype} but the norm returns {m.output.dtype}", m.output)
        if _is_centred(m.x):
            raise NoMatch(f"{m.x.name} is centred on its mean: a layer norm", m.x)
        m.shape("x", "... H")
        if "gamma" in m:
            m.shape("gamma", "H")
            gamma = m.gamma
        else:
            gamma = op.constant(ones(m))
        return op.RMSNormalization(x, gamma, axis=-1, epsilon=m.const("eps"), stash_type=stash)


def ones(m: Match) -> npt.NDArray[Any]:
    """A gamma for a norm that has none.

    Raises:
        NoMatch: The size of x is not a number.
    """
    *_, size = m.shape("x", "... H")
    if not isinstance(size, int) or m.output.dtype is None:
        raise NoMatch(f"the size of {m.x.name}, {size}, is not a number", m.x)
    return np.ones(size, dtype=m.output.dtype.numpy())


def _is_centred(x: ir.Value) -> bool:
    """Whether x is v - mean(v), the first step of a layer norm."""
    node = x.producer()
    if node is None or node.op_type != "Sub" or node.inputs[1] is None:
        return False
    mean = node.inputs[1].producer()
    return mean is not None and mean.op_type == "ReduceMean" and mean.inputs[0] is node.inputs[0]
