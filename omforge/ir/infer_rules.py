"""What each standard op returns: one rule an op, in ONNX's words, and the table of all rules.

The rules of ops that make shapes and move data are in `infer_shape_ops`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from omforge.ir import dims as d
from omforge.ir import infer_shape_ops as shapes
from omforge.ir.dims import Dim
from omforge.ir.infer_shape_ops import axis_of, broadcast, product, replaced
from omforge.ir.inference import Inference, Rule
from omforge.ir.values import MAX_TRACKED, Dims, Symbolic, as_symbolic, dims

_BOOL = ir.DataType.BOOL
_INT64 = ir.DataType.INT64


# --- element by element -----------------------------------------------------------------------


def _elementwise(
    function: Callable[..., object] | None = None, dtype: ir.DataType | None = None, source: int = 0
) -> Rule:
    """Broadcast the inputs; the dtype is that of input `source` unless given."""

    def rule(c: Inference) -> None:
        _broadcast(c, function, dtype or c.dtype(source))

    return rule


def _broadcast(
    c: Inference, function: Callable[..., object] | None, dtype: ir.DataType | None
) -> None:
    """Broadcast the inputs, and apply the function to their elements if all are known."""
    count = len(c.node.inputs)
    operands = [c.known(i) for i in range(count)] if function is not None else [None]
    value: Symbolic | None = None
    if function is not None and all(operand is not None for operand in operands):
        arrays = [operand for operand in operands if operand is not None]
        sizes = np.broadcast_shapes(*(array.shape for array in arrays))
        if math.prod(sizes) <= MAX_TRACKED:
            grids = [np.broadcast_to(array, sizes).ravel() for array in arrays]
            elements = [function(*args) for args in zip(*grids, strict=True)]
            if not any(element is None for element in elements):
                value = as_symbolic(elements, sizes)
    c.out(dtype, broadcast(*(c.dims(i) for i in range(count))), value=value)


def _add(left: Dim, right: Dim) -> Dim:
    return left + right


def _subtract(left: Dim, right: Dim) -> Dim:
    return left - right


def _multiply(left: Dim, right: Dim) -> Dim:
    return left * right


def _negate(x: Dim) -> Dim:
    return x * -1


def _divide(left: Dim, right: Dim) -> Dim | None:
    """ONNX divides integers as C does, towards zero; `Dim` rounds down."""
    if right == 0:
        return None
    if d.is_nonnegative(right * -1):
        left, right = left * -1, right * -1
    if d.modulo(left, right) == 0:
        return d.divide(left, right)
    if not d.is_nonnegative(right):
        return None
    if d.is_nonnegative(left):
        return d.divide(left, right)
    return d.divide(left * -1, right) * -1 if d.is_nonnegative(left * -1) else None


def _modulo(c: Inference) -> None:
    """Mod: the sign is the divisor's, or with `fmod` the dividend's."""
    _broadcast(c, _remainder if c.attr("fmod", 0) else _floor_remainder, c.dtype())


def _floor_remainder(left: Dim, right: Dim) -> Dim | None:
    return None if right == 0 else d.modulo(left, right)


def _remainder(left: Dim, right: Dim) -> Dim | None:
    quotient = _divide(left, right)
    if quotient is None:
        return None
    both_positive = d.is_nonnegative(left) and d.is_nonnegative(right)
    return d.modulo(left, right) if both_positive else left - quotient * right


def _equal(left: Dim, right: Dim) -> bool | None:
    order = d.compare(left, right)
    return None if order is None else order == 0


def _not_below(left: Dim, right: Dim) -> bool | None:
    """Whether left >= right: `seq >= 0` is known, though `seq == 0` is not."""
    if d.is_nonnegative(left - right):
        return True
    return False if d.is_nonnegative(right - left - 1) else None


def _not_above(left: Dim, right: Dim) -> bool | None:
    return _not_below(right, left)


def _below(left: Dim, right: Dim) -> bool | None:
    opposite = _not_below(left, right)
    return None if opposite is None else not opposite


def _above(left: Dim, right: Dim) -> bool | None:
    return _below(right, left)


def _where(condition: bool, left: object, right: object) -> object:
    return left if condition else right


def _not(x: bool) -> bool:
    return not x


def _and(x: bool, y: bool) -> bool:
    return x and y


def _or(x: bool, y: bool) -> bool:
    return x or y


def _xor(x: bool, y: bool) -> bool:
    return x != y


def _fold_left(function: Callable[[Dim, Dim], Dim]) -> Callable[..., Dim]:
    def folded(*args: Dim) -> Dim:
        total = args[0]
        for arg in args[1:]:
            total = function(total, arg)
        return total

    return folded


def _converted(value: Symbolic | None, dtype: ir.DataType | None) -> Symbolic | None:
    """The elements in another dtype: to bool, everything but 0 is true."""
    if value is None:
        return None
    if dtype == _BOOL:
        zero = [_equal(element, 0) for element in value.ravel()]
        return None if None in zero else as_symbolic([not z for z in zero], value.shape)
    elements = [int(e) if isinstance(e, bool) else e for e in value.ravel()]
    return as_symbolic(elements, value.shape)


def _cast(c: Inference) -> None:
    dtype = ir.DataType(c.attr("to"))
    c.out(dtype, c.dims(), value=_converted(c.known(), dtype))


def _cast_like(c: Inference) -> None:
    c.out(c.dtype(1), c.dims(), value=_converted(c.known(), c.dtype(1)))


def _same(c: Inference) -> None:
    c.out(c.dtype(), c.dims(), value=c.known())


def _unary(c: Inference) -> None:
    c.out(c.dtype(), c.dims())


def _predicate(c: Inference) -> None:
    c.out(_BOOL, c.dims())


def _dropout(c: Inference) -> None:
    c.out(c.dtype(), c.dims())
    c.out(_BOOL, c.dims(), 1)


def _random_like(c: Inference) -> None:
    dtype = c.attr("dtype")
    c.out(c.dtype() if dtype is None else ir.DataType(dtype), c.dims())


def _dequantize(c: Inference) -> None:
    """DequantizeLinear: `output_dtype` (opset 23 on), else the scale's dtype."""
    c.out(ir.DataType(c.attr("output_dtype", 0)) or c.dtype(1), c.dims())


