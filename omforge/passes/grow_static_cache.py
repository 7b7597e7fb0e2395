"""Turn a cache of fixed size, that the graph writes into, into one that grows.

Before (a static cache of C slots)::

    written = TensorScatter<axis=2>(cache, new, write_indices)  or ScatterND(cache, slots, new)
    scores  = MatMul(q, view(written)) + mask of C slots

After::

    whole  = Concat<axis=2>(past_key_values.{l}.key, new)
    scores = MatMul(q, view(whole)) + the first P + S slots of the mask

A graph that C is fixed in is none that can be bound to another capacity; its slots behind the valid
ones are masked, so that attention to the valid ones alone is the same. What a node writes where is
found by running it, and an `Attention` that is told how many slots are valid is compared with one
that has a past.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt

from omforge import ir
from omforge.ir.dims import Dim, symbol
from omforge.ir.edit import remove_dead
from omforge.ir.evaluate import Cutout, EvaluationError
from omforge.ir.infer import infer_model
from omforge.ir.values import attribute, to_shape
from omforge.passes.canonicalize_cache import canonical, take_place
from omforge.recognition.cache.exported import ExportedCache, ExportedCounter, keep, keep_counters
from omforge.recognition.cache.joins import FLOATS, Join, Reading, reading_of
from omforge.recognition.interface import find_interface
from omforge.recognition.views import shape_of, trace
from omforge.rewriting.base import Pass
from omforge.rewriting.builder import Builder
from omforge.rewriting.events import events, record
from omforge.rewriting.match import NoMatch
from omforge.rewriting.splice import Names, insert, splice

Array = npt.NDArray[Any]

SEQ, PAST = symbol("seq"), symbol("past")

_WRITERS: Mapping[str, tuple[int, int]] = {
    "TensorScatter": (0, 1),
    "ScatterND": (0, 2),
    "ScatterElements": (0, 2),
    "Where": (2, 1),
}
"""Of operators that write: which input is the cache, and which is what is written."""

_ELEMENTWISE = {
    *("Add", "Sub", "Mul", "Div", "Where", "Cast", "Identity", "Softmax", "Tanh", "Max", "Min"),
    *("IsNaN", "Clip", "Neg"),
}
_INTEGERS = (ir.DataType.INT64, ir.DataType.INT32)


@dataclass(frozen=True)
class GrowStaticCache(Pass):
    """Turn caches of fixed size, that the graph writes into, into caches that grow."""

    name: ClassVar[str] = "grow-static-cache"
    changes_interface: ClassVar[bool] = True

    def run(self, model: ir.Model) -> int:
        """Rewrite all caches or none; their number. What stands in the way is an event."""
        if not any(node.op_type in _WRITERS for node in model.graph):
            return 0
        infer_model(model)
        writes = _find_writes(model)
        if not writes:
            return 0
        try:
            interface = find_interface(model)
            batch = shape_of(interface.input_ids)[0]
            if shape_of(interface.input_ids)[1] != SEQ:
                raise NoMatch("the graph takes a fixed number of tokens")
            counters = _counters(model, writes)
            found = [_examine(model, write, counters, batch) for write in writes]
            _check_attention(found, counters)
        except (NoMatch, EvaluationError, ir.InputError) as miss:
            join = writes[0].join
            record(
                model,
                self.name,
                f"the cache {join.cache.name}, of {shape_of(join.whole)[join.axis]} slots that "
                f"{ir.describe(join.node)} writes into",
                str(miss),
            )
            return 0
        _rewrite(model, interface.input_ids, found, counters, batch)
        return len(found)


def require_growing_cache(model: ir.Model) -> None:
    """Raise CheckError where a cache of fixed size was found and had to stay one."""
    for event in events(model):
        if event.pass_name == GrowStaticCache.name:
            raise ir.CheckError(
                f"{event.where}, cannot be made one that grows",
                event.reason,
                "Export the model with a cache that grows, for any number of new tokens",
            )


@dataclass(frozen=True)
class _Write:
    """A node that writes new keys or values into slots, and the output that gives all slots back.

    Attributes:
        join: The write; its axis is that of the slots.
        output: What is the cache of the next step.
        reading: How a product reads all slots.
    """

    join: Join
    output: ir.Value
    reading: Reading | None = None


def _find_writes(model: ir.Model) -> list[_Write]:
    """Nodes that write into an input of fixed size, whose result is an output of the same shape."""
    found: list[_Write] = []
    for node in model.graph:
        if node.op_type not in _WRITERS or node.domain != "":
            continue
        data, new = (node.inputs[index] for index in _WRITERS[node.op_type])
        if data is None or new is None or data.dtype not in FLOATS:
            continue
        path = trace(data, casts=True)
        cache = path.source
        if not cache.is_graph_input() or cache.is_initializer():
            continue
        shape = shape_of(node.outputs[0])
        axes = [
            axis
            for axis, (all_slots, some) in enumerate(zip(shape, shape_of(new), strict=False))
            if all_slots != some and isinstance(all_slots, int)
        ]
        whole = node.outputs[0]
        given = (v for v in model.graph.outputs if trace(v, casts=True).source is whole)
        output = next(given, None)
        if output is not None and shape_of(output) == shape_of(cache) and axes:
            found.append(_Write(Join(node, axes[0], path, new), output))
    return found


# --- what counts the slots --------------------------------------------------------------------


Counts = Literal["slots", "start", "end"]


def _counters(model: ir.Model, writes: Sequence[_Write]) -> dict[ir.Value, Counts]:
    """Integer inputs that say which slots are written, or how many are valid then."""
    found: dict[ir.Value, Counts] = {}
    for value in model.graph.inputs:
        shape = shape_of(value)
        if value.dtype not in _INTEGERS or len(shape) > 1 or value.is_initializer():
            continue
        users = list(value.consumers())
        users = list(value.consumers())
        ends = [n for n in users if n.op_type == "Attention" and n.inputs[6:7] == (value,)]
        if shape == (SEQ,) or _is_open(shape):
            found[value] = "slots"
        elif ends and len(ends) == len(users):
            found[value] = "end"
        else:
            found[value] = "start"
    return found


def _is_open(shape: tuple[Dim, ...]) -> bool:
    """Whether it is one axis of the exporter's own, neither a number nor the batch."""
    return len(shape) == 1 and not isinstance(shape[0], int) and shape[0] != symbol("batch")


