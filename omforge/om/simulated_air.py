"""Simulated .om files of GE graphs: what the simulated atc makes with --framework=1.

The payload is the graph's reference on the CPU (`omforge.air.reference`), one for each gear, as GE
clones the graph into one branch for each; and the names of the inputs that the graph writes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import onnx

from omforge import ir
from omforge.air.ge_types import byte_size
from omforge.air.graph import DATA_TYPES, NET_OUTPUT, Desc, Graph, Op
from omforge.air.reference import Reference
from omforge.air.reference.builder import ONNX_DTYPES
from omforge.om import layout, model_def
from omforge.om.inout import GEAR_INPUT, OmTensor
from omforge.om.model_def import Attribute, GraphDef, ModelDef, OpDef, TensorDesc
from omforge.om.payload import Payload, pack_payload, packed_graph, place_weights, weight_size
from omforge.om.write import write_om

_NAMES = {number: name for name, number in ONNX_DTYPES.items()}


@dataclass(frozen=True)
class AirModel:
    """A GE graph that was compiled, as far as a simulation can.

    Attributes:
        graph: The graph.
        shapes: Of each input in order, -1 where a gear decides.
        twins: Its reference, or with gears one for each.
        gears: As --dynamic_dims: per gear the values of the -1 dims, in the order of `order`.
        order: The inputs as the gears count their dims.
    """

    graph: Graph
    shapes: Mapping[str, tuple[int, ...]]
    twins: Sequence[Reference]
    gears: Sequence[Sequence[int]] = ()
    order: Sequence[str] = ()


def simulate_air(
    model: AirModel,
    output: Path,
    *,
    folder: Path,
    attributes: Mapping[str, Attribute],
    external_weight: Literal[0, 1] = 1,
) -> None:
    """Write `output` and its weight files.

    Args:
        model: What was compiled.
        output: The .om file.
        folder: Where atc works: what relative places of weights are meant from.
        attributes: Of the model, which `--mode=6` prints.
        external_weight: 1 writes constants beside the file, 0 into it.

    Raises:
        InputError: Weights cannot be read, or are too many to stand in the file.
    """
    written = dict(model.twins[0].written)
    graphs: list[memoryview] = []
    weights: set[str] = set()
    placed: dict[tuple[str, int, int], str] = {}
    size = 0
    for twin in model.twins:
        loaded = ir.from_proto(twin.model)
        for _, tensor in ir.all_tensors(loaded):
            if isinstance(tensor, ir.ExternalTensor):
                tensor.base_dir = str(folder)
        size = weight_size(loaded)
        external = bool(external_weight)
        weights.update(place_weights(loaded, output.parent, external=external, placed=placed))
        graphs.append(packed_graph(loaded, output))
    inputs = _inputs(model)
    outputs, by_gear = _outputs(model, frozenset(written.values()))
    work = sum(tensor.size for tensor in outputs)
    payload = Payload(tuple(graphs), tuple(sorted(weights)), work, size, written)
    definition = ModelDef(
        name=output.stem,
        graphs=(GraphDef(output.stem, tuple(_ops(model.graph, inputs))),),
        attributes={**attributes, "weight_size": 0 if external_weight else size},
    )
    write_om(
        output,
        name=output.stem,
        inputs=inputs,
        outputs=outputs,
        partitions={
            layout.MODEL_DEF: model_def.encode(definition),
            layout.SIMULATED_PAYLOAD: pack_payload(payload),
        },
        gears=model.gears,
        input_order=tuple(model.order) if model.gears else (),
        output_shapes=by_gear,
        platform_version=layout.SIMULATED_PLATFORM,
    )


def _inputs(model: AirModel) -> list[OmTensor]:
    each = [[_known(info) for info in twin.model.graph.input] for twin in model.twins]
    found: list[OmTensor] = []
    for infos in zip(*each, strict=True):
        name, dtype, _ = infos[0]
        size = max(byte_size(dtype, shape) for _, _, shape in infos)
        found.append(OmTensor(name, dtype, tuple(model.shapes[name]), size, "ND"))
    if model.gears:
        # hicann/ge:compiler/graph/passes/multi_batch/multi_batch_clone_pass.cc, CreateIndexDataNode
        count = len(model.gears[0])
        found.append(OmTensor(GEAR_INPUT, "int32", (count,), 4 * count))
    return found


def _outputs(
    model: AirModel, hidden: frozenset[str]
) -> tuple[list[OmTensor], list[tuple[int, ...]]]:
    """The outputs as they are at their largest, and their shapes by gear."""
    each = [
        [_known(info) for info in twin.model.graph.output if info.name not in hidden]
        for twin in model.twins
    ]
    outputs: list[OmTensor] = []
    by_gear: list[tuple[int, ...]] = []
    for index, infos in enumerate(zip(*each, strict=True)):
        name, dtype, _ = infos[0]
        shapes = [shape for _, _, shape in infos]
        largest = max(shapes, key=lambda shape: byte_size(dtype, shape))
        outputs.append(OmTensor(name, dtype, largest, byte_size(dtype, largest)))
        if model.gears and len(set(shapes)) == 1:
            by_gear.append((-1, index, *largest))
        elif model.gears:
            by_gear += [(gear, index, *shape) for gear, shape in enumerate(shapes)]
    return outputs, by_gear


def _known(info: onnx.ValueInfoProto) -> tuple[str, str, tuple[int, ...]]:
    tensor = info.type.tensor_type
    dims = (dim.dim_value if dim.HasField("dim_value") else -1 for dim in tensor.shape.dim)
    return info.name, _NAMES[tensor.elem_type], tuple(dims)


def _ops(graph: Graph, inputs: Sequence[OmTensor]) -> Iterator[OpDef]:
    """The operators of the file; GE would fuse some, and clone them for each gear."""
    by_name = {tensor.name: (index, tensor) for index, tensor in enumerate(inputs)}
    for op in graph.ops:
        if op.type in DATA_TYPES:
            index, tensor = by_name[op.name]
            desc = TensorDesc(tensor.dtype, tensor.shape, "ND", tensor.size)
            yield OpDef(op.name, op.type, (), (desc,), (desc,), {"index": index})
        else:
            yield _op(op)
    if GEAR_INPUT in by_name:
        index, tensor = by_name[GEAR_INPUT]
        desc = TensorDesc(tensor.dtype, tensor.shape, "ND", tensor.size)
        yield OpDef(tensor.name, "Data", (), (desc,), (desc,), {"index": index})


def _op(op: Op) -> OpDef:
    edges = [edge for edge in op.edges if edge is not None] if op.type == NET_OUTPUT else []
    return OpDef(
        op.name,
        op.type,
        op.inputs,
        tuple(map(_desc, op.input_desc)),
        tuple(map(_desc, op.output_desc)),
        src_name=tuple(edge.producer for edge in edges),
        src_index=tuple(edge.output for edge in edges),
    )


def _desc(desc: Desc) -> TensorDesc:
    shape = desc.shape or ()
    return TensorDesc(desc.dtype, shape, desc.layout or "ND", byte_size(desc.dtype, shape))
