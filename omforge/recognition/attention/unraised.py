"""Attention that was not raised, given a cache of fixed capacity as it stands.

Before, and after, with the axis of keys T from P+S to C+S::

    k      = Concat(past_k [B, K, P, D], new_k [B, K, S, D])       past_k [B, K, C, D]
    scores = Add(MatMul(q, view(k)), exported mask [B, 1, S, P+S])  the runtime's mask
    out    = MatMul(anything(scores), view(v))                      the same nodes

What lies between is not understood, so the result is run: on P valid slots with the exported mask,
and on C slots, those behind the valid ones full of garbage, with the runtime's mask. A block that
counts its keys (a bias by key number, a mean over them) gives other numbers, and is refused.

The price is the Concat, which copies the cache at every step.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from omforge import ir
from omforge.ir import dims as d
from omforge.ir.edit import replace_value
from omforge.ir.evaluate import Cutout, EvaluationError, sizes
from omforge.ir.numerics import max_abs_diff, tolerance, within
from omforge.ir.values import attribute, dims, known
from omforge.recognition.attention import masks
from omforge.recognition.attention.alibi import Bias
from omforge.recognition.attention.masks import Applied, Mask, Probe, Prober
from omforge.recognition.interface import CacheLayer, Interface
from omforge.recognition.views import scalar, shape_of
from omforge.rewriting.builder import Builder
from omforge.rewriting.match import NoMatch
from omforge.rewriting.splice import splice

Array = npt.NDArray[Any]

HIDDEN = -30000.0  # as in every bundle: finite in float16 even when a score is added
_GARBAGE = 3.0
_SLACK = 4
"""Cache slots behind the valid ones in a trial."""

_AS_SIZE: Mapping[str, tuple[int, ...]] = {
    "Reshape": (1,),
    "Expand": (1,),
    "Slice": (2,),
    "ConstantOfShape": (0,),
    "Tile": (1,),
    "Split": (1,),
}
"""Inputs that say how long something is: they may follow the capacity."""


@dataclass(frozen=True)
class Site:
    """A node that lets a mask act on scores [.., S, T]."""

    node: ir.Node
    applied: Applied
    scores: ir.Value | None
    """None for an `Attention`, which takes its mask itself."""


@dataclass(frozen=True)
class _Trial:
    """One run of the block as it was exported: inputs by value, and what came out."""

    probe: Probe
    feeds: dict[ir.Value, Array]
    positions: Array
    results: list[Array]


@dataclass
class Unraised:
    """One layer's attention, as far as it depends on the cache.

    Attributes:
        layer: Its cache.
        new: The step's keys and values, [B, K, S, D].
        nodes: What works on values with an axis of keys, in the graph's order.
        given: What they read that depends on tokens, the cache included.
        exits: What they make that has no axis of keys any more.
        sites: The nodes whose masks the runtime's mask replaces.
        window: The kind of that mask.
        bias: What that mask adds to the scores besides.
    """

    layer: CacheLayer
    new: tuple[ir.Value, ir.Value]
    nodes: list[ir.Node]
    given: list[ir.Value]
    exits: list[ir.Value]
    sites: list[Site] = field(default_factory=list[Site])
    window: int | None = None
    bias: Bias | None = None
    trials: list[_Trial] = field(default_factory=list[_Trial])

    @property
    def where(self) -> str:
        """The place, for messages."""
        return ir.describe(self.nodes[-1])


def find(
    model: ir.Model, interface: Interface, layers: Iterable[CacheLayer], live: set[ir.Value]
) -> dict[CacheLayer, Unraised]:
    """The attention of the layers that have no `Attention` of their own, run as it was exported.

    Raises:
        CheckError: A cache is read in another way, or a mask is not one that the runtime can make.
    """
    order = {node: index for index, node in enumerate(model.graph)}
    prober = Prober(model, interface)
    kinds: dict[tuple[Applied, ...], Mask | NoMatch] = {}
    found: dict[CacheLayer, Unraised] = {}
    for layer in layers:
        if layer.block is not None:
            continue
        block = _block(layer, live, order)
        _find_mask(block, prober, live, kinds)
        _run_as_exported(block, prober, interface)
        found[layer] = block
    return found


def _block(layer: CacheLayer, live: set[ir.Value], order: Mapping[ir.Node, int]) -> Unraised:
    joins = [_join(past, present) for past, present in zip(layer.past, layer.present, strict=True)]
    length = _length(layer.past[0])
    nodes: set[ir.Node] = set()
    pending = list(layer.past)
    while pending:
        value = pending.pop()
        for node in value.consumers():
            if node in nodes or all(known(output) is not None for output in node.outputs):
                continue
            nodes.add(node)
            for output in node.outputs:
                if dims(output) is None:
                    raise _refused(
                        layer, f"{ir.describe(node)} makes {output.name}, whose shape is not known"
                    )
                if _has(output, length):
                    pending.append(output)
    ordered = sorted(nodes, key=lambda node: order[node])
    made = {output for node in ordered for output in node.outputs}
    read = [v for node in ordered for v in node.inputs if v is not None and v not in made]
    given = list(dict.fromkeys(v for v in read if v in live and known(v) is None))
    for value in given:
        if value not in layer.past and _has(value, length):
            raise _refused(
                layer,
                f"{value.name} is made of tokens and as long as the cache: "
                f"[{', '.join(map(str, shape_of(value)))}]",
            )
    exits = [v for v in made if not _has(v, length) and (v.uses() or v.is_graph_output())]
    exits.sort(key=lambda v: (order[_maker(v)], v.index() or 0))
    if not exits:
        raise _refused(layer, "nothing is made of it")
    return Unraised(layer, (_new(joins[0]), _new(joins[1])), ordered, given, exits)


def _join(past: ir.Value, present: ir.Value) -> ir.Node:
    """The Concat of a past [B, K, P, D] and the step's own."""
    node = present.producer()
    if (
        node is not None
        and node.op_type == "Concat"
        and len(node.inputs) == 2
        and node.inputs[0] is past
        and len(shape_of(past)) == len(shape_of(present)) == 4
        and attribute(node, "axis") in (2, -2)
    ):
        return node
    made = "an input" if node is None else ir.describe(node)
    raise ir.CheckError(
        f"the cache {past.name} cannot be given a fixed capacity",
        f"expected: Concat({past.name} [B, K, P, D], the step's own, axis=2) makes {present.name}; "
        f"there is {made}, and {past.name} is [{', '.join(map(str, shape_of(past)))}]",
        "`omforge explain` says of each attention why it was not raised",
    )


