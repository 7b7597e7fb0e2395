"""Attention masks, recognised by what they let through.

Every exporter release writes the causal mask differently. The subgraph that makes a mask depends on
the padding mask, the positions and shapes alone, so it is run on chosen inputs and compared, slot
by slot, with the candidates: causal, or causal within a sliding window, with or without padding,
with or without a bias that grows with the key's position; and where there is no cache, all keys or
those within a window on both sides. What equals a candidate on every probe is that candidate.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from omforge import ir
from omforge.ir import dims as d
from omforge.ir.dims import Dim, Expr
from omforge.ir.errors import InputError
from omforge.ir.evaluate import Cutout, EvaluationError, sizes
from omforge.ir.values import constant, known
from omforge.recognition.attention import alibi
from omforge.recognition.attention.alibi import Bias
from omforge.recognition.interface import Interface, stacked_positions
from omforge.recognition.views import shape_of
from omforge.rewriting.builder import Builder
from omforge.rewriting.match import NoMatch

Array = npt.NDArray[Any]

# Additive masks add 0 where they let through, and something no score can make up for where not.
_VISIBLE, _MASKED = -1e-3, -1e3

_LONGEST = 1 << 17
"""Tokens of the longest probe: a window shows only in a context that is longer than it."""

_MOST_ELEMENTS = 1 << 24
"""Of any tensor in a probe: a mask made as a square is not run at the longest lengths."""


@dataclass(frozen=True)
class Mask:
    """What a mask lets through: query i (at past + i) sees key j.

    Attributes:
        window: Keys seen, the query's own included (`query - key < window`); None for all earlier
            ones. Where later ones are seen too, it reaches as far ahead.
        padding: Whether keys whose attention_mask is 0 are hidden.
        zero_rows: A query that sees nothing gets zeros; otherwise it gets a mean of values, which
            is what a finite mask added to every score comes to.
        bias: What is added to the scores of visible keys; None for nothing.
        causal: Whether later keys are hidden.
    """

    window: int | None
    padding: bool
    zero_rows: bool
    bias: Bias | None = None
    causal: bool = True

    def visible(self, probe: Probe) -> Array:
        """Boolean [B, S, P + S]."""
        query = probe.past + np.arange(probe.seq)[:, None]
        key = np.arange(probe.past + probe.seq)[None, :]
        distance = query - key
        seen = distance >= 0 if self.causal else np.ones_like(distance, np.bool_)
        if self.window is not None:
            seen &= (distance if self.causal else np.abs(distance)) < self.window
        seen = np.broadcast_to(seen, (probe.batch, *seen.shape))
        return seen & (probe.attention_mask[:, None, :] != 0) if self.padding else seen


@dataclass(frozen=True)
class Applied:
    """One mask on the way from the scores to the softmax.

    Attributes:
        value: Additive float, or boolean; broadcastable to [B, N, S, P + S].
        fill: What replaces a hidden score, for a boolean mask; None for one that is added.
        inverted: The boolean is true where a score is hidden.
        joined: The heads, where the scores are [B*N, S, P + S]; 0 where they have an axis of their
            own.
        factor: What the scores are multiplied by between here and the softmax.
        floor: What is below this is raised to it afterwards.
        by_operator: Applied by `Attention`: ONNX Runtime takes a row of nothing but the dtype's
            lowest number for one that sees nothing, and gives zeros.
    """

    value: ir.Value
    fill: float | None = None
    inverted: bool = False
    joined: int = 0
    factor: float = 1.0
    floor: float | None = None
    by_operator: bool = False


@dataclass(frozen=True)
class Probe:
    """One choice of inputs: int64 attention_mask [B, P + S] and position_ids [B, S]."""

    past: int
    seq: int
    attention_mask: Array

    @property
    def batch(self) -> int:
        """Rows."""
        return self.attention_mask.shape[0]

    @property
    def position_ids(self) -> Array:
        """The positions that a caller would give: counted over the tokens that are no padding."""
        counted = np.maximum(np.cumsum(self.attention_mask, axis=1) - 1, 0)
        return counted[:, self.past :]


class Prober:
    """Runs parts of one model on probes.

    Args:
        model: The model, its dimensions named by `name-dims`.
        interface: Its inputs' roles.

    Attributes:
        opset: The version of the default domain.
    """

    def __init__(self, model: ir.Model, interface: Interface) -> None:
        self.opset = model.opset_imports[""]
        self._interface = interface
        self._stacked = stacked_positions(interface)

    @property
    def cached(self) -> bool:
        """Whether the model has a cache: then no query can see what comes later."""
        return bool(self._interface.caches)

    def sizes(self, batch: int, seq: int, past: int) -> tuple[int, int, int]:
        """The sizes nearest to those asked for that the model admits: an export may fix some.

        Without a cache, the past is part of the sequence.
        """
        cached = bool(self._interface.caches)
        asked = {"batch": batch, "seq": seq if cached else seq + past, "past": past}
        ids = shape_of(self._interface.input_ids)
        rows, new = _number(ids[0], asked), _number(ids[1], asked)
        if not cached:
            return rows, new, 0
        cache = shape_of(self._interface.caches[0][0])
        return rows, new, _number(cache[2], asked) if len(cache) == 4 else past

    def bindings(self, batch: int, seq: int, past: int) -> dict[str, int]:
        """Numbers for the dimensions that name-dims names.

        Without a cache there is no past: a part that has one anyway is not run as if it were empty.
        """
        found = {"batch": batch, "seq": seq}
        return {**found, "past": past} if self._interface.caches else found

    def cut(self, outputs: Sequence[ir.Value]) -> Cutout:
        """The part that makes `outputs` from attention_mask, position_ids and shapes."""
        interface = self._interface
        given = (interface.attention_mask, interface.position_ids, self._stacked)
        return Cutout(outputs, [v for v in given if v is not None], self.opset)

    def run(self, part: Cutout, probe: Probe, position_ids: Array | None = None) -> list[Array]:
        """Run a part on a probe.

        Raises:
            EvaluationError: It depends on something else, or ONNX Runtime refuses it.
        """
        feeds: dict[str, Array] = {}
        interface = self._interface
        for value, array in (
            (interface.attention_mask, probe.attention_mask),
            (interface.position_ids, probe.position_ids if position_ids is None else position_ids),
        ):
            if value is None or value.name is None or value.dtype is None:
                continue
            if value is interface.attention_mask and len(shape_of(value)) == 4:
                feeds[value.name] = given_mask(value.dtype, Mask(None, True, False).visible(probe))
            elif len(shape_of(value)) == array.ndim:
                feeds[value.name] = array.astype(value.dtype.numpy())
        if self._stacked is not None and self._stacked.name and position_ids is None:
            # Far apart: what takes one for the other shows.
            rows = [probe.position_ids + 11 * row for row in range(_rows(self._stacked))]
            feeds[self._stacked.name] = np.stack(rows)
        return part.run(feeds, self.bindings(probe.batch, probe.seq, probe.past))


def _number(dim: Dim, asked: Mapping[str, int]) -> int:
    try:
        return d.evaluate(dim, asked)
    except InputError as error:  # a size of its own, which nothing else says
        raise EvaluationError(error.what, error.why) from error


def given_mask(dtype: ir.DataType, visible: Array) -> Array:
    """What a caller who makes the whole mask gives for visible [B, S, P + S]: [B, 1, S, P + S]."""
    whole = visible[:, None]
    if not dtype.is_floating_point():
        return whole.astype(dtype.numpy())
    return np.where(whole, 0.0, float(dtype.min)).astype(dtype.numpy())


def recognise(
    prober: Prober, mask: ir.Value, row_guards: Sequence[ir.Value], hidden: float | None
) -> Mask:
    """The mask that one value is; see `recognise_applied`.

    Args:
        prober: Runs parts of the model.
        mask: Additive float, or boolean with true for visible.
        row_guards: Booleans that zero a query's output where true.
        hidden: For a boolean mask, what is put in place of a hidden score.

    Raises:
        NoMatch: It is none of the candidates, or depends on more than masks, positions and shapes.
    """
    return recognise_applied(prober, [Applied(mask, hidden)], row_guards)


def recognise_applied(
    prober: Prober, applied: Sequence[Applied], row_guards: Sequence[ir.Value]
) -> Mask:
    """The mask that several come to, one applied after the other.

    Args:
        prober: Runs parts of the model.
        applied: In the order in which the scores meet them, at least one.
        row_guards: Booleans that zero a query's output where true; broadcastable to [B, N, S, 1].

    Raises:
        NoMatch: It is none of the candidates, or depends on more than masks, positions and shapes.
    """
    value = applied[-1].value
    try:
        part = prober.cut([*(mask.value for mask in applied), *row_guards])
        bias = _bias(prober, part, applied)
        possible: list[Mask] | None = None
        empty: set[bool] = set()
        for probe, seen, zeroed in _observations(prober, part, applied, bias):
            if possible is None:
                possible = list(_candidates(seen, probe, prober.cached))
            possible = [m for m in possible if np.array_equal(m.visible(probe), seen)]
            if not possible:
                kind = "causal mask" if prober.cached else "causal mask, nor one of all tokens,"
                raise NoMatch(f"it is no {kind} for {probe.seq} tokens after {probe.past}", value)
            if zeroed is not None:
                empty.add(zeroed)
    except EvaluationError as error:
        raise NoMatch(f"the mask cannot be compared: {error}", value) from error
    assert possible
    return replace(possible[0], zero_rows=empty == {True}, bias=bias)


def _bias(prober: Prober, part: Cutout, applied: Sequence[Applied]) -> Bias | None:
    """The bias that the masks may hold beside what they hide; it is still to be compared."""
    scores, _ = _scores(prober, part, _probe(prober, 1, 3, 8, pads=(0,)), applied)
    slopes = alibi.read_slopes(scores[0, :, -1])
    if slopes is None:
        return None
    probe = _probe(prober, 2, 4, 3, pads=(0,), hole=1)
    scores, _ = _scores(prober, part, probe, applied)
    by_slot = Bias(slopes, "slot")
    try:
        _seen(scores, by_slot, probe, applied[-1].value)
    except NoMatch:
        return replace(by_slot, counts="token")
    return by_slot


Observation = tuple[Probe, Array, bool | None]
"""A probe, what is visible in it, and whether a query that sees nothing gets zeros (None: none)."""


def _observations(
    prober: Prober, part: Cutout, applied: Sequence[Applied], bias: Bias | None
) -> Iterator[Observation]:
    # Longest first: only a context longer than the window shows it.
    longest = 0
    length = _LONGEST
    while length >= 16 and not longest:
        probe = _probe(prober, 2, 3, length - 3, pads=(0, 2))
        length //= 2
        if _elements(prober, part, probe) > _MOST_ELEMENTS:
            continue
        try:
            found = _observe(prober, part, probe, applied, bias)
        except EvaluationError:
            continue  # a mask cut out of a table ends with the table
        longest = probe.past + probe.seq
        yield found
    for window in _windows(part):
        if window >= longest:
            probe = _probe(prober, 2, 3, window + 4, pads=(0, 2))
            if _elements(prober, part, probe) > _MOST_ELEMENTS:
                raise NoMatch(
                    f"it may have a window of {window}, and is made as too large a square to tell",
                    applied[-1].value,
                )
            try:
                yield _observe(prober, part, probe, applied, bias)
            except EvaluationError:
                continue
    for probe in _probes(prober):
        yield _observe(prober, part, probe, applied, bias)


def _elements(prober: Prober, part: Cutout, probe: Probe) -> int:
    """Elements of the largest tensor that a run makes."""
    bindings = prober.bindings(probe.batch, probe.seq, probe.past)
    most = probe.batch * probe.seq * (probe.past + probe.seq)  # what the masks are broadcast to
    for node in part.nodes:
        for output in node.outputs:
            try:
                most = max(most, math.prod(sizes(output, bindings)))
            except EvaluationError:  # of unknown size: at worst a square for each row
                most = max(most, probe.batch * (probe.past + probe.seq) ** 2)
    return most


def _observe(
    prober: Prober, part: Cutout, probe: Probe, applied: Sequence[Applied], bias: Bias | None
) -> Observation:
    """Apply the masks to scores of 0."""
    where = applied[-1].value
    scores, guards = _scores(prober, part, probe, applied)
    seen = _seen(scores, bias, probe, where)
    zeroed = np.zeros(scores.shape[:3], dtype=np.bool_)
    for guard, array in zip(part.outputs[len(applied) :], guards, strict=True):
        shape = (*scores.shape[:3], 1)
        zeroed |= np.broadcast_to(_fitted(array, shape, guard), shape)[..., 0]
    blank = ~seen.any(axis=-1)
    if np.any(zeroed & ~blank):
        raise NoMatch("rows are zeroed that do see keys", where)
    if not np.array_equal(seen, np.broadcast_to(seen[:, :1], seen.shape)):
        raise NoMatch("its heads see different keys", where)
    if not blank.any():
        return probe, seen[:, 0], None
    if np.any(zeroed[blank]) and not np.all(zeroed[blank]):
        raise NoMatch("some rows that see nothing are zeroed, and some are not", where)
    none = np.isneginf(scores)
    if applied[-1].by_operator:
        none |= scores <= np.finfo(scores.dtype).min
    zeros = zeroed | none.all(axis=-1)
    return probe, seen[:, 0], bool(np.all(zeros[blank]))


def _scores(
    prober: Prober, part: Cutout, probe: Probe, applied: Sequence[Applied]
) -> tuple[Array, list[Array]]:
    """What the masks make of scores of 0, [B, N or 1, S, P + S], and the arrays of the guards."""
    arrays = prober.run(part, probe)
    masks = [_by_head(a, m, probe) for a, m in zip(arrays, applied, strict=False)]
    heads = max(array.shape[-3] if array.ndim > 2 else 1 for array in masks)
    shape = (probe.batch, heads, probe.seq, probe.past + probe.seq)
    scores = np.zeros((1, 1, 1, 1), dtype=np.float32)
    with np.errstate(over="ignore"):  # the lowest number twice is minus infinity in the model too
        for mask, array in zip(applied, masks, strict=True):
            array = _fitted(array, shape, mask.value)
            if mask.fill is not None:
                fill = np.float32(mask.fill) * np.float32(mask.factor)
                scores = np.where(_truths(array, mask) ^ mask.inverted, scores, fill)
            elif array.dtype == np.bool_:
                raise NoMatch("a boolean is added to the scores", mask.value)
            else:
                scores = scores.astype(array.dtype) + array * array.dtype.type(mask.factor)
            if mask.floor is not None:
                scores = np.maximum(scores, scores.dtype.type(mask.floor * mask.factor))
    return np.broadcast_to(scores, shape), arrays[len(applied) :]


def _truths(array: Array, mask: Applied) -> Array:
    """What a mask shows, if it is one: scores may be multiplied by ones and zeros."""
    if array.dtype != np.bool_ and not np.isin(array, (0, 1)).all():
        raise NoMatch("the scores are multiplied by more than zeros and ones", mask.value)
    return array.astype(np.bool_)


def _rows(stacked: ir.Value) -> int:
    count = shape_of(stacked)[0]
    return count if isinstance(count, int) else 3


def _by_head(array: Array, mask: Applied, probe: Probe) -> Array:
    """The array with an axis for the heads where they are joined to the batch."""
    if not mask.joined or array.ndim < 3 or array.shape[0] == 1:
        return array
    if array.ndim > 3 or array.shape[0] != probe.batch * mask.joined:
        raise EvaluationError(f"{mask.value.name} has shape {array.shape}")
    return array.reshape(probe.batch, mask.joined, *array.shape[1:])


def _seen(scores: Array, bias: Bias | None, probe: Probe, where: ir.Value) -> Array:
    """What scores [B, N, S, P + S] let through, beside a bias."""
    slack = -_VISIBLE
    if bias is not None:
        wanted = bias.at(probe.attention_mask)
        span = float(np.abs(wanted).max())
        slack += span * (2**-9 if scores.dtype.itemsize < 4 else 2**-20)
        if wanted.shape[1] != scores.shape[1]:
            raise NoMatch(f"it has {scores.shape[1]} heads, and its bias {wanted.shape[1]}", where)
        with np.errstate(invalid="ignore"):
            scores = scores.astype(np.float64) - wanted
            # What is added to all keys of a query is not seen; a row without keys has nothing else.
            most = scores.max(axis=-1, keepdims=True)
            scores = scores - np.where(most < _MASKED - span, 0.0, most)
    seen = scores >= -slack
    if not np.all(seen | (scores <= _MASKED)) or np.any(scores > slack):
        raise NoMatch(
            "it adds more than a mask to the scores, and no ALiBi (a learned bias for each "
            "distance, as T5 has, is not served)",
            where,
        )
    return seen


def _fitted(array: Array, shape: tuple[int, ...], value: ir.Value) -> Array:
    """The array, if it broadcasts to a shape; EvaluationError otherwise."""
    padded = (1,) * (len(shape) - array.ndim) + array.shape
    if len(padded) > len(shape) or any(
        have not in (1, want) for have, want in zip(padded, shape, strict=True)
    ):
        raise EvaluationError(f"{value.name} has shape {array.shape}, which does not fit {shape}")
    return array.reshape(padded)


def _candidates(seen: Array, probe: Probe, cached: bool) -> Iterator[Mask]:
    """Candidates by counting what the last query of the least padded row sees; simplest first."""
    whole = int(np.argmax(probe.attention_mask.sum(axis=1)))
    for causal in (True,) if cached else (True, False):
        for window in (None, int(seen[whole, -1].sum())):
            for padding in (True, False):
                yield Mask(window, padding, False, causal=causal)


def _probes(prober: Prober) -> Iterator[Probe]:
    yield _probe(prober, 2, 3, 8, pads=(0, 2))
    yield _probe(prober, 2, 1, 4, pads=(0, 3))
    yield _probe(prober, 2, 4, 0, pads=(0, 2))
    yield _probe(prober, 2, 5, 3, pads=(5, 1))
    yield _probe(prober, 1, 6, 0, pads=(0,))
    yield _probe(prober, 2, 5, 2, pads=(0, 1), right=2)
    yield _probe(prober, 2, 4, 3, pads=(0,), hole=1)


def _probe(
    prober: Prober,
    batch: int,
    seq: int,
    past: int,
    pads: tuple[int, ...],
    right: int = 0,
    hole: int = 0,
) -> Probe:
    """One probe; `pads` are for the last rows, so that an export of a single row has the last."""
    batch, seq, past = prober.sizes(batch, seq, past)
    attention_mask = np.ones((batch, past + seq), dtype=np.int64)
    for row in range(batch):
        attention_mask[row, : pads[(row - batch) % len(pads)]] = 0
    if right:
        attention_mask[-1, -right:] = 0
    if hole:
        attention_mask[-1, hole] = 0
    return Probe(past, seq, attention_mask)


def _windows(part: Cutout) -> list[int]:
    """Integers in the part that could be a window, largest first."""
    found: set[int] = set()
    for node in part.nodes:
        for value in node.inputs:
            if node.op_type == "Mul" and _is_low(value):
                continue
            found.update(n for n in _numbers(value) if 2 <= n <= _LONGEST)
    return sorted(found, reverse=True)


def _is_low(value: ir.Value | None) -> bool:
    """Whether it is a number far below 0: times 1 where a score is hidden, it hides it."""
    array = constant(value, limit=4)
    return array is not None and array.dtype.kind == "f" and bool((array <= _MASKED).all())


def _numbers(value: ir.Value | None) -> Iterable[int]:
    """The sizes of a small constant's numbers, and of those in shape arithmetic (past - 4096)."""
    symbolic = known(value)
    if symbolic is not None:
        elements = list(symbolic.ravel())
        return [abs(int(e.terms.get((), 0) if isinstance(e, Expr) else e)) for e in elements]
    array = constant(value, limit=4)
    if array is None or array.dtype.kind != "f":
        return ()
    numbers = array.astype(np.float64).ravel()
    return [int(abs(n)) for n in numbers if n not in _HIDING and abs(n) <= _LONGEST]


