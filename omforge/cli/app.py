"""The command line: `omforge compile | build | run | opt | check | explain | verify | …`.

Every command is a thin call into the rooms; what it prints is made in `reports`. Imports of the
rooms are inside the commands, so that `omforge --help` answers at once.

Exit status: 0 done, 1 a check failed, 2 wrong usage or input, 130 interrupted, 141 when the reader
of its output has gone.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import typer

import omforge
from omforge.cli import console
from omforge.cli.command_group import Commands
from omforge.cli.ge_graph import air
from omforge.cli.guard import guarded
from omforge.cli.options import (
    Atc,
    AtcCached,
    AtcFlags,
    AtcJobs,
    AtcWords,
    Backend,
    Batch,
    BisectLimit,
    BisectRewrites,
    Budget,
    BundleFolder,
    Calibration,
    CheckHashes,
    CompareEach,
    Context,
    Dtype,
    EncoderLength,
    Facts,
    Forms,
    Front,
    Gears,
    Give,
    Graphs,
    InsertPass,
    Json,
    KvDtype,
    Layout,
    Lengths,
    MaxIncrease,
    MaxKl,
    Memory,
    Model,
    Pair,
    PlanHow,
    Prefill,
    PrintAfter,
    PrintAfterChanged,
    Quality,
    QualityPieces,
    QualityText,
    Quantize,
    ReportFile,
    Reproducer,
    Save,
    Soc,
    Task,
    Time,
    Trust,
    Verbose,
    VerifyEach,
    WhyFront,
    build_options,
    forms,
    numbers,
)
from omforge.cli.plan import plan as plan_command
from omforge.cli.probe import probe
from omforge.cli.watch import WatchFlags, comparer, export_comparison, watch

app = typer.Typer(
    name="omforge",
    cls=Commands,
    help=(
        "Rewrite exported LLM graphs (ONNX) into what Ascend's ATC compiler accepts, "
        "and prove that nothing changed."
    ),
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # boxes are for terminals, and help is piped into pagers
)


def _version(on: bool) -> None:
    if on:
        console.show(f"omforge {omforge.__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_version, is_eager=True, help="Show the version."),
    ] = False,
) -> None:
    """Options ahead of the command."""


@app.command("compile")
@guarded
def compile_(
    source: Annotated[
        Path,
        typer.Argument(metavar="SOURCE", help="An export's folder, or its .onnx file."),
    ],
    target: Soc,
    output: Annotated[Path, typer.Option("--output", "-o", help="The bundle's folder.")],
    task: Task = "auto",
    encoder_length: EncoderLength = None,
    context: Context = None,
    prefill: Prefill = "",
    batch: Batch = 1,
    dtype: Dtype = "auto",
    front: Front = "auto",
    facts: Facts = None,
    layout: Layout = "auto",
    allow_partial: Annotated[
        bool, typer.Option("--allow-partial", help="Go on although blocks were not raised.")
    ] = False,
    gears: Gears = False,
    quantize: Quantize = "",
    kv_dtype: KvDtype = "fp16",
    calibration: Calibration = None,
    budget: Budget = "",
    memory: Memory = "",
    plan: PlanHow = "",
    lengths: Lengths = None,
    graphs: Graphs = 4,
    form: Forms = None,
    insert_pass: InsertPass = None,
    atc: Atc = "auto",
    atc_flag: AtcFlags = None,
    atc_words: AtcWords = None,
    atc_jobs: AtcJobs = 0,
    atc_cache: AtcCached = True,
    print_after: PrintAfter = "",
    print_after_changed: PrintAfterChanged = False,
    verify_each: VerifyEach = True,
    timing: Time = False,
    bisect_limit: BisectLimit = None,
    bisect_rewrites: BisectRewrites = None,
    reproducer: Reproducer = None,
    compare_each: CompareEach = False,
    as_json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Compile an exported LLM for one SoC into a bundle."""
    from omforge.api.compiling import compile as compile_model
    from omforge.cli import reports
    from omforge.cli.facts import chosen_facts
    from omforge.passes import ALL_PASSES

    flags = WatchFlags(
        print_after,
        print_after_changed,
        verify_each,
        timing,
        bisect_limit,
        bisect_rewrites,
        reproducer,
        compare_each,
    )
    with console.progress() as bar:
        names = list(ALL_PASSES) if print_after else []  # plugins are not looked up for nothing
        watching = watch(flags, names, export_comparison(source, context), bar)
        bundle = compile_model(
            source,
            target=target,
            output=output,
            task=task,
            context=context,
            prefill=numbers(prefill, "--prefill"),
            batch=batch,
            dtype=dtype,
            layout=layout,
            front=front,
            facts=chosen_facts(facts, target),
            allow_partial=allow_partial,
            gears=gears,
            quantize=quantize,
            kv_dtype=kv_dtype,
            calibration=calibration,
            budget=budget,
            memory=memory,
            plan=plan,
            lengths=lengths,
            graphs=graphs,
            encoder_length=encoder_length,
            form=forms(form),
            insert_pass=insert_pass or (),
            atc=atc,
            atc_flag=(*(atc_flag or ()), *(atc_words or ())),
            atc_jobs=atc_jobs,
            atc_cache=atc_cache,
            instruments=watching.instruments,
            progress=bar,
        )
    result = bundle.compiled
    assert result is not None
    if as_json:
        console.show_json(reports.compiled_json(result, watching.remark))
    else:
        reports.show_compiled(result, source, output, watching.remark)
        if timing:
            watching.show_time()


