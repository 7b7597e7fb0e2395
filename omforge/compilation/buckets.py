"""Stage `lower`: one graph in ATC's dialect for each bucket, legal on the target."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from omforge import ir
from omforge.atc.command import atc_command
from omforge.bundle import manifest as m
from omforge.compilation.cpu import cpu_passes
from omforge.compilation.export_interface import tensor_spec
from omforge.compilation.footprint import check_budget
from omforge.compilation.graph_plan import GraphPlan
from omforge.compilation.options import CompileOptions
from omforge.compilation.serving import Canonical
from omforge.compilation.trail import Trail
from omforge.compilation.work import Work
from omforge.ir.dims import evaluate, substitute
from omforge.ir.infer import infer_model
from omforge.ir.values import dims, to_shape
from omforge.lowering.air_legality import check_air
from omforge.lowering.emit import INLINE, emit
from omforge.lowering.legality import check_legal
from omforge.lowering.legality.subject import Offence
from omforge.lowering.legalize import legalize
from omforge.lowering.target import Target
from omforge.passes.bind_shapes import BindShapes
from omforge.passes.convert_precision import ConvertPrecision
from omforge.recognition.feeds import weight_bytes
from omforge.rewriting.pipeline import Pipeline

PLACEHOLDER = "weights"
"""Where a GE graph's weights are until they are written."""

WEIGHTS_MISSING = "air-weight-files"
"""The rule that such a place breaks."""


@dataclass(frozen=True)
class LoweredGraph:
    """A graph in ATC's dialect and what the manifest says of it."""

    model: ir.Model
    bucket: m.Bucket


@dataclass(frozen=True)
class Lowered:
    """The graphs that atc compiles.

    Attributes:
        canonical: What they are made from.
        model: The same graph with its floats in the target's dtype.
        graphs: One for each bucket; they share their weights.
        graph_bytes: Constants of the last graph.
        trail: What has been done.
    """

    canonical: Canonical
    model: ir.Model
    graphs: tuple[LoweredGraph, ...]
    graph_bytes: int
    trail: Trail


def lower(canonical: Canonical, work: Work) -> Lowered:
    """Convert floats, put numbers in place of symbols, and legalise, bucket by bucket.

    Raises:
        InputError: A bucket cannot have gears.
        CheckError: A graph has illegal nodes, or its constants are above the budget.
    """
    options, soc = canonical.raised.options, canonical.raised.checked.soc
    work.begin("convert precision")
    model = canonical.model.clone()
    trail = canonical.trail.and_then(work.run(model, Pipeline((ConvertPrecision(options.dtype),))))
    graphs: list[LoweredGraph] = []
    for plan in canonical.raised.plans:
        name = plan.full_name(options)
        work.begin(f"lower {name}")
        graph = model.clone()
        passes = cpu_passes() if options.front == "ort" else (plan.bind(options),)
        bound = work.run(graph, Pipeline(passes))
        if options.front != "ort":
            legalize(graph, soc, options.front, gears=plan.symbols, forms=dict(options.forms))
        if options.front == "air":
            require_legal_air(graph, soc, name, gears=bool(plan.gears))
        elif options.front == "onnx":
            for seq in plan.gears or (plan.seq,):
                _require_legal(at_gear(graph, seq), soc, name)
        # Of the buckets, which all are bound in the same way, the last is the one that is told of.
        told = bound if plan is canonical.raised.plans[-1] else ()
        trail = trail.and_then(told, **{name: graph.graph.num_nodes()})
        # What ONNX Runtime's own operators make is not inferred, and need not be.
        told_by = _bound(model, options) if options.front == "ort" else graph.graph
        graphs.append(LoweredGraph(graph, _bucket(told_by, name, plan, options, soc)))
    graph_bytes = weight_bytes(graphs[-1].model)
    check_budget(options.budget, graph_bytes, graphs[-1].bucket.name)
    return Lowered(canonical, model, tuple(graphs), graph_bytes, trail)


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


