"""What the ONNX parser does with what rules keep away from it."""

from __future__ import annotations

import numpy as np
import onnx

from omforge.probe.onnx_models import OPSET, exact, model, node, numbers
from omforge.probe.questions.controls import ATC, DEVICE
from omforge.probe.record import (
    FAILS,
    REFUSED,
    RIGHT,
    TAKEN,
    WRONG,
    Build,
    Experiment,
    Probe,
    Step,
    fill,
    load,
    once,
    run,
    timed,
)

_X, _Y = ("float16", (4, 64)), ("float16", (4, 64))
_GAMMA = {"gamma": numbers(64)}


def _taken(made: onnx.ModelProto, *flags: str) -> Experiment:
    return Experiment((Build("model", made, ("--precision_mode_v2=origin", *flags)),))


def _two_opsets(_: str) -> Experiment:
    nodes = [
        node("NPUFastGelu", ["x"], ["g"], domain="npu"),
        node("Add", ["g", "x"], ["y"]),  # of no domain, in a model with two imports
    ]
    return _taken(model(nodes, {"x": _X}, {"y": _Y}, opsets=(("", OPSET), ("npu", 1))))


def _opset_twice(_: str) -> Experiment:
    nodes = [node("Add", ["x", "x"], ["y"])]
    return _taken(model(nodes, {"x": _X}, {"y": _Y}, opsets=(("", OPSET), ("ai.onnx", OPSET))))


def _outside_prototypes(_: str) -> Experiment:
    """Three operators at dtypes that their prototypes do not list."""
    builds: list[Build] = []
    for name, op, dtype in (
        ("softmax", "Softmax", "int32"),
        ("sigmoid", "Sigmoid", "int32"),
        ("matmul", "MatMul", "uint8"),
    ):
        inputs = ["x", "x"] if op == "MatMul" else ["x"]
        spec = (dtype, (16, 16))
        builds.append(Build(name, model([node(op, inputs, ["y"])], {"x": spec}, {"y": spec})))
    return Experiment(tuple(builds))


def _unnamed(_: str) -> Experiment:
    first, second = node("Add", ["x", "x"], ["a"]), node("Mul", ["a", "x"], ["y"])
    first.name = second.name = ""
    return _taken(model([first, second], {"x": _X}, {"y": _Y}))


def _odd_names(_: str) -> Experiment:
    first, second = node("Add", ["x", "x"], ["a b;c"]), node("Mul", ["a b;c", "x"], ["y"])
    first.name, second.name = "layer 1;add", "layer 1;mul"
    made = model([first, second], {"x": _X}, {"y": _Y})
    x = numbers(4, 64)
    return once(made, {"x": x}, ((exact(x) * 2) * exact(x)).astype(np.float16))


def _layer_norm_without_bias(_: str) -> Experiment:
    made = model(
        [node("LayerNormalization", ["x", "gamma"], ["y"], axis=-1)],
        {"x": _X},
        {"y": _Y},
        _GAMMA,
        opsets=(("", 17),),
    )
    x = numbers(4, 64)
    wide = exact(x)
    centred = wide - wide.mean(-1, keepdims=True)
    normed = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5)
    return once(made, {"x": x}, (normed * exact(_GAMMA["gamma"])).astype(np.float16))


def _missing_file(_: str) -> Experiment:
    tensor = onnx.TensorProto(data_type=onnx.TensorProto.FLOAT16, dims=[64, 32])
    tensor.data_location = onnx.TensorProto.EXTERNAL
    for key, value in (("location", "not_there.bin"), ("offset", "0"), ("length", "4096")):
        tensor.external_data.add(key=key, value=value)
    made = model(
        [node("MatMul", ["x", "w"], ["y"])],
        {"x": _X},
        {"y": ("float16", (4, 32))},
        {"w": tensor},
    )
    return _taken(made)


def _rank_five_gears(_: str) -> Experiment:
    made = model(
        [node("Mul", ["x", "x"], ["y"])],
        {"x": ("float16", (1, 2, "seq", 4, 16))},
        {"y": ("float16", (1, 2, "seq", 4, 16))},
    )
    return _taken(made, "--input_shape=x:1,2,-1,4,16", "--dynamic_dims=2;4")


