"""What GE does with graphs that the law for .air files refuses, where the sources leave it open."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np

from omforge.air.graph import Air, Desc, Op, integer, number
from omforge.air.names import naming
from omforge.probe.air_models import AirModel
from omforge.probe.onnx_models import exact, numbers
from omforge.probe.questions.cache import IN_PLACE, LOST
from omforge.probe.questions.controls import AIR, DEVICE
from omforge.probe.record import (
    FAILS,
    REFUSED,
    RIGHT,
    TAKEN,
    WRONG,
    Build,
    Experiment,
    Probe,
    fill,
    load,
    once,
    run,
)

_SHAPE = (4, 64)
_Y = {"y": ("float16", _SHAPE)}


def _edited(air: Air, name: str, edit: Callable[[Op], Op]) -> Air:
    ops = tuple(edit(op) if op.name == name else op for op in air.graph.ops)
    return dataclasses.replace(air, graphs=(dataclasses.replace(air.graph, ops=ops),))


def _descriptions_disagree(_: str) -> Experiment:
    """The reader says [64, 4] of what its producer calls [4, 64]."""
    air = AirModel()
    (y,) = air.op("Abs", "read", {"x": air.data("x", "float16", *_SHAPE)}, _Y)
    made = _edited(
        air.air([y]),
        "read",
        lambda op: dataclasses.replace(op, input_desc=(Desc("x", "float16", (64, 4)),)),
    )
    x = numbers(*_SHAPE)
    return once(made, {"x": x}, np.abs(x))


def _net_output_names(_: str) -> Experiment:
    """The end calls its first input input1 and its second input0."""
    air = AirModel()
    x = air.data("x", "float16", *_SHAPE)
    (first,) = air.op("Abs", "first", {"x": x}, _Y)
    (second,) = air.op("Neg", "second", {"x": x}, _Y)
    crossed = naming(("input1", "input0"), ())
    made = _edited(
        air.air([first, second]),
        "NetOutput",
        lambda op: dataclasses.replace(op, attributes=crossed),
    )
    given = numbers(*_SHAPE)
    return Experiment(
        (Build("model", made),),
        (*load("model"), *fill(x=given), run("model", ("x",), ("y", "z"))),
        {RIGHT: {"y": np.abs(given), "z": -given}, "by-name": {"y": -given, "z": np.abs(given)}},
    )


def _without_inputs(_: str) -> Experiment:
    air = AirModel()
    (y,) = air.op("Abs", "read", {"x": air.const("c", numbers(*_SHAPE))}, _Y)
    return Experiment((Build("model", air.air([y])),))


def _newer_operator(_: str) -> Experiment:
    """AddRmsNormCast: CANN 8.1.RC1 has its kernel, and no prototype."""
    air = AirModel()
    x = air.data("x", "float16", *_SHAPE)
    gamma = air.const("gamma", numbers(64))
    inputs, outputs = ("x1", "x2", "gamma"), ("y1", "y2", "rstd", "x")
    wide, half = Desc("y1", "float32", _SHAPE), Desc("y2", "float16", _SHAPE)
    op = Op(
        "norm",
        "AddRmsNormCast",
        inputs=(x, x, gamma),
        input_desc=(
            Desc("x1", "float16", _SHAPE),
            Desc("x2", "float16", _SHAPE),
            Desc("gamma", "float16", (64,)),
        ),
        output_desc=(
            wide,
            half,
            Desc("rstd", "float32", (4, 1)),
            Desc("x", "float16", _SHAPE),
        ),
        attributes={**naming(inputs, outputs), "epsilon": number(1e-6)},
    )
    (y,) = air.op("Abs", "read", {"x": x}, _Y)
    made = _edited(air.air([y]), "read", lambda op: dataclasses.replace(op, inputs=("norm:1",)))
    ops = (*made.graph.ops[:-1], op, made.graph.ops[-1])
    return Experiment(
        (
            Build(
                "model",
                dataclasses.replace(made, graphs=(dataclasses.replace(made.graph, ops=ops),)),
            ),
        )
    )


def _constant_disagrees(_: str) -> Experiment:
    """A constant whose value says [32, 64], and whose output says [64, 32]."""
    air = AirModel()
    weight = numbers(32, 64)
    w = air.const("w", weight)
    (y,) = air.op(
        "MatMulV2",
        "product",
        {"x1": air.data("x", "float16", *_SHAPE), "x2": w},
        {"y": ("float16", (4, 32))},
    )
    turned = Desc("y", "float16", (64, 32))
    made = _edited(air.air([y]), "w", lambda op: dataclasses.replace(op, output_desc=(turned,)))
    reads = Desc("x2", "float16", (64, 32))
    made = _edited(
        made,
        "product",
        lambda op: dataclasses.replace(op, input_desc=(op.input_desc[0], reads)),
    )
    x = numbers(*_SHAPE, seed=3)
    wanted = (exact(x) @ exact(weight).reshape(64, 32)).astype(np.float16)
    return once(made, {"x": x}, wanted, atol=5e-2)


def _view_in_place(_: str) -> Experiment:
    """A cache [2, 32, 64] is written as [64, 64]."""
    air = AirModel()
    at = air.data("at", "int32", 1)
    rows = air.data("rows", "float16", 1, 64)
    cache = air.data("cache", "float16", 2, 32, 64, kind="RefData")
    flat = air.const("flat", np.array([64, 64], np.int64))
    whole = {"y": ("float16", (64, 64))}
    (view,) = air.op("Reshape", "view", {"x": cache, "shape": flat}, whole)
    (written,) = air.op(
        "ScatterUpdate",
        "write",
        {"var": view, "indices": at, "updates": rows},
        {"var": ("float16", (64, 64))},
    )
    (y,) = air.op("Abs", "read", {"x": written}, whole)
    before, row = numbers(2, 32, 64), numbers(1, 64, seed=7)
    after = before.copy()
    after[1, 8] = row[0]
    result = np.abs(after).reshape(64, 64)
    feeds = {"at": np.array([40], np.int32), "rows": row, "cache": before}
    return Experiment(
        (Build("model", air.air([y], after=["write"])),),
        (*load("model"), *fill(**feeds), run("model", tuple(feeds), ("y",))),
        {
            IN_PLACE: {"y": result, "cache": after},
            LOST: {"y": result, "cache": before},
        },
        rtol=0.0,
        atol=1e-6,
    )


def _outside_prototype(_: str) -> Experiment:
    air = AirModel()
    x = air.data("x", "int32", *_SHAPE)
    (y,) = air.op("Erfinv", "wrong", {"input_x": x}, {"output_y": ("int32", _SHAPE)})
    return Experiment((Build("model", air.air([y])),))


def _beyond_kernels(_: str) -> Experiment:
    air = AirModel()
    x, lengths = air.data("x", "float16", *_SHAPE), air.data("lengths", "int32", 4)
    (y,) = air.op(
        "ReverseSequence",
        "turn",
        {"x": x, "seq_lengths": lengths},
        _Y,
        seq_dim=integer(1),
        batch_dim=integer(0),
    )
    return Experiment((Build("model", air.air([y])),))


def _beyond_dtypes(_: str) -> Experiment:
    """Of x and gamma, float32 and float16 is no column of the table."""
    air = AirModel()
    x = air.data("x", "float32", *_SHAPE)
    y, _rstd = air.op(
        "RmsNorm",
        "norm",
        {"x": x, "gamma": air.const("gamma", numbers(64))},
        {"y": ("float32", _SHAPE), "rstd": ("float32", (4, 1))},
        epsilon=number(1e-6),
    )
    return Experiment((Build("model", air.air([y])),))


_TAKEN_OR_NOT = {
    TAKEN: "GE takes it: what the rule refuses is advice here",
    REFUSED: "the rule holds here",
}
_NUMBERS = {
    RIGHT: "it is taken, and right: what the rule refuses is advice here",
    WRONG: "it is taken, and gives other numbers: the rule holds here",
    FAILS: "it is taken, and does not run: the rule holds here",
    REFUSED: "the rule holds here",
}
_ONLY_950 = frozenset(("950",))

PROBES = (
    Probe(
        "descriptions-disagree",
        "Does GE infer what an input's description says wrongly?",
        _descriptions_disagree,
        _NUMBERS,
        expected=RIGHT,
        after=(AIR, DEVICE),
    ),
    Probe(
        "net-output-names",
        "Do names of NetOutput's inputs decide the order of outputs?",
        _net_output_names,
        _NUMBERS | {RIGHT: "they do not", "by-name": "they do: the rule holds here"},
        after=(AIR, DEVICE),
    ),
    Probe(
        "air-without-inputs",
        "Does atc take a GE graph without inputs?",
        _without_inputs,
        _TAKEN_OR_NOT,
        expected=REFUSED,
        after=(AIR,),
    ),
    Probe(
        "newer-operator",
        "Has this release the prototype of an operator that is newer than CANN 8.1.RC1's?",
        _newer_operator,
        _TAKEN_OR_NOT,
        expected=REFUSED,
        after=(AIR,),
    ),
    Probe(
        "constant-description-disagrees",
        "Is a constant's output taken as it is described, whatever its value says?",
        _constant_disagrees,
        _NUMBERS,
        after=(AIR, DEVICE),
    ),
    Probe(
        "view-in-place",
        "Is a cache written in place through a Reshape of it?",
        _view_in_place,
        {
            IN_PLACE: "it is: the rule is advice here",
            LOST: "it is not: the rule holds here",
            WRONG: "something else is written: the rule holds here",
            FAILS: "the rule holds here",
            REFUSED: "the rule holds here",
        },
        expected=LOST,
        after=(AIR, DEVICE),
    ),
    Probe(
        "air-outside-prototypes",
        "Does atc take a dtype that the prototype of an operator without AI Core kernel excludes?",
        _outside_prototype,
        _TAKEN_OR_NOT,
        expected=REFUSED,
        after=(AIR,),
    ),
    Probe(
        "beyond-the-nearest-kernels",
        "Has 950 a kernel for an operator of which A3 has none?",
        _beyond_kernels,
        _TAKEN_OR_NOT,
        expected=REFUSED,
        families=_ONLY_950,
        after=(AIR,),
    ),
    Probe(
        "beyond-the-nearest-dtypes",
        "Does 950 take dtypes that are no column of A3's table?",
        _beyond_dtypes,
        _TAKEN_OR_NOT,
        expected=REFUSED,
        families=_ONLY_950,
        after=(AIR,),
    ),
)
