"""The CPU twin of a bucket: what its lowered graph computes, on ONNX Runtime."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path

from omforge import ir
from omforge.air.files import read_air
from omforge.air.reference import reference
from omforge.bundle.manifest import Bucket, TensorSpec
from omforge.runtime.bundle import Bundle
from omforge.runtime.session import Array, OrtSession, Session
from omforge.runtime.unrounded import without_rounding

Change = Callable[[ir.Model], ir.Model]
"""What is made of the graph that ONNX Runtime gets; it may be changed, and is returned."""

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
        names = [spec.name for spec in bucket.outputs]
        twin = reference(read_air(file), names, rounding=rounding)
        model = ir.from_proto(twin.model)
        for _, tensor in ir.all_tensors(model):
            if isinstance(tensor, ir.ExternalTensor):
                tensor.base_dir = os.path.abspath(file.parent)
        model = model if change is None else change(model)
        self._session = OrtSession(model, name=str(file))
        self._written = {
            output: name.replace(_PAST, _PRESENT, 1) for name, output in twin.written.items()
        }
        dims = {spec.name: spec for spec in (*bucket.inputs, *bucket.outputs)}
        self._inputs = tuple(_named(spec, dims) for spec in self._session.inputs)
        found = [spec for spec in self._session.outputs if spec.name not in self._written]
        self._outputs = tuple(_named(spec, dims) for spec in found)

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
        results = self._session.run(feeds)
        return {self._written.get(name, name): array for name, array in results.items()}

    def close(self) -> None:
        """Free the session."""
        self._session.close()


def _named(spec: TensorSpec, told: Mapping[str, TensorSpec]) -> TensorSpec:
    """Open dims have names in the manifest, and none in a GE graph: numbers are compared."""
    other = told.get(spec.name)
    if other is None or other.dtype != spec.dtype or len(other.shape) != len(spec.shape):
        return spec
    pairs = zip(spec.shape, other.shape, strict=True)
    same = all(a == b for a, b in pairs if isinstance(a, int))
    return other if same else spec
