"""Weights, files, experts and dtypes of GE graphs."""

from __future__ import annotations

import numpy as np

from omforge.air.graph import boolean, integer
from omforge.probe.air_models import AirModel
from omforge.probe.onnx_models import exact, numbers
from omforge.probe.questions.controls import AIR, DEVICE
from omforge.probe.record import (
    FAILS,
    REFUSED,
    RIGHT,
    WRONG,
    Array,
    Build,
    Experiment,
    Probe,
    fill,
    load,
    once,
    run,
)
from omforge.probe.reference import softmax

_NPU = frozenset(("310p", "910b", "910_93", "950"))
_A2 = frozenset(("910b", "910_93", "950"))


def _weight_groups(_: str) -> Experiment:
    inner, columns, size = 128, 64, 32
    steps = np.arange(inner * columns, dtype=np.int64) * 37 % 255 - 127
    weight = steps.astype(np.int8).reshape(inner, columns)
    scale = (np.abs(numbers(inner // size, columns)) + np.float16(0.1)) / np.float16(64)
    air = AirModel()
    x = air.data("x", "float16", 4, inner)
    (y,) = air.op(
        "WeightQuantBatchMatmulV2",
        "product",
        {
            "x": x,
            "weight": air.const("w", weight),
            "antiquant_scale": air.const("scale", scale),
        },
        {"y": ("float16", (4, columns))},
        antiquant_group_size=integer(size),
    )
    given = numbers(4, inner, seed=3)
    whole = exact(weight) * np.repeat(exact(scale), size, axis=0)
    wanted = (exact(given) @ whole).astype(np.float16)
    return once(air.air([y]), {"x": given}, wanted, atol=5e-2)


def _file_constants(_: str) -> Experiment:
    """Two graphs read one file, each at its offset; the path is from the kit's folder."""
    weights = numbers(2, 64, 32) / np.float16(8)
    data = weights.tobytes()
    half = len(data) // 2
    builds: list[Build] = []
    wanted: dict[str, Array] = {}
    x = numbers(4, 64, seed=3)
    location = "models/one-weights-file/weights.bin"
    for at, name in enumerate(("first", "second")):
        air = AirModel()
        given = air.data("x", "float16", 4, 64)
        w = air.file_constant("w", "float16", (64, 32), location, at * half, half)
        (y,) = air.op("MatMulV2", "product", {"x1": given, "x2": w}, {"y": ("float16", (4, 32))})
        files = {"weights.bin": data} if not at else {}
        builds.append(Build(name, air.air([y]), files=files))
        wanted[f"{name} y"] = (exact(x) @ exact(weights[at])).astype(np.float16)
    steps = (
        *load("first", "second"),
        *fill(x=x),
        *(run(name, ("x",), (f"{name} y",)) for name in ("first", "second")),
    )
    return Experiment(tuple(builds), steps, {RIGHT: wanted})


def _input_shape(_: str) -> Experiment:
    """The graph says -1, the flag 8: its document says that it has no effect."""
    air = AirModel()
    x = air.data("x", "float16", -1, 64)
    (y,) = air.op("Abs", "read", {"x": x}, {"y": ("float16", (-1, 64))})
    flags = ("--precision_mode_v2=origin", "--input_shape=x:8,64")
    given = numbers(8, 64)
    return once(air.air([y]), {"x": given}, np.abs(given), flags=flags)


def _gating(_: str) -> Experiment:
    air = AirModel()
    x = air.data("x", "float16", 16, 8)
    y, expert, row = air.op(
        "MoeGatingTopKSoftmax",
        "gate",
        {"x": x},
        {
            "y": ("float16", (16, 2)),
            "expert_idx": ("int32", (16, 2)),
            "row_idx": ("int32", (16, 2)),
        },
        k=integer(2),
    )
    given = numbers(16, 8)
    shares = np.sort(softmax(exact(given)), axis=-1)[:, ::-1][:, :2].astype(np.float16)
    more = ("expert", "row")
    return once(air.air([y, expert, row]), {"x": given}, shares, more_outputs=more)


def _grouped_matmul(_: str) -> Experiment:
    """Rows 0-3 by the first expert's weight, 4-15 by the second's."""
    weights = numbers(2, 64, 32) / np.float16(8)
    air = AirModel()
    x = air.data("x", "float16", 16, 64)
    ends = air.data("ends", "int64", 2)
    (y,) = air.op(
        "GroupedMatmul",
        "experts",
        {"x": [x], "weight": [air.const("w", weights)], "group_list": ends},
        {"y0": ("float16", (16, 32))},
        split_item=integer(3),
        dtype=integer(-1),
        transpose_weight=boolean(False),
        transpose_x=boolean(False),
        group_type=integer(0),
        group_list_type=integer(0),
    )
    given = numbers(16, 64, seed=3)
    wide = exact(given)
    wanted = np.concatenate([wide[:4] @ exact(weights[0]), wide[4:] @ exact(weights[1])])
    feeds = {"x": given, "ends": np.array([4, 16], np.int64)}
    return once(air.air([y]), feeds, wanted.astype(np.float16))


def _bfloat16(_: str) -> Experiment:
    """2 ** 100 is there in bfloat16 alone: twice that is 2 ** 101."""
    air = AirModel()
    x = air.data("x", "bfloat16", 4, 64)
    (y,) = air.op("Add", "sum", {"x1": x, "x2": x}, {"y": ("bfloat16", (4, 64))})
    given = np.full((4, 64), (100 + 127) << 7, np.uint16)  # bits: sign, eight of exponent, seven
    return once(
        air.air([y]), {"x": given}, np.full((4, 64), (101 + 127) << 7, np.uint16), rtol=0, atol=0.5
    )


_MEANS = {
    RIGHT: "the form may be emitted here",
    WRONG: "it gives other numbers: it is spelled out instead",
    FAILS: "it does not run: it is spelled out instead",
    REFUSED: "atc refuses it: it is spelled out instead",
}
_AFTER = (AIR, DEVICE)

PROBES = (
    Probe(
        "air-weight-groups",
        "Does WeightQuantBatchMatmulV2 take a scale for each 32 rows (310P's sources disagree)?",
        _weight_groups,
        _MEANS,
        families=_NPU,
        after=_AFTER,
        settles="grouped int8 weights in the front `air`",
    ),
    Probe(
        "one-weights-file",
        "Do two graphs read their constants from one file, by location, offset and length?",
        _file_constants,
        _MEANS | {RIGHT: "one weights file serves all buckets"},
        expected=RIGHT,
        after=_AFTER,
        settles="where the front `air` keeps weights",
    ),
    Probe(
        "air-input-shape",
        "Has --input_shape an effect on a GE graph?",
        _input_shape,
        _MEANS
        | {
            RIGHT: "it has, as the sources say",
            REFUSED: "it has none: shapes have to be in the graph",
        },
        expected=RIGHT,
        after=_AFTER,
        settles="whether shapes have to be in the graph",
    ),
    Probe(
        "expert-gating",
        "Is MoeGatingTopKSoftmax there, and right?",
        _gating,
        _MEANS,
        families=_NPU,
        after=_AFTER,
        settles="experts in the front `air`",
    ),
    Probe(
        "grouped-matmul",
        "Is GroupedMatmul right with weights in float16 (310P wants FRACTAL_NZ)?",
        _grouped_matmul,
        _MEANS,
        families=_NPU,
        after=_AFTER,
        settles="experts in the front `air`",
    ),
    Probe(
        "bfloat16",
        "Is bfloat16 kept with --precision_mode_v2=origin?",
        _bfloat16,
        _MEANS | {RIGHT: "it is", WRONG: "it is not: its range is lost"},
        expected=RIGHT,
        families=_A2 | {"310b"},
        after=_AFTER,
        settles="--dtype bf16",
    ),
)
