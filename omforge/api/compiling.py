"""From a model or an export to a bundle, as `omforge compile` does it."""

from __future__ import annotations

import contextlib
import functools
import os
import tempfile
from collections.abc import Generator, Mapping, Sequence
from pathlib import Path
from typing import Literal

from omforge import ir
from omforge.api.bundle import Bundle
from omforge.api.models import ModelLike, load
from omforge.atc.build import BuildOptions
from omforge.atc.command import AtcOptions
from omforge.bundle.source import Source
from omforge.compilation.compare_feeds import make_feeds
from omforge.compilation.compile import compile_bundle
from omforge.compilation.cpu import is_cpu, require_device
from omforge.compilation.insertion import parse_insertion
from omforge.compilation.options import CompileOptions, TaskOption
from omforge.compilation.quantize_options import KvDtype
from omforge.compilation.work import Progress
from omforge.ir.floats import FloatName
from omforge.ir.fronts import Front
from omforge.lowering.facts_file import target_with
from omforge.planning.chosen import UNIT
from omforge.planning.lengths import Lengths, read_lengths
from omforge.planning.stage import REST, PlanRequest
from omforge.rewriting.instruments import CompareEach, Instrument, VerifyEach

GRAPH, WEIGHTS = "exported.onnx", "exported.data"
"""What a bundle that is made from memory holds of the export, to be verified against."""


