"""Standard ONNX operators (opset 16, as the dialect has them) in GE's operators.

Where GE has an operator with attributes and one with constant inputs, the form is that of ATC's own
ONNX plugins, unless it has no AI Core kernel (`air.kernels`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from omforge import ir
from omforge.air.ge_types import ge_number
from omforge.ir.values import constant
from omforge.lowering.emit.emission import (
    AttributeValue,
    Emission,
    NotEmittedError,
    Operand,
    Typed,
    dtype_text,
    typed,
)

Emit = Callable[[Emission, ir.Node], None]

_SAME = (
    *("Abs", "Neg", "Sqrt", "Reciprocal", "Tanh", "Sigmoid", "Erf", "Exp", "Log", "Floor"),
    *("Ceil", "Round", "Relu", "Cos", "Sin", "Sign", "Softplus", "Identity"),
)
_UNARY = {**{name: name for name in _SAME}, "Not": "LogicalNot"}
_BINARY = {
    **{name: name for name in ("Add", "Sub", "Mul", "Pow", "Equal", "Less", "Greater")},
    "Div": "RealDiv",
    "LessOrEqual": "LessEqual",
    "GreaterOrEqual": "GreaterEqual",
    "And": "LogicalAnd",
    "Or": "LogicalOr",
}
_VARIADIC = {"Max": "Maximum", "Min": "Minimum", "Sum": "Add"}
_REDUCTIONS = ("ReduceMean", "ReduceSum", "ReduceMax", "ReduceMin", "ReduceProd")


def _name(node: ir.Node) -> str:
    return node.name or node.op_type


def _one(
    to: Emission,
    node: ir.Node,
    op_type: str,
    operands: Mapping[str, Operand],
    attributes: Mapping[str, AttributeValue] | None = None,
) -> None:
    """A node as one operator, with its outputs."""
    to.add(op_type, _name(node), operands, list(node.outputs), attributes)


def _edges(to: Emission, node: ir.Node) -> list[str]:
    return [to.edge(value) for value in node.inputs]


def _integer(node: ir.Node, name: str, default: int) -> int:
    attribute = node.attributes.get(name)
    return default if attribute is None else attribute.as_int()


def _numbers(node: ir.Node, index: int) -> list[int] | None:
    """The numbers of a constant input; None where it is absent or computed."""
    value = node.inputs[index] if index < len(node.inputs) else None
    found = None if value is None else constant(value)
    return None if found is None else [int(item) for item in found.ravel()]


def _known(node: ir.Node, index: int, what: str) -> list[int]:
    found = _numbers(node, index)
    if found is None:
        raise NotEmittedError(f"its {what} are computed")
    return found


def _unary(op_type: str) -> Emit:
    return lambda to, node: _one(to, node, op_type, {"x": to.edge(node.inputs[0])})


def _binary(op_type: str) -> Emit:
    def emit(to: Emission, node: ir.Node) -> None:
        a, b = _edges(to, node)
        _one(to, node, op_type, {"x1": a, "x2": b})

    return emit


def _variadic(op_type: str) -> Emit:
    """A chain of pairs."""

    def emit(to: Emission, node: ir.Node) -> None:
        first, *rest = _edges(to, node)
        if not rest:
            to.alias(node.outputs[0], first)
            return
        for number, edge in enumerate(rest, start=1):
            last = number == len(rest)
            result = node.outputs[0] if last else _joined(to, first, edge)
            pair = {"x1": first, "x2": edge}
            (first,) = to.add(op_type, _name(node), pair, [result])

    return emit


def _joined(to: Emission, a: str, b: str) -> Typed:
    one, two = to.desc(a), to.desc(b)
    shape = np.broadcast_shapes(one.shape or (), two.shape or ())
    return Typed(one.dtype, tuple(int(dim) for dim in shape))


def _where(to: Emission, node: ir.Node) -> None:
    condition, then, other = _edges(to, node)
    _one(to, node, "SelectV2", {"condition": condition, "then": then, "else": other})


def _cast(to: Emission, node: ir.Node) -> None:
    made = dtype_text(node.outputs[0].dtype)
    _one(to, node, "Cast", {"x": to.edge(node.inputs[0])}, {"dst_type": ge_number(made)})


def _matmul(to: Emission, node: ir.Node) -> None:
    a, b = _edges(to, node)
    if any(len(to.desc(edge).shape or ()) < 2 for edge in (a, b)):
        raise NotEmittedError("it multiplies by a vector")
    _one(to, node, "BatchMatMulV2", {"x1": a, "x2": b}, {"adj_x1": False, "adj_x2": False})


def _gemm(to: Emission, node: ir.Node) -> None:
    scales = [node.attributes.get(name) for name in ("alpha", "beta")]
    if any(found is not None and found.as_float() != 1.0 for found in scales):
        raise NotEmittedError("it has an alpha or a beta")
    a, b, *c = _edges(to, node)
    attributes = {
        "transpose_x1": bool(_integer(node, "transA", 0)),
        "transpose_x2": bool(_integer(node, "transB", 0)),
    }
    bias = c[0] if c else ""
    if bias and len(to.desc(bias).shape or ()) == 1:
        _one(to, node, "MatMulV2", {"x1": a, "x2": b, "bias": bias}, attributes)
        return
    if not bias:
        _one(to, node, "MatMulV2", {"x1": a, "x2": b}, attributes)
        return
    like = typed(node.outputs[0])
    (y,) = to.add("MatMulV2", f"{_name(node)}/product", {"x1": a, "x2": b}, [like], attributes)
    _one(to, node, "Add", {"x1": y, "x2": bias})


def _softmax(to: Emission, node: ir.Node) -> None:
    axes = [_integer(node, "axis", -1)]
    _one(to, node, "SoftmaxV2", {"x": to.edge(node.inputs[0])}, {"axes": axes})


def _reshape(to: Emission, node: ir.Node) -> None:
    """The shape is what comes out; where gears leave several dims open, what the node says.

    There 0 keeps a dim, as it does for ATC's plugin, whose attribute goes with it.
    """
    x, shape = to.edge(node.inputs[0]), typed(node.outputs[0]).shape
    if shape.count(-1) <= 1:
        _one(to, node, "Reshape", {"x": x, "shape": to.constant(list(shape))})
        return
    told = _known(node, 1, "shape") if node.op_type == "Reshape" else [-1, -1]
    if told.count(-1) > 1 or _integer(node, "allowzero", 0):
        raise NotEmittedError(f"its result {list(shape)} has more than one open size")
    _one(to, node, "Reshape", {"x": x, "shape": to.constant(told)}, {"allowzero": 0})


def _trilu(to: Emission, node: ir.Node) -> None:
    """GE's Tril and Triu take the diagonal as an attribute."""
    diagonal = _known(node, 1, "diagonal")[0] if len(node.inputs) > 1 else 0
    op_type = "Triu" if _integer(node, "upper", 1) else "Tril"
    _one(to, node, op_type, {"x": to.edge(node.inputs[0])}, {"diagonal": diagonal})


