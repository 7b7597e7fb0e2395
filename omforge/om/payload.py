"""What a simulated .om has in place of kernels: ONNX graphs, and their weights beside the file.

The payload is a line of JSON, then the graphs. With external weights each constant is a file
`weight/weight_<hash>` beside the .om, as hicann/ge's --external_weight=1 has it; that the hash is
of the content is our reading.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omforge import ir
from omforge.ir.errors import InputError
from omforge.ir.json_text import parse_json
from omforge.ir.weights import chunks, external_like, replacing
from omforge.om import layout
from omforge.om.read import OmFile

WEIGHT_FOLDER = "weight"
EXTERNAL_ABOVE = 512
"""Smaller constants stay in the file (shapes and axes have to be readable without a device)."""

PROTOBUF_LIMIT = (1 << 31) - 1


@dataclass(frozen=True)
class Payload:
    """What the simulated device runs.

    Attributes:
        graphs: Serialised ONNX models, whose external data are relative to the .om's folder: one
            for whatever gear, or one for each.
        weights: The names of their weight files.
        work_size: Bytes of activations, as far as they can be known without running.
        weight_size: Bytes of constants.
        written: Of each input that the model writes (RefData), the output of the graphs with what
            lies there afterwards. It is none of the model's.
    """

    graphs: tuple[memoryview, ...]
    weights: tuple[str, ...]
    work_size: int
    weight_size: int
    written: Mapping[str, str] = field(default_factory=dict[str, str])


def pack_payload(payload: Payload) -> bytes:
    """Return the partition of a payload; the same one gives the same bytes."""
    header: dict[str, Any] = {
        "weight_size": payload.weight_size,
        "weights": payload.weights,
        "work_size": payload.work_size,
    }
    if len(payload.graphs) > 1:
        header["graphs"] = [len(graph) for graph in payload.graphs]
    if payload.written:
        header["written"] = dict(payload.written)
    content = json.dumps(header, sort_keys=True).encode() + b"\n"
    return b"".join((content, *payload.graphs))


def read_payload(om: OmFile) -> Payload:
    """Return the payload of a simulated .om.

    Raises:
        InputError: It is a real one, which needs a device, or its payload is damaged.
    """
    if not om.simulated:
        raise InputError(
            f"{om.path} needs a device",
            f"it was compiled for hardware (platform version {om.platform_version!r})",
            "Run it with --backend acl on a machine with an NPU",
        )
    data = om.partition(0, layout.SIMULATED_PAYLOAD)
    end = bytes(data[: 1 << 20]).find(b"\n")
    try:
        header: Any = parse_json(bytes(data[: max(end, 0)]))
        sizes = [int(size) for size in header.get("graphs", [len(data) - end - 1])]
        if min(sizes) < 0 or sum(sizes) != len(data) - end - 1:
            raise ValueError(f"its graphs have {sum(sizes)} bytes, {len(data) - end - 1} are there")
        starts = [end + 1 + sum(sizes[:at]) for at in range(len(sizes))]
        return Payload(
            graphs=tuple(data[at : at + size] for at, size in zip(starts, sizes, strict=True)),
            weights=tuple(str(name) for name in header["weights"]),
            work_size=int(header["work_size"]),
            weight_size=int(header["weight_size"]),
            written={str(k): str(v) for k, v in header.get("written", {}).items()},
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{om.path}: its payload is damaged", str(error)) from error


def place_weights(
    twin: ir.Model,
    folder: Path,
    *,
    external: bool,
    placed: dict[tuple[str, int, int], str] | None = None,
) -> list[str]:
    """Write each constant that is not small to its file, and take in the others.

    Args:
        twin: The graph; its constants are changed.
        folder: Of the .om.
        external: Whether there are files: all are taken in otherwise.
        placed: The files by the place that their bytes come from, of graphs before this one.

    Returns:
        The files' names.
    """
    names: set[str] = set()
    above = EXTERNAL_ABOVE if external else None
    for value in twin.graph.initializers.values():
        tensor = value.const_value
        if tensor is None:
            continue
        if above is None or tensor.nbytes <= above:
            if isinstance(tensor, ir.ExternalTensor):
                value.const_value = ir.Tensor(
                    tensor.numpy().copy(), dtype=tensor.dtype, name=tensor.name
                )
            continue
        source = _source_place(tensor)
        location = None if source is None or placed is None else placed.get(source)
        location = location or _written_weight(tensor, folder)
        if source is not None and placed is not None:
            placed[source] = location
        names.add(location)
        value.const_value = external_like(tensor, folder, location, 0)
    return sorted(names)


def _source_place(tensor: ir.TensorProtocol) -> tuple[str, int, int] | None:
    if not isinstance(tensor, ir.ExternalTensor):
        return None
    return str(tensor.path), tensor.offset or 0, tensor.nbytes


def _written_weight(tensor: ir.TensorProtocol, folder: Path) -> str:
    """Write a constant to the file of its hash, unless it is there; return the file's name."""
    digest = hashlib.sha256()
    for part in chunks(tensor):
        digest.update(part)
    location = f"{WEIGHT_FOLDER}/weight_{digest.hexdigest()[:16]}"
    file = folder / location
    if not file.is_file() or file.stat().st_size != tensor.nbytes:
        file.parent.mkdir(parents=True, exist_ok=True)
        with replacing(file) as temporary, temporary.open("wb") as stream:
            for part in chunks(tensor):
                stream.write(part)
    return location


def packed_graph(twin: ir.Model, file: Path) -> memoryview:
    """Return a graph's bytes.

    Raises:
        InputError: They are too many for protobuf.
    """
    graph = ir.to_proto(twin)
    if graph.ByteSize() > PROTOBUF_LIMIT:
        raise InputError(
            f"cannot write {file}", "its weights exceed 2 GiB", "Use --external_weight=1"
        )
    return memoryview(graph.SerializeToString(deterministic=True))


def weight_size(model: ir.Model) -> int:
    """Return the bytes of a graph's constants."""
    return sum(tensor.nbytes for _, tensor in ir.all_tensors(model))
