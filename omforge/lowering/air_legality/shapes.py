"""Shapes of results, as GE infers them, for the plain operators of an LLM's graph.

Each function gives the shape of every output that it knows; None where the operands' shapes, or
values that decide, are not known. Operands that do not fit raise `Misfit`. Source: the operators'
InferShape in hicann/ops-math and hicann/ops-nn (op_host, *_infershape.cpp).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

from omforge.lowering.air_legality.subject import Call

Shape = tuple[int, ...]
Shapes = Mapping[str, Sequence[Shape]] | None
Infer = Callable[[Call], Shapes]


class Misfit(Exception):
    """Operands that do not fit, in words."""


def of_first(call: Call) -> Shapes:
    """The shape of the first input."""
    assert call.prototype is not None
    x = call.tensor(call.prototype.inputs[0].name).static
    return None if x is None else {call.prototype.outputs[0].name: [x]}


def broadcast(*names: str) -> Infer:
    """What some operands have in common, dim by dim from behind."""

    def infer(call: Call) -> Shapes:
        assert call.prototype is not None
        shapes = [call.tensor(name).static for name in names]
        known = [shape for shape in shapes if shape is not None]
        if len(known) < len(shapes):
            return None
        return {call.prototype.outputs[0].name: [_common(known)]}

    return infer


def _common(shapes: Sequence[Shape]) -> Shape:
    rank = max(map(len, shapes))
    wide = [(1,) * (rank - len(shape)) + shape for shape in shapes]
    found: list[int] = []
    for dims in zip(*wide, strict=True):
        sizes = set(dims) - {1}
        if len(sizes) > 1:
            told = " and ".join(str(list(shape)) for shape in shapes)
            raise Misfit(f"{told} do not broadcast")
        found.append(sizes.pop() if sizes else 1)
    return tuple(found)


def product(first: str, second: str) -> Infer:
    """A product of matrices, with leading dims that broadcast."""

    def infer(call: Call) -> Shapes:
        a, b = call.tensor("x1").static, call.tensor("x2").static
        if a is None or b is None:
            return None
        if len(a) < 2 or len(b) < 2:
            raise Misfit(f"{list(a)} and {list(b)} are not matrices")
        m, k = _turned(a, call.flag(first))
        k_of_b, n = _turned(b, call.flag(second))
        if k != k_of_b:
            raise Misfit(f"{list(a)} has k = {k}, {list(b)} has {k_of_b}")
        return {"y": [(*_common([a[:-2], b[:-2]]), m, n)]}

    return infer


def matrices(call: Call) -> Shapes:
    """MatMulV2 and V3: no leading dims."""
    a, b = call.tensor("x1").static, call.tensor("x2").static
    for shape in (a, b):
        if shape is not None and len(shape) != 2 and call.op.type != "MatMul":
            raise Misfit(f"{list(shape)} is no matrix: BatchMatMulV2 takes it")
    return product("transpose_x1", "transpose_x2")(call)


def _turned(shape: Shape, flag: bool) -> tuple[int, int]:
    return (shape[-1], shape[-2]) if flag else (shape[-2], shape[-1])


def reshape(call: Call) -> Shapes:
    """Reshape: 0 keeps a dim, -1 takes what is left."""
    x, wanted = call.tensor("x").static, call.values("shape")
    stated = call.result("y").static
    if x is None:
        return None
    if wanted is None or call.integer("axis") or call.integer("num_axes") != -1:
        if wanted is None and stated is not None and math.prod(stated) != math.prod(x):
            raise Misfit(f"{list(x)} has {math.prod(x)} elements, {list(stated)} others")
        return None
    dims = [x[at] if dim == 0 and at < len(x) else dim for at, dim in enumerate(wanted)]
    others = math.prod(dim for dim in dims if dim != -1)
    if dims.count(-1) == 1 and others and math.prod(x) % others == 0:
        dims[dims.index(-1)] = math.prod(x) // others
    if math.prod(dims) != math.prod(x) or any(dim < 0 for dim in dims):
        raise Misfit(f"{list(x)} has {math.prod(x)} elements, the shape {list(wanted)} others")
    return {"y": [tuple(dims)]}


def transpose(call: Call) -> Shapes:
    """Transpose and TransposeD: the dims in another order."""
    x = call.tensor("x").static
    perm = call.values("perm") if call.has("perm") else call.integers("perm")
    if x is None or perm is None:
        return None
    if sorted(perm) != list(range(len(x))):
        raise Misfit(f"perm {list(perm)} does not order the dims of {list(x)}")
    return {"y": [tuple(x[at] for at in perm)]}


def concat(call: Call) -> Shapes:
    """Concat, ConcatV2, ConcatD: the sizes along the axis add up."""
    shapes = [operand.tensor.static for operand in call.inputs.get("x", ())]
    axis = _one(call, "concat_dim")
    known = [shape for shape in shapes if shape is not None]
    if axis is None or not shapes or len(known) < len(shapes):
        return None
    at = _axis(known[0], axis)
    rest = {(*shape[:at], *shape[at + 1 :]) for shape in known}
    if len(rest) > 1 or len({len(shape) for shape in known}) > 1:
        told = ", ".join(str(list(shape)) for shape in known)
        raise Misfit(f"{told} differ beside the axis {axis}")
    total = sum(shape[at] for shape in known)
    return {"y": [(*known[0][:at], total, *known[0][at + 1 :])]}


def split(call: Call) -> Shapes:
    """Split, SplitD: equal parts; SplitV, SplitVD: parts of stated sizes, -1 for what is left."""
    x, axis, count = call.tensor("x").static, _one(call, "split_dim"), call.integer("num_split")
    if x is None or axis is None or count is None:
        return None
    at = _axis(x, axis)
    if call.op.type in ("Split", "SplitD"):
        if count < 1 or x[at] % count:
            raise Misfit(f"the dim {axis} of {list(x)} has no {count} equal parts")
        parts = [x[at] // count] * count
    else:
        found = call.values("size_splits") if call.has("size_splits") else None
        found = found or call.integers("size_splits")
        if found is None:
            return None
        parts = [*found]
        if parts.count(-1) == 1:
            parts[parts.index(-1)] = x[at] - sum(parts) - 1
        if sum(parts) != x[at] or len(parts) != count or min(parts) < 0:
            raise Misfit(f"{list(found)} are not {count} parts of the dim {axis} of {list(x)}")
    return {"y": [(*x[:at], part, *x[at + 1 :]) for part in parts]}


def gather(call: Call) -> Shapes:
    """Gather, GatherV2: the indices' shape in the place of the axis."""
    x, indices = call.tensor("x").static, call.tensor("indices").static
    axis = _one(call, "axis") if call.op.type == "GatherV2" else 0
    if x is None or indices is None or axis is None or call.integer("batch_dims"):
        return None
    at = _axis(x, axis)
    return {"y": [(*x[:at], *indices, *x[at + 1 :])]}


