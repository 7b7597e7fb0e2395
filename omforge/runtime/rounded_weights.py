"""Whether rounding the weights alone, with all arithmetic exact, is beyond the tolerance.

Half precision has 11 bits. A model whose attention is nearly a choice, with scores in the tens, or
whose logits are differences of large numbers, is further off than the tolerance as soon as its
weights have as many, whatever computes with them. No lowering mends that. Such a difference stays a
failure; what is found here says whether the weights are behind it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import inf
from typing import Any

import numpy.typing as npt

from omforge import ir
from omforge.bundle.manifest import Manifest
from omforge.ir.numerics import Tolerance
from omforge.runtime.cases import Case
from omforge.runtime.judging import excess_of

Array = npt.NDArray[Any]

_HALVES = {"float16": ir.DataType.FLOAT16, "bfloat16": ir.DataType.BFLOAT16}

_OF_ANGLES = ("Cos", "Sin", "Range")
_NORM = "LayerNormalization"
"""What the lowered graphs compute in float32, of weights in float32 (see `convert-precision`)."""

_AS_MUCH_AGAIN = 2.0
"""What the results of a graph add at most, each rounded as its weights are."""


@dataclass(frozen=True)
class WeightRounding:
    """How far the canonical graph is from itself when no more than its weights are rounded.

    Attributes:
        excess: As a multiple of the tolerance, in the worst case.
        case: Which that is.
        dtype: Of the rounded weights.
    """

    excess: float
    case: str
    dtype: str

    def explains(self, excess: float) -> bool:
        """Whether a lowered graph that is so far off need not be wrong."""
        return 1 < self.excess < inf and excess <= _AS_MUCH_AGAIN * self.excess

    def __str__(self) -> str:
        return (
            f"with no more than its weights rounded to {self.dtype}, and every result in float32, "
            f"the canonical graph is {self.excess:.3g} times the tolerance off in case "
            f"{self.case!r}: {self.dtype} does not hold this model closer"
        )


def rounds_weights(manifest: Manifest) -> bool:
    """Whether the lowered graphs hold the export's float32 weights in half precision."""
    return manifest.export.dtype == "float32" and manifest.dtype in _HALVES


def with_rounded_weights(model: ir.Model, dtype: str) -> ir.Model:
    """Return a copy of a float32 graph that rounds its weights when it reads them.

    They stay where they are, and the arithmetic stays in float32.

    Args:
        model: Canonical; shares its tensors with the copy.
        dtype: float16 or bfloat16.
    """
    copy = model.clone()
    graph = copy.graph
    exact = _exact(graph)
    first = graph[0]
    for value in list(graph.initializers.values()):
        tensor = value.const_value
        numbers = tensor is not None and tensor.dtype == ir.DataType.FLOAT and tensor.size > 1
        if not numbers or value in exact or value.is_graph_input():
            continue
        users = tuple(value.uses())
        rounded = ir.node("Cast", [value], {"to": int(_HALVES[dtype])})
        wide = ir.node("Cast", rounded.outputs, {"to": int(ir.DataType.FLOAT)})
        graph.insert_before(first, [rounded, wide])
        for use in users:
            use.node.replace_input_with(use.idx, wide.outputs[0])
    return copy


def _exact(graph: ir.Graph) -> set[ir.Value]:
    """Weights that stay in float32: what angles are made of, and scales and biases of norms."""
    pending = [v for n in graph if n.op_type in _OF_ANGLES for v in n.inputs]
    found = {v for n in graph if n.op_type == _NORM for v in n.inputs[1:] if v is not None}
    while pending:
        value = pending.pop()
        if value is None or value in found or value.dtype not in (ir.DataType.FLOAT, None):
            continue
        found.add(value)
        node = value.producer()
        pending += node.inputs if node is not None else ()
    return found


def rounding_of(
    cases: Sequence[Case],
    rounded: Mapping[str, Sequence[Array]],
    reference: Mapping[str, Sequence[Array]],
    allowed: Tolerance,
    dtype: str,
) -> WeightRounding:
    """Compare the logits of the graph with rounded weights, by case and step, with the reference's.

    Args:
        cases: What was run.
        rounded: Logits of the graph that `with_rounded_weights` made.
        reference: Those of the graph as it is.
        allowed: The tolerance of the lowered graphs.
        dtype: Of the rounded weights.
    """

    def excess(case: Case) -> float:
        pairs = zip(rounded[case.name], reference[case.name], strict=True)
        return max(excess_of(mine, theirs, allowed) for mine, theirs in pairs)

    worst, name = max((excess(case), case.name) for case in cases)
    return WeightRounding(worst, name, dtype)
