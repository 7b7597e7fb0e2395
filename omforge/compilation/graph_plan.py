"""Which graphs a bundle gets: their names and lengths S, and the sizes that all of them share."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from omforge import ir
from omforge.bundle import manifest as m
from omforge.compilation.context import choose_context, choose_prefill
from omforge.compilation.options import CompileOptions
from omforge.lowering.legalize.choices import choices
from omforge.passes.bind_shapes import BindShapes
from omforge.recognition.lengths.bounds import Bound


@dataclass(frozen=True)
class GraphPlan:
    """A graph to lower.

    Attributes:
        kind: What the manifest says that it is.
        name: Without the sizes that all graphs of a bundle share.
        seq: Its length S; of a graph with gears the largest.
        gears: The lengths that the graph, whose `seq` is open, can be run at; () where S is bound.
    """

    kind: Literal["prefill", "decode", "gears", "encode", "open"]
    name: str
    seq: int
    gears: tuple[int, ...] = ()

    @property
    def symbols(self) -> dict[str, tuple[int, ...]]:
        """Symbols that gears bind, and the numbers they may have, as `legalize` takes them."""
        return {"seq": self.gears} if self.gears else {}

    def bind(self, options: CompileOptions) -> BindShapes:
        """Return what puts numbers in place of symbols; S stays open where gears set it."""
        return BindShapes(options.batch, 0 if self.gears else self.seq, options.context or 0)

    def full_name(self, options: CompileOptions) -> str:
        """Return the bucket's name: `decode_c2048`, `prefill_s128_c2048_b2`, `encode_s128`."""
        batch = f"_b{options.batch}" if options.batch > 1 else ""
        capacity = "" if self.kind == "encode" else f"_c{options.context}"
        return f"{self.name}{capacity}{batch}"


def plan_graphs(options: CompileOptions, task: m.Task = "generate") -> tuple[GraphPlan, ...]:
    """Return the graphs of a bundle, the smallest or the one that all steps share last.

    Args:
        options: With `context` and `prefill` chosen.
        task: What the model is for.

    Raises:
        InputError: The CPU has no graphs for it.
    """
    lengths = options.prefill
    if options.front == "ort":
        if task == "encode":
            raise ir.InputError(
                "a model without a cache for --target cpu",
                "the graphs for the CPU are those of models that generate",
                "Compile for an Ascend SoC, and run it with --level canonical",
            )
        return (GraphPlan("open", "open", options.context or 0),)
    if task == "encode":
        if options.gears and len(lengths) > 1:
            return (GraphPlan("encode", "encode_gears", max(lengths), lengths),)
        return tuple(GraphPlan("encode", f"encode_s{length}", length) for length in lengths)
    if options.gears:
        return (GraphPlan("gears", "gears", max(lengths), (1, *lengths)),)
    prefill = [GraphPlan("prefill", f"prefill_s{length}", length) for length in lengths]
    return (*prefill, GraphPlan("decode", "decode", 1))


def with_sizes(
    options: CompileOptions, bounds: Sequence[Bound], call: Bound | None = None
) -> CompileOptions:
    """Return the options with context, prefill lengths and layout chosen, for a model with a cache.

    Args:
        options: As they were given.
        bounds: What bounds a text.
        call: The most new tokens that the export takes at once, if there is such a limit.

    Raises:
        InputError: What was given is beyond a bound, or makes no sense.
    """
    context = choose_context(options.context, bounds)
    prefill = choose_prefill(options.prefill, context, call)
    if options.batch < 1:
        raise ir.InputError(f"a batch of {options.batch} makes no sense", "it must be 1 or more")
    layout = options.layout
    if layout == "auto" and cheapest_layout() == "per-layer":
        layout = "per-layer"  # else fuse-kv-io stacks the layers' caches if they are alike
    return dataclasses.replace(options, context=context, prefill=prefill, layout=layout)


def cheapest_layout() -> Literal["stacked", "per-layer"]:
    """The layout that the table of choices prefers."""
    return "stacked" if choices("cache")[0].form == "stacked" else "per-layer"
