"""What is planned: an export that is lowered in memory as often as there are sizes to weigh.

An export is raised once. Each choice of sizes and dtypes is then a copy of the raised graph that
goes through the later stages of a compilation; its weights are mapped, and no number of them is
read or computed. A bundle's canonical graph has its weights and cache as they are, and is lowered
for other sizes alone.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, cast

from omforge import ir
from omforge.bundle import manifest as m
from omforge.compilation.buckets import Lowered, LoweredGraph, lower, require_legal_air
from omforge.compilation.export_interface import tensor_spec
from omforge.compilation.graph_plan import GraphPlan, plan_graphs, with_sizes
from omforge.compilation.options import CompileOptions
from omforge.compilation.quantize_options import KvDtype, check_quantize, parse_quantize
from omforge.compilation.raising import Raised
from omforge.compilation.request import Request
from omforge.compilation.serving import serve
from omforge.compilation.stages import run_stages
from omforge.compilation.task import encode_options
from omforge.compilation.work import Progress, Work
from omforge.ir.floats import float_name
from omforge.lowering.facts_file import target_with
from omforge.lowering.legalize import legalize
from omforge.lowering.target import Target
from omforge.passes.convert_precision import ConvertPrecision
from omforge.recognition.fixed_inputs import find_fixed
from omforge.recognition.interface import find_interface
from omforge.recognition.lengths.bounds import Bound

_NOWHERE = "omforge-plan"
"""The folder of a bundle that is not written."""


class Subject(Protocol):
    """Something that can be lowered for different choices."""

    @property
    def soc(self) -> Target:
        """The target."""
        ...

    @property
    def options(self) -> CompileOptions:
        """What is planned for, with every size chosen."""
        ...

    @property
    def task(self) -> m.Task:
        """What the model is for."""
        ...

    @property
    def longest(self) -> int:
        """The longest prefill that there may be: the context, or what the export takes at once."""
        ...

    @property
    def fixed(self) -> tuple[str, ...]:
        """Names of the inputs that are given once for a text."""
        ...

    def lower(
        self, options: CompileOptions, plans: tuple[GraphPlan, ...] | None = None
    ) -> tuple[LoweredGraph, ...]:
        """Lower it as options say.

        Args:
            options: With every size chosen.
            plans: The graphs; those of a bundle unless given.

        Raises:
            InputError: The options do not fit the model or the target.
            CheckError: A graph is not legal on the target.
        """
        ...


@dataclass(frozen=True)
class ExportSubject:
    """An export that was raised.

    Attributes:
        raised: Its graph, which stays as it is.
        options: What is planned for, with every size chosen.
    """

    raised: Raised
    options: CompileOptions

    @property
    def soc(self) -> Target:
        """The target."""
        return self.raised.checked.soc

    @property
    def task(self) -> m.Task:
        """What the model is for."""
        return self.raised.task

    @property
    def longest(self) -> int:
        """The longest prefill that there may be."""
        call = self.raised.call
        context = self.options.context or 0
        return context if call is None else min(context, call.tokens)

    @property
    def fixed(self) -> tuple[str, ...]:
        """Names of the inputs that are given once for a text."""
        model = self.raised.model
        return tuple(value.name or "" for value in find_fixed(model, find_interface(model)))

    def lower(
        self, options: CompileOptions, plans: tuple[GraphPlan, ...] | None = None
    ) -> tuple[LoweredGraph, ...]:
        """Lower it as options say."""
        return self._lowered(options, plans).graphs

    def _lowered(self, options: CompileOptions, plans: tuple[GraphPlan, ...] | None) -> Lowered:
        options = dataclasses.replace(options, budget="")
        scheme = parse_quantize(options.quantize)
        if scheme is not None and scheme.activations is not None:
            raise ir.InputError(
                f"--quantize {options.quantize} cannot be planned",
                "which layers read int8 is decided on the calibration text",
                "Plan with --quantize int8, whose weights are as large",
            )
        checked = self.raised.checked
        check_quantize(
            scheme,
            options.kv_dtype,
            checked.soc,
            dtype=options.dtype,
            calibration=True,
            gears=options.gears,
        )
        if scheme is not None:
            # Of one size, whatever the method: that which needs no text has no numbers yet.
            scheme = dataclasses.replace(scheme, method="rtn")
        checked = dataclasses.replace(
            checked, options=options, scheme=scheme, tokens=(), counting=True
        )
        raised = dataclasses.replace(
            self.raised,
            checked=checked,
            model=self.raised.model.clone(),
            options=options,
            plans=plan_graphs(options, self.task) if plans is None else plans,
        )
        work = Work(())
        return lower(serve(raised, work), work)


@dataclass(frozen=True)
class BundleSubject:
    """A bundle: its canonical graph, whose weights and cache are as they are.

    Attributes:
        manifest: What it says of itself.
        model: The canonical graph, its floats in the target's dtype.
        soc: The target.
        options: As it was compiled.
    """

    manifest: m.Manifest
    model: ir.Model
    soc: Target
    options: CompileOptions

    @property
    def task(self) -> m.Task:
        """What the model is for."""
        return self.manifest.task

    @property
    def longest(self) -> int:
        """The longest prefill that there may be."""
        call = self.manifest.export.longest_call
        return self.manifest.context if call is None else min(self.manifest.context, call)

    @property
    def fixed(self) -> tuple[str, ...]:
        """Names of the inputs that are given once for a text."""
        return tuple(spec.name for spec in self.manifest.fixed)

    def lower(
        self, options: CompileOptions, plans: tuple[GraphPlan, ...] | None = None
    ) -> tuple[LoweredGraph, ...]:
        """Lower it for sizes; its weights, cache and front are what they are."""
        own = self.options
        kept = ("quantize", "kv_dtype", "front", "dtype", "layout")
        if any(getattr(options, name) != getattr(own, name) for name in kept):
            raise ir.InputError(
                "a bundle's weights, cache and front are what they are",
                f"it was compiled with --front {own.front} --dtype {own.dtype}",
                "Give the export to plan others",
            )
        made: list[LoweredGraph] = []
        for plan in plan_graphs(options, self.task) if plans is None else plans:
            name = plan.full_name(options)
            graph = self.model.clone()
            plan.bind(options).run(graph)
            legalize(graph, self.soc, options.front, gears=plan.symbols, forms=dict(options.forms))
            if options.front == "air":
                require_legal_air(graph, self.soc, name, gears=bool(plan.gears))
            made.append(LoweredGraph(graph, _bucket(graph, name, plan, options)))
        return tuple(made)


def _bucket(model: ir.Model, name: str, plan: GraphPlan, options: CompileOptions) -> m.Bucket:
    return m.Bucket(
        name=name,
        kind=plan.kind,
        batch=options.batch,
        seq=plan.seq,
        capacity=0 if plan.kind == "encode" else options.context or 0,
        file="",
        inputs=tuple(tensor_spec(value) for value in model.graph.inputs),
        outputs=tuple(tensor_spec(value) for value in model.graph.outputs),
        om=None,
        command=(),
        gears=plan.gears,
    )


def open_subject(
    path: str | Path, options: CompileOptions, *, progress: Progress | None = None
) -> Subject:
    """Return what is at a path: a bundle, or an export, which is raised.

    Args:
        path: A bundle's folder, or an export's folder or .onnx file.
        options: Of an export as `compile` takes them. Of a bundle only sizes may be others than it
            has: `context`, `prefill`, `batch`; what is absent is the bundle's.
        progress: Told the step's name, steps done and steps in all.

    Raises:
        InputError: There is neither, or an option does not fit it.
        CheckError: The export cannot be compiled.
    """
    if (Path(path) / m.FILE_NAME).is_file():
        return _open_bundle(Path(path), options)
    # What is quantised, and how, is no matter of raising.
    floats = dataclasses.replace(
        options, quantize="", kv_dtype="fp16", calibration=None, budget="", gears=False
    )
    request = Request(path, Path(_NOWHERE), floats)
    raised = run_stages(request, until="raise", instruments=(), progress=progress)
    return subject_of(cast("Raised", raised), options)


def subject_of(raised: Raised, options: CompileOptions) -> ExportSubject:
    """Return an export that was raised, with the sizes that were chosen and all else as asked."""
    sizes = {name: getattr(raised.options, name) for name in ("context", "prefill", "layout")}
    return ExportSubject(raised, dataclasses.replace(options, **sizes))


def _open_bundle(path: Path, asked: CompileOptions) -> BundleSubject:
    made = m.Manifest.load(path)
    if asked.soc != made.target:
        raise ir.InputError(
            f"the bundle {path} was compiled for {made.target}",
            f"--target says {asked.soc}",
            f"Say --target {made.target}, or give the export",
        )
    if asked.quantize or asked.kv_dtype != "fp16" or asked.front not in ("onnx", made.front):
        raise ir.InputError(
            f"the bundle {path} is compiled",
            "its weights, its cache and its front are what they are",
            "Leave --quantize, --kv-dtype and --front away, or give the export",
        )
    lengths = tuple(sorted({s for b in made.buckets for s in b.gears or (b.seq,) if s > 1}))
    gears = any(bucket.gears for bucket in made.buckets)
    dtype = float_name(made.dtype)
    own = dataclasses.replace(
        asked,
        context=made.context,
        prefill=lengths,
        batch=made.batch,
        dtype=dtype,
        layout=made.kv.layout,
        gears=gears,
        front=made.front,
        quantize="",
        kv_dtype=cast("KvDtype", "int8" if made.quantization.kv else "fp16"),
    )
    sizes = {
        name: value
        for name in ("context", "prefill", "batch")
        if (value := getattr(asked, name)) not in (None, (), 1)
    }
    own = dataclasses.replace(own, **sizes)
    limits = [made.model.max_positions] if made.model.max_positions is not None else []
    bounds = [Bound(tokens, "the manifest says so") for tokens in limits]
    own = encode_options(own, bounds) if made.task == "encode" else with_sizes(own, bounds)
    model = ir.load(path / made.canonical)
    ConvertPrecision(dtype).run(model)
    soc = target_with(asked.soc, None)
    soc = dataclasses.replace(soc, facts=asked.facts)
    return BundleSubject(made, model, soc, own)