def _count(kind: Counts, shape: tuple[Dim, ...], past: int, seq: int, batch: int) -> Array:
    if kind == "slots":
        return np.arange(past, past + seq)
    number = past if kind == "start" else past + seq
    return np.full([batch] * len(shape), number)


def _examine(
    model: ir.Model, write: _Write, counters: Mapping[ir.Value, Counts], batch: Dim
) -> _Write:
    """The write with how it is read, once running it has shown that it writes the new slots."""
    join = write.join
    _check_any_number(join.new)
    news, wholes = shape_of(join.new), shape_of(join.whole)
    rest = [(a, b) for i, (a, b) in enumerate(zip(news, wholes, strict=True)) if i != join.axis]
    if len(news) != len(wholes) or any(a != b for a, b in rest) or news[join.axis] != SEQ:
        raise NoMatch(
            f"it is given [{', '.join(map(str, news))}] for [{', '.join(map(str, wholes))}], which "
            "are not the new tokens",
            join.node,
        )
    _check_writes(model, write, counters)
    reading = reading_of(join, batch)
    if reading is None:
        raise NoMatch("no product of attention tells which of its axes is which", join.node)
    users = {
        node
        for value in (join.cache, *(x.after for x in join.path.links))
        for node in value.consumers()
    }
    users -= {link.node for link in join.path.links} | {join.node}
    if other := next((node for node in users if node.op_type != "Shape"), None):
        raise NoMatch("the graph reads it otherwise than to write into it", other)
    return replace(write, reading=reading)


def _check_any_number(new: ir.Value) -> None:
    """A shape of numbers alone on the way of the new tokens takes one number of them only."""
    for link in trace(new, casts=True).links:
        before, after = shape_of(link.before), shape_of(link.after)
        if link.node.op_type == "Reshape" and math.prod(before) != math.prod(after):
            raise NoMatch(
                f"{ir.describe(link.node)} takes [{', '.join(map(str, before))}] for "
                f"[{', '.join(map(str, after))}]: the graph was traced with a fixed number of "
                "tokens, and takes no other",
                link.node,
            )


