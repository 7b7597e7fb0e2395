"""Keep the cache as int8, with scales from a calibration text.

Before (the interface of fuse-kv-io)::

    past float [B, K, C, D], new keys k float [B, S, K*D]  ->  Attention(q, k, v, .., past), present

After, for keys::

    x = Clip((k - middle) / step)
    Cast<int8>(Round(x))                               the present
    Attention(q * step, x, .., Cast(past))

and for values::

    x = Clip((v - middle) / step)
    Cast<int8>(Round(x))                               the present
    Attention(.., x, .., Cast(past)) * step + middle

So nothing touches the whole cache but a Cast. It is exact: a step that belongs to a channel of the
keys may as well multiply the query's; what the middle adds to a score is the same for all keys,
which a softmax does not notice; and shares add up to 1, so the middle of the values is added once.
Under a softcap, which would notice, keys have no middle; nor has anything where a sink is one more
row of zeros, which have to stay zeros, and takes a share; and where attention was not raised, the
integers are multiplied where they are read, and there are no middles at all.

A step's own keys and values are read ahead of their rounding, but cut off as later steps will see
them: so the chunks that a prompt comes in make no difference but for the rounding, and a key far
from all that the calibration text had does not overflow. Were they rounded too, all chunks would
give the same logits in real numbers, but not in float16: there, a key that lies half-way tips to
one integer or the other, all layers behind it see a whole step of difference in every token, and
more keys tip. (SmolLM2-135M, prompts of 96 tokens, float16 against float32: one code in five
differed.)

Rotated keys turn with their positions: what a channel holds at the begin of a text another one
holds later. The calibration text is therefore spread over all positions.

Letters: B batch, S new tokens, C capacity, N query heads, K kv heads, D size of a head.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt

from omforge import ir
from omforge.ir.infer import infer_model
from omforge.ir.segment import Walk
from omforge.ir.values import attribute, dims
from omforge.quantization.blockwise import storable
from omforge.quantization.token_file import read_tokens
from omforge.recognition.attention import sinks
from omforge.recognition.feeds import token_feeds
from omforge.recognition.interface import find_interface
from omforge.recognition.step_names import PAST, PRESENT, is_cache
from omforge.rewriting.base import Pass
from omforge.rewriting.builder import Builder
from omforge.rewriting.splice import Names, insert

Array = npt.NDArray[Any]
Place = tuple[ir.Node, int]
Granularity = Literal["head", "channel"]

_MOVERS = ("Identity", "Reshape", "Transpose")
_LIMIT = 127
_MARGIN = 1.2
"""How far the integers of a channel reach beyond the calibration text: another text has other
extremes, and a key that is cut off costs more than a step that is a little longer. A head's own
channels differ by more than that."""

_RUNS = 16
"""Pieces at least, each at positions of its own; a shorter text is taken several times."""

_TOKENS = 2048
"""Tokens of a batch: what 7B computes of them at once takes a few hundred MB."""


@dataclass(frozen=True)
class QuantizeKv(Pass):
    """Keep the cache as int8: half the bytes of float16.

    Attributes:
        granularity: What shares a scale: each `channel` of a head by itself, or all of a `head`.
        calibration: A .npy file of token numbers [pieces, S].
        positions: Tokens that a sequence may hold; 0 leaves the text at the first ones.
        progress: Told the cache tensors that are measured, and all of them.
    """

    name: ClassVar[str] = "quantize-kv"
    changes_interface: ClassVar[bool] = True
    granularity: Granularity = "channel"
    calibration: str = ""
    positions: int = 0
    tokens: Sequence[Array] | Literal["blank"] | None = field(default=None, compare=False)
    """Instead of a calibration file: token numbers [S] of each piece. `blank` measures nothing: the
    graph then has its bytes, and any steps."""
    progress: Callable[[int, int], None] | None = field(default=None, compare=False)

    def run(self, model: ir.Model) -> int:
        """Quantise; the number of cache tensors, 2*L.

        Raises:
            InputError: There is no calibration text, or it makes infinite keys or values.
            CheckError: The graph has no cache of fuse-kv-io, or one that cannot be followed.
        """
        infer_model(model)
        caches = list(_caches(model))
        if self.tokens == "blank":
            grids = [_blank(cache, self.granularity, at) for at, cache in enumerate(caches)]
            return self._write(model, caches, grids)
        tokens = self.tokens if self.tokens is not None else read_tokens(self.calibration)
        if not tokens:
            raise ir.InputError(
                "an int8 cache needs a calibration text",
                "its scales are the largest keys and values that a text gives, layer by layer",
                "Give --calibration FILE: a text, or token numbers as .npy",
            )
        feeds = _feeds(model, tokens, self.positions)
        grids = list[_Grid]()
        for grid in _grids(model, caches, feeds, self.granularity):
            grids.append(grid)
            if self.progress is not None:
                self.progress(len(grids), len(caches))
        return self._write(model, caches, grids)

    def _write(self, model: ir.Model, caches: Sequence[_Cache], grids: Sequence[_Grid]) -> int:
        names = Names(model)
        for cache in caches:
            cache.narrow()
        for cache, grid in zip(caches, grids, strict=True):
            if cache.raised:
                _fold(model, cache, grid, names)
            else:
                _widen(model, cache, grid, names)
        infer_model(model)
        return len(caches)


@dataclass(frozen=True)
class _Cache:
    """The keys or the values of one layer.

    Attributes:
        inputs: The graph's input, and what a Split makes of it.
        past: What attention reads, [B, K, C, D].
        new: A step's own, [B, S, K*D] or [B, K, S, D].
        place: Where `new` leaves for the graph's output.
        heads: K.
        size: D.
        slots: Where raised attention reads `past`.
        raised: Whether nothing else reads it, and all that is read of them is their first output.
    """

    inputs: tuple[ir.Value, ...]
    past: ir.Value
    new: ir.Value
    place: Place
    heads: int
    size: int
    slots: tuple[Place, ...]
    raised: bool

    @property
    def flat(self) -> bool:
        """Whether `new` is [B, S, K*D]."""
        return len(dims(self.new) or ()) == 3

    @property
    def centred(self) -> bool:
        """Whether the integers may stand for what is off a middle."""
        softcapped = any(attribute(node, "softcap", 0.0) for node, at in self.slots if at == 4)
        sunk = any(sinks.find(node) is not None for node, _ in self.slots)
        return self.raised and not softcapped and not sunk

    def narrow(self) -> None:
        """Let the past be int8; the nodes that read it must be mended."""
        for value in self.inputs:
            value.type = ir.TensorType(ir.DataType.INT8)


def _caches(model: ir.Model) -> Iterator[_Cache]:
    inputs = {value.name or "": value for value in model.graph.inputs}
    outputs = {value.name or "": value for value in model.graph.outputs}
    pasts = {name: value for name, value in inputs.items() if is_cache(name)}
    for name, value in pasts.items():
        if value.dtype == ir.DataType.INT8:
            raise ir.InputError(f"the cache {name} is int8 already", "quantize-kv ran before")
    if PAST in pasts:
        yield from _stacked(pasts[PAST], outputs.get(PRESENT))
        return
    if not pasts:
        raise ir.InputError(
            "there is no cache to quantise",
            f"no input is named {PAST}, as fuse-kv-io names it",
            "Run fuse-kv-io before",
        )
    for name, past in pasts.items():
        present = outputs.get(name.replace(PAST, "present", 1))
        if present is None:
            raise _lost(name, "it has no output of its own")
        yield _cache((past,), past, present)


def _stacked(past: ir.Value, present: ir.Value | None) -> Iterator[_Cache]:
    split = next((node for node in past.consumers() if node.op_type == "Split"), None)
    joined = present
    while joined is not None and (made := joined.producer()) is not None:
        if made.op_type == "Concat":
            break
        joined = made.inputs[0] if made.op_type in _MOVERS else None
    concat = None if joined is None else joined.producer()
    if split is None or concat is None or len(split.outputs) != len(concat.inputs):
        raise _lost(PAST, "it is not a Split and a Concat of all layers")
    for index, part in enumerate(split.outputs):
        yield _cache((past, part), part, concat.inputs[index], (concat, index))


def _cache(
    inputs: tuple[ir.Value, ...],
    past: ir.Value,
    value: ir.Value | None,
    place: Place | None = None,
) -> _Cache:
    """Follow a new key or value back from the output to where attention reads it too."""
    name = past.name or ""
    while value is not None:
        made = value.producer()
        if place is not None and len(value.uses()) > 1:
            break
        if made is None or made.op_type not in _MOVERS:
            raise _lost(name, "what is new in it is not what attention reads")
        value, place = made.inputs[0], (made, 0)
    shape, of_new = dims(past) or (), () if value is None else dims(value) or ()
    heads, size = (shape[1], shape[3]) if len(shape) == 4 else (0, 0)
    if value is None or place is None or not isinstance(heads, int) or not isinstance(size, int):
        raise _lost(name, f"its shape is [{', '.join(map(str, shape))}]")
    if of_new[2:] != (heads * size,) and (len(of_new) != 4 or of_new[1::2] != (heads, size)):
        raise _lost(name, f"what is new in it is [{', '.join(map(str, of_new))}]")
    uses = [(use.node, use.idx) for use in past.uses() if use.node.op_type != "Shape"]
    slots = tuple((node, at) for node, at in uses if node.op_type == "Attention" and at in (4, 5))
    if any(sinks.new_of(node)[at - 4] is not value for node, at in slots):
        raise _lost(name, "attention reads other keys than its output shows")
    raised = len(slots) == len(uses) and not any(
        output.uses() or output.is_graph_output()
        for node, _ in slots
        for output in node.outputs[1:]
    )
    return _Cache(inputs, past, value, place, heads, size, slots, raised and bool(slots))


def _read_steps(node: ir.Node, at: int, steps: ir.Value) -> None:
    """Let attention read steps; the row of a sink comes behind them, and zeros are zeros."""
    padded = node.inputs[at - 3]
    if sinks.find(node) is None or padded is None:
        node.replace_input_with(at - 3, steps)
    elif (pad := padded.producer()) is not None:
        pad.replace_input_with(0, steps)


def _lost(name: str, why: str) -> ir.CheckError:
    return ir.CheckError(
        f"the cache {name} cannot be quantised", why, "Compile with --kv-dtype fp16"
    )


@dataclass(frozen=True)
class _Grid:
    """What integers stand for: middle + step * integer.

    Attributes:
        step: float32 [K, D], numbers of float16.
        middle: The same; zeros where the grid is symmetric.
    """

    step: Array
    middle: Array


def _blank(cache: _Cache, granularity: Granularity, seed: int) -> _Grid:
    """A grid of a measured one's size, with a middle where that has one.

    No two have the same numbers, as equal constants are stored once.
    """
    draw = np.random.default_rng(seed)
    step, middle = (storable(draw.uniform(1, 2, (cache.heads, cache.size))) for _ in range(2))
    centred = granularity == "channel" and cache.centred
    return _Grid(step, middle if centred else np.zeros_like(middle))


def _feeds(model: ir.Model, tokens: Sequence[Array], positions: int) -> list[dict[str, Array]]:
    """A prefill of each piece, from the first position to the last that it can begin at.

    Pieces of one length are rows of one batch, where the graph takes several: on the CPU, short
    ones by themselves take most of their time for reading the weights.
    """
    runs = max(len(tokens), _RUNS if positions else 0)
    interface = find_interface(model)
    numbers = interface.position_ids
    batched = not isinstance((dims(interface.input_ids) or (1,))[0], int)
    made: list[dict[str, Array]] = []
    rows: list[Array] = []
    firsts: list[int] = []
    for run in range(runs):
        piece = np.asarray(tokens[run % len(tokens)])
        rows.append(piece)
        firsts.append(max(0, positions - len(piece)) * run // max(1, runs - 1))
        following = tokens[(run + 1) % len(tokens)]
        full = len(piece) * (len(rows) + 1) > _TOKENS
        if run + 1 < runs and batched and len(following) == len(piece) and not full:
            continue
        feeds = token_feeds(model, np.stack(rows))
        if numbers is not None:
            feeds[numbers.name or ""] += np.array(firsts, np.int64)[:, None]
        made.append(feeds)
        rows, firsts = [], []
    return made


def _grids(
    model: ir.Model,
    caches: Sequence[_Cache],
    feeds: Sequence[dict[str, Array]],
    granularity: Granularity,
) -> Iterator[_Grid]:
    """The grid of each cache, by the least and the largest number that the text gives."""
    walk = Walk(model, feeds, [cache.new for cache in caches])
    for cache in caches:
        shape = (cache.heads, cache.size)
        low, high = np.full(shape, np.inf, np.float32), np.full(shape, -np.inf, np.float32)
        for array in walk.advance(cache.new):
            wide = array.astype(np.float32)
            over = (0, 1) if cache.flat else (0, 2)
            np.minimum(low, wide.min(over).reshape(shape), out=low)
            np.maximum(high, wide.max(over).reshape(shape), out=high)
        if not np.isfinite([low, high]).all():
            raise ir.InputError(
                f"the calibration text makes {cache.past.name} infinite",
                "a cache with an infinity or a NaN has no scale",
                "Check the text and the export",
            )
        middle = np.zeros(shape, np.float32)
        if granularity == "channel" and cache.centred:
            middle = ((low + high) / 2).astype(np.float16).astype(np.float32)
        reach = np.maximum(high - middle, middle - low)
        if granularity == "head":
            reach = np.broadcast_to(reach.max(1, keepdims=True), shape)
        else:
            reach = reach * _MARGIN
        yield _Grid(storable(reach / _LIMIT), middle)


def _fold(model: ir.Model, cache: _Cache, grid: _Grid, names: Names) -> None:
    """Let attention compute in steps, and put the grid on the small sides of it."""
    kind = _dtype(cache.new)
    steps = _write(model, cache, grid, names)
    with Builder(model) as op:
        past = op.Cast(cache.past, to=int(kind))
        insert(op, _first(model, cache.past), by=QuantizeKv.name, names=names)
    for node, at in cache.slots:
        node.replace_input_with(at, past)
        _read_steps(node, at, steps)
        if at == 4:
            query = node.inputs[0]
            assert query is not None
            with Builder(model) as op:
                scaled = op.Mul(query, _beside(op, query, node, grid.step))
                insert(op, node, by=QuantizeKv.name, names=names)
            node.replace_input_with(0, scaled)
        else:
            _scale_output(model, node, grid, names)


def _scale_output(model: ir.Model, node: ir.Node, grid: _Grid, names: Names) -> None:
    """Let an attention's output stand for values again."""
    output = node.outputs[0]
    uses = output.uses()
    with Builder(model) as op:
        values = op.Mul(output, _beside(op, output, node, grid.step))
        if grid.middle.any():
            values = op.Add(values, _beside(op, output, node, grid.middle))
        insert(op, _first(model, output), by=QuantizeKv.name, names=names)
    for use in uses:
        use.node.replace_input_with(use.idx, values)


