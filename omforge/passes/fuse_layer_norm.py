"""Raise an exported layer norm to one `LayerNormalization`.

Before::

    d = Sub(x, ReduceMean(x, -1))
    y = Add(Mul(Div(d, Sqrt(Add(ReduceMean(Pow(d, 2), -1), eps))), gamma), beta)

After::

    y = LayerNormalization<axis=-1, epsilon=eps>(x, gamma, beta)

Exporters write it out below opset 17, which has the operator. Where gamma is absent or not [H] (one
for each head, say), the norm gets a gamma of ones, and product and sum stay behind it.
"""

from omforge import ir
from omforge.passes.fuse_rms_norm import ones
from omforge.passes.rewrite import ANY, Builder, Match, Pat, PatternOps, RewritePass

FLOAT = ir.DataType.FLOAT


class FuseLayerNorm(RewritePass):
    """Raise the nodes of a layer norm, with or without its bias, to one `LayerNormalization`."""

    name = "fuse-layer-norm"

    def pattern(self, op: PatternOps, x: Pat, gamma: Pat, beta: Pat, eps: Pat) -> Pat:
        """Match gamma * (x - mean) / sqrt(variance + eps) + beta; without beta, without gamma."""
        centred = op.Sub(x, op.ReduceMean(x, axes=[-1])).named("centred").shared()
        square = op.Pow(centred, 2.0) | op.Mul(centred, centred)
        variance = op.Add(op.ReduceMean(square, axes=[-1]), eps)
        rms = op.Sqrt(variance) | op.Pow(variance, 0.5)
        norm = (
            op.Div(centred, rms)
            | op.Mul(centred, op.Reciprocal(rms) | op.Div(1.0, rms))
            | op.Mul(centred, op.Pow(variance, -0.5))
        )
        scaled = op.Mul(norm, gamma)
        return op.Add(scaled, beta) | scaled | norm

    def near_miss(self, op: PatternOps) -> Pat:
        """The root of a variance."""
        centred = op.Sub(ANY, op.ReduceMean(ANY, axes=ANY, keepdims=ANY))
        mean = op.ReduceMean(
            op.Pow(centred, 2.0) | op.Mul(centred, centred), axes=ANY, keepdims=ANY
        )
        return op.Sqrt(op.Add(mean, ANY)) | op.Pow(op.Add(mean, ANY), ANY)

    def rewrite(self, op: Builder, m: Match) -> ir.Value:
        """Return the norm."""
        m.shape("x", "... H")
        if "gamma" not in m:
            return op.LayerNormalization(m.x, op.constant(ones(m)), axis=-1, epsilon=m.const("eps"))
        m.shape("gamma", "H")
        inputs = [m.x, m.gamma]
        if "beta" in m:
            m.shape("beta", "H")
            inputs.append(m.beta)
        return op.LayerNormalization(*inputs, axis=-1, epsilon=m.const("eps"))
