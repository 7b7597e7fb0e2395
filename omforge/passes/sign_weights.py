"""Store quantised weights as signed integers.

Before::

    w = DequantizeLinear(q, scale, zero_point)                  q uint4 or uint8, constant

After::

    w = DequantizeLinear(q', scale, zero_point')                both int4 or int8, less 8 or 128

A zero point that is 0 then goes. The kernels of products with quantised weights take signed
integers (hicann/ops-nn:matmul/weight_quant_batch_matmul_v2); ONNX Runtime's quantisers write
unsigned ones where groups have zero points.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from omforge import ir
from omforge.ir.values import constant_tensor, tensor_shape
from omforge.quantization.blockwise import packed_integers
from omforge.quantization.signed import signed_initializer
from omforge.rewriting.base import Pass
from omforge.rewriting.builder import Builder
from omforge.rewriting.events import record
from omforge.rewriting.splice import Names, splice

Array = npt.NDArray[Any]

_SIGNED = {ir.DataType.UINT4: ir.DataType.INT4, ir.DataType.UINT8: ir.DataType.INT8}


@dataclass(frozen=True)
class SignWeights(Pass):
    """Store weights of unsigned integers as signed ones, with other zero points."""

    name: ClassVar[str] = "sign-weights"

    def run(self, model: ir.Model) -> int:
        """Rewrite; the number of weights."""
        names = Names(model)
        count = 0
        for node in list(model.graph):
            codes = _unsigned(node)
            if codes is None:
                continue
            scale, zero = node.inputs[1], node.inputs[2] if len(node.inputs) > 2 else None
            scales, zeros = constant_tensor(scale), constant_tensor(zero)
            if scales is None or (zero is not None and zeros is None):
                record(model, self.name, node, "its scales or zero points are no constants")
                continue
            with Builder(model) as op:
                kind, name = _SIGNED[codes.dtype], f"{codes.name or 'weight'}_signed"
                operands = [signed_initializer(op, codes, kind, tensor_shape(codes), name), scale]
                lower = _zero_points(zeros, codes, tensor_shape(scales))
                if lower.any():
                    tensor = packed_integers(lower, kind, f"{name}_zero_point")
                    operands.append(op.constant(tensor, tensor.name or ""))
                options = {name: attribute.value for name, attribute in node.attributes.items()}
                made = op.node("DequantizeLinear", operands, options).outputs[0]
                splice(op, [node.outputs[0]], [made], by=self.name, names=names)
            count += 1
        return count


def _unsigned(node: ir.Node) -> ir.TensorProtocol | None:
    """The constant integers of a DequantizeLinear, if they have no sign."""
    if node.op_type != "DequantizeLinear" or node.domain:
        return None
    tensor = constant_tensor(node.inputs[0])
    return tensor if tensor is not None and tensor.dtype in _SIGNED else None


def _zero_points(
    zeros: ir.TensorProtocol | None, codes: ir.TensorProtocol, shape: tuple[int, ...]
) -> Array:
    """int8 of the scales' shape; ONNX's zero point is 0 where none is given."""
    half = 1 << (codes.dtype.bitwidth - 1)
    given = np.zeros(shape, np.int16) if zeros is None else zeros.numpy().astype(np.int16)
    return (given - half).astype(np.int8)
