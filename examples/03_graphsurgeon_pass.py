"""Run an existing onnx-graphsurgeon function between omforge's own passes.

It is verified and compared like any other pass, and shares the weights instead of copying them.
"""

from pathlib import Path
from typing import Any

import omforge as of
from omforge.passes import GraphSurgeonPass

MODEL = Path(__file__).parent / "models" / "docs-llama-onnx" / "model.onnx"


def square_by_mul(graph: Any) -> None:
    """Replace Pow(x, 2) by Mul(x, x): what a script for another compiler may do."""
    for node in graph.nodes:
        if node.op == "Pow" and getattr(node.inputs[1], "values", None) == 2:
            node.op = "Mul"
            node.inputs[1] = node.inputs[0]
    graph.cleanup()


def main() -> None:
    steps = (
        *of.Pipeline.parse("canonicalize").passes,
        GraphSurgeonPass("square-by-mul", function=square_by_mul),
        *of.Pipeline.parse("fuse-rms-norm").passes,  # finds the norms in either spelling
    )
    result = of.Pipeline(steps).run(MODEL, compare=True)
    for run in result.passes:
        moved = "" if run.max_abs_diff is None else f", max abs difference {run.max_abs_diff:.1e}"
        print(f"{run.name}: {run.nodes_before} -> {run.nodes_after} nodes{moved}")


if __name__ == "__main__":
    main()