def _quantize(c: Inference) -> None:
    """QuantizeLinear: the zero point's dtype, else `output_dtype` (opset 21 on), else uint8."""
    given = ir.DataType(c.attr("output_dtype", 0)) or ir.DataType.UINT8
    c.out(given if c.input(2) is None else c.dtype(2), c.dims())


# --- reductions -------------------------------------------------------------------------------


def _reduce(value_of: Callable[[Sequence[Any]], Dim] | None = None) -> Rule:
    """1 at each of the axes, or nothing without `keepdims`; no axes given means all of them."""

    def rule(c: Inference) -> None:
        shape, axes = c.dims(), c.axes()
        keep = bool(c.attr("keepdims", 1))
        if shape is None:
            c.out(c.dtype(), None)
            return
        if axes is None and c.input(1) is not None:
            c.out(c.dtype(), c.unknowns(len(shape)) if keep else None)
            return
        if not axes:
            axes = [] if c.attr("noop_with_empty_axes", 0) else list(range(len(shape)))
        places = {axis_of(a, len(shape)) for a in axes}
        result = tuple(
            1 if i in places else dim for i, dim in enumerate(shape) if keep or i not in places
        )
        value = None
        operand = c.known()
        if value_of is not None and operand is not None and len(places) == len(shape):
            value = as_symbolic([value_of(list(operand.ravel()))], tuple(1 for _ in result))
        c.out(c.dtype(), result, value=value)

    return rule


def _sum_of(elements: Sequence[Any]) -> Dim:
    total: Dim = 0
    for element in elements:
        total = total + element
    return total


def _arg(c: Inference) -> None:
    """ArgMax, ArgMin: 1 at `axis`, or nothing without `keepdims`."""
    shape = c.dims()
    if shape is None:
        c.out(_INT64, None)
        return
    axis = axis_of(c.attr("axis", 0), len(shape))
    c.out(_INT64, replaced(shape, axis, *((1,) if c.attr("keepdims", 1) else ())))


# --- layers -----------------------------------------------------------------------------------