def _new(join: ir.Node) -> ir.Value:
    new = join.inputs[1]
    assert new is not None
    return new


def _maker(value: ir.Value) -> ir.Node:
    node = value.producer()
    assert node is not None
    return node


def _length(past: ir.Value) -> str:
    """The symbol of the cache's length."""
    names = d.symbols(shape_of(past)[2])
    if len(names) != 1:
        raise ir.CheckError(
            f"the cache {past.name} cannot be given a fixed capacity",
            f"its attention was not raised, and its length is {shape_of(past)[2]}, not a symbol",
            "Export the model with a dynamic cache length",
        )
    return next(iter(names))


def _has(value: ir.Value, symbol: str) -> bool:
    return any(symbol in d.symbols(dim) for dim in shape_of(value))


def _refused(layer: CacheLayer, why: str) -> ir.CheckError:
    return ir.CheckError(
        f"the cache {layer.past[0].name} cannot be given a fixed capacity: its attention was not "
        "raised, and cannot be kept as it stands",
        why,
        "`omforge explain` says of each attention why it was not raised",
    )


# --- the mask ---------------------------------------------------------------------------------


def _find_mask(
    block: Unraised,
    prober: Prober,
    live: set[ir.Value],
    kinds: dict[tuple[Applied, ...], Mask | NoMatch],
) -> None:
    """Find the sites whose masks come to one that the runtime can make."""
    length = _length(block.layer.past[0])
    sites = [site for node in block.nodes for site in _sites(node, live, length)]
    if not sites:
        raise _refused(
            block.layer, f"no mask is applied between {block.layer.past[0].name} and {block.where}"
        )

    def kind(of: Sequence[Site]) -> Mask | NoMatch:
        key = tuple(site.applied for site in of)
        if key not in kinds:
            try:
                kinds[key] = masks.recognise_applied(prober, key, [])
            except NoMatch as miss:
                kinds[key] = miss
        return kinds[key]

    whole = kind(sites)
    if isinstance(whole, Mask):
        block.sites, block.window, block.bias = sites, whole.window, whole.bias
        return
    # Some of it may be something else, which the trial then shows to be harmless or not.
    single = [(site, found) for site in sites if isinstance(found := kind([site]), Mask)]
    found = {(mask.window, mask.bias) for _, mask in single}
    if len(found) != 1:
        at = ", ".join(ir.describe(site.node) for site in sites)
        raise _refused(
            block.layer,
            f"its mask, applied at {at}, is not one that the runtime can make: expected a causal "
            f"mask, with or without a sliding window; found: {whole}",
        )
    block.sites = [site for site, _ in single]
    block.window, block.bias = found.pop()


