"""Positions that a model counts itself, from its cache's length or its padding mask."""

from __future__ import annotations

from collections.abc import Iterator, Sequence, Set
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from omforge import ir
from omforge.ir.dims import Dim, symbols
from omforge.ir.evaluate import EvaluationError
from omforge.ir.values import attribute, constant_tensor, dims, known, to_shape
from omforge.recognition.attention.masks import Probe, Prober
from omforge.recognition.interface import Interface
from omforge.rewriting.builder import Builder
from omforge.rewriting.match import NoMatch
from omforge.rewriting.splice import insert, splice

Array = npt.NDArray[Any]

POSITION_IDS = "position_ids"

_INTEGERS = (ir.DataType.INT64, ir.DataType.INT32)


@dataclass(frozen=True)
class Counted:
    """How positions are counted.

    Attributes:
        kind: `token`: over the tokens of a row that are no padding; `slot`: over all of them.
        offset: What the first position is (OPT starts at 2).
    """

    kind: Literal["token", "slot"]
    offset: int


def position_values(model: ir.Model) -> Iterator[ir.Value]:
    """Integers that become rotary angles or pick rows of a position table."""
    seen: set[ir.Value] = set()
    for node in model.graph:
        if node.op_type == "Cast" and node.outputs[0].dtype not in _INTEGERS:
            value = node.inputs[0]
        elif _picks_rows(node) and constant_tensor(node.inputs[0]) is not None:
            value = node.inputs[1]
        else:
            continue
        if value is None or value in seen or value.dtype not in _INTEGERS:
            continue
        seen.add(value)
        if known(value) is None and constant_tensor(value) is None and not value.is_graph_input():
            yield value


def _picks_rows(node: ir.Node) -> bool:
    """Whether it is a Gather, or the GatherND [..., 1] that one exporter writes for it."""
    if node.op_type != "GatherND":
        return node.op_type == "Gather"
    index = node.inputs[1]
    return index is not None and (dims(index) or ())[-1:] == (1,)


def are_of_all_rows(value: ir.Value) -> bool:
    """Whether positions are [S], or [S, 1] for a GatherND: one count for all rows."""
    shape = dims(value) or ()
    nd = any(node.op_type == "GatherND" for node in value.consumers())
    return len(shape) == 1 or (len(shape) == 2 and shape[-1] == 1 and nd)


def pick_for_each_row(
    model: ir.Model, value: ir.Value, counted: Counted, ids: ir.Value, *, by: str
) -> None:
    """Let positions [B, S] pick rows of a table where positions [S] did for all rows at once.

    What is picked, [S, H], is added to [B, S, H].

    Raises:
        NoMatch: They are used in another way.
    """
    users = value.consumers()
    for node in users:
        after = node.outputs[0].consumers() if _picks_rows(node) else ()
        if not after or attribute(node, "axis", 0) != 0:
            raise NoMatch("the positions of all rows are one, and do not pick from a table", node)
        for user in after:
            whole = any(len(dims(v) or ()) == 3 for v in user.inputs if v is not None)
            if user.op_type not in ("Add", "Sub", "Mul") or not whole:
                raise NoMatch("what the positions pick is not added to hidden states", user)
    for node in users:
        with Builder(model) as op:
            shift = np.array(counted.offset, dtype=np.int64)
            rows = ids if counted.offset == 0 else op.Add(ids, shift)
            picked = op.Gather(node.inputs[0], rows, axis=0)
            insert(op, node, by=by)
        for user in node.outputs[0].consumers():
            for place, given in enumerate(user.inputs):
                if given is node.outputs[0]:
                    user.replace_input_with(place, picked)


def follows_input(prober: Prober, value: ir.Value) -> bool:
    """Whether a value is the position_ids that the caller feeds, moved about or shifted."""
    probe = Probe(3, 4, np.ones((1, 7), dtype=np.int64))
    fed = np.array([[9, 4, 7, 1]], dtype=np.int64)
    try:
        part = prober.cut([value])
        (array,) = prober.run(part, probe, fed)
    except EvaluationError:
        return False
    return array.size == fed.size and len(set((array.ravel() - fed.ravel()).tolist())) == 1


