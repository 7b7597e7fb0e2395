"""Raise an exported SiLU or quick GELU to one `Swish`.

Before::

    y = Mul(x, Sigmoid(x))                   SiLU
    y = Mul(x, Sigmoid(Mul(x, 1.702)))       quick GELU
    y = Div(x, Add(1, Exp(Neg(x))))          SiLU, spelled out

After::

    y = Swish<alpha>(x)
"""

from omforge import ir
from omforge.passes.rewrite import ANY, Builder, Match, Pat, PatternOps, RewritePass


class FuseSwish(RewritePass):
    """Raise x * sigmoid(alpha * x) to one `Swish`."""

    name = "fuse-swish"

    def pattern(self, op: PatternOps, x: Pat, alpha: Pat) -> Pat:
        """Match the gate in its three spellings; only quick GELU binds `alpha`."""
        gate = op.Sigmoid(x) | op.Sigmoid(op.Mul(x, alpha))
        return op.Mul(x, gate) | op.Div(x, op.Add(op.Exp(op.Neg(x)), 1.0))

    def near_miss(self, op: PatternOps) -> Pat:
        """A gate that is no SiLU, or not of the value that it gates."""
        return op.Sigmoid(ANY)

    def rewrite(self, op: Builder, m: Match) -> ir.Value:
        """Return the `Swish`."""
        alpha = m.const("alpha") if "alpha" in m else 1.0
        return op.Swish(m.x, alpha=alpha)
