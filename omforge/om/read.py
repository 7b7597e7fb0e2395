"""Reading .om files: what is in them, and what they take and give."""

from __future__ import annotations

import mmap
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omforge.ir.errors import InputError
from omforge.om import inout, layout, model_def
from omforge.om.inout import InOut, OmTensor


@dataclass(frozen=True)
class OmPartition:
    """One partition of a sub model; `offset` counts from the file's first byte."""

    type: int
    name: str
    offset: int
    size: int


@dataclass(frozen=True)
class OmModel:
    """A sub model; the first is the root graph, whose interface is the file's.

    Attributes:
        partitions: In the file's order.
        inputs: In order; a model with gears has `ascend_mbatch_shape_data` as well.
        outputs: In order.
        dynamic_dims: Per gear the values of the -1 dims, in the order of `input_order`.
        dynamic_batch: The gears of a model with batch gears.
        dynamic_hw: The gears of a model with image gears.
        input_order: The inputs' names in the order of the gears' numbers; empty: the inputs' order.
        output_shapes: Of a model with gears: gear (-1: all), output, then the dims it then has.
        interface: Where inputs and outputs were read: MODEL_INOUT_INFO, MODEL_DEF or nothing.
    """

    partitions: tuple[OmPartition, ...]
    inputs: tuple[OmTensor, ...]
    outputs: tuple[OmTensor, ...]
    dynamic_dims: tuple[tuple[int, ...], ...] = ()
    dynamic_batch: tuple[int, ...] = ()
    dynamic_hw: tuple[tuple[int, ...], ...] = ()
    input_order: tuple[str, ...] = ()
    output_shapes: tuple[tuple[int, ...], ...] = ()
    interface: str = ""

    @property
    def gears(self) -> tuple[tuple[int, ...], ...]:
        """The gears of whichever kind the model has; empty for a static one."""
        return self.dynamic_dims or self.dynamic_hw or tuple((b,) for b in self.dynamic_batch)


@dataclass(frozen=True)
class OmFile:
    """An .om file, mapped; make one with `read_om`."""

    path: Path
    size: int
    version: int
    model_type: str
    name: str
    platform_version: str
    is_dynamic: bool
    table: layout.TableWidth
    models: tuple[OmModel, ...]
    _data: memoryview = field(repr=False, compare=False)

    @property
    def simulated(self) -> bool:
        """Whether the simulated atc wrote it: no device loads it, and only such run without one."""
        return self.platform_version == layout.SIMULATED_PLATFORM

    def partition(self, model_index: int, kind: int) -> memoryview:
        """Return the bytes of a sub model's partition, not copied.

        Raises:
            InputError: It has none of that type.
        """
        for part in self.models[model_index].partitions:
            if part.type == kind:
                return self._data[part.offset : part.offset + part.size]
        name = layout.PARTITION_NAMES.get(kind, str(kind))
        have = ", ".join(part.name for part in self.models[model_index].partitions)
        raise InputError(f"{self.path} has no partition {name}", f"it has {have}")

    def to_dict(self) -> dict[str, Any]:
        """Return what `omforge om --json` prints."""
        return {
            "file": str(self.path),
            "size": self.size,
            "version": f"0x{self.version:08x}",
            "model_type": self.model_type,
            "name": self.name,
            "platform_version": self.platform_version,
            "is_dynamic": self.is_dynamic,
            "simulated": self.simulated,
            "table": self.table,
            "models": [_model_dict(model) for model in self.models],
        }


def read_om(path: str | os.PathLike[str]) -> OmFile:
    """Read an .om file's tables and interfaces; its weights and kernels stay on disk.

    Raises:
        InputError: There is no such file, it is no .om, it is truncated or damaged; the message
            names the offset and what was expected there.
    """
    file = Path(path)
    if not file.is_file():
        what = "it is a folder" if file.is_dir() else "there is no such file"
        raise InputError(f"cannot read {file}", what, "Name an .om file")
    data = _map(file)
    header = _header(file, data)
    models: list[OmModel] = []
    at = layout.HEADER_SIZE
    for index in range(header.model_count):
        model, at = _model(file, data, header, index, at)
        models.append(model)
    if at != len(data):
        raise _damaged(file, at, f"the end of the file, {len(data) - at} bytes follow")
    return OmFile(
        path=file,
        size=len(data),
        version=header.version,
        model_type=layout.MODEL_TYPES.get(header.model_type, str(header.model_type)),
        name=header.name,
        platform_version=header.platform_version,
        is_dynamic=header.is_dynamic,
        table=header.table,
        models=tuple(models),
        _data=data,
    )


def _map(file: Path) -> memoryview:
    try:
        with file.open("rb") as stream:
            if os.fstat(stream.fileno()).st_size == 0:
                raise InputError(f"{file} is empty", "an .om has a header of 256 bytes")
            return memoryview(mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ))
    except OSError as error:
        raise InputError(f"cannot read {file}", str(error), "Check its permissions") from error


