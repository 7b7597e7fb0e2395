"""What each standard op's outputs are: one rule an op, in ONNX's words."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from omforge.ir import dims as d
from omforge.ir.dims import Dim, Expr, symbol
from omforge.ir.infer import MAX_TRACKED, Dims, Inference, Rule, Symbolic, as_symbolic, constant

_BOOL = ir.DataType.BOOL
_INT64 = ir.DataType.INT64


def broadcast(*shapes: Dims | None) -> Dims | None:
    """Numpy broadcasting; of two different symbols the first one stays (ONNX promises that they agree)."""
    if any(shape is None for shape in shapes):
        return None
    result: list[Dim] = []
    for column in itertools.zip_longest(
        *(reversed(s) for s in shapes if s is not None), fillvalue=1
    ):
        kept: Dim = 1
        for dim in column:
            if kept == 1 or (isinstance(dim, int) and dim != 1):
                kept = dim
        result.append(kept)
    return tuple(reversed(result))


def _axis(axis: int, rank: int) -> int:
    return axis + rank if axis < 0 else axis


def _product(of: Sequence[Dim]) -> Dim:
    total: Dim = 1
    for dim in of:
        total = total * dim
    return total


def _sizes(shape: Dims | None) -> tuple[int, ...] | None:
    """The shape if it is all numbers and small enough to track."""
    if shape is None or any(isinstance(dim, Expr) for dim in shape):
        return None
    sizes = tuple(int(dim) for dim in shape if isinstance(dim, int))
    return sizes if int(np.prod(sizes, dtype=np.int64)) <= MAX_TRACKED else None


def _elementwise(
    function: Callable[..., object] | None = None, dtype: ir.DataType | None = None, source: int = 0
) -> Rule:
    """Broadcast the inputs; the dtype is that of input `source` unless given."""

    def rule(c: Inference) -> None:
        count = len(c.node.inputs)
        shape = broadcast(*(c.dims(i) for i in range(count)))
        value: Symbolic | None = None
        operands = [c.known(i) for i in range(count)]
        if function is not None and all(operand is not None for operand in operands):
            grids = np.broadcast_arrays(*[o for o in operands if o is not None])
            elements = [function(*args) for args in zip(*(g.ravel() for g in grids), strict=True)]
            if not any(element is None for element in elements):
                value = as_symbolic(elements, grids[0].shape)
        c.out(dtype or c.dtype(source), shape, value=value)

    return rule


def _divide(left: Dim, right: Dim) -> Dim | None:
    if right == 0:
        return None
    if isinstance(left, int) and isinstance(right, int):
        return int(left / right)  # ONNX truncates towards zero
    return d.divide(left, right)


def _ordered(test: Callable[[int], bool]) -> Callable[[Dim, Dim], bool | None]:
    def function(left: Dim, right: Dim) -> bool | None:
        order = d.compare(left, right)
        return None if order is None else test(order)

    return function


def _equal(left: Dim, right: Dim) -> bool | None:
    order = d.compare(left, right)
    if order is not None:
        return order == 0
    return None


def _where(condition: object, left: object, right: object) -> object:
    return left if condition else right


def _cast(c: Inference) -> None:
    dtype = ir.DataType(c.attr("to"))
    value = c.known()
    if value is not None and dtype == _BOOL:
        truths = [_equal(e, 0) for e in value.ravel()]
        value = None if None in truths else as_symbolic([not t for t in truths], value.shape)
    elif value is not None:
        value = as_symbolic(
            [int(e) if isinstance(e, bool) else e for e in value.ravel()], value.shape
        )
    c.out(dtype, c.dims(), value=value)


def _cast_like(c: Inference) -> None:
    c.out(c.dtype(1), c.dims(), value=c.known())


def _same(c: Inference) -> None:
    c.out(c.dtype(), c.dims(), value=c.known())


def _unary(c: Inference) -> None:
    c.out(c.dtype(), c.dims())


def _predicate(c: Inference) -> None:
    c.out(_BOOL, c.dims())


def _constant(c: Inference) -> None:
    array = constant(c.node.outputs[0], limit=1 << 62)
    if array is None:
        return
    tensor = ir.tensor(array)
    value = None
    if array.size <= MAX_TRACKED and array.dtype.kind in "iub":
        value = as_symbolic(array.ravel().tolist(), array.shape)
    c.out(tensor.dtype, array.shape, value=value)


def _shape(c: Inference) -> None:
    shape = c.dims()
    if shape is None:
        c.out(_INT64, (symbol(f"unknown_{c.node.outputs[0].name}"),))
        return
    part = shape[slice(c.attr("start", 0), c.attr("end", None))]
    c.out(_INT64, (len(part),), value=as_symbolic(part, (len(part),)))


def _size(c: Inference) -> None:
    shape = c.dims()
    c.out(_INT64, (), value=None if shape is None else as_symbolic([_product(shape)], ()))


def _gather(c: Inference) -> None:
    data, indices = c.dims(0), c.dims(1)
    if data is None or indices is None:
        c.out(c.dtype(), None)
        return
    axis = _axis(c.attr("axis", 0), len(data))
    value, picks = c.known(0), c.known(1)
    found: Symbolic | None = None
    if (
        value is not None
        and picks is not None
        and not any(isinstance(p, Expr) for p in picks.ravel())
    ):
        found = np.take(value, picks.astype(np.int64), axis=axis)
        found = as_symbolic(np.ravel(found).tolist(), np.shape(found))
    c.out(c.dtype(), data[:axis] + indices + data[axis + 1 :], value=found)


def _concat(c: Inference) -> None:
    shapes = [c.dims(i) for i in range(len(c.node.inputs))]
    values = [c.known(i) for i in range(len(c.node.inputs))]
    found = [shape for shape in shapes if shape is not None]
    if len(found) != len(shapes):
        c.out(c.dtype(), None)
        return
    axis = _axis(c.attr("axis"), len(found[0]))
    total: Dim = 0
    for shape in found:
        total = total + shape[axis]
    rest = broadcast(*([shape[:axis] + (1,) + shape[axis + 1 :] for shape in found]))
    value = None
    if all(v is not None for v in values):
        value = np.concatenate([v for v in values if v is not None], axis=axis)
    assert rest is not None
    c.out(c.dtype(), rest[:axis] + (total,) + rest[axis + 1 :], value=value)


def _unsqueeze(c: Inference) -> None:
    shape, axes = c.dims(), c.axes()
    if shape is None or axes is None:
        c.out(c.dtype(), None)
        return
    rank = len(shape) + len(axes)
    places = {_axis(a, rank) for a in axes}
    rest = iter(shape)
    result = tuple(1 if i in places else next(rest) for i in range(rank))
    value = c.known()
    if value is not None:
        value = value.reshape([int(x) for x in result if isinstance(x, int)])
    c.out(c.dtype(), result, value=value)


def _squeeze(c: Inference) -> None:
    shape = c.dims()
    if shape is None:
        c.out(c.dtype(), None)
        return
    axes = c.axes()
    if axes is None and c.input(1) is None:
        axes = [i for i, dim in enumerate(shape) if dim == 1]
    if axes is None:
        c.out(c.dtype(), None)
        return
    places = {_axis(a, len(shape)) for a in axes}
    result = tuple(dim for i, dim in enumerate(shape) if i not in places)
    value = c.known()
    if value is not None:
        value = value.reshape([int(x) for x in result if isinstance(x, int)])
    c.out(c.dtype(), result, value=value)


def reshaped(shape: Dims, target: Sequence[Dim], allow_zero: bool) -> Dims:
    """The result of Reshape for a symbolic target with 0 (copy) and -1 (the rest)."""
    result: list[Dim] = []
    for i, dim in enumerate(target):
        result.append(shape[i] if dim == 0 and not allow_zero and i < len(shape) else dim)
    if -1 in result:
        place = result.index(-1)
        others = result[:place] + result[place + 1 :]
        left = list(shape)
        for dim in list(others):  # cancel equal dims first, so that B*S*H / (B*S) is exact
            if dim in left:
                left.remove(dim)
                others.remove(dim)
        rest = _product(others)
        result[place] = d.divide(_product(left), rest) if rest != 0 else 0
    return tuple(result)


def _reshape(c: Inference) -> None:
    shape, target = c.dims(), c.known(1)
    if target is None:
        count = c.dims(1)
        rank = count[0] if count else None
        names = (
            [symbol(f"unknown_{c.node.outputs[0].name}_{i}") for i in range(rank)]
            if isinstance(rank, int)
            else None
        )
        c.out(c.dtype(), names)
        return
    elements = list(target.ravel())
    if shape is None:
        c.out(c.dtype(), None if -1 in elements or 0 in elements else tuple(elements))
        return
    result = reshaped(shape, elements, bool(c.attr("allowzero", 0)))
    value, sizes = c.known(), _sizes(result)
    c.out(
        c.dtype(),
        result,
        value=value.reshape(sizes) if value is not None and sizes is not None else None,
    )


def _flatten(c: Inference) -> None:
    shape = c.dims()
    if shape is None:
        c.out(c.dtype(), None)
        return
    axis = _axis(c.attr("axis", 1), len(shape))
    c.out(c.dtype(), (_product(shape[:axis]), _product(shape[axis:])))


def _transpose(c: Inference) -> None:
    shape = c.dims()
    if shape is None:
        c.out(c.dtype(), None)
        return
    perm = c.attr("perm", None) or tuple(reversed(range(len(shape))))
    value = c.known()
    c.out(
        c.dtype(),
        tuple(shape[p] for p in perm),
        value=None if value is None else value.transpose(perm),
    )


def _slice(c: Inference) -> None:
    shape = c.dims()
    starts, ends, steps = c.known(1), c.known(2), c.known(4)
    if c.opset < 10:
        starts = as_symbolic(c.attr("starts"), (len(c.attr("starts")),))
        ends = as_symbolic(c.attr("ends"), (len(c.attr("ends")),))
    if shape is None:
        c.out(c.dtype(), None)
        return
    if starts is None or ends is None or (steps is None and c.input(4) is not None):
        c.out(
            c.dtype(), [symbol(f"unknown_{c.node.outputs[0].name}_{i}") for i in range(len(shape))]
        )
        return
    axes = c.axes(index=3) or list(range(starts.size))
    result = list(shape)
    value = c.known()
    for position, axis in enumerate(axes):
        axis = _axis(axis, len(shape))
        start, end = starts.ravel()[position], ends.ravel()[position]
        step = 1 if steps is None else steps.ravel()[position]
        result[axis] = _slice_length(shape[axis], start, end, step)
        whole = (
            isinstance(shape[axis], int)
            and not isinstance(start, Expr)
            and not isinstance(end, Expr)
        )
        if value is not None and whole and not isinstance(step, Expr):
            index = [slice(None)] * len(shape)
            stop = None if step < 0 and end < -int(1e9) else end
            index[axis] = slice(start, stop, step)
            value = value[tuple(index)]
        else:
            value = None
    c.out(c.dtype(), tuple(result), value=value)


def _slice_length(size: Dim, start: Dim, end: Dim, step: Dim) -> Dim:
    if all(isinstance(x, int) for x in (size, start, end, step)):
        return len(range(*slice(start, _stop(end, step), step).indices(size)))  # type: ignore[arg-type]
    if step != 1:
        return symbol(f"slice({size},{start},{end},{step})")
    low = _clamp(start, size)
    high = _clamp(end, size)
    length = high - low
    return length if d.is_nonnegative(length) else d.maximum(length, 0)


def _stop(end: Any, step: Any) -> Any:
    return None if step < 0 and end < -int(1e9) else end


def _clamp(bound: Dim, size: Dim) -> Dim:
    """A slice bound as an offset from 0 within the axis."""
    if isinstance(bound, int):
        if bound >= 2**31 - 1:
            return size
        if bound <= -(2**31) + 1:
            return 0
        if bound < 0:
            return size + bound
        return bound if isinstance(size, Expr) else min(bound, size)
    if d.is_nonnegative(bound * -1):  # an expression such as -seq counts from the end
        return size + bound
    return d.minimum(bound, size)


def _expand(c: Inference) -> None:
    target = c.known(1)
    shape = c.dims()
    if target is None or shape is None:
        count = c.dims(1)
        rank = count[0] if count else None
        if isinstance(rank, int) and shape is not None:
            rank = max(rank, len(shape))
            c.out(c.dtype(), [symbol(f"unknown_{c.node.outputs[0].name}_{i}") for i in range(rank)])
        else:
            c.out(c.dtype(), None)
        return
    result = broadcast(shape, tuple(target.ravel()))
    value, sizes = c.known(), _sizes(result)
    c.out(
        c.dtype(),
        result,
        value=np.broadcast_to(value, sizes) if value is not None and sizes is not None else None,
    )


def _range(c: Inference) -> None:
    bounds = [c.known(i) for i in range(3)]
    if any(b is None for b in bounds):
        c.out(c.dtype(), (symbol(f"unknown_{c.node.outputs[0].name}"),))
        return
    start, limit, delta = (b.ravel()[0] for b in bounds if b is not None)
    if all(isinstance(x, int) for x in (start, limit, delta)):
        steps = range(start, limit, delta)
        value = as_symbolic(list(steps), (len(steps),)) if len(steps) <= MAX_TRACKED else None
        c.out(c.dtype(), (len(steps),), value=value)
        return
    length = limit - start
    c.out(c.dtype(), (length if delta == 1 else d.divide(length + (delta - 1), delta),))


def _constant_of_shape(c: Inference) -> None:
    target = c.known()
    fill = c.attr("value")
    array = np.zeros(1, np.float32) if fill is None else fill.numpy()
    dtype = ir.DataType.FLOAT if fill is None else fill.dtype
    if target is None:
        rank = (c.dims() or (None,))[0]
        names = (
            [symbol(f"unknown_{c.node.outputs[0].name}_{i}") for i in range(rank)]
            if isinstance(rank, int)
            else None
        )
        c.out(dtype, names)
        return
    shape = tuple(target.ravel())
    sizes = _sizes(shape)
    value = None
    if sizes is not None and array.dtype.kind in "iub":
        value = as_symbolic([array.ravel()[0].item()] * int(np.prod(sizes, dtype=np.int64)), sizes)
    c.out(dtype, shape, value=value)


def _where_rule(c: Inference) -> None:
    _elementwise(_where, source=1)(c)


def _matmul(c: Inference) -> None:
    a, b = c.dims(0), c.dims(1)
    if a is None or b is None or not a or not b:
        c.out(c.dtype(), None)
        return
    left = (1, *a) if len(a) == 1 else a
    right = (*b, 1) if len(b) == 1 else b
    batch = broadcast(left[:-2], right[:-2])
    assert batch is not None
    result = (*batch, left[-2], right[-1])
    if len(a) == 1:
        result = (*result[:-2], result[-1])
    if len(b) == 1:
        result = result[:-1]
    c.out(c.dtype(), result)


def _gemm(c: Inference) -> None:
    a, b = c.dims(0), c.dims(1)
    if a is None or b is None:
        c.out(c.dtype(), None)
        return
    rows = a[1] if c.attr("transA", 0) else a[0]
    columns = b[0] if c.attr("transB", 0) else b[1]
    c.out(c.dtype(), (rows, columns))


def _reduce(
    dtype: ir.DataType | None = None, value_of: Callable[[Sequence[Any]], Dim] | None = None
) -> Rule:
    def rule(c: Inference) -> None:
        shape = c.dims()
        if shape is None:
            c.out(dtype or c.dtype(), None)
            return
        axes = c.axes()
        if axes is None and c.input(1) is not None:
            c.out(dtype or c.dtype(), None)
            return
        if not axes:
            axes = [] if c.attr("noop_with_empty_axes", 0) else list(range(len(shape)))
        places = {_axis(a, len(shape)) for a in axes}
        keep = bool(c.attr("keepdims", 1))
        result = tuple(
            1 if i in places else dim for i, dim in enumerate(shape) if keep or i not in places
        )
        value = None
        operand = c.known()
        if value_of is not None and operand is not None and len(places) == len(shape):
            value = as_symbolic([value_of(list(operand.ravel()))], tuple(1 for _ in result))
        c.out(dtype or c.dtype(), result, value=value)

    return rule


def _sum_of(elements: Sequence[Any]) -> Dim:
    total: Dim = 0
    for element in elements:
        total = total + element
    return total


def _arg(c: Inference) -> None:
    shape = c.dims()
    if shape is None:
        c.out(_INT64, None)
        return
    axis = _axis(c.attr("axis", 0), len(shape))
    middle = (1,) if c.attr("keepdims", 1) else ()
    c.out(_INT64, shape[:axis] + middle + shape[axis + 1 :])


def _split(c: Inference) -> None:
    shape = c.dims()
    count = len(c.node.outputs)
    if shape is None:
        for i in range(count):
            c.out(c.dtype(), None, i)
        return
    axis = _axis(c.attr("axis", 0), len(shape))
    sizes: Sequence[Dim] | None = c.attr("split", None)
    given = c.known(1)
    if sizes is None and given is not None:
        sizes = list(given.ravel())
    if sizes is None and c.input(1) is None:
        whole = shape[axis]
        if isinstance(whole, int):
            chunk = -(-whole // count)
            sizes = [chunk] * (count - 1) + [whole - chunk * (count - 1)]
        else:
            sizes = [d.divide(whole, count)] * count
    value = c.known()
    start = 0
    for i in range(count):
        size = sizes[i] if sizes is not None else symbol(f"unknown_{c.node.outputs[i].name}_{axis}")
        part = None
        if value is not None and isinstance(size, int):
            part = np.take(value, range(start, start + size), axis=axis)
            start += size
        c.out(c.dtype(), shape[:axis] + (size,) + shape[axis + 1 :], i, value=part)


def _tile(c: Inference) -> None:
    shape, repeats = c.dims(), c.known(1)
    if shape is None or repeats is None:
        c.out(c.dtype(), None)
        return
    c.out(c.dtype(), tuple(dim * r for dim, r in zip(shape, repeats.ravel(), strict=True)))


def _pad(c: Inference) -> None:
    shape, pads = c.dims(), c.known(1)
    axes = c.axes(index=3)
    if shape is None or pads is None:
        c.out(c.dtype(), None)
        return
    places = list(range(len(shape))) if axes is None else [_axis(a, len(shape)) for a in axes]
    result = list(shape)
    flat = pads.ravel()
    for i, place in enumerate(places):
        result[place] = result[place] + flat[i] + flat[i + len(places)]
    c.out(c.dtype(), tuple(result))


def _gather_nd(c: Inference) -> None:
    data, indices = c.dims(0), c.dims(1)
    if data is None or indices is None or not isinstance(indices[-1], int):
        c.out(c.dtype(), None)
        return
    c.out(c.dtype(), indices[:-1] + data[c.attr("batch_dims", 0) + indices[-1] :])


def _gather_elements(c: Inference) -> None:
    c.out(c.dtype(), c.dims(1))


def _top_k(c: Inference) -> None:
    shape, k = c.dims(), c.known(1)
    result = None
    if shape is not None and k is not None:
        axis = _axis(c.attr("axis", -1), len(shape))
        result = shape[:axis] + (k.ravel()[0],) + shape[axis + 1 :]
    c.out(c.dtype(), result)
    c.out(_INT64, result, 1)


def _layer_norm(c: Inference) -> None:
    shape = c.dims()
    dtype = (
        c.dtype(1)
        if c.node.op_type in ("RMSNormalization", "SimplifiedLayerNormalization")
        else c.dtype()
    )
    c.out(dtype, shape)
    if shape is not None:
        axis = _axis(c.attr("axis", -1), len(shape))
        rest = shape[:axis] + (1,) * (len(shape) - axis)
        for i in (1, 2):
            c.out(ir.DataType.FLOAT, rest, i)


def _attention(c: Inference) -> None:
    q, k, v = c.dims(0), c.dims(1), c.dims(2)
    if q is None or k is None or v is None:
        c.out(c.dtype(), None)
        return
    if len(q) == 3:
        heads, kv_heads = c.attr("q_num_heads"), c.attr("kv_num_heads")
        key_size, value_size = d.divide(k[2], kv_heads), d.divide(v[2], kv_heads)
        seq = k[1]
        c.out(c.dtype(), (q[0], q[1], value_size * heads))
        groups: Dim = kv_heads
    else:
        key_size, value_size, seq, groups = k[3], v[3], k[2], k[1]
        c.out(c.dtype(), (*q[:3], value_size))
    past = c.dims(4)
    total = seq + past[2] if past is not None else seq
    c.out(c.dtype(1), (q[0], groups, total, key_size), 1)
    c.out(c.dtype(2), (q[0], groups, total, value_size), 2)


def _dequantize(c: Inference) -> None:
    c.out(c.dtype(1), c.dims())


def _quantize(c: Inference) -> None:
    c.out(c.dtype(2) if c.input(2) is not None else ir.DataType.UINT8, c.dims())


def _random(c: Inference) -> None:
    c.out(c.dtype(), c.dims())


def _non_zero(c: Inference) -> None:
    shape = c.dims()
    rank: Dim = len(shape) if shape is not None else symbol(f"unknown_{c.node.outputs[0].name}_0")
    c.out(_INT64, (rank, symbol(f"unknown_{c.node.outputs[0].name}_1")))


def _negate(x: Any) -> Any:
    return x * -1


def _not(x: Any) -> Any:
    return not x


def _and(x: Any, y: Any) -> Any:
    return bool(x) and bool(y)


def _or(x: Any, y: Any) -> Any:
    return bool(x) or bool(y)


def _fold_left(function: Callable[[Any, Any], Any]) -> Callable[..., Any]:
    def folded(*args: Any) -> Any:
        total = args[0]
        for arg in args[1:]:
            total = function(total, arg)
        return total

    return folded


def _modulo(x: Any, y: Any) -> Any:
    return None if y == 0 else d.modulo(x, y)


RULES: dict[str, Rule] = {
    **dict.fromkeys(
        (
            "Abs Acos Acosh Asin Asinh Atan Atanh Ceil Celu Clip Cos Cosh CumSum Elu Erf Exp Floor Gelu HardSigmoid "
            "HardSwish LeakyRelu Log LogSoftmax Hardmax Mish Reciprocal Relu RotaryEmbedding Round ScatterElements "
            "ScatterND Selu Sigmoid Sign Sin Sinh Softmax Softplus Softsign Sqrt Swish Tan Tanh ThresholdedRelu "
            "Trilu TensorScatter BitwiseNot Scatter Dropout"
        ).split(),
        _unary,
    ),
    "Identity": _same,
    "Neg": _elementwise(_negate),
    "Add": _elementwise(lambda x, y: x + y),
    "Sub": _elementwise(lambda x, y: x - y),
    "Mul": _elementwise(lambda x, y: x * y),
    "Div": _elementwise(_divide),
    "Mod": _elementwise(_modulo),
    "Pow": _elementwise(),
    "PRelu": _elementwise(),
    "BitShift": _elementwise(),
    "BitwiseAnd": _elementwise(),
    "BitwiseOr": _elementwise(),
    "BitwiseXor": _elementwise(),
    "Min": _elementwise(_fold_left(d.minimum)),
    "Max": _elementwise(_fold_left(d.maximum)),
    "Sum": _elementwise(_fold_left(lambda x, y: x + y)),
    "Mean": _elementwise(),
    "Equal": _elementwise(_equal, _BOOL),
    "Less": _elementwise(_ordered(lambda o: o < 0), _BOOL),
    "LessOrEqual": _elementwise(_ordered(lambda o: o <= 0), _BOOL),
    "Greater": _elementwise(_ordered(lambda o: o > 0), _BOOL),
    "GreaterOrEqual": _elementwise(_ordered(lambda o: o >= 0), _BOOL),
    "And": _elementwise(_and, _BOOL),
    "Or": _elementwise(_or, _BOOL),
    "Xor": _elementwise(None, _BOOL),
    "Not": _elementwise(_not, _BOOL),
    "IsNaN": _predicate,
    "IsInf": _predicate,
    "Where": _where_rule,
    "Cast": _cast,
    "CastLike": _cast_like,
    "Constant": _constant,
    "Shape": _shape,
    "Size": _size,
    "Gather": _gather,
    "GatherND": _gather_nd,
    "GatherElements": _gather_elements,
    "Concat": _concat,
    "Unsqueeze": _unsqueeze,
    "Squeeze": _squeeze,
    "Reshape": _reshape,
    "Flatten": _flatten,
    "Transpose": _transpose,
    "Slice": _slice,
    "Expand": _expand,
    "Range": _range,
    "ConstantOfShape": _constant_of_shape,
    "MatMul": _matmul,
    "Gemm": _gemm,
    "ReduceMean": _reduce(),
    "ReduceMax": _reduce(),
    "ReduceMin": _reduce(),
    "ReduceSum": _reduce(value_of=_sum_of),
    "ReduceProd": _reduce(value_of=lambda elements: _product(elements)),
    "ReduceSumSquare": _reduce(),
    "ReduceL1": _reduce(),
    "ReduceL2": _reduce(),
    "ReduceLogSum": _reduce(),
    "ReduceLogSumExp": _reduce(),
    "ArgMax": _arg,
    "ArgMin": _arg,
    "Split": _split,
    "Tile": _tile,
    "Pad": _pad,
    "TopK": _top_k,
    "LayerNormalization": _layer_norm,
    "RMSNormalization": _layer_norm,
    "Attention": _attention,
    "DequantizeLinear": _dequantize,
    "QuantizeLinear": _quantize,
    "RandomNormalLike": _random,
    "RandomUniformLike": _random,
    "NonZero": _non_zero,
}
