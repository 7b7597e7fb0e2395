"""Raise one attention block to `Attention`, found from its Softmax outwards.

Before (one of many spellings; `view` is any chain of Reshape, Transpose, Expand and the like)::

    scores = Add(MatMul(view(q) * s, view(Concat(past_k, view(k)))), mask)
    out    = MatMul(Softmax(scores), view(Concat(past_v, view(v))))

After::

    y, present_k, present_v = Attention<q_num_heads=N, kv_num_heads=K, scale=s>(
        q, k, v, mask, past_k, past_v)
    out = Transpose<perm=[0,2,1,3]>(Reshape(y, [B, S, N, D]))

with q [B, S, N*D], k and v [B, S, K*D]. The heads' split, the repeat of grouped keys and the
transposes are found by running them on an index tensor, the mask by running it on chosen paddings.
`Attention` scales, caps, masks and takes the softmax, in this order; another order is left alone.
An `Attention` that the exporter wrote is raised in the same way (`attention_block`), and a score
that belongs to no key becomes one more key (`attention_sinks`).
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np

from omforge import ir
from omforge.ir.edit import remove_dead
from omforge.ir.infer import infer_model, infer_nodes
from omforge.recognition.attention import masks
from omforge.recognition.attention import sinks as attention_sinks
from omforge.recognition.attention.block import (
    Block,
    from_operator,
    from_softmax,
    is_canonical,
    reads,
)
from omforge.recognition.attention.masks import Applied
from omforge.recognition.attention.operands import Operand, last, operand, plain, queries, reordered
from omforge.recognition.interface import Interface, activations, find_interface
from omforge.recognition.views import shape_of, trace
from omforge.rewriting.base import Pass
from omforge.rewriting.builder import Builder
from omforge.rewriting.events import record
from omforge.rewriting.match import NoMatch
from omforge.rewriting.splice import Names, insert, splice, withdraw


@dataclass(frozen=True)
class FuseAttention(Pass):
    """Fuse attention blocks: multi-head and grouped, cached or not, scaled, softcapped, masked."""

    name: ClassVar[str] = "fuse-attention"

    def run(self, model: ir.Model) -> int:
        """Fuse; the number of blocks raised. A Softmax that stays is an event."""
        infer_model(model)
        roots = [node for node in model.graph if node.op_type in _ROOTS and node.domain == ""]
        roots = [node for node in roots if not _is_router(node)]
        if not roots:
            return 0
        try:
            interface = find_interface(model)
        except ir.InputError as error:  # any ONNX model may go through a pipeline
            record(model, self.name, "the whole graph", str(error))
            return 0
        names = Names(model)
        live = activations(model)
        made = _Masks(model, interface, names)
        count, own = 0, set(model.graph)
        for root in roots:
            if root.op_type == "Attention" and is_canonical(root, made.caches):
                continue
            try:
                _fuse(model, root, live, made, names)
            except NoMatch as miss:
                record(model, self.name, root, str(miss))
            else:
                count += 1
        if count:
            remove_dead(model)
        else:
            withdraw(model.graph, own)  # masks that were made for nothing
        return count


_ROOTS = ("Softmax", "Attention")


def _is_router(node: ir.Node) -> bool:
    """Whether a softmax is over the scores of experts, chosen before it or behind it."""
    if node.op_type != "Softmax" or node.inputs[0] is None:
        return False
    before = trace(node.inputs[0]).source.producer()
    behind = [user.op_type for user in node.outputs[0].consumers()]
    return "TopK" in behind or (before is not None and before.op_type == "TopK")


def _fuse(model: ir.Model, root: ir.Node, live: set[ir.Value], made: _Masks, names: Names) -> None:
    with Builder(model) as op:
        if root.op_type == "Softmax":
            block = from_softmax(root, live, made.batch)
        else:
            block = from_operator(op, root, live, names)
        _replace(op, block, made, names)


def _replace(op: Builder, block: Block, made: _Masks, names: Names) -> None:
    root, q, k, v, heads = block.root, block.q, block.k, block.v, block.heads
    scores, mixed = block.scores, block.mixed
    widened = v
    if scores.precision is not None:
        v = _narrow(v, q.dtype)
    if q.dtype is None or not q.dtype == k.dtype == v.dtype:
        raise NoMatch(f"queries are {q.dtype}, keys {k.dtype} and values {v.dtype}", q)
    size = last(q)
    query, factor = queries(op, q, heads, size, joined=block.joined)
    key, value = _keys_and_values(op, block, v, size, made.caches)
    scale = scores.scale * factor * key.factor
    if scale <= 0:
        raise NoMatch(f"its scale is {scale:g}, and `Attention` takes a positive one", root)
    mask = made.get(op, block, query, key)
    if key.strided:
        _require_equal_heads(block, mask)
        query = reordered(op, query, heads // key.heads, key.heads, size)
    pasts = [key.past, value.past] if key.past is not None else []
    new_key, new_value = key.new, value.new
    if scores.sink is not None:
        new_key, new_value, mask = made.with_sink(op, block, key, value, mask)
    inputs = [query, new_key, new_value, *([mask] if mask is not None or pasts else []), *pasts]
    options: dict[str, Any] = {
        "q_num_heads": heads,
        "kv_num_heads": key.heads,
        "scale": scale,
        "softcap": scores.softcap or None,
        "softmax_precision": scores.precision,
        "is_causal": 1 if block.causal else None,
    }
    attention = op.node("Attention", inputs, options, outputs=1 + len(pasts))
    y, *presents = attention.outputs
    if key.strided:
        y = reordered(op, y, key.heads, heads // key.heads, value.size)
    # Queries and keys may be joined for their product alone.
    joined = block.joined and len(shape_of(mixed.product.outputs[0])) == 3
    if len(shape_of(mixed.output)) == 3 and not joined:
        output = y
    else:
        split = op.Reshape(y, [0, 0, heads, value.size])
        output = op.Transpose(split, perm=[0, 2, 1, 3])
    if joined:
        tail = np.array([value.size], dtype=np.int64)
        seq = op.Shape(query, start=1, end=2)
        output = op.Reshape(output, op.Concat(np.array([-1]), seq, tail, axis=0))
    if widened is not v:
        output = op.Cast(output, to=int(widened.dtype or ir.DataType.FLOAT))
    by = FuseAttention.name
    if key.past is None and not pasts and all(reads(x, made.caches) for x in (block.k, block.v)):
        why = "its keys and values are made of the cache and not the cache itself, as heads are"
        record(op.model, by, root, f"{why} that are repeated in another order: it stays outside")
    old = [mixed.output, *block.presents]
    splice(op, old, [output, *presents][: len(old)], by=by, matched=[root], names=names)
    # What comes out behind a sink has a row too many; the exporter's own joins stay.
    if not block.presents and scores.sink is None:
        for present, new in zip((key.present, value.present), presents, strict=False):
            if present is not None:
                _hand_over(op.graph, present, new, names)


def _keys_and_values(
    op: Builder, block: Block, v: ir.Value, size: int, caches: Collection[ir.Value]
) -> tuple[Operand, Operand]:
    """Its operands, both with a cache or both without, of as many heads."""
    heads, grouped = block.heads, block.grouped
    key = operand(op, block.k, heads, size, keys=True, turned=block.turned, grouped=grouped)
    value = operand(op, v, heads, last(v), keys=False, turned=False, grouped=grouped)
    outside = key.past is not None or value.past is not None
    if block.pasts and outside:
        raise NoMatch("it has a cache of its own behind one that is joined outside", block.root)
    kept = shape_of(block.pasts[0])[1] if block.pasts else key.heads
    alike = key.heads == value.heads == kept and key.strided == value.strided
    if not alike or (key.past is None) != (value.past is None):
        key = plain(op, block.k, heads, turned=block.turned)
        value = plain(op, v, heads, turned=False)
    if block.causal and key.past is not None:
        raise NoMatch(
            "it hides later keys by itself (is_causal), counting from the first key of a cache "
            "that is joined outside: its first new token sees one key",
            block.root,
        )
    inside = key.past is not None or block.pasts
    if block.grouped and not inside and any(reads(value, caches) for value in (block.k, v)):
        raise NoMatch("its keys or values are made of the cache, and not the cache itself", v)
    if block.pasts:
        key, value = (
            replace(o, past=past) for o, past in zip((key, value), block.pasts, strict=True)
        )
    return key, value


def _require_equal_heads(block: Block, mask: ir.Value | None) -> None:
    """Refuse what is by head where heads change places: a bias, or a sink."""
    by_head = mask is not None and shape_of(mask)[-3:-2] not in ((), (1,))
    if by_head or block.scores.sink is not None:
        raise NoMatch(
            "query head n reads key head n mod K, and what is added to its scores is by head",
            block.root,
        )


def _narrow(value: ir.Value, dtype: ir.DataType | None) -> ir.Value:
    """What a value was widened from for the product, if that has a dtype."""
    node = value.producer()
    source = node.inputs[0] if node is not None and node.op_type == "Cast" else None
    return source if source is not None and source.dtype == dtype else value


def _hand_over(graph: ir.Graph, old: ir.Value, new: ir.Value, names: Names) -> None:
    """Let `new` be the graph output that `old` is, its name included.

    Only the output moves: another reader of `old` (its Shape, in a mask; a layer that shares the
    cache) may come before the attention, and keeps what it has.
    """
    for index, output in enumerate(graph.outputs):
        if output is old:
            name = old.name
            old.name = names.unique(f"{name}_joined")
            new.name = name
            new.type, new.shape = old.type, old.shape
            graph.outputs[index] = new


# --- masks ------------------------------------------------------------------------------------

_KEPT = "its mask is kept as it stands"


def _is_joined(block: Block, node: ir.Node) -> bool:
    """Whether the node that applies a mask has the heads joined to the batch."""
    return node is not block.root and len(shape_of(node.outputs[0])) == 3


class _Masks:
    """Canonical masks by the exported ones they come from: layers share them."""

    def __init__(self, model: ir.Model, interface: Interface, names: Names) -> None:
        self._model = model
        self.batch = shape_of(interface.input_ids)[0]
        self.caches = {past for past, _ in interface.caches}
        self._interface = interface
        self._names = names
        self._prober = masks.Prober(model, interface)
        self._kinds: dict[tuple[Any, ...], masks.Mask | NoMatch] = {}
        self._made: dict[tuple[masks.Mask, ir.DataType], ir.Value] = {}

    def get(
        self,
        op: Builder,
        block: Block,
        query: ir.Value,
        key: Operand,
    ) -> ir.Value | None:
        """The mask to attach: rebuilt where it is recognised, else as it stands."""
        mixed, dtype = block.mixed, block.q.dtype
        assert dtype is not None
        applied = [
            replace(mask, joined=block.heads if _is_joined(block, node) else 0)
            for mask, node in reversed(block.scores.applied)
        ]
        if not applied:
            if mixed.guards:
                raise NoMatch("rows are zeroed though nothing is masked", mixed.guards[0])
            return None
        kind = self._kind(applied, mixed.guards)
        if isinstance(kind, masks.Mask) and block.scores.sink is not None:
            kind = replace(kind, zero_rows=False)  # the sink takes all of a row without keys
        if isinstance(kind, NoMatch):
            alone = applied == [Applied(mask.value) for mask in applied]
            # Behind a cache the runtime makes the masks: of several, it may know one.
            alone &= len(applied) == 1 or not self.caches
            if mixed.guards or not (alone or (len(applied) == 1 and applied[0].by_operator)):
                raise kind
            if not alone:  # what an operator took, another of its kind takes
                record(self._model, FuseAttention.name, block.root, f"{_KEPT}: {kind}")
                return applied[0].value
            added = [mask.value for mask in applied]
            return self._as_it_stands(op, added, kind, query, key, dtype)
        made = (kind, dtype)
        if made not in self._made:
            with Builder(self._model) as own:
                self._made[made] = masks.build(own, self._interface, kind, dtype)
                insert(own, block.root, by=FuseAttention.name, names=self._names)
        return self._made[made]

    def with_sink(
        self, op: Builder, block: Block, key: Operand, value: Operand, mask: ir.Value | None
    ) -> tuple[ir.Value, ir.Value, ir.Value]:
        """New keys, values and mask with the sink's row."""
        extra, dtype = block.scores.sink, block.q.dtype
        assert extra is not None
        assert dtype is not None
        if mask is None or block.joined:
            raise NoMatch("an attention sink where nothing is masked, or heads are rows", extra)
        numbers = attention_sinks.read(extra, block.heads, op.model.opset_imports[""])
        column = attention_sinks.column(op, numbers, self._interface.input_ids, dtype)
        infer_nodes(op.nodes, op.model.opset_imports)
        return attention_sinks.append(op, key.new, value.new, mask, column)

    def _kind(self, applied: list[Applied], guards: list[ir.Value]) -> masks.Mask | NoMatch:
        key = (*applied, *guards)
        if key not in self._kinds:
            try:
                self._kinds[key] = masks.recognise_applied(self._prober, applied, guards)
            except NoMatch as miss:
                self._kinds[key] = miss
        return self._kinds[key]

    def _as_it_stands(
        self,
        op: Builder,
        added: list[ir.Value],
        miss: NoMatch,
        query: ir.Value,
        key: Operand,
        dtype: ir.DataType,
    ) -> ir.Value:
        """What is added to the scores one after the other, a bias and a mask, in one sum."""
        for mask in added:
            if mask.dtype != dtype:
                raise NoMatch(f"a mask of {mask.dtype} is added to scores of {dtype}: {miss}", mask)
        record(self._model, FuseAttention.name, added[-1], f"{_KEPT}: {miss}")
        # ONNX Runtime gives a row of nothing but the lowest number zeros, and not a mean of values;
        # nor may a sum become infinite.
        lowest = np.array(dtype.min, dtype=dtype.numpy())
        half = op.constant(lowest / (2 * len(added)))
        low = op.constant(lowest)
        finite = [op.Where(op.Equal(mask, low), half, mask) for mask in added]
        mask = finite[0]
        for other in finite[1:]:
            mask = op.Add(mask, other)
        # ONNX Runtime broadcasts the batch and the heads of a mask, not its queries and keys.
        seq = op.Shape(query, start=1, end=2)
        total = op.Shape(key.new, start=1, end=2)
        if key.past is not None:
            total = op.Add(op.Shape(key.past, start=2, end=3), total)
        return op.Expand(mask, op.Concat(np.array([1, 1]), seq, total, axis=0))
