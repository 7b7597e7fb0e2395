"""Guests: run onnx-graphsurgeon functions and onnxsim on our model.

Both work on protobuf messages, which would copy every weight, and both drop what they do not know
(node metadata, which holds the exporter's layer paths). So a guest gets the graph with stand-ins
for weights above 1 KiB, and what comes back gets our own tensors and metadata again.
"""

import contextlib
import importlib
import io
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir

from omforge.ir.edit import all_values
from omforge.ir.errors import InputError, OmforgeError
from omforge.ir.weights import all_graphs, location_of, replace_tensors, replaced_tensors

SHARED = 1024  # bytes; larger tensors are shared with a guest instead of copied
SCHEME = "omforge-shared-tensor:"  # location of a stand-in: this and its number

# Neither guest has type stubs, and neither is imported before it is asked for.
GsGraph = Any
GsConstant = Any


def via_graphsurgeon(model: ir.Model, function: Callable[[GsGraph], GsGraph | None]) -> ir.Model:
    """Run a user's onnx-graphsurgeon function on the model, in place.

    Weights above 1 KiB are read only if the function asks for `constant.values`, one at a time;
    those it leaves unchanged stay the model's own tensors. Nodes and values that it keeps get back
    the metadata that graphsurgeon drops. Unused initializers go, as always with graphsurgeon. Node
    and value objects from before the call are no longer part of the model.

    Args:
        model: The model; left as it was if anything fails.
        function: Edits the `gs.Graph` in place and returns None, or returns another.

    Returns:
        `model`.

    Raises:
        OmforgeError: The function failed, or what it made cannot be exported.
        InputError: It returned something other than a graph or None.
    """
    gs: Any = importlib.import_module("onnx_graphsurgeon")
    name = getattr(function, "__name__", type(function).__name__)
    shelf = _Shelf()
    graph: GsGraph = gs.import_onnx(shelf.with_stand_ins(model))
    originals = _give_weights(gs, graph, shelf)
    try:
        result = function(graph)
    except Exception as error:  # a guest's function may raise anything
        raise _guest_error(f"the graphsurgeon function {name} failed", error) from error
    result = graph if result is None else result
    if not isinstance(result, gs.Graph):
        raise InputError(
            f"the graphsurgeon function {name} returned {type(result).__name__}",
            "it must return a gs.Graph, or None after editing its argument",
        )
    try:
        _take_weights(gs, result, shelf, originals)
        proto: onnx.ModelProto = gs.export_onnx(result)
        new = ir.from_proto(proto)
    except Exception as error:  # graphsurgeon raises what its own modules and onnx do
        raise _guest_error(f"what {name} made cannot be exported", error) from error
    shelf.put_back(new)
    _adopt(model, new)
    return model


def via_onnxsim(model: ir.Model, **options: Any) -> ir.Model:
    """Run onnxsim on the model, in place.

    Weights above 1 KiB are handed over as graph inputs, and become initializers again afterwards.
    What onnxsim does is then right for any weights; the price is that it folds and merges nothing
    that depends on one (no `Transpose(weight)`, no batch norm into a convolution). Weights inside
    subgraphs are handed over whole. A large `Constant` node comes back as an initializer.

    Args:
        model: The model; left as it was if anything fails.
        **options: Of `onnxsim.simplify`. Two defaults differ: `tensor_size_threshold` is "1MB", so
            that folding does not write large tensors into the graph, and `certify` is False.

    Returns:
        `model`.

    Raises:
        OmforgeError: onnxsim failed, or its own check (`check_n`) found a difference.
    """
    if "output_path" in options:
        raise InputError("onnxsim's output_path is not available here", "the model is in memory")
    onnxsim: Any = importlib.import_module("onnxsim")
    shelf = _Shelf()
    handed = ir.from_proto(shelf.with_stand_ins(model))
    weights = _weights_to_inputs(handed.graph)
    shelf.put_back(handed)  # what is left is inside subgraphs
    replace_tensors(handed, _inline)
    settings = {"tensor_size_threshold": "1MB", "certify": False, **options}
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # it prints; a library must not
            answer: tuple[onnx.ModelProto, bool] = onnxsim.simplify(ir.to_proto(handed), **settings)
        new, same = ir.from_proto(answer[0]), answer[1]
    except Exception as error:  # onnxsim raises RuntimeError, ValueError, and onnx's own
        raise _guest_error("onnxsim failed", error) from error
    if not same:
        raise OmforgeError(
            "onnxsim changed what the model computes", "its own check found different outputs"
        )
    _inputs_to_weights(new.graph, weights)
    shelf.put_back(new)
    _adopt(model, new)
    return model


