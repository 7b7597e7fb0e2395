"""The cache in place: whether what a step writes is in the caller's buffer, and who shares it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from omforge.air.graph import Air, integer, text
from omforge.probe.air_models import AirModel
from omforge.probe.onnx_models import exact, numbers
from omforge.probe.questions.controls import AIR, DEVICE
from omforge.probe.record import (
    ALL,
    FAILS,
    REFUSED,
    RIGHT,
    WRONG,
    Array,
    Build,
    Experiment,
    Probe,
    Step,
    fill,
    load,
    run,
)

IN_PLACE, LOST = "in-place", "lost"
_SCATTER = frozenset(("310p", "910b", "910_93", "950"))
_HEADS, _CAPACITY, _HEAD = 2, 32, 64


@dataclass(frozen=True)
class Writer:
    """A graph that writes rows into a cache and gives what it reads behind the writer.

    Inputs are `at`, `rows` and `cache`, in this order; the output is |cache| in float16.
    """

    air: Air
    at: Array
    rows: Array
    cache: Array
    after: Array

    def steps(self, name: str = "model") -> tuple[Step, ...]:
        """Fill what a run reads, but for the cache, and run it."""
        feeds = {f"{name} at": self.at, f"{name} rows": self.rows}
        return (*fill(**feeds), run(name, (*feeds, "cache"), (f"{name} y",)))


def _scatter(first: int, new: int, dtype: str, kind: str, cache: Array | None = None) -> Writer:
    """Scatter at a position: cache [1, K, C, D]."""
    shape = (1, _HEADS, _CAPACITY, _HEAD)
    rows_shape = (1, _HEADS, new, _HEAD)
    air = AirModel()
    at = air.data("at", "int32", 1)
    rows = air.data("rows", dtype, *rows_shape)
    var = air.data("cache", dtype, *shape, kind=kind)
    (written,) = air.op(
        "Scatter",
        "write",
        {"var": var, "indices": at, "updates": rows},
        {"var": (dtype, shape)},
        reduce=text("update"),
        axis=integer(-2),
    )
    made = _read(air, written, dtype, shape)
    before = _numbers(dtype, *shape) if cache is None else cache
    new_rows = _numbers(dtype, *rows_shape, seed=first)
    after = before.copy()
    after[:, :, first : first + new] = new_rows
    return Writer(made, np.array([first], np.int32), new_rows, before, after)


def _scatter_rows(op: str, first: int, new: int, kind: str, cache: Array | None = None) -> Writer:
    """ScatterUpdate or ScatterNdUpdate by row: cache [C, D]."""
    shape = (_CAPACITY, _HEAD)
    of_index = (new, 1) if op == "ScatterNdUpdate" else (new,)
    air = AirModel()
    at = air.data("at", "int32", *of_index)
    rows = air.data("rows", "float16", new, _HEAD)
    var = air.data("cache", "float16", *shape, kind=kind)
    (written,) = air.op(
        op,
        "write",
        {"var": var, "indices": at, "updates": rows},
        {"var": ("float16", shape)},
    )
    made = _read(air, written, "float16", shape)
    before = _numbers("float16", *shape) if cache is None else cache
    new_rows = _numbers("float16", new, _HEAD, seed=first)
    after = before.copy()
    after[first : first + new] = new_rows
    places = np.arange(first, first + new, dtype=np.int32).reshape(of_index)
    return Writer(made, places, new_rows, before, after)


def _read(air: AirModel, written: str, dtype: str, shape: tuple[int, ...]) -> Air:
    if dtype == "int8":
        given = {"y": ("float16", shape)}
        (written,) = air.op("Cast", "wide", {"x": written}, given, dst_type=integer(1))
    air.op("Abs", "read", {"x": written}, {"y": ("float16", shape)})
    return air.air(["read:0"], after=["write"])


def _numbers(dtype: str, *shape: int, seed: int = 0) -> Array:
    found = numbers(*shape, seed=seed + 1)
    return np.rint(exact(found) * 100).astype(np.int8) if dtype == "int8" else found


def _writer(family: str, first: int, new: int, kind: str, cache: Array | None = None) -> Writer:
    if family == "310b":
        return _scatter_rows("ScatterUpdate", first, new, kind, cache)
    return _scatter(first, new, "float16", kind, cache)


def _one(writer: Writer) -> Experiment:
    y = np.abs(exact(writer.after)).astype(np.float16)
    return Experiment(
        (Build("model", writer.air),),
        (*load("model"), *fill(cache=writer.cache), *writer.steps()),
        {
            IN_PLACE: {"model y": y, "cache": writer.after},
            LOST: {"model y": y, "cache": writer.cache},
        },
        rtol=0.0,
        atol=1e-6,
    )


def _shared(family: str) -> Experiment:
    """Prefill writes eight rows, decode one behind them, into one buffer."""
    prefill = _writer(family, 0, 8, "RefData")
    decode = _writer(family, 8, 1, "RefData", prefill.after)
    y = np.abs(exact(decode.after)).astype(np.float16)
    return Experiment(
        (Build("prefill", prefill.air), Build("decode", decode.air)),
        (
            *load("prefill", "decode"),
            *fill(cache=prefill.cache),
            *prefill.steps("prefill"),
            *decode.steps("decode"),
        ),
        {RIGHT: {"decode y": y, "cache": decode.after}},
        rtol=0.0,
        atol=1e-6,
    )


def _quant_update(_: str) -> Experiment:
    shape, rows_shape = (1, _HEADS, _CAPACITY, _HEAD), (1, _HEADS, 1, _HEAD)
    scale = np.full((1, 1, 1, _HEAD), 64, np.float32)
    air = AirModel()
    at = air.data("at", "int32", 1)
    rows = air.data("rows", "float16", *rows_shape)
    var = air.data("cache", "int8", *shape, kind="RefData")
    (written,) = air.op(
        "QuantUpdateScatter",
        "write",
        {"var": var, "indices": at, "updates": rows, "quant_scales": air.const("scale", scale)},
        {"var": ("int8", shape)},
        reduce=text("update"),
        axis=integer(-2),
        quant_axis=integer(-1),
    )
    made = _read(air, written, "int8", shape)
    cache, new_rows = _numbers("int8", *shape), numbers(*rows_shape, seed=5)

    def after(stored: Array) -> Array:
        found = cache.copy()
        found[:, :, 5:6] = np.clip(np.rint(stored), -128, 127).astype(np.int8)
        return found

    times, by = after(exact(new_rows) * 64), after(exact(new_rows) / 64)
    writer = Writer(made, np.array([5], np.int32), new_rows, cache, times)
    return Experiment(
        (Build("model", made),),
        (*load("model"), *fill(cache=cache), *writer.steps()),
        {"times-scale": {"cache": times}, "by-scale": {"cache": by}},
        rtol=0.0,
        atol=1.01,
    )


_MEANS = {
    IN_PLACE: "what a step writes is in the caller's buffer: nothing is copied",
    LOST: "the step reads what it wrote, the caller's buffer does not have it: not to be used",
    WRONG: "something else is written: not to be used",
    FAILS: "it does not run: the cache goes through outputs, as in the front `onnx`",
    REFUSED: "atc refuses it: the cache goes through outputs, as in the front `onnx`",
}
_AFTER = (AIR, DEVICE)

PROBES = (
    Probe(
        "cache-in-place",
        "Does a step write the caller's cache through RefData?",
        lambda family: _one(_writer(family, 5, 1, "RefData")),
        _MEANS,
        expected=IN_PLACE,
        otherwise=WRONG,
        after=_AFTER,
        settles="whether the front `air` may write a cache in place",
    ),
    Probe(
        "data-in-place",
        "Does it through a plain Data?",
        lambda family: _one(_writer(family, 5, 1, "Data")),
        _MEANS,
        expected=LOST,
        after=_AFTER,
        settles="whether a cache must be RefData",
    ),
    Probe(
        "cache-in-place-int8",
        "Does Scatter write an int8 cache in place?",
        lambda _: _one(_scatter(5, 1, "int8", "RefData")),
        _MEANS,
        expected=IN_PLACE,
        families=_SCATTER,
        after=_AFTER,
        settles="the int8 cache of the front `air`",
    ),
    Probe(
        "cache-in-place-by-index",
        "Does ScatterNdUpdate write the caller's cache through RefData?",
        lambda _: _one(_scatter_rows("ScatterNdUpdate", 5, 1, "RefData")),
        _MEANS,
        expected=IN_PLACE,
        families=ALL,
        after=_AFTER,
        settles="the writer where Scatter does not fit",
    ),
    Probe(
        "quant-update-scatter",
        "Does QuantUpdateScatter quantise and write in place, and which way are its scales?",
        _quant_update,
        _MEANS
        | {
            "times-scale": "rows are multiplied by their scale, and written in place",
            "by-scale": "rows are divided by their scale, and written in place",
        },
        families=_SCATTER,
        after=_AFTER,
        settles="the int8 cache of the front `air` in one kernel",
    ),
    Probe(
        "two-models-one-cache",
        "Do a prefill and a decode .om write one cache buffer, one behind the other?",
        _shared,
        _MEANS | {RIGHT: "both see and write one buffer: it is handed over without a copy"},
        expected=RIGHT,
        after=_AFTER,
        settles="whether buckets share a cache",
    ),
)
