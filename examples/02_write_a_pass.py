"""Write a pass, and let the pipeline prove on the CPU that it changes no number.

The pass replaces `x * (1 / y)`, as exporters write norms, by `x / y`.
"""

from pathlib import Path

import omforge as of
from omforge import ir
from omforge.passes import Builder, Match, NoMatch, Pat, PatternOps, RewritePass

MODEL = Path(__file__).parent / "models" / "docs-llama-onnx" / "model.onnx"


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


def main() -> None:
    result = of.Pipeline((DivideOnce(),)).run(MODEL, compare=True)
    for run in result.passes:
        print(
            f"{run.name}: {run.rewrites} rewrites, {run.nodes_before} -> {run.nodes_after} nodes, "
            f"max abs difference {run.max_abs_diff:.1e}"
        )


if __name__ == "__main__":
    main()
