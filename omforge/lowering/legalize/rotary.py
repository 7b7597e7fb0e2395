"""RotaryEmbedding to NPURotaryMul where its documented limits hold, else to Mul, Neg and Concat.

Letters: B batch, S tokens, N heads, D head size, R rotated width (R <= D).

Both are `y = x * r1 + turned(x) * r2`. r1 and r2 are the cos and sin of the canonical op,
[B, S, R/2], at full width; they are made once for all layers that read the same cos and sin.
"""

from __future__ import annotations

from dataclasses import dataclass

from omforge import ir
from omforge.lowering.legalize.builder import (
    Builder,
    Dims,
    NotLegal,
    Results,
    dims,
    int_attribute,
    number,
    optional_input,
    required_input,
    shape_text,
)


@dataclass(frozen=True)
class _Rotation:
    """One RotaryEmbedding taken apart: `part` [B, S, N, R] or [B, N, S, R] is to be turned."""

    shape: Dims
    part: ir.Value
    rest: ir.Value | None
    cos: ir.Value
    sin: ir.Value
    interleaved: bool
    axis_of_heads: int


def rotary_decomposed(op: Builder, node: ir.Node) -> Results:
    """RotaryEmbedding (opset 23) of 3-D or 4-D input in standard operators."""
    of = _take_apart(op, node)
    turned = _turn_pairs(op, of.part) if of.interleaved else _turn_halves(op, of.part)
    return _put_together(op, of, op.add(op.mul(of.part, of.cos), op.mul(turned, of.sin)))


def rotary_mul(op: Builder, node: ir.Node) -> Results:
    """RotaryEmbedding as NPURotaryMul, within its documented limits.

    Source: hicann/ops-math:common/src/framework/npu_rotary_mul_onnx_plugin.cpp. The broadcast axes'
    product up to 1024 is read conservatively: S up to 1024.
    """
    of = _take_apart(op, node)
    if of.interleaved:
        raise NotLegal("it turns halves, not neighbouring pairs")
    if of.rest is not None:
        raise NotLegal("only a part of each head is turned")
    for view in op.at_gears(dims(of.part)):
        problem = _beyond_rotary_mul(view, of.axis_of_heads)
        if problem:
            raise NotLegal(problem)
    return _put_together(op, of, op.target_op("NPURotaryMul", of.part, of.cos, of.sin)[0])


def _beyond_rotary_mul(view: tuple[int, ...], axis_of_heads: int) -> str:
    batch, size = view[0], view[3]
    heads, tokens = view[axis_of_heads], view[3 - axis_of_heads]
    if size != 128:
        return f"heads of {size}, must be 128"
    if batch != 1:
        return f"a batch of {batch}: r1 and r2 broadcast over it, and the positions differ by row"
    if heads > 1000 or tokens > 1024:
        return f"{heads} heads and {tokens} tokens, must be up to 1000 and 1024"
    if axis_of_heads == 1 and heads > 8 * tokens:
        return f"{heads} heads of {tokens} tokens in [B, N, S, D], must be up to 8 a token"
    return ""


def rotary_position_embedding(op: Builder, node: ir.Node) -> Results:
    """RotaryEmbedding as NPURotaryPositionEmbedding: A2 and A3."""
    of = _take_apart(op, node)
    width = number(dims(of.part)[3], "the rotated width")
    if width > 896:
        raise NotLegal(f"a rotated width of {width}, must be up to 896")
    mode = 1 if of.interleaved else 0
    y = op.target_op("NPURotaryPositionEmbedding", of.part, of.cos, of.sin, mode=mode)[0]
    return _put_together(op, of, y)


def _take_apart(op: Builder, node: ir.Node) -> _Rotation:
    x, cos, sin = (required_input(node, index) for index in range(3))
    positions = optional_input(node, 3)
    shape = dims(x)
    if len(shape) == 3:
        heads = int_attribute(node, "num_heads", 0)
        if heads < 1:
            raise NotLegal("num_heads is required for 3-D input")
        batch, tokens, width = shape
        # Heads inside tokens: no transpose, and what NPURotaryMul asks for at S = 1.
        view, axis_of_heads = (batch, tokens, heads, width // heads), 2
    elif len(shape) == 4:
        view, axis_of_heads = shape, 1
    else:
        raise NotLegal(f"x has {len(shape)} dimensions, must have 3 or 4")
    size = number(view[3], "the head size")
    rotated = int_attribute(node, "rotary_embedding_dim", 0) or size
    interleaved = bool(int_attribute(node, "interleaved", 0))
    part, rest = op.reshape(x, view), None
    if rotated != size:
        part, rest = op.split(part, (rotated, size - rotated))
    r1, r2 = (
        _full_width(op, table, positions, interleaved, axis_of_heads, rotated)
        for table in (cos, sin)
    )
    return _Rotation(shape, part, rest, r1, r2, interleaved, axis_of_heads)


def _put_together(op: Builder, of: _Rotation, y: ir.Value) -> Results:
    if of.rest is not None:
        y = op.concat([y, of.rest], axis=-1)
    return (op.reshape(y, of.shape),)


def _full_width(
    op: Builder,
    table: ir.Value,
    positions: ir.Value | None,
    interleaved: bool,
    axis_of_heads: int,
    rotated: int,
) -> ir.Value:
    """Cos or sin [B, S, R/2] as [B, S, 1, R] (or [B, 1, S, R])."""

    def make() -> ir.Value:
        half = table if positions is None else op.gather(table, positions)
        if len(dims(half)) != 3 or dims(half)[2] * 2 != rotated:
            raise NotLegal(
                f"cos and sin are {shape_text(dims(half))}, must be [B, S, {rotated // 2}]"
            )
        batch, tokens, width = dims(half)
        if interleaved:
            single = op.reshape(half, (batch, tokens, width, 1))
            full = op.concat([single, single], axis=-1)
        else:
            full = op.concat([half, half], axis=-1)
        shape = [batch, tokens, 2 * width]
        shape.insert(axis_of_heads, 1)
        return op.reshape(full, shape)

    return op.shared(("rotary", table, positions, interleaved, axis_of_heads), make)


def _turn_halves(op: Builder, x: ir.Value) -> ir.Value:
    """(a, b) to (-b, a), a and b the halves of the last axis."""
    half = number(dims(x)[-1], "the rotated width") // 2
    left, right = op.split(x, (half, half))
    return op.concat([op.unary("Neg", right), left], axis=-1)


def _turn_pairs(op: Builder, x: ir.Value) -> ir.Value:
    """(a0, b0, a1, b1, ...) to (-b0, a0, -b1, a1, ...)."""
    shape = dims(x)
    left, right = op.split(op.reshape(x, (*shape[:-1], shape[-1] // 2, 2)), (1, 1))
    return op.reshape(op.concat([op.unary("Neg", right), left], axis=-1), shape)