def _sites(node: ir.Node, live: set[ir.Value], length: str) -> Iterable[Site]:
    if node.domain != "":
        return
    if node.op_type == "Attention":
        mask = node.inputs[3] if len(node.inputs) > 3 else None
        if mask is not None and mask not in live:
            yield Site(node, Applied(mask, _hidden(mask)), None)
        return
    long = [v for v in node.inputs if v is not None and v not in live and _has(v, length)]
    if len(long) != 1:
        return
    if node.op_type == "Add":
        scores = next((v for v in node.inputs if v is not long[0]), None)
        if scores is not None and scores in live:
            yield Site(node, Applied(long[0]), scores)
    elif node.op_type == "Where" and node.inputs[0] is long[0]:
        shown, other = node.inputs[1:3]
        for scores, fill, inverted in ((shown, other, False), (other, shown, True)):
            number = scalar(fill)
            if scores is not None and scores in live and number is not None:
                yield Site(node, Applied(long[0], number, inverted), scores)


def _hidden(mask: ir.Value) -> float | None:
    return -float("inf") if mask.dtype == ir.DataType.BOOL else None


def attach(model: ir.Model, block: Unraised, mask: ir.Value, by: str) -> None:
    """Put the runtime's mask, additive [B, 1, S, C+S], in place of the exported ones.

    It goes to the site nearest to the softmax; the others are taken out.

    Raises:
        CheckError: The scores have no place for it.
    """
    *others, last = block.sites
    at = next((i for i, v in enumerate(last.node.inputs) if v is last.scores), None)
    for site in others:
        replace_value(site.node.outputs[0], _scores(block, site))
    if at is not None:
        last = replace(last, scores=last.node.inputs[at])  # it may be what was just taken out
    with Builder(model) as op:
        if last.scores is None:
            query = last.node.inputs[0]
            assert query is not None
            fitted = mask if mask.dtype == query.dtype else op.CastLike(mask, query)
            inputs = list(last.node.inputs)
            inputs[3] = fitted
            options = {name: a.value for name, a in last.node.attributes.items()}
            outputs = op.node("Attention", inputs, options, outputs=len(last.node.outputs)).outputs
            splice(op, [last.node.outputs[0]], [outputs[0]], by=by, matched=[last.node])
        else:
            scores = _scores(block, last)
            fitted = mask if mask.dtype == scores.dtype else op.CastLike(mask, scores)
            if len(shape_of(scores)) == 5:  # [B, K, N/K, S, T]
                fitted = op.Unsqueeze(fitted, [1])
            outputs = [op.Add(scores, fitted)]
            splice(op, [last.node.outputs[0]], [outputs[0]], by=by, matched=[last.node])
    gone = {site.node for site in block.sites}
    block.nodes = [node for node in block.nodes if node not in gone] + op.nodes
    block.exits = [outputs[0] if v is last.node.outputs[0] else v for v in block.exits]


