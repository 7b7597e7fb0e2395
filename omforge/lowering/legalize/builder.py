"""Records the nodes that stand in for one node, each value with its dtype and shape.

A legalisation is a transaction: it records nodes on a `Builder`, and they are spliced in before the
node that they replace only when it succeeds. Constants become initializers, equal ones once.

A dimension is a number or an expression: a graph for gears keeps `seq` as a symbol, and the numbers
that it may take are the builder's `gears`. What is recorded then holds for each of them.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence

import numpy as np
import numpy.typing as npt

from omforge import ir
from omforge.air.lowered import GE, SLOTS
from omforge.ir.dims import Dim, evaluate, symbols
from omforge.ir.fronts import Front
from omforge.ir.ops import TARGET_OPS
from omforge.ir.values import dims as known_dims
from omforge.ir.values import to_shape
from omforge.lowering.target import Target

LEGALIZED_FROM = "legalized_from"
"""Metadata key of a node that a legalisation made: the op type and name of the node it replaced."""

NOT_LEGALIZED = "not_legalized"
"""Metadata key of a node that stayed: why its legalisation refused."""

Dims = tuple[Dim, ...]
Results = Sequence[ir.Value | None]
"""What takes the places of a node's outputs; None where nothing reads one."""
AttributeValue = int | float | str | Sequence[int] | Sequence[str]

# Beyond every length: to the end, in the `ends` of a Slice.
_TO_THE_END = 2**31 - 1


class NotLegal(Exception):
    """A legalisation refuses a node; the message says why. The node stays as it was."""


