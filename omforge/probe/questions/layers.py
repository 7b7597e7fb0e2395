"""Norms, gates and rotation in GE graphs: one kernel each, where ONNX has several."""

from __future__ import annotations

import numpy as np

from omforge.air.graph import integer, number, text
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
    Step,
    fill,
    load,
    once,
    run,
)
from omforge.probe.reference import rotated

_NPU = frozenset(("310p", "910b", "910_93", "950"))


def _rms_norm(_: str) -> Experiment:
    """At an epsilon that matters: 0.1, where the ONNX plugin always takes 1e-6."""
    air = AirModel()
    x, gamma = air.data("x", "float16", 4, 64), numbers(64, seed=1)
    y, _rstd = air.op(
        "RmsNorm",
        "norm",
        {"x": x, "gamma": air.const("gamma", gamma)},
        {"y": ("float16", (4, 64)), "rstd": ("float32", (4, 1))},
        epsilon=number(0.1),
    )
    given = numbers(4, 64)

    def normed(epsilon: float) -> Array:
        wide = exact(given)
        mean = (wide**2).mean(-1, keepdims=True)
        return (wide / np.sqrt(mean + epsilon) * exact(gamma)).astype(np.float16)

    values = {RIGHT: normed(0.1), "ignored": normed(1e-6)}
    return once(air.air([y]), {"x": given}, given, values=values)


def _add_rms_norm(_: str) -> Experiment:
    air = AirModel()
    x, z = air.data("x", "float16", 4, 64), air.data("z", "float16", 4, 64)
    gamma = numbers(64, seed=1)
    y, _rstd, total = air.op(
        "AddRmsNorm",
        "norm",
        {"x1": x, "x2": z, "gamma": air.const("gamma", gamma)},
        {"y": ("float16", (4, 64)), "rstd": ("float32", (4, 1)), "x": ("float16", (4, 64))},
        epsilon=number(0.1),
    )
    feeds = {"x": numbers(4, 64), "z": numbers(4, 64, seed=2)}
    wide = exact(feeds["x"]) + exact(feeds["z"])
    normed = wide / np.sqrt((wide**2).mean(-1, keepdims=True) + 0.1) * exact(gamma)
    return Experiment(
        (Build("model", air.air([y, total])),),
        (*load("model"), *fill(**feeds), run("model", ("x", "z"), ("y", "sum"))),
        {RIGHT: {"y": normed.astype(np.float16), "sum": wide.astype(np.float16)}},
    )


def _swish(_: str) -> Experiment:
    air = AirModel()
    x = air.data("x", "float16", 4, 64)
    (y,) = air.op("Swish", "gate", {"x": x}, {"y": ("float16", (4, 64))}, scale=number(1.702))
    given = numbers(4, 64)
    wide = exact(given)
    wanted = (wide / (1 + np.exp(-1.702 * wide))).astype(np.float16)
    return once(air.air([y]), {"x": given}, wanted, rtol=1e-2, atol=1e-3)


def _gelu(_: str) -> Experiment:
    air = AirModel()
    x = air.data("x", "float16", 4, 64)
    (y,) = air.op("GeluV2", "gelu", {"x": x}, {"y": ("float16", (4, 64))}, approximate=text("tanh"))
    given = numbers(4, 64)
    wide = exact(given)
    inner = np.sqrt(2 / np.pi, dtype=np.float32) * (wide + 0.044715 * wide**3)
    wanted = (0.5 * wide * (1 + np.tanh(inner))).astype(np.float16)
    return once(air.air([y]), {"x": given}, wanted, rtol=1e-2, atol=1e-3)


def _swiglu(_: str) -> Experiment:
    air = AirModel()
    x = air.data("x", "float16", 4, 128)
    (y,) = air.op("SwiGlu", "gate", {"x": x}, {"y": ("float16", (4, 64))}, dim=integer(-1))
    given = numbers(4, 128)
    gate, up = np.split(exact(given), 2, axis=-1)
    left = (gate / (1 + np.exp(-gate)) * up).astype(np.float16)
    right = (up / (1 + np.exp(-up)) * gate).astype(np.float16)
    return once(air.air([y]), {"x": given}, left, values={RIGHT: left, "other-half": right})


