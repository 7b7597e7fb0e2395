"""One attention as fuse-attention raises it, whether it is written out or an `Attention` already.

Exporters of opset 23 and above write `Attention` themselves, in their own way::

    k4 = view(Concat(past_k, k))                             # the cache outside, heads repeated
    y  = Attention<scale=s>(q4, k4, view(Concat(past_v, v)), mask)
    y  = Where(Less(ReduceSum(seen), 1), 0, y)               # a guard for rows that see nothing

Canonical is what `fuse_attention` makes of it: q, k and v [B, S, N*D], the cache inside, no guard.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass

import numpy as np

from omforge import ir
from omforge.ir.dims import Dim
from omforge.ir.infer import infer_nodes
from omforge.ir.values import attribute, dims
from omforge.recognition.attention import sinks as attention_sinks
from omforge.recognition.attention.masks import Applied
from omforge.recognition.attention.operands import operands
from omforge.recognition.attention.scores import (
    DYNAMIC,
    Mixed,
    Scores,
    check_shapes,
    find_mixed,
    find_scores,
    joined_heads,
    row_guard,
    text,
)
from omforge.recognition.views import shape_of
from omforge.rewriting.builder import Builder
from omforge.rewriting.match import NoMatch
from omforge.rewriting.splice import Names, insert

_PRODUCTS = ("MatMul", "Gemm", "Attention", "MatMulNBits")
"""Behind one of these is another layer."""


@dataclass(frozen=True)
class Block:
    """One attention.

    Attributes:
        root: The Softmax or the `Attention`.
        q: [B, N, S, D], or [B*N, S, D] where the heads are joined to the batch.
        k: [B, K, T, D]; the last two axes swapped where `turned`; [B*N, ...] where `joined`.
        v: [B, K, T, E], or [B*N, T, E].
        heads: N.
        joined: Whether the heads are joined to the batch.
        turned: Whether the keys are as a product takes them.
        grouped: Whether K may be any divisor of N; for a product it is N or 1.
        scores: Scale, softcap, masks and the softmax's precision.
        mixed: The output, and what zeroes rows of it.
        pasts: Keys and values that the operator itself puts before k and v; empty without.
        presents: What it returns of them.
        causal: Whether the operator hides later keys itself, and nothing else does.
    """

    root: ir.Node
    q: ir.Value
    k: ir.Value
    v: ir.Value
    heads: int
    joined: bool
    turned: bool
    grouped: bool
    scores: Scores
    mixed: Mixed
    pasts: tuple[ir.Value, ...] = ()
    presents: tuple[ir.Value, ...] = ()
    causal: bool = False


def from_softmax(softmax: ir.Node, live: set[ir.Value], batch: Dim) -> Block:
    """The attention around a Softmax.

    Raises:
        NoMatch: It is none.
    """
    scores = find_scores(softmax, live)
    mixed = find_mixed(softmax, live, sink=scores.sink is not None)
    check_shapes(softmax, scores, mixed, batch)
    read = softmax.inputs[0]
    gated = None if read is None else attention_sinks.gate(mixed.output, read, live)
    if gated is not None and scores.sink is None and not mixed.guards:
        scores.sink, mixed.output = gated
    q, k = operands(scores.product)
    _, v = operands(mixed.product)
    heads, joined = _heads(q, batch)
    return Block(softmax, q, k, v, heads, joined, True, False, scores, mixed)


def _heads(q: ir.Value, batch: Dim) -> tuple[int, bool]:
    """N of queries [B, N, S, D] or [B*N, S, D], and whether it is the latter."""
    shape = dims(q)
    if shape is not None and len(shape) == 4 and isinstance(shape[1], int):
        return shape[1], False
    if shape is not None and len(shape) == 3:
        heads = joined_heads(q, batch)
        if heads is not None:
            return heads, True
    raise NoMatch(f"the queries are {text(shape)}, not [B, N, S, D]", q)


# --- an Attention that the exporter wrote -----------------------------------------------------


def is_canonical(node: ir.Node, caches: Collection[ir.Value]) -> bool:
    """Whether an `Attention` is as fuse-attention leaves one.

    Args:
        node: The operator.
        caches: The inputs of the graph that are keys and values of earlier tokens.
    """
    q, k, v = node.inputs[:3]
    if any(len(shape_of(value)) != 3 for value in (q, k, v)) or _given(node, 6) is not None:
        return False
    # Both: keys alone are made of a cache where it holds what they are computed from (MLA).
    if _given(node, 4) is None and all(reads(value, caches) for value in (k, v)):
        return False
    return not row_guard(node.outputs[0], None).guards


def reads(value: ir.Value | None, caches: Collection[ir.Value]) -> bool:
    """Whether a value is made of a cache otherwise than by another layer."""
    pending, seen = [value], set[ir.Value]()
    while pending:
        value = pending.pop()
        if value is None or value in seen:
            continue
        if value in caches:
            return True
        seen.add(value)
        node = value.producer()
        if node is not None and node.op_type == "Gather":
            pending.append(node.inputs[0])  # of heads, unlike the embedding's, a cache may be read
        elif node is not None and node.op_type not in (*_PRODUCTS, "Shape"):
            pending += node.inputs
    return False


def from_operator(op: Builder, node: ir.Node, live: set[ir.Value], names: Names) -> Block:
    """What an `Attention` is.

    Args:
        op: Records the split of heads that 3-D inputs do not have yet.
        node: The operator.
        live: What depends on tokens.
        names: The model's names.

    Raises:
        NoMatch: Something of it has no place in the canonical form.
    """
    if _given(node, 6) is not None:
        raise NoMatch("its cache has a fixed capacity already (nonpad_kv_seqlen)", node)
    if len(node.outputs) > 3 and _is_used(node.outputs[3]):
        raise NoMatch("its scores (qk_matmul_output) are read", node)
    q, k, v = (_split(op, node, index) for index in range(3))
    shape = shape_of(q)
    heads, size = (shape[1], shape[3]) if len(shape) == 4 else (None, None)
    if not isinstance(heads, int) or not isinstance(size, int):
        raise NoMatch(f"the queries are {text(dims(q))}, not [B, N, S, D]", node)
    pasts = tuple(value for value in (_given(node, 4), _given(node, 5)) if value is not None)
    presents = tuple(node.outputs[1:3])
    if not pasts and any(map(_is_used, presents)):
        raise NoMatch("it returns keys and values of earlier tokens, and takes none", node)
    scores = Scores(
        node,
        scale=attribute(node, "scale", None) or 1 / math.sqrt(size),
        softcap=attribute(node, "softcap", 0.0),
        precision=attribute(node, "softmax_precision", 0) or None,
    )
    causal = bool(attribute(node, "is_causal", 0))
    mask = _given(node, 3)
    if mask is not None:
        if mask in live:
            raise NoMatch(DYNAMIC, node)
        scores.applied.append((_applied(mask), node))
        if causal:
            seen = _causal(op.model, node, pasts, names)
            scores.applied.append((_applied(seen), node))
            causal = False
    mixed = row_guard(node.outputs[0], live)
    return Block(
        *(node, q, k, v, heads, False, False, True),
        *(scores, mixed, pasts, presents if pasts else (), causal),
    )


def _given(node: ir.Node, index: int) -> ir.Value | None:
    return node.inputs[index] if index < len(node.inputs) else None


def _is_used(value: ir.Value) -> bool:
    return value.is_graph_output() or bool(value.uses())


def _applied(mask: ir.Value) -> Applied:
    boolean = mask.dtype == ir.DataType.BOOL
    return Applied(mask, -math.inf if boolean else None, by_operator=True)


def _split(op: Builder, node: ir.Node, index: int) -> ir.Value:
    """Queries, keys or values by head: 3-D inputs are split as the operator does."""
    value = node.inputs[index]
    shape = shape_of(value)
    if value is None or len(shape) != 3:
        if value is None or len(shape) != 4:
            raise NoMatch(f"its inputs are {text(shape)}, neither 3-D nor 4-D", node)
        return value
    heads = attribute(node, "kv_num_heads" if index else "q_num_heads", 0)
    if not heads or not isinstance(shape[2], int) or shape[2] % heads:
        raise NoMatch(f"{heads} heads do not divide {text(shape)}", node)
    start = len(op.nodes)
    split = op.Transpose(op.Reshape(value, [0, 0, heads, shape[2] // heads]), perm=[0, 2, 1, 3])
    infer_nodes(op.nodes[start:], op.model.opset_imports)
    return split


def _causal(model: ir.Model, node: ir.Node, pasts: tuple[ir.Value, ...], names: Names) -> ir.Value:
    """What `is_causal` lets through, boolean [S, T]: query i sees the key j <= i + P."""
    op = Builder(model)
    axis = len(shape_of(node.inputs[0])) - 2
    seq = op.Shape(node.inputs[0], start=axis, end=axis + 1)
    total = op.Shape(node.inputs[1], start=axis, end=axis + 1)
    offset = op.constant(np.array(0, dtype=np.int64))
    if pasts:
        past = op.Shape(pasts[0], start=2, end=3)
        total, offset = op.Add(past, total), op.Squeeze(past)
    whole = op.Expand(op.constant(np.array(True)), op.Concat(seq, total, axis=0))
    seen = op.Trilu(whole, offset, upper=0)
    insert(op, node, by="fuse-attention", names=names)
    return seen
