"""Give each layer's keys and values a cache of their own, [B, K, P, D].

Before (one of many layouts; `move` is any chain of Slice, Transpose, Reshape, Cast and the like)::

    past [P, B, K, D], or of all layers [B, P, 2*L*K, D]
    whole = Concat<axis=a>(move(past), new)
    present = move(whole), or the new rows alone

After::

    past_key_values.{l}.key [B, K, P, D]
    present.{l}.key = Concat<axis=2>(past_key_values.{l}.key, move(new))
    whole = move(present.{l}.key)

What an output gives back is not assumed: the part between cache and output is run on numbers, and
the next step must find what this one joined.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from omforge import ir
from omforge.ir.dims import Dim, symbol, symbols
from omforge.ir.edit import fresh_name, remove_dead
from omforge.ir.evaluate import Cutout, EvaluationError, sizes
from omforge.ir.infer import infer_model
from omforge.ir.values import attribute, to_shape
from omforge.recognition.cache.exported import ExportedCache, Returns, keep
from omforge.recognition.cache.joins import FLOATS, Join, Layout, find_joins, layout_of
from omforge.recognition.interface import find_interface
from omforge.recognition.views import shape_of
from omforge.rewriting.base import Pass
from omforge.rewriting.builder import Builder
from omforge.rewriting.events import record
from omforge.rewriting.match import NoMatch
from omforge.rewriting.splice import Names, splice

Array = npt.NDArray[Any]

BATCH, PAST = symbol("batch"), symbol("past")
_CANONICAL = ("B", "K", "P", "D")
_SIZES = ({"batch": 2, "seq": 3, "past": 5}, {"batch": 3, "seq": 2, "past": 7})


@dataclass(frozen=True)
class CanonicalizeCache(Pass):
    """Give keys and values a cache input [B, K, P, D] each, whatever the export's layout is."""

    name: ClassVar[str] = "canonicalize-cache"
    changes_interface: ClassVar[bool] = True

    def run(self, model: ir.Model) -> int:
        """Rewrite; the number of joins whose cache changed. A cache that stays is an event."""
        joins = find_joins(model)
        if not joins:
            return 0
        infer_model(model)
        try:
            interface = find_interface(model)
        except ir.InputError as error:
            record(model, self.name, "the whole graph", str(error))
            return 0
        batch = shape_of(interface.input_ids)[0]
        of_cache: dict[ir.Value, list[Join]] = {}
        for join in find_joins(model):
            of_cache.setdefault(join.cache, []).append(join)
        found: list[_Cache] = []
        for cache, readers in of_cache.items():
            if _is_canonical(cache, readers, batch):
                continue
            try:
                found.append(_examine(model, cache, readers, batch))
            except (NoMatch, EvaluationError) as miss:
                record(model, self.name, f"the cache {cache.name}", str(miss))
        if not found:
            return 0
        names = Names(model)
        pasts = _rewrite(model, found, batch, names)
        for cache, serves in zip(found, pasts, strict=True):
            keep(model, [replace(cache.exported, serves=tuple(str(v.name) for v in serves))])
        infer_model(model)
        return sum(len(cache.joins) for cache in found)


def _is_canonical(cache: ir.Value, joins: Sequence[Join], batch: Dim) -> bool:
    """Whether it is joined as it is, [B, K, P, D] as far as can be told, and given back so."""
    (join, *others) = joins
    plain = not join.path.links and join.axis == 2 and len(shape_of(cache)) == 4
    if others or not plain or not join.whole.is_graph_output():
        return False
    layout = layout_of(join, batch)
    return layout is None or layout.axes == _CANONICAL


@dataclass(frozen=True)
class _Cache:
    """A cache of the export that is rewritten."""

    value: ir.Value
    joins: list[Join]
    layouts: list[Layout]
    output: ir.Value
    exported: ExportedCache