def feed_positions(
    model: ir.Model,
    interface: Interface,
    live: Set[ir.Value],
    keys: Sequence[Dim],
    *,
    flags: bool,
    by: str,
) -> ir.Value | None:
    """The input position_ids, made where the model derives positions from its mask or its cache.

    A model that counts all slots, padding included, is fed what it would count without padding:
    its rows then no longer depend on what they are batched with.

    Args:
        model: The model, raised; positions that it derives are replaced.
        interface: Its roles.
        live: The values that depend on tokens or on the cache.
        keys: Lengths; what is as long as one of them numbers keys, and is left alone.
        flags: Leave what only tells padding alone.
        by: The pass.

    Raises:
        CheckError: They are derived in a way that the runtime cannot feed.
    """
    prober = Prober(model, interface)
    derived = [
        value
        for value in position_values(model)
        if value not in live
        and not _spans(value, keys)
        and not follows_input(prober, value)
        # Layers that carry a state hide padding from it by the mask's own zeros and ones.
        and not (flags and are_flags(prober, value))
        and not (interface.caches and is_fixed(prober, value))
    ]
    try:
        counted = [recognise(prober, value) for value in derived]
    except NoMatch as miss:
        raise _cannot_feed(miss) from miss
    ids = interface.position_ids
    if derived and ids is None:
        dtype = ir.DataType.INT64 if interface.embedded else interface.input_ids.dtype
        assert dtype is not None
        shape = to_shape(interface.tokens)
        ids = ir.Value(name=POSITION_IDS, shape=shape, type=ir.TensorType(dtype))
    for value, found in zip(derived, counted, strict=True):
        assert ids is not None
        if are_of_all_rows(value):
            try:
                pick_for_each_row(model, value, found, ids, by=by)
            except NoMatch as miss:
                raise _cannot_feed(miss) from miss
            continue
        op = Builder(model)
        new = ids if found.offset == 0 else op.Add(ids, np.array(found.offset, dtype=np.int64))
        target = as_shape_of(value)
        new = new if target is None else op.Reshape(new, target)
        splice(op, [value], [new], by=by)
    return ids


def _cannot_feed(miss: NoMatch) -> ir.CheckError:
    return ir.CheckError(
        "the model derives positions in a way that the runtime cannot feed",
        str(miss),
        "Export it with position_ids as an input",
    )


def _spans(value: ir.Value, lengths: Sequence[Dim]) -> bool:
    """Whether an axis of a value depends on one of some lengths."""
    names = {name for length in lengths for name in symbols(length)}
    return any(names & symbols(dim) for dim in dims(value) or ())


def are_flags(prober: Prober, value: ir.Value) -> bool:
    """Whether a value is 0 or 1 however many tokens there are: it tells padding, counts nothing."""
    try:
        part = prober.cut([value])
        return all(bool(np.isin(prober.run(part, p)[0], (0, 1)).all()) for p in _probes(prober))
    except EvaluationError:
        return False


def is_fixed(prober: Prober, value: ir.Value) -> bool:
    """Whether a value is the same behind every past: it numbers experts, say, and no positions."""
    found: list[Array] = []
    try:
        part = prober.cut([value])
        for past in (2, 7):
            rows, new, old = prober.sizes(2, 3, past)
            probe = Probe(old, new, np.ones((rows, old + new), dtype=np.int64))
            if probe.past != past:
                return False  # an export of one length only: nothing is shown
            found.append(prober.run(part, probe, np.arange(rows * new).reshape(rows, new))[0])
    except EvaluationError:
        return False
    return np.array_equal(found[0], found[1])


def recognise(prober: Prober, value: ir.Value) -> Counted:
    """How the positions in a value are counted.

    Raises:
        NoMatch: They are counted in neither way.
    """
    possible: set[Counted] | None = None
    for probe in _probes(prober):
        try:
            (array,) = prober.run(prober.cut([value]), probe)
        except EvaluationError as error:
            raise NoMatch(f"the positions cannot be run alone: {error}", value) from error
        found = set(_readings(array, probe))
        possible = found if possible is None else possible & found
    if not possible:
        raise NoMatch("its positions count neither tokens nor slots", value)
    return min(possible, key=lambda counted: counted.kind == "slot")


def _readings(array: Array, probe: Probe) -> Iterator[Counted]:
    if array.size not in (probe.seq, probe.batch * probe.seq):
        return
    got = np.broadcast_to(array.reshape(-1, probe.seq), (probe.batch, probe.seq))
    real = (
        probe.attention_mask[:, probe.past :] != 0
    )  # what padding is counted as matters to nobody
    slots = np.broadcast_to(probe.past + np.arange(probe.seq), got.shape)
    for kind, wanted in (("token", probe.position_ids), ("slot", slots)):
        offsets = set((got - wanted)[real].tolist())
        if len(offsets) == 1:
            yield Counted(kind, int(offsets.pop()))  # type: ignore[arg-type]


def _probes(prober: Prober) -> Iterator[Probe]:
    for batch, seq, past, pads in (
        (1, 4, 0, (0,)),
        (2, 3, 5, (0, 2)),
        (2, 4, 0, (0, 2)),
        (2, 1, 6, (1, 3)),
    ):
        rows, new, old = prober.sizes(batch, seq, past)
        mask = np.ones((rows, old + new), dtype=np.int64)
        for row in range(rows):
            mask[row, : pads[row % len(pads)]] = 0
        yield Probe(old, new, mask)


def as_shape_of(value: ir.Value) -> list[int] | None:
    """The Reshape target that gives [B, S] the axes of `value`; None where [B, S] will do."""
    shape = dims(value) or ()
    if len(shape) <= 2:
        return None
    ones = [1] * (len(shape) - 2)
    return [0, -1, *ones] if shape[-1] == 1 else [0, *ones, -1]
