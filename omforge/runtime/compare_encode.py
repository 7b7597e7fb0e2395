"""Comparison of the levels of a bundle that encodes with the exported model, on all its outputs.

Only real tokens are compared: what a padded slot holds is nobody's.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from omforge.ir.errors import InputError
from omforge.ir.numerics import Tolerance, max_abs_diff
from omforge.runtime.bundle import Bundle, Progress
from omforge.runtime.encode import Encoded, Encoder
from omforge.runtime.export_encode import ExportEncoder
from omforge.runtime.fixed import random_fixed
from omforge.runtime.generate import Level
from omforge.runtime.judging import EXPORT, excess_of, export_of, is_quantized, tolerances_of
from omforge.runtime.om_files import check_om
from omforge.runtime.verify_report import Comparison, Failure, VerifyReport

Array = npt.NDArray[Any]
Rows = tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class EncodeCase:
    """One run: texts, and the further numbers of their tokens by input."""

    name: str
    texts: Rows
    token_inputs: Mapping[str, Rows] = field(default_factory=dict[str, Rows])


class TextEncoder(Protocol):
    """What can be compared: `Encoder` at any level, and `ExportEncoder`."""

    def encode(
        self, texts: Sequence[Sequence[int]], *, token_inputs: Mapping[str, Rows] | None = None
    ) -> list[Encoded]:
        """Return the outputs of each text."""
        ...

    def close(self) -> None:
        """Free what it holds."""
        ...


def verify_encoder(
    bundle: Bundle,
    source: str | os.PathLike[str] | None = None,
    levels: Sequence[Level] = ("canonical", "lowered"),
    *,
    texts: Sequence[Sequence[int]] | None = None,
    seed: int = 0,
    tolerances: Mapping[str, Tolerance] | None = None,
    progress: Progress | None = None,
) -> VerifyReport:
    """Compare each level's outputs with the exported model's, and lowered with canonical.

    Args:
        bundle: The bundle; its task is `encode`.
        source: The exported model; by default where the manifest says. If that is gone, the
            canonical graph is the reference, and the report says so.
        levels: What to compare.
        texts: Token ids to use instead of the seeded random ones.
        seed: Of the random texts, and of what fixed inputs hold.
        tolerances: By level, instead of the table's for the level's dtype.
        progress: Told of each case.

    Raises:
        InputError: `source` is missing or is not the model that the bundle was made from.
    """
    manifest = bundle.manifest
    notes: list[str] = []
    export = export_of(bundle, source, notes)
    allowed = tolerances_of(manifest, levels, tolerances)
    quantized = is_quantized(bundle)
    if quantized and export is not None:
        notes.append("weights are quantised: the distance from the export is reported, not judged")
    cases = make_encode_cases(bundle, seed, texts)
    fixed = random_fixed(bundle.manifest.fixed, 1, seed)
    order = ["canonical"] if export is None else [EXPORT]
    order += [level for level in ("canonical", "lowered") if level in levels and level not in order]
    if len(order) == 1 or not cases:
        raise InputError(
            "there is nothing to compare",
            f"the reference is {order[0]}, the levels are {', '.join(levels) or 'none'}, "
            f"and there are {len(cases)} cases",
            "Give the exported model, another level or a text",
        )
    found: dict[str, dict[str, list[Encoded]]] = {}
    comparisons: list[Comparison] = []
    failures: list[Failure] = []
    for number, name in enumerate(order):

        def opener(batch: int, name: str = name) -> TextEncoder:
            if name == EXPORT and export is not None:
                return ExportEncoder(export, manifest, fixed)
            level: Level = "lowered" if name == "lowered" else "canonical"
            return Encoder(bundle, level, batch=batch, fixed=fixed)

        found[name] = {}
        for batch in sorted({len(case.texts) for case in cases}):
            # One level at a time, so that no two hold their sessions together.
            with closing(opener(batch)) as model:
                for case in cases:
                    if len(case.texts) != batch:
                        continue
                    if progress is not None:
                        done = number * len(cases) + len(found[name])
                        progress(f"{name}: {case.name}", done, len(order) * len(cases))
                    found[name][case.name] = model.encode(
                        case.texts, token_inputs=case.token_inputs
                    )
        for reference in order[:number]:
            judged = not (quantized and reference == EXPORT)
            for case in cases:
                for output in manifest.outputs:
                    compared = _compare(
                        (name, reference),
                        case,
                        output.name,
                        found[name][case.name],
                        found[reference][case.name],
                        allowed[name],
                        judged=judged,
                    )
                    comparisons.append(compared)
                    if not compared.ok:
                        failures.append(_failure(compared, allowed[name]))
    made = check_om(bundle)
    failures += [Failure(fault.what, fault.why, fault.next_step) for fault in made.faults]
    notes += made.notes()
    if not any(each.judged for each in comparisons):
        notes.append("nothing was judged: a quantised bundle needs both canonical and lowered")
    return VerifyReport(
        order[0],
        0,
        seed,
        allowed,
        tuple(comparisons),
        tuple(failures),
        tuple(notes),
        task="encode",
    )


def make_encode_cases(
    bundle: Bundle, seed: int = 0, texts: Sequence[Sequence[int]] | None = None
) -> list[EncodeCase]:
    """Return the cases of a bundle, for each batch and bucket.

    A text that fills the bucket, one that is padded, the shortest that goes there; and where a
    batch has rows, rows of different lengths. No random token is the one that pads: a model may
    take it for the end of a text.
    """
    manifest = bundle.manifest
    stream = np.random.default_rng(seed)
    vocabulary, padding = manifest.model.vocab_size, manifest.model.pad_token_id

    def text(length: int) -> tuple[int, ...]:
        tokens = stream.integers(0, vocabulary, length)
        if padding is not None:
            tokens[tokens == padding] = (padding + 1) % vocabulary
        return tuple(tokens.tolist())

    def case(name: str, rows: Rows) -> EncodeCase:
        further = {
            spec.name: tuple(
                tuple(stream.integers(0, spec.rows or 1, len(row)).tolist()) for row in rows
            )
            for spec in manifest.token_inputs
        }
        return EncodeCase(name, rows, further)

    cases: list[EncodeCase] = []
    for batch in bundle.batches:
        label = "" if batch == 1 else f", batch {batch}"
        if texts is not None:
            rows = [tuple(row) for row in texts]
            for start in range(0, len(rows), batch):
                part = rows[start : start + batch]
                part += [part[0]] * (batch - len(part))
                cases.append(case(f"texts {start} to {start + batch - 1}{label}", tuple(part)))
            continue
        sizes = {seq for b in manifest.buckets if b.batch == batch for seq in (b.gears or (b.seq,))}
        below = 0
        for size in sorted(sizes):
            kinds = {
                "fills": size,
                "shorter than": max(below + 1, size * 3 // 4),
                "shortest of": below + 1,
            }
            for name, length in kinds.items():
                rows = tuple(text(length) for _ in range(batch))
                cases.append(case(f"{name} {size}{label}", rows))
            if batch > 1:
                lengths = [size, max(1, size * 3 // 4), 1]
                mixed = tuple(text(lengths[row % len(lengths)]) for row in range(batch))
                cases.append(case(f"padded rows of {size}{label}", mixed))
            below = size
    return cases


def _compare(
    names: tuple[str, str],
    case: EncodeCase,
    output: str,
    actual: Sequence[Encoded],
    expected: Sequence[Encoded],
    allowed: Tolerance,
    *,
    judged: bool,
) -> Comparison:
    pairs = [(a[output], b[output]) for a, b in zip(actual, expected, strict=True)]
    worst = max(max_abs_diff(a, b) for a, b in pairs)
    scale = max(float(np.abs(b).max(initial=0)) for _, b in pairs)
    excess = max(excess_of(a, b, allowed) for a, b in pairs)
    return Comparison(
        level=names[0],
        reference=names[1],
        case=case.name,
        lengths=tuple(map(len, case.texts)),
        max_abs=worst,
        max_rel=worst / scale if scale else worst,
        worst_step=0,
        max_abs_prefill=worst,
        max_abs_decode=0.0,
        excess=excess,
        divergence=None,
        gap=None,
        ok=excess <= 1 if judged else bool(np.isfinite(excess)),
        judged=judged,
        finite=all(bool(np.isfinite(array).all()) for pair in pairs for array in pair),
        output=output,
    )


def _failure(found: Comparison, allowed: Tolerance) -> Failure:
    where = f"{found.output} of {found.level} differs from {found.reference} in case {found.case!r}"
    if not found.finite:
        return Failure(
            where,
            "it holds NaN or infinity",
            "Look for an overflow (float16 ends at 65504), or build with another dtype",
        )
    next_step = "Compile with --compare-each to find the pass"
    if found.level == "lowered" and found.reference == EXPORT:
        next_step = "Compare canonical and lowered: if they agree it is older than lowering"
    return Failure(
        where,
        f"the largest difference is {found.max_abs:.3g}, {found.excess:.3g} times the tolerance "
        f"(rtol {allowed.rtol:g}, atol {allowed.atol:g})",
        next_step,
    )
