"""What makes a graph the ATC dialect apart from its operators: opset 16, int32 inputs, names.

The opset is 16 because every `NPU*` op that omforge emits is registered there, every ordinary op
is, and ATC looks operators up by the exact opset (hicann/ge:parser/parser/onnx/onnx_parser.cc).
"""

from __future__ import annotations

import bisect
import re
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from omforge import ir
from omforge.ir.dims import Dim, divide, modulo
from omforge.ir.streamed import StreamedTensor
from omforge.ir.values import dims as known_dims
from omforge.ir.values import to_shape
from omforge.lowering.legalize.builder import moves_unit_axes_only
from omforge.lowering.target import EXPANDED, registered

OPSET = 16

# Outside these, node and tensor names are unsafe (hicann/ge:parser/parser/common/pre_checker.cc).
# A colon is legal but separates node, index and tensor in the .om's output names.
_UNSAFE = re.compile(r"[^A-Za-z0-9_./-]")

# Slots of integer inputs that ATC's plugins take as int32 as well as int64 (index inputs).
_INDEX_SLOTS = {"Gather": 1, "GatherElements": 1, "GatherND": 1, "Scatter": 1}

_REDUCTIONS = frozenset(
    f"Reduce{kind}" for kind in ("L1", "L2", "LogSum", "LogSumExp", "Max", "Mean", "Min", "Prod")
) | {"ReduceSumSquare"}


def constants_to_initializers(graph: ir.Graph) -> None:
    """Turn Constant nodes into initializers: of a Constant, ATC reads the `value` attribute only.

    Inside subgraphs they stay nodes, spelled with `value`. Source:
    hicann/ge:parser/parser/onnx/onnx_constant_parser.cc.
    """
    for node in list(graph.all_nodes()):
        if node.domain != "" or node.op_type != "Constant":
            continue
        output = node.outputs[0]
        tensor = ir.convenience.get_const_tensor(output)
        if tensor is None:
            continue
        if node.graph is not graph or output.is_graph_output():
            node.attributes.clear()
            node.attributes.add(ir.AttrTensor("value", tensor))
            continue
        value = ir.Value(
            name=output.name,
            shape=ir.Shape(tensor.shape.numpy()),
            type=ir.TensorType(tensor.dtype),
            const_value=tensor,
        )
        output.replace_all_uses_with(value)
        output.name = None
        graph.remove(node, safe=True)
        graph.register_initializer(value)


def store_int4_raw(graph: ir.Graph) -> None:
    """Store int4 initializers as raw data: ATC reads their int32_data another way than ONNX.

    Source: hicann/ge:parser/parser/onnx/onnx_constant_parser.cc.
    """
    for value in graph.initializers.values():
        tensor = value.const_value
        if tensor is None or tensor.dtype != ir.DataType.INT4:
            continue
        if not isinstance(tensor, ir.ExternalTensor | StreamedTensor):
            value.const_value = ir.tensor(
                tensor.numpy(), dtype=ir.DataType.INT4, name=value.name or ""
            )


def narrow_inputs(graph: ir.Graph) -> None:
    """Make int64 graph inputs int32: token, position and row numbers fit, int64 runs on the AICPU.

    Index inputs take int32 as they are; any other reader gets one Cast back to int64.
    """
    for value in graph.inputs:
        if value.dtype != ir.DataType.INT64 or value.is_initializer():
            continue
        value.type = ir.TensorType(ir.DataType.INT32)
        readers = [
            (node, index) for node, index in value.uses() if _INDEX_SLOTS.get(node.op_type) != index
        ]
        if not readers:
            continue
        wide = ir.Value(
            name=f"{value.name}.int64", shape=value.shape, type=ir.TensorType(ir.DataType.INT64)
        )
        cast = ir.node("Cast", [value], {"to": int(ir.DataType.INT64)}, outputs=[wide])
        _prepend(graph, cast)
        for node, index in readers:
            node.replace_input_with(index, wide)


def _prepend(graph: ir.Graph, node: ir.Node) -> None:
    if len(graph):
        graph.insert_before(graph[0], node)
    else:
        graph.append(node)


def to_opset_16(model: ir.Model) -> None:
    """Respell what later opsets write otherwise, and set the one opset import.

    What opset 16 cannot say stays as it is: the legality check names it.
    """
    for node in model.graph.all_nodes():
        if node.domain == "ai.onnx":
            node.domain = ""
        if node.domain == "":
            respell = _RESPELL.get(node.op_type)
            if respell is not None:
                respell(model.graph, node)
            _drop_trailing_absent_inputs(node)
    imports = model.graph.opset_imports
    # The import of another domain stays only if a node needs it: the legality check reports that.
    used = {node.domain for node in model.graph.all_nodes()}
    for domain in [domain for domain in imports if domain not in used]:
        del imports[domain]
    imports[""] = OPSET


