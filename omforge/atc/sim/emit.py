"""What a run writes: the .om, and the answers of --mode=1 and --mode=6.

The container is the real one, with the real names of inputs and outputs. In place of kernels it
holds the graph itself (`omforge.om.simulated`), so no device loads it.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
from google.protobuf.json_format import MessageToDict

from omforge import ir
from omforge.atc.sim import parser, tensors
from omforge.atc.sim.command_line import Arguments
from omforge.atc.sim.graph import GeNode, Parsed
from omforge.atc.sim.inference import load_graph
from omforge.atc.sim.reports import Refused, Report
from omforge.atc.sim.shapes import Gears, Shapes
from omforge.om import layout, model_def, read_om, write_om
from omforge.om.model_def import Attribute
from omforge.om.read import OmFile
from omforge.om.simulated import simulate_om

ATC_VERSION = "omforge-atc-sim"

# hicann/ge:docs/zh/user_guides/atc_tools (general_restrictions.md): a model quantised to int8
# cannot have gears.
_INT8_OPS = frozenset(
    ("AscendQuant", "AscendDequant", "AscendQuantV2", "Quantize", "QuantBatchMatmulV3")
)
_GEAR_RANK = 4

# Documented for 310P, A2 and A3; 256 for 950. E10036 is registered for it and not raised.
_MOST_GEARS, _MOST_GEARS_950 = 100, 256


def check_build(parsed: Parsed, arguments: Arguments, shapes: Shapes, report: Report) -> None:
    """What atc finds between the parsed graph and the .om, as far as no kernel is involved.

    Raises:
        Refused: A shape is not known, or an input or output that a flag names does not exist.
    """
    _check_shapes(parsed, arguments, shapes, report)
    _check_out_nodes(parsed, arguments, report)
    check_gear_limits(parsed, arguments["soc_version"], shapes, report)
    for tensor in parsed.tensors.values():
        _check_file(Path(arguments["model"]).resolve().parent, tensor, report)


def _check_shapes(parsed: Parsed, arguments: Arguments, shapes: Shapes, report: Report) -> None:
    """hicann/ge:api/atc/omg.cc:CheckInputShapeNode."""
    unknown = [value.name for value in parsed.inputs if -1 in value.dims]
    if unknown and shapes.gears is None and not shapes.ranges:
        reason = (
            "The shapes of inputs contain -1 in the model. "
            "You may need to set input shape to specify its shape."
        )
        report.error("E10001", parameter="--input_shape", value="NULL", reason=reason)
        raise Refused
    check_names({value.name for value in parsed.inputs}, parsed.nodes, shapes, report)
    if shapes.ranges and arguments["soc_version"].startswith("Ascend310B"):
        report.trap("SIM050", "shape ranges are not documented for 310B.")


def check_names(
    data: Collection[str], nodes: Sequence[GeNode], shapes: Shapes, report: Report
) -> None:
    """hicann/ge:api/atc/omg.cc:CheckUserInputShape: --input_shape names inputs.

    Raises:
        Refused: It names something else.
    """
    known = {node.name for node in nodes}
    for name in () if shapes.ranges else shapes.dims:
        if name not in data:
            code = "E10017" if name in known else "E10016"
            report.error(code, parameter="input_shape", opname=name)
            raise Refused


def _check_out_nodes(parsed: Parsed, arguments: Arguments, report: Report) -> None:
    """hicann/ge:api/atc/omg.cc:ParseOutNodes and SetOutputNodeInfo."""
    text = arguments["out_nodes"]
    if not text:
        return
    known = {node.name: node.outputs for node in parsed.nodes}
    for item in text.split(";"):
        name, colon, index = item.rpartition(":")
        if not colon:
            if item not in {output.tensor for output in parsed.outputs}:
                report.inner(f"User specified tensor[{item}] is not output of graph.")
                raise Refused
            continue
        if not index.isdigit():
            reason = "The index is not a positive integer."
            report.error("E10001", parameter="--out_nodes", value=text, reason=reason)
            raise Refused
        if name not in known:
            report.error("E10016", parameter="out_nodes", opname=name)
            raise Refused
        if int(index) >= known[name]:
            reason = f'Output index:"{index}" must be smaller than output size:{known[name]}'
            report.error("E10003", parameter="out_nodes", value=name, reason=reason)
            raise Refused
    report.note(
        "SIM060", "the simulator keeps the model's own outputs: --out_nodes is checked only"
    )


def check_gear_limits(parsed: Parsed, soc: str, shapes: Shapes, report: Report) -> None:
    """Check what gears ask of the inputs, and how many there may be.

    Raises:
        Refused: An input has no shape on the command line.
    """
    if shapes.gears is None:
        return
    missing = [value.name for value in parsed.inputs if value.name not in shapes.dims]
    if missing:
        # multi_batch_options.cc:CheckNodeSize; the documentation asks for scalars as well.
        count = len(parsed.inputs)
        reason = (
            f"Count:{count} of data_nodes in graph should be equal to input_shape "
            f"count:{len(shapes.dims)} from option."
        )
        report.error("E10001", parameter="input_shape", value=count, reason=reason)
        raise Refused
    for name, dims in shapes.dims.items():
        if -1 in dims and len(dims) > _GEAR_RANK:
            report.trap(
                "SIM051", f"input {name} has gears and {len(dims)} dims; the runtime documents 4."
            )
    most = _MOST_GEARS_950 if soc.startswith(("Ascend950", "Ascend910_95")) else _MOST_GEARS
    count = len(shapes.gears.profiles)
    if count > most:
        report.trap("SIM053", f"{count} gears are given; the documentation says at most {most}.")
    quantised = [node for node in parsed.nodes if node.type in _INT8_OPS]
    if quantised:
        report.trap(
            "SIM052",
            f"{quantised[0].name} ({quantised[0].type}): a model quantised to int8 cannot have "
            "gears (general_restrictions.md).",
        )


def _check_file(folder: Path, tensor: onnx.TensorProto, report: Report) -> None:
    """Whether a weight file is there is found when the weights are read, not by the parser."""
    if not tensors.is_external(tensor):
        return
    keys = {entry.key: entry.value for entry in tensor.external_data}
    file = folder / keys["location"]
    expected = tensors.size_in_bytes(tensor.data_type, tuple(tensor.dims))
    end = int(keys.get("offset", 0)) + int(keys.get("length", expected))
    if not file.is_file() or file.stat().st_size < end:
        why = "[Errno 2] No such file or directory"
        why = f"it ends before byte {end}" if file.is_file() else why
        report.error("E13001", file=file, errmsg=why)
        raise Refused


def write_model(parsed: Parsed, arguments: Arguments, shapes: Shapes, report: Report) -> Path:
    """Write the .om, and its weights beside it where --external_weight says so.

    Raises:
        Refused: The graph has no CPU twin, so the simulator cannot stand for the device.
    """
    output = Path(arguments["output"] + ".om")
    if shapes.ranges:
        report.inner("the simulator makes no .om for shape ranges", "SIM061")
        raise Refused
    try:
        model = load_graph(Path(arguments["model"]))
        for node, made in zip(model.graph, parsed.nodes, strict=False):
            node.name = made.name
        _empty_constants(model)
        simulate_om(
            model,
            output,
            shapes={value.name: value.dims for value in parsed.inputs},
            gears=profiles({value.name: value.dims for value in parsed.inputs}, shapes.gears),
            external_weight=external_weight(arguments),
            ge_types=_ge_types(parsed),
        )
    except (ir.InputError, ValueError) as error:  # onnx-ir raises ValueError for odd protobufs
        report.inner(f"the simulator cannot make a CPU twin: {error}", "SIM062")
        raise Refused from error
    _add_attributes(output, arguments)
    _note_dtypes(parsed, arguments, report)
    return output


def _empty_constants(model: ir.Model) -> None:
    """Read a Constant without `value` as atc does, which reaches here when not strict only."""
    for node in model.graph.all_nodes():
        if node.op_type == "Constant" and "value" not in node.attributes:
            node.attributes.clear()
            node.attributes.add(ir.AttrTensor("value", ir.tensor(np.zeros(0, np.float32))))


def external_weight(arguments: Arguments) -> Literal[0, 1]:
    """Whether weights stand beside the .om."""
    return 0 if arguments["external_weight"] == "0" else 1


def profiles(shapes: Mapping[str, Sequence[int]], gears: Gears | None) -> Sequence[Sequence[int]]:
    """Per gear one number for each -1: --dynamic_batch_size gives one for all inputs."""
    if gears is None:
        return ()
    slots = sum(list(shape).count(-1) for shape in shapes.values())
    return [p * slots if gears.kind == "dynamic_batch_size" else p for p in gears.profiles]


def _ge_types(parsed: Parsed) -> dict[str, str]:
    nodes = zip(parsed.model.graph.node, parsed.nodes, strict=False)
    return {node.op_type: made.type for node, made in nodes}


def _note_dtypes(parsed: Parsed, arguments: Arguments, report: Report) -> None:
    precision = arguments["precision_mode_v2"] or arguments["precision_mode"] or "fp16"
    note_precision([value.dtype for value in (*parsed.inputs, *parsed.outputs)], precision, report)
    if arguments["output_type"]:
        report.note(
            "SIM064", "the simulated .om keeps the model's dtypes; --output_type is checked"
        )


def note_precision(dtypes: Sequence[str], precision: str, report: Report) -> None:
    """Say where the simulated .om is of another precision than atc's."""
    if precision in ("fp16", "force_fp16") and {"float32", "bfloat16"}.intersection(dtypes):
        report.note(
            "SIM063",
            f"--precision_mode_v2={precision} turns float32 and bfloat16 into float16; the "
            "simulated .om keeps the model's dtypes. Use origin.",
        )


