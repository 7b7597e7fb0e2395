"""Give a cache that the graph itself cuts to a window all its tokens.

Before (a layer with a window of W keeps n = W - 1 earlier tokens; `past` has at most n rows)::

    whole   = Concat(past[:, :, -n:], new)        present = whole[:, :, -n:]
    offset  = Max(0, P - n)                       # of the first key that is left, in the mask

After::

    whole   = Concat(past, new)                   present = whole
    offset  = 0

What is cut away is behind the window of every query that is still to come, and the mask, which is
recognised here, hides it. Where it does not, the graph is refused.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from omforge import ir
from omforge.ir import dims as d
from omforge.ir.dims import Expr, symbol, symbols
from omforge.ir.edit import remove_dead
from omforge.ir.infer import infer_model
from omforge.ir.values import attribute, known, known_ints, to_shape
from omforge.passes.name_dims import NameDims
from omforge.recognition.attention.masks import Prober, recognise_applied
from omforge.recognition.attention.operands import operands
from omforge.recognition.attention.scores import find_mixed, find_scores
from omforge.recognition.interface import activations, find_interface
from omforge.recognition.views import shape_of, trace
from omforge.rewriting.base import Pass
from omforge.rewriting.builder import Builder
from omforge.rewriting.match import NoMatch
from omforge.rewriting.splice import Names, splice


@dataclass(frozen=True)
class _Cropped:
    """A cache, where it is cut before and behind its join, and the rows that are kept."""

    cache: ir.Value
    before: ir.Node
    join: ir.Node
    behind: ir.Node
    axis: int
    kept: int


@dataclass(frozen=True)
class UncropCache(Pass):
    """Let the cache of a layer with a window grow, where the graph itself cuts it to the window."""

    name: ClassVar[str] = "uncrop-cache"
    changes_interface: ClassVar[bool] = True

    def run(self, model: ir.Model) -> int:
        """Rewrite; the number of caches.

        Raises:
            CheckError: What is cut away would be seen, if it were there.
        """
        infer_model(model)
        found = list(_find(model))
        if not found:
            return 0
        names = Names(model)
        for number, crop in enumerate(found):
            shape = list(shape_of(crop.cache))
            shape[crop.axis] = symbol(f"cropped_{number}")
            crop.cache.shape = to_shape(tuple(shape))
        infer_model(model)
        for number, crop in enumerate(found):
            _settle(model, f"cropped_{number}", crop.kept, names)
            crop.before.outputs[0].replace_all_uses_with(crop.cache)
            _give_back(model.graph, crop, names)
        remove_dead(model)
        NameDims().run(model)
        infer_model(model)
        _prove(model, found)
        return len(found)


def _find(model: ir.Model) -> Iterator[_Cropped]:
    for join in model.graph:
        if join.op_type != "Concat" or join.domain != "" or len(join.inputs) != 2:
            continue
        past = join.inputs[0]
        before = None if past is None else past.producer()
        cache = None if before is None else before.inputs[0]
        if before is None or cache is None or not cache.is_graph_input():
            continue
        rank = len(shape_of(cache))
        axis = attribute(join, "axis", 0) % rank if rank else 0
        kept = _last_rows(before, axis, rank)
        for behind in join.outputs[0].consumers():
            given = behind.outputs[0].is_graph_output()
            if kept and given and _last_rows(behind, axis, rank) == kept:
                yield _Cropped(cache, before, join, behind, axis, kept)


def _last_rows(node: ir.Node, axis: int, rank: int) -> int:
    """N of `value[-n:]` along an axis; 0 for anything else."""
    if node.op_type != "Slice" or node.domain != "" or len(node.inputs) < 4:
        return 0
    starts, ends, axes, *steps = (None if v is None else known_ints(v) for v in node.inputs[1:])
    if axes not in ([axis], [axis - rank]) or any(step not in (None, [1]) for step in steps):
        return 0
    if not starts or not ends or starts[0] >= 0 or ends[0] < 2**31 - 1:
        return 0
    return -starts[0]


def _settle(model: ir.Model, name: str, kept: int, names: Names) -> None:
    """Put in the number of what depends on a cache's length alone, and is one up to `kept` rows."""
    for node in list(model.graph):
        value = node.outputs[0]
        if node.op_type not in ("Max", "Min", "Clip") or value.dtype is None:
            continue
        array = known(value)
        if array is None or array.size != 1:
            continue
        dim = array.ravel()[0]
        if not isinstance(dim, Expr) or symbols(dim) != frozenset((name,)):
            continue
        numbers = {int(d.evaluate(dim, {name: rows})) for rows in range(kept + 1)}
        if len(numbers) == 1:
            with Builder(model) as op:
                constant = np.full(array.shape, numbers.pop(), dtype=value.dtype.numpy())
                new = op.Identity(op.constant(constant))
                splice(op, [value], [new], by=UncropCache.name, names=names)


def _give_back(graph: ir.Graph, crop: _Cropped, names: Names) -> None:
    """Let the whole be the output that its last rows are."""
    old, whole = crop.behind.outputs[0], crop.join.outputs[0]
    for index, output in enumerate(graph.outputs):
        if output is old:
            name = old.name
            old.name = names.unique(f"{name}_cropped")
            whole.name = name
            graph.outputs[index] = whole
    old.replace_all_uses_with(whole)


def _prove(model: ir.Model, found: list[_Cropped]) -> None:
    """Check that no query sees what was cut away."""
    live = activations(model)
    prober = Prober(model, find_interface(model))
    left = {crop.join.outputs[0]: crop for crop in found}
    for softmax in [node for node in model.graph if node.op_type == "Softmax"]:
        try:
            scores = find_scores(softmax, live)
            mixed = find_mixed(softmax, live, sink=scores.sink is not None)
            read = (operands(scores.product)[1], operands(mixed.product)[1])
            cut = [left[v] for v in (trace(v, scalars=True).source for v in read) if v in left]
            if not cut:
                continue
            applied = [mask for mask, _ in reversed(scores.applied)]
            window = recognise_applied(prober, applied, mixed.guards).window if applied else None
        except NoMatch:
            continue
        if window is not None and all(window <= crop.kept + 1 for crop in cut):
            for crop in cut:
                left.pop(crop.join.outputs[0])
    if left:
        crop = next(iter(left.values()))
        raise ir.CheckError(
            f"the graph cuts its cache {crop.cache.name} to its last {crop.kept} tokens",
            "and its mask does not hide the others, so that it cannot be told what they are to it",
            "Export it with a cache that keeps all: DynamicCache() without the model's config",
        )
