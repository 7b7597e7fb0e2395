"""The plan as a stage of a compilation: sizes are chosen, and what has no room is refused.

It stands behind `raise` and ahead of `serve`: before a number is quantised, measured on a
calibration text, or written.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from omforge.compilation.graph_plan import plan_graphs
from omforge.compilation.options import CompileOptions
from omforge.compilation.raising import Raised
from omforge.compilation.stages import STAGES, Stage
from omforge.compilation.work import Work
from omforge.ir.errors import CheckError, InputError
from omforge.lowering.devices import device
from omforge.planning.chosen import plan_lengths
from omforge.planning.lengths import Lengths
from omforge.planning.memory import memory_map
from omforge.planning.plan import plan_subject, require_fit
from omforge.planning.subject import subject_of
from omforge.quantization.budget import parse_size, size_text
from omforge.rewriting.events import record

REST = "rest"
"""The budget that takes what the memory leaves to the weights."""


@dataclass(frozen=True)
class PlanRequest:
    """What a compilation is to plan.

    Attributes:
        memory: What the device has, such as 6GiB; "" for any.
        lengths: Prompts, to choose prefill lengths for; None leaves them as they are.
        graphs: How many graphs there may be.
        budget: As `compile` takes it; `rest` is what the memory leaves to the weights.
    """

    memory: str = ""
    lengths: Lengths | None = None
    graphs: int = 4
    budget: str = ""

    def __post_init__(self) -> None:
        if self.memory:
            parse_size(self.memory)
        if self.budget == REST and not self.memory:
            raise InputError(
                "--budget rest without --memory",
                "it is what the memory leaves when cache and activations have theirs",
                "Say how much there is: --memory 6GiB",
            )

    def stages(self) -> tuple[Stage, ...]:
        """Return the stages of a compilation with this one among them, where there is a plan."""
        if not self.memory and self.lengths is None:
            return STAGES
        at = next(at for at, stage in enumerate(STAGES) if stage.name == "serve")
        return (*STAGES[:at], Stage("plan", Raised, self.run), *STAGES[at:])

    def run(self, raised: Raised, work: Work) -> Raised:
        """Choose lengths, and hold what comes of it against the memory.

        Raises:
            InputError: A length does not fit.
            CheckError: The bundle does not fit, or lengths cannot be weighed.
        """
        work.begin("plan")
        options = raised.options
        if self.lengths is not None:
            subject = subject_of(raised, options)
            found = plan_lengths(subject, options, device(subject.soc), self.lengths, self.graphs)
            options = dataclasses.replace(options, prefill=found.chosen.lengths)
            raised = dataclasses.replace(
                raised, costs={size: found.curve(size) for size in options.prefill}
            )
            record(
                raised.model,
                "plan",
                "the prefill buckets",
                f"{', '.join(map(str, options.prefill))}: for {self.lengths.count} prompts, "
                f"{found.chosen.padding:.1%} padding",
                done=True,
            )
        if self.memory:
            options = self._within(dataclasses.replace(raised, options=options))
        plans = plan_graphs(options, raised.task)
        work.expect(len(plans))
        return dataclasses.replace(raised, options=options, plans=plans)

    def _within(self, raised: Raised) -> CompileOptions:
        """Refuse what is too large; return the options with the budget's number."""
        options, limit = raised.options, parse_size(self.memory)
        subject = subject_of(raised, options)
        held = memory_map(subject.lower(options), subject.fixed)
        if held.total > limit:
            require_fit(plan_subject(subject, memory=limit))
        others = held.total - held.weight_bytes
        if self.budget == REST:
            return dataclasses.replace(options, budget=str(limit - others))
        if options.budget and parse_size(options.budget) + others > limit:
            raise CheckError(
                f"a budget of {size_text(parse_size(options.budget))} does not fit in "
                f"{size_text(limit)}",
                f"all but the weights takes {others:,} bytes, which leaves {limit - others:,}",
                f"Give --budget {limit - others}, or --budget rest, which is that",
            )
        return options