def _examine(model: ir.Model, cache: ir.Value, joins: list[Join], batch: Dim) -> _Cache:
    """Find everything out before anything is changed."""
    layouts: list[Layout] = []
    for join in joins:
        layout = layout_of(join, batch)
        if layout is None:
            raise NoMatch("no product of attention tells which of its axes is which", join.node)
        layouts.append(layout)
    _check_readers(cache, joins)
    output, returns, axis = _renewed(model, cache, joins)
    exported = ExportedCache(
        input=cache.name or "",
        shape=tuple(d if isinstance(d, int) else str(d) for d in shape_of(cache)),
        output=output.name or "",
        returns=returns,
        axis=axis,
    )
    return _Cache(cache, joins, layouts, output, exported)


def _on_the_way(joins: Sequence[Join]) -> set[ir.Value]:
    """The cache and what is made of it alone, up to the joins."""
    found = {joins[0].cache}
    for join in joins:
        found |= {link.after for link in join.path.links}
    return found


def _check_readers(cache: ir.Value, joins: Sequence[Join]) -> None:
    inside = _on_the_way(joins)
    nodes = {join.node for join in joins} | {value.producer() for value in inside}
    for value in inside:
        for node in value.consumers():
            if node in nodes:
                continue
            if node.op_type != "Shape":
                raise NoMatch("the graph reads it otherwise than to append to it", node)
            for dim in shape_of(value):
                _times(dim)


def _times(dim: Dim) -> tuple[int, Dim]:
    """A size as a number, times one of 1, batch and past.

    Raises:
        NoMatch: It is none such, so that it cannot be read off a cache [B, K, P, D].
    """
    if isinstance(dim, int):
        return dim, 1
    for axis in (BATCH, PAST):
        times = dim // axis
        if isinstance(times, int) and times * axis == dim:
            return times, axis
    raise NoMatch(f"its size {dim} is read, which is no axis of its own")


# --- what comes back --------------------------------------------------------------------------


def _renewed(
    model: ir.Model, cache: ir.Value, joins: Sequence[Join]
) -> tuple[ir.Value, Returns, int]:
    """The output that renews a cache, whether it holds all or the new rows, and the axis."""
    grows = [axis for axis, dim in enumerate(shape_of(cache)) if "past" in symbols(dim)]
    if len(grows) != 1 or shape_of(cache)[grows[0]] != PAST:
        raise NoMatch(
            f"it is [{', '.join(map(str, shape_of(cache)))}], of which not one axis is the past"
        )
    reached = _made_of(joins)
    reasons: list[str] = []
    for output in model.graph.outputs:
        if output not in reached or output.dtype not in FLOATS:
            continue
        kinds: tuple[Returns, ...] = ("whole", "rows")
        for returns in kinds:
            try:
                if _renews(model, cache, joins, output, returns, grows[0]):
                    return output, returns, grows[0]
            except EvaluationError as error:
                reasons.append(str(error))
    raise NoMatch(
        "no output gives back what the next step shall find in it"
        + (f" ({reasons[0]})" if reasons else "")
    )


def _made_of(joins: Sequence[Join]) -> set[ir.Value]:
    """What is made of the joined values, or of what they append, by movement alone."""
    movers = {"Concat", "Cast", "Transpose", "Reshape", "Squeeze", "Unsqueeze", "Flatten"}
    pending = [value for join in joins for value in (join.whole, join.new)]
    found = set(pending)
    while pending:
        for node in pending.pop().consumers():
            if node.op_type in movers | {"Identity", "Slice", "Split", "Gather"}:
                new = [value for value in node.outputs if value not in found]
                found.update(new)
                pending += new
    return found


