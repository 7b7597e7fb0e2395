"""Comparison of a bundle's levels with the exported model, on logits.

Every model gets the same tokens: a prompt, then the tokens that the reference would choose. So a
difference is one of numbers, never of different texts; and the first step at which a model would
choose another token is the one at which it would leave the reference when it ran freely.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from omforge import ir
from omforge.bundle.manifest import Manifest, Task, TensorSpec
from omforge.ir.errors import CheckError, InputError, OmforgeError
from omforge.ir.numerics import Tolerance, max_abs_diff, tolerance
from omforge.runtime.bundle import Bundle, Progress
from omforge.runtime.cases import Case, make_cases, room
from omforge.runtime.embeddings import RandomEmbeddings
from omforge.runtime.export import ExportModel
from omforge.runtime.fixed import as_exported, random_fixed
from omforge.runtime.generate import LanguageModel, Level
from omforge.runtime.om_files import check_om
from omforge.runtime.routing import first_other_choice
from omforge.runtime.run_cases import Decoder, chosen_for_pieces, run_cases
from omforge.runtime.same_cache import Follower, Recorder, Tips, Written
from omforge.runtime.sampling import greedy
from omforge.runtime.session import OrtSession
from omforge.runtime.unrounded import without_rounding

Array = npt.NDArray[Any]
EXPORT = "exported"


_UNROUNDED = ", unrounded"
"""Of a level whose layers or cache are int8: what it is called without that rounding."""

_PIECES = "exported, in pieces"
"""The export, given the tokens of a prompt in several calls: it must agree with itself."""

_SAME_CACHE = "canonical, same cache"
"""The canonical graph on the integers that the lowered graphs wrote into their cache."""

_MEAN_STEPS = 0.5
"""How many steps the integers of a cache tensor may be from the canonical graph's on average.
Rounding puts a few of them one step away, the more the deeper the layer; a wrong scale puts most of
them many, and another rounding half of them one."""


@dataclass(frozen=True)
class Comparison:
    """One level against one reference on one case.

    Attributes:
        level: What was compared.
        reference: With what.
        case: The case's name.
        lengths: Tokens of each row ahead of the steps; their number is the batch size.
        max_abs: The largest difference of a logit.
        max_rel: The same, relative to the largest logit of the reference.
        worst_step: Where it is; 0 is the prefill, then come the parts that go on at later places.
        max_abs_prefill: The largest difference of the logits behind the prompt, and the parts.
        max_abs_decode: That of the steps after it; 0 without steps.
        excess: The largest difference as a multiple of the tolerance; above 1 fails.
        divergence: The first step at which another token would be chosen, or None.
        gap: There, by how much the reference prefers its own token; the largest of the rows.
        ok: Whether the case passes.
        judged: Whether the tolerance counts. Between a quantised graph and the export it does not:
            that distance is the loss that was asked for (see `quality`). Nor does it where layers
            or the cache are int8, which float16 tips either way, unless both levels are without
            that rounding (see `unrounded`) or behind the same integers (see `same_cache`).
        output: What was compared; "" for the logits of what generates.
        finite: Whether no logit of either is infinite or NaN. (`excess` is infinite, too, where the
            tolerance is 0.)
        worst_position: The place in the text of the token that the logits of `worst_step` follow.
    """

    level: str
    reference: str
    case: str
    lengths: tuple[int, ...]
    max_abs: float
    max_rel: float
    worst_step: int
    max_abs_prefill: float
    max_abs_decode: float
    excess: float
    divergence: int | None
    gap: float | None
    ok: bool
    judged: bool = True
    finite: bool = True
    worst_position: int = 0
    output: str = ""


@dataclass(frozen=True)
class Failure:
    """One reason why a bundle is not what it was made from."""

    what: str
    why: str
    next_step: str


@dataclass(frozen=True)
class VerifyReport:
    """All comparisons of one bundle, and what failed."""

    reference: str
    steps: int
    seed: int
    tolerances: dict[str, Tolerance]
    comparisons: tuple[Comparison, ...]
    failures: tuple[Failure, ...]
    notes: tuple[str, ...]
    task: Task = "generate"
    tips: Mapping[str, Tips] = field(default_factory=dict[str, Tips])
    """By case, how an int8 cache's integers differ between lowered and canonical graph."""

    @property
    def ok(self) -> bool:
        """Whether nothing failed."""
        return not self.failures

    def worst(self, level: str) -> Comparison:
        """Return the comparison of `level` that is nearest to its tolerance, or farthest beyond."""
        return max((c for c in self.comparisons if c.level == level), key=lambda c: c.excess)

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON data; an infinite difference, which JSON lacks, becomes "inf"."""
        plain = cast("dict[str, Any]", _plain(dataclasses.asdict(self)))
        return {"ok": self.ok, **plain}


def verify_bundle(
    bundle: Bundle,
    source: str | os.PathLike[str] | None = None,
    levels: Sequence[Level] = ("canonical", "lowered"),
    *,
    prompts: Sequence[Sequence[int]] | None = None,
    steps: int = 8,
    seed: int = 0,
    tolerances: Mapping[str, Tolerance] | None = None,
    progress: Progress | None = None,
) -> VerifyReport:
    """Compare each level's logits with the exported model's, and lowered with canonical.

    Args:
        bundle: The bundle.
        source: The exported model; by default where the manifest says. If that is gone, the
            canonical graph is the reference, and the report says so.
        levels: What to compare.
        prompts: Token ids to use instead of the seeded random ones.
        steps: Decode steps behind each prompt.
        seed: Of the random prompts.
        tolerances: By level, instead of the table's for the level's dtype (a quantised bundle).
        progress: Told of each case.

    Raises:
        InputError: `source` is missing or is not the model that the bundle was made from.
    """
    manifest = bundle.manifest
    if manifest.task == "encode":
        from omforge.runtime.compare_encode import verify_encoder  # made of parts of this module

        return verify_encoder(
            bundle,
            source,
            levels,
            texts=prompts,
            seed=seed,
            tolerances=tolerances,
            progress=progress,
        )
    notes: list[str] = []
    wanted = manifest.embeddings
    if wanted is not None and bundle.embeddings is None:
        rows, width = manifest.model.vocab_size, wanted.hidden_size
        bundle = bundle.with_embeddings(RandomEmbeddings(rows, width, wanted.scale, seed))
        notes.append(
            "the model is fed by embeddings: random rows of deviation "
            f"{wanted.scale:.3g} stand for tokens"
        )
    export = export_of(bundle, source, notes)
    allowed = tolerances_of(manifest, levels, tolerances)
    quantized = is_quantized(bundle)
    if quantized and export is not None:
        notes.append(
            "weights or cache are quantised: the distance from the export is reported, not judged"
        )
    int8_inputs, int8_cache = manifest.quantization.int8_inputs, manifest.kv.dtype == "int8"
    rounds = int8_inputs or int8_cache
    cases = make_cases(bundle, steps, seed, prompts)
    longest = max((n for case in cases if case.steps is None for n in case.lengths), default=0)
    steps = max(0, min(steps, room(bundle) - longest))
    order = ["canonical"] if export is None else [EXPORT]
    order += [level for level in ("canonical", "lowered") if level in levels and level not in order]
    if len(order) == 1 or not cases:
        raise InputError(
            "there is nothing to compare",
            f"the reference is {order[0]}, the levels are {', '.join(levels) or 'none'}, "
            f"and there are {len(cases)} cases",
            "Give the exported model, another level or a prompt",
        )

    if rounds and {"canonical", "lowered"} <= set(order):
        order += [_SAME_CACHE] * (int8_cache and not int8_inputs)
        order += [f"canonical{_UNROUNDED}", f"lowered{_UNROUNDED}"]
        what = "layers read int8" if int8_inputs else "the cache is int8"
        behind = "" if int8_inputs else ", and behind the same integers"
        notes.append(
            f"{what}: a number near the middle of two integers goes either way between canonical "
            f"and lowered, so what is judged is their distance without that rounding{behind}"
        )
    written = Written() if _SAME_CACHE in order else None

    def opener(name: str, batch: int) -> Decoder:
        if name == EXPORT and export is not None:
            table = bundle.embeddings
            given = as_exported(manifest, random_fixed(manifest.fixed, batch, seed))
            return ExportModel(export, manifest.export, manifest.kv, given, embeddings=table)
        model = _opened(bundle, name, batch, written)
        if manifest.fixed and isinstance(model, LanguageModel | Recorder | Follower):
            model.give(random_fixed(manifest.fixed, batch, seed))
        return model

    largest = max((bucket.seq for bucket in manifest.buckets), default=1)
    whole = chosen_for_pieces(cases, largest)
    pieces: list[Array] = []

    def in_pieces(model: Decoder) -> None:
        if isinstance(model, ExportModel):
            pieces.append(model.prefill(whole.prompts, apart=True, pieces=True))

    logits: dict[str, dict[str, list[Array]]] = {}
    comparisons: list[Comparison] = []
    failures: list[Failure] = []
    routes: dict[str, str | None] = {}
    total = len(order) * len(cases)
    for name in order:

        def report(case: str, done: int, name: str = name) -> None:
            if progress is not None:
                progress(f"{name}: {case}", order.index(name) * len(cases) + done, total)

        # One level at a time, so that no two hold their sessions together.
        try:
            leader = logits.get(order[0])
            also = in_pieces if name == EXPORT else None
            logits[name] = run_cases(name, cases, steps, leader, opener, report, also)
        except CheckError as error:
            if not name.endswith(_UNROUNDED):
                raise
            failures.append(Failure(error.what, error.why, error.next_step))
        if pieces:
            found = _compare(
                (_PIECES, EXPORT),
                whole,
                [pieces.pop()],
                logits[EXPORT][whole.name][:1],
                tolerance(manifest.export.dtype),
            )
            comparisons.append(found)
            failures += [] if found.ok else [_disagrees(found, whole)]
        for level, reference in _pairs(name, logits):
            for case in cases:
                found = _compare(
                    (level, reference),
                    case,
                    logits[level][case.name],
                    logits[reference][case.name],
                    allowed[level],
                    judged=_judged(level, reference, quantized=quantized, rounds=rounds),
                )
                comparisons.append(found)
                if not found.ok:
                    routed = ""
                    # Which experts are chosen is looked up where each level has its own cache.
                    freely = level == "lowered" and reference != _SAME_CACHE and not case.parts
                    if freely and np.isfinite(found.excess):
                        if case.name not in routes:
                            leader = logits[order[0]][case.name]
                            routes[case.name] = first_other_choice(bundle, case.prompts, leader)
                        routed = routes[case.name] or ""
                    failures.append(_failure(found, allowed[level], routed))
    tips = {} if written is None else {case.name: written.tips[case.prompts] for case in cases}
    failures += [_wrong_integers(name, tip) for name, tip in tips.items() if tip.mean > _MEAN_STEPS]
    if tips:
        share, most = max(t.share for t in tips.values()), max(t.most for t in tips.values())
        notes.append(
            f"lowered and canonical graph write other integers into the cache for up to {share:.1%}"
            f" of a case's keys and values, by up to {most} steps"
        )
    made = check_om(bundle)
    failures += [Failure(fault.what, fault.why, fault.next_step) for fault in made.faults]
    notes += made.notes()
    if not any(each.judged for each in comparisons if each.level != _PIECES):
        notes.append("nothing was judged: a quantised bundle needs both canonical and lowered")
    return VerifyReport(
        order[0],
        steps,
        seed,
        allowed,
        tuple(comparisons),
        tuple(failures),
        tuple(notes),
        tips=tips,
    )


def _opened(bundle: Bundle, name: str, batch: int, written: Written | None) -> Decoder:
    """A level of the bundle by its name in the report."""
    if name == _SAME_CACHE and written is not None:
        return Follower(bundle, batch, written)
    if name == "lowered" and written is not None:
        return Recorder(bundle, batch, written)
    level = cast("Level", name.removesuffix(_UNROUNDED))
    if name == level:
        return LanguageModel(bundle, level, batch=batch)
    return LanguageModel(
        _with_a_float_cache(bundle),
        level,
        batch=batch,
        open_session=lambda bucket: _without_rounding(bundle.graph(bucket), lowered=True),
        open_canonical=lambda: _without_rounding(bundle.canonical, lowered=False),
        chunks=LanguageModel(bundle, "lowered", batch=batch).chunk_sizes,
    )


def _pairs(name: str, done: Iterable[str]) -> list[tuple[str, str]]:
    """The levels and references to compare when `name` has run, the last of those that are done."""
    names = list(done)
    if names[-1] != name:
        return []
    if name == _SAME_CACHE:
        return [("lowered", name)]
    unrounded = name.endswith(_UNROUNDED)
    before = [each for each in names[:-1] if each != _SAME_CACHE]
    # Between a level with a rounding and one without it, the rounding is no more than noise.
    return [(name, each) for each in before if each.endswith(_UNROUNDED) == unrounded]


def _judged(level: str, reference: str, *, quantized: bool, rounds: bool) -> bool:
    if level.endswith(_UNROUNDED) or reference == _SAME_CACHE:
        return True
    return not rounds and not (quantized and reference == EXPORT)


def _without_rounding(path: Path, *, lowered: bool) -> OrtSession:
    name = f"{path.name}{_UNROUNDED}"
    try:
        session = OrtSession(without_rounding(ir.load(path)), lowered=lowered, name=name)
        left = [spec.name for spec in (*session.inputs, *session.outputs) if spec.dtype == "int8"]
        why = f"{', '.join(left)} stays int8" if left else ""
    except OmforgeError as error:
        why = str(error)
    else:
        if not left:
            return session
    raise CheckError(
        f"{path.name} cannot be run without the rounding to int8",
        why,
        "Look at how it writes its cache: it is Cast(Round(Clip(x))) that is known",
    )


def _with_a_float_cache(bundle: Bundle) -> Bundle:
    """The bundle as its graphs without rounding are: an int8 cache holds floats."""
    manifest = bundle.manifest

    def wide(specs: Sequence[TensorSpec]) -> tuple[TensorSpec, ...]:
        return tuple(
            dataclasses.replace(spec, dtype=manifest.dtype) if spec.dtype == "int8" else spec
            for spec in specs
        )

    buckets = [
        dataclasses.replace(bucket, inputs=wide(bucket.inputs), outputs=wide(bucket.outputs))
        for bucket in manifest.buckets
    ]
    wide_manifest = dataclasses.replace(manifest, buckets=tuple(buckets))
    return dataclasses.replace(bundle, manifest=wide_manifest)


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
        table[f"lowered{_UNROUNDED}"] = exact
    return {
        name: (given or {}).get(name.removesuffix(_UNROUNDED)) or limit
        for name, limit in table.items()
        if name.removesuffix(_UNROUNDED) in levels
    }


def _compare(
    names: tuple[str, str],
    case: Case,
    actual: Sequence[Array],
    expected: Sequence[Array],
    allowed: Tolerance,
    *,
    judged: bool = True,
) -> Comparison:
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


def _failure(found: Comparison, allowed: Tolerance, routed: str = "") -> Failure:
    """The failure, with what `routing` found of it."""
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
    if routed:
        return Failure(
            where,
            "; ".join([*reasons, routed]),
            "Build with --dtype fp32: if that agrees, rounding in the router is all there is to it",
        )
    return Failure(where, "; ".join(reasons), _next_step(found))


def _disagrees(found: Comparison, case: Case) -> Failure:
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
    if found.reference == _SAME_CACHE:
        return "Look at what reads the cache in the lowered graph: its scales, its mask"
    return "Compile with --compare-each to find the pass"


def _wrong_integers(case: str, tips: Tips) -> Failure:
    return Failure(
        f"the cache of lowered differs from that of canonical in case {case!r}",
        f"the integers of {tips.where} are {tips.mean:.3g} steps from the canonical graph's on "
        f"average, more than {_MEAN_STEPS:g}; {tips.share:.1%} of all differ, by up to {tips.most}",
        "Look at what quantises that key or value in the lowered graph: its scale, or its middle",
    )


def _plain(data: object) -> object:
    if isinstance(data, Mapping):
        return {key: _plain(item) for key, item in cast("Mapping[str, object]", data).items()}
    if isinstance(data, list | tuple):
        return [_plain(item) for item in cast("Sequence[object]", data)]
    if isinstance(data, float) and not np.isfinite(data):
        return str(data)
    return data
