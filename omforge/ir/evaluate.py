"""Run a cut-out part of a graph on ONNX Runtime, to recognise it by what it computes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir

from omforge.ir import dims as d
from omforge.ir.bfloat16 import computed_wide, run_session
from omforge.ir.edit import all_values
from omforge.ir.errors import InputError, OmforgeError
from omforge.ir.values import constant_tensor, dims, known

Array = npt.NDArray[Any]

MAX_CONSTANT_BYTES = 1 << 26
"""A cut-out with a larger constant computes on weights, and is not to be run for recognition."""


class EvaluationError(OmforgeError):
    """The part cannot be run alone: it depends on something that was not given."""


class Cutout:
    """The nodes between `inputs` and `outputs`, ready to run.

    Values whose symbolic value is known (shapes, mostly) are leaves: they are computed from the
    numbers that `run` binds to symbols, so that `Shape(embedding)` does not drag the embedding in.

    Args:
        outputs: What to compute.
        inputs: Where to cut; `run` feeds these.
        opset: The version of the default domain that the nodes are written in.

    Raises:
        EvaluationError: The part depends on a graph input that is not among `inputs`, or on a large
            weight.
    """

    def __init__(self, outputs: Sequence[ir.Value], inputs: Iterable[ir.Value], opset: int) -> None:
        self.outputs = list(outputs)
        self.inputs = {_name(value): value for value in inputs}
        self._used: dict[str, ir.Value] = {}
        self._leaves: dict[str, ir.Value] = {}
        constants: dict[str, ir.TensorProtocol] = {}
        nodes: list[ir.Node] = []
        self._collect(nodes, constants)
        self.nodes = nodes
        proto = onnx.ModelProto(ir_version=10)
        imports = {"": opset}
        proto.graph.name = "cutout"
        for node in nodes:
            written = proto.graph.node.add()
            written.CopyFrom(ir.to_proto(node))
            for index, name in enumerate(written.output):
                if name in self._used or name in self._leaves:
                    # A sibling of what is wanted: cut away, it still needs a name of its own.
                    written.output[index] = f"{name}/cut"
            if node.domain not in ("", "ai.onnx") and node.graph is not None:
                imports.setdefault(node.domain, node.graph.opset_imports.get(node.domain, 1))
        for domain, version in imports.items():
            proto.opset_import.add(domain=domain, version=version)
        for name, value in {**self._used, **self._leaves}.items():
            if value.dtype is None:
                raise EvaluationError(f"{name} has no dtype", "inference did not reach it")
            proto.graph.input.add(name=name).type.tensor_type.elem_type = int(value.dtype)
        for output in self.outputs:
            proto.graph.output.add(name=_name(output))
        self._proto = proto
        self._constants = constants
        self._session: Any = None

    @property
    def used(self) -> set[str]:
        """The names of those inputs that the part depends on."""
        return set(self._used)

    def _collect(self, nodes: list[ir.Node], constants: dict[str, ir.TensorProtocol]) -> None:
        seen: set[str] = set()
        stack: list[tuple[ir.Value, bool]] = [(output, False) for output in reversed(self.outputs)]
        wanted = {_name(output) for output in self.outputs}
        placed: set[int] = set()
        while stack:
            value, done = stack.pop()
            name = _name(value)
            node = value.producer()
            if done:
                if node is not None and id(node) not in placed:
                    placed.add(id(node))
                    nodes.append(node)
                continue
            if name in seen:
                continue
            seen.add(name)
            if name in self.inputs:
                self._used[name] = value
                continue
            tensor = constant_tensor(value)
            if tensor is not None:
                if tensor.nbytes > MAX_CONSTANT_BYTES:
                    raise EvaluationError(f"{name} is a weight of {tensor.nbytes} bytes")
                constants[name] = tensor
            elif name not in wanted and known(value) is not None:
                self._leaves[name] = value
            elif node is None:
                raise EvaluationError(f"it depends on {name}", "which is not given")
            else:
                stack.append((value, True))
                stack.extend((v, False) for v in read_by(node))

    def run(self, feeds: Mapping[str, Array], bindings: Mapping[str, int]) -> list[Array]:
        """Compute the outputs.

        Args:
            feeds: An array for each of the inputs that is used.
            bindings: A number for each symbol that shapes depend on.

        Raises:
            EvaluationError: A feed or a binding is missing, or ONNX Runtime refuses the part.
        """
        import onnxruntime  # slow to import, and most commands never evaluate

        runtime: Any = onnxruntime  # its stub is incomplete
        missing = [name for name in self._used if name not in feeds]
        if missing:
            raise EvaluationError(f"it depends on {missing[0]}", "which is not fed")
        given = {name: feeds[name] for name in self._used}
        for name, value in self._leaves.items():
            given[name] = numbers(value, bindings)
        try:
            if self._session is None:
                options = runtime.SessionOptions()
                options.log_severity_level = 4
                options.intra_op_num_threads = 1
                # These graphs run a handful of times on a few numbers: optimising them costs more
                # than it saves.
                options.graph_optimization_level = runtime.GraphOptimizationLevel.ORT_DISABLE_ALL
                self._session = runtime.InferenceSession(
                    self._computed().SerializeToString(),
                    options,
                    providers=["CPUExecutionProvider"],
                )
            return run_session(self._session, [_name(o) for o in self.outputs], given)
        except Exception as error:  # onnxruntime's own errors share no base class
            if type(error).__module__.startswith("onnxruntime"):
                raise EvaluationError("ONNX Runtime refuses the cut-out", str(error)) from error
            raise

    def _computed(self) -> onnx.ModelProto:
        """What ONNX Runtime gets: in float32, with roundings, where it is in bfloat16."""
        # Not before it is run: many parts are cut out only to look at what they hold.
        for name, tensor in self._constants.items():
            self._proto.graph.initializer.append(_inline(name, tensor))
        values = [v for node in self.nodes for v in (*node.inputs, *node.outputs) if v is not None]
        if all(value.dtype != ir.DataType.BFLOAT16 for value in values):
            return self._proto
        return ir.to_proto(computed_wide(ir.from_proto(self._proto)))


def read_by(node: ir.Node) -> list[ir.Value]:
    """What a node reads: its inputs, and what the graphs inside it take from outside."""
    read = [value for value in node.inputs if value is not None]
    inner = [graph for a in node.attributes.values() for graph in _graphs(a)]
    if not inner:
        return read
    every = [graph for outer in inner for graph in (outer, *outer.subgraphs())]
    made = {value for graph in every for value in all_values(graph)}
    for graph in every:
        read += [v for n in graph for v in n.inputs if v is not None and v not in made]
        read += [value for value in graph.outputs if value not in made]
    return read


def _graphs(attribute: ir.Attr) -> list[ir.Graph]:
    if attribute.is_ref():
        return []
    if attribute.type is ir.AttributeType.GRAPH:
        return [attribute.as_graph()]
    return list(attribute.as_graphs()) if attribute.type is ir.AttributeType.GRAPHS else []


def numbers(value: ir.Value, bindings: Mapping[str, int]) -> Array:
    """The numbers of a value whose symbolic value is known.

    Raises:
        EvaluationError: It is not known, or a symbol has no binding.
    """
    array = known(value)
    if array is None or value.dtype is None:
        raise EvaluationError(f"the value of {_name(value)} is not known")
    flat = [_number(element, bindings) for element in array.ravel()]
    return np.array(flat, dtype=value.dtype.numpy()).reshape(array.shape)


def sizes(value: ir.Value, bindings: Mapping[str, int]) -> tuple[int, ...]:
    """The shape of a value in numbers.

    Raises:
        EvaluationError: The rank is not known, or a symbol has no binding.
    """
    shape = dims(value)
    if shape is None:
        raise EvaluationError(f"{_name(value)} has no known rank")
    return tuple(_number(dim, bindings) for dim in shape)


def _number(dim: d.Dim, bindings: Mapping[str, int]) -> int:
    try:
        return d.evaluate(dim, bindings)
    except InputError as error:  # here it is a pass that chose the bindings, not the user
        raise EvaluationError(error.what, error.why) from error


def _name(value: ir.Value) -> str:
    assert value.name is not None
    return value.name


def _inline(name: str, tensor: ir.TensorProtocol) -> onnx.TensorProto:
    """A tensor with its data in place: a cut-out is run from memory and has no folder."""
    proto = ir.to_proto(tensor)
    if proto.data_location == onnx.TensorProto.EXTERNAL:
        proto = onnx.TensorProto(
            data_type=proto.data_type, dims=proto.dims, raw_data=tensor.tobytes()
        )
    proto.name = name
    return proto