def _renews(
    model: ir.Model,
    cache: ir.Value,
    joins: Sequence[Join],
    output: ir.Value,
    returns: str,
    axis: int,
) -> bool:
    """Whether a step that is given `output` back finds in each join what this one joined."""
    opset = model.opset_imports[""]
    news = list(dict.fromkeys(join.new for join in joins))
    wholes = [join.whole for join in joins]
    step = Cutout(list(dict.fromkeys([*wholes, output])), [cache, *news], opset)
    # A join whose past is the input itself needs nothing run to read it.
    moved = [join.past for join in joins if join.past is not cache]
    reread = Cutout(list(dict.fromkeys(moved)), [cache], opset) if moved else None
    random = np.random.default_rng(0)
    for bindings in _SIZES:
        feeds = {str(value.name): _random(value, bindings, random) for value in (cache, *news)}
        given = dict(zip([v.name for v in step.outputs], step.run(feeds, bindings), strict=True))
        new = given[output.name]
        held = feeds[str(cache.name)]
        if returns == "rows":
            if _without(new.shape, axis) != _without(held.shape, axis):
                return False
            new = np.concatenate([held, new], axis=axis)
        later = {**bindings, "past": bindings["past"] + bindings["seq"]}
        if new.shape != sizes(cache, later):
            return False
        found: dict[str | None, Array] = {cache.name: new}
        if reread is not None:
            again = reread.run({str(cache.name): new}, later)
            found |= dict(zip([v.name for v in reread.outputs], again, strict=True))
        if not all(np.array_equal(found[j.past.name], given[j.whole.name]) for j in joins):
            return False
    return True


def _without(shape: tuple[int, ...], axis: int) -> tuple[int, ...]:
    return shape[:axis] + shape[axis + 1 :]


def _random(value: ir.Value, bindings: Mapping[str, int], random: np.random.Generator) -> Array:
    # Numbers that every dtype of floats holds as they are: a Cast on the way changes nothing.
    numbers = random.integers(-64, 64, sizes(value, bindings))
    assert value.dtype is not None
    return numbers.astype(value.dtype.numpy())


# --- the rewrite ------------------------------------------------------------------------------


def _rewrite(
    model: ir.Model, caches: Sequence[_Cache], batch: Dim, names: Names
) -> list[list[ir.Value]]:
    """Rewrite; the new inputs that stand in place of each cache."""
    graph = model.graph
    places = {node: index for index, node in enumerate(graph)}
    # A splice puts another value where an output was.
    where = [list(graph.outputs).index(cache.output) for cache in caches]
    gone: list[ir.Value] = []
    made: list[list[ir.Value]] = []
    shared: list[tuple[int, Layout, ir.Value, ir.Value]] = []
    for cache, index in zip(caches, where, strict=True):
        pairs = [
            _append(model, join, layout, batch, names)
            for join, layout in zip(cache.joins, cache.layouts, strict=True)
        ]
        made.append([past for past, _ in pairs])
        _resize(model, cache, pairs[0][0], names)
        if len(pairs) == 1:
            take_place(graph, cache.value, index, *pairs[0])
        else:
            for join, layout, pair in zip(cache.joins, cache.layouts, pairs, strict=True):
                shared.append((places[join.node], layout, *pair))
            gone.append(graph.outputs[index])
    for value in gone:
        graph.outputs.remove(value)
    _name_layers(graph, shared)
    remove_dead(model)
    for cache in caches:
        if cache.value in graph.inputs:
            graph.inputs.remove(cache.value)
    return made


def _append(
    model: ir.Model, join: Join, layout: Layout, batch: Dim, names: Names
) -> tuple[ir.Value, ir.Value]:
    """Append in the canonical layout, and give who read the join what it read."""
    dtype = join.whole.dtype
    assert dtype is not None
    shape = to_shape((batch, layout.heads, PAST, layout.size))
    past = ir.Value(name=names.unique("past"), shape=shape, type=ir.TensorType(dtype))
    with Builder(model) as op:
        whole = op.Concat(past, canonical(op, join.new, layout), axis=2)
        # An output may be the join itself: the new cache is one under a name of its own.
        back = op.Identity(_exported(op, whole, layout))
        splice(op, [join.whole], [back], by=CanonicalizeCache.name, names=names)
    return past, whole