def _matmul(c: Inference) -> None:
    """MatMul: as numpy's, where a 1-D operand loses its dimension; ATC's sums int8 in int32."""
    a, b = c.dims(0), c.dims(1)
    dtype = ir.DataType.INT32 if c.dtype() == ir.DataType.INT8 else c.dtype()
    if not a or not b:
        c.out(dtype, None)
        return
    left = (1, *a) if len(a) == 1 else a
    right = (*b, 1) if len(b) == 1 else b
    batch = broadcast(left[:-2], right[:-2])
    assert batch is not None
    rows = () if len(a) == 1 else (left[-2],)
    columns = () if len(b) == 1 else (right[-1],)
    c.out(dtype, (*batch, *rows, *columns))


def _gemm(c: Inference) -> None:
    a, b = c.dims(0), c.dims(1)
    rows = c.unknown(0) if a is None else a[1 if c.attr("transA", 0) else 0]
    columns = c.unknown(1) if b is None else b[0 if c.attr("transB", 0) else 1]
    c.out(c.dtype(), (rows, columns))


def _layer_norm(c: Inference) -> None:
    """LayerNormalization: the input's shape; mean and deviation have 1 from `axis` on."""
    shape = c.dims()
    c.out(c.dtype(), shape)
    rest: Dims | None = None
    if shape is not None:
        axis = axis_of(c.attr("axis", -1), len(shape))
        rest = shape[:axis] + (1,) * (len(shape) - axis)
    for i in (1, 2):
        c.out(ir.DataType(c.attr("stash_type", 1)), rest, i)


def _rms_norm(c: Inference) -> None:
    """RMSNormalization: the input's shape, the scale's dtype."""
    c.out(c.dtype(1), c.dims())


def _attention(c: Inference) -> None:
    """Attention: 3-D [B, S, N * D] or 4-D [B, N, S, D]; the present outputs are always 4-D."""
    q, k, v = c.dims(0), c.dims(1), c.dims(2)
    if q is None or k is None or v is None:
        c.out(c.dtype(), None if q is None else c.unknowns(len(q)))
        for i, source in ((1, 1), (2, 2), (3, 0)):
            c.out(c.dtype(source), None, i)
        return
    heads: Dim
    groups: Dim
    if len(q) == 3:
        heads, groups, new = c.attr("q_num_heads"), c.attr("kv_num_heads"), q[1]
        key_size, value_size = d.divide(k[2], groups), d.divide(v[2], groups)
        seq = k[1]
        c.out(c.dtype(), (q[0], new, value_size * heads))
    else:
        heads, new = q[1], q[2]
        key_size, value_size, seq, groups = k[3], v[3], k[2], k[1]
        c.out(c.dtype(), (q[0], heads, new, value_size))
    total = seq
    if c.input(4) is not None:
        past = c.dims(4)
        total = c.unknown(2, 1) if past is None else seq + past[2]
    c.out(c.dtype(1), (q[0], groups, total, key_size), 1)
    c.out(c.dtype(2), (q[0], groups, total, value_size), 2)
    c.out(c.dtype(), (q[0], heads, new, total), 3)


# --- control flow -----------------------------------------------------------------------------


def _if(c: Inference) -> None:
    """If: what the branches agree on; of the one that is taken, if the condition is known."""
    branches = [c.node.attributes[name].as_graph() for name in ("then_branch", "else_branch")]
    for branch in branches:
        c.infer_graph(branch)
    condition = c.known()
    if condition is not None:
        branches = branches[:1] if condition.ravel()[0] else branches[1:]
    for i, output in enumerate(c.node.outputs):
        results = [branch.outputs[i] for branch in branches]
        output.type = results[0].type
        found = [dims(result) for result in results]
        first, last = found[0], found[-1]
        shape: list[Dim] | None = None
        if first is not None and last is not None and len(first) == len(last):
            pairs = enumerate(zip(first, last, strict=True))
            shape = [a if a == b else c.unknown(axis, i) for axis, (a, b) in pairs]
        c.out(None, shape, i)


