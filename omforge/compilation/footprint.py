"""How many bytes a lowered graph takes: its constants, which a budget counts, and what it reads."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from omforge import ir
from omforge.bundle import manifest as m
from omforge.ir.dims import evaluate, parse_dim
from omforge.ir.errors import CheckError
from omforge.ir.fronts import Front
from omforge.lowering.legalize import legalize
from omforge.lowering.target import Target
from omforge.quantization.budget import parse_size, size_text
from omforge.recognition.feeds import weight_bytes
from omforge.rewriting.base import Pass
from omforge.rewriting.pipeline import Pipeline


@dataclass(frozen=True)
class Footprint:
    """Lowers a graph to count the bytes of its constants; none of them is read or computed.

    Attributes:
        steps: The passes between quantised weights and the target.
        soc: The target.
        gears: Symbols and the numbers they may have, as `legalize` takes them.
        forms: Operator and form, the same.
        front: What the graphs are for.
        spare: Bytes for what is not known yet, such as the scales of an int8 cache.
    """

    steps: tuple[Pass, ...]
    soc: Target
    gears: Mapping[str, Sequence[int]] = field(default_factory=dict[str, Sequence[int]])
    forms: Mapping[str, str] = field(default_factory=dict[str, str])
    spare: int = 0
    front: Front = "onnx"

    def __call__(self, model: ir.Model) -> int:
        """Return the bytes; the model is changed."""
        Pipeline(self.steps).run(model, ())
        legalize(model, self.soc, self.front, gears=self.gears, forms=self.forms)
        return weight_bytes(model) + self.spare


def spare_bytes(kv_dtype: str, heads: Sequence[int], sizes: Sequence[m.LayerSizes]) -> int:
    """Return what the grids of an int8 cache take at most: float16, up to four for each number.

    Args:
        kv_dtype: Of the cache.
        heads: Query heads by layer, of all attention that reads its cache.
        sizes: Of the cache by layer.
    """
    if kv_dtype == "fp16":
        return 0
    return sum(
        8 * (count + of.kv_heads) * max(of.head_size, of.value_head_size)
        for count, of in zip(heads, sizes, strict=True)
    )


def check_budget(budget: str, graph_bytes: int, name: str) -> None:
    """Refuse a graph whose constants are above the budget.

    Raises:
        CheckError: They are.
    """
    if budget and graph_bytes > parse_size(budget):
        raise CheckError(
            f"the constants of {name} are {size_text(graph_bytes)}",
            f"the budget is {size_text(parse_size(budget))}",
            f"Give --budget {2 * parse_size(budget) - graph_bytes}",
        )


def spec_bytes(spec: m.TensorSpec, seq: int = 1) -> int:
    """Return the bytes of a bucket's input or output; of a graph with gears at that length."""
    sizes = (evaluate(parse_dim(dim), {"seq": seq}) for dim in spec.shape)
    return math.prod(sizes) * np.dtype(spec.dtype).itemsize


def memory_text(made: m.Manifest) -> str:
    """Return one line for a report: what a device holds for one graph, for all of its rows.

    Those are the constants, the cache, and what is given once for a text.
    """
    given = {spec.name for spec in made.fixed}
    counted = {"weights": made.quantization.graph_bytes}
    if made.task != "encode":
        counted[f"cache of {made.context} tokens"] = made.quantization.cache_bytes
    if given:
        inputs = made.buckets[-1].inputs
        counted["given inputs"] = sum(spec_bytes(spec) for spec in inputs if spec.name in given)
    total = sum(counted.values())
    unit, size = ("GiB", 2**30) if total >= 2**30 else ("MiB", 2**20)
    parts = [f"{what} {number / size:.2f} {unit}" for what, number in counted.items()]
    return " + ".join(parts) + (f" = {total / size:.2f} {unit}" if len(parts) > 1 else "")


def budget_text(quantization: m.Quantization) -> str:
    """Return the layers by kind and what the budget holds, for a report; "" without a budget."""
    if not quantization.budget:
        return ""
    counts = ", ".join(f"{number} {kind}" for kind, number in quantization.kinds)
    used = quantization.graph_bytes / quantization.budget
    return (
        f"{counts}; {size_text(quantization.graph_bytes)} of {size_text(quantization.budget)}, "
        f"{used:.1%}"
    )
