"""Run a large graph a few nodes at a time: its weights and activations are never all in memory."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir

from omforge.ir.errors import InputError

Array = npt.NDArray[Any]


EXTERNAL_FOLDER = "session.model_external_initializers_file_folder_path"
"""ONNX Runtime's key for where the weights of a serialised model are."""


_WEIGHTS = 256 << 20
"""Bytes of weights, as float32, that are run at once."""


class Walk:
    """A model evaluated on several sets of inputs, as far as it is asked.

    A value is dropped when nothing that is left to compute reads it.

    Args:
        model: Its main graph is sorted; its nodes hold no subgraphs. Left as it is.
        feeds: Sets of arrays by the name of the input.
        goals: All that will be asked for, as often as it will be, if that is known: what nothing
            else reads is dropped.
    """

    def __init__(
        self,
        model: ir.Model,
        feeds: Sequence[Mapping[str, Array]],
        goals: Iterable[ir.Value] | None = None,
    ) -> None:
        self._model = model
        self._envs = [dict(given) for given in feeds]
        self._left = dict.fromkeys(model.graph)
        self._goals = Counter(goals or ())
        if goals is not None:
            self._left = dict.fromkeys(self._needed(*self._goals))
        for node in model.graph:
            if any(
                a.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS)
                for a in node.attributes.values()
            ):
                raise InputError(
                    f"{node.op_type} {node.name} holds a subgraph",
                    "the model is run a few nodes at a time, and control flow cannot be cut",
                    "Export the model without control flow",
                )

    def advance(
        self, value: ir.Value, replaced: Mapping[ir.Value, Array] | None = None
    ) -> list[Array]:
        """Compute a value on every set of inputs, and whatever it depends on.

        Args:
            value: What to compute.
            replaced: Numbers to take in place of initializers.
        """
        if value.name not in self._envs[0]:
            self._compute(value, replaced or {})
        arrays = [env[_name(value)] for env in self._envs]
        self._goals[value] -= 1
        self._drop()
        return arrays

    def put(self, value: ir.Value, arrays: Sequence[Array]) -> None:
        """Let what is left to compute read these arrays in place of a value that was computed.

        Args:
            value: What `advance` gave.
            arrays: One for each set of inputs, of the value's shape and dtype.
        """
        for env, array in zip(self._envs, arrays, strict=True):
            if value.name in env:
                env[_name(value)] = array

    def fork(self, index: int) -> int:
        """Add a set of inputs that has come as far as set `index`; return its number."""
        self._envs.append(dict(self._envs[index]))
        return len(self._envs) - 1

    def change(self, index: int, value: ir.Value, array: Array) -> None:
        """Let set `index` read this array in place of a value that was computed."""
        self._envs[index][_name(value)] = array

    def finish(
        self,
        values: Sequence[ir.Value],
        changed: Callable[[int, ir.Value, Array], Array],
    ) -> Iterator[Array]:
        """Compute values in turn, on one set of inputs after the other, and end the walk.

        Args:
            values: What to compute, sorted as the graph is.
            changed: Told the number of the set, a value and what it is; its result is read instead.

        Yields:
            The last value on each set.
        """
        segments: dict[ir.Value, _Segment] = {}
        for index, env in enumerate(self._envs):
            for value in values:
                if index == 0 and value.name not in env:
                    segments[value] = self._segment(self._needed(value), value, {})
                if value in segments:
                    segments[value].run(env)
                env[_name(value)] = changed(index, value, env[_name(value)])
            made = env[_name(values[-1])]
            if index:
                env.clear()
            yield made

    def _compute(self, value: ir.Value, replaced: Mapping[ir.Value, Array]) -> None:
        for nodes in _runs(self._needed(value)):
            segment = self._segment(nodes, value, replaced)
            for env in self._envs:
                segment.run(env)
            self._drop(value)

    def _drop(self, kept: ir.Value | None = None) -> None:
        """Forget what nothing that is left reads."""
        for env in self._envs:
            for name in [n for n in env if not self._wanted(n)]:
                if kept is None or name != kept.name:
                    del env[name]

    def _segment(
        self, nodes: Sequence[ir.Node], value: ir.Value, replaced: Mapping[ir.Value, Array]
    ) -> _Segment:
        """Some nodes on the way to a value; they are done with."""
        for node in nodes:
            del self._left[node]
        made = [output for node in nodes for output in node.outputs if output.name]
        kept = [v for v in made if v is value or self._wanted(_name(v))]
        read = {v for node in nodes for v in node.inputs if v is not None} - set(made)
        constants = {v for v in read if v.is_initializer()}
        inputs = sorted(_name(v) for v in read - constants)
        folder = _folder(v for v in constants if v not in replaced)
        proto = self._proto(nodes, inputs, kept, constants, replaced, folder)
        integers = any(node.op_type == "DequantizeLinear" for node in nodes)
        session = _session(proto, folder, folded=not integers)
        return _Segment(session, inputs, [_name(v) for v in kept])

    def _needed(self, *values: ir.Value) -> list[ir.Node]:
        """The nodes left to run for some values, in the graph's order."""
        found: set[ir.Node] = set()
        pending = [value.producer() for value in values]
        while pending:
            node = pending.pop()
            if node is not None and node in self._left and node not in found:
                found.add(node)
                pending += [v.producer() for v in node.inputs if v is not None]
        return [node for node in self._left if node in found]

    def _wanted(self, name: str) -> bool:
        value = self._values().get(name)
        if value is None:
            return False
        return self._goals[value] > 0 or any(user in self._left for user in value.consumers())

    def _values(self) -> dict[str, ir.Value]:
        if not hasattr(self, "_by_name"):
            graph = self._model.graph
            values = [*graph.inputs, *(o for node in graph for o in node.outputs)]
            self._by_name = {_name(v): v for v in values if v.name}
        return self._by_name

    def _proto(
        self,
        nodes: Iterable[ir.Node],
        inputs: Sequence[str],
        outputs: Sequence[ir.Value],
        constants: Iterable[ir.Value],
        replaced: Mapping[ir.Value, Array],
        folder: str | None,
    ) -> onnx.ModelProto:
        proto = onnx.ModelProto(ir_version=11)
        proto.graph.name = "segment"
        proto.graph.node.extend(ir.to_proto(node) for node in nodes)
        for domain, version in self._model.graph.opset_imports.items():
            proto.opset_import.add(domain=domain, version=version)
        for name in inputs:
            kind = ir.DataType.from_numpy(self._envs[0][name].dtype)
            proto.graph.input.add(name=name).type.tensor_type.elem_type = int(kind)
        for value in sorted(constants, key=_name):
            proto.graph.initializer.append(_initializer(value, replaced.get(value), folder))
        for value in outputs:
            proto.graph.output.add(name=_name(value))
        return proto


