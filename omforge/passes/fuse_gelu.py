"""Raise an exported GELU to one `Gelu`.

Before::

    y = Mul(Mul(x, 0.5), Add(Erf(Div(x, 1.41421)), 1))                               exact
    y = Mul(Mul(x, 0.5), Add(Tanh(Mul(0.79788, Add(x, Mul(0.044715, Pow(x, 3))))), 1))    tanh

After::

    y = Gelu<approximate>(x)        times z where that is among the factors
"""

import math

from omforge import ir
from omforge.passes.rewrite import ANY, Builder, Match, Pat, PatternOps, RewritePass


class FuseGelu(RewritePass):
    """Raise x * Phi(x), exact or by its tanh approximation, to one `Gelu`."""

    name = "fuse-gelu"

    def pattern(self, op: PatternOps, x: Pat, z: Pat) -> Pat:
        """Match both forms; only the approximation binds `tanh`."""
        exact = op.Erf(op.Div(x, math.sqrt(2)) | op.Mul(x, math.sqrt(0.5)))
        cube = op.Pow(x, 3.0) | op.Mul(op.Mul(x, x) | op.Pow(x, 2.0), x)
        inner = op.Mul(op.Add(x, op.Mul(cube, 0.044715)), math.sqrt(2 / math.pi))
        curve = exact | op.Tanh(inner).named("tanh")
        gelu = op.Mul(op.Mul(x, 0.5), op.Add(curve, 1.0))
        # What is gated may come between: the chain of four, whatever its association.
        return gelu | op.Mul(gelu, z)

    def near_miss(self, op: PatternOps) -> Pat:
        """An error function, which nothing else in a language model uses."""
        return op.Erf(ANY)

    def rewrite(self, op: Builder, m: Match) -> ir.Value:
        """Return the `Gelu`."""
        gelu = op.Gelu(m.x, approximate="tanh" if "tanh" in m else "none")
        return op.Mul(gelu, m.z) if "z" in m else gelu
