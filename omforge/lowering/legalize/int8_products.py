"""Products of int8 by int8, as `quantize-activations` writes them.

Before::

    q = QuantizeLinear(x, step)                                          one step for all of x
    y = MatMul(DequantizeLinear(q, step), DequantizeLinear(w, scale))    w int8 [K, N], scale [N]

After, in one of two forms::

    q = AscendQuant<scale=1/step>(x)
    y = QuantBatchMatMul(q, w, step * scale)
    y = AscendDequant(MatMul(q, w), step * scale)

Kernels before 950 multiply x by 1/step in float16. What they then divide by is the reciprocal of a
float16, and that is the step that the products are scaled with.

Sources: hicann/ops-nn:quant/ascend_quant, quant/ascend_dequant, matmul/quant_batch_matmul_v3; the
layout of a scale is in `omforge.ir.int8_ops`.
Letters: K inputs, N outputs, M tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from omforge import ir
from omforge.ir.int8_ops import encoded_scale
from omforge.ir.values import constant, tensor_shape
from omforge.lowering.legalize.builder import (
    Builder,
    NotLegal,
    Results,
    dims,
    float_attribute,
    int_attribute,
    optional_input,
    product,
    required_input,
)
from omforge.lowering.legalize.quantized import LARGEST, dequantizer

INT8_MATMUL = "Int8MatMul"
"""What `choices` calls a MatMul or Gemm of int8 by int8."""

QUANT_MATMUL, ASCEND_DEQUANT, ASCEND_QUANT = "QuantBatchMatMul", "AscendDequant", "AscendQuant"

_INT8 = ir.DataType.INT8
_HALF = ir.DataType.FLOAT16

_MOST_INPUTS = (1 << 31) // (128 * 128)
"""Beyond them a sum of products may leave int32."""


@dataclass(frozen=True)
class _Product:
    """A product of int8 by int8.

    Attributes:
        x: int8 [.., K].
        codes: int8 [K, N], or [N, K] where it is turned.
        turned: Whether the weight's outputs are outermost.
        scale: What a sum is multiplied by, float32 [N].
        inputs: K.
        outputs: N.
    """

    x: ir.Value
    codes: ir.Value
    turned: bool
    scale: np.ndarray[tuple[int], np.dtype[np.float32]]
    inputs: int
    outputs: int


def is_int8_matmul(node: ir.Node) -> bool:
    """Say whether a product reads int8 that is computed, and a stored weight of integers."""
    of_weight = dequantizer(node)
    codes = None if of_weight is None else of_weight.inputs[0]
    stored = codes is not None and codes.const_value is not None
    return stored and _input_dequantizer(node) is not None


def serves_int8_products(node: ir.Node) -> bool:
    """Say whether a DequantizeLinear is what such products read as x, and nothing else."""
    uses = node.outputs[0].uses()
    return bool(uses) and all(
        use.idx == 0 and is_int8_matmul(use.node) and _input_dequantizer(use.node) is node
        for use in uses
    )


def ascend_quant(op: Builder, node: ir.Node) -> Results:
    """QuantizeLinear with one step, for products of int8."""
    x, result = required_input(node, 0), node.outputs[0]
    step = _step(node)
    readers = [use.node for use in result.uses()]
    if result.dtype != _INT8 or not readers or result.is_graph_output():
        raise NotLegal("it is for int8 that products read")
    if not all(
        reader.op_type == "DequantizeLinear" and serves_int8_products(reader) for reader in readers
    ):
        raise NotLegal("it is for int8 that products read; another use has other scales")
    if x.dtype not in (_HALF, ir.DataType.FLOAT):
        raise NotLegal(f"x is {x.dtype}, the kernel takes float16 and float32")
    settings = {"scale": float(_reciprocal(step)), "offset": 0.0, "dst_type": "INT8"}
    return op.target_op(ASCEND_QUANT, x, **settings)


def quant_matmul(op: Builder, node: ir.Node) -> Results:
    """One kernel, from int8 to float16."""
    found = _product(node)
    on_310p = op.target.family.name == "310p"
    if on_310p and not found.turned:
        raise NotLegal("310P takes a weight stored [N, K]: turn-weights")
    if on_310p and op.front == "air":
        raise NotLegal("310P takes a weight in FRACTAL_NZ alone, and it is stored in ND")
    last, name = (found.inputs, "K") if found.turned else (found.outputs, "N")
    if found.inputs > LARGEST or last > LARGEST:
        raise NotLegal(
            f"K is {found.inputs} and {name} is {last}: the last axes of x and of the weight are "
            f"{LARGEST} at most"
        )
    scale = _encoded(op, node, found, flag=True)
    turned = {"transpose_x2": 1} if found.turned else {}
    rows = _rows(op, found)
    y = op.target_op(QUANT_MATMUL, rows, found.codes, scale, dtype=1, **turned)[0]
    return (_finished(op, node, found, y),)


def matmul_dequant(op: Builder, node: ir.Node) -> Results:
    """A product that gives int32, and its scaling to float16."""
    found = _product(node)
    weight = op.transpose(found.codes, (1, 0)) if found.turned else found.codes
    rows = _rows(op, found)
    sums = op.emit("MatMul", [rows, weight], ir.DataType.INT32, (dims(rows)[0], found.outputs))
    scale = _encoded(op, node, found, flag=False)
    return (_finished(op, node, found, op.target_op(ASCEND_DEQUANT, sums, scale, dtype=1)[0]),)


def _product(node: ir.Node) -> _Product:
    """What a product multiplies.

    Raises:
        NotLegal: It is not of int8 matrices with one step for x and one scale for each output.
    """
    of_x, of_weight = _input_dequantizer(node), dequantizer(node)
    assert of_x is not None
    assert of_weight is not None
    if node.outputs[0].dtype != _HALF:
        raise NotLegal(f"the product is {node.outputs[0].dtype}, kernels give float16")
    if int_attribute(node, "transA", 0):
        raise NotLegal("Gemm with transA")
    codes, x = required_input(of_weight, 0), required_input(of_x, 0)
    if codes.dtype != _INT8 or codes.const_value is None or x.dtype != _INT8:
        raise NotLegal(
            f"it is a product of {x.dtype} by {codes.dtype}, the kernel has int8 by int8"
        )
    shape = tensor_shape(codes.const_value)
    if len(shape) != 2:
        raise NotLegal(f"the weight has {len(shape)} dimensions, the kernel takes 2")
    turned = bool(int_attribute(node, "transB", 0))
    if required_input(node, 1) is not of_weight.outputs[0]:
        turned = not turned
    inputs, outputs = shape[::-1] if turned else shape
    scale = constant(required_input(of_weight, 1), limit=1 << 30)
    along = int_attribute(of_weight, "axis", 1) % 2 == (0 if turned else 1)
    grouped = int_attribute(of_weight, "block_size", 0)
    if scale is None or scale.shape != (outputs,) or not along or grouped:
        raise NotLegal("the weight has no scale for each output")
    zero = optional_input(of_weight, 2)
    numbers = None if zero is None else constant(zero, limit=1 << 30)
    if zero is not None and (numbers is None or numbers.any()):
        raise NotLegal("the weight has zero points, the kernel has none")
    if inputs >= _MOST_INPUTS:
        raise NotLegal(f"it has {inputs} inputs: from {_MOST_INPUTS} on a sum may leave int32")
    step = np.float32(1) / _reciprocal(_step(of_x)).astype(np.float32)
    return _Product(x, codes, turned, scale.astype(np.float32) * step, inputs, outputs)


def _input_dequantizer(node: ir.Node) -> ir.Node | None:
    """The DequantizeLinear that a product reads its x through, if it is one that was computed."""
    value = node.inputs[0] if node.inputs else None
    producer = None if value is None else value.producer()
    if producer is None or producer.op_type != "DequantizeLinear" or producer.domain:
        return None
    codes = producer.inputs[0]
    return None if codes is None or codes.const_value is not None else producer


def _step(node: ir.Node) -> float:
    """The one step of a QuantizeLinear or DequantizeLinear without a zero point.

    Raises:
        NotLegal: It has more, or one that is computed.
    """
    scale, zero = constant(required_input(node, 1)), optional_input(node, 2)
    numbers = None if zero is None else constant(zero)
    if scale is None or scale.ndim or (zero is not None and (numbers is None or numbers.any())):
        raise NotLegal("it is for one step for the whole tensor, and no zero point")
    return float(scale)


def _reciprocal(step: float) -> np.floating:
    """1/step as kernels have it.

    Raises:
        NotLegal: float16 does not hold it.
    """
    with np.errstate(over="ignore", divide="ignore"):
        found = np.float16(1 / np.float64(step))
    if not 0 < found < np.inf:
        raise NotLegal(f"the reciprocal of the step {step:g} is beyond float16")
    return found


def _rows(op: Builder, found: _Product) -> ir.Value:
    """The integers of x as [M, K].

    Raises:
        NotLegal: It is not of K inputs.
    """
    shape = dims(found.x)
    if len(shape) < 2 or shape[-1] != found.inputs:
        raise NotLegal(f"x is {list(map(str, shape))}, the weight has {found.inputs} inputs")
    return op.reshape(found.x, (product(shape[:-1]), found.inputs))


def _encoded(op: Builder, node: ir.Node, found: _Product, *, flag: bool) -> ir.Value:
    """The scales of the sums as a uint64 constant [N].

    Raises:
        NotLegal: One is zero, subnormal or infinite.
    """
    tiny = np.finfo(np.float32).tiny
    if not (np.isfinite(found.scale).all() and (found.scale >= tiny).all()):
        raise NotLegal("a scale of the sums is no normal float32")
    name = f"{node.name or node.outputs[0].name}.deq_scale"
    tensor = ir.Tensor(encoded_scale(found.scale, flag=flag), name=name)
    return op.stored((node, flag), name, lambda: tensor)


def _finished(op: Builder, node: ir.Node, found: _Product, y: ir.Value) -> ir.Value:
    """The product in the shape of x, and what a Gemm adds."""
    y = op.reshape(y, (*dims(found.x)[:-1], found.outputs))
    if node.op_type == "Gemm":
        y = op.mul(y, float_attribute(node, "alpha", 1.0))
        c = optional_input(node, 2)
        y = y if c is None else op.add(y, op.mul(c, float_attribute(node, "beta", 1.0)))
    return y


FORMS: dict[str, Callable[[Builder, ir.Node], Results]] = {
    QUANT_MATMUL: quant_matmul,
    ASCEND_DEQUANT: matmul_dequant,
}
