"""Simulated .om files: the real container and interface, and in place of kernels an ONNX graph.

No device loads such a file: it has no TASK_INFO and no kernels. The simulated pyACL loads no other.
The payload (`payload`) holds the CPU twin of the lowered graph: `NPU*` nodes with their reference
bodies.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal

from omforge import ir
from omforge.air.ge_types import byte_size
from omforge.ir.bfloat16 import computed_wide
from omforge.ir.dims import Dim, evaluate, symbols
from omforge.ir.errors import InputError
from omforge.ir.ops import is_target_op, reference_model
from omforge.ir.values import dims as value_dims
from omforge.om import layout, model_def
from omforge.om.inout import GEAR_INPUT, OmTensor
from omforge.om.model_def import GraphDef, ModelDef, OpDef, TensorDesc
from omforge.om.payload import Payload, pack_payload, packed_graph, place_weights, weight_size
from omforge.om.write import write_om

_DTYPES = {"FLOAT": "float32", "DOUBLE": "float64"}


def simulate_om(
    source: str | os.PathLike[str] | ir.Model,
    output: str | os.PathLike[str],
    *,
    shapes: Mapping[str, Sequence[int]] | None = None,
    gears: Sequence[Sequence[int]] = (),
    external_weight: Literal[0, 1] = 1,
    ge_types: Mapping[str, str] | None = None,
) -> None:
    """Compile a lowered graph as far as a simulation can: write `output` and its weight files.

    Args:
        source: The lowered .onnx, or the model.
        output: The .om file.
        shapes: As --input_shape, -1 where a gear decides; the graph's own unless given, where a
            symbol is a -1.
        gears: As --dynamic_dims: per gear the values of the -1 dims, in the order of `shapes`.
        external_weight: 1 writes constants beside the file, 0 into it.
        ge_types: The GE operator of each ONNX operator; those not named keep their name.

    Raises:
        InputError: Shapes are missing, unknown or contradict the graph; or the graph is not
            of a form that has a CPU twin.
    """
    model = source if isinstance(source, ir.Model) else ir.load(source)
    file = Path(output)
    names = tuple(shapes) if shapes else tuple(str(value.name) for value in model.graph.inputs)
    given = _given_shapes(model, shapes)
    inputs, outputs, output_shapes = _interface(model, given, names, gears)
    twin = _twin(model)
    weights = place_weights(twin, file.parent, external=bool(external_weight))
    payload = Payload(
        graphs=(packed_graph(twin, file),),
        weights=tuple(weights),
        work_size=sum(tensor.size for tensor in outputs),
        weight_size=weight_size(model),
    )
    definition = ModelDef(
        name=file.stem,
        graphs=(GraphDef(file.stem, tuple(_ops(model, inputs, outputs, ge_types or {}))),),
        attributes={model_def.OUT_NODES: tuple(tensor.name for tensor in outputs)},
    )
    write_om(
        file,
        name=file.stem,
        inputs=inputs,
        outputs=outputs,
        partitions={
            layout.MODEL_DEF: model_def.encode(definition),
            layout.SIMULATED_PAYLOAD: pack_payload(payload),
        },
        gears=gears,
        input_order=names if gears else (),
        output_shapes=output_shapes,
        platform_version=layout.SIMULATED_PLATFORM,
    )


def _twin(model: ir.Model) -> ir.Model:
    if any(is_target_op(node) for node in model.graph.all_nodes()):
        return reference_model(computed_wide(model))
    wide = computed_wide(model)
    return model.clone() if wide is model else wide


# Interface


def _given_shapes(
    model: ir.Model, shapes: Mapping[str, Sequence[int]] | None
) -> dict[str, tuple[int, ...]]:
    graph = {str(value.name): _value_dims(value) for value in model.graph.inputs}
    if shapes is None:
        return {
            name: tuple(dim if isinstance(dim, int) else -1 for dim in dims)
            for name, dims in graph.items()
        }
    wrong = [name for name in shapes if name not in graph or len(shapes[name]) != len(graph[name])]
    missing = [name for name in graph if name not in shapes]
    if wrong or missing:
        raise InputError(
            "the shapes do not fit the graph",
            f"wrong: {', '.join(wrong) or 'none'}; missing: {', '.join(missing) or 'none'}",
        )
    return {name: tuple(shapes[name]) for name in graph}


def _interface(
    model: ir.Model,
    given: Mapping[str, tuple[int, ...]],
    names: tuple[str, ...],
    gears: Sequence[Sequence[int]],
) -> tuple[list[OmTensor], list[OmTensor], list[tuple[int, ...]]]:
    """Return inputs, outputs and the outputs' shapes by gear, as GE names and sizes them."""
    slots = [(name, axis) for name in names for axis, dim in enumerate(given[name]) if dim == -1]
    if any(len(gear) != len(slots) for gear in gears) or (slots and not gears):
        raise InputError(
            "the gears do not fit the shapes",
            f"there are {len(slots)} dims of -1, the gears have "
            f"{', '.join(str(len(gear)) for gear in gears) or 'none'}",
        )
    forms = [_bound(given, slots, gear) for gear in gears] or [dict(given)]
    known = [_bindings(model, form) for form in forms]
    inputs = [
        OmTensor(
            name, dtype, given[name], max(byte_size(dtype, form[name]) for form in forms), "ND"
        )
        for name, dtype in ((str(v.name), _dtype(v)) for v in model.graph.inputs)
    ]
    if gears:
        # hicann/ge:compiler/graph/passes/multi_batch/multi_batch_clone_pass.cc, CreateIndexDataNode
        inputs.append(OmTensor(GEAR_INPUT, "int32", (len(slots),), 4 * len(slots)))
    outputs: list[OmTensor] = []
    by_gear: list[tuple[int, ...]] = []
    for index, value in enumerate(model.graph.outputs):
        each = [_evaluated(_value_dims(value), bindings) for bindings in known]
        dtype = _dtype(value)
        largest = max(each, key=lambda shape: byte_size(dtype, shape))
        # What get_output_dims gives for a model with gears is the largest one's shape.
        # As attr_model_out_nodes_name has it for ONNX models: node:index:tensor.
        name = ":".join(map(str, (*_source(value), value.name)))
        outputs.append(OmTensor(name, dtype, largest, byte_size(dtype, largest)))
        if gears and len(set(each)) == 1:
            by_gear.append((-1, index, *largest))
        elif gears:
            by_gear += [(gear, index, *shape) for gear, shape in enumerate(each)]
    return inputs, outputs, by_gear


