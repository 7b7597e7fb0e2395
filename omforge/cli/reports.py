"""What commands have to tell: results as tables for people, and as plain data for `--json`."""

from __future__ import annotations

import dataclasses
import json
import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omforge.atc.command import find_atc
from omforge.cli.console import show, show_json, show_table
from omforge.compilation.canonical import float_canonical
from omforge.compilation.compile import CompileResult
from omforge.compilation.footprint import budget_text
from omforge.compilation.quantize_options import memory_text, quantization_text
from omforge.compilation.task import task_text
from omforge.compilation.writing import SCRIPT
from omforge.ir.errors import InputError
from omforge.quantization.token_file import leading_tokens
from omforge.recognition.coverage import Coverage
from omforge.rewriting.events import Event
from omforge.rewriting.pass_run import PassRun
from omforge.runtime.bundle import Bundle, Progress
from omforge.runtime.generate import Generation
from omforge.runtime.judging import is_quantized
from omforge.runtime.quality import PIECE, PIECES, QualityReport, measure_quality
from omforge.runtime.quality_layers import LayerErrors
from omforge.runtime.text_stream import TextStream, Tokenizer
from omforge.runtime.verify_report import Comparison, VerifyReport

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
    """Show what passes left alone, and why."""
    for event in events:
        show(str(event))


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
    nodes = ", ".join(f"0 illegal of {result.nodes[name]} nodes in {name}" for name in buckets)
    show(f"legality   {made.target}: {nodes}")
    show(f"task       {task_text(made)}")
    cache = "no" if made.task == "encode" else made.kv.layout
    show(
        f"bundle     {output}: {made.dtype}, context {made.context}, batch {made.batch}, "
        f"{cache} cache"
    )
    if why := _bounded_by(result):
        show(f"context    {made.context} tokens: {why}")
    if made.quantization.weights or made.quantization.kv:
        show(f"quantised  {quantization_text(made)}")
    show(f"memory     {memory_text(made)}")
    show_nonfinite(result.nonfinite)
    show_budget(result)
    show(f"atc        {_atc_hint(result, output)}")
    folder = shlex.quote(str(output))
    run = "" if made.embeddings is not None else f'; omforge run {folder} --prompt "..."'
    show(f"next       omforge verify {folder}{run}")


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
    """Show the blocks that were raised, of how many, and why the others were not."""
    kinds = [f"{name} {kind.found} of {kind.expected}" for name, kind in coverage.kinds.items()]
    show(f"coverage   {', '.join(kinds)}")
    told: set[str] = set()
    for name, kind in coverage.kinds.items():
        for why in kind.missed:
            told.add(why)
            show(f"  missed   {name}: {why}")
    for loss in coverage.lost:
        show(f"  lost     {loss}")
    for event in events:
        if str(event) not in told:
            show(f"  event    {event}")


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

_STOPPED = {
    "eos": "the model ended the text",
    "length": "--max-new-tokens",
    "context": "the context is full",
    "interrupted": "interrupted",
}