def sliced(call: Call) -> Shapes:
    """Slice, SliceD: offsets and sizes, -1 for what is left."""
    x = call.tensor("x").static
    starts = call.values("offsets") if call.has("offsets") else call.integers("offsets")
    sizes = call.values("size") if call.has("size") else call.integers("size")
    if x is None or starts is None or sizes is None:
        return None
    if not len(x) == len(starts) == len(sizes):
        raise Misfit(f"offsets {list(starts)} and size {list(sizes)} of {list(x)}")
    found = [
        dim - start if size == -1 else size
        for dim, start, size in zip(x, starts, sizes, strict=True)
    ]
    for dim, start, size in zip(x, starts, found, strict=True):
        if start < 0 or size < 0 or start + size > dim:
            raise Misfit(f"offsets {list(starts)} and size {list(sizes)} lie outside {list(x)}")
    return {"y": [tuple(found)]}


def squeeze(call: Call) -> Shapes:
    """Squeeze: dims of 1 are taken away, those named or all."""
    x, axes = call.tensor("x").static, call.integers("axis")
    if x is None:
        return None
    gone = {_axis(x, axis) for axis in axes or ()} or {at for at, dim in enumerate(x) if dim == 1}
    if any(x[at] != 1 for at in gone):
        raise Misfit(f"the dims {sorted(gone)} of {list(x)} are not all 1")
    return {"y": [tuple(dim for at, dim in enumerate(x) if at not in gone)]}


def unsqueeze(call: Call) -> Shapes:
    """Unsqueeze, ExpandDims: dims of 1 are put in."""
    x = call.tensor("x").static
    axes = call.integers("axes") if call.op.type == "Unsqueeze" else call.values("axis")
    if x is None or axes is None:
        return None
    rank = len(x) + len(axes)
    places = {axis + rank if axis < 0 else axis for axis in axes}
    if len(places) < len(axes) or not places <= set(range(rank)):
        raise Misfit(f"the axes {list(axes)} are none of a tensor of {rank} dims")
    left = iter(x)
    return {"y": [tuple(1 if at in places else next(left) for at in range(rank))]}


def reduced(call: Call) -> Shapes:
    """ReduceSum and the like: the axes go, or become 1."""
    x = call.tensor("x").static
    axes = call.values("axes") if call.has("axes") else call.integers("axes")
    if x is None or not axes:
        return None
    gone = {_axis(x, axis) for axis in axes}
    if call.flag("keep_dims"):
        return {"y": [tuple(1 if at in gone else dim for at, dim in enumerate(x))]}
    return {"y": [tuple(dim for at, dim in enumerate(x) if at not in gone)]}


