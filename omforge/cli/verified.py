"""What `omforge verify` shows: comparisons, failures, and what quantisation cost."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from omforge.cli.console import show, show_json, show_table
from omforge.cli.reports import small
from omforge.compilation.canonical import float_canonical
from omforge.ir.errors import InputError
from omforge.quantization.token_file import leading_tokens
from omforge.runtime.bundle import Bundle, Progress
from omforge.runtime.judging import is_quantized
from omforge.runtime.quality import PIECE, PIECES, QualityReport, measure_quality
from omforge.runtime.quality_layers import LayerErrors
from omforge.runtime.text_stream import Tokenizer
from omforge.runtime.verify_report import Comparison, VerifyReport

_WORST = 5
"""Layers that are shown."""


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
