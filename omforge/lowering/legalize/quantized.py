"""Products with quantised weights, as `NPUWeightQuantBatchMatmulV2`.

Before::

    y = MatMul(x, DequantizeLinear(q, scale, zero_point))        x [.., K], q [K, N]

After::

    y = Reshape(NPUWeightQuantBatchMatmulV2(Reshape(x), q, scale, -zero_point))    x [M, K]

A weight that is stored [N, K], behind a Transpose or in a Gemm with transB, stays so, and its
scales with it: GE absorbs a Transpose in front of the operator
(WeightQuantBatchMatmulV2TransposeFusionPass). The integers are those of the canonical graph, byte
for byte: eight int4 that ONNX packs are one little-endian int32. More outputs than a kernel takes
are cut into blocks of rows of [N, K], which share the stored bytes as well; stacked weights
[E, K, N] of experts are cut into E, each with a product of its own.

Sources: hicann/ops-nn:matmul/weight_quant_batch_matmul_v2, its docs/, op_graph/ and op_host/.
Letters: K inputs, N outputs, g the group size, G = ceil(K/g) groups.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from omforge import ir
from omforge.ir.streamed import ViewTensor
from omforge.ir.values import tensor_shape
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

QUANTIZED_MATMUL = "QuantizedMatMul"
"""What `choices` calls a MatMul or Gemm whose weight is a DequantizeLinear."""

OP = "NPUWeightQuantBatchMatmulV2"
INT4_FORM = f"{OP}-INT4"

LARGEST = 65535
"""Of K and of N (aclnnWeightQuantBatchMatmulV2.md)."""

PACKED = 8
"""int4 in an int32."""

_ROWS = 64
"""Blocks of rows begin at multiples of this: their bytes then begin at multiples of 64 as well."""

_CODES = (ir.DataType.INT8, ir.DataType.INT4)


@dataclass(frozen=True)
class _Weight:
    """A quantised weight.

    Attributes:
        codes: int8 or int4, [K, N], or [N, K] where it is turned.
        scale: [N], or [G, N], or [N, G] where it is turned.
        zero_point: As the scale; None for zeros.
        turned: Whether outputs are outermost.
        inputs: K.
        outputs: N.
        group: g, 0 for one scale a channel.
    """

    codes: ir.Value
    scale: ir.Value
    zero_point: ir.Value | None
    turned: bool
    inputs: int
    outputs: int
    group: int


def dequantizer(node: ir.Node) -> ir.Node | None:
    """Return the DequantizeLinear whose numbers a MatMul or Gemm multiplies by, if one does."""
    if node.op_type not in ("MatMul", "Gemm") or node.domain or len(node.inputs) < 2:
        return None
    value = node.inputs[1]
    producer = None if value is None else value.producer()
    if producer is not None and _swaps(producer) and producer.inputs[0] is not None:
        producer = producer.inputs[0].producer()
    if producer is None or producer.op_type != "DequantizeLinear" or producer.domain:
        return None
    return producer


def serves_products(node: ir.Node) -> bool:
    """Say whether a DequantizeLinear is read by such products alone."""
    readers = [
        reader
        for user in node.outputs[0].consumers()
        for reader in (user.outputs[0].consumers() if _swaps(user) else [user])
    ]
    return bool(readers) and all(dequantizer(reader) is node for reader in readers)


def weight_quant(op: Builder, node: ir.Node) -> Results:
    """int8 as it is, int4 as int32: every release of CANN reads these."""
    return _product(op, node, packed=True)


def weight_quant_int4(op: Builder, node: ir.Node) -> Results:
    """int4 under its own dtype."""
    dequantize = dequantizer(node)
    codes = None if dequantize is None else dequantize.inputs[0]
    if codes is not None and codes.dtype != ir.DataType.INT4:
        raise NotLegal("the weight is not int4")
    return _product(op, node, packed=False)


def _product(op: Builder, node: ir.Node, *, packed: bool) -> Results:
    x = required_input(node, 0)
    stacked = _stacked(op, node)
    if not stacked:
        y = _of_matrix(op, node, x, _weight(node), packed=packed)
        if node.op_type == "Gemm":
            y = op.mul(y, float_attribute(node, "alpha", 1.0))
            c = optional_input(node, 2)
            y = y if c is None else op.add(y, op.mul(c, float_attribute(node, "beta", 1.0)))
        return (y,)
    rows = [x] * len(stacked)
    shape = dims(x)
    if len(shape) == 3 and shape[0] == len(stacked):
        ones = op.constant([1] * len(stacked), ir.DataType.INT64)
        outputs = [(x.dtype, (1, *shape[1:]))] * len(stacked)
        rows = list(op.record("Split", [x, ones], outputs, {"axis": 0}))
    elif len(shape) == 3 and shape[0] != 1:
        raise NotLegal(f"x is {list(map(str, shape))}, the weights are of {len(stacked)} experts")
    made = dims(node.outputs[0])
    parts = [
        op.reshape(_of_matrix(op, node, own, weight, packed=packed), (1, *made[1:]))
        for own, weight in zip(rows, stacked, strict=True)
    ]
    return (op.concat(parts, -3),)


def _of_matrix(
    op: Builder, node: ir.Node, x: ir.Value, weight: _Weight, *, packed: bool
) -> ir.Value:
    """The product of x with one matrix."""
    shape = dims(x)
    if x.dtype not in (ir.DataType.FLOAT16, ir.DataType.BFLOAT16):
        raise NotLegal(f"x is {x.dtype}, the kernel takes float16 (bfloat16 on A2 and later)")
    if weight.scale.dtype != x.dtype:
        raise NotLegal(f"the scale is {weight.scale.dtype}, x is {x.dtype}: they must be the same")
    if len(shape) < 2 or shape[-1] != weight.inputs:
        raise NotLegal(f"x is {list(map(str, shape))}, the weight has {weight.inputs} inputs")
    _check(op.target.family.name, weight, packed=packed)
    rows = op.reshape(x, (product(shape[:-1]), weight.inputs))
    if int_attribute(node, "transA", 0):
        raise NotLegal("Gemm with transA")
    parts = [_block(op, rows, weight, *bounds, packed=packed) for bounds in blocks(weight.outputs)]
    y = parts[0] if len(parts) == 1 else op.concat(parts, -1)
    return op.reshape(y, (*shape[:-1], weight.outputs))


def _stack(node: ir.Node) -> _Weight | None:
    """The stacked weights of experts, all of them; None where it is one matrix.

    Raises:
        NotLegal: Their scales are of no kind that the kernel has.
    """
    dequantize = dequantizer(node)
    assert dequantize is not None
    codes, scale = required_input(dequantize, 0), required_input(dequantize, 1)
    zero = optional_input(dequantize, 2)
    of_scale = dims(scale)
    if len(dims(codes)) != 3:
        return None
    if any(value is not None and value.const_value is None for value in (codes, scale, zero)):
        raise NotLegal("the weights, their scales or zero points are no constants")
    if codes.dtype not in _CODES:
        raise NotLegal(f"the weights are {codes.dtype}, the kernel takes int8 and int4")
    turned = required_input(node, 1) is not dequantize.outputs[0]
    axis = int_attribute(dequantize, "axis", 1) % 3
    if len(of_scale) != 3 or axis != (2 if turned else 1):
        raise NotLegal("its scales are neither one for each output nor one for a group of inputs")
    group = 0 if of_scale[axis] == 1 else int_attribute(dequantize, "block_size", 0)
    _, *matrix = tensor_shape(codes.const_value)  # pyright: ignore[reportArgumentType]
    inputs, outputs = matrix[:: -1 if turned else 1]
    return _Weight(codes, scale, zero, turned, inputs, outputs, group)


def _stacked(op: Builder, node: ir.Node) -> list[_Weight]:
    """The weights of each expert, which share the stored bytes; none where it is one matrix."""
    stack = _stack(node)
    if stack is None:
        return []
    experts, *matrix = tensor_shape(stack.codes.const_value)  # pyright: ignore[reportArgumentType]
    zero = stack.zero_point
    of_scale = _scale_shape(stack)
    return [
        dataclasses.replace(
            stack,
            codes=_row(op, stack.codes, expert, matrix),
            scale=_row(op, stack.scale, expert, of_scale),
            zero_point=None if zero is None else _row(op, zero, expert, of_scale),
        )
        for expert in range(experts)
    ]


def _scale_shape(stack: _Weight) -> tuple[int, ...]:
    """Of one expert's scales, as the kernel takes them."""
    shape = tensor_shape(stack.scale.const_value)[1:]  # pyright: ignore[reportArgumentType]
    return shape if stack.group else (stack.outputs,)