class Builder:
    """The nodes recorded for the node at hand, and what all nodes of one model share.

    Args:
        graph: The model's graph; constants become its initializers.
        target: What the nodes are for.
        gears: The numbers that each symbol of the shapes may be; none for a static graph.
        front: What atc is given.
    """

    def __init__(
        self,
        graph: ir.Graph,
        target: Target,
        gears: Mapping[str, Sequence[int]] | None = None,
        front: Front = "onnx",
    ) -> None:
        self.target = target
        self.front = front
        self.gears: Mapping[str, Sequence[int]] = gears or {}
        self._graph = graph
        self._names = _value_names(graph)
        self._constants: dict[Hashable, ir.Value] = {}
        self._shared: dict[Hashable, ir.Value] = {}
        self._shared_now: list[Hashable] = []
        self._pending: list[ir.Node] = []
        self._replaced: list[tuple[ir.Value, ir.Value]] = []
        self._anchor: ir.Node | None = None

    def bindings(self) -> list[dict[str, int]]:
        """Numbers for the symbols, gear by gear; one empty binding for a static graph."""
        count = max((len(numbers) for numbers in self.gears.values()), default=1)
        return [{name: self.gears[name][at] for name in self.gears} for at in range(count)]

    def at_gears(self, shape: Sequence[Dim]) -> list[tuple[int, ...]]:
        """Return the shape at each gear.

        Raises:
            NotLegal: A symbol in it has no gears.
        """
        unknown = sorted({name for dim in shape for name in symbols(dim)} - set(self.gears))
        if unknown:
            raise NotLegal(f"{shape_text(shape)} is not static: {unknown[0]!r} may be anything")
        return [tuple(evaluate(dim, gear) for dim in shape) for gear in self.bindings()]

    @property
    def inputs(self) -> Sequence[ir.Value]:
        """The graph's inputs."""
        return self._graph.inputs

    @property
    def pending(self) -> Sequence[ir.Node]:
        """The nodes recorded since `begin`."""
        return self._pending

    @property
    def spared(self) -> list[ir.Node]:
        """Earlier nodes that nothing reads once this is committed."""
        makers = [old.producer() for old, _ in self._replaced]
        return [node for node in makers if node is not None]

    def begin(self, node: ir.Node) -> None:
        """Start recording in front of this node."""
        self._anchor = node
        self._pending = []
        self._replaced = []
        self._shared_now = []

    def abandon(self) -> None:
        """Forget what was recorded since `begin`."""
        for node in self._pending:
            for index in range(len(node.inputs)):
                node.replace_input_with(index, None)  # else they would stay users of the graph
            self._names.difference_update(value.name or "" for value in node.outputs)
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
        for old, new in self._replaced:
            old.replace_all_uses_with(new)
        graph.insert_before(node, self._pending)
        graph.remove(node, safe=True)
        self._pending = []

    def replace(self, old: ir.Value, new: ir.Value) -> None:
        """Let a recorded value stand for one of an earlier node too, once this is committed."""
        self._replaced.append((old, new))

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
        shape: Sequence[Dim],
        **attributes: AttributeValue,
    ) -> ir.Value:
        """Record a node of one output."""
        return self.record(op_type, inputs, ((dtype, tuple(shape)),), attributes)[0]

    def target_op(
        self, op_type: str, *inputs: ir.Value, **attributes: AttributeValue
    ) -> tuple[ir.Value, ...]:
        """Record a target op with all of its outputs: unused ones have names as well."""
        op = TARGET_OPS[op_type]
        given = [(_dtype(value), dims(value)) for value in inputs]
        return self.record(op_type, inputs, op.infer(given), attributes)

    def ge(
        self,
        op_type: str,
        operands: Mapping[str, ir.Value | None],
        outputs: Sequence[tuple[ir.DataType | None, Dims]],
        **attributes: AttributeValue,
    ) -> tuple[ir.Value, ...]:
        """Record an operator of GE's own, its operands by the names of its prototype.

        Those that are None are not fed; of a dynamic input the one operand is its first.
        """
        fed = {name: value for name, value in operands.items() if value is not None}
        given = {SLOTS: tuple(fed), **attributes}
        return self.record(op_type, list(fed.values()), outputs, given, domain=GE)

    def record(
        self,
        op_type: str,
        inputs: Sequence[ir.Value],
        outputs: Sequence[tuple[ir.DataType | None, Dims]],
        attributes: Mapping[str, AttributeValue],
        domain: str = "",
    ) -> tuple[ir.Value, ...]:
        """Record a node of any number of outputs, each given by its dtype and shape."""
        anchor = self._require_anchor()
        base = anchor.outputs[0].name or anchor.op_type
        values = [
            ir.Value(
                name=self._fresh(f"{base}.{op_type}"),
                shape=to_shape(shape),
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
            domain=domain,
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

    def stored(self, key: Hashable, name: str, make: Callable[[], ir.TensorProtocol]) -> ir.Value:
        """Return an initializer of the tensor that `make` gives; the same key gives the same.

        Unlike the numbers of `constant`, those of the tensor may be computed when it is written.
        """
        full_key = ("stored", key)
        if full_key not in self._constants:
            tensor = make()
            value = ir.Value(
                name=self._fresh(name),
                shape=ir.Shape(tensor.shape.numpy()),
                type=ir.TensorType(tensor.dtype),
                const_value=tensor,
            )
            self._graph.register_initializer(value)
            self._constants[full_key] = value
        return self._constants[full_key]

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
            raise NotLegal(f"MatMul of {shape_text(left)} and {shape_text(right)}")
        batch = broadcast(left[:-2], right[:-2])
        return self.emit("MatMul", [a, b], a.dtype, (*batch, left[-2], right[-1]))

    def matmul_turned(self, a: ir.Value, b: ir.Value) -> ir.Value:
        """Matrix product of a [..., M, K] and b [..., N, K], turned; of the front air alone."""
        left, right = dims(a), dims(b)
        if left[-1] != right[-1]:
            raise NotLegal(f"a product of {shape_text(left)} and {shape_text(right)}, turned")
        shape = (*broadcast(left[:-2], right[:-2]), left[-2], right[-2])
        operands = {"x1": a, "x2": b}
        return self.ge("BatchMatMulV2", operands, [(a.dtype, shape)], adj_x1=0, adj_x2=1)[0]

    def binary(self, op_type: str, a: ir.Value, b: ir.Value) -> ir.Value:
        """Record Add, Sub, Mul or Div, with broadcasting."""
        return self.emit(op_type, [a, b], a.dtype, broadcast(dims(a), dims(b)))

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

    def below(self, x: ir.Value, limit: float) -> ir.Value:
        """True where x is less than the limit."""
        bound = self.constant(limit, _dtype(x))
        return self.emit("Less", [x, bound], ir.DataType.BOOL, dims(x))

    def where(self, condition: ir.Value, a: ir.Value, b: ir.Value) -> ir.Value:
        """Take a where the condition holds, else b, with broadcasting."""
        shape = broadcast(dims(condition), dims(a), dims(b))
        return self.emit("Where", [condition, a, b], a.dtype, shape)

    def cast(self, x: ir.Value, dtype: ir.DataType) -> ir.Value:
        """The value in another dtype; x itself where it has it already."""
        if x.dtype == dtype:
            return x
        return self.emit("Cast", [x], dtype, dims(x), to=int(dtype))

    def reshape(self, x: ir.Value, shape: Sequence[Dim]) -> ir.Value:
        """The value in another shape; a chain of reshapes becomes one, or none at all.

        The target is a constant: of the dimensions that are no numbers, those that x has at the
        same place are written 0, and one more -1.
        """
        last, first = x, _first_of_chain(x)
        if dims(first) == tuple(shape):
            return first
        if product(dims(first)) != product(shape):
            raise NotLegal(f"{shape_text(dims(first))} cannot take the shape {shape_text(shape)}")
        for source in (first, last):
            target = reshape_target(dims(source), shape)
            if target is not None:
                sizes = self.constant(target, ir.DataType.INT64)
                return self.emit("Reshape", [source, sizes], x.dtype, shape)
        raise NotLegal(
            f"{shape_text(dims(last))} to {shape_text(shape)} needs two sizes known at run time"
        )

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
        for part in parts[1:]:
            shape[axis] = shape[axis] + dims(part)[axis]
        return self.emit("Concat", parts, parts[0].dtype, shape, axis=len(shape) + axis)

    def split(self, x: ir.Value, sizes: Sequence[Dim]) -> tuple[ir.Value, ...]:
        """The value cut along its last axis.

        Where a size is no number, each part is a Slice: it begins at a number, and only the last
        part may be of unknown size.
        """
        shape = dims(x)
        numbers = [size for size in sizes if isinstance(size, int)]
        if len(numbers) == len(sizes):
            lengths = self.constant(numbers, ir.DataType.INT64)
            outputs = [(x.dtype, (*shape[:-1], size)) for size in sizes]
            return self.record("Split", [x, lengths], outputs, {"axis": len(shape) - 1})
        if any(not isinstance(size, int) for size in sizes[:-1]):
            raise NotLegal(f"only the last of the sizes {shape_text(sizes)} may change at run time")
        parts: list[ir.Value] = []
        start = 0
        for size in sizes:
            end = start + size if isinstance(size, int) else _TO_THE_END
            bounds = [
                self.constant([number], ir.DataType.INT64)
                for number in (start, end, len(shape) - 1)
            ]
            parts.append(self.emit("Slice", [x, *bounds], x.dtype, (*shape[:-1], size)))
            start = end
        return tuple(parts)

    def softmax(self, x: ir.Value) -> ir.Value:
        """Softmax over the last axis."""
        return self.emit("Softmax", [x], x.dtype, dims(x), axis=-1)

    def mean(self, x: ir.Value, first_axis: int) -> ir.Value:
        """The mean over the axes from `first_axis` (0 or more) on, which stay with size 1."""
        shape = dims(x)
        axes = tuple(range(first_axis, len(shape)))
        kept: Dims = (*shape[:first_axis], *(1 for _ in axes))
        return self.emit("ReduceMean", [x], x.dtype, kept, axes=axes, keepdims=1)

    def gather(self, table: ir.Value, rows: ir.Value) -> ir.Value:
        """The rows of a table [R, ...] by index [...]."""
        return self.emit("Gather", [table, rows], table.dtype, dims(rows) + dims(table)[1:], axis=0)


def dims(value: ir.Value) -> Dims:
    """Return the shape of a value.

    Raises:
        NotLegal: It is not known, or a dimension has neither number nor name.
    """
    shape = value.shape
    if shape is None:
        raise NotLegal(f"the shape of {value.name!r} is not known")
    if any(not isinstance(dim, int) and not dim.value for dim in shape):
        raise NotLegal(f"the shape {shape} of {value.name!r} is not known")
    found = known_dims(value)
    assert found is not None
    return found


def number(dim: Dim, what: str) -> int:
    """Return a dimension that must be a number.

    Raises:
        NotLegal: It is an expression.
    """
    if not isinstance(dim, int):
        raise NotLegal(f"{what} is {dim}, must be a number")
    return dim


def product(shape: Sequence[Dim]) -> Dim:
    """Return the number of elements."""
    total: Dim = 1
    for dim in shape:
        total = total * dim
    return total


def moves_unit_axes_only(shape: Sequence[Dim], permutation: Sequence[int]) -> bool:
    """True for a transpose that leaves the order of the elements in memory as it is."""
    moved = [axis for axis in permutation if shape[axis] != 1]
    return moved == sorted(moved)


def reshape_target(shape: Sequence[Dim], result: Sequence[Dim]) -> list[int] | None:
    """Return the constant target of a Reshape, or None where a constant cannot say it.

    ATC's plugin reads `allowzero` and so has ONNX's 0, "as it was"
    (hicann/ops-math:conversion/reshape/framework/reshape_onnx_plugin.cpp).
    """
    target: list[int] = []
    for axis, dim in enumerate(result):
        if isinstance(dim, int):
            target.append(dim)
        else:
            target.append(0 if axis < len(shape) and shape[axis] == dim else -1)
    return target if target.count(-1) <= 1 else None


def _first_of_chain(x: ir.Value) -> ir.Value:
    producer = x.producer()
    while producer is not None and producer.op_type == "Reshape" and producer.domain == "":
        source = producer.inputs[0]
        assert source is not None
        x, producer = source, source.producer()
    return x


def shape_text(shape: Sequence[Dim]) -> str:
    """Return a shape as messages write it."""
    return f"[{', '.join(map(str, shape))}]"


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


def broadcast(*shapes: Sequence[Dim]) -> Dims:
    """Return the shape that shapes broadcast to.

    Raises:
        NotLegal: They do not.
    """
    rank = max(len(shape) for shape in shapes)
    result: list[Dim] = [1] * rank
    for shape in shapes:
        for axis, dim in enumerate(shape, start=rank - len(shape)):
            if dim == 1 or dim == result[axis]:
                continue
            if result[axis] != 1:
                raise NotLegal(f"{' and '.join(map(shape_text, shapes))} do not broadcast")
            result[axis] = dim
    return tuple(result)


def _value_names(graph: ir.Graph) -> set[str]:
    names = {value.name or "" for value in (*graph.inputs, *graph.initializers.values())}
    for node in graph.all_nodes():
        names.update(value.name or "" for value in node.outputs)
    return names
