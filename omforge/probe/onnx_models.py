"""Tiny ONNX models for probes: made of protobuf, so that they can be wrong on purpose."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from omforge.probe.record import Array

OPSET = 16

_DTYPES = {
    "float16": onnx.TensorProto.FLOAT16,
    "float32": onnx.TensorProto.FLOAT,
    "float64": onnx.TensorProto.DOUBLE,
    "int8": onnx.TensorProto.INT8,
    "int32": onnx.TensorProto.INT32,
    "int64": onnx.TensorProto.INT64,
    "uint32": onnx.TensorProto.UINT32,
    "uint64": onnx.TensorProto.UINT64,
    "uint8": onnx.TensorProto.UINT8,
    "bool": onnx.TensorProto.BOOL,
}

Spec = tuple[str, Sequence[int | str]]
"""A tensor's dtype and shape."""


def node(
    op: str, inputs: Sequence[str], outputs: Sequence[str], **attributes: Any
) -> onnx.NodeProto:
    """A node, named after its first output; `domain` among the attributes is its domain."""
    return helper.make_node(op, list(inputs), list(outputs), f"n_{outputs[0]}", **attributes)


def model(
    nodes: Sequence[onnx.NodeProto],
    inputs: Mapping[str, Spec] | Sequence[tuple[str, Spec]],
    outputs: Mapping[str, Spec] | Sequence[tuple[str, Spec]],
    constants: Mapping[str, Array | onnx.TensorProto] | None = None,
    opsets: Sequence[tuple[str, int]] = (("", OPSET),),
) -> onnx.ModelProto:
    """A model; inputs and outputs as a sequence may be there twice."""
    graph = helper.make_graph(
        list(nodes),
        "probe",
        [_value(name, spec) for name, spec in _pairs(inputs)],
        [_value(name, spec) for name, spec in _pairs(outputs)],
        initializer=[_tensor(name, array) for name, array in (constants or {}).items()],
    )
    imports = [helper.make_opsetid(domain, version) for domain, version in opsets]
    made = helper.make_model(graph, opset_imports=imports, producer_name="omforge")
    made.ir_version = 8
    return made


def _pairs(
    values: Mapping[str, Spec] | Sequence[tuple[str, Spec]],
) -> Sequence[tuple[str, Spec]]:
    return tuple(values.items()) if isinstance(values, Mapping) else values


def _value(name: str, spec: Spec) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, _DTYPES[spec[0]], list(spec[1]))


def _tensor(name: str, array: Array | onnx.TensorProto) -> onnx.TensorProto:
    if isinstance(array, onnx.TensorProto):
        named = onnx.TensorProto()
        named.CopyFrom(array)
        named.name = name
        return named
    return numpy_helper.from_array(np.ascontiguousarray(array).reshape(array.shape), name)


def int4_tensor(values: Array) -> onnx.TensorProto:
    """An initializer of dtype INT4: two to a byte, the first in the low bits."""
    tensor = onnx.TensorProto(data_type=onnx.TensorProto.INT4, dims=values.shape)
    tensor.raw_data = int4_bytes(values)
    return tensor


def int4_bytes(values: Array) -> bytes:
    """Two to a byte, the first in the low bits."""
    nibbles = (values.astype(np.int16).reshape(-1, 2) & 15).astype(np.uint8)
    return (nibbles[:, 0] | (nibbles[:, 1] << 4)).astype(np.uint8).tobytes()


def int4_in_int32(values: Array) -> Array:
    """Eight to an int32 along the last axis, the first in the low bits."""
    shape = (*values.shape[:-1], values.shape[-1] // 8)
    return np.frombuffer(int4_bytes(values), np.int32).reshape(shape)


def matmul(rows: int = 16, inner: int = 64, columns: int = 32) -> tuple[onnx.ModelProto, Array]:
    """X [rows, inner] by a constant [inner, columns] in float16; the model and the constant."""
    weight = numbers(inner, columns) / np.float16(8)
    made = model(
        [node("MatMul", ["x", "w"], ["y"])],
        {"x": ("float16", (rows, inner))},
        {"y": ("float16", (rows, columns))},
        {"w": weight},
    )
    return made, weight


def numbers(*shape: int, seed: int = 0) -> Array:
    """Numbers in float16, the same ones every time, on any machine."""
    count = int(np.prod(shape))
    steps = (np.arange(count, dtype=np.int64) * 37 + 11 * seed) % 101
    return ((steps - 50) / 50).astype(np.float16).reshape(shape)


def exact(array: Array) -> Array:
    """As float32, in which expectations are computed."""
    return array.astype(np.float32)
