"""Raise an exported layer norm to one `LayerNormalization`.

Before, in one of many spellings, the operator of opset 23 among them::

    d = Sub(x, ReduceMean(x, -1))
    y = Add(Mul(Div(d, Sqrt(Add(ReduceMean(Pow(d, 2), -1), eps))), gamma), beta)
    y = Add(RMSNormalization<epsilon=eps>(d, gamma), beta)

After::

    y = LayerNormalization<axis=-1, epsilon=eps>(x, gamma, beta)

Exporters write it out below opset 17, which has the operator. Where gamma is absent or not [H] (one
for each head, say), the norm gets a gamma of ones, and product and sum stay behind it. What lies in
a wider type between two casts is computed in the operator's own float32; see `norm_types`.
"""

from omforge import ir
from omforge.ir.values import attribute, dims
from omforge.recognition.norm_types import between_casts, ones, rounded
from omforge.rewriting.rewrite import ANY, Builder, Match, NoMatch, Pat, PatternOps, RewritePass


class FuseLayerNorm(RewritePass):
    """Raise the nodes of a layer norm, with or without its bias, to one `LayerNormalization`."""

    name = "fuse-layer-norm"

    def pattern(self, op: PatternOps, x: Pat, gamma: Pat, beta: Pat, eps: Pat) -> Pat:
        """Match gamma * (x - mean) / sqrt(variance + eps) + beta; without beta, without gamma."""
        wide = op.Cast(x, to=ANY).named("wide").shared() | x
        middle = rounded(op, op.ReduceMean(wide, axes=[-1]))
        difference = op.Sub(wide | x, middle).named("centred").shared()
        centred = op.Cast(difference, to=ANY).shared() | difference
        square = rounded(op, op.Pow(centred, 2.0) | op.Mul(centred, centred))
        variance = rounded(op, op.Add(rounded(op, op.ReduceMean(square, axes=[-1])), eps))
        rms = rounded(op, op.Sqrt(variance) | op.Pow(variance, 0.5))
        inverse = op.Reciprocal(rms) | op.Div(1.0, rms) | op.Pow(variance, -0.5)
        whole = centred | difference
        norm = op.Div(whole, rms) | op.Mul(whole, rounded(op, inverse))
        given = op.RMSNormalization(difference, gamma, axis=ANY, epsilon=ANY, stash_type=ANY)
        normed = op.Cast(norm, to=ANY) | norm
        scaled = op.Mul(normed, gamma) | given.named("given")
        shifted = op.Add(scaled, beta) | scaled | normed
        return op.Cast(shifted, to=ANY).named("narrowed") | shifted

    def near_miss(self, op: PatternOps) -> Pat:
        """The root of a variance."""
        middle = rounded(op, op.ReduceMean(ANY, axes=ANY, keepdims=ANY))
        centred = op.Sub(ANY, middle)
        centred = op.Cast(centred, to=ANY) | centred
        square = rounded(op, op.Pow(centred, 2.0) | op.Mul(centred, centred))
        mean = rounded(op, op.ReduceMean(square, axes=ANY, keepdims=ANY))
        variance = rounded(op, op.Add(mean, ANY))
        return op.Sqrt(variance) | op.Pow(variance, ANY)

    def rewrite(self, op: Builder, m: Match) -> ir.Value:
        """Return the norm."""
        m.shape("x", "... H")
        types = between_casts(m)
        x = types.source(op, m)
        if "gamma" not in m:
            gamma = op.constant(ones(m, types.computed))
            return types.result(op, op.LayerNormalization(x, gamma, axis=-1, epsilon=_epsilon(m)))
        m.shape("gamma", "H")
        inputs = [x, types.cast(op, m.gamma)]
        if "beta" in m:
            m.shape("beta", "H")
            inputs.append(types.cast(op, m.beta))
        return types.result(op, op.LayerNormalization(*inputs, axis=-1, epsilon=_epsilon(m)))


def _epsilon(m: Match) -> float:
    given = m.get("given")
    if given is None:
        return m.const("eps")
    node = given.producer()
    assert node is not None
    axis, rank = attribute(node, "axis", -1), len(dims(m.x) or ())
    if axis not in (-1, rank - 1):
        raise NoMatch(f"it normalises over the axes from {axis} on", node)
    return attribute(node, "epsilon", 1e-5)