def _check_attention(writes: Sequence[_Write], counters: Mapping[ir.Value, Counts]) -> None:
    """An `Attention` of the exporter's is causal behind the valid slots, which it is told."""
    sides: dict[ir.Node, set[int]] = {}
    for write in writes:
        assert write.reading is not None
        if write.reading.node.op_type == "Attention":
            sides.setdefault(write.reading.node, set()).add(write.reading.index)
    for node, read in sides.items():
        inputs = (*node.inputs, *[None] * 7)
        told = inputs[6] is not None and counters.get(inputs[6]) == "end"
        plain = read == {1, 2} and not any(inputs[3:6]) and len(node.outputs) == 1
        if not (told and plain and attribute(node, "is_causal", 0)):
            raise NoMatch("its attention is not causal behind nonpad_kv_seqlen slots", node)


def _check_writes(model: ir.Model, write: _Write, counters: Mapping[ir.Value, Counts]) -> None:
    join = write.join
    part = Cutout(
        [join.whole, join.past, write.output],
        [join.cache, join.new, *counters],
        model.opset_imports[""],
    )
    reread = Cutout([join.past], [join.cache], model.opset_imports[""])
    random = np.random.default_rng(0)
    for rows, seq, past in ((2, 2, 3), (1, 3, 0), (2, 1, 4)):
        bindings = {"batch": rows, "seq": seq, "past": past}
        feeds: dict[str, Array] = {}
        for value in (join.cache, join.new):
            sizes = [
                dim if isinstance(dim, int) else bindings.get(str(dim), 1)
                for dim in shape_of(value)
            ]
            assert value.dtype is not None
            numbers = random.integers(-64, 64, sizes)
            feeds[str(value.name)] = numbers.astype(value.dtype.numpy())
        for value, kind in counters.items():
            assert value.dtype is not None
            count = _count(kind, shape_of(value), past, seq, rows)
            feeds[str(value.name)] = count.astype(value.dtype.numpy())
        try:
            whole, held, given = part.run(feeds, bindings)
        except EvaluationError as error:
            raise NoMatch(f"it does not write {seq} tokens at once", join.node) from error
        wanted = held.copy()
        where = [slice(None)] * held.ndim
        where[join.axis] = slice(past, past + seq)
        wanted[tuple(where)] = feeds[str(join.new.name)]
        (again,) = reread.run({str(join.cache.name): given}, bindings)
        if not (np.array_equal(whole, wanted) and np.array_equal(again, whole)):
            raise NoMatch(f"it does not write {seq} tokens at once behind {past}", join.node)


# --- the rewrite ------------------------------------------------------------------------------


def _rewrite(
    model: ir.Model,
    tokens: ir.Value,
    writes: Sequence[_Write],
    counters: Mapping[ir.Value, Counts],
    batch: Dim,
) -> None:
    graph = model.graph
    names = Names(model)
    where = [list(graph.outputs).index(write.output) for write in writes]
    pasts: list[ir.Value] = []
    kept: list[ExportedCache] = []
    for write in writes:
        join, reading = write.join, write.reading
        assert reading is not None
        assert join.new.dtype is not None
        layout = reading.layout
        past = ir.Value(
            name=names.unique("past"),
            shape=to_shape((batch, layout.heads, PAST, layout.size)),
            type=ir.TensorType(join.new.dtype),
        )
        pasts.append(past)
        kept.append(
            ExportedCache(
                input=str(join.cache.name),
                shape=tuple(d if isinstance(d, int) else str(d) for d in shape_of(join.cache)),
                output=str(write.output.name),
                returns="whole",
                axis=_slot_axis(join),
                serves=(str(join.cache.name),),
            )
        )
    counted = [ExportedCounter(str(value.name), kind) for value, kind in counters.items()]
    attended = _attend(model, writes, pasts, names)
    for write, past, index in zip(writes, pasts, where, strict=True):
        reading = write.reading
        assert reading is not None
        if reading.node in attended:
            present = attended[reading.node][reading.index - 1]
        else:
            present = _read_whole(model, write.join, reading, past, names)
        take_place(graph, write.join.cache, index, past, present)
    _count_slots(model, tokens, counters, pasts[0], names)
    remove_dead(model)
    keep(model, kept)
    keep_counters(model, counted)
    infer_model(model)


def _slot_axis(join: Join) -> int:
    shape, slots = shape_of(join.cache), shape_of(join.whole)[join.axis]
    return shape.index(slots) if slots in shape else 0


