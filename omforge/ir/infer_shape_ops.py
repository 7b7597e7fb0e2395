"""What ops that make shapes and move data return: one rule an op, in ONNX's words.

`infer_rules.RULES` says which op has which rule.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from omforge.ir import dims as d
from omforge.ir.dims import Dim, Expr
from omforge.ir.inference import Inference
from omforge.ir.values import (
    MAX_TRACKED,
    Dims,
    Symbolic,
    as_symbolic,
    constant,
    constant_tensor,
    tensor_shape,
)

_INT64 = ir.DataType.INT64

_FAR = (1 << 31) - 1
"""A slice bound from here on means "to the end": exporters write the largest int32 or int64."""


def broadcast(*shapes: Dims | None) -> Dims | None:
    """Numpy broadcasting; of two different symbols the first stays (ONNX promises they agree)."""
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


def axis_of(axis: int, rank: int) -> int:
    """An axis counted from the front."""
    if not -rank <= axis <= rank:
        raise ValueError(f"axis {axis} of a tensor of rank {rank}")
    return axis + rank if axis < 0 else axis


def product(of: Sequence[Dim]) -> Dim:
    """The number of elements of a shape."""
    total: Dim = 1
    for dim in of:
        total = total * dim
    return total


def small(shape: Dims | None) -> tuple[int, ...] | None:
    """The shape if it is all numbers and small enough to track."""
    if shape is None:
        return None
    sizes = tuple(dim for dim in shape if isinstance(dim, int))
    return sizes if len(sizes) == len(shape) and math.prod(sizes) <= MAX_TRACKED else None


def replaced(shape: Dims, axis: int, *by: Dim) -> Dims:
    """The shape with other dimensions in place of the one at `axis`."""
    return (*shape[:axis], *by, *shape[axis + 1 :])


# --- what makes shapes ------------------------------------------------------------------------


def constant_node(c: Inference) -> None:
    """Constant: its tensor's dtype and shape."""
    tensor = constant_tensor(c.node.outputs[0])
    if tensor is not None:
        c.out(tensor.dtype, tensor_shape(tensor))


def shape_of(c: Inference) -> None:
    """Shape: the dimensions from `start` to `end`, both counted from the end if below 0."""
    shape = c.dims()
    if shape is None:
        c.out(_INT64, c.unknowns(1))
        return
    part = shape[slice(c.attr("start", 0), c.attr("end", None))]
    c.out(_INT64, (len(part),), value=as_symbolic(part, (len(part),)))


def size_of(c: Inference) -> None:
    """Size: the number of elements, as a scalar."""
    shape = c.dims()
    c.out(_INT64, (), value=None if shape is None else as_symbolic([product(shape)], ()))


def constant_of_shape(c: Inference) -> None:
    """ConstantOfShape: the shape that the input says, filled with `value` (0.0 by default)."""
    target = c.known()
    fill = c.attr("value")
    array = np.zeros(1, np.float32) if fill is None else fill.numpy()
    dtype = ir.DataType.FLOAT if fill is None else fill.dtype
    if target is None:
        c.out(dtype, c.unknowns(c.length(0)))
        return
    shape = tuple(target.ravel())
    sizes = small(shape)
    value = None
    if sizes is not None and array.dtype.kind in "iub":
        value = as_symbolic([array.ravel()[0].item()] * math.prod(sizes), sizes)
    c.out(dtype, shape, value=value)


def range_of(c: Inference) -> None:
    """Range: max(ceil((limit - start) / delta), 0) elements."""
    bounds = [c.known(i) for i in range(3)]
    if any(b is None for b in bounds):
        c.out(c.dtype(), (_constant_range(c),))
        return
    start, limit, delta = (b.ravel()[0] for b in bounds if b is not None)
    if all(isinstance(x, int) for x in (start, limit, delta)):
        steps = range(start, limit, delta)
        value = as_symbolic(list(steps), (len(steps),)) if len(steps) <= MAX_TRACKED else None
        c.out(c.dtype(), (len(steps),), value=value)
        return
    c.out(c.dtype(), (_steps(limit - start, delta, c.unknown(0)),))


def _constant_range(c: Inference) -> Dim:
    """The length of a range over constant floats."""
    arrays = [constant(c.input(i), limit=1) for i in range(3)]
    numbers = [float(array.ravel()[0]) for array in arrays if array is not None and array.size]
    if len(numbers) < 3:
        return c.unknown(0)
    return max(math.ceil((numbers[1] - numbers[0]) / numbers[2]), 0)


