"""What a step of a lowered graph takes: bytes, products, and how soon it can be done.

Two times are told. `bound` is one that no kernel and no schedule can be below: the weights and the
cache are read once, or the products are computed, whichever takes longer. `modelled` goes kernel by
kernel, each reading its inputs and writing its outputs; sizes are compared by it. Neither is a
forecast, and a model whose weights stay in the chip's own L2 may be ahead of both.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from omforge.compilation.buckets import LoweredGraph
from omforge.compilation.footprint import spec_bytes
from omforge.lowering.devices import Device
from omforge.lowering.legalize.products import Products, products
from omforge.lowering.legalize.traffic import Traffic, bytes_moved
from omforge.recognition.step_names import is_cache


@dataclass(frozen=True)
class Step:
    """One run of a graph.

    Attributes:
        name: Of the graph.
        batch: Rows B.
        seq: Tokens S of each row.
        moved: Bytes that its kernels read and write.
        products: What its cubes compute.
        bound: Seconds that it takes at least; None where the bandwidth is not known.
        modelled: Seconds by the sum of its kernels; None where the bandwidth is not known.
    """

    name: str
    batch: int
    seq: int
    moved: Traffic
    products: Products
    bound: float | None
    modelled: float | None

    def to_json(self) -> dict[str, Any]:
        """Return it as plain data."""
        return {
            "name": self.name,
            "batch": self.batch,
            "seq": self.seq,
            "bytes": {
                "weights": self.moved.weights,
                "cache": self.moved.cache,
                "read": self.moved.read,
                "written": self.moved.written,
                "total": self.moved.total,
            },
            "operations": {"float": self.products.floats, "int8": self.products.int8},
            "kernels": self.moved.kernels,
            "least_seconds": self.bound,
            "modelled_seconds": self.modelled,
        }


def count_step(graph: LoweredGraph, device: Device, seq: int | None = None) -> Step:
    """Count what a graph takes.

    Args:
        graph: Lowered.
        device: What runs it.
        seq: The gear, of a graph that has some.
    """
    bucket = graph.bucket
    length = bucket.seq if seq is None else seq
    gear = {"seq": length} if bucket.gears else {}
    moved, count = Traffic(), Products()
    modelled: float | None = device.launch
    for node in graph.model.graph:
        of_node, computed = bytes_moved((node,), gear), products((node,), gear)
        moved += of_node
        count += computed
        seconds = device.seconds(of_node, computed)
        modelled = None if seconds is None or modelled is None else modelled + seconds
    # A stacked cache is read by the Split that takes it apart, and again by what reads the parts.
    held = sum(spec_bytes(spec, length) for spec in bucket.inputs if is_cache(spec.name))
    least = Traffic(weights=moved.weights, cache=min(moved.cache, held))
    return Step(
        bucket.name, bucket.batch, length, moved, count, device.seconds(least, count), modelled
    )