def _runs(nodes: Iterable[ir.Node]) -> Iterator[list[ir.Node]]:
    """Cut a sequence of nodes where their weights, as float32, become too much for one session.

    ONNX Runtime casts float16 weights, and may do so for several nodes before the first one runs.
    """
    run: list[ir.Node] = []
    size = 0
    for node in nodes:
        tensors = [v.const_value for v in node.inputs if v is not None and v.is_initializer()]
        more = sum(4 * tensor.size for tensor in tensors if tensor is not None)
        if run and size + more > _WEIGHTS:
            yield run
            run, size = [], 0
        run.append(node)
        size += more
    if run:
        yield run


@dataclass(frozen=True)
class _Segment:
    """Some nodes of a graph."""

    session: Any
    inputs: Sequence[str]
    outputs: Sequence[str]

    def run(self, env: dict[str, Array]) -> None:
        """Compute the outputs from what is there, and add them to it."""
        feeds = {name: env[name] for name in self.inputs}
        env.update(zip(self.outputs, self.session.run(self.outputs, feeds), strict=True))


def _folder(constants: Iterable[ir.Value]) -> str | None:
    """The folder of the weights that are in files; None if none is, or they are in several."""
    tensors = (value.const_value for value in constants)
    found = {_base(tensor) for tensor in tensors if isinstance(tensor, ir.ExternalTensor)}
    return found.pop() if len(found) == 1 else None


def _base(tensor: ir.ExternalTensor) -> str:
    return os.path.dirname(os.path.abspath(tensor.path))


def _initializer(value: ir.Value, numbers: Array | None, folder: str | None) -> onnx.TensorProto:
    """A weight; one in a file of `folder` stays there, and ONNX Runtime maps it."""
    tensor = value.const_value
    assert tensor is not None
    if numbers is not None:
        tensor = ir.Tensor(np.asarray(numbers, tensor.dtype.numpy(), order="C"))
    proto = onnx.TensorProto(
        name=_name(value),
        data_type=int(tensor.dtype),
        dims=[int(dim) for dim in tensor.shape.numpy()],
    )
    if isinstance(tensor, ir.ExternalTensor) and folder is not None and tensor.nbytes:
        proto.data_location = onnx.TensorProto.EXTERNAL
        where = {
            "location": os.path.basename(tensor.path),
            "offset": tensor.offset or 0,
            "length": tensor.nbytes,
        }
        for key, entry in where.items():
            proto.external_data.add(key=key, value=str(entry))
    else:
        proto.raw_data = tensor.tobytes()
    return proto


def _session(proto: onnx.ModelProto, folder: str | None, *, folded: bool) -> Any:
    import onnxruntime  # slow to import, and most of `ir` never runs a model

    runtime: Any = onnxruntime  # its stub is incomplete
    options = runtime.SessionOptions()
    options.log_severity_level = 4
    options.graph_optimization_level = runtime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    # An array that is kept would keep all of the session's arena with it, and float16 weights are
    # cast in the default order before the first of them is read: 7B of float16 took over 16 GiB.
    options.enable_cpu_mem_arena = False
    options.enable_mem_pattern = False
    options.execution_order = runtime.ExecutionOrder.PRIORITY_BASED
    # A process beside this one would wait for threads that wait for each other.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    if folder is not None:
        options.add_session_config_entry(EXTERNAL_FOLDER, folder)
    # Folding would make floats of all quantised weights ahead of the first node.
    return runtime.InferenceSession(
        proto.SerializeToString(),
        options,
        providers=["CPUExecutionProvider"],
        disabled_optimizers=[] if folded else ["ConstantFolding"],
    )


def _name(value: ir.Value) -> str:
    assert value.name is not None
    return value.name