def take_place(
    graph: ir.Graph, cache: ir.Value, index: int, past: ir.Value, present: ir.Value
) -> None:
    """A cache of one layer's keys or values stays where it was, under the exporter's names."""
    for old, new in ((cache, past), (graph.outputs[index], present)):
        name = old.name
        old.name = fresh_name(graph, f"{name}_exported")
        new.name = name
    graph.inputs[list(graph.inputs).index(cache)] = past
    graph.outputs[index] = present


def _name_layers(graph: ir.Graph, found: Sequence[tuple[int, Layout, ir.Value, ir.Value]]) -> None:
    """Inputs and outputs of what was in one tensor, layer by layer, keys before values."""
    ordered = sorted(found, key=lambda each: each[0])
    for is_key, role in ((True, "key"), (False, "value")):
        of_role = [each for each in ordered if each[1].is_key is is_key]
        for layer, (_, _, past, present) in enumerate(of_role):
            past.name = fresh_name(graph, f"past_key_values.{layer}.{role}")
            present.name = fresh_name(graph, f"present.{layer}.{role}")
    of_key = [each for each in ordered if each[1].is_key]
    of_value = [each for each in ordered if not each[1].is_key]
    for pair in itertools.zip_longest(of_key, of_value):
        for each in pair:
            if each is not None:
                graph.inputs.append(each[2])
                graph.outputs.append(each[3])


def canonical(op: Builder, value: ir.Value, layout: Layout) -> ir.Value:
    """[B, K, S, D] of new keys or values in their own layout."""
    letters = "".join(layout.axes)
    if len(letters) != len(layout.axes) or "" in layout.axes:
        axis = layout.axes.index("P")
        parts: Mapping[str, Any] = {
            "B": np.array([-1]),
            "K": np.array([layout.heads]),
            "P": op.Shape(value, start=axis, end=axis + 1),
            "D": np.array([layout.size]),
        }
        value = op.Reshape(value, op.Concat(*(parts[letter] for letter in letters), axis=0))
    if "B" not in letters:
        value = op.Unsqueeze(value, [0])
        letters = f"B{letters}"
    order = [letters.index(letter) for letter in _CANONICAL]
    return value if order == [0, 1, 2, 3] else op.Transpose(value, perm=order)


def _exported(op: Builder, whole: ir.Value, layout: Layout) -> ir.Value:
    """[B, K, T, D] in the exporter's layout."""
    letters = "".join(layout.axes)
    order = ["BKPD".index(letter) for letter in (letters if "B" in letters else f"B{letters}")]
    value = whole if order == [0, 1, 2, 3] else op.Transpose(whole, perm=order)
    if len(letters) == 4 and len(layout.axes) == 4:
        return value
    parts: Mapping[str, Any] = {
        "": np.array([1]),
        "B": np.array([-1]),
        "BK": np.array([-1]),
        "K": np.array([layout.heads]),
        "KD": np.array([layout.heads * layout.size]),
        "D": np.array([layout.size]),
        "P": op.Shape(whole, start=2, end=3),
    }
    return op.Reshape(value, op.Concat(*(parts[each] for each in layout.axes), axis=0))


def _resize(model: ir.Model, cache: _Cache, past: ir.Value, names: Names) -> None:
    """Let what reads a size of the old cache read it off the new one."""
    for value in _on_the_way(cache.joins):
        for node in list(value.consumers()):
            if node.op_type != "Shape":
                continue
            start, end = attribute(node, "start", 0), attribute(node, "end", None)
            with Builder(model) as op:
                read = shape_of(value)[start:end]
                parts = [_size(op, past, *_times(dim)) for dim in read]
                sizes_of = op.Concat(*parts, axis=0)
                splice(op, [node.outputs[0]], [sizes_of], by=CanonicalizeCache.name, names=names)


def _size(op: Builder, past: ir.Value, times: int, axis: Dim) -> ir.Value:
    number = op.constant(np.array([times], dtype=np.int64))
    if axis == 1:
        return number
    at = 2 if axis == PAST else 0
    found = op.Shape(past, start=at, end=at + 1)
    return found if times == 1 else op.Mul(found, number)