def _attend(
    model: ir.Model, writes: Sequence[_Write], pasts: Sequence[ir.Value], names: Names
) -> dict[ir.Node, tuple[ir.Value, ir.Value]]:
    """Let an `Attention` of the exporter's have a past; its presents."""
    of_node: dict[ir.Node, dict[int, tuple[Join, ir.Value]]] = {}
    for write, past in zip(writes, pasts, strict=True):
        assert write.reading is not None
        if write.reading.node.op_type == "Attention":
            of_node.setdefault(write.reading.node, {})[write.reading.index] = (write.join, past)
    made: dict[ir.Node, tuple[ir.Value, ir.Value]] = {}
    for node, sides in of_node.items():
        (key, past_key), (value, past_value) = sides[1], sides[2]
        options: dict[str, Any] = {name: a.value for name, a in node.attributes.items()}
        options["is_causal"] = 1
        with Builder(model) as op:
            inputs = [node.inputs[0], key.new, value.new, None, past_key, past_value]
            new = op.node("Attention", inputs, options, outputs=3)
            by = GrowStaticCache.name
            splice(op, [node.outputs[0]], [new.outputs[0]], by=by, matched=[node], names=names)
        made[node] = (new.outputs[1], new.outputs[2])
    return made


def _read_whole(
    model: ir.Model, join: Join, reading: Reading, past: ir.Value, names: Names
) -> ir.Value:
    """Let a product read past and new alone, and what is added to its scores be as long."""
    node, layout = reading.node, reading.layout
    slots = shape_of(join.whole)[join.axis]
    heads = shape_of(reading.path.end)[1]
    assert isinstance(heads, int)
    times = heads // layout.heads
    with Builder(model) as op:
        whole = op.Concat(past, canonical(op, join.new, layout), axis=2)
        read = whole
        if times > 1:
            many = op.Expand(op.Unsqueeze(whole, [2]), [1, 1, times, 1, 1])
            read = op.Reshape(many, [0, heads, -1, layout.size])
        if reading.path.factor != 1:
            factor = np.array(reading.path.factor, whole.dtype.numpy() if whole.dtype else None)
            read = op.Mul(read, factor)
        read = op.Transpose(read, perm=[0, 1, 3, 2]) if reading.swapped else read
        insert(op, node, by=GrowStaticCache.name, names=names)
    node.replace_input_with(reading.index, read)
    if layout.is_key:
        _shorten(model, node, whole, slots, names)
    return whole


def _shorten(model: ir.Model, product: ir.Node, whole: ir.Value, slots: Dim, names: Names) -> None:
    """Take the first P + S of all slots of what is added to the scores."""
    pending, region = list(product.outputs), set(product.outputs)
    while pending:
        for node in pending.pop().consumers():
            if node.op_type not in _ELEMENTWISE:
                continue
            for index, value in enumerate(node.inputs):
                if value is None or value in region or shape_of(value)[-1:] != (slots,):
                    continue
                with Builder(model) as op:
                    total = op.Squeeze(op.Shape(whole, start=2, end=3))
                    zero, one = np.array(0, np.int64), np.array(1, np.int64)
                    first = op.Gather(value, op.Range(zero, total, one), axis=-1)
                    insert(op, node, by=GrowStaticCache.name, names=names)
                node.replace_input_with(index, first)
            new = [value for value in node.outputs if value not in region]
            region.update(new)
            pending += new


def _count_slots(
    model: ir.Model,
    tokens: ir.Value,
    counters: Mapping[ir.Value, Counts],
    past: ir.Value,
    names: Names,
) -> None:
    """Count slots from the length of the past, where inputs said it."""
    for value, kind in counters.items():
        if not value.uses():
            model.graph.inputs.remove(value)
            continue
        with Builder(model) as op:
            start = op.Shape(past, start=2, end=3)
            end = op.Add(start, op.Shape(tokens, start=1, end=2))
            if kind == "slots":
                count = op.Range(op.Squeeze(start), op.Squeeze(end), np.array(1, np.int64))
            else:
                count = start if kind == "start" else end
                rows = op.Shape(tokens, start=0, end=1)
                count = op.Expand(count, rows) if shape_of(value) else op.Squeeze(count)
            if value.dtype != ir.DataType.INT64:
                count = op.Cast(count, to=int(value.dtype or ir.DataType.INT64))
            insert(op, next(iter(model.graph)), by=GrowStaticCache.name, names=names)
        value.replace_all_uses_with(count)
        model.graph.inputs.remove(value)