def compile(
    source: ModelLike,
    *,
    target: str,
    output: str | os.PathLike[str],
    task: TaskOption = "auto",
    context: int | None = None,
    prefill: Sequence[int] = (),
    batch: int = 1,
    dtype: FloatName | Literal["auto"] = "auto",
    layout: Literal["auto", "stacked", "per-layer"] = "auto",
    front: Front | Literal["auto"] = "auto",
    facts: str | os.PathLike[str] | None = None,
    allow_partial: bool = False,
    gears: bool = False,
    quantize: str = "",
    kv_dtype: KvDtype = "fp16",
    calibration: str | os.PathLike[str] | None = None,
    budget: str = "",
    memory: str = "",
    plan: Literal["", "auto"] = "",
    lengths: str | os.PathLike[str] | None = None,
    graphs: int = 4,
    encoder_length: int | None = None,
    form: Mapping[str, str] | Sequence[tuple[str, str]] = (),
    insert_pass: Sequence[str] = (),
    atc: str = "auto",
    atc_flag: Sequence[str] = (),
    atc_jobs: int = 0,
    atc_cache: bool = True,
    compare_each: bool = False,
    assets: str | os.PathLike[str] | None = None,
    instruments: Sequence[Instrument] | None = None,
    progress: Progress | None = None,
) -> Bundle:
    """Compile a model or an export for one SoC into a bundle folder, whole or not at all.

    Names and defaults are those of the command line's options; `omforge compile --help` says more.

    Args:
        source: A path to an export, or a model in memory as `load` takes it. The bundle of the
            latter holds a copy of it, which `verify` compares with.
        target: The SoC: the value of atc's --soc_version; or `cpu`, for ONNX Runtime here.
        output: The bundle's folder; one that is there is replaced when the new one is complete.
        task: `generate`, `encode`, or what the graph says.
        context: Tokens that a sequence may hold, C.
        prefill: Lengths S of the prefill buckets.
        batch: Rows B of every bucket.
        dtype: Of the lowered graphs; `auto`: fp16, and fp32 for the CPU.
        layout: Of the cache: one tensor, or two for each layer.
        front: What atc is given: ONNX graphs, or GE graphs (.air), which may write the cache;
            `auto`: ONNX, until `facts` show that the device does.
        facts: What `omforge probe` saw: a file. It goes before what tables infer.
        allow_partial: Go on although blocks were not raised.
        gears: One graph for all buckets, their lengths its gears.
        quantize: How weights are stored: `int8`, `int4:g32`, `w8a8`; "" for floats.
        kv_dtype: Of the cache.
        calibration: A text, or token numbers as .npy, for what needs one.
        budget: Bytes of a graph's constants, such as `3.9GiB`; `rest` is what `memory` leaves.
        memory: What the device has, such as `6GiB`: what takes more is refused ahead of the work.
        plan: `auto` chooses prefill lengths for the prompts in `lengths`.
        lengths: A file of prompts' lengths, a number a line; a second one is the answer's.
        graphs: How many graphs a plan may have.
        encoder_length: Of the encoder's states that a decoder attends to.
        form: Operator and the form that it is lowered to.
        insert_pass: Passes of one's own: `after=fuse-swish:my-pass`.
        atc: `auto`, `sim`, `none` or a path.
        atc_flag: Further flags for atc.
        atc_jobs: Compilations at a time; 0: as memory allows.
        atc_cache: Take and keep what atc made before.
        compare_each: Run the model on the CPU before and after each pass.
        assets: Of a model in memory, the folder of its config.json and tokenizer.
        instruments: What watches the passes instead of the verifier.
        progress: Told the step's name, steps done and steps in all.

    Raises:
        InputError: The source, the target or an option is wrong.
        CheckError: Coverage is not complete, a lowered graph has illegal nodes, or atc refuses one.
    """
    wanted = _wanted(plan, lengths, prefill)
    asked = PlanRequest(memory, wanted, graphs, budget)
    if wanted is not None and wanted.steps and context is None:
        context = -(-wanted.longest // UNIT) * UNIT
    soc = target_with(target, facts)
    if memory or plan:
        require_device(soc, "--plan" if plan else "--memory")
    known = soc.facts
    build = BuildOptions(atc, atc_jobs) if atc_cache else BuildOptions(atc, atc_jobs, cache=None)
    options = CompileOptions(
        soc=target,
        task=task,
        context=context,
        prefill=tuple(prefill),
        batch=batch,
        dtype=dtype if dtype != "auto" else "fp32" if is_cpu(soc) else "fp16",
        layout=layout,
        front=known.front if front == "auto" else front,
        facts=known,
        allow_partial=allow_partial,
        gears=gears,
        forms=tuple(dict(form).items()),
        quantize=quantize,
        kv_dtype=kv_dtype,
        calibration=None if calibration is None else Path(os.fspath(calibration)),
        budget="" if budget == REST else budget,
        encoder_length=encoder_length,
        insert=tuple(map(parse_insertion, insert_pass)),
        atc=AtcOptions(extra=tuple(atc_flag)),
        build=build,
    )
    watch: list[Instrument] = [VerifyEach()] if instruments is None else list(instruments)
    if compare_each:
        watch.append(CompareEach(functools.partial(make_feeds, longest=context or 2048)))
    folder = Path(os.fspath(output))
    with _on_disk(source, folder, assets) as found:
        made = compile_bundle(
            found,
            folder,
            options,
            stages=asked.stages(),
            instruments=watch,
            progress=progress,
        )
    return Bundle.opened(made.folder, made)


def _wanted(
    plan: str, lengths: str | os.PathLike[str] | None, prefill: Sequence[int]
) -> Lengths | None:
    """The prompts to choose prefill lengths for; None where they are not to be chosen."""
    if plan not in ("", "auto"):
        raise ir.InputError(f"--plan {plan}", "it is auto or absent", "Write --plan auto")
    if lengths is None and plan:
        raise ir.InputError(
            "--plan auto without --lengths",
            "prefill lengths are chosen for the prompts that come",
            "Give --lengths FILE, a number of tokens a line",
        )
    if lengths is not None and not plan:
        raise ir.InputError(
            f"--lengths {lengths} without --plan auto", "nothing is chosen", "Add --plan auto"
        )
    if plan and prefill:
        raise ir.InputError(
            "--plan auto with --prefill", "either chooses the lengths", "Leave one of them away"
        )
    return None if lengths is None else read_lengths(lengths)


@contextlib.contextmanager
def _on_disk(
    source: ModelLike, output: Path, assets: str | os.PathLike[str] | None
) -> Generator[str | Path | Source]:
    """A path as it is; a model in memory as files beside the bundle, which moves them into it."""
    if isinstance(source, str | os.PathLike):
        if assets is not None:
            raise ir.InputError(
                "assets is for a model in memory", "that of a path is its folder", "Leave it away"
            )
        yield Path(os.fspath(source))
        return
    model = load(source)
    try:
        output.absolute().parent.mkdir(parents=True, exist_ok=True)
        made = tempfile.TemporaryDirectory(dir=output.absolute().parent, prefix=".omforge-")
    except OSError as error:
        raise ir.InputError(
            f"cannot write beside {output}",
            error.strerror or str(error),
            "Choose an output in a folder that can be written",
        ) from error
    with made as scratch:
        graph = Path(scratch) / GRAPH
        ir.save(model, graph, external=WEIGHTS)
        beside = Path(scratch) if assets is None else Path(os.fspath(assets))
        yield Source(graph, beside, carried=(GRAPH, WEIGHTS))