def _require_legal(model: ir.Model, soc: Target, name: str) -> None:
    # Advice, such as an operator that runs on the AI CPU, does not stop atc.
    _refuse(check_legal(model, soc), soc, name)


def _refuse(offences: Sequence[Offence], soc: Target, name: str) -> None:
    found = [offence for offence in offences if offence.level == "error"]
    if found:
        raise ir.CheckError(
            f"{name} has {len(found)} things that are illegal on {soc.soc_version}",
            f"\n{ir.format_diagnostics(found)}\n",
            "Change the export as the lines above say, or compile for another SoC",
        )


def placeholder(tensor: ir.TensorProtocol) -> tuple[str, int, int] | None:
    """Where a constant will be, as far as it can be told before it is written."""
    return None if tensor.nbytes < INLINE else (PLACEHOLDER, 0, tensor.nbytes)


def require_legal_air(model: ir.Model, soc: Target, name: str, *, gears: bool) -> None:
    """Refuse a graph that is no legal GE graph; give it the inputs and outputs of one.

    What a GE graph writes comes last among its inputs, and is none of its outputs.

    Raises:
        CheckError: A node cannot be said in GE's operators, or the law forbids something.
    """
    emitted = emit(model, name, placeholder)
    found = check_air(emitted.air, soc, path=Path(f"{name}.air"), gears=gears)
    _refuse([item for item in found if item.code != WEIGHTS_MISSING], soc, name)
    model.graph.inputs.clear()
    model.graph.inputs.extend(emitted.inputs)
    model.graph.outputs.clear()
    model.graph.outputs.extend(emitted.outputs)


def _bucket(
    graph: ir.Graph, name: str, plan: GraphPlan, options: CompileOptions, soc: Target
) -> m.Bucket:
    on_cpu = options.front == "ort"
    file = f"{name}.onnx" if on_cpu else f"{name}.{options.front}"
    shapes = {value.name or "": dims(value) or () for value in graph.inputs}
    open_dims = [dim for shape in shapes.values() for dim in shape if not isinstance(dim, int)]
    if plan.gears:
        _refuse_quantised(graph)
    return m.Bucket(
        name=name,
        kind=plan.kind,
        batch=options.batch,
        seq=plan.seq,
        capacity=0 if plan.kind == "encode" else options.context or 0,
        file=file,
        inputs=tuple(tensor_spec(value) for value in graph.inputs),
        outputs=tuple(tensor_spec(value) for value in graph.outputs),
        om=None,
        command=()
        if on_cpu
        else atc_command(
            file,
            f"om/{name}",
            soc,
            {
                key: tuple(dim if isinstance(dim, int) else -1 for dim in shape)
                for key, shape in shapes.items()
            },
            options.atc,
            gears=[[evaluate(dim, {"seq": seq}) for dim in open_dims] for seq in plan.gears],
            front=options.front,
        ),
        gears=plan.gears,
    )


def _bound(model: ir.Model, options: CompileOptions) -> ir.Graph:
    """The inputs and outputs of a graph whose sizes stay open, with the bundle's in their place."""
    bound = model.clone()
    BindShapes(options.batch, 0, options.context or 0).run(bound)
    return bound.graph


_QUANTISED = ("AscendQuant", "AscendDequant", "NPUAscendQuantV2", "NPUQuantize", "QuantBatchMatMul")


def _refuse_quantised(graph: ir.Graph) -> None:
    """Refuse gears for int8 activations.

    Source: hicann/ge:docs/zh/user_guides/atc_tools (general_restrictions.md): models quantised with
    int8 inputs cannot use the options for dynamic shapes.
    """
    for node in graph:
        if node.op_type in _QUANTISED:
            raise ir.InputError(
                "a model with quantised activations cannot have gears",
                f"it has {node.op_type} {node.name}",
                "Compile without --gears: one static graph a bucket",
            )
