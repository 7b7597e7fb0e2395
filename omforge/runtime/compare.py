"""Comparison of a bundle's levels with the exported model, on logits.

Every model gets the same tokens: a prompt, then the tokens that the reference would choose. So a
difference is one of numbers, never of different texts; and the first step at which a model would
choose another token is the one at which it would leave the reference when it ran freely.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from omforge import ir
from omforge.bundle.manifest import Bucket, TensorSpec
from omforge.ir.errors import CheckError, InputError, OmforgeError
from omforge.ir.numerics import Tolerance, tolerance
from omforge.runtime.bundle import Bundle, Progress
from omforge.runtime.cases import make_cases, room
from omforge.runtime.compare_encode import verify_encoder
from omforge.runtime.embeddings import RandomEmbeddings
from omforge.runtime.export import ExportModel
from omforge.runtime.fixed import as_exported, random_fixed
from omforge.runtime.generate import LanguageModel, Level
from omforge.runtime.judging import (
    EXPORT,
    MEAN_STEPS,
    PIECES,
    ROUNDED_WEIGHTS,
    SAME_CACHE,
    UNROUNDED,
    compare_logits,
    disagrees,
    export_of,
    failure_of,
    is_quantized,
    tolerances_of,
    wrong_integers,
)
from omforge.runtime.om_files import check_om
from omforge.runtime.rounded_weights import (
    WeightRounding,
    rounding_of,
    rounds_weights,
    with_rounded_weights,
)
from omforge.runtime.routing import first_other_choice
from omforge.runtime.run_cases import Decoder, chosen_for_pieces, run_cases
from omforge.runtime.same_cache import Follower, Recorder, Written
from omforge.runtime.session import OrtSession, Session
from omforge.runtime.twin import open_twin
from omforge.runtime.unrounded import without_rounding
from omforge.runtime.verify_report import Comparison, Failure, VerifyReport

Array = npt.NDArray[Any]


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
        order += [SAME_CACHE] * (int8_cache and not int8_inputs)
        order += [f"canonical{UNROUNDED}", f"lowered{UNROUNDED}"]
        what = "layers read int8" if int8_inputs else "the cache is int8"
        behind = "" if int8_inputs else ", and behind the same integers"
        notes.append(
            f"{what}: a number near the middle of two integers goes either way between canonical "
            f"and lowered, so what is judged is their distance without that rounding{behind}"
        )
    written = Written() if SAME_CACHE in order else None

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

    weights: list[WeightRounding] = []

    def of_weights(found: Comparison) -> str:
        """What rounding the weights alone explains of a difference; run when it is first asked."""
        if quantized or rounds or found.level != "lowered" or not rounds_weights(manifest):
            return ""
        if not weights:
            leader = logits[order[0]]
            rounded = run_cases(ROUNDED_WEIGHTS, cases, steps, leader, opener, _untold)
            limit = allowed["lowered"]
            weights.append(rounding_of(cases, rounded, leader, limit, manifest.dtype))
        return str(weights[0]) if weights[0].explains(found.excess) else ""

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
            if not name.endswith(UNROUNDED):
                raise
            failures.append(Failure(error.what, error.why, error.next_step))
        if pieces:
            found = compare_logits(
                (PIECES, EXPORT),
                whole,
                [pieces.pop()],
                logits[EXPORT][whole.name][:1],
                tolerance(manifest.export.dtype),
            )
            comparisons.append(found)
            failures += [] if found.ok else [disagrees(found, whole)]
        for level, reference in _pairs(name, logits):
            for case in cases:
                found = compare_logits(
                    (level, reference),
                    case,
                    logits[level][case.name],
                    logits[reference][case.name],
                    allowed[level],
                    judged=_judged(level, reference, quantized=quantized, rounds=rounds),
                )
                comparisons.append(found)
                if not found.ok:
                    cause = ""
                    # Which experts are chosen is looked up where each level has its own cache.
                    freely = level == "lowered" and reference != SAME_CACHE and not case.parts
                    if freely and np.isfinite(found.excess):
                        if case.name not in routes:
                            leader = logits[order[0]][case.name]
                            routes[case.name] = first_other_choice(bundle, case.prompts, leader)
                        cause = routes[case.name] or ""
                    cause = cause or of_weights(found)
                    failures.append(failure_of(found, allowed[level], cause))
    tips = {} if written is None else {case.name: written.tips[case.prompts] for case in cases}
    failures += [wrong_integers(name, tip) for name, tip in tips.items() if tip.mean > MEAN_STEPS]
    if tips:
        share, most = max(t.share for t in tips.values()), max(t.most for t in tips.values())
        notes.append(
            f"lowered and canonical graph write other integers into the cache for up to {share:.1%}"
            f" of a case's keys and values, by up to {most} steps"
        )
    made = check_om(bundle)
    failures += [Failure(fault.what, fault.why, fault.next_step) for fault in made.faults]
    notes += made.notes()
    if not any(each.judged for each in comparisons if each.level != PIECES):
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


def _untold(case: str, done: int) -> None:
    """The progress of what is run to explain a failure."""


def _opened(bundle: Bundle, name: str, batch: int, written: Written | None) -> Decoder:
    """A level of the bundle by its name in the report."""
    if name == SAME_CACHE and written is not None:
        return Follower(bundle, batch, written)
    if name == "lowered" and written is not None:
        return Recorder(bundle, batch, written)
    if name == ROUNDED_WEIGHTS:
        return LanguageModel(
            bundle,
            "canonical",
            batch=batch,
            open_canonical=lambda: _with_rounded_weights(bundle),
        )
    level = cast("Level", name.removesuffix(UNROUNDED))
    if name == level:
        return LanguageModel(bundle, level, batch=batch)
    return LanguageModel(
        _with_a_float_cache(bundle),
        level,
        batch=batch,
        open_session=lambda bucket: _without_rounding(bundle, bucket),
        open_canonical=lambda: _without_rounding(bundle, None),
        chunks=LanguageModel(bundle, "lowered", batch=batch).chunk_sizes,
    )


def _pairs(name: str, done: Iterable[str]) -> list[tuple[str, str]]:
    """The levels and references to compare when `name` has run, the last of those that are done."""
    names = list(done)
    if names[-1] != name:
        return []
    if name == SAME_CACHE:
        return [("lowered", name)]
    unrounded = name.endswith(UNROUNDED)
    before = [each for each in names[:-1] if each != SAME_CACHE]
    # Between a level with a rounding and one without it, the rounding is no more than noise.
    return [(name, each) for each in before if each.endswith(UNROUNDED) == unrounded]


def _judged(level: str, reference: str, *, quantized: bool, rounds: bool) -> bool:
    if level.endswith(UNROUNDED) or reference == SAME_CACHE:
        return True
    return not rounds and not (quantized and reference == EXPORT)


def _without_rounding(bundle: Bundle, bucket: Bucket | None) -> Session:
    """A bucket's graph, or the canonical one."""
    path = bundle.canonical if bucket is None else bundle.graph(bucket)
    try:
        if bucket is not None:
            session = open_twin(bundle, bucket, rounding=False)
        else:
            model = without_rounding(ir.load(path))
            session = OrtSession(model, name=f"{path.name}{UNROUNDED}")
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


def _with_rounded_weights(bundle: Bundle) -> OrtSession:
    model = with_rounded_weights(ir.load(bundle.canonical), bundle.manifest.dtype)
    return OrtSession(model, name=f"{bundle.canonical.name}, {ROUNDED_WEIGHTS}")


def _with_a_float_cache(bundle: Bundle) -> Bundle:
    """The bundle as its graphs without rounding are: an int8 cache holds floats."""
    manifest = bundle.manifest
    # The reference of a GE graph keeps what is between two integers in float32.
    floats = manifest.dtype if manifest.front == "onnx" else "float32"

    def wide(specs: Sequence[TensorSpec]) -> tuple[TensorSpec, ...]:
        return tuple(
            dataclasses.replace(spec, dtype=floats) if spec.dtype == "int8" else spec
            for spec in specs
        )

    buckets = [
        dataclasses.replace(bucket, inputs=wide(bucket.inputs), outputs=wide(bucket.outputs))
        for bucket in manifest.buckets
    ]
    wide_manifest = dataclasses.replace(manifest, buckets=tuple(buckets))
    return dataclasses.replace(bundle, manifest=wide_manifest)
