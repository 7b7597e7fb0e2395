"""MODEL_INOUT_INFO: a model's inputs, outputs and gears, without protobuf.

Blocks {type i32, length u32, payload}. Sources: hicann/ge:base/common/model/model_introduction.cc
and hicann/ge:base/common/model/tlv/ (writer), hicann/ge:base/common/helper/model_parser_base.cc
(reader).
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass

from omforge.air.ge_types import format_name, format_number, ge_dtype, ge_number
from omforge.ir.errors import InputError

INPUTS, OUTPUTS, BATCH, IMAGE, DIMS, OUTPUT_SHAPE, ORDER = range(7)

_BLOCK = struct.Struct("<iI")
_COUNT = struct.Struct("<I")
# size, format, dtype, then the bytes of name, dims, dimsV2 and ranges
_TENSOR = struct.Struct("<QiiIIII")

GEAR_INPUT = "ascend_mbatch_shape_data"
"""The input that a model with gears has beside its own (hicann/ge:inc/external/acl/acl_mdl.h)."""


@dataclass(frozen=True)
class OmTensor:
    """An input or output: -1 stands where a gear decides; `size` is of the largest gear.

    `ranges` are (lowest, highest) per dim for a model of true dynamic shape.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    size: int
    format: str = "ND"
    ranges: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True)
class InOut:
    """What the partition holds.

    Attributes:
        inputs: In order, the gears' own input last.
        outputs: In order.
        dynamic_batch: The gears of --dynamic_batch_size.
        dynamic_hw: The gears of --dynamic_image_size.
        dynamic_dims: The gears of --dynamic_dims: per gear the values of the -1 dims only.
        output_shapes: What dynamic_output_dims says, not interpreted.
        order: The names of the inputs in the order in which the gears count their dims.
    """

    inputs: tuple[OmTensor, ...]
    outputs: tuple[OmTensor, ...]
    dynamic_batch: tuple[int, ...] = ()
    dynamic_hw: tuple[tuple[int, ...], ...] = ()
    dynamic_dims: tuple[tuple[int, ...], ...] = ()
    output_shapes: tuple[str, ...] = ()
    order: tuple[str, ...] = ()


def encode(info: InOut) -> bytes:
    """Return the partition; a block that would be empty is left out, as CANN does."""
    blocks = (
        (INPUTS, _tensors(info.inputs) if info.inputs else b""),
        (OUTPUTS, _tensors(info.outputs) if info.outputs else b""),
        (BATCH, _numbers(info.dynamic_batch) if info.dynamic_batch else b""),
        (IMAGE, _lists(info.dynamic_hw) if info.dynamic_hw else b""),
        (DIMS, _lists(info.dynamic_dims) if info.dynamic_dims else b""),
        (OUTPUT_SHAPE, _strings(info.output_shapes) if info.output_shapes else b""),
        (ORDER, _strings(info.order) if info.order else b""),
    )
    return b"".join(_BLOCK.pack(kind, len(data)) + data for kind, data in blocks if data)


def decode(data: memoryview, where: str) -> InOut:
    """Decode the partition; blocks of other types are skipped.

    Args:
        data: The partition.
        where: The file, for messages.

    Raises:
        InputError: A block, a record or a text ends beyond the data.
    """
    blocks: dict[int, _Reader] = {}
    reader = _Reader(data, where)
    while reader.left:
        kind, length = reader.unpack(_BLOCK, "a block's type and length")
        blocks[kind] = _Reader(reader.take(length, f"block {kind}"), where)
    empty = memoryview(b"\0\0\0\0")

    def block(kind: int) -> _Reader:
        return blocks.get(kind) or _Reader(empty, where)

    return InOut(
        inputs=_read_tensors(block(INPUTS)),
        outputs=_read_tensors(block(OUTPUTS)),
        dynamic_batch=block(BATCH).numbers(),
        dynamic_hw=_read_lists(block(IMAGE)),
        dynamic_dims=_read_lists(block(DIMS)),
        output_shapes=_read_strings(block(OUTPUT_SHAPE)),
        order=_read_strings(block(ORDER)),
    )


