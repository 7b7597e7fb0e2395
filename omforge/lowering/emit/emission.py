"""The GE graph under construction: operators from ONNX values, their slots by the names of GE.

Every operator is laid out by its prototype: inputs in order, those that are not fed as empty slots
(trailing ones are left out), attributes by the types that the prototype says.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from omforge import ir
from omforge.air import graph as g
from omforge.air.graph import Attr, Desc, Op, Tensor
from omforge.air.names import expected, naming
from omforge.air.prototypes import Prototype, Slot, prototype
from omforge.ir.dims import Dim
from omforge.ir.values import dims as known_dims

AttributeValue = int | float | bool | str | Sequence[int]
Operand = str | Sequence[str]
"""What an input reads, "producer:output"; of a dynamic input all that it reads."""

Place = Callable[[ir.TensorProtocol], tuple[str, int, int] | None]
"""Where a tensor's bytes are: file, offset and length; None for one that goes into the graph."""

_NAMES = {"FLOAT": "float32", "DOUBLE": "float64"}


UNREGISTERED: Mapping[tuple[str, str], str] = {("Reshape", "allowzero"): "Int"}
"""Attributes that no prototype has, and that ATC's ONNX plugins write: with their types.

Source: hicann/ops-math:conversion/reshape/framework/reshape_onnx_plugin.cpp.
"""


class NotEmittedError(Exception):
    """A node cannot be said in GE's operators; the message says why."""


@dataclass(frozen=True)
class Typed:
    """Dtype and shape of a value in between; a dim that is open is -1."""

    dtype: str
    shape: tuple[int, ...]


def dtype_text(dtype: ir.DataType | None) -> str:
    """Return the name of a dtype in GE graphs."""
    if dtype is None:
        raise NotEmittedError("a dtype is not known")
    return _NAMES.get(dtype.name, dtype.name.lower())


def typed(value: ir.Value) -> Typed:
    """Return dtype and shape of a value.

    Raises:
        NotEmittedError: One is not known.
    """
    shape = known_dims(value)
    if shape is None:
        raise NotEmittedError(f"the shape of {value.name} is not known")
    return Typed(dtype_text(value.dtype), tuple(map(_number, shape)))


def _number(dim: Dim) -> int:
    return dim if isinstance(dim, int) else -1


class Emission:
    """Operators, and where the ONNX values are among them.

    Args:
        place: Says of each constant where its bytes are.
    """

    def __init__(self, place: Place) -> None:
        self.ops: list[Op] = []
        self._place = place
        self._edges: dict[ir.Value, str] = {}
        self._descs: dict[str, Desc] = {}
        self._names: set[str] = set()
        self._constants: dict[tuple[str, tuple[int, ...], bytes], str] = {}

    def edge(self, value: ir.Value | None) -> str:
        """Return "producer:output" of a value; a constant is emitted when it is first read."""
        if value is None:
            return ""
        if value not in self._edges:
            if value.const_value is None:
                raise NotEmittedError(f"nothing makes {value.name}")
            self._edges[value] = self._stored(value)
        return self._edges[value]

    def desc(self, edge: str) -> Desc:
        """Return dtype and shape of what an edge carries."""
        return self._descs[edge]

    def add(
        self,
        op_type: str,
        name: str,
        operands: Mapping[str, Operand],
        results: Sequence[ir.Value | Typed],
        attributes: Mapping[str, AttributeValue] | None = None,
        controls: Sequence[str] = (),
    ) -> list[str]:
        """Add an operator; return the edges of its outputs.

        Args:
            op_type: Of GE.
            name: Unique; a number is added where it is not.
            operands: By input; those that are absent or "" are not fed.
            results: Its outputs in order: the ONNX values that they are, or what they are like.
            attributes: By name; those left out have GE's defaults.
            controls: Operators that run before it.

        Raises:
            NotEmittedError: GE has no such operator, input or attribute.
        """
        of = _prototype(op_type)
        name = self._fresh(name)
        slots = list(_slots(of, operands))
        while slots and not slots[-1][1]:
            slots.pop()
        descs = [
            Desc(slot, *self._like(edge)) if edge else Desc(slot, "undefined", None, "")
            for slot, edge in slots
        ]
        outputs = _output_names(of, len(results))
        made = [
            Desc(output, like.dtype, like.shape)
            for output, like in zip(outputs, map(_like, results), strict=True)
        ]
        op = Op(
            name=name,
            type=op_type,
            inputs=(*(edge for _, edge in slots), *(f"{control}:-1" for control in controls)),
            input_desc=tuple(descs),
            output_desc=tuple(made),
            attributes={
                **_attributes(of, attributes or {}),
                **naming([slot for slot, _ in slots], outputs),
            },
        )
        self.ops.append(op)
        edges = [f"{name}:{at}" for at in range(len(results))]
        for edge, desc, result in zip(edges, made, results, strict=True):
            self._descs[edge] = desc
            if isinstance(result, ir.Value):
                self._edges[result] = edge
        return edges

    def alias(self, value: ir.Value, edge: str) -> None:
        """Let a value be what an edge carries."""
        self._edges[value] = edge

    def input(self, value: ir.Value, index: int, *, written: bool) -> None:
        """Add an input of the model: Data, or RefData for one that the graph writes."""
        name, like = self._fresh(value.name or "input"), typed(value)
        ends = [Desc(end, like.dtype, like.shape) for end in ("x", "y")]
        attributes = {"index": g.integer(index), **naming(["x"], ["y"])}
        kind = "RefData" if written else "Data"
        self.ops.append(Op(name, kind, (), (ends[0],), (ends[1],), attributes))
        self._descs[f"{name}:0"] = ends[1]
        self._edges[value] = f"{name}:0"

    def constant(self, array: npt.ArrayLike, dtype: str = "int64") -> str:
        """Return a constant of these numbers; the same numbers give the same one."""
        numbers = np.asarray(array, dtype=dtype)
        key = (dtype, numbers.shape, numbers.tobytes())
        if key not in self._constants:
            name = self._fresh(f"number.{len(self._constants)}")
            self._constants[key] = self._const(name, dtype, numbers.shape, numbers.tobytes())
        return self._constants[key]

    def end(self, results: Sequence[ir.Value], controls: Sequence[str]) -> None:
        """Add NetOutput, the outputs in order."""
        edges = [self.edge(value) for value in results]
        names = [f"input{at}" for at in range(len(edges))]
        descs = [Desc(name, *self._like(edge)) for name, edge in zip(names, edges, strict=True)]
        after = tuple(f"{control}:-1" for control in controls)
        name = self._fresh("NetOutput")
        self.ops.append(
            Op(name, g.NET_OUTPUT, (*edges, *after), tuple(descs), (), naming(names, []))
        )

    def _stored(self, value: ir.Value) -> str:
        tensor = value.const_value
        assert tensor is not None
        name, dtype = self._fresh(value.name or "constant"), dtype_text(tensor.dtype)
        shape = tuple(tensor.shape.numpy())
        where = self._place(tensor)
        if where is None:
            return self._const(name, dtype, shape, tensor.tobytes())
        location, offset, length = where
        attributes = {
            "shape": g.integers(shape),
            "dtype": g.dtype(dtype),
            "location": g.text(location),
            "offset": g.integer(offset),
            "length": g.integer(length),
            **naming([], ["y"]),
        }
        return self._source(
            Op(name, "FileConstant", (), (), (Desc("y", dtype, shape),), attributes)
        )

    def _const(self, name: str, dtype: str, shape: tuple[int, ...], data: bytes) -> str:
        attributes = {"value": g.tensor(Tensor(Desc("", dtype, shape), data)), **naming([], ["y"])}
        return self._source(Op(name, "Const", (), (), (Desc("y", dtype, shape),), attributes))

    def _source(self, op: Op) -> str:
        self.ops.append(op)
        self._descs[f"{op.name}:0"] = op.output_desc[0]
        return f"{op.name}:0"

    def _like(self, edge: str) -> tuple[str, tuple[int, ...] | None]:
        desc = self._descs[edge]
        return desc.dtype, desc.shape

    def _fresh(self, name: str) -> str:
        unique, count = name, 1
        while unique in self._names:
            unique, count = f"{name}.{count}", count + 1
        self._names.add(unique)
        return unique


