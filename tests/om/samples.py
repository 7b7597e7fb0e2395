"""A small .om in the real layout, made by hand here: its bytes do not come from our writer.

The three files that CANN itself wrote and that are public, in hicann/ge:tests/ge/st/st_run_data/
origin_model, are under the CANN Open Software License, which does not allow copies for other uses;
so none is here. The reader was tried on all three (2290 bytes with MODEL_INOUT_INFO, 16009 bytes of
three sub models, 6846 bytes of a flow model) and walks each to its last byte.
"""

import struct

import pytest

from omforge.ir.errors import InputError
from omforge.om import read_om


def header(
    payload: bytes, *, wide: bool = True, models: int = 1, kind: int = 0, unknown: int = 0
) -> bytes:
    """The 256 bytes, field by field as ModelFileHeader has them."""
    parts = [
        b"IMOD",
        struct.pack("<I", 256),
        struct.pack("<I", 0x20000000),
        bytes(64),  # checksum
        struct.pack("<I", 0 if wide else len(payload)),
        bytes([0, 0, kind, 0]),  # not encrypted, no checksum, model type, made offline
        b"tiny".ljust(32, b"\0"),
        struct.pack("<I", 0),
        bytes(32),
        struct.pack("<II", 0, models),
        b"1.0".ljust(20, b"\0"),
        bytes(4),
        struct.pack("<Q", len(payload) if wide else 0),
        bytes([0, unknown]),
        bytes(62),
    ]
    data = b"".join(parts)
    assert len(data) == 256
    return data


def section(partitions: list[tuple[int, bytes]], *, wide: bool = True) -> bytes:
    """A sub model: its table, then its partitions."""
    table = struct.pack("<I", len(partitions)) + (bytes(4) if wide else b"")
    offset = 0
    for kind, data in partitions:
        entry = (kind, 0, offset, len(data)) if wide else (kind, offset, len(data))
        table += struct.pack("<IIQQ" if wide else "<III", *entry)
        offset += len(data)
    return table + b"".join(data for _, data in partitions)


def tensor(name: str, dtype: int, dims: tuple[int, ...], size: int) -> bytes:
    """A record of MODEL_INOUT_INFO, format ND."""
    packed = struct.pack(f"<{len(dims)}q", *dims)
    numbers = struct.pack("<QiiIIII", size, 2, dtype, len(name), len(packed), len(packed), 0)
    return numbers + name.encode() + packed + packed


def block(kind: int, payload: bytes) -> bytes:
    return struct.pack("<iI", kind, len(payload)) + payload


def in_out() -> bytes:
    """Inputs x float16[1, -1] and the gears' own, output y; gears 1 and 8."""
    inputs = tensor("x", 1, (1, -1), 16) + tensor("ascend_mbatch_shape_data", 3, (1,), 4)
    order = struct.pack("<II", 1, 1) + b"x"
    return b"".join(
        (
            block(0, struct.pack("<I", 2) + inputs),
            block(1, struct.pack("<I", 1) + tensor("add:0:y", 0, (1, 8), 32)),
            block(4, struct.pack("<IIIqq", 2, 1, 1, 1, 8)),
            block(6, order),
            block(77, b"unknown blocks are skipped"),
        )
    )


def sample(*, wide: bool = True) -> bytes:
    """A file of two sub models; the second has no interface of its own."""
    payload = section([(8, in_out()), (1, b"weights"), (2, b"tasks")], wide=wide)
    payload += section([(3, b"kernels")], wide=wide)
    return header(payload, wide=wide, models=2, unknown=1) + payload


def refused(path) -> str:
    """The text of the refusal of a file that must be refused."""
    with pytest.raises(InputError) as caught:
        read_om(path)
    return str(caught.value)
