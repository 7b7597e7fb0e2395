"""Shapes that GE or a kernel refuses and ONNX's own inference does not, operator by operator.

Each rule sees the shapes as far as they are numbers, and says what does not fit. Sources: the
`*_infershape.cpp` of hicann/ops-math, ops-nn and ops-cv, and ONNX's text of the operator.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

from omforge import ir
from omforge.ir.values import dims
from omforge.lowering.own_op_shapes import OWN_OP_RULES
from omforge.lowering.value_bounds import inline_numbers, integers

Shape = tuple[int | None, ...]
Shapes = Sequence[Shape | None]
Rule = Callable[[ir.Node, Shapes], str]


def misfit_of_shapes(node: ir.Node, opset: int) -> str:
    """What does not fit, in words; "" where everything does, as far as it is known."""
    rule = _RULES.get(node.op_type) or OWN_OP_RULES.get(node.op_type)
    if rule is None:
        return ""
    return rule(node, [_numbers(value) for value in node.inputs])


def _numbers(value: ir.Value | None) -> Shape | None:
    shape = None if value is None else dims(value)
    return None if shape is None else tuple(d if isinstance(d, int) else None for d in shape)


def _at(shapes: Shapes, index: int) -> Shape | None:
    return shapes[index] if index < len(shapes) else None


def _differ(left: int | None, right: int | None) -> bool:
    return left is not None and right is not None and left != right


def _int(node: ir.Node, name: str, default: int) -> int:
    found = node.attributes.get(name)
    return default if found is None or not isinstance(found.value, int) else found.value


def _ints(node: ir.Node, name: str) -> list[int] | None:
    found = node.attributes.get(name)
    return None if found is None or found.type != ir.AttributeType.INTS else list(found.as_ints())


def _product(shape: Shape) -> int | None:
    sizes = [size for size in shape if size is not None]
    return math.prod(sizes) if len(sizes) == len(shape) else None


def _reshape(node: ir.Node, shapes: Shapes) -> str:
    x = _at(shapes, 0)
    target = integers(node.inputs[1]) if len(node.inputs) > 1 else _ints(node, "shape")
    if x is None or target is None:
        return ""
    count = _product(x)
    copied = [
        x[at] if size == 0 and at < len(x) and not _int(node, "allowzero", 0) else size
        for at, size in enumerate(target)
    ]
    fixed = [size for size in copied if size is not None and size != -1]
    if count is None or len(fixed) + (-1 in copied) != len(copied):
        return ""
    made = math.prod(fixed)
    fits = (
        count % made == 0
        if -1 in copied and made
        else count == made or (-1 in copied and not count)
    )
    return "" if fits else f"{count} elements do not make a shape of {target}"


def _conv(node: ir.Node, shapes: Shapes) -> str:
    x, w, b = _at(shapes, 0), _at(shapes, 1), _at(shapes, 2)
    group = _int(node, "group", 1)
    if x is None or w is None or len(x) < 2 or len(w) < 2:
        return ""
    if len(x) != len(w):
        return f"the input has {len(x)} axes, the weight {len(w)}"
    if w[1] is not None and _differ(x[1], w[1] * group):
        return f"{x[1]} channels are not {w[1]} of the weight by {group} groups"
    if w[0] is not None and w[0] % max(group, 1):
        return f"{w[0]} results do not come in {group} groups"
    if b is not None and (len(b) != 1 or _differ(b[0], w[0])):
        return f"the bias is not one number for each of {w[0]} results"
    kernel = _ints(node, "kernel_shape")
    if kernel is not None and any(_differ(k, size) for k, size in zip(kernel, w[2:], strict=False)):
        return f"kernel_shape {kernel} is not the weight's"
    return _window(node, x, [size for size in w[2:]])


def _pool(node: ir.Node, shapes: Shapes) -> str:
    x, kernel = _at(shapes, 0), _ints(node, "kernel_shape")
    if x is None or kernel is None:
        return ""
    if len(x) != len(kernel) + 2:
        return f"kernel_shape {kernel} is not of the {len(x) - 2} axes that are pooled"
    return _window(node, x, kernel)


def _window(node: ir.Node, x: Shape, kernel: Sequence[int | None]) -> str:
    """Whether the (dilated) kernel fits into the padded input."""
    auto = node.attributes.get("auto_pad")
    if auto is not None and str(auto.value) not in ("NOTSET", "VALID"):
        return ""
    rank = len(kernel)
    pads, dilations = _ints(node, "pads") or [0] * 2 * rank, _ints(node, "dilations") or [1] * rank
    if len(pads) != 2 * rank or len(dilations) != rank:
        return f"pads and dilations are not of {rank} axes"
    for at, (size, of, step) in enumerate(zip(x[2:], kernel, dilations, strict=False)):
        if size is None or of is None:
            continue
        if size + pads[at] + pads[at + rank] < (of - 1) * step + 1:
            return f"a kernel of {of} does not fit into {size}"
    return ""


def _conv_transpose(node: ir.Node, shapes: Shapes) -> str:
    x, w, b = _at(shapes, 0), _at(shapes, 1), _at(shapes, 2)
    group = _int(node, "group", 1)
    if x is None or w is None or len(x) < 2 or len(w) < 2:
        return ""
    if len(x) != len(w):
        return f"the input has {len(x)} axes, the weight {len(w)}"
    if _differ(x[1], w[0]):
        return f"{x[1]} channels are not the weight's {w[0]}"
    if b is not None and w[1] is not None and (len(b) != 1 or _differ(b[0], w[1] * group)):
        return f"the bias is not one number for each of {w[1] * group} results"
    return ""


def _gemm(node: ir.Node, shapes: Shapes) -> str:
    a, b, c = _at(shapes, 0), _at(shapes, 1), _at(shapes, 2)
    if a is None or b is None:
        return ""
    if len(a) != 2 or len(b) != 2:
        return "Gemm takes matrices"
    m, k = a if not _int(node, "transA", 0) else a[::-1]
    k2, n = b if not _int(node, "transB", 0) else b[::-1]
    if _differ(k, k2):
        return f"{k} columns meet {k2} rows"
    return "" if c is None else _unidirectional(c, (m, n))


def _unidirectional(small: Shape, large: Shape) -> str:
    """Whether a shape broadcasts to another one, and not beyond."""
    if len(small) > len(large):
        return f"{_told(small)} does not broadcast to {_told(large)}"
    for of, size in zip(reversed(small), reversed(large), strict=False):
        if of not in (1, None) and size is not None and of != size:
            return f"{_told(small)} does not broadcast to {_told(large)}"
    return ""


def _told(shape: Shape) -> str:
    return f"[{', '.join('?' if size is None else str(size) for size in shape)}]"


def _slope(node: ir.Node, shapes: Shapes) -> str:
    x, slope = _at(shapes, 0), _at(shapes, 1)
    return "" if x is None or slope is None else _unidirectional(slope, x)


def _einsum(node: ir.Node, shapes: Shapes) -> str:
    equation = node.attributes.get("equation")
    if equation is None or equation.type != ir.AttributeType.STRING:
        return ""
    terms = equation.as_string().replace(" ", "").partition("->")[0].split(",")
    if len(terms) != len(shapes):
        return f"{len(terms)} terms for {len(shapes)} inputs"
    sizes: dict[str, int] = {}
    for term, shape in zip(terms, shapes, strict=True):
        if shape is None or "..." in term:
            continue
        if len(term) != len(shape):
            return f"{term} is not of {len(shape)} axes"
        for letter, size in zip(term, shape, strict=True):
            if size is not None and size != 1 and sizes.setdefault(letter, size) != size:
                return f"{letter} is {sizes[letter]} and {size}"
    return ""


def _channels(node: ir.Node, shapes: Shapes) -> str:
    """BatchNormalization, InstanceNormalization: one number for each channel."""
    x = _at(shapes, 0)
    for shape in shapes[1:]:
        if x is None or shape is None or len(x) < 2:
            continue
        if len(shape) != 1 or _differ(shape[0], x[1]):
            return f"{_told(shape)} is not one number for each of {x[1]} channels"
    return ""


def _layer_norm(node: ir.Node, shapes: Shapes) -> str:
    x, axis = _at(shapes, 0), _int(node, "axis", -1)
    if x is None:
        return ""
    if not -len(x) <= axis < len(x):
        return f"axis {axis} of {len(x)} axes"
    for shape in shapes[1:]:
        if shape is not None and (problem := _unidirectional(shape, x)):
            return problem
    return ""


def _gather(node: ir.Node, shapes: Shapes) -> str:
    x, axis = _at(shapes, 0), _int(node, "axis", 0)
    if x is None:
        return ""
    if not -len(x) <= axis < len(x):
        return f"axis {axis} of {len(x)} axes"
    return _rows(node, x[axis])


def _rows(node: ir.Node, size: int | None) -> str:
    """Whether constant indices are inside the axis."""
    rows = inline_numbers(node.inputs[1]) if len(node.inputs) > 1 else None
    if rows is None or size is None or not rows.size:
        return ""
    low, high = int(rows.min()), int(rows.max())
    if low < -size or high >= size:
        return f"index {low if low < -size else high} of an axis of {size}"
    return ""


def _elements(node: ir.Node, shapes: Shapes) -> str:
    """GatherElements, ScatterElements: indices as long as the data at most, but along the axis."""
    x, indices, updates = _at(shapes, 0), _at(shapes, 1), _at(shapes, 2)
    axis = _int(node, "axis", 0)
    if x is None or indices is None:
        return ""
    if len(x) != len(indices):
        return f"the indices have {len(indices)} axes, the data {len(x)}"
    if not -len(x) <= axis < len(x):
        return f"axis {axis} of {len(x)} axes"
    for at, (size, of) in enumerate(zip(x, indices, strict=True)):
        if at != axis % len(x) and size is not None and of is not None and of > size:
            return f"indices {_told(indices)} go beyond {_told(x)}"
    if updates is not None and any(_differ(*pair) for pair in zip(updates, indices, strict=False)):
        return f"updates {_told(updates)} are not of the indices' shape {_told(indices)}"
    return _rows(node, x[axis])


def _scatter_nd(node: ir.Node, shapes: Shapes) -> str:
    x, indices, updates = _at(shapes, 0), _at(shapes, 1), _at(shapes, 2)
    if x is None or not indices or indices[-1] is None:
        return ""
    if indices[-1] > len(x):
        return f"indices of {indices[-1]} numbers for {len(x)} axes"
    wanted = (*indices[:-1], *x[indices[-1] :])
    if updates is not None and (
        len(updates) != len(wanted)
        or any(_differ(*pair) for pair in zip(updates, wanted, strict=True))
    ):
        return f"updates {_told(updates)} are not {_told(wanted)}"
    return ""


def _blocks(node: ir.Node, shapes: Shapes) -> str:
    x, block = _at(shapes, 0), _int(node, "blocksize", 0)
    if x is None or block < 1:
        return ""
    if len(x) != 4:
        return f"{len(x)} axes, not 4"
    if node.op_type == "DepthToSpace":
        return (
            "" if x[1] is None or x[1] % block**2 == 0 else f"{x[1]} channels in blocks of {block}"
        )
    if any(size is not None and size % block for size in x[2:]):
        return f"{_told(x[2:])} in blocks of {block}"
    return ""


def _axis_input(node: ir.Node, shapes: Shapes) -> str:
    """CumSum: the axis is a constant input."""
    x = _at(shapes, 0)
    axes = integers(node.inputs[1]) if len(node.inputs) > 1 else None
    if x is None or not axes:
        return ""
    return "" if -len(x) <= axes[0] < len(x) else f"axis {axes[0]} of {len(x)} axes"


def _softmax(node: ir.Node, shapes: Shapes) -> str:
    x, axis = _at(shapes, 0), _int(node, "axis", -1)
    if x is None or not x:
        return ""
    return "" if -len(x) <= axis < len(x) else f"axis {axis} of {len(x)} axes"


def _same_shape(node: ir.Node, shapes: Shapes) -> str:
    """Sum, Mean: AccumulateNV2 gives all of them the first one's shape."""
    first = _at(shapes, 0)
    for shape in shapes[1:]:
        if first is None or shape is None:
            continue
        if len(first) != len(shape) or any(_differ(*p) for p in zip(first, shape, strict=True)):
            return (
                f"{_told(shape)} is not of the first one's shape {_told(first)}: none is broadcast"
            )
    return ""


