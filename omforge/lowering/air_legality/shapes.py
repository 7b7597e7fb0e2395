"""Shapes of results, as GE infers them, for the arithmetic of an LLM's graph.

Each function gives the shape of every output that it knows; None where the operands' shapes, or
values that decide, are not known. Operands that do not fit raise `Misfit`. Source: the operators'
InferShape in hicann/ops-math and hicann/ops-nn (op_host, *_infershape.cpp).
"""

from __future__ import annotations

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
        return {call.prototype.outputs[0].name: [common(known)]}

    return infer


def common(shapes: Sequence[Shape]) -> Shape:
    """What shapes broadcast to."""
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
        return {"y": [(*common([a[:-2], b[:-2]]), m, n)]}

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


def reduced(call: Call) -> Shapes:
    """ReduceSum and the like: the axes go, or become 1."""
    x = call.tensor("x").static
    axes = call.values("axes") if call.has("axes") else call.integers("axes")
    if x is None or not axes:
        return None
    gone = {axis_of(x, axis) for axis in axes}
    if call.flag("keep_dims"):
        return {"y": [tuple(1 if at in gone else dim for at, dim in enumerate(x))]}
    return {"y": [tuple(dim for at, dim in enumerate(x) if at not in gone)]}


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
    at = axis_of(x, axis)
    if k[0] > x[at]:
        raise Misfit(f"the {k[0]} largest of the dim {axis} of {list(x)}")
    found = (*x[:at], k[0], *x[at + 1 :])
    return {"values": [found], "indices": [found]}


def arg_max(call: Call) -> Shapes:
    """ArgMaxV2: without the axis."""
    x, axis = call.tensor("x").static, call.values("dimension")
    if x is None or axis is None or len(axis) != 1:
        return None
    at = axis_of(x, axis[0])
    return {"y": [(*x[:at], *x[at + 1 :])]}


def one_number(call: Call, name: str) -> int | None:
    """A number that is an attribute, or a constant input."""
    if not call.has(name):
        return call.integer(name)
    values = call.values(name)
    return values[0] if values is not None and len(values) == 1 else None


def axis_of(shape: Shape, axis: int) -> int:
    """An axis from the front."""
    at = axis + len(shape) if axis < 0 else axis
    if not 0 <= at < len(shape):
        raise Misfit(f"{list(shape)} has no axis {axis}")
    return at


_ALIKE = (
    "Relu Sigmoid Tanh Exp Log Sqrt Rsqrt Neg Abs Cast Identity Gelu GeluV2 FastGelu Swish Erf Sin "
    "Cos Round Floor Ceil Reciprocal TensorMove Tril Triu SoftmaxV2 LogSoftmaxV2 LogicalNot Cumsum "
    "Mish Elu Softplus HardSigmoid LeakyRelu Sign IsNan IsInf Square ClipByValue AscendQuant "
    "AscendQuantV2 AscendAntiQuant AscendAntiQuantV2 AscendDequant Muls Adds"
)
_PAIRS = (
    "Add Sub Mul Div RealDiv Maximum Minimum Pow FloorDiv FloorMod Mod Greater GreaterEqual Less "
    "LessEqual Equal NotEqual LogicalAnd LogicalOr BitwiseAnd BitwiseOr BitwiseXor"
)

COMPUTED: Mapping[str, Infer] = {
    **dict.fromkeys(_ALIKE.split(), of_first),
    **dict.fromkeys(_PAIRS.split(), broadcast("x1", "x2")),
    "SelectV2": broadcast("condition", "then", "else"),
    **dict.fromkeys(("MatMul", "MatMulV2", "MatMulV3"), matrices),
    **dict.fromkeys(("BatchMatMul", "BatchMatMulV2", "BatchMatMulV3"), product("adj_x1", "adj_x2")),
    **dict.fromkeys(
        ("ReduceSum", "ReduceSumD", "ReduceMean", "ReduceMeanD", "ReduceMax", "ReduceMin"), reduced
    ),
    "Fill": fill,
    "Shape": shape_of,
    "TopKV2": top_k,
    "ArgMaxV2": arg_max,
}
"""Operators by type; of another one no shape is known."""