def _guest_error(what: str, error: Exception) -> OmforgeError:
    return OmforgeError(
        what,
        f"{type(error).__name__}: {error}",
        "The model was left as it was before",
    )


class _Shelf:
    """Keeps tensors while external tensors that carry their numbers stand in for them."""

    def __init__(self) -> None:
        self._tensors: list[ir.TensorProtocol] = []

    def stand_in(self, tensor: ir.TensorProtocol) -> ir.ExternalTensor:
        self._tensors.append(tensor)
        number = len(self._tensors) - 1
        shape = ir.Shape(tensor.shape.numpy())
        return ir.ExternalTensor(
            f"{SCHEME}{number}", None, None, tensor.dtype, shape=shape, name=tensor.name or ""
        )

    def find(self, location: str) -> ir.TensorProtocol | None:
        if not location.startswith(SCHEME):
            return None
        return self._tensors[int(location.removeprefix(SCHEME))]

    def with_stand_ins(self, model: ir.Model) -> onnx.ModelProto:
        """Return the model's message, without the weights above the limit."""

        def replacement(tensor: ir.TensorProtocol) -> ir.TensorProtocol | None:
            if tensor.dtype is ir.DataType.STRING or tensor.nbytes <= SHARED:
                return _inline(tensor)
            return self.stand_in(tensor)

        with replaced_tensors(model, replacement):
            return ir.to_proto(model)

    def put_back(self, model: ir.Model) -> None:
        """Replace the stand-ins in `model` by the tensors that they stand for."""
        replace_tensors(model, self._behind)

    def _behind(self, tensor: ir.TensorProtocol) -> ir.TensorProtocol | None:
        if not isinstance(tensor, ir.ExternalTensor):
            return None
        return self.find(location_of(tensor))


def _inline(tensor: ir.TensorProtocol) -> ir.TensorProtocol | None:
    if not isinstance(tensor, ir.ExternalTensor):
        return None
    return ir.Tensor(tensor.numpy(), dtype=tensor.dtype, name=tensor.name)


def _give_weights(gs: Any, graph: GsGraph, shelf: _Shelf) -> Mapping[str, ir.TensorProtocol]:
    """Put behind each stand-in a lazy value that the guest can read; return them by name."""
    lazy_values: Any = importlib.import_module("onnx_graphsurgeon.ir.tensor").LazyValues

    class Shared(lazy_values):
        """Reads our tensor, as an array of its own that the guest may write to."""

        def __init__(self, source: ir.TensorProtocol, like: Any) -> None:
            self.source = source
            self.shape, self.dtype, self.nbytes = like.shape, like.dtype, like.nbytes

        def load(self) -> np.ndarray[Any, Any]:
            return np.array(self.source.numpy())

        @property
        def tensor(self) -> onnx.TensorProto:
            # For guests that export a part of the graph to run it, as gs.Graph.fold_constants does.
            return ir.to_proto(ir.Tensor(self.source.numpy(), dtype=self.source.dtype))

    originals: dict[str, ir.TensorProtocol] = {}
    for constant in _constants(gs, graph):
        # Left as it was, it would mark an edited constant's old weights as the ones to use.
        constant.data_location = None
        source = shelf.find(_location(constant))
        if source is not None:
            constant._values = Shared(source, constant._values)
            originals[constant.name] = source
    return originals


def _take_weights(
    gs: Any, graph: GsGraph, shelf: _Shelf, originals: Mapping[str, ir.TensorProtocol]
) -> None:
    """Put stand-ins for all weights into the guest's graph, so that its export copies none."""
    lazy_values: Any = importlib.import_module("onnx_graphsurgeon.ir.tensor").LazyValues
    for constant in _constants(gs, graph):
        source = getattr(constant._values, "source", None)
        if source is None and isinstance(constant._values, np.ndarray):
            source = _edited(constant, originals.get(constant.name))
        if source is not None:
            # One message each: graphsurgeon writes the constant's name into it when it exports.
            constant._values = lazy_values(ir.to_proto(shelf.stand_in(source)))


def _edited(constant: GsConstant, original: ir.TensorProtocol | None) -> ir.TensorProtocol | None:
    """Return the tensor to share for an array: the original if equal; None for a small one."""
    values: np.ndarray[Any, Any] = constant._values
    if values.dtype == object or constant._export_dtype is not None:
        return None
    if original is not None and _same_bytes(values, original.numpy()):
        return original
    # graphsurgeon writes a byte per element of a 4-bit type, so those never pass through it.
    narrow = ir.DataType.from_numpy(values.dtype).bitwidth < 8
    return ir.Tensor(np.ascontiguousarray(values)) if narrow or values.nbytes > SHARED else None