@app.command()
@guarded
def build(
    bundle: BundleFolder,
    atc: Atc = "auto",
    atc_jobs: AtcJobs = 0,
    atc_cache: AtcCached = True,
    trust: Trust = False,
    as_json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Run atc on those graphs of a bundle that have no .om yet."""
    from omforge.atc.build import build_bundle

    with console.progress() as bar:
        made = build_bundle(bundle, build_options(atc, atc_jobs, atc_cache, trusted=trust), bar)
    if as_json:
        console.show_json({"om": made})
    else:
        console.show("\n".join(f"{name}  {om}" for name, om in made.items()))


_GENERATING = ("chat", "max_new_tokens", "temperature", "top_k", "top_p", "seed")
"""Parameters of `run` that say nothing where a text is encoded."""


def _given(context: typer.Context, parameters: Sequence[str]) -> list[str]:
    """The options among some parameters that are on the command line."""
    sources = {name: context.get_parameter_source(name) for name in parameters}
    return [
        f"--{name.replace('_', '-')}"
        for name, source in sources.items()
        if source is not None and source.name == "COMMANDLINE"
    ]


@app.command()
@guarded
def run(
    context: typer.Context,
    bundle: BundleFolder,
    prompt: Annotated[str, typer.Option(help="The text to continue, or to encode.")],
    pair: Pair = "",
    save: Save = None,
    chat: Annotated[bool, typer.Option("--chat", help="Take it as a message to answer.")] = False,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Stop after so many tokens.")] = 128,
    level: Annotated[
        Literal["lowered", "canonical"],
        typer.Option(help="The graphs that ATC compiles, or the one before lowering."),
    ] = "lowered",
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token.")] = 0.0,
    top_k: Annotated[int, typer.Option(help="Draw from the k likeliest tokens; 0: all.")] = 0,
    top_p: Annotated[float, typer.Option(help="Draw from the likeliest that add up to p.")] = 1.0,
    seed: Annotated[int, typer.Option(help="The same seed draws the same tokens.")] = 0,
    backend: Backend = "cpu",
    give: Give = None,
    facts: Facts = None,
    check: CheckHashes = True,
    as_json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Generate text from a bundle; it streams to stdout. Of an encoder: vectors and scores."""
    from omforge.cli import generated
    from omforge.cli.encoded import asks_to_encode, run_encoder
    from omforge.cli.facts import options_of_device
    from omforge.runtime.backends import open_model
    from omforge.runtime.bundle import Bundle
    from omforge.runtime.fixed import read_fixed
    from omforge.runtime.sampling import Sampling
    from omforge.runtime.text_stream import TextStream, chat_tokens

    sampling = Sampling(temperature, top_k, top_p, seed)
    with console.progress() as bar:
        opened = Bundle.open(bundle, verify_hashes=check, progress=bar)
        encodes = asks_to_encode(opened, pair, save, _given(context, _GENERATING))
        if bar is not None:
            bar("load the tokenizer", 0, 0)
        tokenizer = opened.tokenizer()
    ways = options_of_device(facts, opened.manifest, backend)
    if encodes:
        where = (level, backend, ways)
        run_encoder(opened, tokenizer, prompt, pair, where, save, give, as_json=as_json)
        return
    tokens = chat_tokens(tokenizer, prompt) if chat else tokenizer.encode(prompt)
    rows = opened.batches[0]
    with open_model(opened, level, batch=rows, backend=backend, options=ways) as model:
        model.give(read_fixed(opened.manifest.fixed, give))
        with console.progress() as bar:
            started = time.perf_counter()
            generation = model.generate(
                tokens, max_new_tokens=max_new_tokens, sampling=sampling, progress=bar
            )
            prefilled = time.perf_counter()
        text, interrupted = generated.stream_text(
            generation, TextStream(tokenizer, tokens), console.stream if not as_json else None
        )
    told = generated.Generated(
        prompt=prompt,
        text=text,
        level=level if backend == "cpu" else backend,
        prompt_tokens=len(tokens),
        tokens=tuple(generation.tokens),
        stopped="interrupted" if interrupted else str(generation.reason),
        prefill_seconds=prefilled - started,
        decode_seconds=time.perf_counter() - prefilled,
    )
    if as_json:
        console.show_json(told.to_dict())
    else:
        console.show()
        console.say(str(told))
    if interrupted:
        raise typer.Exit(130)


@app.command()
@guarded
def opt(
    model: Model,
    pipeline: Annotated[
        str,
        typer.Option(
            "--pipeline",
            "-p",
            help="Passes and pipelines by name: 'canonicalize,fuse-rms-norm'; see omforge passes.",
        ),
    ],
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", help="The .onnx file to write; - is stdout; none if absent."
        ),
    ] = None,
    print_after: PrintAfter = "",
    print_after_changed: PrintAfterChanged = False,
    verify_each: VerifyEach = True,
    timing: Time = False,
    bisect_limit: BisectLimit = None,
    bisect_rewrites: BisectRewrites = None,
    reproducer: Reproducer = None,
    compare_each: CompareEach = False,
    feeds: Annotated[
        Path | None,
        typer.Option(metavar="FILE.npz", help="Compare on these inputs, which --reproducer kept."),
    ] = None,
    as_json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Run passes on any ONNX model."""
    from omforge import ir
    from omforge.api.raising import Pipeline
    from omforge.cli import reports
    from omforge.cli.model_output import ModelOutput, wants_external

    steps = Pipeline.parse(pipeline)
    destination = ModelOutput(output)
    flags = WatchFlags(
        print_after,
        print_after_changed,
        verify_each,
        timing,
        bisect_limit,
        bisect_rewrites,
        reproducer,
        compare_each,
        feeds,
    )
    names = [step.name for step in steps.passes]
    loaded = ir.load(model)
    external = wants_external(loaded)
    with destination.alone(as_json=as_json):
        with console.progress() as bar:
            watching = watch(flags, names, lambda: comparer(loaded, 2048), bar)
            if bar is not None:
                bar("passes", 0, 0)
            result = steps.run(loaded, inplace=True, instruments=watching.instruments)
            if bar is not None and output is not None:
                bar(f"write {output.name}", 0, 0)
            destination.write(loaded, external=external)
        if as_json:
            console.show_json(reports.passes_json(result.passes, result.events, watching.remark))
            return
        reports.show_passes(result.passes, compared=flags.compares)
        reports.show_events(result.events)
        if watching.remark:
            console.show(watching.remark)
        if timing:
            watching.show_time()


@app.command()
@guarded
def check(
    model: Model,
    target: Soc,
    gears: Annotated[
        bool, typer.Option("--gears", help="Dynamic dims are meant for --dynamic_dims.")
    ] = False,
    allow: Annotated[
        list[str] | None,
        typer.Option(metavar="RULE", help="Only advise where this inferred rule is broken."),
    ] = None,
    all_places: Annotated[
        bool, typer.Option("--all-places", help="Name every place, not the first five.")
    ] = False,
    why: Annotated[
        bool,
        typer.Option(
            "--why",
            help="Of an export or a bundle: each operator's form, why, and the bytes it moves.",
        ),
    ] = False,
    form: Forms = None,
    front: WhyFront = None,
    facts: Facts = None,
    as_json: Json = False,
    verbose: Verbose = False,
) -> None:
    """List everything in a model, ONNX or .air, that ATC would refuse or get wrong."""
    from omforge.api.checking import check as check_model
    from omforge.cli.facts import chosen_facts
    from omforge.lowering.facts_file import target_with
    from omforge.lowering.legality import report

    known = chosen_facts(facts, target)
    if why:
        from omforge.compilation.cpu import require_device
        from omforge.compilation.why import explain_choices

        soc = target_with(target, known)
        require_device(soc, "check --why", "forms and bytes are those of NPU operators")
        graphs = explain_choices(model, soc, forms=dict(forms(form)), front=front)
        if as_json:
            console.show_json({"graphs": [graph.to_json() for graph in graphs]})
        else:
            console.show("\n".join(line for graph in graphs for line in graph.lines()))
        return
    checked = check_model(model, target, gears=gears, allow=allow or (), facts=known)
    if as_json:
        console.show_json(checked.to_json())
    else:
        console.show("\n".join(report.lines(checked.found, all_places=all_places)))
    if not checked.legal:
        raise typer.Exit(1)


@app.command()
@guarded
def explain(
    model: Model,
    pass_name: Annotated[
        str | None, typer.Option("--pass", help="Only what this pass left alone.")
    ] = None,
    layer: Annotated[int | None, typer.Option(help="Only what belongs to this layer.")] = None,
    at: Annotated[
        str | None, typer.Option(help="Only what is at nodes whose name holds this text.")
    ] = None,
    insert_pass: InsertPass = None,
    as_json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Say of each block of an exported LLM whether it is raised, and why not if it is not."""
    from omforge import ir
    from omforge.bundle.source import find_source
    from omforge.compilation.insertion import inserted, parse_insertion, pass_that_runs
    from omforge.ir.read_check import require_known_operators
    from omforge.passes import ALL_PASSES, make_pipeline
    from omforge.recognition.config import read_config
    from omforge.recognition.coverage import measure
    from omforge.recognition.explain import explain as put_together
    from omforge.rewriting.events import events
    from omforge.rewriting.instruments import VerifyEach
    from omforge.rewriting.pipeline import Pipeline
    from omforge.rewriting.reproducer import Reproducer

    (steps,) = inserted(
        tuple(map(parse_insertion, insert_pass or ())), make_pipeline("raise").passes
    )
    if pass_name is not None:
        pass_name = pass_that_runs(pass_name, steps)
    source = find_source(model)
    loaded = ir.load(source.graph)
    require_known_operators(source.graph, loaded)
    Pipeline(steps).run(loaded, [Reproducer(registry=ALL_PASSES), VerifyEach()])
    coverage = measure(loaded, read_config(source.folder))
    told = put_together(coverage, events(loaded), pass_name=pass_name, layer=layer, at=at)
    if as_json:
        console.show_json(told.to_json())
    else:
        console.show("\n".join(told.lines()))
    if not coverage.complete:
        raise typer.Exit(1)


