"""From an export to a bundle: all stages in order, and what a report shows of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from omforge.bundle import manifest as m
from omforge.bundle.source import Source
from omforge.compilation.options import CompileOptions
from omforge.compilation.request import Request
from omforge.compilation.stages import STAGES, Built, Stage, run_stages
from omforge.compilation.work import Progress
from omforge.quantization.report import BudgetPlan, budget_plan
from omforge.recognition.coverage import Coverage
from omforge.recognition.lengths.bounds import Bound
from omforge.rewriting.events import Event
from omforge.rewriting.instruments import Instrument
from omforge.rewriting.pass_run import PassRun


@dataclass
class CompileResult:
    """What was made, and what a report shows of it."""

    folder: Path
    manifest: m.Manifest
    coverage: Coverage
    passes: list[PassRun] = field(default_factory=list[PassRun])
    nodes: dict[str, int] = field(default_factory=dict[str, int])
    """Nodes by graph: exported, raised, canonical, and each bucket."""
    events: tuple[Event, ...] = ()
    budget: BudgetPlan | None = None
    bounds: tuple[Bound, ...] = ()
    """What bounds a text, of which the first is the tightest."""
    nonfinite: Mapping[str, str] = field(default_factory=dict[str, str])
    """Weights that hold NaN or infinity, which they should not."""


def compile_bundle(
    source: str | Path | Source,
    output: str | Path,
    options: CompileOptions,
    *,
    stages: Sequence[Stage] = STAGES,
    instruments: Sequence[Instrument] | None = None,
    progress: Progress | None = None,
) -> CompileResult:
    """Compile an export for one SoC into a bundle folder, whole or not at all.

    Where atc is installed it is run on every bucket, once the bundle is complete.

    Args:
        source: The export's folder or .onnx file.
        output: The bundle's folder; one that is there is replaced when the new one is complete.
        options: What to make.
        stages: What is run, as `run_stages` takes it.
        instruments: What watches the passes; the verifier alone if None.
        progress: Told the step's name, steps done and steps in all.

    Raises:
        InputError: The source, the target or an option is wrong.
        CheckError: Coverage is not complete, a lowered graph has illegal nodes, or atc refuses one.
    """
    request = Request(source, output, options)
    built = run_stages(request, stages=stages, instruments=instruments, progress=progress)
    assert isinstance(built, Built)
    return result_of(built)


def result_of(built: Built) -> CompileResult:
    """Return what a report shows of the last stage's value."""
    written = built.written
    lowered = written.lowered
    raised = lowered.canonical.raised
    return CompileResult(
        folder=written.folder,
        manifest=built.manifest,
        coverage=raised.coverage,
        passes=list(lowered.trail.passes),
        nodes=dict(lowered.trail.nodes),
        events=written.events,
        budget=budget_plan(lowered.canonical.model),
        bounds=raised.bounds,
        nonfinite=written.nonfinite,
    )