def _steps(distance: Dim, step: Dim, unknown: Dim) -> Dim:
    """How many steps it takes to cover a distance, none where it goes the other way."""
    if d.is_nonnegative(step * -1):
        distance, step = distance * -1, step * -1
    if step == 0 or not d.is_nonnegative(step):
        return unknown
    return d.ceil_divide(d.maximum(distance, 0), step)


# --- reshaping --------------------------------------------------------------------------------


def unsqueeze(c: Inference) -> None:
    """Unsqueeze: 1 at each of the axes, which count in the result."""
    shape, axes = c.dims(), c.axes()
    if shape is None or axes is None:
        c.out(c.dtype(), None)
        return
    rank = len(shape) + len(axes)
    places = {axis_of(a, rank) for a in axes}
    rest = iter(shape)
    result = tuple(1 if i in places else next(rest) for i in range(rank))
    c.out(c.dtype(), result, value=_with_shape(c.known(), result))


def squeeze(c: Inference) -> None:
    """Squeeze: without the given axes; without axes given, all that are 1 go."""
    shape = c.dims()
    if shape is None:
        c.out(c.dtype(), None)
        return
    axes = c.axes()
    # A symbol may turn out to be 1, so the rank depends on it.
    if axes is None and c.input(1) is None and not any(isinstance(dim, Expr) for dim in shape):
        axes = [i for i, dim in enumerate(shape) if dim == 1]
    if axes is None:
        c.out(c.dtype(), None)
        return
    places = {axis_of(a, len(shape)) for a in axes}
    result = tuple(dim for i, dim in enumerate(shape) if i not in places)
    c.out(c.dtype(), result, value=_with_shape(c.known(), result))


def _with_shape(value: Symbolic | None, shape: Dims) -> Symbolic | None:
    sizes = small(shape)
    return None if value is None or sizes is None else value.reshape(sizes)


def reshaped(shape: Dims, target: Sequence[Dim], allow_zero: bool) -> Dims:
    """The result of Reshape for a symbolic target with 0 (copy) and -1 (the rest)."""
    result = [shape[i] if dim == 0 and not allow_zero else dim for i, dim in enumerate(target)]
    if -1 in result:
        place = result.index(-1)
        others = result[:place] + result[place + 1 :]
        left = list(shape)
        for dim in list(others):  # cancel equal dims first: 0 / 0 is what a copied 0 would be
            if dim in left:
                left.remove(dim)
                others.remove(dim)
        rest = product(others)
        result[place] = d.divide(product(left), rest) if rest != 0 else 0
    return tuple(result)


def reshape(c: Inference) -> None:
    """Reshape: the target, with 0 and -1 resolved."""
    shape, target = c.dims(), c.known(1)
    if target is None:
        c.out(c.dtype(), c.unknowns(c.length(1)))
        return
    elements = list(target.ravel())
    keeps_zero = bool(c.attr("allowzero", 0))
    if shape is None:
        known = [
            c.unknown(i) if dim == -1 or (dim == 0 and not keeps_zero) else dim
            for i, dim in enumerate(elements)
        ]
        c.out(c.dtype(), known)
        return
    result = reshaped(shape, elements, keeps_zero)
    c.out(c.dtype(), result, value=_with_shape(c.known(), result))


def flatten(c: Inference) -> None:
    """Flatten: all before `axis` as one dimension, the rest as another."""
    shape = c.dims()
    if shape is None:
        c.out(c.dtype(), c.unknowns(2))
        return
    axis = axis_of(c.attr("axis", 1), len(shape))
    c.out(c.dtype(), (product(shape[:axis]), product(shape[axis:])))


def transpose(c: Inference) -> None:
    """Transpose: by `perm`, which reverses by default."""
    shape = c.dims()
    if shape is None:
        c.out(c.dtype(), c.unknowns(len(c.attr("perm"))) if c.attr("perm") else None)
        return
    perm = c.attr("perm") or tuple(reversed(range(len(shape))))
    value = c.known()
    c.out(
        c.dtype(),
        tuple(shape[p] for p in perm),
        value=None if value is None else value.transpose(perm),
    )


# --- slicing ----------------------------------------------------------------------------------


