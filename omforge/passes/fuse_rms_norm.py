"""Raise an exported RMS norm to one `RMSNormalization`.

Before::

    rms = Sqrt(Add(ReduceMean(Pow(x, 2), -1), eps))
    y   = Mul(Mul(x, Reciprocal(rms)), gamma)

After::

    y = RMSNormalization<axis=-1, epsilon=eps>(x, gamma)

A half-precision model casts x to float before, and the norm back before or after it is scaled:
`norm_types` says which casts go in.

A norm without gamma, or with one that is not [H] (one for each head, or of another dtype), becomes
one with a gamma of ones, and the product stays behind it.
"""

from omforge import ir
from omforge.recognition.norm_types import between_casts, ones, rounded
from omforge.rewriting.rewrite import ANY, Builder, Match, NoMatch, Pat, PatternOps, RewritePass


class FuseRmsNorm(RewritePass):
    """Raise the nodes of an RMS norm to one `RMSNormalization`."""

    name = "fuse-rms-norm"

    def pattern(self, op: PatternOps, x: Pat, gamma: Pat, eps: Pat) -> Pat:
        """Match gamma * x / sqrt(mean(x^2) + eps), and the same without gamma."""
        wide = op.Cast(x, to=ANY).named("wide").shared() | x
        mean = op.ReduceMean(rounded(op, self.square(op, wide)), axes=[-1])
        variance = rounded(op, op.Add(rounded(op, mean), eps))
        rms = rounded(op, op.Sqrt(variance) | op.Pow(variance, 0.5))
        inverse = rounded(op, op.Reciprocal(rms) | op.Div(1.0, rms) | op.Pow(variance, -0.5))
        norm = op.Mul(wide | x, inverse) | op.Div(wide | x, rms)
        whole = op.Mul(wide, op.Div(gamma, rms)) | op.Div(op.Mul(wide, gamma), rms)
        normed = op.Cast(norm, to=ANY) | norm
        scaled = op.Mul(normed, gamma) | whole | normed
        return op.Cast(scaled, to=ANY).named("narrowed") | scaled

    def square(self, op: PatternOps, x: Pat) -> Pat:
        """Match x squared."""
        return op.Pow(x, 2.0) | op.Mul(x, x)

    def near_miss(self, op: PatternOps) -> Pat:
        """The root of a mean of squares, which is a norm of some kind."""
        square = rounded(op, self.square(op, ANY))
        mean = rounded(op, op.ReduceMean(square, axes=ANY, keepdims=ANY))
        variance = rounded(op, op.Add(mean, ANY)) | mean
        return op.Sqrt(variance) | op.Pow(variance, ANY)

    def rewrite(self, op: Builder, m: Match) -> ir.Value:
        """Return the norm."""
        types = between_casts(m)
        if _is_centred(m.x):
            raise NoMatch(f"{m.x.name} is centred on its mean: a layer norm", m.x)
        x = types.source(op, m)
        m.shape("x", "... H")
        if "gamma" in m:
            m.shape("gamma", "H")
            gamma = types.cast(op, m.gamma)
        else:
            gamma = op.constant(ones(m, types.computed))
        stash = m.wide.dtype if "wide" in m else x.dtype
        if stash == ir.DataType.DOUBLE and types.computed != stash:
            stash = ir.DataType.FLOAT
        norm = op.RMSNormalization(x, gamma, axis=-1, epsilon=m.const("eps"), stash_type=stash)
        return types.result(op, norm)


def _is_centred(x: ir.Value) -> bool:
    """Whether x is v - mean(v), the first step of a layer norm."""
    node = x.producer()
    while node is not None and node.op_type == "Cast" and node.inputs[0] is not None:
        node = node.inputs[0].producer()
    if node is None or node.op_type != "Sub" or node.inputs[1] is None:
        return False
    mean = node.inputs[1].producer()
    return mean is not None and mean.op_type == "ReduceMean" and mean.inputs[0] is node.inputs[0]
