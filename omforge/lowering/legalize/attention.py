"""Attention to MatMul and Softmax, without copying the cache.

Letters: B batch, S new tokens, C cache capacity, T = C + S keys, N query heads, K kv heads,
G = N/K query heads per kv head, D head size, E value head size.

Nothing is repeated for grouped heads: the G query heads of a kv head are rows of one matrix. The
scores against the past and against the new keys are computed apart and joined, so that the cache is
neither concatenated nor transposed::

    qt      = q as [B, K, D, G*S], scaled
    scores  = Concat(MatMul(past_k [B, K, C, D], qt), MatMul(k [B, K, S, D], qt))   [B, K, T, G*S]
    scores  = Transpose(scores)                      [B, K, G*S, T], rows g*S + s, = [B, N, S, T]
    p, n    = Split(Softmax(softcap(scores) + mask))
    y       = MatMul(p, past_v [B, K, C, E]) + MatMul(n, v [B, K, S, E])            [B, K, G*S, E]

In a graph for gears S is a symbol; of the shapes above no Reshape needs more than one -1 then.
With an attention sink (`passes.attention_sinks`) its column is joined to the masked scores, and its
share split off: neither the mask nor the keys are made wider for it. The forms that use ATC's fused
operators are in `fused_attention`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from omforge import ir
from omforge.ir.dims import Dim
from omforge.lowering.legalize.builder import (
    Builder,
    NotLegal,
    Results,
    dims,
    float_attribute,
    int_attribute,
    number,
    optional_input,
    required_input,
    shape_text,
    used_output,
)
from omforge.recognition.attention import sinks as attention_sinks

# What a masked score is set to where the graph gives no number of its own: finite in fp16 even
# after scores are added, and exp() of it is 0.
MASK_VALUE = -30000.0


@dataclass(frozen=True)
class Sizes:
    """The sizes of one attention, by the letters of the module; `new` and `keys` may be symbols."""

    batch: int
    new: Dim
    past: int
    query_heads: int
    kv_heads: int
    head: int
    value_head: int
    keys: Dim

    @property
    def group(self) -> int:
        """G, the query heads of a kv head."""
        return self.query_heads // self.kv_heads

    @property
    def rows(self) -> Dim:
        """G*S, the rows of one kv head's matrix."""
        return self.new * self.group


Shares = Callable[[Builder, ir.Node, ir.Value, Sizes], ir.Value]
"""From raw scores [B, K, G*S, T] to shares, [B, K, G*S, T] or [B, N, S, T]."""


def legalize_attention(op: Builder, node: ir.Node) -> Results:
    """One Attention (opset 23 and 24) as MatMul and Softmax."""
    return attend(op, node, masked_softmax)


def attend(op: Builder, node: ir.Node, shares_of: Shares) -> Results:
    """One Attention by two pairs of products, and whatever makes shares of scores."""
    size = check(node)
    q, k, v = (required_input(node, index) for index in range(3))
    past_key, past_value = optional_input(node, 4), optional_input(node, 5)
    sink = attention_sinks.find(node)
    if sink is not None:
        k, v = sink.key, sink.value

    # The scale goes to q, before the product: the raw scores of a long head overflow fp16.
    q = op.mul(q, scale(node, size))
    new_key = heads_first(op, k, size.kv_heads)
    new_value = heads_first(op, v, size.kv_heads)
    if past_key is None:
        scores = _scores_without_past(op, q, k, size)
    else:
        scores = _scores_with_past(op, q, past_key, new_key, size)
    shares = shares_of(op, node, scores, size)
    y = _weigh(op, shares, past_value, new_value, size)
    return (as_output(op, y, size, rank=len(dims(q))), *present(op, node, new_key, new_value))


def masked_softmax(op: Builder, node: ir.Node, scores: ir.Value, size: Sizes) -> ir.Value:
    """Softcap, mask and softmax, an operator each."""
    scores = _softcap(op, scores, float_attribute(node, "softcap", 0.0))
    scores = _mask(op, node, scores, size)
    precision = int_attribute(node, "softmax_precision", 0)
    sink = attention_sinks.find(node)
    if sink is None:
        return _softmax(op, scores, precision)
    by_head = op.reshape(scores, (size.batch, size.query_heads, size.new, size.keys))
    column = op.cast(sink.column, scores.dtype or ir.DataType.FLOAT)
    # In front of the keys, whose number may change at run time.
    shares = _softmax(op, op.concat([column, by_head], axis=-1), precision)
    return op.split(shares, (1, size.keys))[1]