def _range(node: ir.Node, shapes: Shapes) -> str:
    numbers = [inline_numbers(value) for value in node.inputs]
    found = [array.ravel()[0] for array in numbers if array is not None and array.size == 1]
    if len(found) != 3:
        return ""
    start, limit, delta = found
    if delta == 0:
        return "delta is zero"
    return "" if (limit - start) * delta >= 0 else "it goes the other way than delta"


def _split(node: ir.Node, shapes: Shapes) -> str:
    x, axis = _at(shapes, 0), _int(node, "axis", 0)
    sizes = integers(node.inputs[1]) if len(node.inputs) > 1 else _ints(node, "split")
    if x is None or sizes is None or not -len(x) <= axis < len(x):
        return ""
    if len(sizes) != len(node.outputs):
        return f"{len(sizes)} sizes for {len(node.outputs)} outputs"
    whole = x[axis]
    if whole is not None and sum(sizes) != whole:
        return f"the sizes {sizes} do not add up to {whole}"
    return ""


def _sequence_lengths(node: ir.Node, shapes: Shapes) -> str:
    x, lengths = _at(shapes, 0), _at(shapes, 1)
    batch = _int(node, "batch_axis", 1)
    if x is None or lengths is None or not 0 <= batch < len(x):
        return ""
    fits = len(lengths) == 1 and not _differ(lengths[0], x[batch])
    return "" if fits else f"{_told(lengths)} is not one length for each of {x[batch]}"


