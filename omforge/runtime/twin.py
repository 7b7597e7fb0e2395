"""The CPU twin of a bucket: what its lowered graph computes, on ONNX Runtime."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path

import onnx

from omforge import ir
from omforge.air.files import read_air
from omforge.air.reference import Reference, reference
from omforge.bundle.manifest import Bucket, TensorSpec
from omforge.runtime.bundle import Bundle
from omforge.runtime.cpu_session import CpuSession
from omforge.runtime.session import Array, OrtSession, Session, check_feeds
from omforge.runtime.unrounded import without_rounding

Change = Callable[[ir.Model], ir.Model]
"""What is made of the graph that ONNX Runtime gets; it may be changed, and is returned."""

_DTYPES = {"float": "float32", "double": "float64"}
_PAST, _PRESENT = "past_key_values", "present"


def open_twin(
    bundle: Bundle, bucket: Bucket, *, rounding: bool = True, change: Change | None = None
) -> Session:
    """Open a bucket's graph, whatever front it was made for.

    Args:
        bundle: The bundle.
        bucket: One of its buckets.
        rounding: Whether what is quantised is rounded to int8 (see `unrounded`).
        change: What to make of the graph before it is opened.

    Raises:
        InputError: The graph cannot be read, or ONNX Runtime refuses it.
    """
    file = bundle.graph(bucket)
    if bundle.manifest.front == "ort":
        return CpuSession(bundle, bucket, change=change)
    if bundle.manifest.front == "air":
        return AirSession(file, bucket, rounding=rounding, change=change)
    if rounding and change is None:
        return OrtSession(file, lowered=True)
    model = ir.load(file)
    model = model if rounding else without_rounding(model)
    model = model if change is None else change(model)
    return OrtSession(model, lowered=True, name=str(file))


class AirSession:
    """A GE graph on ONNX Runtime.

    What it writes in place is among what `run` returns, as `present.{l}.key` for the input
    `past_key_values.{l}.key`, and not among its outputs: on a device it stays where it is.

    Args:
        file: The .air, its weights beside it.
        bucket: What the manifest says of it; its outputs have the manifest's names.
        rounding: Whether what is quantised is rounded to int8; else an int8 cache is float32.
        change: What to make of the graph before it is opened.

    Raises:
        InputError: The file cannot be read, or an operator has no reference on the CPU.
    """

    def __init__(
        self,
        file: Path,
        bucket: Bucket,
        *,
        rounding: bool = True,
        change: Change | None = None,
    ) -> None:
        self._file = file
        self._air = read_air(file)
        self._names = [spec.name for spec in bucket.outputs]
        self._rounding = rounding
        self._change = change
        self._gears = bool(bucket.gears)
        self._sessions: dict[tuple[tuple[int, ...], ...], OrtSession] = {}
        twin = reference(self._air, self._names, rounding=rounding)
        self._written = {
            output: name.replace(_PAST, _PRESENT, 1) for name, output in twin.written.items()
        }
        dims = {spec.name: spec for spec in (*bucket.inputs, *bucket.outputs)}
        graph = twin.model.graph
        self._inputs = tuple(_named(_spec(info), dims) for info in graph.input)
        found = (_spec(info) for info in graph.output if info.name not in self._written)
        self._outputs = tuple(_named(spec, dims) for spec in found)
        if not self._gears:
            self._sessions[()] = self._opened(twin)

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        """The graph's inputs, in order."""
        return self._inputs

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        """The graph's outputs, in order, without what it writes in place."""
        return self._outputs

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """Run once; outputs by name, and what was written in place.

        Raises:
            InputError: A feed is missing or unknown, or its dtype or shape is not the graph's.
            OmforgeError: ONNX Runtime failed.
        """
        results = self._at(feeds).run(feeds)
        return {self._written.get(name, name): array for name, array in results.items()}

    def close(self) -> None:
        """Free the sessions."""
        for session in self._sessions.values():
            session.close()
        self._sessions.clear()

    def _at(self, feeds: Mapping[str, Array]) -> OrtSession:
        """The session of these shapes: of each gear one, as a device has it."""
        if not self._gears:
            return self._sessions[()]
        check_feeds(str(self._file), self._inputs, feeds)
        shapes = {spec.name: feeds[spec.name].shape for spec in self._inputs}
        key = tuple(shapes.values())
        if key not in self._sessions:
            twin = reference(self._air, self._names, shapes, rounding=self._rounding)
            self._sessions[key] = self._opened(twin)
        return self._sessions[key]

    def _opened(self, twin: Reference) -> OrtSession:
        model = ir.from_proto(twin.model)
        for _, tensor in ir.all_tensors(model):
            if isinstance(tensor, ir.ExternalTensor):
                tensor.base_dir = os.path.abspath(self._file.parent)
        model = model if self._change is None else self._change(model)
        return OrtSession(model, name=str(self._file))


def _spec(info: onnx.ValueInfoProto) -> TensorSpec:
    tensor = info.type.tensor_type
    dims = (dim.dim_value or dim.dim_param for dim in tensor.shape.dim)
    dtype = ir.DataType(tensor.elem_type).name.lower()
    return TensorSpec(info.name, _DTYPES.get(dtype, dtype), tuple(dims))


def _named(spec: TensorSpec, told: Mapping[str, TensorSpec]) -> TensorSpec:
    """Open dims have names in the manifest, and none in a GE graph: numbers are compared."""
    other = told.get(spec.name)
    if other is None or other.dtype != spec.dtype or len(other.shape) != len(spec.shape):
        return spec
    pairs = zip(spec.shape, other.shape, strict=True)
    same = all(a == b for a, b in pairs if isinstance(a, int))
    return other if same else spec