def _beside(op: Builder, value: ir.Value, node: ir.Node, numbers: Array) -> ir.Value:
    """Numbers of kv heads [K, D] as a constant for the query heads of [B, S, N*D] or [B, N, S, D].

    Raises:
        CheckError: The number of query heads is not known.
    """
    shape = dims(value) or ()
    flat = len(shape) == 3
    heads = attribute(node, "q_num_heads", 0) if flat else shape[1] if len(shape) == 4 else 0
    if not isinstance(heads, int) or not heads or heads % len(numbers):
        raise _lost(node.name or "", f"its attention has {heads} query heads")
    each = numbers.repeat(heads // len(numbers), 0)
    return _constant(op, value, each.reshape(-1) if flat else each[None, :, None, :])


def _widen(model: ir.Model, cache: _Cache, grid: _Grid, names: Names) -> None:
    """Let attention that was not raised read what the integers of the past stand for."""
    _write(model, cache, grid, names)
    # Its length is still read off the cache itself.
    uses = [use for use in cache.past.uses() if use.node.op_type != "Shape"]
    with Builder(model) as op:
        floats = op.Cast(cache.past, to=int(_dtype(cache.new)))
        wide = op.Mul(floats, _constant(op, cache.new, grid.step[None, :, None, :]))
        insert(op, _first(model, cache.past), by=QuantizeKv.name, names=names)
    for use in uses:
        use.node.replace_input_with(use.idx, wide)


def _write(model: ir.Model, cache: _Cache, grid: _Grid, names: Names) -> ir.Value:
    """Let the output take integers; what is new in steps, cut off, ahead of rounding."""

    def along(numbers: Array) -> ir.Value:
        shaped = numbers.reshape(-1) if cache.flat else numbers[None, :, None, :]
        return _constant(op, cache.new, shaped)

    with Builder(model) as op:
        off = op.Sub(cache.new, along(grid.middle)) if grid.middle.any() else cache.new
        steps = op.Clip(op.Div(off, along(grid.step)), -128.0, 127.0)
        codes = op.Cast(op.Round(steps), to=int(ir.DataType.INT8))
        insert(op, _first(model, cache.new), by=QuantizeKv.name, names=names)
    cache.place[0].replace_input_with(cache.place[1], codes)
    return steps


def _constant(op: Builder, like: ir.Value, numbers: Array) -> ir.Value:
    return op.constant(np.ascontiguousarray(numbers).astype(_dtype(like).numpy()))


def _dtype(value: ir.Value) -> ir.DataType:
    assert value.dtype is not None
    return value.dtype


def _first(model: ir.Model, value: ir.Value) -> ir.Node:
    """The first node that reads a value."""
    readers = set(value.consumers())
    return next(node for node in model.graph if node in readers)