def _index_dtypes(_: str) -> Experiment:
    """A Gather of 128 rows, by numbers in int64 and in int32."""
    table = numbers(512, 256)
    builds: list[Build] = []
    steps: list[Step] = []
    for dtype in ("int64", "int32"):
        made = model(
            [node("Gather", ["table", "i"], ["y"], axis=0)],
            {"i": (dtype, (1, 128))},
            {"y": ("float16", (1, 128, 256))},
            {"table": table},
        )
        rows = (np.arange(128) * 5 % 512).astype(dtype).reshape(1, 128)
        builds.append(Build(dtype, made))
        steps += (*load(dtype), *fill(**{f"{dtype} rows": rows}))
        steps.append(timed(dtype, (f"{dtype} rows",), (f"{dtype} y",)))
    unit = "times as long with int64 as with int32"
    return Experiment(
        tuple(builds), tuple(steps), unit=unit, over=("slower", "alike"), more_than=1.2
    )


def _input_as_output(_: str) -> Experiment:
    made = model(
        [node("Add", ["x", "x"], ["y"])],
        {"x": _X},
        [("y", _Y), ("x", _X)],
    )
    x = numbers(4, 64)
    return Experiment(
        (Build("model", made),),
        (*load("model"), *fill(x=x), run("model", ("x",), ("y", "again"))),
        {RIGHT: {"y": (exact(x) * 2).astype(np.float16), "again": x}},
    )


def _output_twice(_: str) -> Experiment:
    made = model([node("Add", ["x", "x"], ["y"])], {"x": _X}, [("y", _Y), ("y", _Y)])
    x = numbers(4, 64)
    y = (exact(x) * 2).astype(np.float16)
    return Experiment(
        (Build("model", made),),
        (*load("model"), *fill(x=x), run("model", ("x",), ("first", "second"))),
        {RIGHT: {"first": y, "second": y}},
    )


def _input_twice(_: str) -> Experiment:
    made = model([node("Add", ["x", "x"], ["y"])], [("x", _X), ("x", _X)], {"y": _Y})
    return _taken(made)


def _made_twice(_: str) -> Experiment:
    """Two nodes make `a`; the reader gets the first's, x + x, or the second's, x * x."""
    first, second = node("Add", ["x", "x"], ["a"]), node("Mul", ["x", "x"], ["a"])
    second.name = "n_a_again"
    made = model([first, second, node("Relu", ["a"], ["y"])], {"x": _X}, {"y": _Y})
    x = np.abs(numbers(4, 64))
    wide = exact(x)
    values = {
        "first": (wide * 2).astype(np.float16),
        "last": (wide * wide).astype(np.float16),
    }
    return once(made, {"x": x}, x, values=values)


def _never_made(_: str) -> Experiment:
    return _taken(model([node("Add", ["x", "nowhere"], ["y"])], {"x": _X}, {"y": _Y}))


def _bernoulli(_: str) -> Experiment:
    """Chances of 0 and 1, which leave nothing to chance."""
    spec = ("float32", (4, 64))
    made = model(
        [node("Bernoulli", ["x"], ["y"], seed=1.0)], {"x": spec}, {"y": spec}, opsets=(("", 15),)
    )
    x = (np.arange(256) % 3 == 0).astype(np.float32).reshape(4, 64)
    return once(made, {"x": x}, x)


def _grid_sample(*given: str) -> Experiment:
    """A point between four pixels, and one outside: both say which mode it is."""
    attributes = {name: {"mode": "bilinear", "padding_mode": "zeros"}[name] for name in given}
    made = model(
        [node("GridSample", ["x", "grid"], ["y"], align_corners=0, **attributes)],
        {"x": ("float32", (1, 1, 4, 4)), "grid": ("float32", (1, 1, 2, 2))},
        {"y": ("float32", (1, 1, 1, 2))},
    )
    x = np.arange(1, 17, dtype=np.float32).reshape(1, 1, 4, 4)
    grid = np.array([[0.0, 0.0], [-2.0, -2.0]], np.float32).reshape(1, 1, 2, 2)
    middle = x[0, 0, 1:3, 1:3].mean()
    wanted = np.array([middle, 0], np.float32).reshape(1, 1, 1, 2)
    return once(made, {"x": x, "grid": grid}, wanted)


_TAKEN_OR_NOT = {
    TAKEN: "atc takes it: what the rule refuses is advice here",
    REFUSED: "the rule holds here",
}
_NUMBERS = {
    RIGHT: "it is taken, and gives the right numbers: what the rule refuses is advice here",
    WRONG: "it is taken, and gives other numbers: the rule holds here",
    FAILS: "it is taken, and does not run: the rule holds here",
    REFUSED: "the rule holds here",
}