def _loop(c: Inference) -> None:
    """Loop, Scan: the dtypes that the body returns; shapes may change from round to round."""
    body = c.node.attributes["body"].as_graph()
    c.infer_graph(body)
    results = body.outputs[len(body.outputs) - len(c.node.outputs) :]  # a Loop's first is no output
    for i, (output, result) in enumerate(zip(c.node.outputs, results, strict=True)):
        output.type = result.type
        c.out(None, None, i)


_LIKE_THE_INPUT = """
    Abs Acos Acosh Asin Asinh Atan Atanh BitwiseNot Ceil Celu Clip Cos Cosh CumSum Elu Erf Exp Floor
    Gelu HardSigmoid HardSwish Hardmax LeakyRelu Log LogSoftmax Mish Reciprocal Relu RotaryEmbedding
    Round Scatter ScatterElements ScatterND Selu Sigmoid Sign Sin Sinh Softmax Softplus Softsign
    Sqrt Swish Tan Tanh TensorScatter ThresholdedRelu Trilu
"""
_REDUCTIONS = """
    ReduceL1 ReduceL2 ReduceLogSum ReduceLogSumExp ReduceMax ReduceMean ReduceMin ReduceSumSquare
"""
_BROADCAST = "BitShift BitwiseAnd BitwiseOr BitwiseXor Mean PRelu Pow"

RULES: dict[str, Rule] = {
    **dict.fromkeys(_LIKE_THE_INPUT.split(), _unary),
    **dict.fromkeys(_REDUCTIONS.split(), _reduce()),
    **dict.fromkeys(_BROADCAST.split(), _elementwise()),
    "Add": _elementwise(_add),
    "And": _elementwise(_and, _BOOL),
    "ArgMax": _arg,
    "ArgMin": _arg,
    "Attention": _attention,
    "Cast": _cast,
    "CastLike": _cast_like,
    "Concat": shapes.concat,
    "Constant": shapes.constant_node,
    "ConstantOfShape": shapes.constant_of_shape,
    "DequantizeLinear": _dequantize,
    "Div": _elementwise(_divide),
    "Dropout": _dropout,
    "Equal": _elementwise(_equal, _BOOL),
    "Expand": shapes.expand,
    "Flatten": shapes.flatten,
    "Gather": shapes.gather,
    "GatherElements": shapes.gather_elements,
    "GatherND": shapes.gather_nd,
    "Gemm": _gemm,
    "Greater": _elementwise(_above, _BOOL),
    "GreaterOrEqual": _elementwise(_not_below, _BOOL),
    "Identity": _same,
    "If": _if,
    "IsInf": _predicate,
    "IsNaN": _predicate,
    "LayerNormalization": _layer_norm,
    "Less": _elementwise(_below, _BOOL),
    "LessOrEqual": _elementwise(_not_above, _BOOL),
    "Loop": _loop,
    "MatMul": _matmul,
    "Max": _elementwise(_fold_left(d.maximum)),
    "Min": _elementwise(_fold_left(d.minimum)),
    "Mod": _modulo,
    "Mul": _elementwise(_multiply),
    "Neg": _elementwise(_negate),
    "NonZero": shapes.non_zero,
    "Not": _elementwise(_not, _BOOL),
    "Or": _elementwise(_or, _BOOL),
    "Pad": shapes.pad,
    "QuantizeLinear": _quantize,
    "RMSNormalization": _rms_norm,
    "RandomNormalLike": _random_like,
    "RandomUniformLike": _random_like,
    "Range": shapes.range_of,
    "ReduceProd": _reduce(product),
    "ReduceSum": _reduce(_sum_of),
    "Reshape": shapes.reshape,
    "Scan": _loop,
    "Shape": shapes.shape_of,
    # ONNX Runtime's own, written in the default domain by its optimizer.
    "SimplifiedLayerNormalization": _rms_norm,
    "Size": shapes.size_of,
    "Slice": shapes.slice_of,
    "Split": shapes.split,
    "Squeeze": shapes.squeeze,
    "Sub": _elementwise(_subtract),
    "Sum": _elementwise(_fold_left(_add)),
    "Tile": shapes.tile,
    "TopK": shapes.top_k,
    "Transpose": shapes.transpose,
    "Unsqueeze": shapes.unsqueeze,
    "Where": _elementwise(_where, source=1),
    "Xor": _elementwise(_xor, _BOOL),
}
