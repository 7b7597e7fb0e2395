"""Multiply by quantised weights as they are stored, where ONNX Runtime runs the graph.

Before::

    y = MatMul(x, Transpose(DequantizeLinear<axis=1, block_size=g>(q, scale, zero_point)))
                                                    q of 4 or 8 bits [N, K], scale [N, G]

After::

    y = com.microsoft.MatMulNBits<K, N, bits, block_size=g>(x, q', scale, zero_point')
                                                    q' uint8 [N, G, g * bits / 8]

which is the same memory under another type, G = K / g, where q has no sign; else each is more by
half the range. A Gemm becomes that and an Add. One scale for an output is repeated for
blocks of the largest power of two up to 256 that divides K. ONNX Runtime dequantises a weight whole
at each run otherwise, which costs a step of decode more than ten times what it reads.

Source: microsoft/onnxruntime:docs/ContribOperators.md.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from omforge import ir
from omforge.ir.infer import infer_model
from omforge.ir.streamed import ViewTensor
from omforge.ir.values import attribute, constant_tensor, tensor_shape
from omforge.quantization.signed import UnsignedCodes
from omforge.rewriting.base import Pass
from omforge.rewriting.builder import Builder
from omforge.rewriting.events import record
from omforge.rewriting.match import NoMatch
from omforge.rewriting.schema import CONTRIB_DOMAIN
from omforge.rewriting.splice import Names, splice

_SIGNED = {ir.DataType.INT4: 4, ir.DataType.INT8: 8}
_BITS = {ir.DataType.UINT4: 4, ir.DataType.UINT8: 8, **_SIGNED}
_FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16)
_BLOCKS = (256, 128, 64, 32, 16)


@dataclass(frozen=True)
class MatmulNbits(Pass):
    """Replace products with dequantised weights by products with the integers themselves.

    Attributes:
        accuracy_level: 0: products of floats. 4: what is multiplied is rounded to int8 first, which
            is quicker and less exact.
    """

    name: ClassVar[str] = "matmul-nbits"
    accuracy_level: int = 0

    def run(self, model: ir.Model) -> int:
        """Rewrite; the number of products. One that stays is an event."""
        nodes = [(node, found) for node in model.graph if (found := _dequantizer(node)) is not None]
        if not nodes:
            return 0
        infer_model(model)
        names, count = Names(model), 0
        model.opset_imports.setdefault(CONTRIB_DOMAIN, 1)
        for node, dequantize in nodes:
            try:
                weight = _weight(node, dequantize)
            except NoMatch as miss:
                record(model, self.name, node, str(miss))
                continue
            with Builder(model) as op:
                y = op.node(
                    "MatMulNBits",
                    [node.inputs[0], *weight.parts(op)],
                    {
                        "K": weight.inputs,
                        "N": weight.outputs,
                        "bits": weight.bits,
                        "block_size": weight.block,
                        "accuracy_level": self.accuracy_level,
                    },
                    domain=CONTRIB_DOMAIN,
                ).outputs[0]
                if len(node.inputs) > 2 and node.inputs[2] is not None:
                    y = op.Add(y, node.inputs[2])
                splice(op, [node.outputs[0]], [y], by=self.name, names=names)
            count += 1
        return count


def _dequantizer(node: ir.Node) -> ir.Node | None:
    """The DequantizeLinear whose numbers a product multiplies by, if it has one."""
    if node.op_type not in ("MatMul", "Gemm") or node.domain or node.inputs[1] is None:
        return None
    made = node.inputs[1].producer()
    if made is not None and made.op_type == "Transpose" and made.inputs[0] is not None:
        made = made.inputs[0].producer()
    return made if made is not None and made.op_type == "DequantizeLinear" else None


def _is_turned(node: ir.Node, dequantize: ir.Node) -> bool:
    """Whether the product takes what is dequantised as [N, K]."""
    turned = bool(attribute(node, "transB", 0))
    turn = node.inputs[1].producer()  # pyright: ignore[reportOptionalMemberAccess]
    if turn is dequantize or turn is None:
        return turned
    return not turned and list(attribute(turn, "perm", (1, 0))) == [1, 0]


@dataclass(frozen=True)
class _Weight:
    """A quantised weight: codes [N, K], a scale and perhaps a zero point for each block."""

    codes: ir.Value
    scale: ir.Value
    zero_point: ir.Value | None
    bits: int
    inputs: int
    outputs: int
    block: int
    repeats: int
    signed: bool

    def parts(self, op: Builder) -> list[ir.Value]:
        """The operator's inputs behind x."""
        codes, name = constant_tensor(self.codes), self.codes.name
        assert codes is not None
        groups = self.inputs // self.block
        shape = (self.outputs, groups, self.block * self.bits // 8)
        if self.signed:
            codes = UnsignedCodes(codes)
        view = ViewTensor(codes, ir.DataType.UINT8, shape)
        made = [op.constant(view, f"{name}_blocks"), self._scales(op, groups)]
        zeros = self._zeros(op, groups)
        return made if zeros is None else [*made, zeros]

    def _scales(self, op: Builder, groups: int) -> ir.Value:
        tensor, dtype = constant_tensor(self.scale), self.scale.dtype
        assert tensor is not None
        assert dtype is not None
        if self.repeats == 1:
            size = self.outputs * groups
            return op.constant(ViewTensor(tensor, dtype, (size,)), f"{self.scale.name}_flat")
        repeated = ir.LazyTensor(
            lambda: ir.Tensor(np.repeat(tensor.numpy(), self.repeats)),
            dtype=dtype,
            shape=ir.Shape((self.outputs * groups,)),
        )
        return op.constant(repeated, f"{self.scale.name}_repeated")

    def _zeros(self, op: Builder, groups: int) -> ir.Value | None:
        """Zero points of a row are packed by themselves; half the range is what is meant by none.

        They are small, and must be known to be left out: they are computed here.
        """
        tensor = None if self.zero_point is None else constant_tensor(self.zero_point)
        half = 1 << (self.bits - 1)
        numbers = np.zeros((self.outputs, groups), np.int16)
        if tensor is not None:
            given = tensor.numpy().astype(np.int16).reshape(self.outputs, -1)
            numbers = np.repeat(given, self.repeats, axis=1)
        if self.signed:
            numbers = numbers + half
        numbers = numbers.astype(np.uint8)
        if (numbers == half).all():
            return None
        if self.bits == 4:
            even = np.pad(numbers, ((0, 0), (0, groups % 2)))
            numbers = even[:, ::2] | even[:, 1::2] << 4
        return op.constant(np.ascontiguousarray(numbers), f"{self.codes.name}_zeros")


def _weight(node: ir.Node, dequantize: ir.Node) -> _Weight:
    codes, scale, *rest = dequantize.inputs
    zero = rest[0] if rest else None
    assert codes is not None
    assert scale is not None
    x = node.inputs[0]
    if x is None or x.dtype not in _FLOATS or scale.dtype != x.dtype:
        raise NoMatch("x and the scales are not both float32, or both float16", node)
    held, scales = constant_tensor(codes), constant_tensor(scale)
    if held is None or scales is None or (zero is not None and constant_tensor(zero) is None):
        raise NoMatch("the weight, its scales or its zero points are no constants", dequantize)
    bits = _BITS.get(held.dtype, 0)
    if not bits:
        raise NoMatch(f"the weight is {held.dtype}, and must have 4 or 8 bits", codes)
    shape = tensor_shape(held)
    if len(shape) != 2 or not _is_turned(node, dequantize):
        raise NoMatch("the weight is no matrix [N, K] that is turned (see turn-weights)", node)
    options = {name: attribute(node, name, 1.0) for name in ("alpha", "beta")}
    if attribute(node, "transA", 0) or set(options.values()) != {1.0}:
        raise NoMatch("the Gemm turns or scales what it adds", node)
    outputs, inputs = shape
    block, axis = attribute(dequantize, "block_size", 0), attribute(dequantize, "axis", 1) % 2
    repeats = 1
    if not block:
        if axis != 0 or tensor_shape(scales) != (outputs,):
            raise NoMatch("its scales are not one for each output", dequantize)
        block = next((size for size in _BLOCKS if inputs % size == 0), 0)
        repeats = inputs // block if block else 0
    elif axis != 1:
        raise NoMatch("its groups are not along its inputs", dequantize)
    if block < 16 or block & (block - 1) or inputs % block:
        raise NoMatch(
            f"groups of {block or 'no size'} for {inputs} inputs: the operator takes powers of two "
            "from 16 on that divide them",
            dequantize,
        )
    signed = held.dtype in _SIGNED
    return _Weight(codes, scale, zero, bits, inputs, outputs, block, repeats, signed)
