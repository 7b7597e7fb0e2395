"""The container of an .om file: a header of 256 bytes, then per sub model a table and its data.

Little endian. Sources: hicann/ge:inc/framework/common/framework_types_internal.h (ModelFileHeader,
both tables, the partition types) and hicann/ge:base/common/helper/om_file_helper.cc (the reader,
which walks the sizes one after the other and does not look at the offsets in the table).
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

MAGIC = 0x444F4D49  # "IMOD" in the file
HEADER_SIZE = 256
VERSION = 0x20000000
NAME_SIZE = 32
PLATFORM_SIZE = 20

SIMULATED_PLATFORM = "omforge-atc-sim"
"""What stands as platform_version in a file that the simulated atc wrote."""

MODEL_DEF = 0
WEIGHTS_DATA = 1
TASK_INFO = 2
TBE_KERNELS = 3
FLOW_MODEL = 6
FLOW_SUBMODEL = 7
MODEL_INOUT_INFO = 8
SIMULATED_PAYLOAD = 0x4F4D4653
"""A partition of our own, which no CANN knows: what the simulated device runs."""

PARTITION_NAMES = {
    MODEL_DEF: "MODEL_DEF",
    WEIGHTS_DATA: "WEIGHTS_DATA",
    TASK_INFO: "TASK_INFO",
    TBE_KERNELS: "TBE_KERNELS",
    4: "CUST_AICPU_KERNELS",
    5: "SO_BINS",
    FLOW_MODEL: "FLOW_MODEL",
    FLOW_SUBMODEL: "FLOW_SUBMODEL",
    MODEL_INOUT_INFO: "MODEL_INOUT_INFO",
    9: "STATIC_TASK_DESC",
    10: "DYNAMIC_TASK_DESC",
    11: "TASK_PARAM",
    12: "TILING_DATA",
    20: "PRE_MODEL_DESC",
    21: "PRE_MODEL_SQE",
    22: "PRE_KERNEL_ARGS",
    23: "PRE_MODEL_DESC_EXTEND",
    24: "BUNDLE_MODEL_INFO",
    25: "BUNDLE_MODEL_VAR_INFO",
    26: "CUSTOM_OPS",
    SIMULATED_PAYLOAD: "SIMULATED_PAYLOAD",
}

MODEL_TYPES = {0: "ir", 1: "standard", 2: "tiny", 3: "flow", 4: "lite", 5: "bundle"}
FLOW = 3

PARTITION_LIMIT = 4096
"""The loader's own limit for flow models; the other kinds have at most eight."""

TableWidth = Literal["64-bit", "32-bit"]

# magic, headsize, version, checksum, length, is_encrypt, is_checksum, modeltype, genmode, name,
# ops, userdefineinfo, om_ir_version, model_num, platform_version, platform_type, model_length,
# need_check_os_cpu_info, is_unknow_model
_HEADER = struct.Struct("<III64sIBBBB32sI32sII20sB3xQBB62x")
_COUNT = {"64-bit": struct.Struct("<I4x"), "32-bit": struct.Struct("<I")}
_ENTRY = {"64-bit": struct.Struct("<I4xQQ"), "32-bit": struct.Struct("<III")}


@dataclass(frozen=True)
class Header:
    """What the header says, as far as a reader needs it; the rest is written as zeros.

    `length` is the payload's, from the 64-bit field, or from the 32-bit one where that is 0: which
    of the two is used also decides the width of the tables.
    """

    name: str
    length: int
    table: TableWidth = "64-bit"
    version: int = VERSION
    model_type: int = 0
    model_count: int = 1
    platform_version: str = ""
    is_encrypted: bool = False
    is_dynamic: bool = False

    def pack(self) -> bytes:
        """Return the 256 bytes; a name that is too long loses its end, as in atc."""
        wide = self.table == "64-bit"
        return _HEADER.pack(
            MAGIC,
            HEADER_SIZE,
            self.version,
            b"",
            0 if wide else self.length,
            int(self.is_encrypted),
            0,
            self.model_type,
            0,
            _text(self.name, NAME_SIZE),
            0,
            b"",
            0,
            self.model_count,
            _text(self.platform_version, PLATFORM_SIZE),
            0,
            self.length if wide else 0,
            0,
            int(self.is_dynamic),
        )


def unpack_header(data: bytes) -> Header:
    """Decode 256 bytes whose magic was checked."""
    fields = _HEADER.unpack(data)
    (_, _, version, _, length, encrypted, _, kind, _, name) = fields[:10]
    (_, _, _, count, platform, _, wide_length, _, unknown) = fields[10:]
    wide = wide_length != 0 or kind == FLOW
    return Header(
        name=_string(name),
        length=wide_length or length,
        table="64-bit" if wide else "32-bit",
        version=version,
        model_type=kind,
        model_count=max(count, 1),
        platform_version=_string(platform),
        is_encrypted=bool(encrypted),
        # hicann/ge:base/common/helper/model_parser_base.cc, IsDynamicModel
        is_dynamic=version >= VERSION and (count > 1 or unknown == 1),
    )


def magic_of(data: bytes) -> int:
    """Return the first four bytes as the number to compare with MAGIC."""
    return int.from_bytes(data[:4], "little")


def pack_table(table: TableWidth, sizes: Sequence[tuple[int, int]]) -> bytes:
    """Return the table of partitions (type, size), which follow it without gaps."""
    parts = [_COUNT[table].pack(len(sizes))]
    offset = 0
    for kind, size in sizes:
        parts.append(_ENTRY[table].pack(kind, offset, size))
        offset += size
    return b"".join(parts)


def count_size(table: TableWidth) -> int:
    """Return the bytes of a table ahead of its entries."""
    return _COUNT[table].size


def entry_size(table: TableWidth) -> int:
    """Return the bytes of one entry of a table."""
    return _ENTRY[table].size


def unpack_count(table: TableWidth, data: bytes) -> int:
    """Return how many entries follow."""
    return int(_COUNT[table].unpack(data)[0])


def unpack_entry(table: TableWidth, data: bytes) -> tuple[int, int]:
    """Return (type, size) of one entry."""
    kind, _, size = _ENTRY[table].unpack(data)
    return kind, size


def _text(text: str, size: int) -> bytes:
    return text.encode()[:size]


def _string(data: bytes) -> str:
    return data.split(b"\0", 1)[0].decode("utf-8", "replace")
