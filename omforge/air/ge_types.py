"""GE's numbers of dtypes and formats, as .om files and pyACL use them.

There are two numberings: `ge::DataType` (MODEL_INOUT_INFO, pyACL's data types) and
`ge.proto.DataType` (MODEL_DEF). Sources: hicann/ge:inc/framework/executor_c/types.h and
hicann/ge:graph_metadef/proto/ge_ir.proto.
"""

from __future__ import annotations

_GE = {
    0: "float32",
    1: "float16",
    2: "int8",
    3: "int32",
    4: "uint8",
    6: "int16",
    7: "uint16",
    8: "uint32",
    9: "int64",
    10: "uint64",
    11: "float64",
    12: "bool",
    13: "string",
    16: "complex64",
    17: "complex128",
    27: "bfloat16",
    28: "undefined",
    29: "int4",
    30: "uint1",
    31: "int2",
    32: "uint2",
    34: "hifloat8",
    35: "float8e5m2",
    36: "float8e4m3fn",
}
_PROTO = {
    0: "undefined",
    1: "float32",
    2: "float16",
    3: "int8",
    4: "uint8",
    5: "int16",
    6: "uint16",
    7: "int32",
    8: "int64",
    9: "uint32",
    10: "uint64",
    11: "bool",
    12: "float64",
    13: "string",
    16: "complex64",
    17: "complex128",
    27: "bfloat16",
    28: "int4",
    29: "uint1",
    30: "int2",
    31: "uint2",
    33: "hifloat8",
    34: "float8e5m2",
    35: "float8e4m3fn",
}
_FORMATS = {
    -1: "UNDEFINED",
    0: "NCHW",
    1: "NHWC",
    2: "ND",
    3: "NC1HWC0",
    4: "FRACTAL_Z",
    12: "NC1HWC0_C04",
    14: "CHWN",
    16: "HWCN",
    27: "NDHWC",
    29: "FRACTAL_NZ",
    30: "NCDHW",
    32: "NDC1HWC0",
    33: "FRACTAL_Z_3D",
    35: "NC",
    47: "NCL",
}
_BITS = {
    "float32": 32,
    "float16": 16,
    "int8": 8,
    "int32": 32,
    "uint8": 8,
    "int16": 16,
    "uint16": 16,
    "uint32": 32,
    "int64": 64,
    "uint64": 64,
    "float64": 64,
    "bool": 8,
    "complex64": 64,
    "complex128": 128,
    "bfloat16": 16,
    "hifloat8": 8,
    "float8e5m2": 8,
    "float8e4m3fn": 8,
    "int4": 4,
    "uint1": 1,
    "int2": 2,
    "uint2": 2,
}

_GE_NUMBERS = {name: number for number, name in _GE.items()}
_PROTO_NUMBERS = {name: number for number, name in _PROTO.items()}
_FORMAT_NUMBERS = {name: number for number, name in _FORMATS.items()}


def ge_dtype(number: int) -> str:
    """Return the numpy-like name of a ge::DataType; an unknown one is `ge:<number>`."""
    return _GE.get(number, f"ge:{number}")


def ge_number(dtype: str) -> int:
    """Return the ge::DataType of a name, also one that `ge_dtype` made up."""
    return _number(dtype, "ge", _GE_NUMBERS)


def proto_dtype(number: int) -> str:
    """Return the numpy-like name of a ge.proto.DataType; an unknown one is `proto:<number>`."""
    return _PROTO.get(number, f"proto:{number}")


def proto_number(dtype: str) -> int:
    """Return the ge.proto.DataType of a name, also one that `proto_dtype` made up."""
    return _number(dtype, "proto", _PROTO_NUMBERS)


def format_name(number: int) -> str:
    """Return the name of a ge::Format; an unknown one is `format:<number>`."""
    return _FORMATS.get(number, f"format:{number}")


def format_number(name: str) -> int:
    """Return the ge::Format of a name, also one that `format_name` made up."""
    return _number(name, "format", _FORMAT_NUMBERS)


def byte_size(dtype: str, shape: tuple[int, ...]) -> int:
    """Return the bytes of a dense tensor; 0 where a dim or the dtype's width is not known."""
    count = 1
    for dim in shape:
        if dim < 0:
            return 0
        count *= dim
    return (count * _BITS.get(dtype, 0) + 7) // 8


def _number(name: str, prefix: str, numbers: dict[str, int]) -> int:
    made_up = name.removeprefix(f"{prefix}:")
    return int(made_up) if made_up != name else numbers[name]