def _same_bytes(left: np.ndarray[Any, Any], right: np.ndarray[Any, Any]) -> bool:
    if left.dtype != right.dtype or left.shape != right.shape:
        return False
    first, second = (np.ascontiguousarray(a).reshape(-1).view(np.uint8) for a in (left, right))
    return np.array_equal(first, second)  # of bytes, because NaN is not equal to itself


def _location(constant: GsConstant) -> str:
    proto = getattr(constant._values, "tensor", None)
    if not isinstance(proto, onnx.TensorProto):
        return ""
    return next((e.value for e in proto.external_data if e.key == "location"), "")


def _constants(gs: Any, graph: GsGraph) -> Iterator[GsConstant]:
    """Yield every constant of a graph, its subgraphs and its functions, some more than once."""
    for owner in (graph, *getattr(graph, "functions", ())):
        yield from (t for t in owner.outputs if isinstance(t, gs.Constant))
        for node in owner.nodes:
            yield from (t for t in node.inputs if isinstance(t, gs.Constant))
            for attribute in node.attrs.values():
                if isinstance(attribute, gs.Constant):
                    yield attribute
                elif isinstance(attribute, gs.Graph):
                    yield from _constants(gs, attribute)


def _weights_to_inputs(graph: ir.Graph) -> Mapping[str, ir.TensorProtocol]:
    """Turn the graph's large initializers and constants into inputs; return their tensors."""
    weights: dict[str, ir.TensorProtocol] = {}
    for value in tuple(graph.initializers.values()):
        tensor = value.const_value
        if tensor is None or not _is_large(tensor) or value.is_graph_input():
            continue
        weights[value.name or ""] = tensor
        del graph.initializers[value.name or ""]
        value.const_value = None
        graph.inputs.append(value)
    for node in tuple(graph):
        attribute = node.attributes.get("value") if node.op_type == "Constant" else None
        if attribute is None or not _is_large(attribute.as_tensor()):
            continue
        tensor, old = attribute.as_tensor(), node.outputs[0]
        shape = ir.Shape(tensor.shape.numpy())
        new = ir.Value(name=old.name, type=ir.TensorType(tensor.dtype), shape=shape)
        old.replace_all_uses_with(new, replace_graph_outputs=True)
        graph.remove(node, safe=True)
        graph.inputs.append(new)
        weights[new.name or ""] = tensor
    return weights


def _is_large(tensor: ir.TensorProtocol) -> bool:
    return tensor.dtype is not ir.DataType.STRING and tensor.nbytes > SHARED


def _inputs_to_weights(graph: ir.Graph, weights: Mapping[str, ir.TensorProtocol]) -> None:
    for value in tuple(graph.inputs):
        tensor = weights.get(value.name or "")
        if tensor is None:
            continue
        graph.inputs.remove(value)
        if value.uses() or value.is_graph_output():
            value.const_value = tensor
            graph.register_initializer(value)


def _adopt(model: ir.Model, new: ir.Model) -> None:
    """Give the model the new graph, with what the guest dropped from nodes and values it kept."""
    _restore_nodes(model, new)
    _restore_values(model, new)
    _carry_over(model.graph, new.graph)
    model.graph = new.graph
    model.functions.clear()
    model.functions.update(new.functions)
    model.ir_version = new.ir_version


def _restore_nodes(model: ir.Model, new: ir.Model) -> None:
    by_name: dict[tuple[str, str], ir.Node] = {}
    by_output: dict[tuple[str, str], ir.Node] = {}
    for graph in all_graphs(model):
        for node in graph:
            if node.name:
                by_name[node.op_type, node.name] = node
            for value in node.outputs:
                by_output[node.op_type, value.name or ""] = node
    for graph in all_graphs(new):
        for node in graph:
            first = node.outputs[0].name if node.outputs else None
            # By output first: onnxsim and users rename nodes more than they rename edges.
            old = by_output.get((node.op_type, first or "")) if first else None
            old = old or by_name.get((node.op_type, node.name or ""))
            if old is not None:
                _carry_over(old, node)


def _restore_values(model: ir.Model, new: ir.Model) -> None:
    old_values = {value.name: value for graph in all_graphs(model) for value in all_values(graph)}
    for graph in all_graphs(new):
        for value in all_values(graph):
            old = old_values.get(value.name)
            if old is not None:
                _carry_over(old, value)


# Graph, node or value. `meta` is a plain mapping that onnx-ir leaves untyped.
def _carry_over(old: Any, new: Any) -> None:
    new.metadata_props.update({**old.metadata_props, **new.metadata_props})
    new.meta.update({**old.meta, **new.meta})
    new.doc_string = new.doc_string or old.doc_string