def broadcast_to(call: Call) -> Shapes:
    """BroadcastTo: the stated shape, into which the input broadcasts."""
    x, wanted = call.tensor("x").static, call.values("shape")
    if x is None or wanted is None or -1 in wanted:
        return None
    if _common([x, wanted]) != wanted:
        raise Misfit(f"{list(x)} does not broadcast to {list(wanted)}")
    return {"y": [wanted]}


def tile(call: Call) -> Shapes:
    """Tile, TileD: each dim so many times."""
    x = call.tensor("x").static
    times = call.values("multiples") if call.has("multiples") else call.integers("multiples")
    if x is None or times is None or len(times) < len(x):
        return None
    wide = (1,) * (len(times) - len(x)) + x
    return {"y": [tuple(dim * time for dim, time in zip(wide, times, strict=True))]}


def fill(call: Call) -> Shapes:
    """Fill: the stated shape."""
    dims = call.values("dims")
    return None if dims is None else {"y": [dims]}


def shape_of(call: Call) -> Shapes:
    """Shape: one number for each dim."""
    x = call.tensor("x").shape
    return None if x is None else {"y": [(len(x),)]}


def top_k(call: Call) -> Shapes:
    """TopKV2: k along the axis."""
    x, k, axis = call.tensor("x").static, call.values("k"), call.integer("dim")
    if x is None or k is None or len(k) != 1 or axis is None:
        return None
    at = _axis(x, axis)
    if k[0] > x[at]:
        raise Misfit(f"the {k[0]} largest of the dim {axis} of {list(x)}")
    found = (*x[:at], k[0], *x[at + 1 :])
    return {"values": [found], "indices": [found]}


def arg_max(call: Call) -> Shapes:
    """ArgMaxV2: without the axis."""
    x, axis = call.tensor("x").static, call.values("dimension")
    if x is None or axis is None or len(axis) != 1:
        return None
    at = _axis(x, axis[0])
    return {"y": [(*x[:at], *x[at + 1 :])]}


def _one(call: Call, name: str) -> int | None:
    """A number that is an attribute, or a constant input."""
    if not call.has(name):
        return call.integer(name)
    values = call.values(name)
    return values[0] if values is not None and len(values) == 1 else None


def _axis(shape: Shape, axis: int) -> int:
    at = axis + len(shape) if axis < 0 else axis
    if not 0 <= at < len(shape):
        raise Misfit(f"{list(shape)} has no axis {axis}")
    return at


_ALIKE = (
    "Relu Sigmoid Tanh Exp Log Sqrt Rsqrt Neg Abs Cast Identity Gelu GeluV2 FastGelu Swish Erf Sin "
    "Cos Round Floor Ceil Reciprocal TensorMove Tril Triu SoftmaxV2 LogSoftmaxV2 LogicalNot Cumsum "
    "Mish Elu Softplus HardSigmoid LeakyRelu Sign IsNan IsInf Square Silu ClipByValue AscendQuant "
    "AscendQuantV2 AscendAntiQuant AscendAntiQuantV2 AscendDequant Pass Muls Adds"
)
_PAIRS = (
    "Add Sub Mul Div RealDiv Maximum Minimum Pow FloorDiv FloorMod Mod Greater GreaterEqual Less "
    "LessEqual Equal NotEqual LogicalAnd LogicalOr BitwiseAnd BitwiseOr BitwiseXor"
)

PLAIN: Mapping[str, Infer] = {
    **dict.fromkeys(_ALIKE.split(), of_first),
    **dict.fromkeys(_PAIRS.split(), broadcast("x1", "x2")),
    "SelectV2": broadcast("condition", "then", "else"),
    **dict.fromkeys(("MatMul", "MatMulV2", "MatMulV3"), matrices),
    **dict.fromkeys(("BatchMatMul", "BatchMatMulV2", "BatchMatMulV3"), product("adj_x1", "adj_x2")),
    "Reshape": reshape,
    **dict.fromkeys(("Transpose", "TransposeD"), transpose),
    **dict.fromkeys(("Concat", "ConcatV2", "ConcatD"), concat),
    **dict.fromkeys(("Split", "SplitD", "SplitV", "SplitVD"), split),
    **dict.fromkeys(("Gather", "GatherV2"), gather),
    **dict.fromkeys(("Slice", "SliceD"), sliced),
    "Squeeze": squeeze,
    **dict.fromkeys(("Unsqueeze", "ExpandDims"), unsqueeze),
    **dict.fromkeys(
        ("ReduceSum", "ReduceSumD", "ReduceMean", "ReduceMeanD", "ReduceMax", "ReduceMin"), reduced
    ),
    "BroadcastTo": broadcast_to,
    **dict.fromkeys(("Tile", "TileD"), tile),
    "Fill": fill,
    "Shape": shape_of,
    "TopKV2": top_k,
    "ArgMaxV2": arg_max,
}
"""Operators by type; of another one no shape is known."""
