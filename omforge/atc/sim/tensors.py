"""How atc's parser reads ONNX tensors, in the graph and beside it.

Sources: hicann/ge:parser/parser/onnx/onnx_constant_parser.{cc,h}, onnx_file_constant_parser.cc,
onnx_util.cc.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

import onnx
from onnx import TensorProto

from omforge.atc.sim.reports import Refused, Report

# onnx_util.cc:onnx_data_type_map, with GE's names. What is not here is "undefined".
GE_DTYPES: Mapping[int, str] = {
    TensorProto.FLOAT: "float32",
    TensorProto.UINT8: "uint8",
    TensorProto.INT8: "int8",
    TensorProto.UINT16: "uint16",
    TensorProto.INT16: "int16",
    TensorProto.INT32: "int32",
    TensorProto.INT64: "int64",
    TensorProto.STRING: "string",
    TensorProto.BOOL: "bool",
    TensorProto.FLOAT16: "float16",
    TensorProto.DOUBLE: "float64",
    TensorProto.UINT32: "uint32",
    TensorProto.UINT64: "uint64",
    TensorProto.COMPLEX64: "complex64",
    TensorProto.COMPLEX128: "complex128",
    TensorProto.BFLOAT16: "bfloat16",
    TensorProto.FLOAT8E5M2: "float8e5m2",
    TensorProto.FLOAT8E4M3FN: "float8e4m3fn",
    TensorProto.INT4: "int4",
}

_BITS: Mapping[int, int] = {
    TensorProto.FLOAT: 32,
    TensorProto.UINT8: 8,
    TensorProto.INT8: 8,
    TensorProto.UINT16: 16,
    TensorProto.INT16: 16,
    TensorProto.INT32: 32,
    TensorProto.INT64: 64,
    TensorProto.BOOL: 8,
    TensorProto.FLOAT16: 16,
    TensorProto.DOUBLE: 64,
    TensorProto.UINT32: 32,
    TensorProto.UINT64: 64,
    TensorProto.COMPLEX64: 64,
    TensorProto.COMPLEX128: 128,
    TensorProto.BFLOAT16: 16,
    TensorProto.FLOAT8E5M2: 8,
    TensorProto.FLOAT8E4M3FN: 8,
    TensorProto.INT4: 4,
}

# onnx_constant_parser.cc:ParseConvertData: the list that each dtype is read from. FLOAT8 is not in
# it, so no constant in the model may have it.
_LISTS: Mapping[int, str] = {
    TensorProto.INT32: "int32_data",
    TensorProto.UINT8: "int32_data",
    TensorProto.INT8: "int32_data",
    TensorProto.UINT16: "int32_data",
    TensorProto.INT16: "int32_data",
    TensorProto.BOOL: "int32_data",
    TensorProto.FLOAT16: "int32_data",
    TensorProto.BFLOAT16: "int32_data",
    TensorProto.INT64: "int64_data",
    TensorProto.STRING: "string_data",
    TensorProto.FLOAT: "float_data",
    TensorProto.COMPLEX64: "float_data",
    TensorProto.DOUBLE: "double_data",
    TensorProto.COMPLEX128: "double_data",
    TensorProto.UINT64: "uint64_data",
    TensorProto.UINT32: "uint64_data",
    TensorProto.INT4: "int32_data",
}

INT_MAX = 2**31 - 1
_LONG = re.compile(r"\s*[+-]?[0-9]+")


def is_external(tensor: onnx.TensorProto) -> bool:
    """Say whether the data stands in another file."""
    return tensor.data_location == TensorProto.EXTERNAL


def size_in_bytes(dtype: int, dims: list[int] | tuple[int, ...]) -> int:
    """The bytes of a dense tensor; 0 for a dtype without a fixed width."""
    return math.ceil(math.prod(dims) * _BITS.get(dtype, 0) / 8)


def check_dtype(dtype: int, report: Report) -> None:
    """onnx_constant_parser.cc:ParseConvertDataType, onnx_data_parser.cc:ParseInputFromModel."""
    if dtype not in GE_DTYPES:
        report.inner(f"tensor_proto data type {dtype} is undefined.")
        raise Refused


def check_constant(name: str, tensor: onnx.TensorProto, report: Report) -> None:
    """Check a constant that is in the model, as ParseConstFromInput reads it.

    Raises:
        Refused: The parser stops at it.
    """
    dtype = tensor.data_type
    check_dtype(dtype, report)
    if any(dim < 0 for dim in tensor.dims):
        text = "Dim size is invalid, dim is less than zero or dim size exceeds INT64_MAX."
        report.inner(text)
        raise Refused
    count = math.prod(tensor.dims)
    if count == 0:
        return
    if count > INT_MAX:
        report.trap(
            "SIM010",
            f"{name}: atc counts {count} elements in a 32-bit int, which overflows "
            "(onnx_constant_parser.cc:ParseConvertTensor).",
        )
    if dtype not in _LISTS:
        report.inner(f"data_type {dtype} not support.")
        raise Refused
    given = len(getattr(tensor, _LISTS[dtype]))
    if not given:
        _check_raw(name, tensor, report)
    elif dtype == TensorProto.INT4:
        report.trap(
            "SIM011",
            f"{name}: INT4 in int32_data is read as eight values per int32, where ONNX has two "
            "(onnx_constant_parser.cc:ParseConvertDataElements). Write raw_data.",
        )
    elif given != count * (2 if dtype in (TensorProto.COMPLEX64, TensorProto.COMPLEX128) else 1):
        report.trap(
            "SIM012",
            f"{name}: {_LISTS[dtype]} holds {given} of {count} values; atc repeats the last one "
            "(onnx_constant_parser.h:SetTensorData).",
        )


def _check_raw(name: str, tensor: onnx.TensorProto, report: Report) -> None:
    if not tensor.raw_data:
        report.inner("tensor_proto has no elements or raw_data")
        raise Refused
    expected = size_in_bytes(tensor.data_type, tuple(tensor.dims))
    if len(tensor.raw_data) < expected:
        report.trap(
            "SIM013",
            f"{name}: raw_data has {len(tensor.raw_data)} bytes, dims and dtype say {expected}; "
            "atc takes the bytes as they are (onnx_constant_parser.cc:ParseConvertData).",
        )


def check_external(name: str, tensor: onnx.TensorProto, report: Report) -> None:
    """Check a constant beside the model, as onnx_file_constant_parser.cc reads it.

    Raises:
        Refused: The parser stops at it.
    """
    check_dtype(tensor.data_type, report)
    location = ""
    lengths: list[str] = []
    for entry in tensor.external_data:
        if entry.key == "location":
            location = entry.value
        elif not _LONG.match(entry.value):
            # Every key but location and offset is taken for the length: a checksum breaks here.
            report.error("E10001", value=entry.value, parameter=entry.key, reason="stol")
            raise Refused
        elif entry.key != "offset":
            lengths.append(entry.key)
    if not location:
        report.inner(f"external tensor proto[{tensor.name}] must contain location.")
        raise Refused
    if lengths and lengths[-1] != "length":
        report.trap(
            "SIM014",
            f"{name}: atc stores the external-data key {lengths[-1]!r} as the length "
            "(onnx_file_constant_parser.cc:SetPathAttr).",
        )
    if location.startswith("/"):
        report.trap(
            "SIM015",
            f"{name}: the absolute location {location} is joined to the model's folder "
            "(onnx_parser.cc:SetExternalPath).",
        )