def _apply_rotary(_: str) -> Experiment:
    """[B, S, N, D] as layout 1 (BSND) has it."""
    q_shape, k_shape, table = (1, 8, 4, 128), (1, 8, 2, 128), (1, 8, 1, 128)
    air = AirModel()
    q, k = air.data("q", "float16", *q_shape), air.data("k", "float16", *k_shape)
    cos, sin = air.data("cos", "float16", *table), air.data("sin", "float16", *table)
    # Ref inputs that are no RefData: what they are made of must not be the model's own buffers.
    (q_own,) = air.op("Muls", "q_own", {"x": q}, {"y": ("float16", q_shape)}, value=number(1.0))
    (k_own,) = air.op("Muls", "k_own", {"x": k}, {"y": ("float16", k_shape)}, value=number(1.0))
    q_out, k_out = air.op(
        "ApplyRotaryPosEmb",
        "rotate",
        {"query": q_own, "key": k_own, "cos": cos, "sin": sin},
        {"query": ("float16", q_shape), "key": ("float16", k_shape)},
        layout=integer(1),
    )
    feeds = {
        "q": numbers(*q_shape),
        "k": numbers(*k_shape, seed=1),
        "cos": numbers(*table, seed=2),
        "sin": numbers(*table, seed=3),
    }
    (y,) = air.op("Muls", "y", {"x": q_out}, {"y": ("float16", q_shape)}, value=number(1.0))
    (z,) = air.op("Muls", "z", {"x": k_out}, {"y": ("float16", k_shape)}, value=number(1.0))
    wanted = {name: rotated(feeds[name], feeds["cos"], feeds["sin"]) for name in "qk"}
    return Experiment(
        (Build("model", air.air([y, z])),),
        (*load("model"), *fill(**feeds), run("model", tuple(feeds), ("y", "z"))),
        {RIGHT: {"y": wanted["q"], "z": wanted["k"]}},
    )


def _rotary_mul(_: str) -> Experiment:
    """Heads of 64, two rows, and a decode step of 32 heads: each outside the documented range."""
    builds: list[Build] = []
    feeds: dict[str, Array] = {}
    runs: list[Step] = []
    wanted: dict[str, Array] = {}
    for at, shape in enumerate(((1, 8, 16, 64), (2, 4, 16, 128), (1, 32, 1, 128))):
        table = (1, 1, shape[2], shape[3])
        air = AirModel()
        x = air.data("x", "float16", *shape)
        r1, r2 = air.data("r1", "float16", *table), air.data("r2", "float16", *table)
        given = {"x": x, "r1": r1, "r2": r2}
        (y,) = air.op("RotaryMul", "turn", given, {"y": ("float16", shape)})
        builds.append(Build(f"model{at}", air.air([y])))
        held = {
            f"x{at}": numbers(*shape),
            f"cos{at}": numbers(*table, seed=1),
            f"sin{at}": numbers(*table, seed=2),
        }
        runs.append(run(f"model{at}", tuple(held), (f"y{at}",)))
        wanted[f"y{at}"] = rotated(*held.values())
        feeds |= held
    steps = (*load(*(build.name for build in builds)), *fill(**feeds), *runs)
    return Experiment(tuple(builds), steps, {RIGHT: wanted})


_MEANS = {
    RIGHT: "the form may be emitted here",
    WRONG: "it gives other numbers: it is spelled out instead",
    FAILS: "it does not run: it is spelled out instead",
    REFUSED: "atc refuses it: it is spelled out instead",
}
_AFTER = (AIR, DEVICE)

PROBES = (
    Probe(
        "rms-norm-epsilon",
        "Does RmsNorm take its epsilon?",
        _rms_norm,
        _MEANS | {"ignored": "it takes 1e-6 whatever it is told: x is scaled first, as in ONNX"},
        expected=RIGHT,
        families=_NPU,
        after=_AFTER,
        settles="RmsNorm in the front `air`",
    ),
    Probe(
        "air-add-rms-norm",
        "Is AddRmsNorm right, with an epsilon of its own?",
        _add_rms_norm,
        _MEANS,
        expected=RIGHT,
        families=_NPU,
        after=_AFTER,
    ),
    Probe(
        "air-swish",
        "Is Swish right, with a scale of its own?",
        _swish,
        _MEANS,
        expected=RIGHT,
        after=_AFTER,
    ),
    Probe(
        "air-gelu",
        "Is GeluV2 right?",
        _gelu,
        _MEANS,
        expected=RIGHT,
        after=_AFTER,
    ),
    Probe(
        "air-rotary-mul",
        "Is RotaryMul right for heads of 64, two rows, and 32 heads of one token?",
        _rotary_mul,
        _MEANS | {RIGHT: "the documented range is too narrow: the rule is advice here"},
        expected=REFUSED,
        families=_NPU,
        after=_AFTER,
    ),
    Probe(
        "swiglu",
        "Is SwiGlu right, and which half does it activate?",
        _swiglu,
        _MEANS | {RIGHT: "it activates the left half", "other-half": "it activates the right half"},
        expected=RIGHT,
        families=_NPU,
        after=_AFTER,
        settles="SwiGlu in the front `air`",
    ),
    Probe(
        "apply-rotary",
        "Is ApplyRotaryPosEmb right for [B, S, N, D] and heads of 128?",
        _apply_rotary,
        _MEANS,
        expected=RIGHT,
        families=_NPU,
        after=_AFTER,
        settles="rotary embedding in the front `air`",
    ),
)