@app.command()
@guarded
def verify(
    bundle: BundleFolder,
    source: Annotated[
        Path | None,
        typer.Option(help="The export; where it was when the bundle was built, if absent."),
    ] = None,
    steps: Annotated[int, typer.Option(min=0, help="Decode steps behind each prompt.")] = 8,
    quality: Quality = None,
    text: QualityText = None,
    pieces: QualityPieces = 8,
    max_kl: MaxKl = None,
    max_perplexity_increase: MaxIncrease = None,
    report_file: ReportFile = None,
    as_json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Compare a bundle with the export that it was made from: logits and tokens, by level.

    Quantised weights are judged by what lowering makes of them; what they lost is the quality.
    """
    from omforge.api.bundle import Bundle
    from omforge.bundle.source import find_source
    from omforge.cli import verified

    with console.progress() as bar:
        opened = Bundle.open(bundle, remembered=False, progress=bar)
        graph = find_source(source).graph if source is not None else None
        report = opened.verify(graph, steps=steps, progress=bar).report
        asked = verified.QualityAsked(quality, text, pieces, max_kl, max_perplexity_increase)
        measured = verified.measured(opened.inner, graph, asked, bar)
    verified.tell_verified(report, measured, report_file, as_json=as_json)
    if not report.ok or (measured is not None and not measured.ok):
        raise typer.Exit(1)


@app.command()
@guarded
def om(
    file: Annotated[Path, typer.Argument(metavar="FILE.om", help="What atc made.")],
    as_json: Json = False,
) -> None:
    """Show an .om file's partitions, inputs, outputs and gears."""
    from omforge.om import read_om
    from omforge.om.report import lines

    found = read_om(file)
    if as_json:
        console.show_json(found.to_dict())
    else:
        console.show("\n".join(lines(found)))


@app.command()
@guarded
def passes(as_json: Json = False, verbose: Verbose = False) -> None:
    """List the passes with their options, the pipelines, and what other packages add."""
    from omforge.cli.registry import registry_json, show_registry

    if as_json:
        console.show_json(registry_json())
    else:
        show_registry()


app.command()(guarded(probe))
app.command("plan")(guarded(plan_command))


def main() -> None:
    """Run the command line; `omforge.cli.entry` calls it."""
    console.end_in_order()
    console.quieten()
    console.collect_seldom()
    console.return_large_blocks()
    app()


app.command("air")(guarded(air))
