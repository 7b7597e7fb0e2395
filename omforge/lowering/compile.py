"""From an export to a bundle: raise, give the cache its capacity, bind buckets, lower, write."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from omforge import __version__, ir
from omforge.ir.dims import evaluate, substitute
from omforge.ir.infer import attribute, dims, infer_model, to_shape
from omforge.ir.weights import WeightWriter
from omforge.lowering import manifest as m
from omforge.lowering.atc import AtcOptions, atc_command, check_path, compile_script
from omforge.lowering.atc_cache import AtcCache
from omforge.lowering.atc_find import choose_atc
from omforge.lowering.build_om import BuildOptions, build_om
from omforge.lowering.legality import check_legal
from omforge.lowering.legalize import check_forms, legalize
from omforge.lowering.legalize.choices import choices
from omforge.lowering.quantize_options import (
    KvDtype,
    QuantizeOptions,
    check_quantize,
    kv_passes,
    measure_quantization,
    parse_quantize,
    read_calibration,
    weight_passes,
)
from omforge.lowering.source import Source, find_source, sha256
from omforge.lowering.target import Target, dtype_name, target
from omforge.passes import PassRun, make_pipeline
from omforge.passes.bind_shapes import BindShapes
from omforge.passes.config import ModelConfig, read_config
from omforge.passes.convert_precision import ConvertPrecision
from omforge.passes.coverage import Coverage, measure
from omforge.passes.events import Event, events
from omforge.passes.feeds import weight_bytes
from omforge.passes.fuse_kv_io import PAST, FuseKvIo
from omforge.passes.instruments import Instrument, VerifyEach
from omforge.passes.interface import CacheLayer, cache_layers, find_interface
from omforge.passes.last_token_logits import LastTokenLogits
from omforge.passes.pipeline import Pipeline
from omforge.passes.quantization.linear import find_linears
from omforge.passes.recurrent_states import find_states, is_state, renewed
from omforge.passes.tabulate_rotary import TabulateRotary

MASK_VALUE = -30000.0
"""Finite in float16 even when a score is added, and so far below any score that its exp is 0."""

DEFAULT_CONTEXT = 2048
DEFAULT_PREFILL = 128

CANONICAL, WEIGHTS, REPORT, SCRIPT = "canonical.onnx", "weights.bin", "report.json", "compile.sh"

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class CompileOptions:
    """What the caller chooses.

    Attributes:
        soc: Value of atc's --soc_version.
        context: Tokens that a sequence may hold, C; if None the model's own limit, at most 2,048.
        prefill: Lengths S of the prefill buckets.
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
        atc: Flags of atc that may be chosen.
        build: Which atc is run, and how.
    """

    soc: str
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
    destination = _destination(Path(output))
    config = read_config(found.folder)
    options = _with_defaults(options, config)
    check_forms(dict(options.forms))
    options.atc.words()  # refuses a wrong flag before anything is done
    scheme = _quantize(options, soc)
    tokens = read_calibration(options.calibration, found.folder)
    program = choose_atc(options.build.atc)
    if program is not None:
        check_path("bundle", str(destination.resolve()))  # now, not once all is made
    buckets = _plan(options)
    watch = (VerifyEach(),) if instruments is None else instruments
    steps = _Steps(progress, 4 + 2 * len(buckets))

    steps.begin("load")
    model = ir.load(found.graph)
    nodes = {"exported": model.graph.num_nodes()}
    steps.begin("raise")
    passes = list(make_pipeline("raise").run(model, watch).passes)
    nodes["raised"] = model.graph.num_nodes()
    coverage = measure(model, config)
    if not coverage.complete and not options.allow_partial:
        raise ir.CheckError(
            "coverage is not complete",
            "; ".join(coverage.problems()),
            "Compile with --allow-partial to go on regardless",
        )
    export = _export(model, found)
    layers = cache_layers(model, find_interface(model))
    kv_heads, head_size, value_size = _heads(layers)
    heads = _query_heads(layers, config, kv_heads)
    matrices = len(find_linears(model)) if scheme is not None else 0
    serve = (
        *weight_passes(scheme, soc, tokens),
        LastTokenLogits(),
        FuseKvIo(options.layout),
        *kv_passes(options.kv_dtype, tokens),
        TabulateRotary(options.context or 0),
    )
    passes += Pipeline(serve).run(model, watch).passes
    nodes["canonical"] = model.graph.num_nodes()
    told = events(model)

    facts = _facts(model, config, len(layers), heads, kv_heads, head_size)
    with _folder(destination) as folder:
        with WeightWriter(folder / WEIGHTS) as writer:
            steps.begin("write canonical.onnx")
            ir.save(model, folder / CANONICAL, writer=writer)
            steps.begin("convert precision")
            passes += Pipeline((ConvertPrecision(options.dtype),)).run(model, watch).passes
            made: list[m.Bucket] = []
            graph_bytes = 0
            for plan in buckets:
                full = _bucket_name(plan.name, options)
                steps.begin(f"lower {full}")
                lowered = model.clone()
                bind = BindShapes(options.batch, plan.bound, options.context or 0)
                runs = Pipeline((bind,)).run(lowered, watch).passes
                passes += runs if plan is buckets[-1] else ()
                legalize(lowered, soc, gears=plan.symbols, forms=dict(options.forms))
                for seq in plan.gears or (plan.seq,):
                    _require_legal(at_gear(lowered, seq), soc, full)
                nodes[full] = lowered.graph.num_nodes()
                steps.begin(f"write {full}.onnx")
                ir.save(lowered, folder / f"{full}.onnx", writer=writer)
                made.append(_bucket(lowered, full, plan, options, soc))
                graph_bytes = weight_bytes(lowered)
            writer.close()
        for file in found.companions():
            shutil.copyfile(file, folder / file.name)
        (folder / SCRIPT).write_text(compile_script([b.command for b in made]), encoding="utf-8")
        (folder / SCRIPT).chmod(0o755)
        _write_report(folder / REPORT, passes, nodes, coverage, told)
        written = m.Manifest(
            schema_version=m.SCHEMA_VERSION,
            omforge=__version__,
            target=soc.soc_version,
            dtype=_float(options),
            batch=options.batch,
            context=options.context or 0,
            model=facts,
            kv=m.KvCache(
                layout=_layout(model),
                layers=facts.layers,
                kv_heads=kv_heads,
                head_size=head_size,
                value_head_size=value_size,
                capacity=options.context or 0,
                dtype="int8" if options.kv_dtype == "int8" else _float(options),
            ),
            masks=_masks(model),
            mask_value=MASK_VALUE,
            buckets=tuple(made),
            canonical=CANONICAL,
            weights=WEIGHTS,
            export=export,
            files={file.name: sha256(file) for file in sorted(folder.iterdir()) if file.is_file()},
            coverage=coverage.to_json(),
            states=_states(model),
            quantization=measure_quantization(model, scheme, matrices, made[-1], graph_bytes),
        )
        written.save(folder / m.FILE_NAME)
    if program is not None:
        cache = None if options.build.cache is None else AtcCache(options.build.cache)
        jobs = options.build.jobs
        written = build_om(destination, program, progress, jobs=jobs, cache=cache)
    return CompileResult(destination, written, coverage, passes, nodes, told)


@dataclass(frozen=True)
class _Plan:
    """A graph to lower: its name, its length S (the largest), and its gears."""

    name: str
    seq: int
    gears: tuple[int, ...] = ()

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


class _Steps:
    """Counts steps for a progress bar."""

    def __init__(self, progress: Progress | None, total: int) -> None:
        self._progress = progress
        self._total = total
        self._done = 0

    def begin(self, name: str) -> None:
        if self._progress is not None:
            self._progress(name, self._done, self._total)
        self._done += 1


def _with_defaults(options: CompileOptions, config: ModelConfig | None) -> CompileOptions:
    limit = config.max_positions if config is not None else None
    context = options.context or min(limit or DEFAULT_CONTEXT, DEFAULT_CONTEXT)
    if limit is not None and context > limit:
        raise ir.InputError(
            f"a context of {context} tokens is too long",
            f"config.json says that the model has {limit} positions",
            f"Choose --context {limit} or less",
        )
    prefill = tuple(sorted(set(options.prefill))) or (min(DEFAULT_PREFILL, context),)
    wrong = [s for s in prefill if not 1 < s <= context]
    if wrong:
        raise ir.InputError(
            f"a prefill bucket of {wrong[0]} tokens makes no sense",
            f"it must be above 1 and fit in the context of {context}",
            "Choose other --prefill lengths",
        )
    if options.batch < 1:
        raise ir.InputError(f"a batch of {options.batch} makes no sense", "it must be 1 or more")
    layout = options.layout
    if layout == "auto" and cheapest_layout() == "per-layer":
        layout = "per-layer"  # else fuse-kv-io stacks the layers' caches if they are alike
    return dataclasses.replace(options, context=context, prefill=prefill, layout=layout)


def cheapest_layout() -> Literal["stacked", "per-layer"]:
    """The layout that the table of choices prefers."""
    return "stacked" if choices("cache")[0].form == "stacked" else "per-layer"


def _bucket_name(name: str, options: CompileOptions) -> str:
    batch = f"_b{options.batch}" if options.batch > 1 else ""
    return f"{name}_c{options.context}{batch}"


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
    )
    return scheme


def _float(options: CompileOptions) -> str:
    return {"fp16": "float16", "fp32": "float32"}[options.dtype]


def _require_legal(model: ir.Model, soc: Target, name: str) -> None:
    # Advice, such as an operator that runs on the AI CPU, does not stop atc.
    found = [offence for offence in check_legal(model, soc) if offence.level == "error"]
    if found:
        raise ir.CheckError(
            f"{name} has {len(found)} illegal nodes for {soc.soc_version}",
            "; ".join(str(diagnostic) for diagnostic in found[:20]),
            "`omforge check` lists them all",
        )


def _export(model: ir.Model, source: Source) -> m.Export:
    """The exporter's interface, layer by layer."""
    interface = find_interface(model)
    layers = cache_layers(model, interface)
    states = find_states(model, interface)
    carried = {state.past for state in states}

    def names(values: Sequence[ir.Value]) -> tuple[str, str]:
        key, value = (v.name or "" for v in values)
        return key, value

    return m.Export(
        path=str(source.graph.resolve()),
        sha256=sha256(source.graph),
        input_ids=interface.input_ids.name,
        attention_mask=interface.attention_mask.name if interface.attention_mask else None,
        position_ids=interface.position_ids.name if interface.position_ids else None,
        past=tuple(names(layer.past) for layer in layers),
        present=tuple(names(layer.present) for layer in layers),
        logits=interface.logits.name or "",
        extra=tuple(_spec(value) for value in interface.extra if value not in carried),
        # The cache's: logits may be cast to float32 at the end of a model in half precision.
        dtype=dtype_name((layers[0].past[0] if layers else interface.logits).dtype),
        states=tuple(names((state.past, state.present)) for state in states),
    )


