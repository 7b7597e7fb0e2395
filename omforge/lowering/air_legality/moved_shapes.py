"""Shapes of results where numbers are moved, joined or parted, as GE infers them.

Source: the operators' InferShape in hicann/ops-math and hicann/ops-nn (op_host, *_infershape.cpp).
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from omforge.lowering.air_legality.shapes import Infer, Misfit, Shapes, axis_of, common, one_number
from omforge.lowering.air_legality.subject import Call


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
    axis = one_number(call, "concat_dim")
    known = [shape for shape in shapes if shape is not None]
    if axis is None or not shapes or len(known) < len(shapes):
        return None
    at = axis_of(known[0], axis)
    rest = {(*shape[:at], *shape[at + 1 :]) for shape in known}
    if len(rest) > 1 or len({len(shape) for shape in known}) > 1:
        told = ", ".join(str(list(shape)) for shape in known)
        raise Misfit(f"{told} differ beside the axis {axis}")
    total = sum(shape[at] for shape in known)
    return {"y": [(*known[0][:at], total, *known[0][at + 1 :])]}


def split(call: Call) -> Shapes:
    """Split, SplitD: equal parts; SplitV, SplitVD: parts of stated sizes, -1 for what is left."""
    x, axis, count = (
        call.tensor("x").static,
        one_number(call, "split_dim"),
        call.integer("num_split"),
    )
    if x is None or axis is None or count is None:
        return None
    at = axis_of(x, axis)
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
    axis = one_number(call, "axis") if call.op.type == "GatherV2" else 0
    if x is None or indices is None or axis is None or call.integer("batch_dims"):
        return None
    at = axis_of(x, axis)
    return {"y": [(*x[:at], *indices, *x[at + 1 :])]}


def gather_nd(call: Call) -> Shapes:
    """GatherNd: the indices' leading dims, and what they leave of x."""
    x, indices = call.tensor("x").static, call.tensor("indices").static
    if x is None or not indices:
        return None
    if indices[-1] > len(x):
        raise Misfit(f"indices {list(indices)} of {list(x)}")
    return {"y": [(*indices[:-1], *x[indices[-1] :])]}


def gather_elements(call: Call) -> Shapes:
    """GatherElements: the index's shape."""
    index = call.tensor("index").static
    return None if index is None else {"y": [index]}


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


def strided(call: Call) -> Shapes:
    """StridedSlice, StridedSliceD: begin, end and strides, with masks of begin, end and shrink."""
    x = call.tensor("x").static
    parts = [
        call.values(name) if call.has(name) else call.integers(name)
        for name in ("begin", "end", "strides")
    ]
    begin, end, strides = parts
    masked = call.integer("ellipsis_mask") or call.integer("new_axis_mask")
    if x is None or begin is None or end is None or strides is None or masked:
        return None
    if not len(begin) == len(end) == len(strides) <= len(x) or 0 in strides:
        raise Misfit(f"begin {list(begin)}, end {list(end)}, strides {list(strides)} of {list(x)}")
    from_start, to_end, shrunk = (
        call.integer(f"{name}_mask") or 0 for name in ("begin", "end", "shrink_axis")
    )
    found: list[int] = []
    for at, (dim, start, stop, step) in enumerate(zip(x, begin, end, strides, strict=False)):
        bit = 1 << at
        if shrunk & bit:
            if not -dim <= start < dim:
                raise Misfit(f"the place {start} of the dim {at} of {list(x)}")
            continue
        cut = slice(None if from_start & bit else start, None if to_end & bit else stop, step)
        found.append(len(range(dim)[cut]))
    return {"y": [(*found, *x[len(begin) :])]}


def padded(call: Call) -> Shapes:
    """Pad, PadV3: numbers before and after each dim."""
    x, paddings = call.tensor("x").static, call.values("paddings")
    if x is None or paddings is None or len(paddings) != 2 * len(x):
        return None
    if call.op.type == "PadV3" and not call.flag("paddings_contiguous"):
        befores, afters = paddings[: len(x)], paddings[len(x) :]
    else:
        befores, afters = paddings[::2], paddings[1::2]
    sizes = zip(befores, x, afters, strict=True)
    return {"y": [tuple(before + dim + after for before, dim, after in sizes)]}


def pack(call: Call) -> Shapes:
    """Pack: tensors of one shape along a new axis."""
    shapes = [operand.tensor.static for operand in call.inputs.get("x", ())]
    known, axis = [shape for shape in shapes if shape is not None], call.integer("axis")
    if not known or len(known) < len(shapes) or axis is None:
        return None
    if len(set(known)) > 1:
        raise Misfit(f"{', '.join(str(list(shape)) for shape in known)} differ")
    at = axis_of((*known[0], 1), axis)
    return {"y": [(*known[0][:at], len(known), *known[0][at:])]}


def squeeze(call: Call) -> Shapes:
    """Squeeze: dims of 1 are taken away, those named or all."""
    x, axes = call.tensor("x").static, call.integers("axis")
    if x is None:
        return None
    gone = {axis_of(x, axis) for axis in axes or ()} or {at for at, dim in enumerate(x) if dim == 1}
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


def broadcast_to(call: Call) -> Shapes:
    """BroadcastTo: the stated shape, into which the input broadcasts."""
    x, wanted = call.tensor("x").static, call.values("shape")
    if x is None or wanted is None or -1 in wanted:
        return None
    if common([x, wanted]) != wanted:
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


MOVED: Mapping[str, Infer] = {
    "Reshape": reshape,
    **dict.fromkeys(("Transpose", "TransposeD"), transpose),
    **dict.fromkeys(("Concat", "ConcatV2", "ConcatD"), concat),
    **dict.fromkeys(("Split", "SplitD", "SplitV", "SplitVD"), split),
    **dict.fromkeys(("Gather", "GatherV2"), gather),
    "GatherNd": gather_nd,
    "GatherElements": gather_elements,
    **dict.fromkeys(("Slice", "SliceD"), sliced),
    **dict.fromkeys(("StridedSlice", "StridedSliceD"), strided),
    **dict.fromkeys(("Pad", "PadV3"), padded),
    "Pack": pack,
    "Squeeze": squeeze,
    **dict.fromkeys(("Unsqueeze", "ExpandDims"), unsqueeze),
    "BroadcastTo": broadcast_to,
    **dict.fromkeys(("Tile", "TileD"), tile),
}
"""Operators by type."""
