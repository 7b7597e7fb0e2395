"""--framework=1: a GE graph, from the file to the .om; no parser and no plugin has a part in it.

Source of the order: hicann/ge:api/atc/main_impl.cc (GenerateModelBySingleGraph), then
compiler/graph/preprocess/graph_prepare.cc.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import onnx

from omforge import ir
from omforge.air.graph import NET_OUTPUT, Air, Desc
from omforge.air.reference import Reference, ShapeFault, reference
from omforge.atc.sim import air_checks, emit
from omforge.atc.sim.air_kernels import Placed, check_kernels, check_types, family_of
from omforge.atc.sim.air_loader import LoadedAir, load_air
from omforge.atc.sim.air_tiling import check_tiling
from omforge.atc.sim.command_line import Arguments
from omforge.atc.sim.graph import GeNode, GraphInput, Parsed
from omforge.atc.sim.reports import Refused, Report
from omforge.atc.sim.shapes import Shapes, check_gears
from omforge.om.simulated_air import AirModel, simulate_air

_IGNORED = (
    "out_nodes",
    "is_input_adjust_hw_layout",
    "is_output_adjust_hw_layout",
    "input_fp16_nodes",
    "op_name_map",
    "output_type",
    "weight",
)
"""Flags of the parsers, which are not asked here."""


def compile_air(arguments: Arguments, shapes: Shapes, report: Report) -> None:
    """Load, check and compile --model.

    Raises:
        Refused: atc stops.
    """
    ignored = [f"--{name}" for name in _IGNORED if arguments[name]]
    if ignored:
        report.note("SIM070", f"with --framework=1 atc ignores {', '.join(ignored)}.")
    loaded = load_air(arguments, shapes, report)
    _check_io_memory(arguments, loaded, report)
    emit.check_gear_limits(_parsed(loaded), arguments["soc_version"], shapes, report)
    check_gears(shapes, report)
    _check_open_shapes(loaded, shapes, report)
    air_checks.check_graph(loaded, report)
    profiles = emit.profiles(loaded.shapes, shapes.gears)
    order = tuple(shapes.dims) if profiles else ()
    bound = [_bound(loaded, order, profile) for profile in profiles] or [dict(loaded.shapes)]
    family = family_of(arguments["soc_version"])
    twins = [_inferred(loaded, each, family, report) for each in bound]
    precision = arguments["precision_mode_v2"] or arguments["precision_mode"] or "fp16"
    check_kernels(_placed(loaded, twins[0]), family, precision, report)
    for twin in twins:
        check_tiling(_placed(loaded, twin), family, report)
    if report.errors:  # silent failures, which stop the run here
        raise Refused
    output = Path(arguments["output"] + ".om")
    try:
        simulate_air(
            AirModel(loaded.graph, loaded.shapes, twins, profiles, order),
            output,
            folder=Path.cwd(),
            attributes=emit.model_attributes(arguments),
            external_weight=emit.external_weight(arguments),
        )
    except ir.InputError as error:
        report.inner(f"the simulator cannot make a CPU twin: {error}", "SIM062")
        raise Refused from error
    floats = [desc.dtype for desc in twins[0].results.values()]
    emit.note_precision(floats, precision, report)


def _check_open_shapes(loaded: LoadedAir, shapes: Shapes, report: Report) -> None:
    """An open size without gears makes a model of dynamic shape, which is no error."""
    opened = [name for name, shape in loaded.shapes.items() if any(dim < 0 for dim in shape)]
    if opened and shapes.gears is None:
        report.inner(f"the simulator makes no .om of dynamic shape, as {opened[0]} has", "SIM061")
        raise Refused


def _check_io_memory(arguments: Arguments, loaded: LoadedAir, report: Report) -> None:
    """graph_prepare.cc:CheckUserInput: GE cannot own the memory of what a graph writes."""
    written = any(op.type == "RefData" for op in loaded.inputs)
    if written and arguments.raw_options.get("ge.exec.graphIOMemAllocMode") == "ByGE":
        reason = (
            "When the input and output memory allocation is controlled by GE, RefData operators "
            "are not supported in the graph"
        )
        report.error("E13025", reason=reason)
        raise Refused


def _parsed(loaded: LoadedAir) -> Parsed:
    """The graph as the checks of flags know one."""
    nodes = [GeNode(op.name, op.type, (), max(len(op.output_desc), 1)) for op in loaded.graph.ops]
    inputs = [
        GraphInput(op.name, op.output_desc[0].dtype, loaded.shapes[op.name]) for op in loaded.inputs
    ]
    return Parsed(onnx.ModelProto(), nodes, inputs)


def _bound(
    loaded: LoadedAir, order: Sequence[str], profile: Sequence[int]
) -> dict[str, tuple[int, ...]]:
    """The inputs' shapes at a gear (multi_batch_options.cc:ParserDataToDynamicInfo)."""
    found, values = dict(loaded.shapes), iter(profile)
    for name in order:
        found[name] = tuple(next(values) if dim == -1 else dim for dim in found[name])
    return found


def _inferred(
    loaded: LoadedAir, shapes: dict[str, tuple[int, ...]], family: str, report: Report
) -> Reference:
    """infershape_pass.cc: types and shapes from the inputs on; what the file says is not read."""
    try:
        return reference(Air("", (loaded.graph,)), shapes=shapes)
    except ShapeFault as fault:
        report.inner(
            f"Call InferShapeAndType for node:{fault.op.name}({fault.op.type}) failed: {fault.why}",
            "EZ9999",
        )
        report.inner("GE GenerateOfflineModel execute failed.")
        raise Refused from fault
    except ir.InputError as error:
        check_types(loaded.graph.ops, family, report)
        report.inner(f"the simulator cannot make a CPU twin: {error}", "SIM062")
        raise Refused from error


def _placed(loaded: LoadedAir, twin: Reference) -> Iterator[Placed]:
    for op in loaded.graph.ops:
        if op.type == NET_OUTPUT:
            continue
        inputs = tuple(
            Desc() if edge is None else twin.results.get((edge.producer, edge.output), Desc())
            for edge in op.edges
        )
        outputs = (twin.results.get((op.name, at)) for at in range(len(op.output_desc)))
        yield Placed(op, inputs, tuple(Desc() if desc is None else desc for desc in outputs))