def _expand(node: ir.Node, shapes: Shapes) -> str:
    x = _at(shapes, 0)
    target = integers(node.inputs[1]) if len(node.inputs) > 1 else None
    if x is None or target is None:
        return ""
    if len(target) < len(x):
        return f"the shape {target} has fewer numbers than the input's {len(x)} axes"
    for of, size in zip(reversed(x), reversed(target), strict=False):
        if of not in (1, None) and size not in (1, of):
            return f"{_told(x)} does not broadcast to {target}"
    return ""


def _pad(node: ir.Node, shapes: Shapes) -> str:
    x = _at(shapes, 0)
    pads = integers(node.inputs[1]) if len(node.inputs) > 1 else _ints(node, "pads")
    if x is None or pads is None or len(pads) != 2 * len(x):
        return ""
    if not x:
        return "a scalar has no axes"
    for size, before, behind in zip(x, pads[: len(x)], pads[len(x) :], strict=True):
        if size is not None and size + before + behind < 0:
            return f"{-before - behind} are taken away from {size}"
    return ""


def _tile(node: ir.Node, shapes: Shapes) -> str:
    x, repeats = _at(shapes, 0), _at(shapes, 1)
    if x is None or not repeats or repeats[0] is None:
        return ""
    if repeats[0] > 8:
        return f"{repeats[0]} axes, where Tile has 8 at most"
    return "" if repeats[0] == len(x) else f"{repeats[0]} repeats for {len(x)} axes"


_RULES: Mapping[str, Rule] = {
    "AveragePool": _pool,
    "BatchNormalization": _channels,
    "Conv": _conv,
    "ConvTranspose": _conv_transpose,
    "CumSum": _axis_input,
    "DepthToSpace": _blocks,
    "Einsum": _einsum,
    "Expand": _expand,
    "Gather": _gather,
    "GatherElements": _elements,
    "Gemm": _gemm,
    "Hardmax": _softmax,
    "InstanceNormalization": _channels,
    "LayerNormalization": _layer_norm,
    "LogSoftmax": _softmax,
    "LpPool": _pool,
    "MaxPool": _pool,
    "Mean": _same_shape,
    "PRelu": _slope,
    "Pad": _pad,
    "Range": _range,
    "Reshape": _reshape,
    "ReverseSequence": _sequence_lengths,
    "ScatterElements": _elements,
    "ScatterND": _scatter_nd,
    "Softmax": _softmax,
    "SpaceToDepth": _blocks,
    "Split": _split,
    "Sum": _same_shape,
    "Tile": _tile,
}