def _like(result: ir.Value | Typed) -> Typed:
    return result if isinstance(result, Typed) else typed(result)


def _prototype(op_type: str) -> Prototype:
    of = prototype(op_type)
    if of is None:
        raise NotEmittedError(f"CANN 8.1.RC1 registers no operator {op_type}")
    return of


def _slots(of: Prototype, operands: Mapping[str, Operand]) -> list[tuple[str, str]]:
    """The names of the slots in order, and what each reads; "" where it reads nothing."""
    known = {slot.name: slot for slot in of.inputs}
    unknown = [name for name in operands if name not in known]
    if unknown:
        raise NotEmittedError(f"{of.name} has no input {unknown[0]}")
    found: list[tuple[str, str]] = []
    for slot in of.inputs:
        given = _given(slot, operands.get(slot.name, ""))
        if not slot.dynamic and not slot.optional and not given[0]:
            raise NotEmittedError(f"{of.name} needs its input {slot.name}")
        found += zip(expected([slot], {slot.name: len(given)}), given, strict=True)
    return found


def _given(slot: Slot, operand: Operand) -> list[str]:
    if isinstance(operand, str):
        return [operand] if operand or not slot.dynamic else []
    return list(operand)


def _output_names(of: Prototype, count: int) -> list[str]:
    dynamic = sum(slot.dynamic for slot in of.outputs)
    rest = count - (len(of.outputs) - dynamic)
    counts = {slot.name: rest for slot in of.outputs if slot.dynamic}
    names = list(expected(of.outputs, counts))
    if len(names) != count:
        raise NotEmittedError(f"{of.name} has {len(names)} outputs, {count} are asked for")
    return names


def _attributes(of: Prototype, values: Mapping[str, AttributeValue]) -> dict[str, Attr]:
    made: dict[str, Attr] = {}
    for name, value in values.items():
        known = of.attribute(name)
        type_ = UNREGISTERED.get((of.name, name)) if known is None else known.type
        if type_ is None:
            raise NotEmittedError(f"{of.name} has no attribute {name}")
        made[name] = _MAKE[type_](value)
    missing = [item.name for item in of.attributes if item.required and item.name not in made]
    if missing:
        raise NotEmittedError(f"{of.name} needs its attribute {missing[0]}")
    return made


_MAKE: Mapping[str, Callable[[Any], Attr]] = {
    "Int": g.integer,
    "Float": g.number,
    "Bool": g.boolean,
    "String": g.text,
    "ListInt": g.integers,
    "Type": g.dtype,
}