def check(node: ir.Node) -> Sizes:
    """Return the sizes of an Attention that can be lowered.

    Raises:
        NotLegal: It cannot be; the message says why.
    """
    if optional_input(node, 6) is not None:
        raise NotLegal("nonpad_kv_seqlen is not supported: mask the padding instead")
    if used_output(node, 3):
        raise NotLegal("qk_matmul_output is read, and has no counterpart")
    q, k, v = (required_input(node, index) for index in range(3))
    past_key, past_value = optional_input(node, 4), optional_input(node, 5)
    sink = attention_sinks.find(node)
    if sink is not None:
        if used_output(node, 1) or used_output(node, 2):
            raise NotLegal("its present, with the row of an attention sink, is read")
        k, v = sink.key, sink.value
    if (past_key is None) != (past_value is None):
        raise NotLegal("past_key and past_value come together")
    return _sizes(node, q, k, v, past_key)


def scale(node: ir.Node, size: Sizes) -> float:
    """Return the factor of the scores."""
    return float_attribute(node, "scale", 0.0) or 1 / math.sqrt(size.head)


def _sizes(
    node: ir.Node, q: ir.Value, k: ir.Value, v: ir.Value, past_key: ir.Value | None
) -> Sizes:
    of_q, of_k, of_v = dims(q), dims(k), dims(v)
    past = 0 if past_key is None else number(dims(past_key)[2], "the cache's capacity")
    if len(of_q) == 3:
        query_heads = int_attribute(node, "q_num_heads", 0)
        kv_heads = int_attribute(node, "kv_num_heads", 0)
        if query_heads < 1 or kv_heads < 1:
            raise NotLegal("q_num_heads and kv_num_heads are required for 3-D inputs")
        new, keys = of_q[1], of_k[1]
        head, value_head = of_q[2] // query_heads, of_v[2] // kv_heads
    elif len(of_q) == 4:
        query_heads, new, head = number(of_q[1], "the number of heads"), of_q[2], of_q[3]
        kv_heads, keys, value_head = number(of_k[1], "the number of heads"), of_k[2], of_v[3]
    else:
        raise NotLegal(f"q has {len(of_q)} dimensions, must have 3 or 4")
    if query_heads % kv_heads:
        raise NotLegal(f"{kv_heads} kv heads do not divide {query_heads} query heads")
    return Sizes(
        number(of_q[0], "the batch"),
        new,
        past,
        query_heads,
        kv_heads,
        number(head, "the head size"),
        number(value_head, "the head size"),
        keys + past,
    )