@dataclass(frozen=True)
class Generated:
    """A text that was generated, and what it took."""

    prompt: str
    text: str
    level: str
    prompt_tokens: int
    tokens: tuple[int, ...]
    stopped: str
    prefill_seconds: float
    decode_seconds: float

    def __str__(self) -> str:
        return (
            f"[{self.level}: {self.prompt_tokens} prompt tokens in {self.prefill_seconds:.2f} s, "
            f"{len(self.tokens)} new tokens, {self.tokens_per_second:.1f} tokens/s; "
            f"stopped: {_STOPPED.get(self.stopped, self.stopped)}]"
        )

    @property
    def tokens_per_second(self) -> float:
        """New tokens by the time behind the prefill."""
        return len(self.tokens) / self.decode_seconds if self.decode_seconds else 0.0

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON data."""
        return {**dataclasses.asdict(self), "tokens_per_second": self.tokens_per_second}


def stream_text(
    generation: Generation, text: TextStream, write: Callable[[str], None] | None
) -> tuple[str, bool]:
    """Write text as its tokens come; all of it, and whether Ctrl-C ended it."""
    pieces: list[str] = []

    def put(piece: str) -> None:
        pieces.append(piece)
        if write is not None and piece:
            write(piece)

    interrupted = False
    try:
        for token in generation:
            put(text.push(token))
    except KeyboardInterrupt:
        interrupted = True
    put(text.finish())
    return "".join(pieces), interrupted


# --- verify ---------------------------------------------------------------------------------------


def show_verified(report: VerifyReport) -> None:
    """Show each level against its reference, case by case, and what failed."""
    encodes = report.task == "encode"
    columns = ("level", "against", "case", ">prompt", ">prefill", ">decode", ">of limit", "tokens")
    if encodes:
        columns = ("level", "against", "case", ">tokens", "output", ">max abs", ">of limit")
    row = _encoded_row if encodes else _verified_row
    show_table(columns, [row(found) for found in report.comparisons])
    limits = ", ".join(
        f"{level} |a - b| <= {t.atol:g} + {t.rtol:g}*|b|" for level, t in report.tolerances.items()
    )
    what = "outputs" if encodes else "logits"
    show(f"\nmax abs differences of {what}; limits: {limits}")
    for note in report.notes:
        show(f"note: {note}")
    for failure in report.failures:
        show(f"failed: {failure.what}\n  why:  {failure.why}\n  next: {failure.next_step}")
    show("verified" if report.ok else f"{len(report.failures)} checks failed")


def _encoded_row(found: Comparison) -> tuple[object, ...]:
    return (
        found.level,
        found.reference,
        found.case,
        "+".join(map(str, found.lengths)),
        found.output,
        small(found.max_abs),
        f"{found.excess:.1%}" if found.judged else "-",
    )


def _verified_row(found: Comparison) -> tuple[object, ...]:
    tokens = "equal"
    if found.divergence is not None:
        tokens = f"differ at step {found.divergence}, by {found.gap or 0:.1e}"
    return (
        found.level,
        found.reference,
        found.case,
        "+".join(map(str, found.lengths)),
        small(found.max_abs_prefill),
        small(found.max_abs_decode),
        f"{found.excess:.1%}" if found.judged else "-",
        tokens,
    )


# --- quality --------------------------------------------------------------------------------------

_WORST = 5
"""Layers that are named; all are in the JSON."""


@dataclass(frozen=True)
class QualityAsked:
    """What `verify` was asked of the quality; `on` is None where the bundle decides."""

    on: bool | None = None
    text: Path | None = None
    pieces: int = PIECES
    max_kl: float | None = None
    max_perplexity_increase: float | None = None

    def wanted(self, bundle: Bundle) -> bool:
        """Whether to measure: if asked for, or if there is a loss to measure."""
        made = bundle.manifest
        if made.task == "encode" or made.embeddings is not None:
            asked = self.on or self.text or self.max_kl or self.max_perplexity_increase
            if asked:
                raise InputError(
                    "the quality of this bundle cannot be measured",
                    "it is measured on text that the model continues, token by token",
                    "Leave --quality, --text and its limits away",
                )
            return False
        if self.on is not None:
            return self.on
        limits = (self.text, self.max_kl, self.max_perplexity_increase)
        return any(limit is not None for limit in limits) or is_quantized(bundle)


def measured(
    bundle: Bundle, source: Path | None, asked: QualityAsked, bar: Progress | None
) -> QualityReport | None:
    """Measure a bundle's quality, with the canonical graph made again in floats; None if unwanted.

    Raises:
        InputError: The text cannot be read, or the bundle has no tokenizer for it.
    """
    if not asked.wanted(bundle):
        return None
    count = asked.pieces * PIECE
    tokens = None if asked.text is None else _tokens_of(asked.text, bundle.tokenizer(), count)
    export = bundle.export if source is None else source
    plain = float_canonical(export, bundle.manifest) if export.is_file() else None
    report = measure_quality(
        bundle,
        tokens,
        text=str(asked.text),
        source=source,
        float_canonical=plain,
        pieces=asked.pieces,
        progress=bar,
    )
    return report.judged(asked.max_kl, asked.max_perplexity_increase)


def tell_verified(
    report: VerifyReport, quality: QualityReport | None, file: Path | None, *, as_json: bool
) -> None:
    """Show what `verify` found, in either form, and keep it in a file.

    Raises:
        InputError: The file cannot be written.
    """
    found = report.to_dict() | ({} if quality is None else {"quality": quality.to_dict()})
    if file is not None:
        try:
            file.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
        except OSError as error:
            raise InputError(f"cannot write {file}", error.strerror or str(error)) from error
    if as_json:
        show_json(found)
        return
    show_verified(report)
    if quality is not None:
        show_quality(quality)


def _tokens_of(file: Path, tokenizer: Tokenizer, count: int) -> list[int]:
    try:
        return leading_tokens(file, tokenizer.encode, count)
    except UnicodeDecodeError as error:
        raise InputError(f"{file} is no text", str(error), "Give a file in UTF-8") from error


def show_quality(report: QualityReport) -> None:
    """Show what quantisation cost: from end to end, and in the layers that it cost most."""
    show(
        f"\nquality on {report.text}: {report.pieces} pieces of {report.piece_tokens} tokens, "
        f"each a prompt of its own; against {report.reference}"
    )
    columns = ("level", ">perplexity", ">change", ">mean KL", ">max KL", ">top-1", "greedy text")
    first = report.level(report.reference).perplexity
    rows = [
        (
            level.level,
            f"{level.perplexity:.3f}",
            "-" if level.level == report.reference else f"{level.perplexity / first - 1:+.2%}",
            small(level.kl_mean),
            small(level.kl_max),
            f"{level.top1:.1%}",
            _leaves(level.diverges_at, report.new_tokens),
        )
        for level in report.levels
    ]
    show_table(columns, rows)
    if report.layers is not None:
        _show_layers(report.layers)
    for note in report.notes:
        show(f"note: {note}")
    for failure in report.failures:
        show(f"failed: {failure}")


def _show_layers(found: LayerErrors) -> None:
    """The layers that integers put off most; nothing where the export had no floats in any."""
    if not found.layers:
        return
    stored = sum(bool(layer.bits) for layer in found.layers)
    many = f"{stored} of {len(found.layers)} hold integers"
    if not stored:
        show(f"\nlayers     {many}")
        return
    show(f"\nlayers     {many}; the largest errors:")
    worst = sorted(found.layers, key=lambda layer: -layer.output)[:_WORST]
    table = [
        (x.name, x.bits or "-", x.group or "-", f"{x.weight:.2%}", f"{x.output:.2%}") for x in worst
    ]
    show_table(("layer", ">bits", ">group", ">weight error", ">output error"), table)
    show(f"blocks     {', '.join(f'{error:.1%}' for error in found.blocks)}")


def _leaves(places: Sequence[int | None], count: int) -> str:
    """Where greedy texts leave the reference's."""
    if not places:
        return "-"
    told = ("equal" if place is None else f"token {place}" for place in places)
    return f"{', '.join(told)} of {count}"