def _add_attributes(output: Path, arguments: Arguments) -> None:
    """Add what --mode=6 prints (hicann/ge:graph_metadef/graph/attr/ge_attr_define.cc)."""
    om = read_om(output)
    found = {p.type: om.partition(0, p.type) for p in om.models[0].partitions}
    definition = model_def.decode(found[layout.MODEL_DEF], str(output))
    weight = sum(file.stat().st_size for file in _weight_files(output))
    attributes: dict[str, Any] = {
        **definition.attributes,
        **model_attributes(arguments),
        "weight_size": weight if arguments["external_weight"] == "0" else 0,
    }
    definition = dataclasses.replace(definition, attributes=attributes)
    write_om(
        output,
        name=om.name,
        inputs=(),
        outputs=(),
        partitions={**found, layout.MODEL_DEF: model_def.encode(definition)},
        platform_version=om.platform_version,
    )


def model_attributes(arguments: Arguments) -> dict[str, Attribute]:
    """What --mode=6 prints of a file, but for its sizes."""
    return {
        "atc_version": ATC_VERSION,
        "atc_cmdline": arguments.line,
        "soc_version": arguments["soc_version"],
        "framework_type": arguments["framework"],
    }


def _weight_files(output: Path) -> list[Path]:
    folder = output.parent / "weight"
    return sorted(folder.iterdir()) if folder.is_dir() else []