def slice_of(c: Inference) -> None:
    """Slice: by starts, ends, axes and steps; attributes before opset 10."""
    shape = c.dims()
    if shape is None:
        c.out(c.dtype(), None)
        return
    starts, ends, steps = c.integers("starts", 1), c.integers("ends", 2), c.known(4)
    axes = c.axes(index=3)
    if axes is None and c.input(3) is None and (count := c.length(1)) is not None:
        axes = list(range(count)) if isinstance(count, int) else None
    if axes is None and c.input(3) is None and starts is not None:
        axes = list(range(starts.size))
    if axes is None:
        c.out(c.dtype(), c.unknowns(len(shape)))
        return
    places = [axis_of(axis, len(shape)) for axis in axes]
    if starts is None or ends is None or (steps is None and c.input(4) is not None):
        c.out(c.dtype(), [c.unknown(i) if i in places else x for i, x in enumerate(shape)])
        return
    result, value = list(shape), c.known()
    for position, axis in enumerate(places):
        size, start, end = shape[axis], starts.ravel()[position], ends.ravel()[position]
        step = 1 if steps is None else steps.ravel()[position]
        if isinstance(size, int) and all(isinstance(x, int) for x in (start, end, step)):
            picked = _positions(size, start, end, step)
            result[axis] = len(picked)
            value = None if value is None else value.take(np.array(picked, np.int64), axis=axis)
        else:
            length = _slice_length(size, start, end, step)
            result[axis] = c.unknown(axis) if length is None else length
            value = None
    c.out(c.dtype(), tuple(result), value=value)


def _positions(size: int, start: int, end: int, step: int) -> range:
    """What a slice picks: bounds below 0 count from the end, then they are clamped to the axis."""
    start, end = (bound + size if bound < 0 else bound for bound in (start, end))
    if step > 0:
        return range(min(max(start, 0), size), min(max(end, 0), size), step)
    return range(min(max(start, 0), size - 1), min(max(end, -1), size - 1), step)


def _slice_length(size: Dim, start: Dim, end: Dim, step: Dim) -> Dim | None:
    """The length of a slice that depends on symbols; None where it cannot be told."""
    if not isinstance(step, int) or step == 0:
        return None
    if step < 0:
        reverses = start == -1 or (isinstance(start, int) and start >= _FAR)
        reverses = reverses and isinstance(end, int) and end <= -_FAR
        return d.ceil_divide(size, -step) if reverses else None
    low, high = _offset(start, size), _offset(end, size)
    if low is None or high is None:
        return None
    top = d.minimum(high, size)
    # min(high, size) - max(low, 0), written so that it needs no subtraction of a maximum.
    length = d.maximum(d.minimum(top - low, top), 0)
    if length == d.minimum(1, size):
        # The first or the last element: the axis is taken not to be empty, so that the last token
        # of a sequence is one token.
        length = 1
    return d.ceil_divide(length, step)


def _offset(bound: Dim, size: Dim) -> Dim | None:
    """A slice bound counted from the start, not clamped yet; None if its sign is not known."""
    if isinstance(bound, int):
        if abs(bound) >= _FAR:
            return size if bound > 0 else 0
        return size + bound if bound < 0 else bound
    if d.is_nonnegative(bound * -1):  # an expression such as -seq counts from the end
        return size + bound
    # `seq - 1` is below 0 for an empty sequence only, and nothing is sliced from that.
    at_least_one = d.substitute(bound, {name: d.symbol(name) + 1 for name in d.symbols(bound)})
    return bound if d.is_nonnegative(at_least_one) else None


# --- repeating, joining, picking --------------------------------------------------------------


def expand(c: Inference) -> None:
    """Expand: the input's shape broadcast with the target."""
    shape, target = c.dims(), c.known(1)
    if shape is None or target is None:
        rank = c.length(1)
        longest = max(rank, len(shape)) if shape is not None and isinstance(rank, int) else None
        c.out(c.dtype(), c.unknowns(longest))
        return
    result = broadcast(shape, tuple(target.ravel()))
    value, sizes = c.known(), small(result)
    c.out(
        c.dtype(),
        result,
        value=np.broadcast_to(value, sizes) if value is not None and sizes is not None else None,
    )


def tile(c: Inference) -> None:
    """Tile: each dimension times its repeats."""
    shape, repeats = c.dims(), c.known(1)
    if shape is None or repeats is None:
        c.out(c.dtype(), c.unknowns(c.length(1) if shape is None else len(shape)))
        return
    result = tuple(dim * r for dim, r in zip(shape, repeats.ravel(), strict=True))
    value = c.known()
    counts = [r for r in repeats.ravel() if isinstance(r, int)]
    keeps = value is not None and len(counts) == repeats.size and small(result) is not None
    c.out(c.dtype(), result, value=np.tile(value, counts) if keeps and value is not None else None)