def _header(file: Path, data: memoryview) -> layout.Header:
    start = bytes(data[: layout.HEADER_SIZE])
    if layout.magic_of(start) != layout.MAGIC or len(start) < 4:
        raise InputError(
            f"{file} is no .om file",
            f"it starts with {start[:4]!r} instead of b'IMOD'{_guess(file, start)}",
            "Name a file that atc made",
        )
    if len(start) < layout.HEADER_SIZE:
        raise _damaged(file, len(start), f"a header of {layout.HEADER_SIZE} bytes")
    header = layout.unpack_header(start)
    if header.is_encrypted:
        raise InputError(f"{file} is encrypted", "its content cannot be read without the key")
    if header.length != len(data) - layout.HEADER_SIZE:
        # hicann/ge:base/common/helper/model_parser_base.cc, ParseModelContent
        raise InputError(
            f"{file} is truncated or damaged",
            f"its header states {header.length} bytes behind the first {layout.HEADER_SIZE}, "
            f"there are {len(data) - layout.HEADER_SIZE} (a device refuses it with E10001)",
            "Copy it again, or run atc again",
        )
    return header


def _guess(file: Path, start: bytes) -> str:
    if start.startswith(b"PK"):
        return ", as a ZIP archive does (an .om2 is one, which omforge does not read)"
    if start[:1] == b"\x08" or file.suffix == ".onnx":
        return ", as an ONNX model does"
    return ""


def _model(
    file: Path, data: memoryview, header: layout.Header, index: int, at: int
) -> tuple[OmModel, int]:
    width, start = header.table, at
    count_size, entry_size = layout.count_size(width), layout.entry_size(width)
    if len(data) - at < count_size:
        raise _damaged(file, at, f"the partition table of sub model {index}")
    count = layout.unpack_count(width, bytes(data[at : at + count_size]))
    if not 0 < count <= layout.PARTITION_LIMIT:
        raise _damaged(file, at, f"a partition table of sub model {index}, not {count} partitions")
    at += count_size
    if len(data) - at < count * entry_size:
        raise _damaged(file, at, f"{count} entries of the partition table at {start}")
    entries = [
        layout.unpack_entry(width, bytes(data[offset : offset + entry_size]))
        for offset in range(at, at + count * entry_size, entry_size)
    ]
    at += count * entry_size
    partitions: list[OmPartition] = []
    for kind, size in entries:
        name = layout.PARTITION_NAMES.get(kind, f"type {kind}")
        if size > len(data) - at:
            raise _damaged(file, at, f"{size} bytes of {name}, {len(data) - at} are left")
        partitions.append(OmPartition(kind, name, at, size))
        at += size
    return _with_interface(file, data, tuple(partitions)), at


def _with_interface(file: Path, data: memoryview, partitions: tuple[OmPartition, ...]) -> OmModel:
    found = {part.type: data[part.offset : part.offset + part.size] for part in partitions}
    info, source = InOut((), ()), ""
    if layout.MODEL_INOUT_INFO in found:
        info, source = inout.decode(found[layout.MODEL_INOUT_INFO], str(file)), "MODEL_INOUT_INFO"
    elif layout.MODEL_DEF in found:
        model = model_def.decode(found[layout.MODEL_DEF], str(file))
        info, source = model_def.in_out(model), "MODEL_DEF"
    return OmModel(
        partitions=partitions,
        inputs=info.inputs,
        outputs=info.outputs,
        dynamic_dims=info.dynamic_dims,
        dynamic_batch=info.dynamic_batch,
        dynamic_hw=info.dynamic_hw,
        input_order=info.order,
        output_shapes=tuple(_shape(text) for text in info.output_shapes),
        interface=source,
    )


def _shape(text: str) -> tuple[int, ...]:
    """Take apart "gear,output,dim,...", as hicann/ge:api/acl/acl_model/model/model_common.cpp."""
    return tuple(int(part) for part in text.split(",") if part.removeprefix("-").isdecimal())


def _damaged(file: Path, offset: int, expected: str) -> InputError:
    return InputError(
        f"{file} is truncated or damaged",
        f"at byte {offset} there should be {expected}",
        "Copy it again, or run atc again",
    )


def _model_dict(model: OmModel) -> dict[str, Any]:
    return {
        "partitions": [
            {"type": part.type, "name": part.name, "offset": part.offset, "size": part.size}
            for part in model.partitions
        ],
        "interface": model.interface,
        "inputs": [_tensor_dict(tensor) for tensor in model.inputs],
        "outputs": [_tensor_dict(tensor) for tensor in model.outputs],
        "dynamic_dims": [list(gear) for gear in model.dynamic_dims],
        "dynamic_batch": list(model.dynamic_batch),
        "dynamic_hw": [list(gear) for gear in model.dynamic_hw],
        "input_order": list(model.input_order),
        "output_shapes": [list(shape) for shape in model.output_shapes],
    }


def _tensor_dict(tensor: OmTensor) -> dict[str, Any]:
    return {
        "name": tensor.name,
        "dtype": tensor.dtype,
        "shape": list(tensor.shape),
        "size": tensor.size,
        "format": tensor.format,
        "ranges": [list(pair) for pair in tensor.ranges],
    }
