"""From an export to a bundle: raise, give the cache its capacity, bind buckets, lower, write."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy.typing as npt

from omforge import __version__, ir
from omforge.atc.build import BuildOptions, build_om
from omforge.atc.cache import AtcCache
from omforge.atc.command import AtcOptions, atc_command, check_path, compile_script
from omforge.atc.find import choose_atc
from omforge.bundle import manifest as m
from omforge.bundle.destination import destination_of
from omforge.bundle.source import find_source
from omforge.compilation.activation_options import atc_for_int8
from omforge.compilation.context import choose_context, choose_prefill
from omforge.compilation.export_interface import encode_export, tensor_spec
from omforge.compilation.first_step import choose_graph, described
from omforge.compilation.footprint import Footprint, check_budget, spare_bytes
from omforge.compilation.integer_exports import require_float_products
from omforge.compilation.memory import memory_passes
from omforge.compilation.model_facts import (
    cache_sizes,
    embeddings_of,
    encode_facts,
    fixed_inputs,
    generate_facts,
    kv_cache,
    mask_specs,
    no_cache,
    output_specs,
    query_heads,
    state_specs,
    token_inputs,
)
from omforge.compilation.quantize_options import (
    KvDtype,
    QuantizeOptions,
    check_quantize,
    check_stored,
    kv_passes,
    measure_quantization,
    parse_quantize,
    quantization_json,
    read_calibration,
    turn_weights,
    weight_passes,
)
from omforge.compilation.report import write_report
from omforge.compilation.steps import Progress, Steps
from omforge.compilation.task import TaskOption, encode_options, encode_passes, find_task
from omforge.ir.digests import known_sha256
from omforge.ir.dims import evaluate, substitute
from omforge.ir.folders import MadeFolder
from omforge.ir.infer import dims, infer_model, to_shape
from omforge.ir.weights import WeightWriter, writing
from omforge.lowering.legality import check_legal
from omforge.lowering.legalize import check_forms, legalize
from omforge.lowering.legalize.choices import choices
from omforge.lowering.target import Target, target
from omforge.passes import PassRun, make_pipeline
from omforge.passes.add_past import AddPast
from omforge.passes.bind_choices import BindChoices
from omforge.passes.bind_shapes import BindShapes
from omforge.passes.convert_precision import ConvertPrecision
from omforge.passes.fuse_kv_io import FuseKvIo
from omforge.passes.grow_static_cache import require_growing_cache
from omforge.passes.last_token_logits import LastTokenLogits
from omforge.passes.raise_contrib_ops import RaiseContribOps
from omforge.passes.tabulate_rotary import TabulateRotary
from omforge.passes.text_positions import TextPositions
from omforge.quantization.linear import find_linears, stored_as_integers
from omforge.quantization.report import BudgetPlan, budget_plan
from omforge.recognition.config import read_config
from omforge.recognition.coverage import Coverage, measure
from omforge.recognition.feeds import weight_bytes
from omforge.recognition.interface import cache_layers, find_interface
from omforge.recognition.lengths.bounds import Bound, config_bounds, find_bounds
from omforge.recognition.lengths.call_limit import find_call_limit
from omforge.recognition.lengths.choices import tied_rows
from omforge.rewriting.base import Pass
from omforge.rewriting.events import Event, events, record
from omforge.rewriting.instruments import Instrument, VerifyEach
from omforge.rewriting.pipeline import Pipeline
from omforge.rewriting.schema import CONTRIB_DOMAIN

Array = npt.NDArray[Any]

MASK_VALUE = -30000.0
"""Finite in float16 even when a score is added, and so far below any score that its exp is 0."""

CANONICAL, WEIGHTS, REPORT, SCRIPT = "canonical.onnx", "weights.bin", "report.json", "compile.sh"


@dataclass(frozen=True)
class CompileOptions:
    """What the caller chooses.

    Attributes:
        soc: Value of atc's --soc_version.
        task: What the model is for; `auto` is what its graph says.
        context: Tokens that a sequence may hold, C; if None the least of 2,048, what the model's
            configuration says and what its graph bounds it to.
        prefill: Lengths S of the prefill buckets; of a model without a cache, of all of them.
        batch: Rows B of every bucket.
        dtype: Dtype of the lowered graphs.
        layout: Of the cache; `auto` is the one that moves the fewest bytes, which is per-layer:
            atc copies a stacked cache once a step to take it apart (see `legalize.choices`).
        allow_partial: Go on although blocks were not raised.
        gears: One lowered graph whose `seq` is open, for all buckets: atc compiles it once, with
            the buckets' lengths as gears (--dynamic_dims), so that they share weights.
        forms: Operator and form, for what `legalize` shall not choose by bytes.
        quantize: How weights are stored, as `quantize_options` reads it; "" for floats.
        kv_dtype: Of the cache; fp16 is the graphs' own dtype.
        calibration: A text, or token numbers as .npy, for what needs one.
        budget: Bytes of all constants of a lowered graph, such as 3.9GiB: some layers then get more
            bits than `quantize` says. "" for none.
        memory: Length of the encoder's states that a decoder attends to; None: what the export or
            its config.json says.
        atc: Flags of atc that may be chosen.
        build: Which atc is run, and how.
    """

    soc: str
    task: TaskOption = "auto"
    context: int | None = None
    prefill: tuple[int, ...] = ()
    batch: int = 1
    dtype: Literal["fp16", "fp32"] = "fp16"
    layout: Literal["auto", "stacked", "per-layer"] = "auto"
    allow_partial: bool = False
    gears: bool = False
    forms: tuple[tuple[str, str], ...] = ()
    quantize: str = ""
    kv_dtype: KvDtype = "fp16"
    calibration: str | Path | None = None
    budget: str = ""
    memory: int | None = None
    atc: AtcOptions = field(default_factory=AtcOptions)
    build: BuildOptions = field(default_factory=BuildOptions)


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
    source: str | Path,
    output: str | Path,
    options: CompileOptions,
    *,
    instruments: Sequence[Instrument] | None = None,
    progress: Progress | None = None,
) -> CompileResult:
    """Compile an export for one SoC into a bundle folder, whole or not at all.

    Where atc is installed it is run on every bucket, once the bundle is complete.

    Args:
        source: The export's folder or .onnx file.
        output: The bundle's folder; one that is there is replaced when the new one is complete.
        options: What to make.
        instruments: What watches the passes; the verifier alone if None.
        progress: Told the step's name, steps done and steps in all.

    Raises:
        InputError: The source, the target or an option is wrong.
        CheckError: Coverage is not complete, a lowered graph has illegal nodes, or atc refuses one.
    """
    found = find_source(source)
    soc = target(options.soc)
    destination = destination_of(Path(output))
    config = read_config(found.folder)
    told_bounds = config_bounds(config)
    # What config.json rules out is refused before anything is done, the rest when it is known.
    wanted = _with_defaults(options, told_bounds)
    check_forms(dict(options.forms))
    options.atc.words()  # refuses a wrong flag before anything is done
    scheme = _quantize(options, soc)
    if scheme is not None and scheme.activations is not None:
        options = dataclasses.replace(options, atc=atc_for_int8(options.atc))
    tokens = read_calibration(options.calibration, found.folder)
    program = choose_atc(options.build.atc)
    if program is not None:
        check_path("bundle", str(destination.resolve()))  # now, not once all is made
    watch = (VerifyEach(),) if instruments is None else instruments
    steps = Steps(progress, 4 + 2 * len(_plan(wanted)))

    steps.begin("load")
    chosen = choose_graph(found, config)
    model = chosen.model
    require_float_products(model, found.graph)
    nodes = {"exported": model.graph.num_nodes()}
    steps.begin("raise")
    text_only = Pipeline((TextPositions(),)).run(model, watch).passes
    passes = [run for run in text_only if run.rewrites]
    passes += make_pipeline("canonicalize").run(model, watch).passes
    require_growing_cache(model)
    bounds = (*told_bounds, *find_bounds(model, wanted.context or 0))
    given, context = options, choose_context(options.context, bounds)
    call = find_call_limit(model, context)
    options = _with_defaults(options, bounds, call)
    if call is not None and not given.prefill:
        record(
            model, "compile", "the prefill bucket", f"at most {call.tokens}: {call.why}", done=True
        )
    buckets = _plan(options)
    if options.batch > 1 and (why := tied_rows(model, options.context or 0)):
        raise ir.CheckError(
            f"{options.batch} rows cannot be served together",
            why,
            "Compile with --batch 1, or export a model whose rows do not depend on each other",
        )
    bind = BindChoices(options.context or 0)
    fuse = (bind, *make_pipeline("fuse").passes, *([AddPast()] if chosen.past_is_missing else []))
    passes += Pipeline(fuse).run(model, watch).passes
    nodes["raised"] = model.graph.num_nodes()
    _require_standard(model)
    find_interface(model)  # what the graph is not is said before what was not raised of it
    coverage = measure(model, config)
    if not coverage.complete and not options.allow_partial:
        raise ir.CheckError(
            "coverage is not complete",
            "; ".join(coverage.problems()),
            "`omforge explain` says what stopped each; --allow-partial goes on regardless",
        )
    task = find_task(model, options.task)
    encode = task == "encode"
    if encode:
        options = encode_options(given, bounds)
        buckets = _encode_plan(options)
        steps.expect(4 + 2 * len(buckets))
    given_length = memory_passes(model, options.memory, config, found)
    passes += Pipeline(given_length).run(model, watch).passes
    stored = stored_as_integers(model)
    check_stored(stored, soc, options.dtype)
    export = encode_export(model, found) if encode else described(model, chosen, found)
    export = dataclasses.replace(export, longest_call=None if call is None else call.tokens)
    layers = () if encode else cache_layers(model, find_interface(model))
    sizes = cache_sizes(layers)
    heads = query_heads(layers, config, sizes)
    matrices = len(find_linears(model)) if scheme is not None else 0
    reading = [n * (1 + len(layer.sharers)) for n, layer in zip(heads, layers, strict=True)]
    spare = spare_bytes(options.kv_dtype, reading, sizes)
    footprint = _footprint(options, soc, buckets[-1], spare)
    serve = (
        *weight_passes(
            scheme,
            soc,
            tokens,
            steps.meter("quantise weights"),
            budget=options.budget,
            footprint=footprint,
            stored=bool(stored),
        ),
        *(
            encode_passes(options.context or 0)
            if encode
            else _generate_passes(options, tokens, steps)
        ),
    )
    passes += Pipeline(serve).run(model, watch).passes
    nodes["canonical"] = model.graph.num_nodes()
    told = events(model)

    facts = (
        encode_facts(model, config, bounds)
        if encode
        else generate_facts(model, config, bounds, sizes, heads[0])
    )
    kv = no_cache(_float(options))
    if not encode:
        stored_as = _float(options) if options.kv_dtype == "fp16" else "int8"
        kv = kv_cache(model, sizes, capacity=options.context or 0, dtype=stored_as)
    embeddings = embeddings_of(model)
    by_token, fixed = token_inputs(model), fixed_inputs(model, _float(options))
    results = output_specs(model, _float(options)) if encode else ()
    with writing(destination):
        destination.parent.mkdir(parents=True, exist_ok=True)
    with MadeFolder(destination) as folder:
        with WeightWriter(folder / WEIGHTS) as writer:
            steps.begin("write canonical.onnx")
            ir.save(model, folder / CANONICAL, writer=writer)
            steps.begin("convert precision")
            passes += Pipeline((ConvertPrecision(options.dtype),)).run(model, watch).passes
            made: list[m.Bucket] = []
            graph_bytes = 0
            for plan in buckets:
                full = _bucket_name(plan.name, options, task)
                steps.begin(f"lower {full}")
                lowered = model.clone()
                sizes = BindShapes(options.batch, plan.bound, options.context or 0)
                runs = Pipeline((sizes,)).run(lowered, watch).passes
                passes += runs if plan is buckets[-1] else ()
                legalize(lowered, soc, gears=plan.symbols, forms=dict(options.forms))
                for seq in plan.gears or (plan.seq,):
                    _require_legal(at_gear(lowered, seq), soc, full)
                nodes[full] = lowered.graph.num_nodes()
                steps.begin(f"write {full}.onnx")
                ir.save(lowered, folder / f"{full}.onnx", writer=writer)
                made.append(_bucket(lowered, full, plan, options, soc))
                graph_bytes = weight_bytes(lowered)
            check_budget(options.budget, graph_bytes, made[-1].name)
            writer.close()
        told += tuple(
            Event("compile", f"tensor {name}", f"it holds {what}")
            for name, what in writer.nonfinite.items()
        )
        for file in found.companions():
            with writing(destination / file.name):
                shutil.copyfile(file, folder / file.name)
        with writing(destination / SCRIPT):
            script = compile_script([b.command for b in made])
            (folder / SCRIPT).write_text(script, encoding="utf-8")
            (folder / SCRIPT).chmod(0o755)
        quantized = quantization_json(model)
        write_report(folder / REPORT, passes, nodes, coverage, told, bounds, quantized)
        written = m.Manifest(
            schema_version=m.SCHEMA_VERSION,
            omforge=__version__,
            target=soc.soc_version,
            dtype=_float(options),
            batch=options.batch,
            context=options.context or 0,
            model=facts,
            kv=kv,
            masks=mask_specs(model),
            mask_value=MASK_VALUE,
            buckets=tuple(made),
            canonical=CANONICAL,
            weights=WEIGHTS,
            export=export,
            files={
                file.name: known_sha256(file) for file in sorted(folder.iterdir()) if file.is_file()
            },
            coverage=coverage.to_json(),
            states=state_specs(model),
            quantization=measure_quantization(model, scheme, matrices, made[-1], graph_bytes),
            task=task,
            token_inputs=by_token,
            fixed=fixed,
            outputs=results,
            embeddings=embeddings,
        )
        written.save(folder / m.FILE_NAME)
    if program is not None:
        cache = None if options.build.cache is None else AtcCache(options.build.cache)
        jobs = options.build.jobs
        written = build_om(destination, program, progress, jobs=jobs, cache=cache, trusted=True)
    plan = budget_plan(model)
    wrong = dict(writer.nonfinite)
    return CompileResult(destination, written, coverage, passes, nodes, told, plan, bounds, wrong)


@dataclass(frozen=True)
class _Plan:
    """A graph to lower: its name, its length S (the largest), and its gears."""

    name: str
    seq: int
    gears: tuple[int, ...] = ()

    @property
    def kind(self) -> Literal["prefill", "decode", "gears", "encode"]:
        """What the manifest says that it is."""
        if self.name.startswith("encode"):
            return "encode"
        return "gears" if self.gears else "decode" if self.seq == 1 else "prefill"

    @property
    def bound(self) -> int:
        """What bind-shapes takes: 0 leaves the length open."""
        return 0 if self.gears else self.seq

    @property
    def symbols(self) -> dict[str, tuple[int, ...]]:
        return {"seq": self.gears} if self.gears else {}


def _plan(options: CompileOptions) -> list[_Plan]:
    if options.gears:
        return [_Plan("gears", max(options.prefill), (1, *options.prefill))]
    return [*(_Plan(f"prefill_s{s}", s) for s in options.prefill), _Plan("decode", 1)]


def _encode_plan(options: CompileOptions) -> list[_Plan]:
    """One graph for each length, or one for all where there are several."""
    if options.gears and len(options.prefill) > 1:
        return [_Plan("encode_gears", max(options.prefill), options.prefill)]
    return [_Plan(f"encode_s{length}", length) for length in options.prefill]


def _generate_passes(
    options: CompileOptions, tokens: tuple[Array, ...], steps: Steps
) -> tuple[Pass, ...]:
    """What gives the cache its capacity."""
    return (
        LastTokenLogits(),
        FuseKvIo(options.layout),
        *kv_passes(
            options.kv_dtype,
            tokens,
            options.context or 0,
            steps.meter("measure the cache", "tensors"),
        ),
        TabulateRotary(options.context or 0),
    )


def at_gear(model: ir.Model, seq: int) -> ir.Model:
    """Return a lowered graph with a number for `seq`; the graph itself where it is static."""
    bound = {"seq": seq}
    if all(isinstance(dim, int) for value in model.graph.inputs for dim in dims(value) or ()):
        return model
    twin = model.clone()
    for value in twin.graph.inputs:
        value.shape = to_shape([substitute(dim, bound) for dim in dims(value) or ()])
    infer_model(twin)
    return twin


def _with_defaults(
    options: CompileOptions, bounds: Sequence[Bound], call: Bound | None = None
) -> CompileOptions:
    context = choose_context(options.context, bounds)
    prefill = choose_prefill(options.prefill, context, call)
    if options.batch < 1:
        raise ir.InputError(f"a batch of {options.batch} makes no sense", "it must be 1 or more")
    layout = options.layout
    if layout == "auto" and cheapest_layout() == "per-layer":
        layout = "per-layer"  # else fuse-kv-io stacks the layers' caches if they are alike
    return dataclasses.replace(options, context=context, prefill=prefill, layout=layout)


def cheapest_layout() -> Literal["stacked", "per-layer"]:
    """The layout that the table of choices prefers."""
    return "stacked" if choices("cache")[0].form == "stacked" else "per-layer"


def _bucket_name(name: str, options: CompileOptions, task: m.Task) -> str:
    batch = f"_b{options.batch}" if options.batch > 1 else ""
    capacity = f"_c{options.context}" if task == "generate" else ""
    return f"{name}{capacity}{batch}"


def _quantize(options: CompileOptions, soc: Target) -> QuantizeOptions | None:
    """How weights are stored; what the SoC cannot do is refused before anything is done."""
    scheme = parse_quantize(options.quantize)
    check_quantize(
        scheme,
        options.kv_dtype,
        soc,
        dtype=options.dtype,
        calibration=options.calibration is not None,
        gears=options.gears,
        budget=options.budget,
    )
    return scheme


def _footprint(options: CompileOptions, soc: Target, plan: _Plan, spare: int) -> Footprint:
    """What counts the constants of the graph that `plan` says."""
    steps = (
        turn_weights(soc),
        LastTokenLogits(),
        FuseKvIo(options.layout),
        TabulateRotary(options.context or 0),
        ConvertPrecision(options.dtype),
        BindShapes(options.batch, plan.bound, options.context or 0),
    )
    return Footprint(steps, soc, plan.symbols, dict(options.forms), spare)


def _float(options: CompileOptions) -> str:
    return {"fp16": "float16", "fp32": "float32"}[options.dtype]


def _require_standard(model: ir.Model) -> None:
    """Refuse operators that atc lacks, and behind whose unknown shapes little can be raised."""
    left = [node for node in model.graph if node.domain == CONTRIB_DOMAIN]
    if left:
        told = [e.reason for e in events(model) if e.pass_name == RaiseContribOps.name]
        more = f" (and {len(left) - 1} more)" if len(left) > 1 else ""
        raise ir.CheckError(
            f"{ir.describe(left[0])} is not standard ONNX{more}",
            told[0] if told else "",
            "Export without it; `omforge explain` names all of them",
        )


def _require_legal(model: ir.Model, soc: Target, name: str) -> None:
    # Advice, such as an operator that runs on the AI CPU, does not stop atc.
    found = [offence for offence in check_legal(model, soc) if offence.level == "error"]
    if found:
        raise ir.CheckError(
            f"{name} has {len(found)} things that are illegal on {soc.soc_version}",
            f"\n{ir.format_diagnostics(found)}\n",
            "Change the export as the lines above say, or compile for another SoC",
        )


def _bucket(
    model: ir.Model, name: str, plan: _Plan, options: CompileOptions, soc: Target
) -> m.Bucket:
    file = f"{name}.onnx"
    shapes = {value.name or "": dims(value) or () for value in model.graph.inputs}
    open_dims = [dim for shape in shapes.values() for dim in shape if not isinstance(dim, int)]
    if plan.gears:
        _refuse_quantised(model)
    return m.Bucket(
        name=name,
        kind=plan.kind,
        batch=options.batch,
        seq=plan.seq,
        capacity=0 if plan.kind == "encode" else options.context or 0,
        file=file,
        inputs=tuple(tensor_spec(value) for value in model.graph.inputs),
        outputs=tuple(tensor_spec(value) for value in model.graph.outputs),
        om=None,
        command=atc_command(
            file,
            f"om/{name}",
            soc,
            {
                key: tuple(dim if isinstance(dim, int) else -1 for dim in shape)
                for key, shape in shapes.items()
            },
            options.atc,
            gears=[[evaluate(dim, {"seq": seq}) for dim in open_dims] for seq in plan.gears],
        ),
        gears=plan.gears,
    )


_QUANTISED = ("AscendQuant", "AscendDequant", "NPUAscendQuantV2", "NPUQuantize", "QuantBatchMatMul")


def _refuse_quantised(model: ir.Model) -> None:
    """Refuse gears for int8 activations.

    Source: hicann/ge:docs/zh/user_guides/atc_tools (general_restrictions.md): models quantised with
    int8 inputs cannot use the options for dynamic shapes.
    """
    for node in model.graph:
        if node.op_type in _QUANTISED:
            raise ir.InputError(
                "a model with quantised activations cannot have gears",
                f"it has {node.op_type} {node.name}",
                "Compile without --gears: one static graph a bucket",
            )