def _heads(layers: Sequence[CacheLayer]) -> tuple[int, int, int]:
    """K and the sizes of a key and a value of the cache; zeros where fuse-kv-io will refuse it.

    Raises:
        CheckError: Layers differ: a manifest has one number for all of them.
    """
    shapes = {
        (_size(key, 1), _size(key, 3), _size(value, 3)) for key, value in (x.past for x in layers)
    }
    if len(shapes) > 1:
        listed = ", ".join(
            f"{heads} heads with keys of {key} and values of {value}"
            for heads, key, value in sorted(shapes)
        )
        raise ir.CheckError(
            "the layers' caches differ",
            f"a bundle has one number of heads, and one size, for all of them: {listed}",
            "`omforge opt` with fuse-kv-io{layout=per-layer} makes the graph without a bundle",
        )
    return next(iter(shapes), (0, 0, 0))


def _query_heads(layers: Sequence[CacheLayer], config: ModelConfig | None, kv_heads: int) -> int:
    """N of the raised attention; config.json's, or K, where none was raised."""
    for layer in layers:
        if layer.block is not None:
            return attribute(layer.block, "q_num_heads", kv_heads)
    told = config.heads if config is not None else None
    return told if told and kv_heads and told % kv_heads == 0 else kv_heads


def _layout(model: ir.Model) -> Literal["stacked", "per-layer"]:
    """The layout that fuse-kv-io gave the cache."""
    return "stacked" if any(v.name == PAST for v in model.graph.inputs) else "per-layer"


