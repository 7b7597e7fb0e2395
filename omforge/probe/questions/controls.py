"""What every other answer stands on: atc works here, the device works here, atc takes an .air."""

from __future__ import annotations

from omforge.air.graph import boolean, integer
from omforge.probe.air_models import AirModel
from omforge.probe.onnx_models import exact, matmul, numbers
from omforge.probe.record import (
    FAILS,
    REFUSED,
    RIGHT,
    TAKEN,
    WRONG,
    Build,
    Experiment,
    Probe,
    once,
)

ATC, DEVICE, AIR = "onnx-taken=taken", "runs=right", "air-taken=taken"


def _onnx_taken(_: str) -> Experiment:
    return Experiment((Build("model", matmul()[0]),))


def _runs(_: str) -> Experiment:
    model, weight = matmul()
    x = numbers(16, 64, seed=1)
    return once(model, {"x": x}, (exact(x) @ exact(weight)).astype(x.dtype))


def _air_taken(_: str) -> Experiment:
    air = AirModel()
    x = air.data("x", "float16", 16, 64)
    w = air.const("w", numbers(64, 32))
    (y,) = air.op(
        "MatMulV2",
        "product",
        {"x1": x, "x2": w},
        {"y": ("float16", (16, 32))},
        transpose_x1=boolean(False),
        transpose_x2=boolean(False),
        offset_x=integer(0),
    )
    return Experiment((Build("model", air.air([y])),))


PROBES = (
    Probe(
        "onnx-taken",
        "Does atc compile one MatMul for this SoC?",
        _onnx_taken,
        {
            TAKEN: "atc works on this machine, and has the SoC's operators",
            REFUSED: "nothing can be learnt from this atc: see the evidence",
        },
        expected=TAKEN,
        settles="whether the other answers say anything",
    ),
    Probe(
        "runs",
        "Does the device run that MatMul, with the right numbers?",
        _runs,
        {
            RIGHT: "the device works",
            WRONG: "it computes something else",
            FAILS: "it cannot be used",
            REFUSED: "atc does not compile it",
        },
        expected=RIGHT,
        after=(ATC,),
        settles="whether the answers of the device say anything",
    ),
    Probe(
        "air-taken",
        "Does this atc take a GE graph (--framework=1)?",
        _air_taken,
        {
            TAKEN: "the front `air` is open: every GE operator, not only what the ONNX parser maps",
            REFUSED: "the front `air` is closed: compile with --front onnx",
        },
        expected=TAKEN,
        after=(ATC,),
        settles="which front a bundle may have",
    ),
)
