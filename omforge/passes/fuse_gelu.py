"""Raise an exported GELU to one `Gelu`.

Before::

    y = Mul(Mul(x, 0.5), Add(Erf(Mul(x, 0.70710)), 1))                               exact
    y = Mul(Mul(x, 0.5), Add(Tanh(Mul(0.79788, Add(x, Mul(0.044715, Pow(x, 3))))), 1))    tanh
    y = Mul(Mul(x, 0.5), Add(Tanh(Mul(Mul(0.79788, x), Add(Mul(0.044715, Pow(x, 2)), 1))), 1))

After::

    y = Gelu<approximate>(x)        times z where that is among the factors
"""

import math

from omforge import ir
from omforge.rewriting.rewrite import ANY, Builder, Match, Pat, PatternOps, RewritePass


class FuseGelu(RewritePass):
    """Raise x * Phi(x), exact or by its tanh approximation, to one `Gelu`."""

    name = "fuse-gelu"

    def pattern(self, op: PatternOps, x: Pat, z: Pat) -> Pat:
        """Match both forms; only the approximation binds `tanh`."""
        exact = op.Erf(op.Mul(x, math.sqrt(0.5)))
        square = op.Mul(x, x) | op.Pow(x, 2.0)
        cube = op.Pow(x, 3.0) | op.Mul(square, x)
        slope = math.sqrt(2 / math.pi)
        inner = op.Mul(op.Add(x, op.Mul(cube, 0.044715)), slope)
        factored = op.Mul(op.Mul(x, slope), op.Add(op.Mul(square, 0.044715), 1.0))
        curve = exact | op.Tanh(inner | factored).named("tanh")
        gelu = op.Mul(op.Mul(x, 0.5), op.Add(curve, 1.0))
        # What is gated may come between: the chain of four, whatever its association.
        return gelu | op.Mul(gelu, z)

    def near_miss(self, op: PatternOps) -> Pat:
        """A curve that nothing else in a language model uses; a softcap's tanh adds no 1."""
        return op.Erf(ANY) | op.Add(op.Tanh(ANY), 1.0)

    def rewrite(self, op: Builder, m: Match) -> ir.Value:
        """Return the `Gelu`."""
        gelu = op.Gelu(m.x, approximate="tanh" if "tanh" in m else "none")
        return op.Mul(gelu, m.z) if "z" in m else gelu
