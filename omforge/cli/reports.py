"""What commands have to tell: results as tables for people, and as plain data for `--json`."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from omforge.atc.command import find_atc
from omforge.bundle.manifest import Manifest
from omforge.cli.console import show, show_table
from omforge.compilation.compile import CompileResult
from omforge.compilation.footprint import budget_text, memory_text
from omforge.compilation.quantize_options import quantization_text
from omforge.compilation.task import task_text
from omforge.compilation.writing import SCRIPT
from omforge.recognition.coverage import Coverage
from omforge.rewriting.events import Event, grouped
from omforge.rewriting.pass_run import PassRun
from omforge.runtime.fixed import required

# --- passes ---------------------------------------------------------------------------------------


def show_passes(runs: Sequence[PassRun], *, compared: bool) -> None:
    """Show what each pass did; with `compared`, also by how much it moved the numbers."""
    columns = ["pass", ">rewrites", ">nodes", ">seconds"]
    columns += [">max abs diff"] if compared else []
    rows: list[list[object]] = []
    for run in runs:
        row: list[object] = [
            run.step,
            "skipped" if run.skipped else run.rewrites,
            f"{run.nodes_before} -> {run.nodes_after}",
            f"{run.seconds:.2f}",
        ]
        rows.append([*row, _moved(run)] if compared else row)
    show_table(columns, rows)


def _moved(run: PassRun) -> str:
    if run.max_abs_diff is not None:
        return small(run.max_abs_diff)
    if run.changed and run.step.changes_interface:
        return "new interface"
    return run.note or "-"


def small(number: float) -> str:
    """A difference, in as few letters as tell its size."""
    return "0" if number == 0 else f"{number:.1e}"


def show_events(events: Iterable[Event]) -> None:
    """Show what passes left alone, and why; --verbose has every place of it."""
    for line in grouped(events):
        show(line)


def passes_json(
    runs: Sequence[PassRun], events: Sequence[Event], remark: str = ""
) -> dict[str, Any]:
    """Return what `show_passes` and `show_events` show."""
    return {
        "passes": [
            {
                "index": run.index,
                "pass": str(run.step),
                "rewrites": run.rewrites,
                "nodes_before": run.nodes_before,
                "nodes_after": run.nodes_after,
                "seconds": round(run.seconds, 6),
                "skipped": run.skipped,
                "max_abs_diff": run.max_abs_diff,
                "note": run.note,
            }
            for run in runs
        ],
        "events": [dataclasses.asdict(event) for event in events],
        "remark": remark,
    }


# --- compile --------------------------------------------------------------------------------------


def show_compiled(result: CompileResult, source: Path, output: Path, remark: str) -> None:
    """Show what was made, what was found, and what comes next."""
    made = result.manifest
    compared = any(run.max_abs_diff is not None for run in result.passes)
    show_passes(result.passes, compared=compared)
    if remark:
        show(remark)
    show()
    buckets = [bucket.name for bucket in made.buckets]
    stages = [f"{name} {n}" for name, n in result.nodes.items() if name not in buckets]
    lowered = [f"{name} {result.nodes[name]}" for name in buckets]
    show(f"nodes      {' -> '.join(stages)} -> {', '.join(lowered)}")
    show_coverage(result.coverage, result.events)
    if made.front != "ort":
        nodes = ", ".join(f"0 illegal of {result.nodes[name]} nodes in {name}" for name in buckets)
        show(f"legality   {made.target}: {nodes}")
    show(f"task       {task_text(made)}")
    cache = "no" if made.task == "encode" else made.kv.layout
    place = ", which the graphs write in place" if made.kv.in_place else ""
    show(
        f"bundle     {output}: {made.dtype}, context {made.context}, batch {made.batch}, "
        f"{cache} cache{place}"
    )
    if why := _bounded_by(result):
        show(f"context    {made.context} tokens: {why}")
    if made.quantization.weights or made.quantization.kv:
        show(f"quantised  {quantization_text(made)}")
    show(f"memory     {memory_text(made)}")
    show_nonfinite(result.nonfinite)
    show_budget(result)
    if made.front != "ort":
        show(f"atc        {_atc_hint(result, output)}")
    show(f"next       {next_commands(made, output)}")


def next_commands(made: Manifest, output: Path) -> str:
    """What to do with a bundle, as it is typed."""
    folder = shlex.quote(str(output))
    if made.embeddings is not None:  # no text can go in
        return f"omforge verify {folder}"
    give = " --give FILE.npz" if required(made.fixed) else ""
    return f'omforge verify {folder}; omforge run {folder} --prompt "..."{give}'


def show_nonfinite(found: Mapping[str, str]) -> None:
    """Show which weights hold what is no number: NaN there is NaN in every logit, or many."""
    for name, what in list(found.items())[:_WORST]:
        show(f"warning    the weight {name} holds {what}, as in the export: verify cannot tell")
    if len(found) > _WORST:
        show(f"warning    so do {len(found) - _WORST} other weights")


def _bounded_by(result: CompileResult) -> str:
    """Why the context cannot be longer; "" where that was the caller's choice, or the default."""
    context = result.manifest.context
    return next((bound.why for bound in result.bounds if bound.tokens == context), "")


