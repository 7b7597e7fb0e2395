"""Attend to a cache where it lies, where ONNX Runtime runs the graph.

Before (the interface of cache-in-place; T is 1 or more real slots, C all of them)::

    k_c = TensorScatter<axis=-2>(past_k [B, K, C, D], k [B, K, S, D], write_indices [B])
    v_c = TensorScatter<axis=-2>(past_v, v, write_indices)
    y   = Attention(q [B, N, S, D], k_c, v_c, mask [B, 1, S, C])
      ->  k_c, v_c

After::

    last  = Cast<int32>(write_indices + (S - 1))                           [B]
    count = ReduceMax(last) + 1
    bias  = Slice(mask, 0, count)                                          [B, 1, S, T]
    y, k_c, v_c = com.microsoft.GroupQueryAttention<num_heads, kv_num_heads, scale, softcap>(
                      q, k, v [B, S, ..], past_k, past_v, last, count, -, -, -, bias, sinks)

It reads the T slots that hold tokens and no others, repeats no heads, and where past and present
are one buffer it copies nothing. It takes S > 1 behind a past for B = 1 only: whoever runs the
graph has to run such rows one by one.

All layers or none: a mask of C slots and one of T do not go together. Source:
microsoft/onnxruntime:docs/ContribOperators.md, onnxruntime/contrib_ops/cpu/bert.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy.typing as npt

from omforge import ir
from omforge.ir.edit import remove_dead
from omforge.ir.infer import infer_model
from omforge.ir.values import attribute, constant, set_type
from omforge.recognition.attention import sinks
from omforge.recognition.step_names import PAST, WRITE_INDICES
from omforge.recognition.views import shape_of
from omforge.rewriting.base import Pass
from omforge.rewriting.builder import Builder
from omforge.rewriting.events import record
from omforge.rewriting.match import NoMatch
from omforge.rewriting.schema import CONTRIB_DOMAIN
from omforge.rewriting.splice import Names, splice

Array = npt.NDArray[Any]

_BY_HEAD = [0, 2, 1, 3]


@dataclass(frozen=True)
class GroupQueryAttention(Pass):
    """Replace attention to a cache that is written in place by ONNX Runtime's own operator."""

    name: ClassVar[str] = "group-query-attention"

    def run(self, model: ir.Model) -> int:
        """Rewrite; the number of blocks. If one cannot be, none is, and events say why."""
        indices = next((v for v in model.graph.inputs if v.name == WRITE_INDICES), None)
        if indices is None:
            return 0
        infer_model(model)
        blocks: list[_Block] = []
        missed = False
        for node in [node for node in model.graph if _reads_cache(node)]:
            try:
                blocks.append(_block(node, indices))
            except NoMatch as miss:
                record(model, self.name, node, str(miss))
                missed = True
        written = {block.key for block in blocks} | {block.value for block in blocks}
        for value in model.graph.outputs:
            maker = value.producer()
            if maker is not None and maker.op_type == "TensorScatter" and value not in written:
                record(model, self.name, maker, "no attention that can be replaced reads it")
                missed = True
        if missed or not blocks:
            return 0
        model.opset_imports.setdefault(CONTRIB_DOMAIN, 1)
        names = Names(model)
        counts = _Counts(model, indices, blocks[0], names)
        for block in blocks:
            _rewrite(model, block, counts, names)
        remove_dead(model)
        infer_model(model)
        return len(blocks)


@dataclass(frozen=True)
class _Block:
    """An attention over a cache in place.

    Attributes:
        node: The Attention.
        key: [B, K, C, D], with the step's own keys; `value` alike.
        mask: [B, 1 or N, S, C].
        sink: [N]; None without.
        heads: N.
        size: D.
    """

    node: ir.Node
    key: ir.Value
    value: ir.Value
    mask: ir.Value
    sink: Array | None
    heads: int
    kv_heads: int
    size: int


def _reads_cache(node: ir.Node) -> bool:
    if node.op_type != "Attention" or node.domain:
        return False
    return any(_scatter(value) is not None or _is_past(value) for value in node.inputs[1:3])