def _unsqueeze(to: Emission, node: ir.Node) -> None:
    axes = _known(node, 1, "axes")
    _one(to, node, "Unsqueeze", {"x": to.edge(node.inputs[0])}, {"axes": axes})


def _squeeze(to: Emission, node: ir.Node) -> None:
    axes = _known(node, 1, "axes") if len(node.inputs) > 1 else []
    _one(to, node, "Squeeze", {"x": to.edge(node.inputs[0])}, {"axis": axes})


def _flatten(to: Emission, node: ir.Node) -> None:
    _reshape(to, node)


def _transpose(to: Emission, node: ir.Node) -> None:
    rank = len(typed(node.outputs[0]).shape)
    found = node.attributes.get("perm")
    perm = list(reversed(range(rank))) if found is None else list(found.as_ints())
    _one(to, node, "Transpose", {"x": to.edge(node.inputs[0]), "perm": to.constant(perm)})


def _concat(to: Emission, node: ir.Node) -> None:
    edges, axis = _edges(to, node), _integer(node, "axis", 0)
    rank = len(typed(node.outputs[0]).shape)
    attributes = {"concat_dim": axis % rank, "N": len(edges)}
    _one(to, node, "ConcatD", {"x": edges}, attributes)


def _split(to: Emission, node: ir.Node) -> None:
    axis = _integer(node, "axis", 0) % len(typed(node.outputs[0]).shape)
    sizes = [typed(value).shape[axis] for value in node.outputs]
    if -1 in sizes:
        raise NotEmittedError("the sizes of its parts are open")
    attributes = {"size_splits": sizes, "split_dim": axis, "num_split": len(sizes)}
    _one(to, node, "SplitVD", {"x": to.edge(node.inputs[0])}, attributes)


_FAR = 2**31 - 1


