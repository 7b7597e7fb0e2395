"""Records the nodes that stand in for one node, each value with its dtype and static shape.

A legalisation is a transaction: it records nodes on a `Builder`, and they are spliced in before the
node that they replace only when it succeeds. Constants become initializers, equal ones once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping, Sequence

import numpy as np
import numpy.typing as npt

from omforge import ir
from omforge.ir.ops import TARGET_OPS
from omforge.lowering.target import Target

LEGALIZED_FROM = "legalized_from"
"""Metadata key of a node that a legalisation made: the op type and name of the node it replaced."""

NOT_LEGALIZED = "not_legalized"
"""Metadata key of a node that stayed: why its legalisation refused."""

Dims = tuple[int, ...]
AttributeValue = int | float | str | Sequence[int]


class NotLegal(Exception):
    """A legalisation refuses a node; the message says why. The node stays as it was."""


class Builder:
    """The nodes recorded for the node at hand, and what all nodes of one model share.

    Args:
        graph: The model's graph; constants become its initializers.
        target: What the nodes are for.
    """

    def __init__(self, graph: ir.Graph, target: Target) -> None:
        self.target = target
        self._graph = graph
        self._names = _value_names(graph)
        self._constants: dict[Hashable, ir.Value] = {}
        self._shared: dict[Hashable, ir.Value] = {}
        self._shared_now: list[Hashable] = []
        self._pending: list[ir.Node] = []
        self._anchor: ir.Node | None = None

    def begin(self, node: ir.Node) -> None:
        """Start recording in front of this node."""
        self._anchor = node
        self._pending = []
        self._shared_now = []

    def abandon(self) -> None:
        """Forget what was recorded since `begin`."""
        for node in self._pending:
            for index in range(len(node.inputs)):
                node.replace_input_with(index, None)  # else they would stay users of the graph
        for key in self._shared_now:
            del self._shared[key]
        self._pending = []

    def commit(self, *results: ir.Value | None) -> None:
        """Splice the recorded nodes in, and let `results` take the node's outputs' places.

        A result takes its output's name, so that graph outputs keep theirs.
        """
        node = self._require_anchor()
        graph = node.graph
        assert isinstance(graph, ir.Graph)
        for old, new in zip(node.outputs, results, strict=False):
            if new is None:
                continue
            new = self._own(new) if old.is_graph_output() else new
            name = old.name
            old.replace_all_uses_with(new, replace_graph_outputs=True)
            if new.producer() in self._pending:
                old.name = None
                new.name = name
        graph.insert_before(node, self._pending)
        graph.remove(node, safe=True)
        self._pending = []

    def _own(self, value: ir.Value) -> ir.Value:
        """A graph output must be made by a recorded node: one that was there has another name."""
        if value.producer() in self._pending and not value.is_graph_output():
            return value
        return self.emit("Identity", [value], value.dtype, dims(value))

    def _require_anchor(self) -> ir.Node:
        assert self._anchor is not None, "begin() comes first"
        return self._anchor

    def emit(
        self,
        op_type: str,
        inputs: Sequence[ir.Value],
        dtype: ir.DataType | None,
        shape: Sequence[int],
        **attributes: AttributeValue,
    ) -> ir.Value:
        """Record a node of one output."""
        return self._record(op_type, inputs, ((dtype, tuple(shape)),), attributes)[0]

    def target_op(self, op_type: str, *inputs: ir.Value) -> ir.Value:
        """Record a target op; the other outputs than the first get names and stay unused."""
        op = TARGET_OPS[op_type]
        given = [(_dtype(value), dims(value)) for value in inputs]
        return self._record(op_type, inputs, op.infer(given), {})[0]

    def _record(
        self,
        op_type: str,
        inputs: Sequence[ir.Value],
        outputs: Sequence[tuple[ir.DataType | None, Dims]],
        attributes: Mapping[str, AttributeValue],
    ) -> tuple[ir.Value, ...]:
        anchor = self._require_anchor()
        base = anchor.outputs[0].name or anchor.op_type
        values = [
            ir.Value(
                name=self._fresh(f"{base}.{op_type}"),
                shape=ir.Shape(shape),
                type=None if dtype is None else ir.TensorType(dtype),
            )
            for dtype, shape in outputs
        ]
        metadata = dict(anchor.metadata_props)
        metadata[LEGALIZED_FROM] = f"{anchor.op_type} {anchor.name or base}"
        node = ir.node(
            op_type,
            inputs,
            dict(attributes),
            outputs=values,
            # Named after the node it replaces: atc's log and profile then name the layer.
            name=f"{anchor.name or base}/{op_type}",
            metadata_props=metadata,
        )
        self._pending.append(node)
        return tuple(values)

    def _fresh(self, name: str) -> str:
        unique, count = name, 1
        while unique in self._names:
            unique, count = f"{name}.{count}", count + 1
        self._names.add(unique)
        return unique

    def constant(self, array: npt.ArrayLike, dtype: ir.DataType) -> ir.Value:
        """Return an initializer of these numbers; the same numbers give the same initializer."""
        numbers = np.ascontiguousarray(np.asarray(array, dtype=dtype.numpy()))
        # ascontiguousarray makes a scalar one-dimensional; a scalar stays rank 0 here.
        numbers = numbers.reshape(np.shape(array))
        key = (dtype, numbers.shape, numbers.tobytes())
        if key not in self._constants:
            name = self._fresh(f"constant.{len(self._constants)}")
            tensor = ir.tensor(numbers, dtype=dtype, name=name)
            value = ir.Value(
                name=name,
                shape=ir.Shape(numbers.shape),
                type=ir.TensorType(dtype),
                const_value=tensor,
            )
            self._graph.register_initializer(value)
            self._constants[key] = value
        return self._constants[key]

    def shared(self, key: Hashable, make: Callable[[], ir.Value]) -> ir.Value:
        """Return what `make` recorded the first time that this key was asked for.

        Nodes are visited in the graph's order, so what an earlier node recorded is there for a
        later one of the same graph.
        """
        full_key = (id(self._require_anchor().graph), key)
        if full_key not in self._shared:
            self._shared[full_key] = make()
            self._shared_now.append(full_key)
        return self._shared[full_key]

    # The operators that legalisations are made of. Shapes follow ONNX's rules for opset 16.

    def matmul(self, a: ir.Value, b: ir.Value) -> ir.Value:
        """Matrix product of a [..., M, K] and b [..., K, N]."""
        left, right = dims(a), dims(b)
        if left[-1] != right[-2]:
            raise NotLegal(f"MatMul of {list(left)} and {list(right)}")
        batch = _broadcast(left[:-2], right[:-2])
        return self.emit("MatMul", [a, b], a.dtype, (*batch, left[-2], right[-1]))

    def binary(self, op_type: str, a: ir.Value, b: ir.Value) -> ir.Value:
        """Record Add, Sub, Mul or Div, with broadcasting."""
        return self.emit(op_type, [a, b], a.dtype, _broadcast(dims(a), dims(b)))

    def add(self, a: ir.Value, b: ir.Value | float) -> ir.Value:
        """The sum, with broadcasting."""
        return self.binary("Add", a, self._operand(a, b))

    def sub(self, a: ir.Value, b: ir.Value | float) -> ir.Value:
        """The difference, with broadcasting."""
        return self.binary("Sub", a, self._operand(a, b))

    def mul(self, a: ir.Value, b: ir.Value | float) -> ir.Value:
        """The product, with broadcasting; by the number 1 it is a itself."""
        if not isinstance(b, ir.Value) and b == 1.0:
            return a
        return self.binary("Mul", a, self._operand(a, b))

    def div(self, a: ir.Value, b: ir.Value) -> ir.Value:
        """The quotient, with broadcasting."""
        return self.binary("Div", a, b)

    def _operand(self, like: ir.Value, operand: ir.Value | float) -> ir.Value:
        return operand if isinstance(operand, ir.Value) else self.constant(operand, _dtype(like))

    def unary(self, op_type: str, x: ir.Value) -> ir.Value:
        """Record an elementwise op of one input: Neg, Sigmoid, Tanh, Erf, Sqrt."""
        return self.emit(op_type, [x], x.dtype, dims(x))

    def where(self, condition: ir.Value, a: ir.Value, b: ir.Value) -> ir.Value:
        """Take a where the condition holds, else b, with broadcasting."""
        shape = _broadcast(dims(condition), dims(a), dims(b))
        return self.emit("Where", [condition, a, b], a.dtype, shape)

    def cast(self, x: ir.Value, dtype: ir.DataType) -> ir.Value:
        """The value in another dtype; x itself where it has it already."""
        if x.dtype == dtype:
            return x
        return self.emit("Cast", [x], dtype, dims(x), to=int(dtype))

    def reshape(self, x: ir.Value, shape: Sequence[int]) -> ir.Value:
        """The value in another shape; a chain of reshapes becomes one, or none at all."""
        producer = x.producer()
        while producer is not None and producer.op_type == "Reshape" and producer.domain == "":
            source = producer.inputs[0]
            assert source is not None
            x, producer = source, source.producer()
        if dims(x) == tuple(shape):
            return x
        if math.prod(dims(x)) != math.prod(shape):
            raise NotLegal(f"{list(dims(x))} cannot take the shape {list(shape)}")
        sizes = self.constant(list(shape), ir.DataType.INT64)
        return self.emit("Reshape", [x, sizes], x.dtype, shape)

    def transpose(self, x: ir.Value, permutation: Sequence[int]) -> ir.Value:
        """The value with its axes in another order; a reshape where only axes of size 1 move."""
        before = dims(x)
        after = tuple(before[axis] for axis in permutation)
        if moves_unit_axes_only(before, permutation):
            return self.reshape(x, after)
        return self.emit("Transpose", [x], x.dtype, after, perm=tuple(permutation))

    def concat(self, parts: Sequence[ir.Value], axis: int) -> ir.Value:
        """The parts one after the other along an axis counted from the end (negative)."""
        shape = list(dims(parts[0]))
        shape[axis] = sum(dims(part)[axis] for part in parts)
        return self.emit("Concat", parts, parts[0].dtype, shape, axis=len(shape) + axis)

    def split(self, x: ir.Value, sizes: Sequence[int]) -> tuple[ir.Value, ...]:
        """The value cut along its last axis."""
        shape = dims(x)
        lengths = self.constant(list(sizes), ir.DataType.INT64)
        outputs = [(x.dtype, (*shape[:-1], size)) for size in sizes]
        return self._record("Split", [x, lengths], outputs, {"axis": len(shape) - 1})

    def softmax(self, x: ir.Value) -> ir.Value:
        """Softmax over the last axis."""
        return self.emit("Softmax", [x], x.dtype, dims(x), axis=-1)

    def mean(self, x: ir.Value, first_axis: int) -> ir.Value:
        """The mean over the axes from `first_axis` (0 or more) on, which stay with size 1."""
        shape = dims(x)
        axes = tuple(range(first_axis, len(shape)))
        kept = (*shape[:first_axis], *(1 for _ in axes))
        return self.emit("ReduceMean", [x], x.dtype, kept, axes=axes, keepdims=1)

    def gather(self, table: ir.Value, rows: ir.Value) -> ir.Value:
        """The rows of a table [R, ...] by index [...]."""
        return self.emit("Gather", [table, rows], table.dtype, dims(rows) + dims(table)[1:], axis=0)


def dims(value: ir.Value) -> Dims:
    """Return the static shape of a value.

    Raises:
        NotLegal: It is not known, or not static.
    """
    shape = value.shape
    if shape is None:
        raise NotLegal(f"the shape of {value.name!r} is not known")
    found: list[int] = []
    for dim in shape:
        if not isinstance(dim, int):
            raise NotLegal(f"the shape {shape} of {value.name!r} is not static")
        found.append(dim)
    return tuple(found)


def moves_unit_axes_only(shape: Sequence[int], permutation: Sequence[int]) -> bool:
    """True for a transpose that leaves the order of the elements in memory as it is."""
    moved = [axis for axis in permutation if shape[axis] != 1]
    return moved == sorted(moved)


def required_input(node: ir.Node, index: int) -> ir.Value:
    """Return an input that the op cannot do without.

    Raises:
        NotLegal: It is absent.
    """
    value = optional_input(node, index)
    if value is None:
        raise NotLegal(f"input {index} is absent")
    return value


def optional_input(node: ir.Node, index: int) -> ir.Value | None:
    """Return an input, or None where it is absent."""
    return node.inputs[index] if index < len(node.inputs) else None


def used_output(node: ir.Node, index: int) -> bool:
    """Say whether anything reads this output."""
    if index >= len(node.outputs):
        return False
    value = node.outputs[index]
    return bool(value.uses()) or value.is_graph_output()


def int_attribute(node: ir.Node, name: str, default: int) -> int:
    """Return an INT attribute, or its default."""
    attribute = node.attributes.get(name)
    return default if attribute is None else attribute.as_int()


def float_attribute(node: ir.Node, name: str, default: float) -> float:
    """Return a FLOAT attribute, or its default."""
    attribute = node.attributes.get(name)
    return default if attribute is None else attribute.as_float()


def _dtype(value: ir.Value) -> ir.DataType:
    if value.dtype is None:
        raise NotLegal(f"the dtype of {value.name!r} is not known")
    return value.dtype


def _broadcast(*shapes: Dims) -> Dims:
    try:
        return np.broadcast_shapes(*shapes)
    except ValueError as error:
        raise NotLegal(f"{' and '.join(map(str, shapes))} do not broadcast") from error


def _value_names(graph: ir.Graph) -> set[str]:
    names = {value.name or "" for value in (*graph.inputs, *graph.initializers.values())}
    for node in graph.all_nodes():
        names.update(value.name or "" for value in node.outputs)
    return names
