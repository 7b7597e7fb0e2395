"""The memory map: what each part of a bundle takes of a device, in bytes.

Weights and cache are those of the graphs as they are lowered, to the byte. Weights are counted once
for all graphs, as the runtime loads them where pyACL lets it, and so is the room for activations,
which is as large as the largest graph needs: all graphs run in one stream.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from omforge import ir
from omforge.bundle import manifest as m
from omforge.compilation.buckets import LoweredGraph
from omforge.compilation.footprint import spec_bytes
from omforge.lowering.legalize.quantized import OP
from omforge.lowering.target import dtype_name
from omforge.planning.activations import peak_bytes
from omforge.recognition.cache.states import PAST_STATE, renewed
from omforge.recognition.step_names import is_cache


@dataclass(frozen=True)
class CacheLayer:
    """One tensor of the cache, a layer's keys or values, or all layers' where they are stacked."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int


@dataclass(frozen=True)
class MemoryMap:
    """What a device holds for a bundle, in bytes.

    Attributes:
        weights: Of one graph, by dtype; eight int4 that atc takes as an int32 are int4.
        own: Constants that a graph alone has, of all but the one whose weights these are.
        cache: By tensor.
        states: Recurrent states, twice: what a step reads, and what it renews.
        given: Inputs that are given once for a text.
        activations: What is alive at once, by graph and by gear: `decode_c2048`, `gears_c2048@128`.
        io: Inputs and outputs of each step, by graph.
        graphs: How many there are.
        gears: Lengths that one graph runs at.
    """

    weights: Mapping[str, int]
    own: int
    cache: tuple[CacheLayer, ...]
    states: int
    given: int
    activations: Mapping[str, int]
    io: Mapping[str, int]
    graphs: int
    gears: tuple[int, ...] = ()

    @property
    def weight_bytes(self) -> int:
        """Of one graph."""
        return sum(self.weights.values())

    @property
    def cache_bytes(self) -> int:
        """Of all layers and rows."""
        return sum(layer.nbytes for layer in self.cache)

    @property
    def workspace(self) -> int:
        """Of the graph and gear whose activations need the most room."""
        return max(self.activations.values(), default=0)

    @property
    def io_bytes(self) -> int:
        """Of all graphs: each has buffers of its own."""
        return sum(self.io.values())

    @property
    def parts(self) -> dict[str, int]:
        """Bytes by part; they add up to the total."""
        found = {
            "weights": self.weight_bytes,
            "constants of single graphs": self.own,
            "cache": self.cache_bytes,
            "states": self.states,
            "given inputs": self.given,
            "activations": self.workspace,
            "inputs and outputs": self.io_bytes,
        }
        return {part: count for part, count in found.items() if count or part == "weights"}

    @property
    def total(self) -> int:
        """All of it."""
        return sum(self.parts.values())

    @property
    def unshared(self) -> int:
        """What comes on top where each graph loads weights of its own."""
        return (self.graphs - 1) * self.weight_bytes

    def to_json(self) -> dict[str, Any]:
        """Return it as plain data."""
        return {
            "total": self.total,
            "parts": self.parts,
            "weights": dict(self.weights),
            "cache": [
                {"name": x.name, "dtype": x.dtype, "shape": list(x.shape), "bytes": x.nbytes}
                for x in self.cache
            ],
            "activations": dict(self.activations),
            "inputs_and_outputs": dict(self.io),
            "graphs": self.graphs,
            "gears": list(self.gears),
            "weights_of_further_graphs": self.unshared,
        }


def memory_map(graphs: Sequence[LoweredGraph], fixed: Sequence[str] = ()) -> MemoryMap:
    """Measure lowered graphs; nothing of their weights is read.

    Args:
        graphs: Of one bundle, that whose weights are told last, as a manifest has it.
        fixed: Names of the inputs that are given once for a text.
    """
    last = graphs[-1]
    held = {_key(name, tensor) for name, tensor in ir.all_tensors(last.model)}
    own = sum(
        tensor.nbytes
        for graph in graphs[:-1]
        for name, tensor in ir.all_tensors(graph.model)
        if _key(name, tensor) not in held
    )
    weights: dict[str, int] = {}
    packed = set(_packed(last.model))
    for name, tensor in ir.all_tensors(last.model):
        kind = "int4" if name in packed else dtype_name(tensor.dtype)
        weights[kind] = weights.get(kind, 0) + tensor.nbytes
    bucket = last.bucket
    states = [spec for spec in bucket.inputs if spec.name.startswith(f"{PAST_STATE}.")]
    apart = {*fixed, *(s.name for s in states), *(renewed(s.name) for s in states)}
    return MemoryMap(
        weights=dict(sorted(weights.items(), key=lambda item: -item[1])),
        own=own,
        cache=tuple(_cache(bucket)),
        states=2 * sum(spec_bytes(spec, bucket.seq) for spec in states),
        given=sum(spec_bytes(s, bucket.seq) for s in bucket.inputs if s.name in fixed),
        activations=dict(_activations(graphs)),
        io={graph.bucket.name: _io(graph.bucket, apart) for graph in graphs},
        graphs=len(graphs),
        gears=bucket.gears,
    )


def _packed(model: ir.Model) -> Iterator[str]:
    """The names of weights that are int4, eight in an int32."""
    for node in model.graph:
        value = node.inputs[1] if node.op_type == OP else None
        if value is None or value.dtype != ir.DataType.INT32:
            continue
        while (producer := value.producer()) is not None and producer.inputs[0] is not None:
            value = producer.inputs[0]  # it is turned on its way
        yield str(value.name)


def _key(name: str, tensor: ir.TensorProtocol) -> tuple[object, ...]:
    # What graphs share they share under one name; small ones are made anew for each.
    return name, tensor.dtype, tuple(tensor.shape), tensor.nbytes


def _cache(bucket: m.Bucket) -> Iterator[CacheLayer]:
    for spec in bucket.inputs:
        if is_cache(spec.name):
            shape = tuple(dim for dim in spec.shape if isinstance(dim, int))
            yield CacheLayer(spec.name, spec.dtype, shape, spec_bytes(spec, bucket.seq))


def _activations(graphs: Sequence[LoweredGraph]) -> Iterator[tuple[str, int]]:
    for graph in graphs:
        name = graph.bucket.name
        for seq in graph.bucket.gears:
            yield f"{name}@{seq}", peak_bytes(graph.model.graph, {"seq": seq})
        if not graph.bucket.gears:
            yield name, peak_bytes(graph.model.graph)


def _io(bucket: m.Bucket, apart: set[str]) -> int:
    specs = [*bucket.inputs, *bucket.outputs]
    return sum(
        spec_bytes(spec, bucket.seq)
        for spec in specs
        if spec.name not in apart and not is_cache(spec.name)
    )
