"""Bodies of GE operators that work number by number, or that ONNX has as they are."""

from __future__ import annotations

from collections.abc import Mapping

from omforge.air.reference.builder import ONNX_DTYPES, Body, Call, Twin

_UNARY = {
    **{
        name: name for name in ("Abs", "Neg", "Sqrt", "Reciprocal", "Tanh", "Sigmoid", "Erf", "Exp")
    },
    **{name: name for name in ("Log", "Floor", "Ceil", "Round", "Relu", "Cos", "Sin", "Tan")},
    **{name: name for name in ("Sign", "Softplus", "Identity", "Atan", "Sinh", "Cosh")},
    "LogicalNot": "Not",
    "TensorMove": "Identity",
}
_BINARY = {
    **{name: name for name in ("Add", "Sub", "Mul", "Pow", "Equal", "Less", "Greater")},
    "RealDiv": "Div",
    "Div": "Div",
    "Maximum": "Max",
    "Minimum": "Min",
    "LessEqual": "LessOrEqual",
    "GreaterEqual": "GreaterOrEqual",
    "LogicalAnd": "And",
    "LogicalOr": "Or",
}


def _unary(op_type: str) -> Body:
    return lambda twin, call: [twin.op(op_type, call.values[0])]


def _binary(op_type: str) -> Body:
    return lambda twin, call: [twin.op(op_type, call.values[0], call.values[1])]


def _mod(twin: Twin, call: Call) -> list[str]:
    """The remainder has the sign of x: hicann/ops-math:math/mod/op_graph/mod_proto.h."""
    return [twin.op("Mod", call.input("x1"), call.input("x2"), fmod=1)]


def _rsqrt(twin: Twin, call: Call) -> list[str]:
    return [twin.op("Reciprocal", twin.op("Sqrt", call.input("x")))]


def _cast(twin: Twin, call: Call) -> list[str]:
    return [twin.op("Cast", call.input("x"), to=ONNX_DTYPES[call.dtype("dst_type")])]


def _select(twin: Twin, call: Call) -> list[str]:
    return [twin.op("Where", *call.values[:3])]


def _clip(twin: Twin, call: Call) -> list[str]:
    low, high = call.input("clip_value_min"), call.input("clip_value_max")
    return [twin.op("Min", twin.op("Max", call.input("x"), low), high)]


def wide(twin: Twin, x: str, dtype: str) -> str:
    """X in float32, as vector kernels compute; itself where it is."""
    return x if dtype == "float32" else twin.cast(x, "float32")


def narrow(twin: Twin, x: str, dtype: str) -> str:
    """A float32 value rounded to a dtype."""
    return x if dtype == "float32" else twin.cast(x, dtype)


def _fast_gelu(twin: Twin, call: Call) -> list[str]:
    """X * sigmoid(1.702 x)."""
    return [_swish_by(twin, call, 1.702)]


def _swish(twin: Twin, call: Call) -> list[str]:
    return [_swish_by(twin, call, call.number("scale", 1.0))]


def _swish_by(twin: Twin, call: Call, scale: float) -> str:
    dtype = call.desc("x").dtype
    x = wide(twin, call.input("x"), dtype)
    gate = twin.op("Sigmoid", twin.op("Mul", x, twin.constant(scale, "float32")))
    return narrow(twin, twin.op("Mul", x, gate), dtype)


def _gelu_tanh(twin: Twin, call: Call) -> list[str]:
    return [gelu(twin, call, "tanh")]


def _gelu_v2(twin: Twin, call: Call) -> list[str]:
    return [gelu(twin, call, call.text("approximate", "none"))]


def gelu(twin: Twin, call: Call, approximate: str) -> str:
    """Gelu by erf or by tanh, in float32."""
    dtype = call.desc("x").dtype
    x = wide(twin, call.input("x"), dtype)

    def number(value: float) -> str:
        return twin.constant(value, "float32")

    if approximate == "tanh":
        cube = twin.op("Mul", twin.op("Mul", x, x), x)
        inner = twin.op("Add", x, twin.op("Mul", cube, number(0.044715)))
        share = twin.op("Tanh", twin.op("Mul", inner, number(0.7978845608028654)))
    else:
        share = twin.op("Erf", twin.op("Mul", x, number(0.7071067811865476)))
    half = twin.op("Mul", x, number(0.5))
    return narrow(twin, twin.op("Mul", half, twin.op("Add", share, number(1.0))), dtype)


BODIES: Mapping[str, Body] = {
    **{name: _unary(op_type) for name, op_type in _UNARY.items()},
    **{name: _binary(op_type) for name, op_type in _BINARY.items()},
    "Cast": _cast,
    "ClipByValue": _clip,
    "FastGelu": _fast_gelu,
    "Gelu": _gelu_tanh,
    "GeluV2": _gelu_v2,
    "Mod": _mod,
    "Rsqrt": _rsqrt,
    "Select": _select,
    "SelectV2": _select,
    "Swish": _swish,
}