def heads_first(op: Builder, x: ir.Value, heads: int) -> ir.Value:
    """Turn [B, S, H*D] or [B, H, S, D] into [B, H, S, D]."""
    shape = dims(x)
    if len(shape) == 4:
        return x
    batch, length, width = shape
    return op.transpose(op.reshape(x, (batch, length, heads, width // heads)), (0, 2, 1, 3))


def _scores_with_past(
    op: Builder, q: ir.Value, past_key: ir.Value, new_key: ir.Value, size: Sizes
) -> ir.Value:
    """The scores [B, K, G*S, T] against a cache that is read as it lies, [B, K, C, D]."""
    columns = (size.batch, size.kv_heads, size.head, size.rows)
    if len(dims(q)) == 4:
        rows = op.reshape(q, (size.batch, size.kv_heads, size.rows, size.head))
        turned = op.transpose(rows, (0, 1, 3, 2))
    elif size.new == 1:
        rows = op.reshape(q, (size.batch, size.kv_heads, size.group, size.head))
        turned = op.transpose(rows, (0, 1, 3, 2))
    elif size.group == 1:
        tokens = op.reshape(q, (size.batch, size.new, size.kv_heads, size.head))
        turned = op.transpose(tokens, (0, 2, 3, 1))
    else:
        tokens = op.reshape(q, (size.batch, size.new, size.kv_heads, size.group, size.head))
        turned = op.reshape(op.transpose(tokens, (0, 2, 4, 3, 1)), columns)
    scores = op.concat([op.matmul(past_key, turned), op.matmul(new_key, turned)], axis=-2)
    return op.transpose(scores, (0, 1, 3, 2))


def _scores_without_past(op: Builder, q: ir.Value, k: ir.Value, size: Sizes) -> ir.Value:
    rows = op.reshape(
        heads_first(op, q, size.query_heads), (size.batch, size.kv_heads, size.rows, size.head)
    )
    if op.front == "air":
        return op.matmul_turned(rows, heads_first(op, k, size.kv_heads))
    if len(dims(k)) == 4:
        turned = op.transpose(k, (0, 1, 3, 2))
    else:
        tokens = op.reshape(k, (size.batch, size.keys, size.kv_heads, size.head))
        turned = op.transpose(tokens, (0, 2, 3, 1))
    return op.matmul(rows, turned)


def _softcap(op: Builder, scores: ir.Value, cap: float) -> ir.Value:
    """Cap * tanh(scores / cap), before the mask as ONNX has it: masked stays masked."""
    if cap <= 0:
        return scores
    return op.mul(op.unary("Tanh", op.mul(scores, 1 / cap)), cap)


def _mask(op: Builder, node: ir.Node, scores: ir.Value, size: Sizes) -> ir.Value:
    mask = attention_sinks.mask_of(node)
    causal = _causal_bias(op, node, scores, size)
    if mask is None and causal is None:
        return scores
    per_head = False
    if mask is not None:
        of_mask = dims(mask)
        if len(of_mask) < 2 or of_mask[-1] != size.keys or of_mask[-2] not in (1, size.new):
            raise NotLegal(
                f"the mask {shape_text(of_mask)} does not fit {size.new} queries and "
                f"{size.keys} keys"
            )
        per_head = len(of_mask) > 2 and of_mask[-3] != 1
    if size.new != 1 or per_head:
        # Row g*S + s of kv head k is token s of query head k*G + g: the rows are heads and tokens.
        scores = op.reshape(scores, (size.batch, size.query_heads, size.new, size.keys))
    if causal is not None:
        scores = op.add(scores, causal)
    if mask is None:
        return scores
    if mask.dtype == ir.DataType.BOOL:
        fill = op.constant(MASK_VALUE, scores.dtype or ir.DataType.FLOAT)
        return op.where(mask, scores, fill)
    return op.add(scores, op.cast(mask, scores.dtype or ir.DataType.FLOAT))


def _causal_bias(op: Builder, node: ir.Node, scores: ir.Value, size: Sizes) -> ir.Value | None:
    """Query i sees key j if j <= i + C; None where that hides nothing."""
    if not int_attribute(node, "is_causal", 0):
        return None
    if not isinstance(size.keys, int) or not isinstance(size.new, int):
        raise NotLegal("is_causal over a length that changes at run time: give a mask")
    visible = np.arange(size.keys)[None, :] <= np.arange(size.new)[:, None] + size.past
    if visible.all():
        return None
    return op.constant(np.where(visible, 0.0, MASK_VALUE), scores.dtype or ir.DataType.FLOAT)


def _softmax(op: Builder, scores: ir.Value, precision: int) -> ir.Value:
    dtype = scores.dtype or ir.DataType.FLOAT
    if precision == ir.DataType.FLOAT:
        return op.cast(op.softmax(op.cast(scores, ir.DataType.FLOAT)), dtype)
    return op.softmax(scores)


def _weigh(
    op: Builder, shares: ir.Value, past_value: ir.Value | None, new_value: ir.Value, size: Sizes
) -> ir.Value:
    """The values [B, K, G*S, E] weighed by the shares [B, K, G*S, T] or [B, N, S, T]."""

    def rows(part: ir.Value) -> ir.Value:
        return op.reshape(part, (size.batch, size.kv_heads, size.rows, dims(part)[-1]))

    if past_value is None:
        return op.matmul(rows(shares), new_value)
    of_past, of_new = op.split(shares, (size.past, size.keys - size.past))
    return op.add(op.matmul(rows(of_past), past_value), op.matmul(rows(of_new), new_value))


def as_output(op: Builder, y: ir.Value, size: Sizes, rank: int) -> ir.Value:
    """Turn [B, K, G*S, E] into the output, [B, S, N*E] or [B, N, S, E]."""
    heads = op.reshape(y, (size.batch, size.query_heads, size.new, size.value_head))
    if rank == 4:
        return heads
    tokens = op.transpose(heads, (0, 2, 1, 3))
    return op.reshape(tokens, (size.batch, size.new, size.query_heads * size.value_head))


def present(
    op: Builder, node: ir.Node, new_key: ir.Value, new_value: ir.Value
) -> tuple[ir.Value | None, ir.Value | None]:
    """Return the whole present cache, where something reads it (after fuse-kv-io nothing does)."""
    made: list[ir.Value | None] = []
    for index, new in ((1, new_key), (2, new_value)):
        past = optional_input(node, 3 + index)
        if not used_output(node, index):
            made.append(None)
        else:
            made.append(new if past is None else op.concat([past, new], axis=-2))
    return made[0], made[1]