def _size(value: ir.Value, axis: int) -> int:
    shape = dims(value)
    dim = shape[axis] if shape is not None and len(shape) == 4 else 0
    return dim if isinstance(dim, int) else 0


def _facts(
    model: ir.Model, config: ModelConfig | None, layers: int, heads: int, kv_heads: int, size: int
) -> m.ModelFacts:
    config = config or ModelConfig()
    logits = dims(model.graph.outputs[0]) or (0,)
    vocab = logits[-1] if isinstance(logits[-1], int) else config.vocab_size or 0
    return m.ModelFacts(
        model_type=config.model_type,
        layers=layers,
        heads=heads,
        kv_heads=kv_heads,
        head_size=size,
        hidden_size=config.hidden_size or heads * size,
        vocab_size=vocab,
        eos_token_ids=config.eos_token_ids,
        bos_token_id=config.bos_token_id,
        pad_token_id=config.pad_token_id,
        max_positions=config.max_positions,
    )


def _masks(model: ir.Model) -> tuple[m.MaskSpec, ...]:
    found: list[m.MaskSpec] = []
    for value in model.graph.inputs:
        name = value.name or ""
        if name.startswith("attention_mask"):
            _, _, window = name.partition("_w")
            found.append(m.MaskSpec(name, int(window) if window else None))
    return tuple(found)