def _bound(
    given: Mapping[str, tuple[int, ...]], slots: list[tuple[str, int]], gear: Sequence[int]
) -> dict[str, tuple[int, ...]]:
    found = {name: list(shape) for name, shape in given.items()}
    for (name, axis), size in zip(slots, gear, strict=True):
        found[name][axis] = size
    return {name: tuple(shape) for name, shape in found.items()}


def _bindings(model: ir.Model, form: Mapping[str, tuple[int, ...]]) -> dict[str, int]:
    """Return what the graph's symbols are when the inputs have these shapes."""
    pairs = [
        (str(value.name), dim, size)
        for value in model.graph.inputs
        for dim, size in zip(_value_dims(value), form[str(value.name)], strict=True)
    ]
    found = {str(dim): size for _, dim, size in pairs if str(dim) in symbols(dim)}
    for name, dim, size in pairs:
        if symbols(dim) <= found.keys() and evaluate(dim, found) != size:
            raise InputError(
                f"input {name} does not fit the graph",
                f"its dim {dim} is {evaluate(dim, found)} when the others are bound, not {size}",
            )
    return found


def _evaluated(dims: Sequence[Dim], bindings: Mapping[str, int]) -> tuple[int, ...]:
    return tuple(evaluate(dim, bindings) if symbols(dim) <= bindings.keys() else -1 for dim in dims)


def _value_dims(value: ir.Value) -> tuple[Dim, ...]:
    found = value_dims(value)
    if found is None:
        raise InputError(
            f"{value.name} has no shape", "inputs and outputs need one", "Infer shapes first"
        )
    return found


def _dtype(value: ir.Value) -> str:
    name = value.dtype.name if value.dtype is not None else "undefined"
    return _DTYPES.get(name, name.lower())


def _source(value: ir.Value) -> tuple[str, int]:
    """Return what makes a value, and which of its outputs it is; an input makes itself."""
    node = value.producer()
    index = value.index()
    if node is None or index is None:
        return str(value.name), 0
    # GE needs a name; a node without one is called after its first output here.
    return node.name or f"{node.op_type}_{node.outputs[0].name}", index


# MODEL_DEF


def _ops(
    model: ir.Model,
    inputs: Sequence[OmTensor],
    outputs: Sequence[OmTensor],
    ge_types: Mapping[str, str],
) -> Iterator[OpDef]:
    """Yield the graph's operators. Gears are not cloned into Case branches, as GE would."""
    for index, tensor in enumerate(inputs):
        desc = TensorDesc(tensor.dtype, tensor.shape, "ND", tensor.size)
        yield OpDef(
            tensor.name, "Data", (), (desc,), (desc,), {"index": index, "data_type": tensor.dtype}
        )
    for name, value in model.graph.initializers.items():
        yield OpDef(name, "Const", (), (), (_desc(value),))
    for node in model.graph:
        yield OpDef(
            _source(node.outputs[0])[0],
            ge_types.get(node.op_type, node.op_type),
            tuple(_edge(value) for value in node.inputs if value is not None),
            tuple(_desc(value) for value in node.inputs if value is not None),
            tuple(_desc(value) for value in node.outputs),
        )
    sources = [_source(value) for value in model.graph.outputs]
    yield OpDef(
        "Node_Output",
        "NetOutput",
        tuple(_edge(value) for value in model.graph.outputs),
        tuple(TensorDesc(t.dtype, t.shape, "ND", t.size) for t in outputs),
        src_name=tuple(name for name, _ in sources),
        src_index=tuple(index for _, index in sources),
    )


def _edge(value: ir.Value) -> str:
    name, index = _source(value)
    return f"{name}:{index}"


def _desc(value: ir.Value) -> TensorDesc:
    shape = value_dims(value) or ()
    dims = tuple(dim if isinstance(dim, int) else -1 for dim in shape)
    return TensorDesc(_dtype(value), dims, "ND", byte_size(_dtype(value), dims))