def _slice(to: Emission, node: ir.Node) -> None:
    """All axes, with constants: StridedSlice has a kernel, StridedSliceV2 none."""
    x = node.inputs[0]
    assert x is not None
    shape = typed(x).shape
    starts, ends = _known(node, 1, "starts"), _known(node, 2, "ends")
    axes = _numbers(node, 3)
    axes = list(range(len(starts))) if axes is None else axes
    steps = _numbers(node, 4) or [1] * len(starts)
    begin, end = [0] * len(shape), [size if size >= 0 else _FAR for size in shape]
    stride = [1] * len(shape)
    for axis, first, last, step in zip(axes, starts, ends, steps, strict=True):
        if step < 1:
            raise NotEmittedError("it goes backwards")
        at, size = axis % len(shape), shape[axis]
        if size < 0 and (first < 0 or last < 0):
            raise NotEmittedError("it counts from an end that is open")
        if size >= 0:
            first, last, _ = slice(first, last).indices(size)
        begin[at], end[at], stride[at] = first, min(last, _FAR), step
    bounds = {"begin": begin, "end": end, "strides": stride}
    operands = {"x": to.edge(x), **{name: to.constant(list_) for name, list_ in bounds.items()}}
    _one(to, node, "StridedSlice", operands)


def _gather(to: Emission, node: ir.Node) -> None:
    x, indices = _edges(to, node)
    axis = _integer(node, "axis", 0) % len(to.desc(x).shape or (0,))
    _one(to, node, "GatherV2", {"x": x, "indices": indices, "axis": to.constant([axis])})


def _gather_elements(to: Emission, node: ir.Node) -> None:
    x, index = _edges(to, node)
    _one(to, node, "GatherElements", {"x": x, "index": index}, {"dim": _integer(node, "axis", 0)})


def _gather_nd(to: Emission, node: ir.Node) -> None:
    if _integer(node, "batch_dims", 0):
        raise NotEmittedError("it gathers in batches")
    x, indices = _edges(to, node)
    _one(to, node, "GatherNd", {"x": x, "indices": indices})


def _reduce(op_type: str) -> Emit:
    def emit(to: Emission, node: ir.Node) -> None:
        x = node.inputs[0]
        assert x is not None
        found = node.attributes.get("axes")
        axes = _numbers(node, 1) if found is None else list(found.as_ints())
        rank = len(typed(x).shape)
        given = [axis % rank for axis in axes] if axes else list(range(rank))
        keep = bool(_integer(node, "keepdims", 1))
        operands = {"x": to.edge(x), "axes": to.constant(given)}
        _one(to, node, op_type, operands, {"keep_dims": keep})

    return emit


def _expand(to: Emission, node: ir.Node) -> None:
    shape = typed(node.outputs[0]).shape
    if -1 in shape:
        raise NotEmittedError(f"its result {list(shape)} is open")
    _one(to, node, "BroadcastTo", {"x": to.edge(node.inputs[0]), "shape": to.constant(list(shape))})


def _tile(to: Emission, node: ir.Node) -> None:
    repeats = to.constant(_known(node, 1, "repeats"))
    _one(to, node, "Tile", {"x": to.edge(node.inputs[0]), "multiples": repeats})


def _shape(to: Emission, node: ir.Node) -> None:
    made = ge_number(dtype_text(node.outputs[0].dtype))
    _one(to, node, "Shape", {"x": to.edge(node.inputs[0])}, {"dtype": made})


def _range(to: Emission, node: ir.Node) -> None:
    start, limit, delta = _edges(to, node)
    _one(to, node, "Range", {"start": start, "limit": limit, "delta": delta})


def _scatter_nd(to: Emission, node: ir.Node) -> None:
    reduction = node.attributes.get("reduction")
    if reduction is not None and reduction.as_string() != "none":
        raise NotEmittedError(f"it has the reduction {reduction.as_string()}")
    x, indices, updates = _edges(to, node)
    _one(to, node, "TensorScatterUpdate", {"x": x, "indices": indices, "updates": updates})


def _scatter_elements(to: Emission, node: ir.Node) -> None:
    data, indices, updates = _edges(to, node)
    found = node.attributes.get("reduction")
    attributes: dict[str, AttributeValue] = {
        "axis": _integer(node, "axis", 0),
        "reduction": "none" if found is None else found.as_string(),
    }
    operands = {"data": data, "indices": indices, "updates": updates}
    _one(to, node, "ScatterElements", operands, attributes)


def _top_k(to: Emission, node: ir.Node) -> None:
    """GE's indices are int32, whatever ONNX says: a Cast follows where others are read."""
    (count,) = _known(node, 1, "number of places")
    attributes = {
        "dim": _integer(node, "axis", -1),
        "largest": bool(_integer(node, "largest", 1)),
        "sorted": bool(_integer(node, "sorted", 1)),
    }
    operands = {"x": to.edge(node.inputs[0]), "k": to.constant(count, "int32")}
    narrow = Typed("int32", typed(node.outputs[1]).shape)
    edges = to.add("TopKV2", _name(node), operands, [node.outputs[0], narrow], attributes)
    wide = {"dst_type": ge_number("int64")}
    to.add("Cast", f"{_name(node)}/int64", {"x": edges[1]}, [node.outputs[1]], wide)


