"""Store quantised weights [N, K], the outputs outermost.

Before::

    y = MatMul(x, DequantizeLinear<axis=0>(q, scale, zero_point))        q [K, N], scale [G, N]

After::

    w = DequantizeLinear<axis=1>(q', scale', zero_point')                q' [N, K], scale' [N, G]
    y = MatMul(x, Transpose<perm=[1, 0]>(w))

310P's kernel for weight-quantised products wants its weight so; a weight of very many outputs can
be cut into rows without a copy; and eight int4 along K are one int32 where N is odd.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from omforge import ir
from omforge.ir.infer import infer_model
from omforge.ir.streamed import StreamedTensor
from omforge.ir.values import attribute, tensor_shape
from omforge.quantization.blockwise import pack
from omforge.rewriting.base import Pass
from omforge.rewriting.builder import Builder
from omforge.rewriting.splice import Names, splice

Array = npt.NDArray[Any]

_PACKED = 8
"""int4 in an int32."""


@dataclass(frozen=True)
class TurnWeights(Pass):
    """Store quantised weights of products [N, K] instead of [K, N].

    Attributes:
        wider_than: Only those with more outputs N than this, and int4 ones whose N is no multiple
            of 8 where K is one.
    """

    name: ClassVar[str] = "turn-weights"
    wider_than: int = 0

    def run(self, model: ir.Model) -> int:
        """Turn; the number of weights."""
        names = Names(model)
        found = [node for node in model.graph if _is_plain(node) and self._wanted(node)]
        for node in found:
            with Builder(model) as op:
                rank = _rank(_tensor(node, 0))
                perm = [*range(rank - 2), rank - 1, rank - 2]
                turned = op.Transpose(_turned(op, node), perm=perm)
                splice(op, [node.outputs[0]], [turned], by=self.name, names=names)
        for node in found:
            for value in node.inputs:
                if value is not None and not value.uses():
                    model.graph.initializers.pop(value.name or "", None)
        if found:
            infer_model(model)
        return len(found)

    def _wanted(self, node: ir.Node) -> bool:
        tensor = _tensor(node, 0)
        inputs, outputs = tensor_shape(tensor)[-2:]
        odd = tensor.dtype == ir.DataType.INT4 and outputs % _PACKED and not inputs % _PACKED
        return outputs > self.wider_than or bool(odd)


def _is_plain(node: ir.Node) -> bool:
    """Whether it gives a weight [K, N], or [E, K, N], to products, and to nothing else."""
    if node.op_type != "DequantizeLinear" or node.domain or node.outputs[0].is_graph_output():
        return False
    constant = all(value is None or value.const_value is not None for value in node.inputs)
    return (
        constant
        and _rank(_tensor(node, 0)) in (2, 3)
        and _is_by_output(node)
        and all(use.idx == 1 and _multiplies(use.node) for use in node.outputs[0].uses())
    )


def _multiplies(node: ir.Node) -> bool:
    """Whether it sums over the first axis of its second input."""
    if node.op_type == "Gemm":
        return not attribute(node, "transB", 0)
    return node.op_type == "MatMul"


def _is_by_output(node: ir.Node) -> bool:
    """Whether its scales belong to outputs N of each matrix, or groups of inputs K of it."""
    rank = _rank(_tensor(node, 0))
    return rank == 2 or (_rank(_tensor(node, 1)) == 3 and attribute(node, "axis", 1) % 3 == 1)


def _tensor(node: ir.Node, index: int) -> ir.TensorProtocol:
    value = node.inputs[index]
    assert value is not None
    assert value.const_value is not None
    return value.const_value


def _turned(op: Builder, node: ir.Node) -> ir.Value:
    parts = [op.constant(_turn(_tensor(node, 0)), node.inputs[0].name or "")]  # pyright: ignore[reportOptionalMemberAccess]
    for value in node.inputs[1:]:
        if value is None or value.const_value is None:
            continue
        tensor = value.const_value
        parts.append(op.constant(_turn(tensor), value.name or "") if _rank(tensor) > 1 else value)
    options = {name: given.value for name, given in node.attributes.items()}
    rank = _rank(_tensor(node, 0))
    options["axis"] = 2 * rank - 3 - attribute(node, "axis", 1) % rank
    return op.node("DequantizeLinear", parts, options).outputs[0]


def _rank(tensor: ir.TensorProtocol) -> int:
    return len(tensor_shape(tensor))


def _turn(tensor: ir.TensorProtocol) -> ir.TensorProtocol:
    return _Turned(tensor)


class _Turned(StreamedTensor):
    """Matrices whose rows are the columns of others, computed when they are written."""

    def __init__(self, source: ir.TensorProtocol) -> None:
        *outer, rows, columns = tensor_shape(source)
        super().__init__(source.dtype, (*outer, columns, rows), source.name or "")
        self._source = source

    @property
    def sources(self) -> tuple[ir.TensorProtocol, ...]:
        """The other matrix."""
        return (self._source,)

    def pieces(self) -> Iterator[bytes]:
        """All of the source is in memory meanwhile, one byte an element."""
        whole: Array = self._source.numpy()
        if self.dtype.bitwidth == 4:
            yield pack(np.ascontiguousarray(np.swapaxes(whole, -1, -2)).astype(np.int8), 4)
            return
        for matrix in whole.reshape(-1, *whole.shape[-2:]):
            yield np.ascontiguousarray(matrix.T).tobytes()