def _is_past(value: ir.Value | None) -> bool:
    return value is not None and value.is_graph_input() and str(value.name).startswith(PAST)


def _scatter(value: ir.Value | None) -> ir.Node | None:
    """The TensorScatter that a value comes from, behind whatever reads it."""
    node = None if value is None else value.producer()
    while node is not None and node.op_type in ("Cast", "DequantizeLinear", "Pad"):
        node = None if node.inputs[0] is None else node.inputs[0].producer()
    return node if node is not None and node.op_type == "TensorScatter" else None


def _block(node: ir.Node, indices: ir.Value) -> _Block:
    query, key, value = node.inputs[:3]
    mask = node.inputs[3] if len(node.inputs) > 3 else None
    assert query is not None
    assert key is not None
    assert value is not None
    if mask is None or attribute(node, "is_causal", 0):
        raise NoMatch("it has no mask that says all", node)
    found, readers, numbers = sinks.find(node), [node, node], None
    if found is not None:
        readers = [maker for maker in (key.producer(), value.producer()) if maker is not None]
        key, value, mask = found.key, found.value, found.mask
        numbers = _numbers(found)
    for cache, reader in zip((key, value), readers, strict=True):
        maker = cache.producer()
        if maker is None or maker.op_type != "TensorScatter":
            raise NoMatch("its cache is not read as it lies: it is cast, scaled or shared", node)
        if maker.inputs[2] is not indices or not _is_past(maker.inputs[0]):
            raise NoMatch("what is written is not the cache", maker)
        if any(user is not reader for user in cache.consumers()):
            raise NoMatch("others read its cache, too", node)
        if any(user is not node for user in reader.outputs[0].consumers()) and reader is not node:
            raise NoMatch("others read its cache, too", node)
        if attribute(maker, "mode", "linear") != "linear" or attribute(maker, "axis", -2) != -2:
            raise NoMatch("the cache is not written slot by slot", maker)
    if any(value is not None for value in node.inputs[4:]) or len(_used(node)) > 1:
        raise NoMatch("it has a past of its own, or hands out more than its result", node)
    shapes = [shape_of(item) for item in (query, key, value)]
    if [len(shape) for shape in shapes] != [4, 4, 4]:
        raise NoMatch("its query is not by heads", node)
    _, heads, _, size = shapes[0]
    _, kv_heads, _, wide = shapes[2]
    if shapes[1][3] != size or wide != size:
        raise NoMatch(f"a key has {size} numbers and a value {wide}: they must be alike", node)
    if not (isinstance(heads, int) and isinstance(kv_heads, int) and isinstance(size, int)):
        raise NoMatch("its heads are not known", node)
    if size % 8:
        raise NoMatch(f"a head has {size} numbers, and must have a multiple of 8", node)
    if query.dtype != key.dtype:
        raise NoMatch(f"its query is {query.dtype}, its cache {key.dtype}", node)
    return _Block(node, key, value, mask, numbers, heads, kv_heads, size)


def _numbers(sink: sinks.Sink) -> Array:
    """The sinks [N], which must be the same for all rows and tokens."""
    maker = sink.column.producer()
    spread = maker.inputs[0] if maker is not None and maker.op_type == "Expand" else None
    numbers = constant(spread)
    if numbers is None or numbers.size != shape_of(sink.column)[1]:
        raise NoMatch("its sinks are no constants, one for each head", maker or sink.column)
    return numbers.reshape(-1)


def _used(node: ir.Node) -> Sequence[ir.Value]:
    return [value for value in node.outputs if value.uses() or value.is_graph_output()]