def show_budget(result: CompileResult) -> None:
    """Show how the layers share a budget, and the layers that bear the fewest bits worst."""
    plan = result.budget
    if plan is None:
        return
    show(f"budget     {budget_text(result.manifest.quantization)}")
    unit = "nats a token" if plan.measure == "divergence" else "of the weights, as there is no text"
    show(f"           expected cost {plan.cost:.3g} {unit}; the least possible is {plan.bound:.3g}")
    kinds = list(plan.counts)
    rows = [
        (layer.place, layer.chosen, *(small(x.cost) for x in layer.candidates))
        for layer in plan.most_sensitive[:_WORST]
    ]
    show_table(("most sensitive", "chosen", *(f">as {kind}" for kind in kinds)), rows)


def show_coverage(coverage: Coverage, events: Sequence[Event]) -> None:
    """Show the blocks that were raised, of how many, and why others were not, one line a reason."""
    kinds = [f"{name} {kind.found} of {kind.expected}" for name, kind in coverage.kinds.items()]
    show(f"coverage   {', '.join(kinds)}")
    told: set[str] = set()
    for name, kind in coverage.kinds.items():
        told.update(kind.missed)
        for why in kind.reasons:
            show(f"  missed   {name}: {why}")
    for loss in coverage.lost:
        show(f"  lost     {loss}")
    for line in grouped(event for event in events if str(event) not in told):
        show(f"  event    {line}")


def _atc_hint(result: CompileResult, output: Path) -> str:
    made = [bucket.om for bucket in result.manifest.buckets if bucket.om is not None]
    if made:
        return f"made {', '.join(made)}"
    script = output / SCRIPT
    if find_atc() is None:
        return f"not on this machine; run {script} where CANN is installed"
    return f"run {script}"


def compiled_json(result: CompileResult, remark: str) -> dict[str, Any]:
    """Return what `show_compiled` shows."""
    made = result.manifest
    return {
        "bundle": str(result.folder),
        "task": made.task,
        "target": made.target,
        "dtype": made.dtype,
        "context": made.context,
        "bounds": [dataclasses.asdict(bound) for bound in result.bounds],
        "batch": made.batch,
        "layout": made.kv.layout,
        "in_place": made.kv.in_place,
        "front": made.front,
        "quantization": dataclasses.asdict(made.quantization),
        "budget": None if result.budget is None else dataclasses.asdict(result.budget),
        **passes_json(result.passes, result.events, remark),
        "nodes": result.nodes,
        "coverage": {"complete": result.coverage.complete, **result.coverage.to_json()},
        "buckets": [
            {
                "name": bucket.name,
                "file": bucket.file,
                "nodes": result.nodes[bucket.name],
                "illegal": 0,  # a bucket with an illegal node is never written
                "om": bucket.om,
                "command": list(bucket.command),
            }
            for bucket in made.buckets
        ],
    }


# --- run ------------------------------------------------------------------------------------------


# --- verify ---------------------------------------------------------------------------------------


# --- quality --------------------------------------------------------------------------------------

_WORST = 5
"""Layers that are named; all are in the JSON."""