def _scores(block: Unraised, site: Site) -> ir.Value:
    scores = site.scores
    if scores is None:
        raise _refused(block.layer, f"{ir.describe(site.node)} masks, and another node after it")
    rank = len(shape_of(scores))
    # Of the two lengths of an axis of keys inference may keep either name.
    if rank not in (4, 5) or len(shape_of(site.node.outputs[0])) != rank:
        raise _refused(
            block.layer,
            f"expected scores [B, N, S, T] at {ir.describe(site.node)}, there are "
            f"[{', '.join(map(str, shape_of(scores)))}]",
        )
    return scores


# --- the trial --------------------------------------------------------------------------------


def _trial_sizes(prober: Prober) -> Iterable[tuple[int, int, int, int]]:
    """Rows, new tokens, past, padding of the last row: no query is without a key."""
    for batch, seq, past, padding in ((2, 3, 5, 2), (2, 1, 7, 3), (1, 4, 0, 0)):
        yield (*prober.sizes(batch, seq, past), padding)


def _run_as_exported(block: Unraised, prober: Prober, interface: Interface) -> None:
    told = [v for v in (interface.attention_mask, interface.position_ids) if v is not None]
    random = np.random.default_rng(0)
    try:
        part = Cutout(block.exits, [*block.given, *told], prober.opset)
        for batch, seq, past, padding in _trial_sizes(prober):
            attention_mask = np.ones((batch, past + seq), np.int64)
            attention_mask[-1, : padding if batch > 1 else 0] = 0
            probe = Probe(past, seq, attention_mask)
            bindings = prober.bindings(batch, seq, past)
            feeds = {v: _random(v, sizes(v, bindings), random) for v in block.given}
            named = {_name(value): array for value, array in feeds.items()}
            for value, array in (
                (interface.attention_mask, attention_mask),
                (interface.position_ids, probe.position_ids),
            ):
                if value is not None and value.dtype is not None:
                    named[_name(value)] = array.astype(value.dtype.numpy())
            results = part.run(named, bindings)
            block.trials.append(_Trial(probe, feeds, probe.position_ids, results))
    except EvaluationError as error:
        raise _refused(block.layer, f"{block.where} cannot be run alone: {error}") from error


def _random(value: ir.Value, shape: tuple[int, ...], random: np.random.Generator) -> Array:
    assert value.dtype is not None
    if value.dtype is ir.DataType.BOOL or value.dtype.is_integer():
        return np.zeros(shape, value.dtype.numpy())
    return random.standard_normal(shape).astype(value.dtype.numpy())


def _name(value: ir.Value) -> str:
    assert value.name is not None
    return value.name


def compare(
    block: Unraised,
    pasts: tuple[ir.Value, ir.Value],
    mask: ir.Value,
    key_positions: ir.Value | None,
    position_ids: ir.Value | None,
    opset: int,
) -> None:
    """Run the block on a cache with slots to spare, and compare with what it was.

    Args:
        block: With the runtime's mask attached, and its new cache.
        pasts: The new cache, [B, K, C, D] each.
        mask: The runtime's mask, [B, 1, S, C+S].
        key_positions: Where each key stands, [1, 1, 1, C+S], if a bias is made of it.
        position_ids: What positions are made of now.
        opset: The version of the default domain.

    Raises:
        CheckError: The numbers differ: the block depends on more than the slots that it sees.
    """
    given = [v for v in block.given if v not in block.layer.past]
    told = [value for value in (key_positions, position_ids) if value is not None]
    try:
        part = Cutout(block.exits, [*given, *pasts, mask, *told], opset)
        for trial in block.trials:
            feeds, bindings = _with_slack(trial, block, pasts, mask, position_ids)
            if key_positions is not None:
                feeds |= _key_positions(trial.probe, key_positions)
            results = part.run(feeds, bindings)
            for value, got, wanted in zip(block.exits, results, trial.results, strict=True):
                allowed = tolerance(wanted.dtype.name)
                if got.shape == wanted.shape and within(got, wanted, allowed):
                    continue
                past, seq = trial.probe.past, trial.probe.seq
                shown = (
                    f"by {max_abs_diff(got, wanted):.3g}"
                    if got.shape == wanted.shape
                    else f"in shape, {list(got.shape)} from {list(wanted.shape)}"
                )
                raise _refused(
                    block.layer,
                    f"{value.name}, which {ir.describe(_maker(value))} makes, differs {shown} when "
                    f"{seq} tokens after {past} are run with {_SLACK} masked slots to spare: it "
                    "depends on the number or the order of the keys (a bias by their positions, "
                    "as ALiBi is)",
                )
    except EvaluationError as error:
        raise _refused(block.layer, f"{block.where} cannot be run alone: {error}") from error


