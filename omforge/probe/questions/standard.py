"""Standard operators: each on its own, for each SoC has AI Core kernels for some of them alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import onnx
from onnx import TensorProto, helper

from omforge.probe.onnx_models import exact, model, node, numbers
from omforge.probe.questions.controls import ATC, DEVICE
from omforge.probe.record import FAILS, REFUSED, RIGHT, WRONG, Array, Experiment, Probe, once

_SHAPE = (4, 64)
_X = ("float16", _SHAPE)
_LONG = np.int64

Made = tuple[onnx.ModelProto, Array]
"""A model that takes x [4, 64] in float16, and what it gives for `numbers(4, 64)`."""


def _simple(
    op: str,
    wanted: Array,
    *operands: Array,
    dtype: str = "float16",
    opset: int = 16,
    **attributes: object,
) -> Made:
    names = [f"c{index}" for index in range(len(operands))]
    made = model(
        [node(op, ["x", *names], ["y"], **attributes)],
        {"x": _X},
        {"y": (dtype, wanted.shape)},
        dict(zip(names, operands, strict=True)),
        opsets=(("", opset),),
    )
    return made, wanted


def _x() -> Array:
    return numbers(*_SHAPE)


def _matmul() -> Made:
    w = numbers(64, 32) / np.float16(8)
    return _simple("MatMul", (exact(_x()) @ exact(w)).astype(np.float16), w)


def _gemm() -> Made:
    w, b = numbers(64, 32) / np.float16(8), numbers(32, seed=1)
    return _simple("Gemm", (exact(_x()) @ exact(w) + exact(b)).astype(np.float16), w, b)


def _softmax() -> Made:
    high = np.exp(exact(_x()))
    return _simple("Softmax", (high / high.sum(-1, keepdims=True)).astype(np.float16), axis=-1)


def _layer_norm() -> Made:
    gamma, beta = numbers(64, seed=1), numbers(64, seed=2)
    x = exact(_x())
    centred = x - x.mean(-1, keepdims=True)
    y = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5) * exact(gamma) + exact(beta)
    return _simple("LayerNormalization", y.astype(np.float16), gamma, beta, opset=17, axis=-1)


def _split() -> Made:
    made = model(
        [node("Split", ["x", "sizes"], ["y", "z"], axis=1)],
        {"x": _X},
        {"y": ("float16", (4, 16)), "z": ("float16", (4, 48))},
        {"sizes": np.array([16, 48], _LONG)},
    )
    return made, _x()[:, :16]


def _clip() -> Made:
    low, high = np.array(-0.5, np.float16), np.array(0.5, np.float16)
    return _simple("Clip", np.clip(_x(), low, high), low, high)


def _gather() -> Made:
    rows = np.array([2, 0], np.int32)
    return _simple("Gather", _x()[rows], rows, axis=0)


def _gather_nd() -> Made:
    places = np.array([[2, 5], [0, 63]], _LONG)
    return _simple("GatherND", _x()[[2, 0], [5, 63]], places)


def _scatter_nd() -> Made:
    wanted = _x()
    wanted[[3, 1]] = numbers(2, 64, seed=4)
    return _simple("ScatterND", wanted, np.array([[3], [1]], _LONG), numbers(2, 64, seed=4))


def _scatter_elements() -> Made:
    wanted, updates = _x(), numbers(1, 64, seed=4)
    wanted[2] = updates[0]
    return _simple("ScatterElements", wanted, np.full((1, 64), 2, _LONG), updates, axis=0)


def _mod() -> Made:
    step = np.array(0.3142, np.float16)
    return _simple("Mod", np.fmod(_x(), step), step, fmod=1)


def _constant() -> Made:
    value = helper.make_tensor("value", TensorProto.FLOAT16, [1], [0.5])
    nodes = [node("Constant", [], ["c"], value=value), node("Mul", ["x", "c"], ["y"])]
    return model(nodes, {"x": _X}, {"y": _X}), _x() * np.float16(0.5)


def _cast() -> Made:
    return _simple("Cast", exact(_x()), dtype="float32", to=int(TensorProto.FLOAT))


def _top_k() -> Made:
    made = model(
        [node("TopK", ["x", "k"], ["y", "at"], axis=-1)],
        {"x": _X},
        {"y": ("float16", (4, 2)), "at": ("int64", (4, 2))},
        {"k": np.array([2], _LONG)},
    )
    return made, np.sort(_x(), axis=-1)[:, ::-1][:, :2]


def _if() -> Made:
    def branch(op: str) -> onnx.GraphProto:
        y = helper.make_tensor_value_info(f"{op}_y", TensorProto.FLOAT16, _SHAPE)
        return helper.make_graph([node(op, ["x", "x"], [f"{op}_y"])], op, [], [y])

    nodes = [
        node("ReduceMax", ["x"], ["most"], keepdims=0),
        node("Greater", ["most", "zero"], ["positive"]),
        node("If", ["positive"], ["y"], then_branch=branch("Add"), else_branch=branch("Mul")),
    ]
    made = model(nodes, {"x": _X}, {"y": _X}, {"zero": np.array(0, np.float16)})
    return made, _x() * np.float16(2)


def _reduce_mean() -> Made:
    mean = exact(_x()).mean(-1, keepdims=True).astype(np.float16)
    return _simple("ReduceMean", mean, axes=[-1], keepdims=1)


def _trilu() -> Made:
    return _simple("Trilu", np.tril(_x()), upper=0)


def _where() -> Made:
    nodes = [
        node("Less", ["x", "zero"], ["negative"]),
        node("Where", ["negative", "zero", "x"], ["y"]),
    ]
    made = model(nodes, {"x": _X}, {"y": _X}, {"zero": np.array(0, np.float16)})
    return made, np.where(_x() < 0, np.float16(0), _x())


def _slice() -> Made:
    bounds = (np.array([each], _LONG) for each in (8, 24, 1))
    return _simple("Slice", _x()[:, 8:24], *bounds)


def _pad() -> Made:
    pads, zero = np.array([0, 2, 0, 6], _LONG), np.array(0, np.float16)
    return _simple("Pad", np.pad(_x(), ((0, 0), (2, 6))), pads, zero, mode="constant")


def _einsum() -> Made:
    w = numbers(32, 64) / np.float16(8)
    wanted = (exact(_x()) @ exact(w).T).astype(np.float16)
    return _simple("Einsum", wanted, w, equation="bk,nk->bn")


OPERATORS: Mapping[str, Callable[[], Made]] = {
    "MatMul": _matmul,
    "Gemm": _gemm,
    "Softmax": _softmax,
    "LayerNormalization": _layer_norm,
    "Split": _split,
    "Clip": _clip,
    "GatherND": _gather_nd,
    "Gather": _gather,
    "ScatterND": _scatter_nd,
    "ScatterElements": _scatter_elements,
    "Mod": _mod,
    "Constant": _constant,
    "Cast": _cast,
    "TopK": _top_k,
    "If": _if,
    "ReduceMean": _reduce_mean,
    "Trilu": _trilu,
    "Where": _where,
    "Slice": _slice,
    "Pad": _pad,
    "Einsum": _einsum,
}


def _experiment(op: str) -> Experiment:
    made, wanted = OPERATORS[op]()
    more = tuple(value.name for value in made.graph.output[1:])
    return once(made, {"x": _x()}, wanted, more_outputs=more)


def _probe(op: str) -> Probe:
    def make(_: str) -> Experiment:
        return _experiment(op)

    return Probe(
        f"operator-{op.lower()}",
        f"Is {op} there, and right?",
        make,
        {
            RIGHT: "the SoC has a kernel for it, on AI Core or AI CPU",
            WRONG: "its numbers are others: see the evidence",
            FAILS: "it is compiled and does not run",
            REFUSED: "the SoC has no kernel for it",
        },
        expected=RIGHT,
        after=(ATC, DEVICE),
    )


PROBES = tuple(_probe(op) for op in OPERATORS)