def to_json(arguments: Arguments, report: Report) -> None:
    """--mode=1: a model file as JSON, an .om's MODEL_DEF or an ONNX graph.

    Source: hicann/ge:api/atc/omg.cc:ConvertOm, ConvertFwkModelToJson.
    """
    source, target = Path(arguments["om"]), Path(arguments["json"])
    if arguments["framework"] == "5":
        model = parser.load(source, report)
        content: Any = MessageToDict(model.graph, preserving_proto_field_name=True)
    else:
        content = dataclasses.asdict(_definition(source, report)[1])
    target.write_text(json.dumps(content, indent=2, default=str) + "\n", encoding="utf-8")


def display(arguments: Arguments, report: Report) -> list[str]:
    """--mode=6: what hicann/ge:api/atc/omg.cc:PrintModelInfo prints of an .om."""
    om, definition = _definition(Path(arguments["om"]), report)
    attributes = definition.attributes
    sizes = {p.type: p.size for p in om.models[0].partitions}

    def attribute(name: str, default: object = "") -> object:
        return attributes.get(name, default)

    return [
        "============ Display Model Info start ============",
        f"Original Atc command line: {attribute('atc_cmdline')}",
        f"system   info: atc_version[{attribute('atc_version')}], "
        f"soc_version[{attribute('soc_version')}], "
        f"framework_type[{attribute('framework_type')}].",
        f"resource info: memory_size[{attribute('memory_size', -1)} B], "
        f"weight_size[{attribute('weight_size', -1)} B], "
        f"stream_num[{attribute('stream_num', -1)}], event_num[{attribute('event_num', -1)}].",
        f"om       info: modeldef_size[{sizes.get(layout.MODEL_DEF, 0)} B], "
        f"weight_data_size[{sizes.get(layout.WEIGHTS_DATA, 0)} B], "
        f"tbe_kernels_size[{sizes.get(layout.TBE_KERNELS, 0)} B], "
        "cust_aicpu_kernel_store_size[0 B], "
        f"task_info_size[{sizes.get(layout.TASK_INFO, 0)} B], so_store_size[0 B].",
        "============ Display Model Info end   ============",
    ]


def _definition(path: Path, report: Report) -> tuple[OmFile, model_def.ModelDef]:
    try:
        om = read_om(path)
        return om, model_def.decode(om.partition(0, layout.MODEL_DEF), str(path))
    except ir.InputError as error:
        report.error("E10041", parameter=path)
        raise Refused from error