def _with_slack(
    trial: _Trial,
    block: Unraised,
    pasts: tuple[ir.Value, ir.Value],
    mask: ir.Value,
    position_ids: ir.Value | None,
) -> tuple[dict[str, Array], dict[str, int]]:
    """Feeds and bindings of a trial with more slots than the past has."""
    probe = trial.probe
    capacity = probe.past + _SLACK
    feeds = {
        _name(value): array for value, array in trial.feeds.items() if value not in block.layer.past
    }
    for old, new in zip(block.layer.past, pasts, strict=True):
        array = trial.feeds[old]
        slack = np.full((*array.shape[:2], _SLACK, array.shape[3]), _GARBAGE, array.dtype)
        feeds[_name(new)] = np.concatenate([array, slack], axis=2)
    seen = Mask(block.window, True, False).visible(probe)
    hidden = np.zeros((*seen.shape[:2], _SLACK), np.bool_)
    seen = np.concatenate([seen[..., : probe.past], hidden, seen[..., probe.past :]], axis=2)
    assert mask.dtype is not None
    feeds[_name(mask)] = np.where(seen, 0.0, HIDDEN).astype(mask.dtype.numpy())[:, None]
    if position_ids is not None and position_ids.dtype is not None:
        feeds[_name(position_ids)] = trial.positions.astype(position_ids.dtype.numpy())
    return feeds, {"batch": probe.batch, "seq": probe.seq, "capacity": capacity}


def _key_positions(probe: Probe, value: ir.Value) -> dict[str, Array]:
    """The last key is 0, those before it -1, -2 ...: as the runtime counts them."""
    numbers = np.arange(probe.past + probe.seq) - (probe.past + probe.seq - 1)
    numbers = np.concatenate([numbers[: probe.past], np.zeros(_SLACK), numbers[probe.past :]])
    assert value.dtype is not None
    return {_name(value): numbers.astype(value.dtype.numpy())[None, None, None]}


def check_sizes(model: ir.Model, blocks: Iterable[Unraised], length: str) -> None:
    """Make sure that outside the blocks the capacity is a size, and never a count of tokens.

    Raises:
        CheckError: A node reads the length of the cache as a number.
    """
    inside = _makers(blocks)
    for node in model.graph:
        if node in inside or all(known(output) is not None for output in node.outputs):
            continue
        for index, value in enumerate(node.inputs):
            array = None if value is None else known(value)
            if array is None or index in _AS_SIZE.get(node.op_type, ()):
                continue
            if any(length in d.symbols(element) for element in array.ravel()):
                assert value is not None
                raise ir.CheckError(
                    f"{ir.describe(node)} counts the tokens in the cache",
                    f"{value.name} is the length of the cache, which is its capacity from now on",
                    "`omforge explain` lists what was left alone, and why",
                )


def _makers(blocks: Iterable[Unraised]) -> set[ir.Node]:
    """The blocks' nodes, and those that make what they read of shapes alone."""
    found: set[ir.Node] = set()
    pending: list[ir.Node] = []
    for block in blocks:
        found.update(block.nodes)
        kept = set(block.given)
        for node in block.nodes:
            pending += [
                made
                for value in node.inputs
                if value is not None
                and value not in kept
                and (made := value.producer()) is not None
            ]
    while pending:
        node = pending.pop()
        if node not in found:
            found.add(node)
            makers = (value.producer() for value in node.inputs if value is not None)
            pending += [maker for maker in makers if maker is not None]
    return found
