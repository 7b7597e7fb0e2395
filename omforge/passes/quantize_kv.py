"""Keep the cache as int8, with scales from a calibration text.

Before (the interface of fuse-kv-io)::

    past float [B, K, C, D], new keys k float [B, S, K*D]  ->  Attention(.., k, .., past), present

After::

    q = QuantizeLinear(k, scale)                       int8, the present
    Attention(.., DequantizeLinear(q, scale), .., DequantizeLinear(past, scale))

A step's own keys and values go through the integers as well. Else a token would see its neighbour
exactly in one chunking of a prompt, and rounded in another, and the chunks would be heard in the
result.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt

from omforge import ir
from omforge.ir.infer import dims, infer_model
from omforge.ir.segment import Walk
from omforge.passes.builder import Builder
from omforge.passes.feeds import token_feeds
from omforge.passes.fuse_kv_io import PAST, PRESENT
from omforge.passes.pipeline import Pass
from omforge.passes.quantization.blockwise import storable
from omforge.passes.quantization.token_file import read_tokens
from omforge.passes.splice import Names, insert

Array = npt.NDArray[Any]
Place = tuple[ir.Node, int]

_MOVERS = ("Identity", "Reshape", "Transpose")
_LIMIT = 127


@dataclass(frozen=True)
class QuantizeKv(Pass):
    """Keep the cache as int8: half the bytes of float16.

    Attributes:
        granularity: What shares a scale: all of a `head`, or each `channel` of it by itself.
        calibration: A .npy file of token numbers [pieces, S].
    """

    name: ClassVar[str] = "quantize-kv"
    changes_interface: ClassVar[bool] = True
    granularity: Literal["head", "channel"] = "head"
    calibration: str = ""
    tokens: Sequence[Array] | None = field(default=None, compare=False)
    """Instead of a calibration file: token numbers [S] of each piece."""

    def run(self, model: ir.Model) -> int:
        """Quantise; the number of cache tensors, 2*L.

        Raises:
            InputError: There is no calibration text, or it makes infinite keys or values.
            CheckError: The graph has no cache of fuse-kv-io, or one that cannot be followed.
        """
        infer_model(model)
        caches = list(_caches(model))
        tokens = self.tokens if self.tokens is not None else read_tokens(self.calibration)
        if not tokens:
            raise ir.InputError(
                "an int8 cache needs a calibration text",
                "its scales are the largest keys and values that a text gives, layer by layer",
                "Give --calibration FILE: a text, or token numbers as .npy",
            )
        scales = _scales(model, caches, tokens, self.granularity)
        names = Names(model)
        taken = {cache.place for cache in caches}
        for cache in caches:
            cache.narrow()
        for cache, scale in zip(caches, scales, strict=True):
            _write(model, cache, scale, taken, names)
            _read(model, cache, scale, self.granularity, names)
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
    """

    inputs: tuple[ir.Value, ...]
    past: ir.Value
    new: ir.Value
    place: Place
    heads: int
    size: int

    @property
    def flat(self) -> bool:
        """Whether `new` is [B, S, K*D]."""
        return len(dims(self.new) or ()) == 3

    @property
    def slot(self) -> Place | None:
        """Where raised attention reads `new`; None where attention was not raised."""
        for use in self.past.uses():
            if use.node.op_type == "Attention" and use.idx in (4, 5):
                return use.node, use.idx - 3
        return None

    def narrow(self) -> None:
        """Let the past be int8; the nodes that read it must be mended."""
        for value in self.inputs:
            value.type = ir.TensorType(ir.DataType.INT8)


def _caches(model: ir.Model) -> Iterator[_Cache]:
    inputs = {value.name or "": value for value in model.graph.inputs}
    outputs = {value.name or "": value for value in model.graph.outputs}
    pasts = {name: value for name, value in inputs.items() if name.startswith(PAST)}
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
    return _Cache(inputs, past, value, place, heads, size)


def _lost(name: str, why: str) -> ir.CheckError:
    return ir.CheckError(
        f"the cache {name} cannot be quantised", why, "Compile with --kv-dtype fp16"
    )


