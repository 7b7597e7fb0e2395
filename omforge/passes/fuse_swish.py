"""Raise an exported SiLU or quick GELU to one `Swish`.

Before::

    y = Mul(x, Sigmoid(x))                   SiLU
    y = Mul(x, Sigmoid(Mul(x, 1.702)))       quick GELU
    y = Div(x, Add(1, Exp(Neg(x))))          SiLU, spelled out
    y = Mul(x, Mul(Sigmoid(x), z))           SiLU times z, in any association

After::

    y = Swish<alpha>(x)                      times z where there is one
"""

from omforge import ir
from omforge.rewriting.rewrite import ANY, Builder, Match, Pat, PatternOps, RewritePass


class FuseSwish(RewritePass):
    """Raise x * sigmoid(alpha * x) to one `Swish`."""

    name = "fuse-swish"

    def pattern(self, op: PatternOps, x: Pat, z: Pat, alpha: Pat) -> Pat:
        """Match the gate in its spellings; only quick GELU binds `alpha`."""
        inner = x | op.Mul(x, alpha)
        below = op.Add(op.Exp(op.Neg(inner)), 1.0)
        gate = op.Sigmoid(inner) | op.Reciprocal(below) | op.Div(1.0, below)
        # What is gated may come between: the chain of three, whatever its association.
        gated = (
            op.Mul(op.Mul(x, gate), z) | op.Mul(x, op.Div(z, below)) | op.Div(op.Mul(x, z), below)
        )
        return op.Mul(x, gate) | op.Div(x, below) | gated

    def near_miss(self, op: PatternOps) -> Pat:
        """A gate that is no SiLU, or not of the value that it gates."""
        below = op.Add(op.Exp(ANY), 1.0)
        return op.Sigmoid(ANY) | op.Reciprocal(below) | op.Div(ANY, below)

    def rewrite(self, op: Builder, m: Match) -> ir.Value:
        """Return the `Swish`."""
        alpha = m.const("alpha") if "alpha" in m else 1.0
        swish = op.Swish(m.x, alpha=alpha)
        return op.Mul(swish, m.z) if "z" in m else swish
