"""RotaryEmbedding to NPURotaryMul where its documented limits hold, else to Mul, Neg and Concat.

Letters: B batch, S tokens, N heads, D head size, R rotated width (R <= D).

Both are `y = x * r1 + turned(x) * r2`. r1 and r2 are the cos and sin of the canonical op,
[B, S, R/2], at full width; they are made once for all layers that read the same cos and sin.
"""

from __future__ import annotations

from omforge import ir
from omforge.lowering.legalize.builder import (
    Builder,
    NotLegal,
    dims,
    int_attribute,
    optional_input,
    required_input,
)


def legalize_rotary_embedding(op: Builder, node: ir.Node) -> None:
    """Replace one RotaryEmbedding (opset 23) of 3-D or 4-D input."""
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
        batch, heads, tokens, _ = shape
        view, axis_of_heads = shape, 1
    else:
        raise NotLegal(f"x has {len(shape)} dimensions, must have 3 or 4")
    size = view[3]
    rotated = int_attribute(node, "rotary_embedding_dim", 0) or size
    interleaved = bool(int_attribute(node, "interleaved", 0))

    split_heads = op.reshape(x, view)
    part, rest = split_heads, None
    if rotated != size:
        part, rest = op.split(split_heads, (rotated, size - rotated))
    r1, r2 = (
        _full_width(op, table, positions, interleaved, axis_of_heads, rotated)
        for table in (cos, sin)
    )
    fused = not interleaved and rest is None and _fits_rotary_mul(op, view, axis_of_heads)
    if fused:
        y = op.target_op("NPURotaryMul", part, r1, r2)
    else:
        turned = _turn_pairs(op, part) if interleaved else _turn_halves(op, part)
        y = op.add(op.mul(part, r1), op.mul(turned, r2))
    if rest is not None:
        y = op.concat([y, rest], axis=-1)
    op.commit(op.reshape(y, shape))


def _fits_rotary_mul(op: Builder, view: tuple[int, ...], axis_of_heads: int) -> bool:
    """The documented limits (hicann/ops-math:common/src/framework/npu_rotary_mul_onnx_plugin.cpp).

    D = 128; r1 and r2 broadcast over batch, so B = 1; N <= 1000; the broadcast axes' product and
    (read conservatively) S up to 1024; [B, N, S, D] not with B*N > 8*S.
    """
    batch, size = view[0], view[3]
    heads, tokens = view[axis_of_heads], view[3 - axis_of_heads]
    if not op.target.has("NPURotaryMul") or size != 128 or batch != 1:
        return False
    if heads > 1000 or tokens > 1024:
        return False
    return axis_of_heads == 2 or heads <= 8 * tokens


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
            raise NotLegal(f"cos and sin are {list(dims(half))}, must be [B, S, {rotated // 2}]")
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
    half = dims(x)[-1] // 2
    left, right = op.split(x, (half, half))
    return op.concat([op.unary("Neg", right), left], axis=-1)


def _turn_pairs(op: Builder, x: ir.Value) -> ir.Value:
    """(a0, b0, a1, b1, ...) to (-b0, a0, -b1, a1, ...)."""
    shape = dims(x)
    left, right = op.split(op.reshape(x, (*shape[:-1], shape[-1] // 2, 2)), (1, 1))
    return op.reshape(op.concat([op.unary("Neg", right), left], axis=-1), shape)
