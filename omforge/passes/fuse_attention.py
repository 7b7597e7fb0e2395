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
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np

from omforge import ir
from omforge.ir.dims import Dim
from omforge.ir.edit import remove_dead
from omforge.ir.infer import dims, infer_model
from omforge.passes import masks
from omforge.passes.attention_operands import Operand, last, operand, operands, plain, queries
from omforge.passes.attention_scores import (
    Mixed,
    Scores,
    check_shapes,
    find_mixed,
    find_scores,
    joined_heads,
    text,
)
from omforge.passes.builder import Builder
from omforge.passes.events import record
from omforge.passes.interface import Interface, activations, find_interface
from omforge.passes.masks import Applied
from omforge.passes.match import NoMatch
from omforge.passes.pipeline import Pass
from omforge.passes.splice import Names, insert, splice
from omforge.passes.views import shape_of


@dataclass(frozen=True)
class FuseAttention(Pass):
    """Fuse attention blocks: multi-head and grouped, cached or not, scaled, softcapped, masked."""

    name: ClassVar[str] = "fuse-attention"

    def run(self, model: ir.Model) -> int:
        """Fuse; the number of blocks raised. A Softmax that stays is an event."""
        infer_model(model)
        softmaxes = [node for node in model.graph if node.op_type == "Softmax"]
        if not softmaxes:
            return 0
        try:
            interface = find_interface(model)
        except ir.InputError as error:  # any ONNX model may go through a pipeline
            record(model, self.name, "the whole graph", str(error))
            return 0
        names = Names(model)
        live = activations(model)
        made = _Masks(model, interface, names)
        count = 0
        for softmax in softmaxes:
            try:
                _fuse(model, softmax, live, made, names)
            except NoMatch as miss:
                record(model, self.name, softmax, str(miss))
            else:
                count += 1
        if count:
            remove_dead(model)
        return count


def _fuse(
    model: ir.Model, softmax: ir.Node, live: set[ir.Value], made: _Masks, names: Names
) -> None:
    scores = find_scores(softmax, live)
    mixed = find_mixed(softmax, live)
    check_shapes(softmax, scores, mixed, made.batch)
    q, k = operands(scores.product)
    _, v = operands(mixed.product)
    widened = v
    if scores.precision is not None:
        v = _narrow(v, q.dtype)
    if q.dtype is None or not q.dtype == k.dtype == v.dtype:
        raise NoMatch(f"queries are {q.dtype}, keys {k.dtype} and values {v.dtype}", q)
    heads, joined = _heads(q, made.batch)
    size = last(q)
    with Builder(model) as op:
        query, factor = queries(op, q, heads, size, joined=joined)
        key = operand(op, k, heads, size, transposed=True)
        value = operand(op, v, heads, last(v), transposed=False)
        if key.heads != value.heads or (key.past is None) != (value.past is None):
            key = plain(op, k, heads, transposed=True)
            value = plain(op, v, heads, transposed=False)
        scale = scores.scale * factor * key.factor
        if scale <= 0:
            raise NoMatch(f"its scale is {scale:g}, and `Attention` takes a positive one", softmax)
        mask = made.get(op, softmax, scores, mixed, query, key, heads, q.dtype)
        pasts = [key.past, value.past] if key.past is not None else []
        inputs = [query, key.new, value.new, *([mask] if mask is not None or pasts else []), *pasts]
        options: dict[str, Any] = {
            "q_num_heads": heads,
            "kv_num_heads": key.heads,
            "scale": scale,
            "softcap": scores.softcap or None,
            "softmax_precision": scores.precision,
        }
        block = op.node("Attention", inputs, options, outputs=1 + len(pasts))
        split = op.Reshape(block.outputs[0], [0, 0, heads, value.size])
        output = op.Transpose(split, perm=[0, 2, 1, 3])
        if len(shape_of(v)) == 3:
            tail = np.array([value.size], dtype=np.int64)
            seq = op.Shape(query, start=1, end=2)
            output = op.Reshape(output, op.Concat(np.array([-1]), seq, tail, axis=0))
        if widened is not v:
            output = op.Cast(output, to=int(widened.dtype or ir.DataType.FLOAT))
        by = FuseAttention.name
        splice(op, [mixed.output], [output], by=by, matched=[softmax], names=names)
    for present, new in zip((key.present, value.present), block.outputs[1:], strict=False):
        if present is not None:
            _hand_over(model.graph, present, new, names)


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


class _Masks:
    """Canonical masks by the exported ones they come from: layers share them."""

    def __init__(self, model: ir.Model, interface: Interface, names: Names) -> None:
        self._model = model
        self.batch = shape_of(interface.input_ids)[0]
        self._interface = interface
        self._names = names
        self._prober = masks.Prober(model, interface)
        self._kinds: dict[tuple[Any, ...], masks.Mask | NoMatch] = {}
        self._made: dict[tuple[masks.Mask, ir.DataType], ir.Value] = {}

    def get(
        self,
        op: Builder,
        root: ir.Node,
        scores: Scores,
        mixed: Mixed,
        query: ir.Value,
        key: Operand,
        heads: int,
        dtype: ir.DataType,
    ) -> ir.Value | None:
        """The mask to attach: rebuilt where it is recognised, else as it stands."""
        applied = [
            replace(mask, joined=heads if len(shape_of(node.outputs[0])) == 3 else 0)
            for mask, node in reversed(scores.applied)
        ]
        if not applied:
            if mixed.guards:
                raise NoMatch("rows are zeroed though nothing is masked", mixed.guards[0])
            return None
        kind = self._kind(applied, mixed.guards)
        if isinstance(kind, NoMatch):
            if mixed.guards or applied != [Applied(applied[0].value)]:
                raise kind
            return self._as_it_stands(op, applied[0].value, kind, query, key, dtype)
        made = (kind, dtype)
        if made not in self._made:
            with Builder(self._model) as own:
                self._made[made] = masks.build(own, self._interface, kind, dtype)
                insert(own, root, by=FuseAttention.name, names=self._names)
        return self._made[made]

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
        mask: ir.Value,
        miss: NoMatch,
        query: ir.Value,
        key: Operand,
        dtype: ir.DataType,
    ) -> ir.Value:
        if mask.dtype != dtype:
            raise NoMatch(f"a mask of {mask.dtype} is added to scores of {dtype}: {miss}", mask)
        record(self._model, FuseAttention.name, mask, f"its mask is kept as it stands: {miss}")
        # ONNX Runtime gives a row of nothing but the lowest number zeros, and not a mean of values.
        lowest = np.array(dtype.min, dtype=dtype.numpy())
        mask = op.Where(op.Equal(mask, op.constant(lowest)), op.constant(lowest / 2), mask)
        # ONNX Runtime broadcasts the batch and the heads of a mask, not its queries and keys.
        seq = op.Shape(query, start=1, end=2)
        total = op.Shape(key.new, start=1, end=2)
        if key.past is not None:
            total = op.Add(op.Shape(key.past, start=2, end=3), total)
        return op.Expand(mask, op.Concat(np.array([1, 1]), seq, total, axis=0))