def check_choosing(op: Builder, node: ir.Node) -> _Weight:
    """The stacked weights of a product whose kernel takes them as a step gathers them.

    Raises:
        NotLegal: The kernel does not take the weights, or takes constants alone.
    """
    stack = _stack(node)
    family = op.target.family.name
    if stack is None:
        raise NotLegal("the weight is one matrix")
    if family not in ("910b", "910_93", "950"):
        raise NotLegal(f"{family} has no kernel for integers that a step gathers")
    dtype = required_input(node, 0).dtype
    if dtype not in (ir.DataType.FLOAT16, ir.DataType.BFLOAT16) or stack.scale.dtype != dtype:
        raise NotLegal(f"x is {dtype}, its scales {stack.scale.dtype}")
    if stack.turned and stack.codes.dtype == ir.DataType.INT4:
        raise NotLegal("eight int4 in an int32 along K cannot be turned behind a Gather")
    _check(family, stack, packed=True)
    if max(stack.inputs, stack.outputs) > LARGEST:
        raise NotLegal(f"the kernel takes up to {LARGEST} inputs and outputs")
    return stack


def chosen_products(
    op: Builder, stack: _Weight, rows: Sequence[ir.Value], choices: Sequence[ir.Value]
) -> list[ir.Value]:
    """[1, N] for each row [1, K] with the matrix that its choice [1] names, read as integers."""
    experts, *matrix = tensor_shape(stack.codes.const_value)  # pyright: ignore[reportArgumentType]
    codes = stack.codes
    if codes.dtype == ir.DataType.INT4:
        matrix = [matrix[0], matrix[1] // PACKED]
        codes = _view(op, codes, ir.DataType.INT32, (experts, *matrix), 0)
    parameters = [stack.scale]
    if stack.zero_point is not None:
        parameters.append(_offset(op, stack.zero_point, stack.scale))
    settings = {"antiquant_group_size": stack.group} if stack.group else {}
    made: list[ir.Value] = []
    for row, choice in zip(rows, choices, strict=True):
        own = op.reshape(op.gather(codes, choice), tuple(matrix))
        scales = [op.reshape(op.gather(each, choice), _scale_shape(stack)) for each in parameters]
        if stack.turned:
            own = op.transpose(own, (1, 0))
            scales = [op.transpose(x, (1, 0)) if len(dims(x)) == 2 else x for x in scales]
        made.append(op.target_op(OP, row, own, *scales, **settings)[0])
    return made


def _row(op: Builder, value: ir.Value, expert: int, shape: Sequence[int]) -> ir.Value:
    """One expert's part [..] of a constant [E, ..]."""
    bits = int(np.prod(shape, dtype=np.int64)) * value.dtype.bitwidth  # pyright: ignore[reportOptionalMemberAccess]
    if bits % 8:
        raise NotLegal("an expert's weights do not end on a byte")
    return _view(op, value, value.dtype, tuple(shape), expert * bits // 8)


def _weight(node: ir.Node) -> _Weight:
    """What a product multiplies by.

    Raises:
        NotLegal: It is no int8 or int4 matrix, or its scales are of no kind that the kernel has.
    """
    dequantize = dequantizer(node)
    assert dequantize is not None
    turned = bool(int_attribute(node, "transB", 0))
    if required_input(node, 1) is not dequantize.outputs[0]:
        turned = not turned
    codes, scale = required_input(dequantize, 0), required_input(dequantize, 1)
    zero = optional_input(dequantize, 2)
    if any(value is not None and value.const_value is None for value in (codes, scale, zero)):
        raise NotLegal("the weight, its scale or its zero point is no constant")
    shape, of_scale = dims(codes), dims(scale)
    if codes.dtype not in _CODES:
        raise NotLegal(f"the weight is {codes.dtype}, the kernel takes int8 and int4")
    if len(shape) != 2:
        raise NotLegal(f"the weight has {len(shape)} dimensions, the kernel takes 2")
    inputs, outputs = tensor_shape(codes.const_value)[:: -1 if turned else 1]  # pyright: ignore[reportArgumentType]
    axis = int_attribute(dequantize, "axis", 1) % 2
    of_inputs = 1 if turned else 0
    group = int_attribute(dequantize, "block_size", 0)
    if axis != (of_inputs if group else 1 - of_inputs) or len(of_scale) != (2 if group else 1):
        raise NotLegal("its scales are neither one for each output nor one for a group of inputs")
    if group and of_scale[of_inputs] == 1:
        group = 0
    return _Weight(codes, scale, zero, turned, inputs, outputs, group)


def _check(family: str, weight: _Weight, *, packed: bool) -> None:
    """Raise NotLegal where the SoC's kernels do not take the weight."""
    four = weight.codes.dtype == ir.DataType.INT4
    if family == "310p":
        if four or weight.group:
            kind = f"{'int4' if four else 'int8'} weights{' in groups' * bool(weight.group)}"
            raise NotLegal(f"310P has no {kind}: it has int8 with one scale per channel")
        if not weight.turned:
            raise NotLegal("310P takes a weight stored [N, K], behind a Transpose: turn-weights")
    if weight.group % 32 or (weight.group and weight.group >= weight.inputs):
        raise NotLegal(f"groups of {weight.group}, must be a multiple of 32 and less than K")
    if weight.inputs > LARGEST:
        raise NotLegal(f"it has {weight.inputs} inputs, the kernel takes up to {LARGEST}")
    if weight.outputs > LARGEST and not weight.turned:
        raise NotLegal(
            f"it has {weight.outputs} outputs, the kernel takes up to {LARGEST}, and columns of "
            "[K, N] cannot be cut without a copy: turn-weights stores it [N, K]"
        )
    last, name = (weight.inputs, "K") if weight.turned else (weight.outputs, "N")
    step = PACKED if packed else 2
    if four and last % step:
        raise NotLegal(
            f"{name} is {last}: {'eight int4 make an int32' if packed else 'int4 come in pairs'}, "
            f"so the last axis of a stored weight must be a multiple of {step}; keep this layer as "
            "it is, or quantise it to int8"
        )


def blocks(outputs: int) -> Iterator[tuple[int, int]]:
    """The first and last+1 output of blocks that a kernel takes, as equal as their bounds allow."""
    count = -(-outputs // (LARGEST // _ROWS * _ROWS)) if outputs > LARGEST else 1
    step = outputs if count == 1 else -(-outputs // count // _ROWS) * _ROWS
    yield from ((start, min(start + step, outputs)) for start in range(0, outputs, step))


def _block(
    op: Builder, rows: ir.Value, weight: _Weight, first: int, last: int, *, packed: bool
) -> ir.Value:
    """The outputs first to last [M, last - first] of rows [M, K]."""
    whole = (first, last) == (0, weight.outputs)
    dtype = weight.codes.dtype
    size = (last - first, weight.inputs) if weight.turned else (weight.inputs, last - first)
    codes = weight.codes
    if dtype == ir.DataType.INT4 and packed:
        packed_size = (size[0], size[1] // PACKED)
        codes = _view(op, codes, ir.DataType.INT32, packed_size, first * weight.inputs // 2)
    elif not whole:
        start = first * weight.inputs * dtype.bitwidth // 8  # pyright: ignore[reportOptionalMemberAccess]
        codes = _view(op, codes, dtype, size, start)
    parameters = [_cut(op, weight, weight.scale, first, last)]
    if weight.zero_point is not None:
        offset = _offset(op, weight.zero_point, weight.scale)
        parameters.append(_cut(op, weight, offset, first, last))
    if weight.turned:
        codes = op.transpose(codes, (1, 0))
        parameters = [op.transpose(p, (1, 0)) if len(dims(p)) == 2 else p for p in parameters]
    settings = {"antiquant_group_size": weight.group} if weight.group else {}
    return op.target_op(OP, rows, codes, *parameters, **settings)[0]


def _view(
    op: Builder,
    value: ir.Value,
    dtype: ir.DataType | None,
    shape: tuple[int, ...],
    start: int,
) -> ir.Value:
    """Bytes of a constant from `start` on, as another initializer that is not stored again."""
    tensor = value.const_value
    assert tensor is not None
    assert dtype is not None
    name = f"{value.name}.{dtype.name.lower()}" + (f".{start}" if start else "")
    return op.stored(
        (value, dtype, start, shape), name, lambda: ViewTensor(tensor, dtype, shape, start=start)
    )


def _cut(op: Builder, weight: _Weight, value: ir.Value, first: int, last: int) -> ir.Value:
    """Scales of the outputs first to last; only a turned weight is cut, in its outermost axis."""
    if (first, last) == (0, weight.outputs):
        return value
    _, *rest = (int(dim) for dim in tensor_shape(value.const_value))  # pyright: ignore[reportArgumentType]
    width = int(np.prod(rest, dtype=np.int64)) * value.dtype.bitwidth // 8  # pyright: ignore[reportOptionalMemberAccess]
    return _view(op, value, value.dtype, (last - first, *rest), first * width)


def _offset(op: Builder, zero_point: ir.Value, scale: ir.Value) -> ir.Value:
    """The negative zero point in the scale's dtype: the operator adds it to the integers."""
    tensor, dtype = zero_point.const_value, scale.dtype
    assert tensor is not None
    assert dtype is not None

    def negative() -> ir.TensorProtocol:
        return ir.Tensor((0 - tensor.numpy().astype(np.float32)).astype(dtype.numpy()))

    def make() -> ir.TensorProtocol:
        return ir.LazyTensor(negative, dtype=dtype, shape=ir.Shape(tensor_shape(tensor)))

    return op.stored((zero_point, "offset", dtype), f"{zero_point.name}.offset", make)


def _swaps(node: ir.Node) -> bool:
    permutation = node.attributes.get("perm")
    return (
        node.op_type == "Transpose"
        and node.domain == ""
        and (permutation is None or tuple(permutation.as_ints()) in ((1, 0), (0, 2, 1)))
    )


FORMS: dict[str, Callable[[Builder, ir.Node], Results]] = {
    OP: weight_quant,
    INT4_FORM: weight_quant_int4,
}
