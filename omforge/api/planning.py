"""What a bundle will take of a device, as `omforge plan` tells it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from omforge.api.results import Result
from omforge.compilation.cpu import require_device
from omforge.compilation.options import CompileOptions, TaskOption
from omforge.compilation.quantize_options import KvDtype
from omforge.compilation.work import Progress
from omforge.ir.floats import FloatName
from omforge.ir.fronts import Front
from omforge.lowering.facts_file import target_with
from omforge.planning import plan as planning
from omforge.planning.chosen import UNIT
from omforge.planning.lengths import read_lengths
from omforge.planning.report import lines
from omforge.quantization.budget import parse_size


@dataclass(frozen=True)
class Planned(Result):
    """What was planned.

    Attributes:
        plan: All of it.
    """

    plan: planning.Plan

    @property
    def total(self) -> int:
        """Bytes that a device holds."""
        return self.plan.memory.total

    @property
    def fits(self) -> bool | None:
        """Whether the device has room; None where nobody says how much it has."""
        return self.plan.fits

    def to_json(self) -> dict[str, Any]:
        """Return all of it as plain data."""
        return self.plan.to_json()

    def __str__(self) -> str:
        return "\n".join(lines(self.plan))


def plan(
    source: str | os.PathLike[str],
    *,
    target: str,
    memory: str = "",
    lengths: str | os.PathLike[str] | None = None,
    graphs: int = 4,
    batch: int = 1,
    context: int | None = None,
    prefill: Sequence[int] = (),
    quantize: str = "",
    kv_dtype: KvDtype = "fp16",
    front: Front | Literal["auto"] = "auto",
    gears: bool = False,
    dtype: FloatName | Literal["auto"] = "auto",
    layout: Literal["auto", "stacked", "per-layer"] = "auto",
    task: TaskOption = "auto",
    encoder_length: int | None = None,
    facts: str | os.PathLike[str] | None = None,
    knobs: bool = True,
    progress: Progress | None = None,
) -> Planned:
    """Plan an export or a bundle: memory, bytes and products of a step, bounds of time.

    Names and defaults are those of the command line's options; `omforge plan --help` says more.

    Args:
        source: An export's folder or .onnx file, or a bundle's folder.
        target: The SoC: the value of atc's --soc_version.
        memory: What the device has, such as `6GiB`; what the target's table says if absent.
        lengths: A file of prompts' lengths, to choose prefill lengths for.
        graphs: How many graphs there may be.
        batch: Rows B of every bucket.
        context: Tokens that a sequence may hold, C.
        prefill: Lengths S of the prefill buckets.
        quantize: How weights are stored.
        kv_dtype: Of the cache.
        front: What atc is given.
        gears: One graph for all buckets.
        dtype: Of the lowered graphs.
        layout: Of the cache.
        task: What the model is for.
        encoder_length: Of the encoder's states that a decoder attends to.
        facts: What `omforge probe` saw.
        knobs: Whether to weigh what else could be chosen.
        progress: Told the step's name, steps done and steps in all.

    Raises:
        InputError: There is nothing to plan, or an option is wrong.
        CheckError: The export cannot be compiled, or lengths cannot be weighed.
    """
    room = parse_size(memory) if memory else None
    prompts = None if lengths is None else read_lengths(lengths)
    if prompts is not None and prompts.steps and context is None:
        context = -(-prompts.longest // UNIT) * UNIT
    soc = target_with(target, facts)
    require_device(soc, "a plan")
    known = soc.facts
    options = CompileOptions(
        soc=target,
        task=task,
        context=context,
        prefill=tuple(prefill),
        batch=batch,
        dtype="fp16" if dtype == "auto" else dtype,
        layout=layout,
        gears=gears,
        front=known.front if front == "auto" else front,
        quantize=quantize,
        kv_dtype=kv_dtype,
        encoder_length=encoder_length,
        facts=known,
    )
    made = planning.make_plan(
        Path(os.fspath(source)),
        options,
        memory=room,
        lengths=prompts,
        graphs=graphs,
        knobs=knobs,
        progress=progress,
    )
    return Planned(made)
