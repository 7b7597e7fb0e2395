"""What a step computes: the products and sums of matrices, counted on a lowered graph.

A prefill is bound by them as a decode step is by bytes (see `traffic`). What is counted is what the
cubes do: products of matrices, convolutions, and fused attention by the products that it stands
for, over all keys that it is given, masked ones too. Element-wise operators, norms and softmaxes
run on the vector units, and are in no count.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from omforge import ir
from omforge.ir.dims import evaluate
from omforge.ir.values import attribute
from omforge.lowering.legalize.builder import dims
from omforge.lowering.legalize.traffic import is_constant

_MATRICES = frozenset(
    (
        *("MatMul", "Gemm", "NPUWeightQuantBatchMatmulV2", "QuantBatchMatMul"),
        *("QuantBatchMatmulV3", "WeightQuantBatchMatmulV2", "NPUQuantBatchMatmul"),
    )
)
_CONVOLUTIONS = frozenset(("Conv",))
_FUSED = frozenset(
    (
        *("NPUPromptFlashAttention", "NPUIncreFlashAttention"),
        *("IncreFlashAttention", "FusedInferAttentionScore", "PromptFlashAttention"),
    )
)
_HEADS_FIRST = ("BNSD", "BNSD_BSND")


@dataclass(frozen=True)
class Products:
    """Operations of some kernels: each product with its sum is two.

    Attributes:
        floats: Of floats, and of floats by integers, which become floats first.
        int8: Of int8 by int8.
    """

    floats: int = 0
    int8: int = 0

    @property
    def total(self) -> int:
        """All of them."""
        return self.floats + self.int8

    def __add__(self, other: Products) -> Products:
        return Products(self.floats + other.floats, self.int8 + other.int8)


def products(nodes: Iterable[ir.Node], gear: Mapping[str, int] | None = None) -> Products:
    """Count the operations of these nodes in one step.

    Args:
        nodes: Lowered nodes.
        gear: The numbers of the symbols in their shapes; None for static shapes.

    Raises:
        NotLegal: A shape is not known.
        InputError: A shape has a symbol without a number.
    """
    total = Products()
    for node in nodes:
        count = 0 if is_constant(node) else _of_node(node, gear or {})
        whole = count and all(
            value is not None and value.dtype in (ir.DataType.INT8, ir.DataType.INT32)
            for value in node.inputs[:2]
        )
        total += Products(int8=count) if whole else Products(floats=count)
    return total


def _of_node(node: ir.Node, gear: Mapping[str, int]) -> int:
    def shape(value: ir.Value | None) -> tuple[int, ...]:
        return () if value is None else tuple(evaluate(dim, gear) for dim in dims(value))

    if node.op_type in _MATRICES:
        rows = shape(node.inputs[0])
        turned = attribute(node, "transA", 0)
        return 2 * math.prod(shape(node.outputs[0])) * rows[-2 if turned else -1]
    if node.op_type in _CONVOLUTIONS:
        return 2 * math.prod(shape(node.outputs[0])) * math.prod(shape(node.inputs[1])[1:])
    if node.op_type in _FUSED:
        query, key = shape(node.inputs[0]), shape(node.inputs[1])
        layout = attribute(node, "input_layout", "BSH")
        keys = key[2] if layout in _HEADS_FIRST else key[1]
        # Scores, and their sums of values: each query meets each key of its head twice.
        return 4 * math.prod(query) * keys
    return 0