class _Reader:
    """Takes bytes off the front; where there are too few it says what was expected."""

    def __init__(self, data: memoryview, where: str) -> None:
        self._data = data
        self._where = where
        self._at = 0

    @property
    def left(self) -> int:
        return len(self._data) - self._at

    def take(self, count: int, what: str) -> memoryview:
        if count > self.left:
            raise InputError(
                f"{self._where}: MODEL_INOUT_INFO is damaged",
                f"{what} takes {count} bytes, {self.left} are left",
                "Build the .om again",
            )
        part = self._data[self._at : self._at + count]
        self._at += count
        return part

    def unpack(self, form: struct.Struct, what: str) -> tuple[int, ...]:
        return form.unpack(self.take(form.size, what))

    def count(self, what: str) -> int:
        return self.unpack(_COUNT, f"the number of {what}")[0]

    def integers(self, size: int, what: str) -> tuple[int, ...]:
        """`size` bytes of int64; what is left of a broken last one is ignored, as by CANN."""
        part = self.take(size, what)
        return struct.unpack(f"<{size // 8}q", part[: size // 8 * 8])

    def text(self, size: int, what: str) -> str:
        return bytes(self.take(size, what)).decode("utf-8", "replace")

    def numbers(self) -> tuple[int, ...]:
        count = self.count("gears")
        return self.integers(8 * count, "the gears")


def _tensors(tensors: Sequence[OmTensor]) -> bytes:
    parts = [_COUNT.pack(len(tensors))]
    for tensor in tensors:
        name = tensor.name.encode()
        dims = struct.pack(f"<{len(tensor.shape)}q", *tensor.shape)
        flat = [bound for pair in tensor.ranges for bound in pair]
        ranges = struct.pack(f"<{len(flat)}q", *flat)
        sizes = (len(name), len(dims), len(dims), len(ranges))
        numbers = (format_number(tensor.format), ge_number(tensor.dtype))
        parts += [_TENSOR.pack(tensor.size, *numbers, *sizes), name, dims, dims, ranges]
    return b"".join(parts)


def _read_tensors(reader: _Reader) -> tuple[OmTensor, ...]:
    found: list[OmTensor] = []
    for index in range(reader.count("tensors")):
        what = f"tensor {index}"
        size, layout, dtype, name, dims, shown, ranges = reader.unpack(_TENSOR, what)
        text = reader.text(name, f"the name of {what}")
        shape = reader.integers(dims, f"the dims of {what}")
        reader.integers(shown, f"the dims of {what} behind AIPP")
        bounds = reader.integers(ranges, f"the ranges of {what}")
        pairs = tuple(zip(bounds[::2], bounds[1::2], strict=False))
        found.append(OmTensor(text, ge_dtype(dtype), shape, size, format_name(layout), pairs))
    return tuple(found)


def _numbers(values: Sequence[int]) -> bytes:
    return _COUNT.pack(len(values)) + struct.pack(f"<{len(values)}q", *values)


def _lists(values: Sequence[Sequence[int]]) -> bytes:
    flat = [number for part in values for number in part]
    lengths = [len(part) for part in values]
    return _COUNT.pack(len(values)) + struct.pack(f"<{len(lengths)}I{len(flat)}q", *lengths, *flat)


def _read_lists(reader: _Reader) -> tuple[tuple[int, ...], ...]:
    count = reader.count("gears")
    lengths = struct.unpack(f"<{count}I", reader.take(4 * count, "the gears' lengths"))
    return tuple(reader.integers(8 * length, "a gear") for length in lengths)


def _strings(values: Sequence[str]) -> bytes:
    texts = [value.encode() for value in values]
    lengths = [len(text) for text in texts]
    return _COUNT.pack(len(texts)) + struct.pack(f"<{len(lengths)}I", *lengths) + b"".join(texts)


def _read_strings(reader: _Reader) -> tuple[str, ...]:
    count = reader.count("texts")
    lengths = struct.unpack(f"<{count}I", reader.take(4 * count, "the texts' lengths"))
    return tuple(reader.text(length, "a text") for length in lengths)