def _scales(
    model: ir.Model, caches: Sequence[_Cache], tokens: Sequence[Array], granularity: str
) -> list[Array]:
    """One step of int8 for each cache, [K] or [K, D]: the largest number of the text is 127."""
    walk = Walk(model, [token_feeds(model, np.asarray(piece)[None]) for piece in tokens])
    found: list[Array] = []
    for cache in caches:
        peak = np.zeros((cache.heads, cache.size), np.float32)
        for array in walk.advance(cache.new):
            wide = np.abs(array.astype(np.float32))
            peaks = wide.max((0, 1)).reshape(peak.shape) if cache.flat else wide.max((0, 2))
            np.maximum(peak, peaks, out=peak)
        if not np.isfinite(peak).all():
            raise ir.InputError(
                f"the calibration text makes {cache.past.name} infinite",
                "a cache with an infinity or a NaN has no scale",
                "Check the text and the export",
            )
        found.append(storable((peak if granularity == "channel" else peak.max(1)) / _LIMIT))
    return found


def _write(model: ir.Model, cache: _Cache, scale: Array, taken: set[Place], names: Names) -> None:
    """Let the output take integers, and attention what they stand for."""
    slot = cache.slot
    readers = [slot] if slot is not None else [(u.node, u.idx) for u in cache.new.uses()]
    readers = [place for place in readers if place not in taken]
    if slot is not None and slot[0].inputs[slot[1]] is not cache.new:
        raise _lost(cache.past.name or "", "attention reads other keys than its output shows")
    each = np.broadcast_to(scale.reshape(cache.heads, -1), (cache.heads, cache.size))
    with Builder(model) as op:
        if cache.flat:
            codes, wide = _through(op, cache.new, each.reshape(-1), 2)
        elif scale.ndim == 1:
            codes, wide = _through(op, cache.new, scale, 1)
        else:
            steps = _constant(op, cache.new, scale[None, :, None, :])
            rounded = op.Clip(op.Round(op.Div(cache.new, steps)), -128.0, 127.0)
            codes = op.Cast(rounded, to=int(ir.DataType.INT8))
            wide = op.Mul(op.Cast(codes, to=int(_dtype(cache.new))), steps)
        insert(op, _first(model, cache.new), by=QuantizeKv.name, names=names)
    for node, index in (*readers,):
        node.replace_input_with(index, wide)
    cache.place[0].replace_input_with(cache.place[1], codes)


def _through(op: Builder, value: ir.Value, scale: Array, axis: int) -> tuple[ir.Value, ir.Value]:
    """The integers of a value, and what they stand for."""
    steps = _constant(op, value, scale)
    codes = op.QuantizeLinear(value, steps, axis=axis, output_dtype=int(ir.DataType.INT8))
    return codes, op.DequantizeLinear(codes, steps, axis=axis)


def _read(model: ir.Model, cache: _Cache, scale: Array, granularity: str, names: Names) -> None:
    """Let attention read the cache as floats; its length is still read off the cache."""
    uses = [use for use in cache.past.uses() if use.node.op_type != "Shape"]
    with Builder(model) as op:
        if granularity == "head":
            wide = op.DequantizeLinear(cache.past, _constant(op, cache.new, scale), axis=1)
        else:
            floats = op.Cast(cache.past, to=int(_dtype(cache.new)))
            wide = op.Mul(floats, _constant(op, cache.new, scale[None, :, None, :]))
        insert(op, _first(model, cache.past), by=QuantizeKv.name, names=names)
    for use in uses:
        use.node.replace_input_with(use.idx, wide)


def _constant(op: Builder, like: ir.Value, scale: Array) -> ir.Value:
    return op.constant(np.ascontiguousarray(scale).astype(_dtype(like).numpy()))


def _dtype(value: ir.Value) -> ir.DataType:
    assert value.dtype is not None
    return value.dtype


def _first(model: ir.Model, value: ir.Value) -> ir.Node:
    """The first node that reads a value."""
    readers = set(value.consumers())
    return next(node for node in model.graph if node in readers)