def _arg_max(to: Emission, node: ir.Node) -> None:
    """GE's kernels give int32."""
    x = node.inputs[0]
    assert x is not None
    like = typed(x)
    axis = _integer(node, "axis", 0) % len(like.shape)
    operands = {"x": to.edge(x), "dimension": to.constant(axis, "int32")}
    flat = like.shape[:axis] + like.shape[axis + 1 :]
    narrow = Typed("int32", flat)
    (found,) = to.add("ArgMaxV2", f"{_name(node)}/int32", operands, [narrow], {"dtype": "int32"})
    if _integer(node, "keepdims", 1):
        kept = Typed("int32", typed(node.outputs[0]).shape)
        axes = {"axes": [axis]}
        (found,) = to.add("Unsqueeze", f"{_name(node)}/kept", {"x": found}, [kept], axes)
    _one(to, node, "Cast", {"x": found}, {"dst_type": ge_number("int64")})


def _einsum(to: Emission, node: ir.Node) -> None:
    edges = _edges(to, node)
    attributes: dict[str, AttributeValue] = {
        "equation": node.attributes["equation"].as_string(),
        "N": len(edges),
    }
    _one(to, node, "Einsum", {"x": edges}, attributes)


def _cumsum(to: Emission, node: ir.Node) -> None:
    axis = to.constant(_known(node, 1, "axis")[0])
    options = {name: bool(_integer(node, name, 0)) for name in ("exclusive", "reverse")}
    _one(to, node, "Cumsum", {"x": to.edge(node.inputs[0]), "axis": axis}, options)


def _one_hot(to: Emission, node: ir.Node) -> None:
    indices, _, values = node.inputs[:3]
    assert values is not None
    found = constant(values)
    if found is None:
        raise NotEmittedError("its values are computed")
    dtype = dtype_text(values.dtype)
    off, on = (to.constant(number, dtype) for number in found.ravel())
    depth = to.constant(_known(node, 1, "depth")[0], "int32")
    operands = {"x": to.edge(indices), "depth": depth, "on_value": on, "off_value": off}
    _one(to, node, "OneHot", operands, {"axis": _integer(node, "axis", -1)})


def _clip(to: Emission, node: ir.Node) -> None:
    x, *bounds = _edges(to, node)
    low, high = (*bounds, "", "")[:2]
    if low and high:
        _one(to, node, "ClipByValue", {"x": x, "clip_value_min": low, "clip_value_max": high})
    else:
        _one(to, node, "Maximum" if low else "Minimum", {"x1": x, "x2": low or high})


def _mod(to: Emission, node: ir.Node) -> None:
    """Without fmod it is left only where neither operand is negative, and is the same."""
    a, b = _edges(to, node)
    _one(to, node, "Mod", {"x1": a, "x2": b})


def _pad(to: Emission, node: ir.Node) -> None:
    pads = np.asarray(_known(node, 1, "pads")).reshape(2, -1).T
    mode = node.attributes.get("mode")
    text = "constant" if mode is None else mode.as_string()
    fill = to.edge(node.inputs[2]) if len(node.inputs) > 2 and text == "constant" else ""
    operands = {
        "x": to.edge(node.inputs[0]),
        "paddings": to.constant(pads.tolist()),
        "constant_values": fill,
    }
    _one(to, node, "PadV3", operands, {"mode": text, "paddings_contiguous": True})


STANDARD: Mapping[str, Emit] = {
    **{name: _unary(op_type) for name, op_type in _UNARY.items()},
    **{name: _binary(op_type) for name, op_type in _BINARY.items()},
    **{name: _variadic(op_type) for name, op_type in _VARIADIC.items()},
    **{name: _reduce(name) for name in _REDUCTIONS},
    "ArgMax": _arg_max,
    "Cast": _cast,
    "Clip": _clip,
    "Concat": _concat,
    "CumSum": _cumsum,
    "Einsum": _einsum,
    "Expand": _expand,
    "Flatten": _flatten,
    "Gather": _gather,
    "GatherElements": _gather_elements,
    "GatherND": _gather_nd,
    "Gemm": _gemm,
    "MatMul": _matmul,
    "Mod": _mod,
    "OneHot": _one_hot,
    "Pad": _pad,
    "Range": _range,
    "Reshape": _reshape,
    "ScatterElements": _scatter_elements,
    "ScatterND": _scatter_nd,
    "Shape": _shape,
    "Slice": _slice,
    "Softmax": _softmax,
    "Split": _split,
    "Squeeze": _squeeze,
    "Tile": _tile,
    "TopK": _top_k,
    "Transpose": _transpose,
    "Trilu": _trilu,
    "Unsqueeze": _unsqueeze,
    "Where": _where,
}
"""By ONNX operator."""