class _Counts:
    """What all blocks of a graph share: last slots, how many are read, and masks cut to them."""

    def __init__(self, model: ir.Model, indices: ir.Value, block: _Block, names: Names) -> None:
        self._model, self._names = model, names
        self._masks: dict[ir.Value, ir.Value] = {}
        new = block.key.producer()
        assert new is not None
        with Builder(model) as op:
            length = op.Shape(new.inputs[1], start=2, end=3)
            last = op.Cast(op.Sub(op.Add(indices, length), 1), to=int(ir.DataType.INT32))
            count = op.Add(op.ReduceMax(last, [0], keepdims=1), 1)
            self._put(op)
        self.last, self.count = last, count

    def mask(self, value: ir.Value) -> ir.Value:
        """The columns of a mask that are read."""
        if value not in self._masks:
            with Builder(self._model) as op:
                end = op.Cast(self.count, to=int(ir.DataType.INT64))
                self._masks[value] = op.Slice(value, [0], end, [-1])
                self._put(op)
        return self._masks[value]

    def _put(self, op: Builder) -> None:
        for made in op.constants.values():
            self._model.graph.register_initializer(made)
        for node in op.nodes:
            node.name = self._names.unique(f"{GroupQueryAttention.name}_{node.op_type}")
            for output in node.outputs:
                output.name = self._names.unique(f"{node.name}_output")
            self._model.graph.append(node)
        self._model.graph.sort()


def _rewrite(model: ir.Model, block: _Block, counts: _Counts, names: Names) -> None:
    node, width = block.node, block.heads * block.size
    query = node.inputs[0]
    assert query is not None
    given = counts.mask(block.mask)
    writers = [w for w in (block.key.producer(), block.value.producer()) if w is not None]
    batch, _, seq, _ = shape_of(query)
    of_query = (query.dtype or ir.DataType.FLOAT).numpy()
    last, taken = _flattened(node.outputs[0])
    with Builder(model) as op:
        made = op.node(
            "GroupQueryAttention",
            [
                *(_flat(op, by_head) for by_head in (query, *(w.inputs[1] for w in writers))),
                *(w.inputs[0] for w in writers),
                *(counts.last, counts.count, None, None, None, given),
                *([] if block.sink is None else [op.constant(block.sink.astype(of_query))]),
            ],
            {
                "num_heads": block.heads,
                "kv_num_heads": block.kv_heads,
                "scale": attribute(node, "scale", block.size**-0.5),
                "softcap": attribute(node, "softcap", 0.0),
            },
            domain=CONTRIB_DOMAIN,
            outputs=3,
        )
        y, *caches = made.outputs
        for cache, of in zip(caches, (block.key, block.value), strict=True):
            cache.shape, cache.type = of.shape, of.type
        set_type(y, node.outputs[0].dtype, (batch, seq, width))
        if last is node.outputs[0]:
            y = op.Transpose(op.Reshape(y, [0, 0, block.heads, block.size]), perm=_BY_HEAD)
        splice(
            op,
            [last, block.key, block.value],
            [y, *caches],
            by=GroupQueryAttention.name,
            matched=[node, *writers, *taken],
            names=names,
        )


def _flat(op: Builder, by_head: ir.Value | None) -> ir.Value:
    """[B, S, N*D] of a value [B, N, S, D]: what it was made of, where it was made of that."""
    assert by_head is not None
    turn = by_head.producer()
    apart = None if turn is None or turn.inputs[0] is None else turn.inputs[0].producer()
    if _turns(turn) and apart is not None and apart.op_type == "Reshape":
        whole, (_, heads, _, size) = apart.inputs[0], shape_of(by_head)
        if whole is not None and shape_of(whole)[2:] == (heads * size,):
            return whole
    return op.Reshape(op.Transpose(by_head, perm=_BY_HEAD), [0, 0, -1])


def _flattened(value: ir.Value) -> tuple[ir.Value, list[ir.Node]]:
    """[B, S, N*D] of a result [B, N, S, D], and what makes it, where that is all it is used for."""
    turns = list(value.consumers())
    if len(turns) == 1 and _turns(turns[0]) and not value.is_graph_output():
        turned = turns[0].outputs[0]
        ends = list(turned.consumers())
        if len(ends) == 1 and ends[0].op_type == "Reshape" and not turned.is_graph_output():
            (batch, heads, seq, size), flat = shape_of(value), ends[0].outputs[0]
            if shape_of(flat) == (batch, seq, heads * size):
                return flat, [turns[0], ends[0]]
    return value, []


def _turns(node: ir.Node | None) -> bool:
    if node is None or node.op_type != "Transpose":
        return False
    return list(attribute(node, "perm", ())) == _BY_HEAD