def concat(c: Inference) -> None:
    """Concat: the sum of the dimensions at `axis`; the others agree."""
    shapes = [c.dims(i) for i in range(len(c.node.inputs))]
    values = [c.known(i) for i in range(len(c.node.inputs))]
    found = [shape for shape in shapes if shape is not None]
    if not found or len({len(shape) for shape in found}) > 1:
        c.out(c.dtype(), None)
        return
    axis = axis_of(c.attr("axis", 1), len(found[0]))
    total: Dim = 0
    for shape in found:
        total = total + shape[axis]
    if len(found) < len(shapes):
        total = c.unknown(axis)
    rest = broadcast(*[replaced(shape, axis, 1) for shape in found])
    assert rest is not None
    value = None
    if all(v is not None for v in values):
        value = np.concatenate([v for v in values if v is not None], axis=axis)
    c.out(c.dtype(), replaced(rest, axis, total), value=value)


def split(c: Inference) -> None:
    """Split: as `split` says, or in equal parts of which the last may be smaller."""
    shape = c.dims()
    count = len(c.node.outputs)
    if shape is None:
        for i in range(count):
            c.out(c.dtype(), None, i)
        return
    axis = axis_of(c.attr("axis", 0), len(shape))
    sizes: list[Dim] = [c.unknown(axis, i) for i in range(count)]
    given = c.integers("split", 1)
    if given is not None:
        sizes = list(given.ravel())
    elif c.input(1) is None:
        sizes = _equal_parts(shape[axis], c.attr("num_outputs", count))
    value = c.known()
    start = 0
    for i in range(count):
        size, part = sizes[i], None
        if value is not None and isinstance(size, int):
            part = value.take(np.arange(start, start + size), axis=axis)
            start += size
        c.out(c.dtype(), replaced(shape, axis, size), i, value=part)


def _equal_parts(whole: Dim, count: int) -> list[Dim]:
    chunk = d.ceil_divide(whole, count)
    if chunk * count == whole:
        return [chunk] * count
    return [chunk, *(d.maximum(d.minimum(chunk, whole - chunk * i), 0) for i in range(1, count))]


def pad(c: Inference) -> None:
    """Pad: each dimension with what is put before and after it (negative: taken away)."""
    shape, pads = c.dims(), c.integers("pads", 1)
    axes = c.axes(index=3)
    if shape is None:
        c.out(c.dtype(), None)
        return
    if pads is None or (axes is None and c.input(3) is not None):
        c.out(c.dtype(), c.unknowns(len(shape)))
        return
    places = list(range(len(shape))) if axes is None else [axis_of(a, len(shape)) for a in axes]
    result = list(shape)
    flat = pads.ravel()
    for i, place in enumerate(places):
        result[place] = result[place] + flat[i] + flat[i + len(places)]
    c.out(c.dtype(), tuple(result))


def gather(c: Inference) -> None:
    """Gather: the indices' shape in place of the dimension at `axis`."""
    data, indices = c.dims(0), c.dims(1)
    if data is None or indices is None:
        c.out(c.dtype(), None)
        return
    axis = axis_of(c.attr("axis", 0), len(data))
    value, picks = c.known(0), c.known(1)
    found: Symbolic | None = None
    if (
        value is not None
        and picks is not None
        and not any(isinstance(p, Expr) for p in picks.ravel())
    ):
        taken = value.take(picks.astype(np.int64).ravel(), axis=axis)
        found = taken.reshape((*value.shape[:axis], *picks.shape, *value.shape[axis + 1 :]))
    c.out(c.dtype(), replaced(data, axis, *indices), value=found)


def gather_nd(c: Inference) -> None:
    """GatherND: the indices' shape without its last axis, then what that leaves of the data."""
    data, indices = c.dims(0), c.dims(1)
    if data is None or not indices or not isinstance(indices[-1], int):
        c.out(c.dtype(), None)
        return
    c.out(c.dtype(), indices[:-1] + data[c.attr("batch_dims", 0) + indices[-1] :])


def gather_elements(c: Inference) -> None:
    """GatherElements: the indices' shape."""
    c.out(c.dtype(), c.dims(1))


def top_k(c: Inference) -> None:
    """TopK: k in place of the dimension at `axis`, for values and indices."""
    shape, k = c.dims(), c.integers("k", 1)
    result = None
    if shape is not None:
        axis = axis_of(c.attr("axis", -1), len(shape))
        result = replaced(shape, axis, c.unknown(axis) if k is None else k.ravel()[0])
    c.out(c.dtype(), result)
    c.out(_INT64, result, 1)


def non_zero(c: Inference) -> None:
    """NonZero: the rank, by a number that depends on the data."""
    shape = c.dims()
    c.out(_INT64, (c.unknown(0) if shape is None else len(shape), c.unknown(1)))
