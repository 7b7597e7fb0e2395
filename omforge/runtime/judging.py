"""When logits are the same: tolerances by level, ties, and what is said of those that are not."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from omforge.bundle.manifest import Manifest
from omforge.ir.errors import InputError
from omforge.ir.numerics import Tolerance, max_abs_diff, tolerance
from omforge.runtime.bundle import Bundle
from omforge.runtime.cases import Case
from omforge.runtime.same_cache import Tips
from omforge.runtime.sampling import greedy
from omforge.runtime.verify_report import Comparison, Failure

Array = npt.NDArray[Any]

EXPORT = "exported"


UNROUNDED = ", unrounded"
"""Of a level whose layers or cache are int8: what it is called without that rounding."""


PIECES = "exported, in pieces"
"""The export, given the tokens of a prompt in several calls: it must agree with itself."""


ROUNDED_WEIGHTS = "canonical, rounded weights"
"""The canonical graph in float32, with weights as the lowered graphs hold them."""


SAME_CACHE = "canonical, same cache"
"""The canonical graph on the integers that the lowered graphs wrote into their cache."""


MEAN_STEPS = 0.5
"""How many steps the integers of a cache tensor may be from the canonical graph's on average.
Rounding puts a few of them one step away, the more the deeper the layer; a wrong scale puts most of
them many, and another rounding half of them one."""


def is_quantized(bundle: Bundle) -> bool:
    """Whether weights or the cache are integers, which costs accuracy on purpose."""
    found = bundle.manifest.quantization
    return bool(found.weights or found.kv)


def export_of(
    bundle: Bundle, source: str | os.PathLike[str] | None, notes: list[str]
) -> Path | None:
    """Return the exported model; None, with a note, where it is gone.

    Raises:
        InputError: `source` is missing, or is not the model that the bundle was made from.
    """
    path = bundle.export if source is None else Path(source)
    if not path.is_file():
        if source is not None:
            raise InputError(f"{path} does not exist", next_step="Give the exported .onnx file")
        notes.append(
            f"the exported model {path} is not there: the canonical graph was the reference"
        )
        return None
    with path.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    expected = bundle.manifest.export.sha256
    if digest != expected:
        raise InputError(
            f"{path} is not the model that the bundle was made from",
            f"its sha256 is {digest}, the manifest says {expected}",
            "Give that model, or build the bundle again",
        )
    return path


def tolerances_of(
    manifest: Manifest, levels: Sequence[str], given: Mapping[str, Tolerance] | None
) -> dict[str, Tolerance]:
    """Return each level's tolerance: what is given, or the table's for its dtype."""
    exported, lowered = tolerance(manifest.export.dtype), tolerance(manifest.dtype)
    # A lowered graph that is finer than the export still has the export to agree with.
    exact = max(exported, lowered, key=lambda t: t.atol)
    table = {"canonical": exported, "lowered": exact}
    if manifest.kv.dtype == "int8" or manifest.quantization.int8_inputs:
        table[f"lowered{UNROUNDED}"] = exact
    return {
        name: (given or {}).get(name.removesuffix(UNROUNDED)) or limit
        for name, limit in table.items()
        if name.removesuffix(UNROUNDED) in levels
    }


def compare_logits(
    names: tuple[str, str],
    case: Case,
    actual: Sequence[Array],
    expected: Sequence[Array],
    allowed: Tolerance,
    *,
    judged: bool = True,
) -> Comparison:
    """Compare one level with a reference on one case.

    Args:
        names: The level and the reference.
        case: What both ran.
        actual: The level's logits [B, V] by step.
        expected: The reference's.
        allowed: The tolerance.
        judged: Whether it counts.
    """
    differences = [max_abs_diff(a, b) for a, b in zip(actual, expected, strict=True)]
    scale = max(float(np.abs(b).max()) for b in expected)
    excess = max(excess_of(a, b, allowed) for a, b in zip(actual, expected, strict=True))
    divergence, gap, tie = _divergence(actual, expected, allowed)
    worst = max(differences)
    return Comparison(
        level=names[0],
        reference=names[1],
        case=case.name,
        lengths=case.lengths,
        max_abs=worst,
        max_rel=worst / scale if scale else worst,
        worst_step=differences.index(worst),
        worst_position=case.position(differences.index(worst)),
        max_abs_prefill=max(differences[: 1 + len(case.parts)]),
        max_abs_decode=max(differences[1 + len(case.parts) :], default=0.0),
        excess=excess,
        divergence=divergence,
        gap=gap,
        ok=(excess <= 1 and tie) if judged else bool(np.isfinite(excess)),
        judged=judged,
        finite=all(bool(np.isfinite(logits).all()) for logits in (*actual, *expected)),
    )


def excess_of(actual: Array, expected: Array, allowed: Tolerance) -> float:
    """Return max |a - b| / (atol + rtol*|b|); infinite if either side is not finite."""
    if actual.shape != expected.shape or not np.isfinite([actual, expected]).all():
        return float("inf")
    difference = np.abs(actual.astype(np.float64) - expected)
    limit = allowed.atol + allowed.rtol * np.abs(expected.astype(np.float64))
    # Exact types have a limit of 0, which only equality keeps.
    ratio = np.divide(difference, limit, out=np.full_like(limit, np.inf), where=limit > 0)
    return float(np.where(difference == 0, 0.0, ratio).max())


def _divergence(
    actual: Sequence[Array], expected: Sequence[Array], allowed: Tolerance
) -> tuple[int | None, float | None, bool]:
    """Return the first step that chooses other tokens, the gap there, and whether all are ties.

    Two logits that are nearer than twice the tolerance can change places by rounding alone.
    """
    first: int | None = None
    first_gap: float | None = None
    ties = True
    for step, (mine, theirs) in enumerate(zip(actual, expected, strict=True)):
        own, chosen = greedy(mine), greedy(theirs)
        rows = np.flatnonzero(own != chosen)
        if not rows.size:
            continue
        top = theirs[rows, chosen[rows]].astype(np.float64)
        gaps = top - theirs[rows, own[rows]]
        ties = ties and bool((gaps <= 2 * (allowed.atol + allowed.rtol * np.abs(top))).all())
        if first is None:
            first, first_gap = step, float(gaps.max())
    return first, first_gap, ties


def failure_of(found: Comparison, allowed: Tolerance, rounding: str = "") -> Failure:
    """The failure, with what `routing` or `rounded_weights` found of it."""
    where = f"{found.level} differs from {found.reference} in case {found.case!r}"
    if not found.finite:
        return Failure(
            where,
            f"the logits of step {found.worst_step} hold NaN or infinity",
            "Look for an overflow (float16 ends at 65504), or build with another dtype",
        )
    reasons: list[str] = []
    if found.excess > 1:
        reasons.append(
            f"the largest difference is {found.max_abs:.3g} at step {found.worst_step}, behind the "
            f"token at position {found.worst_position}, "
            f"{found.excess:.3g} times the tolerance (rtol {allowed.rtol:g}, atol {allowed.atol:g})"
        )
    if found.divergence is not None and found.gap is not None:
        reasons.append(
            f"step {found.divergence} chooses another token, whose logit is {found.gap:.3g} lower "
            f"in {found.reference}"
        )
    if rounding:
        return Failure(
            where,
            "; ".join([*reasons, rounding]),
            "Build with --dtype fp32: if that agrees, rounding is all there is to it",
        )
    return Failure(where, "; ".join(reasons), _next_step(found))


def disagrees(found: Comparison, case: Case) -> Failure:
    """The failure of an export that gives other logits when it gets fewer tokens a call."""
    return Failure(
        f"the export does not agree with itself in case {case.name!r}",
        f"the logits behind {max(found.lengths)} tokens are {found.max_abs:.3g} off where it gets "
        f"them in several calls, {found.excess:.3g} times the tolerance",
        "Build with --prefill buckets as short as the calls that it is right for, or export it "
        "again with more new tokens in its sample",
    )


def _next_step(found: Comparison) -> str:
    if found.level == "canonical":
        return "Run the pipeline with --compare-each to find the pass"
    if found.reference == EXPORT:
        return "Compare canonical and lowered: if they agree the difference is older than lowering"
    if found.reference == SAME_CACHE:
        return "Look at what reads the cache in the lowered graph: its scales, its mask"
    return "Compile with --compare-each to find the pass"


def wrong_integers(case: str, tips: Tips) -> Failure:
    """The failure of a cache whose integers are others than the canonical graph's."""
    return Failure(
        f"the cache of lowered differs from that of canonical in case {case!r}",
        f"the integers of {tips.where} are {tips.mean:.3g} steps from the canonical graph's on "
        f"average, more than {MEAN_STEPS:g}; {tips.share:.1%} of all differ, by up to {tips.most}",
        "Look at what quantises that key or value in the lowered graph: its scale, or its middle",
    )
