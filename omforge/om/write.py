"""Writing .om files in the real container; what is in the partitions is the caller's affair."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from omforge.ir.errors import InputError
from omforge.om import inout, layout
from omforge.om.inout import InOut, OmTensor

Partition = bytes | memoryview


def write_om(
    path: str | os.PathLike[str],
    *,
    name: str,
    inputs: Sequence[OmTensor],
    outputs: Sequence[OmTensor],
    partitions: Mapping[int, Partition],
    gears: Sequence[Sequence[int]] = (),
    dynamic_batch: Sequence[int] = (),
    input_order: Sequence[str] = (),
    output_shapes: Sequence[Sequence[int]] = (),
    submodels: Sequence[Mapping[int, Partition]] = (),
    platform_version: str = "",
    table: layout.TableWidth = "64-bit",
    is_dynamic: bool = False,
) -> None:
    """Write an .om file whole or not at all; the same arguments give the same bytes.

    Args:
        path: The file.
        name: The model's; 32 bytes of it are kept.
        inputs: With the gears' own input, if there are gears.
        outputs: In order.
        partitions: By type, in the order to be written; MODEL_INOUT_INFO is made from the other
            arguments and comes first, unless there is nothing to put in it.
        gears: As --dynamic_dims: per gear the values of the -1 dims.
        dynamic_batch: As --dynamic_batch_size.
        input_order: The inputs' names as the gears count their dims.
        output_shapes: Of a model with gears: gear (-1: all), output, then the dims it then has.
        submodels: The partitions of further sub models.
        platform_version: 20 bytes of it are kept.
        table: The width of the tables' numbers; atc writes 64-bit ones.
        is_dynamic: Marks a model of dynamic shape.

    Raises:
        InputError: There is no partition, or the file cannot be written.
    """
    info = inout.encode(
        InOut(
            tuple(inputs),
            tuple(outputs),
            dynamic_batch=tuple(dynamic_batch),
            dynamic_dims=tuple(tuple(gear) for gear in gears),
            output_shapes=tuple(",".join(map(str, shape)) for shape in output_shapes),
            order=tuple(input_order),
        )
    )
    root = ({layout.MODEL_INOUT_INFO: info} if info else {}) | dict(partitions)
    parts: list[Partition] = []
    for model in (root, *submodels):
        if not model:
            raise InputError(f"cannot write {path}", "a sub model has no partition")
        sizes = [(kind, len(data)) for kind, data in model.items()]
        parts += [layout.pack_table(table, sizes), *model.values()]
    header = layout.Header(
        name=name,
        length=sum(map(len, parts)),
        table=table,
        model_count=1 + len(submodels),
        platform_version=platform_version,
        is_dynamic=is_dynamic,
    )
    _write(Path(path), [header.pack(), *parts])


def _write(file: Path, parts: Sequence[Partition]) -> None:
    temporary = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as stream:
            for part in parts:
                stream.write(part)
        temporary.replace(file)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise InputError(f"cannot write {file}", str(error)) from error