def _drop_trailing_absent_inputs(node: ir.Node) -> None:
    size = len(node.inputs)
    while size and node.inputs[size - 1] is None:
        size -= 1
    node.resize_inputs(size)


def _drop(*names: str) -> Callable[[ir.Graph, ir.Node], None]:
    def respell(_: ir.Graph, node: ir.Node) -> None:
        for name in names:
            node.attributes.pop(name, None)

    return respell


def _split_by_sizes(graph: ir.Graph, node: ir.Node) -> None:
    """Sizes as an input: ATC's plugin reads out of bounds or crashes on `num_outputs`.

    Source: hicann/ops-math:conversion/split_d/framework/split_onnx_plugin.cpp.
    """
    shape = None if node.inputs[0] is None else known_dims(node.inputs[0])
    if shape is None:
        return
    if len(node.inputs) < 2 or node.inputs[1] is None:
        attribute = node.attributes.get("axis")
        axis = 0 if attribute is None else attribute.as_int() % len(shape)
        length, parts = shape[axis], len(node.outputs)
        if not isinstance(length, int):
            _split_by_number(graph, node, axis, shape)
            return
        step = -(-length // parts)  # the last part of an uneven split is the smaller one
        sizes = [step] * (parts - 1) + [length - step * (parts - 1)]
        node.resize_inputs(2)
        node.replace_input_with(1, _integers(graph, f"{node.outputs[0].name}.sizes", sizes))
    node.attributes.pop("num_outputs", None)


def _split_by_number(graph: ir.Graph, node: ir.Node, axis: int, shape: Sequence[Dim]) -> None:
    """Split an open axis into equal parts, by making their number an axis of its own.

    Sizes are constants, so that [N*seq, D] is read as [N, seq, D], and N ones are its sizes. Left
    as it is: an axis that N does not divide, or one beside another that is open.
    """
    parts = len(node.outputs)
    around = [dim for at, dim in enumerate(shape) if at != axis and isinstance(dim, int)]
    if modulo(shape[axis], parts) != 0 or len(around) != len(shape) - 1:
        return
    whole, before, behind = node.inputs[0], around[:axis], around[axis:]
    assert whole is not None

    def reshape(value: ir.Value, sizes: list[int], output: ir.Value) -> ir.Node:
        given = _integers(graph, f"{output.name}.shape", sizes)
        return ir.node("Reshape", [value, given], outputs=[output], name=f"{output.name}.reshape")

    dtype = ir.TensorType(whole.dtype) if whole.dtype is not None else None
    own = divide(shape[axis], parts)
    apart = to_shape([*before, parts, own, *behind])
    by_number = ir.Value(name=f"{node.outputs[0].name}.by_number", shape=apart, type=dtype)
    graph.insert_before(node, reshape(whole, [*before, parts, -1, *behind], by_number))
    node.resize_inputs(2)
    node.replace_input_with(0, by_number)
    node.replace_input_with(1, _integers(graph, f"{by_number.name}.sizes", [1] * parts))
    node.attributes["axis"] = ir.AttrInt64("axis", axis)
    node.attributes.pop("num_outputs", None)
    last = node
    for output in node.outputs:
        old = ir.Value(name=output.name, shape=output.shape, type=dtype)
        output.replace_all_uses_with(old, replace_graph_outputs=True)
        output.name = f"{output.name}.of_one"
        output.shape = to_shape([*before, 1, own, *behind])
        after = reshape(output, [*before, -1, *behind], old)
        graph.insert_after(last, after)
        last = after


def _axes_as_attribute(_: ir.Graph, node: ir.Node) -> None:
    """Reductions other than ReduceSum take axes as an attribute until opset 17."""
    axes = node.inputs[1] if len(node.inputs) > 1 else None
    noop = node.attributes.get("noop_with_empty_axes")
    if axes is None:
        if noop is not None and not noop.as_int():
            node.attributes.pop("noop_with_empty_axes")
        return
    tensor = ir.convenience.get_const_tensor(axes)
    if tensor is None or tensor.size == 0:
        return
    node.attributes.add(ir.AttrInt64s("axes", [int(axis) for axis in tensor.numpy().flatten()]))
    node.attributes.pop("noop_with_empty_axes", None)
    node.resize_inputs(1)


def _integers(graph: ir.Graph, name: str, numbers: list[int]) -> ir.Value:
    while name in graph.initializers:
        name += ".1"
    tensor = ir.tensor(np.asarray(numbers, np.int64), name=name)
    value = ir.Value(
        name=name,
        shape=ir.Shape([len(numbers)]),
        type=ir.TensorType(tensor.dtype),
        const_value=tensor,
    )
    graph.register_initializer(value)
    return value


_RESPELL: Mapping[str, Callable[[ir.Graph, ir.Node], None]] = {
    # Both matter for float8 only, which no target here has.
    "Cast": _drop("saturate", "round_mode"),
    "CastLike": _drop("saturate", "round_mode"),
    "Split": _split_by_sizes,
    **dict.fromkeys(_REDUCTIONS, _axes_as_attribute),
}


def unit_transposes_to_reshapes(graph: ir.Graph) -> None:
    """Make a transpose that moves axes of size 1 only, as at S = 1, a reshape: it costs nothing."""
    for node in list(graph.all_nodes()):
        if node.domain != "" or node.op_type != "Transpose":
            continue
        source, result, perm = node.inputs[0], node.outputs[0], node.attributes.get("perm")
        if source is None or perm is None or source.shape is None or result.shape is None:
            continue
        if not source.shape.is_static() or not result.shape.is_static():
            continue
        if not moves_unit_axes_only(source.shape.numpy(), perm.as_ints()):
            continue
        sizes = _integers(graph, f"{result.name}.shape", list(result.shape.numpy()))
        node.op_type = "Reshape"
        node.attributes.clear()
        node.resize_inputs(2)
        node.replace_input_with(1, sizes)


def merge_moves(graph: ir.Graph) -> None:
    """Let equal reshapes and transposes of one value be one node.

    The canonical graph shapes the new keys for its outputs, and attention shapes them again.
    """
    first: dict[tuple[object, ...], ir.Value] = {}
    for node in list(graph):
        key = _move_key(node)
        if key is None:
            continue
        result = node.outputs[0]
        same = first.setdefault(key, result)
        if same is not result and not result.is_graph_output():
            result.replace_all_uses_with(same)


def _move_key(node: ir.Node) -> tuple[object, ...] | None:
    if node.domain != "" or node.op_type not in ("Reshape", "Transpose"):
        return None
    source, shape = node.inputs[0], known_dims(node.outputs[0])
    if source is None or shape is None:
        return None
    if node.op_type == "Transpose":
        perm = node.attributes.get("perm")
        return ("Transpose", source, None if perm is None else tuple(perm.as_ints()))
    producer = source.producer()
    while producer is not None and producer.op_type == "Reshape" and producer.domain == "":
        source = producer.inputs[0]
        assert source is not None
        producer = source.producer()
    return ("Reshape", source, shape)


def remove_dead(graph: ir.Graph) -> None:
    """Remove nodes and initializers that nothing reads.

    onnx-ir's pass also empties the names of unused outputs, and ATC wires an output named "" to
    every absent input of the whole graph (hicann/ge:parser/parser/onnx/onnx_parser.cc).
    """
    for node in reversed(list(graph)):
        if not any(value.uses() or value.is_graph_output() for value in node.outputs):
            graph.remove(node, safe=True)
    for name, value in list(graph.initializers.items()):
        if not value.uses() and not value.is_graph_output() and not value.is_graph_input():
            del graph.initializers[name]


def name_everything(graph: ir.Graph) -> None:
    """Give every value and node a legal, unique name, and keep the two sets of names apart.

    Graph inputs and outputs keep their names: they are the interface. A node's name must also not
    begin with the name of an expanded node and "_", since that is how its inner nodes are named.
    """
    interface = {value.name or "" for value in (*graph.inputs, *graph.outputs)}
    taken = set(interface)
    values = [*graph.initializers.values()]
    for node in graph.all_nodes():
        values.extend(node.outputs)
    for value in values:
        if value.is_graph_input() or value.is_graph_output():
            continue
        wanted = _UNSAFE.sub("_", value.name or "") or "value"
        name = _unique(wanted, taken)
        taken.add(name)
        if name != value.name:
            value.name = name
    of_values = frozenset(taken)
    nodes = list(graph.all_nodes())
    for node in nodes:
        made = node.outputs[0].name if node.outputs else ""
        wanted = _UNSAFE.sub("_", node.name or f"{made}/{node.op_type}")
        node.name = _unique(f"{wanted}.node" if wanted in of_values else wanted, taken)
        taken.add(node.name)
    _keep_inner_names_apart(nodes, taken)


def _keep_inner_names_apart(nodes: list[ir.Node], taken: set[str]) -> None:
    ordered = sorted(node.name or "" for node in nodes)
    for node in nodes:
        name = node.name or ""
        if registered(node.domain, node.op_type, OPSET) != EXPANDED:
            continue
        prefix = f"{name}_"
        at = bisect.bisect_left(ordered, prefix)
        if at < len(ordered) and ordered[at].startswith(prefix):
            # No other name begins with this one and a dot and an underscore follows.
            node.name = _unique(f"{name}.outer", taken)
            taken.add(node.name)


def _unique(name: str, taken: set[str]) -> str:
    if name not in taken:
        return name
    count = 1
    while f"{name}.{count}" in taken:
        count += 1
    return f"{name}.{count}"
