"""A plan: what a bundle takes of a device's memory and time, and what to choose so that it fits."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omforge import ir
from omforge.compilation.options import CompileOptions
from omforge.compilation.work import Progress
from omforge.lowering.devices import Device, device
from omforge.planning.chosen import LengthPlan, plan_lengths
from omforge.planning.knobs import Knob, fitting, weigh
from omforge.planning.lengths import Lengths
from omforge.planning.memory import MemoryMap, memory_map
from omforge.planning.steps import Step, count_step
from omforge.planning.subject import Subject, open_subject
from omforge.quantization.budget import size_text


@dataclass(frozen=True)
class Plan:
    """What was planned.

    Attributes:
        options: For what, with every size chosen.
        device: What is known of the target.
        memory: What it holds.
        limit: Bytes that it has; None where nobody says.
        limited_by: Who says so: `--memory`, or the target's own memory.
        knobs: What each other choice saves; none where they were not asked for.
        together: Choices that make it fit together, where none does by itself.
        steps: One of each graph, the last a decode step unless the model encodes.
        lengths: Prefill lengths for prompts, where some were given.
    """

    options: CompileOptions
    device: Device
    memory: MemoryMap
    limit: int | None
    limited_by: str
    knobs: tuple[Knob, ...]
    together: Knob | None
    steps: tuple[Step, ...]
    lengths: LengthPlan | None = None

    @property
    def fits(self) -> bool | None:
        """Whether the device has room for all of it; None where nobody says how much there is."""
        return None if self.limit is None else self.memory.total <= self.limit

    @property
    def first_token(self) -> float | None:
        """Seconds at least to the first token of a prompt that fills the longest prefill graph."""
        return max(self.steps, key=lambda step: step.seq).bound

    @property
    def tokens_a_second(self) -> float | None:
        """Of all rows together, at most; None of a model that encodes."""
        step = self.steps[-1]
        return step.batch / step.bound if step.bound and step.seq == 1 else None

    def to_json(self) -> dict[str, Any]:
        """Return it as plain data."""
        options = self.options
        return {
            "target": options.soc,
            "front": options.front,
            "dtype": options.dtype,
            "quantize": options.quantize,
            "kv_dtype": options.kv_dtype,
            "context": options.context,
            "prefill": list(options.prefill),
            "batch": options.batch,
            "gears": options.gears,
            "memory": self.memory.to_json(),
            "limit": self.limit,
            "fits": self.fits,
            "knobs": [knob.to_json() for knob in self.knobs],
            "together": None if self.together is None else self.together.to_json(),
            "steps": [step.to_json() for step in self.steps],
            "device": dataclasses.asdict(self.device),
            "first_token_seconds_at_least": self.first_token,
            "tokens_a_second_at_most": self.tokens_a_second,
            "lengths": None if self.lengths is None else self.lengths.to_json(),
        }


def make_plan(
    path: str | Path,
    options: CompileOptions,
    *,
    memory: int | None = None,
    lengths: Lengths | None = None,
    graphs: int = 4,
    knobs: bool = True,
    progress: Progress | None = None,
) -> Plan:
    """Plan an export or a bundle.

    Args:
        path: A bundle's folder, or an export's folder or .onnx file.
        options: As `open_subject` takes them.
        memory: Bytes that the device has; what the target's table says if None.
        lengths: Prompts, to choose prefill lengths for.
        graphs: How many graphs there may be.
        knobs: Whether to weigh other choices, too.
        progress: Told the step's name, steps done and steps in all.

    Raises:
        InputError: There is nothing to plan at the path, or an option does not fit it.
        CheckError: The export cannot be compiled, or lengths cannot be weighed.
    """
    subject = open_subject(path, options, progress=progress)
    return plan_subject(subject, memory=memory, lengths=lengths, graphs=graphs, knobs=knobs)


def plan_subject(
    subject: Subject,
    *,
    memory: int | None = None,
    lengths: Lengths | None = None,
    graphs: int = 4,
    knobs: bool = True,
) -> Plan:
    """Plan what was opened already; see `make_plan`."""
    options, known = subject.options, device(subject.soc)
    chosen = None
    if lengths is not None:
        chosen = plan_lengths(subject, options, known, lengths, graphs)
        options = dataclasses.replace(options, prefill=chosen.chosen.lengths)
    lowered = subject.lower(options)
    held = memory_map(lowered, subject.fixed)
    limit, by = memory, "--memory"
    if limit is None and subject.soc.memory_gib is not None:
        limit, by = subject.soc.memory_gib << 30, f"the memory of {subject.soc.soc_version}"
    # Of gears the first is a decode step, which is told last.
    steps = [
        count_step(graph, known, seq)
        for graph in lowered
        for seq in reversed(graph.bucket.gears or (graph.bucket.seq,))
    ]
    weighed = weigh(subject, options, held) if knobs else ()
    together = None
    alone = any(knob.total is not None and limit and knob.total <= limit for knob in weighed)
    if limit is not None and held.total > limit and not alone:
        together = fitting(subject, options, held, weighed, limit)
    return Plan(options, known, held, limit, by, weighed, together, tuple(steps), chosen)


def require_fit(plan: Plan) -> None:
    """Refuse what the device has no room for, with the sum and with what would help.

    Raises:
        CheckError: It does not fit.
    """
    if plan.limit is None or plan.memory.total <= plan.limit:
        return
    parts = " + ".join(f"{part} {count:,}" for part, count in plan.memory.parts.items())
    raise ir.CheckError(
        f"the bundle does not fit in {size_text(plan.limit)}",
        f"{parts} = {plan.memory.total:,} bytes, {plan.memory.total - plan.limit:,} too many",
        " ".join(advice(plan)) or "No choice makes it fit: take a smaller model or more memory",
    )


def advice(plan: Plan) -> Iterator[str]:
    """Say which choices make it fit, each as it is written."""
    limit = plan.limit or 0
    alone = [knob for knob in plan.knobs if knob.total is not None and knob.total <= limit]
    told = ", or ".join(f"{knob.flags} ({size_text(knob.total or 0)})" for knob in alone)
    if told:
        yield f"It fits with {told}"
    elif plan.together is not None:
        yield f"It fits with {plan.together.flags} ({size_text(plan.together.total or 0)})"
