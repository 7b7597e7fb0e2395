"""Bodies of GE operators that move numbers, reduce them, or look them up."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from omforge.air.reference.builder import Body, Call, Twin
from omforge.air.reference.inference import ShapeFault


def _reshape(twin: Twin, call: Call) -> list[str]:
    if call.integer("axis", 0) or call.integer("num_axes", -1) != -1:
        raise call.fault("it reshapes some of the axes only")
    if call.input("shape") in call.constants:
        _check_count(call, [int(size) for size in call.number_list("shape")])
    shape = twin.cast(call.input("shape"), "int64")
    # ATC's ONNX plugin writes allowzero; without it 0 is read as a size.
    allowed = call.integer("allowzero", 1)
    return [twin.op("Reshape", call.input("x"), shape, allowzero=allowed)]


def _check_count(call: Call, sizes: list[int]) -> None:
    """ONNX's inference does not look at what GE's refuses: another count of numbers."""
    own = call.shape("x")
    told = [own[at] if size == 0 and at < len(own) else size for at, size in enumerate(sizes)]
    if min((*own, *told), default=0) >= 0 and math.prod(own) != math.prod(told):
        raise ShapeFault(call.op, f"{list(own)} cannot be {sizes}")


def _by_output_shape(twin: Twin, call: Call) -> list[str]:
    """A view whose shape the file says, with at most one dim open."""
    return [twin.reshape(call.input("x"), call.result_shape())]


def _triangle(upper: int) -> Body:
    def body(twin: Twin, call: Call) -> list[str]:
        diagonal = twin.constant(np.int64(call.integer("diagonal", 0)))
        return [twin.op("Trilu", call.input("x"), diagonal, upper=upper)]

    return body


def _unsqueeze(twin: Twin, call: Call) -> list[str]:
    return [twin.op("Unsqueeze", call.input("x"), twin.integers(call.integers("axes")))]


def _squeeze(twin: Twin, call: Call) -> list[str]:
    axes = call.integers("axis", ())
    return [twin.op("Squeeze", call.input("x"), twin.integers(axes) if axes else "")]


def _transpose(twin: Twin, call: Call) -> list[str]:
    order = [int(axis) for axis in call.number_list("perm")]
    return [twin.op("Transpose", call.input("x"), perm=order)]


def _transpose_d(twin: Twin, call: Call) -> list[str]:
    return [twin.op("Transpose", call.input("x"), perm=call.integers("perm"))]


def _concat_d(twin: Twin, call: Call) -> list[str]:
    return [twin.op("Concat", *call.inputs("x"), axis=call.integer("concat_dim"))]


def _pack(twin: Twin, call: Call) -> list[str]:
    axis = call.integer("axis", 0)
    parts = [twin.op("Unsqueeze", x, twin.integers([axis])) for x in call.inputs("x")]
    return [twin.op("Concat", *parts, axis=axis)]


def _split_v_d(twin: Twin, call: Call) -> list[str]:
    sizes = call.integers("size_splits")
    axis = call.integer("split_dim")
    return twin.ops("Split", len(sizes), call.input("x"), twin.integers(sizes), axis=axis)


def _split_v(twin: Twin, call: Call) -> list[str]:
    sizes = [int(size) for size in call.number_list("size_splits")]
    axis = int(call.number_list("split_dim").reshape(-1)[0])
    return twin.ops("Split", len(sizes), call.input("x"), twin.integers(sizes), axis=axis)


def _split_d(twin: Twin, call: Call) -> list[str]:
    count, axis = call.integer("num_split"), call.integer("split_dim")
    length = call.shape("x")[axis]
    if length % count:
        raise call.fault(f"{length} numbers cannot be cut into {count} equal parts")
    sizes = twin.integers([length // count] * count)
    return twin.ops("Split", count, call.input("x"), sizes, axis=axis)


def _gather_v2(twin: Twin, call: Call) -> list[str]:
    if call.integer("batch_dims", 0):
        raise call.fault("it gathers batch by batch")
    axis = int(call.number_list("axis").reshape(-1)[0])
    return [twin.op("Gather", call.input("x"), call.input("indices"), axis=axis)]


def _gather_elements(twin: Twin, call: Call) -> list[str]:
    axis = call.integer("dim", 0)
    return [twin.op("GatherElements", call.input("x"), call.input("index"), axis=axis)]


def _gather_nd(twin: Twin, call: Call) -> list[str]:
    index = twin.cast(call.input("indices"), "int64")
    return [twin.op("GatherND", call.input("x"), index)]


def _strided_slice_v2(twin: Twin, call: Call) -> list[str]:
    masks = ("begin_mask", "end_mask", "ellipsis_mask", "new_axis_mask", "shrink_axis_mask")
    if any(call.integer(name, 0) for name in masks):
        raise call.fault("it has masks")
    bounds = [call.input(name) for name in ("begin", "end", "axes", "strides")]
    return [twin.op("Slice", call.input("x"), *bounds)]


def _strided_slice(twin: Twin, call: Call) -> list[str]:
    """From begin to end of each axis: with all of its masks 0."""
    masks = ("begin_mask", "end_mask", "ellipsis_mask", "new_axis_mask", "shrink_axis_mask")
    if any(call.integer(name, 0) for name in masks):
        raise call.fault("it has masks")
    bounds = [twin.integers([int(n) for n in call.number_list(name)]) for name in ("begin", "end")]
    steps = twin.integers([int(n) for n in call.number_list("strides")])
    return [twin.op("Slice", call.input("x"), *bounds, "", steps)]


def _slice_d(twin: Twin, call: Call) -> list[str]:
    return _cut(twin, call, call.integers("offsets"), call.integers("size"))


def _slice(twin: Twin, call: Call) -> list[str]:
    offsets, sizes = (
        [int(number) for number in call.number_list(name)] for name in ("offsets", "size")
    )
    return _cut(twin, call, offsets, sizes)


def _cut(twin: Twin, call: Call, offsets: list[int], sizes: list[int]) -> list[str]:
    shape = call.shape("x")
    if any(at + size > dim for at, size, dim in zip(offsets, sizes, shape, strict=True)):
        raise ShapeFault(call.op, f"{sizes} from {offsets} on are not within {list(shape)}")
    ends = [
        np.iinfo(np.int64).max if size == -1 else offset + size
        for offset, size in zip(offsets, sizes, strict=True)
    ]
    return [twin.op("Slice", call.input("x"), twin.integers(offsets), twin.integers(ends))]


def _as_it_is(twin: Twin, call: Call) -> list[str]:
    """Another format in memory: the numbers, which are all that is looked at here, stay."""
    return [twin.op("Identity", call.input("src"))]


def _broadcast(twin: Twin, call: Call) -> list[str]:
    return [twin.op("Expand", call.input("x"), twin.cast(call.input("shape"), "int64"))]


def _fill(twin: Twin, call: Call) -> list[str]:
    return [twin.op("Expand", call.input("value"), twin.cast(call.input("dims"), "int64"))]


def _tile(twin: Twin, call: Call) -> list[str]:
    return [twin.op("Tile", call.input("x"), twin.cast(call.input("multiples"), "int64"))]


def _range(twin: Twin, call: Call) -> list[str]:
    scalars = [twin.reshape(call.input(name), []) for name in ("start", "limit", "delta")]
    return [twin.op("Range", *scalars)]


def _shape(twin: Twin, call: Call) -> list[str]:
    return [twin.cast(twin.op("Shape", call.input("x")), call.dtype("dtype", "int32"))]


def _reduce(op_type: str) -> Body:
    """With axes as an input, or as an attribute."""

    def body(twin: Twin, call: Call) -> list[str]:
        if call.prototype.attribute("axes") is not None:
            axes = call.integers("axes")
        else:
            axes = [int(axis) for axis in call.number_list("axes").reshape(-1)]
        keep = int(call.flag("keep_dims"))
        if op_type == "ReduceSum" or op_type == "ReduceMean":
            # Kernels sum in float32.
            dtype = call.desc("x").dtype
            if dtype in ("float16", "bfloat16"):
                x = twin.cast(call.input("x"), "float32")
                return [twin.cast(_reduced(twin, op_type, x, axes, keep), dtype)]
        return [_reduced(twin, op_type, call.input("x"), axes, keep)]

    return body


def _reduced(twin: Twin, op_type: str, x: str, axes: list[int], keep: int) -> str:
    return twin.op(op_type, x, twin.integers(axes), keepdims=keep)


def _softmax_v2(twin: Twin, call: Call) -> list[str]:
    axes = call.integers("axes", (-1,))
    if len(axes) != 1 or call.flag("half_to_float"):
        raise call.fault("it is no softmax over one axis in the dtype of x")
    return [twin.op("Softmax", call.input("x"), axis=axes[0])]


def _top_k_v2(twin: Twin, call: Call) -> list[str]:
    count = twin.reshape(twin.cast(call.input("k"), "int64"), [1])
    values, indices = twin.ops(
        "TopK",
        2,
        call.input("x"),
        count,
        axis=call.integer("dim", -1),
        largest=int(call.flag("largest", True)),
        sorted=int(call.flag("sorted", True)),
    )
    return [values, twin.cast(indices, "int32")]


def _arg_max(twin: Twin, call: Call) -> list[str]:
    axis = int(call.number_list("dimension").reshape(-1)[0])
    found = twin.op("ArgMax", call.input("x"), axis=axis, keepdims=0)
    return [twin.cast(found, call.dtype("dtype", "int64"))]


def _einsum(twin: Twin, call: Call) -> list[str]:
    return [twin.op("Einsum", *call.inputs("x"), equation=call.text("equation"))]


def _cumsum(twin: Twin, call: Call) -> list[str]:
    options = {name: int(call.flag(name)) for name in ("exclusive", "reverse")}
    return [twin.op("CumSum", call.input("x"), call.input("axis"), **options)]


def _one_hot(twin: Twin, call: Call) -> list[str]:
    values = [twin.reshape(call.input(name), [1]) for name in ("off_value", "on_value")]
    pair = twin.op("Concat", *values, axis=0)
    depth = twin.reshape(call.input("depth"), [1])
    return [twin.op("OneHot", call.input("x"), depth, pair, axis=call.integer("axis", -1))]


def _pad_v3(twin: Twin, call: Call) -> list[str]:
    """Paddings by axis, [[before, after], ...] in one row (paddings_contiguous)."""
    if not call.flag("paddings_contiguous", True):
        raise call.fault("its paddings are not contiguous")
    pads = call.number_list("paddings").reshape(-1, 2).T.reshape(-1)
    mode = call.text("mode", "constant")
    fill = call.input("constant_values") if mode == "constant" else ""
    if fill:
        fill = twin.reshape(fill, [])
    return [twin.op("Pad", call.input("x"), twin.integers([int(n) for n in pads]), fill, mode=mode)]


def _scatter_elements(twin: Twin, call: Call) -> list[str]:
    given = [call.input(name) for name in ("data", "indices", "updates")]
    reduction = call.text("reduction", "none")
    return [twin.op("ScatterElements", *given, axis=call.integer("axis", 0), reduction=reduction)]


def _tensor_scatter(twin: Twin, call: Call) -> list[str]:
    index = twin.cast(call.input("indices"), "int64")
    return [twin.op("ScatterND", call.input("x"), index, call.input("updates"))]


BODIES: Mapping[str, Body] = {
    "ArgMaxV2": _arg_max,
    "BroadcastTo": _broadcast,
    "ConcatD": _concat_d,
    "Cumsum": _cumsum,
    "Einsum": _einsum,
    "Expand": _broadcast,
    "Fill": _fill,
    "Flatten": _by_output_shape,
    "GatherElements": _gather_elements,
    "GatherNd": _gather_nd,
    "GatherV2": _gather_v2,
    "OneHot": _one_hot,
    "Pack": _pack,
    "PadV3": _pad_v3,
    "Range": _range,
    **{f"Reduce{kind}": _reduce(f"Reduce{kind}") for kind in ("Mean", "Sum", "Max", "Min", "Prod")},
    **{f"Reduce{kind}D": _reduce(f"Reduce{kind}") for kind in ("Mean", "Sum", "Max", "Min")},
    "Reshape": _reshape,
    "ScatterElements": _scatter_elements,
    "Shape": _shape,
    "Slice": _slice,
    "SliceD": _slice_d,
    "SoftmaxV2": _softmax_v2,
    "SplitD": _split_d,
    "SplitV": _split_v,
    "SplitVD": _split_v_d,
    "Squeeze": _squeeze,
    "StridedSlice": _strided_slice,
    "StridedSliceV2": _strided_slice_v2,
    "TensorScatterUpdate": _tensor_scatter,
    "Tile": _tile,
    "TopKV2": _top_k_v2,
    "TransData": _as_it_is,
    "Transpose": _transpose,
    "TransposeD": _transpose_d,
    "Tril": _triangle(0),
    "Triu": _triangle(1),
    "Unsqueeze": _unsqueeze,
}
