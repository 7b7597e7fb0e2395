"""Replace x * (1 / y), as exporters write norms, by x / y."""

from omforge import ir
from omforge.passes import Builder, Match, NoMatch, Pat, PatternOps, RewritePass

TIDY = "divide-once,remove-no-ops"


class DivideOnce(RewritePass):
    """Replace x * (1 / y) by x / y."""

    name = "divide-once"

    def pattern(self, op: PatternOps, x: Pat, y: Pat) -> Pat:
        """Match in any order of the factors: Mul is commutative, and the matcher knows."""
        return op.Mul(x, op.Div(1.0, y) | op.Reciprocal(y))

    def rewrite(self, op: Builder, m: Match) -> ir.Value:
        """Return the quotient, or say why this match is left alone."""
        if m.x.dtype != m.output.dtype:
            raise NoMatch(f"x is {m.x.dtype}, the product is {m.output.dtype}", m.output)
        return op.Div(m.x, m.y)