PROBES = (
    Probe(
        "two-opset-imports",
        "Does atc take a model of two opset imports with nodes of no domain?",
        _two_opsets,
        _TAKEN_OR_NOT,
        expected=REFUSED,
        after=(ATC,),
    ),
    Probe(
        "opset-import-twice",
        "Does atc take a default domain that is imported under both of its names?",
        _opset_twice,
        _TAKEN_OR_NOT,
        expected=REFUSED,
        after=(ATC,),
    ),
    Probe(
        "outside-prototypes",
        "Does atc take dtypes that an operator's prototype does not list?",
        _outside_prototypes,
        _TAKEN_OR_NOT,
        expected=REFUSED,
        after=(ATC,),
    ),
    Probe(
        "unnamed-nodes",
        "Does atc take nodes without names?",
        _unnamed,
        _TAKEN_OR_NOT,
        expected=TAKEN,
        after=(ATC,),
    ),
    Probe(
        "odd-names",
        "Does a model with spaces and semicolons in its names work?",
        _odd_names,
        _NUMBERS,
        expected=REFUSED,
        after=(ATC, DEVICE),
    ),
    Probe(
        "layer-norm-without-bias",
        "Is LayerNormalization of float16 without a bias right?",
        _layer_norm_without_bias,
        _NUMBERS,
        expected=REFUSED,
        after=(ATC, DEVICE),
    ),
    Probe(
        "missing-weights-file",
        "Does atc refuse a model whose weights file is not there?",
        _missing_file,
        _TAKEN_OR_NOT,
        expected=REFUSED,
        after=(ATC,),
    ),
    Probe(
        "gears-of-rank-five",
        "Does atc take gears in an input of five dimensions?",
        _rank_five_gears,
        _TAKEN_OR_NOT,
        expected=REFUSED,
        after=(ATC,),
    ),
    Probe(
        "int64-indices",
        "Is a Gather by int64 numbers slower than one by int32?",
        _index_dtypes,
        {
            "slower": "it is: int32 is advised with reason",
            "alike": "it is not: the advice has no reason here",
        },
        expected="slower",
        refused="",
        failed="",
        after=(ATC, DEVICE),
    ),
    Probe(
        "input-as-output",
        "Is an output that is an input itself right?",
        _input_as_output,
        _NUMBERS,
        expected=WRONG,
        after=(ATC, DEVICE),
    ),
    Probe(
        "output-twice",
        "Is an output that is listed twice right both times?",
        _output_twice,
        _NUMBERS,
        expected=WRONG,
        after=(ATC, DEVICE),
    ),
    Probe(
        "input-twice",
        "Does atc refuse two inputs of one name?",
        _input_twice,
        _TAKEN_OR_NOT,
        expected=REFUSED,
        after=(ATC,),
    ),
    Probe(
        "made-twice",
        "Which of two nodes that make a tensor of one name does its reader get?",
        _made_twice,
        {
            "first": "the first one's: the rule holds, for the meaning is open",
            "last": "the last one's: the rule holds, for the meaning is open",
            REFUSED: "the rule holds here",
            WRONG: "neither: the rule holds here",
            FAILS: "the rule holds here",
        },
        expected=REFUSED,
        after=(ATC, DEVICE),
    ),
    Probe(
        "never-made",
        "Does atc refuse a node that reads what nobody makes?",
        _never_made,
        {TAKEN: "the rule holds: atc says nothing of it", REFUSED: "the rule holds here"},
        expected=REFUSED,
        after=(ATC,),
    ),
    Probe(
        "bernoulli-without-dtype",
        "Is Bernoulli without its dtype right?",
        _bernoulli,
        _NUMBERS,
        expected=WRONG,
        after=(ATC, DEVICE),
    ),
    Probe(
        "grid-sample-without-mode",
        "Is GridSample without its mode right?",
        lambda _: _grid_sample("padding_mode"),
        _NUMBERS,
        expected=WRONG,
        after=(ATC, DEVICE),
    ),
    Probe(
        "grid-sample-without-padding",
        "Is GridSample without its padding_mode right?",
        lambda _: _grid_sample("mode"),
        _NUMBERS,
        expected=WRONG,
        after=(ATC, DEVICE),
    ),
)