_HIDING = (float(np.finfo(np.float16).min), float(np.finfo(np.float16).min) / 2)
"""What hides a score in float16, in exports and in `build`, and is no window."""


def build(op: Builder, interface: Interface, mask: Mask, dtype: ir.DataType) -> ir.Value:
    """The canonical form of a mask, [B, 1, S, P + S], from attention_mask and shapes.

    Boolean where an empty row gives zeros, since that is what `Attention` does; else 0 and half of
    the dtype's lowest number, which ONNX Runtime does not take for "nothing visible" as it does the
    lowest itself. With a bias, that stands in place of 0, the mask is [B, N, S, P + S], and the
    lowest hides where an empty row gives zeros. What the caller gives as a whole is taken.

    Raises:
        NoMatch: The caller gives a whole mask, and there is a bias beside it.
    """
    given = interface.attention_mask
    if given is not None and mask.padding and len(shape_of(given)) == 4:
        return _build_given(op, given, mask, dtype)
    seq = op.Shape(interface.input_ids, start=1, end=2)
    one = op.constant(np.array([1], dtype=np.int64))
    if interface.caches:
        past = op.Shape(interface.caches[0][0], start=2, end=3)
        last = op.Squeeze(past)  # a diagonal is a scalar
        total = op.Add(past, seq)
    else:
        last, total = op.constant(np.array(0, dtype=np.int64)), seq
    if mask.padding and interface.attention_mask is not None:
        truths = op.Cast(interface.attention_mask, to=int(ir.DataType.BOOL))
        keys, width = op.Unsqueeze(truths, [1, 2]), one
    else:
        keys, width = op.constant(np.array(True)), total
    seen = op.Expand(keys, op.Concat(one, one, seq, width, axis=0))
    if mask.causal:
        seen = op.Trilu(seen, last, upper=0)
    elif mask.window is not None:
        ahead = op.Add(last, op.constant(np.array(mask.window - 1, dtype=np.int64)))
        seen = op.Trilu(seen, ahead, upper=0)
    if mask.window is not None:
        first = op.Sub(last, op.constant(np.array(mask.window - 1, dtype=np.int64)))
        seen = op.Trilu(seen, first, upper=1)
    if mask.zero_rows and mask.bias is None:
        return seen
    shown = op.constant(np.zeros((), dtype=dtype.numpy()))
    if mask.bias is not None:
        shown = alibi.build(op, mask.bias, interface.attention_mask, total, dtype)
    lowest = float(dtype.min)
    low = np.array(lowest if mask.zero_rows else lowest / 2, dtype=dtype.numpy())
    return op.Where(seen, shown, op.constant(low))


def _build_given(op: Builder, given: ir.Value, mask: Mask, dtype: ir.DataType) -> ir.Value:
    if mask.bias is not None or mask.window is not None:
        raise NoMatch("the caller gives a mask, and the graph makes another beside it", given)
    low = op.constant(np.array(float(dtype.min) / 2, dtype=dtype.numpy()))
    if given.dtype is not None and given.dtype.is_floating_point():
        added = given if given.dtype == dtype else op.Cast(given, to=int(dtype))
        return added if mask.zero_rows else op.Max(added, low)
    seen = op.Cast(given, to=int(ir.DataType.BOOL))
    if mask.zero_rows:
        return seen
    return op.Where(seen, op.constant(np.zeros((), dtype=dtype.numpy())), low)