def _states(model: ir.Model) -> tuple[m.StateSpec, ...]:
    specs = [_spec(value) for value in model.graph.inputs if is_state(value)]
    return tuple(m.StateSpec(s.name, renewed(s.name), s.dtype, s.shape) for s in specs)


def _spec(value: ir.Value) -> m.TensorSpec:
    shape = tuple(dim if isinstance(dim, int) else str(dim) for dim in dims(value) or ())
    return m.TensorSpec(value.name or "", dtype_name(value.dtype), shape)


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
        kind="gears" if plan.gears else "decode" if plan.seq == 1 else "prefill",
        batch=options.batch,
        seq=plan.seq,
        capacity=options.context or 0,
        file=file,
        inputs=tuple(_spec(value) for value in model.graph.inputs),
        outputs=tuple(_spec(value) for value in model.graph.outputs),
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


def _write_report(
    path: Path,
    passes: Sequence[PassRun],
    nodes: dict[str, int],
    coverage: Coverage,
    told: Sequence[Event],
) -> None:
    """What happened, without times: the same input gives the same bytes."""
    report: dict[str, Any] = {
        "passes": [
            {
                "pass": str(run.step),
                "rewrites": run.rewrites,
                "nodes_before": run.nodes_before,
                "nodes_after": run.nodes_after,
            }
            for run in passes
        ],
        "nodes": nodes,
        "coverage": coverage.to_json(),
        "events": [dataclasses.asdict(event) for event in told],
    }
    path.write_text(json.dumps(report, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _destination(path: Path) -> Path:
    """The folder to make; what is there must be a bundle or nothing."""
    path = Path(os.path.abspath(path))
    if path.is_dir() and any(path.iterdir()) and not (path / m.FILE_NAME).is_file():
        raise ir.InputError(
            f"{path} is a folder that holds other files",
            "only a bundle is replaced",
            "Choose another -o",
        )
    if path.exists() and not path.is_dir():
        raise ir.InputError(f"{path} is a file", "a bundle is a folder", "Choose another -o")
    if not path.parent.is_dir():
        raise ir.InputError(f"{path.parent} does not exist", "", "Create it or choose another -o")
    return path


class _folder:
    """A folder that takes `path`'s place when the block ends well, and vanishes otherwise."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __enter__(self) -> Path:
        try:
            self._made = Path(
                tempfile.mkdtemp(prefix=f".{self._path.name}-", dir=self._path.parent)
            )
        except OSError as error:
            raise ir.InputError(
                f"cannot write beside {self._path}",
                error.strerror or str(error),
                "Choose an -o in a folder that can be written",
            ) from error
        self._made.chmod(0o755)
        return self._made

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if error is not None:
            shutil.rmtree(self._made, ignore_errors=True)
            return
        old = self._made.with_name(self._made.name + "-old")
        if self._path.exists():
            self._path.rename(old)
        self._made.rename(self._path)
        shutil.rmtree(old, ignore_errors=True)
