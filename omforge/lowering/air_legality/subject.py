"""A GE graph under check: its operators, with what is connected to each slot, found by IR name."""

from __future__ import annotations

import functools
import struct
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from omforge.air.ge_types import byte_size
from omforge.air.graph import CONST_TYPES, DATA_TYPES, Air, Attr, Desc, Edge, Graph, Op, Tensor
from omforge.air.names import by_slot, expected, input_names, output_names
from omforge.air.prototypes import Prototype, prototype
from omforge.lowering.target import Target

_SMALL = 64  # numbers: shapes, axes, sizes


@dataclass(frozen=True)
class Known:
    """What is known of a tensor; None for what nothing says.

    Attributes:
        dtype: Its dtype.
        shape: Its shape; -1 is a dim that is not known, a shape of -2 alone has no known rank.
        layout: Its format.
    """

    dtype: str | None = None
    shape: tuple[int, ...] | None = None
    layout: str | None = None

    @property
    def static(self) -> tuple[int, ...] | None:
        """The shape where every dim of it is a number."""
        if self.shape is None or any(dim < 0 for dim in self.shape):
            return None
        return self.shape

    def __str__(self) -> str:
        shape = "[?]" if self.shape is None else f"[{','.join(map(str, self.shape))}]"
        return f"{self.dtype or '?'}{shape}"


def known(desc: Desc) -> Known:
    """Read the description of an operator's input or output.

    One of float32 without dims says nothing: TorchAir writes it for whatever it does not know, and
    GE saves it as a scalar's.
    """
    silent = desc.dtype == "undefined" or (not desc.shape and desc.dtype == "float32")
    if silent:
        return Known(None, desc.shape or None, desc.layout or None)
    return stated(desc)


def stated(desc: Desc) -> Known:
    """Read a description that is meant as it is: an input's of the model, or a constant's."""
    shape = None if desc.shape == (-2,) else desc.shape
    return Known(None if desc.dtype == "undefined" else desc.dtype, shape, desc.layout or None)


_RESERVED = ("", "RESERVED", "FORMAT_RESERVED", "UNDEFINED")


def is_left_out(desc: Desc) -> bool:
    """Whether an input is described as one that is not there: no dtype, and a reserved format."""
    return desc.dtype == "undefined" and desc.layout in _RESERVED


@dataclass(frozen=True)
class Operand:
    """One input slot that is connected.

    Attributes:
        slot: Its place among all inputs.
        name: The input's name in the prototype.
        edge: Where it comes from.
        tensor: What is known of it.
        values: The numbers of a small integer constant.
    """

    slot: int
    name: str
    edge: Edge
    tensor: Known
    values: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Result:
    """One output."""

    slot: int
    name: str
    tensor: Known


@dataclass(frozen=True)
class Call:
    """An operator with its prototype, and what its slots hold by the names of the prototype.

    Attributes:
        op: The operator.
        prototype: None where CANN 8.1.RC1 registers none.
        named: Whether its slots bear the prototype's names in order. Where not, nothing is known
            of them, and `inputs` and `outputs` are empty.
        inputs: What is connected, by the input's name; several of a dynamic one.
        outputs: The results, by the output's name.
    """

    op: Op
    prototype: Prototype | None
    named: bool
    inputs: Mapping[str, tuple[Operand, ...]]
    outputs: Mapping[str, tuple[Result, ...]]

    @property
    def where(self) -> str:
        """The words that name it in a message."""
        return describe(self.op)

    def operand(self, name: str) -> Operand | None:
        """What is connected to an input, of a dynamic one the first."""
        return next(iter(self.inputs.get(name, ())), None)

    def tensor(self, name: str) -> Known:
        """What is known of an input; nothing where none is connected."""
        operand = self.operand(name)
        return Known() if operand is None else operand.tensor

    def result(self, name: str) -> Known:
        """What is stated of an output."""
        found = next(iter(self.outputs.get(name, ())), None)
        return Known() if found is None else found.tensor

    def has(self, name: str) -> bool:
        """Whether anything is connected to that input."""
        return bool(self.inputs.get(name))

    def integer(self, name: str) -> int | None:
        """The value of an Int, its default where it is not there; None where it has neither."""
        value = self._value(name, "i")
        if value is None:
            default = self._default(name)
            return int(default) if default.lstrip("-").isdecimal() else None
        return value if isinstance(value, int) else None

    def number(self, name: str) -> float | None:
        """The value of a Float, where it is there."""
        value = self._value(name, "f")
        return value if isinstance(value, float) else None

    def text(self, name: str) -> str:
        """The value of a String, its default where it is not there."""
        value = self._value(name, "s")
        return value if isinstance(value, str) else self._default(name).strip('"')

    def integers(self, name: str) -> tuple[int, ...] | None:
        """The values of a ListInt, where they are there."""
        attribute = self.op.attributes.get(name)
        if attribute is None or attribute.kind != "i" or attribute.items is None:
            return None
        return tuple(item for item in attribute.items if isinstance(item, int))

    def values(self, name: str) -> tuple[int, ...] | None:
        """The numbers of an input that is a small integer constant."""
        operand = self.operand(name)
        return None if operand is None else operand.values

    def flag(self, name: str) -> bool:
        """The value of a Bool, its default where it is not there."""
        value = self._value(name, "b")
        return value if isinstance(value, bool) else self._default(name) == "true"

    def _value(self, name: str, kind: str) -> object:
        attribute: Attr | None = self.op.attributes.get(name)
        return None if attribute is None or attribute.kind != kind else attribute.value

    def _default(self, name: str) -> str:
        attribute = None if self.prototype is None else self.prototype.attribute(name)
        return "" if attribute is None else attribute.default


def describe(op: Op) -> str:
    """Return the words that name an operator in a message."""
    return f"{op.type} {op.name}".strip()


@dataclass(frozen=True)
class Body:
    """One graph of a file, the model's own or the body of an If, with what several rules ask for.

    Attributes:
        graph: The graph.
        root: Whether it is the model's own.
    """

    graph: Graph
    root: bool

    @functools.cached_property
    def by_name(self) -> Mapping[str, Op]:
        """The operators by name, as GE's loader links them: of two with one name the last."""
        return self.graph.by_name()

    @functools.cached_property
    def names(self) -> Counter[str]:
        """How often each name occurs."""
        return Counter(op.name for op in self.graph.ops)

    @functools.cached_property
    def calls(self) -> tuple[Call, ...]:
        """All operators with their slots."""
        return tuple(self._call(op) for op in self.graph.ops)

    @functools.cached_property
    def readers(self) -> Mapping[str, tuple[Op, ...]]:
        """The operators that read from, or wait for, each operator."""
        found: dict[str, list[Op]] = {}
        for name, producers in self.producers.items():
            for producer in producers:
                found.setdefault(producer, []).append(self.by_name[name])
        return {name: tuple(ops) for name, ops in found.items()}

    @functools.cached_property
    def producers(self) -> Mapping[str, frozenset[str]]:
        """What each operator reads from, or waits for."""
        return {
            name: frozenset((*(edge.producer for edge in op.edges if edge), *op.controls))
            for name, op in self.by_name.items()
        }

    def typed(self, *op_types: str) -> Iterator[Call]:
        """The operators of these types."""
        return (call for call in self.calls if call.op.type in op_types)

    def data(self) -> Iterator[Call]:
        """The operators that stand for inputs of the graph."""
        return self.typed(*DATA_TYPES)

    def produced(self, edge: Edge) -> Known:
        """What the producer of an edge states of it."""
        producer = self.by_name.get(edge.producer)
        if producer is None or not 0 <= edge.output < len(producer.output_desc):
            return Known()
        literal = producer.type in (*DATA_TYPES, *CONST_TYPES)
        return (stated if literal else known)(producer.output_desc[edge.output])

    def values(self, edge: Edge) -> tuple[int, ...] | None:
        """The numbers of a constant of int32 or int64, where it is small."""
        producer = self.by_name.get(edge.producer)
        attribute = None if producer is None else producer.attributes.get("value")
        value = None if attribute is None else attribute.value
        if producer is None or producer.type not in CONST_TYPES or not isinstance(value, Tensor):
            return None
        width = {"int32": 4, "int64": 8}.get(value.desc.dtype, 0)
        size = len(value.data)
        if (
            not width
            or size > _SMALL * width
            or size != byte_size(value.desc.dtype, value.desc.shape or ())
        ):
            return None
        return struct.unpack(f"<{size // width}{'iq'[width // 8]}", value.data)

    def _call(self, op: Op) -> Call:
        prototyped = prototype(op.type)
        if prototyped is None or not well_named(op, prototyped):
            return Call(op, prototyped, False, {}, {})
        edges = op.edges
        inputs: dict[str, tuple[Operand, ...]] = {}
        for name, places in by_slot(prototyped.inputs, input_names(op)).items():
            found = [(at, edges[at]) for at in places if at < len(edges)]
            inputs[name] = tuple(
                Operand(at, name, edge, self._operand(op, at, edge), self.values(edge))
                for at, edge in found
                if edge is not None
            )
        outputs = {
            name: tuple(
                Result(at, name, known(op.output_desc[at]))
                for at in places
                if at < len(op.output_desc)
            )
            for name, places in by_slot(prototyped.outputs, output_names(op)).items()
        }
        return Call(op, prototyped, True, inputs, outputs)

    def _operand(self, op: Op, at: int, edge: Edge) -> Known:
        """What the producer states; of what it leaves open, what the reader's own slot does."""
        made = self.produced(edge)
        own = known(op.input_desc[at]) if at < len(op.input_desc) else Known()
        return Known(
            made.dtype or own.dtype,
            own.shape if made.shape is None else made.shape,
            own.layout or made.layout,
        )


def well_named(op: Op, of: Prototype) -> bool:
    """Whether the slots bear the names of the prototype in its order."""
    return naming_fault(op, of, "inputs") is None and naming_fault(op, of, "outputs") is None


def naming_fault(op: Op, of: Prototype, side: str) -> str | None:
    """Return what is wrong with the names of the inputs, or of the outputs; None for nothing.

    Optional inputs at the end may be left out. What comes behind them and is not connected is
    tolerated by GE.
    """
    slots = of.inputs if side == "inputs" else of.outputs
    names = input_names(op) if side == "inputs" else output_names(op)
    count = len(op.input_desc) if side == "inputs" else len(op.output_desc)
    if not names and count:
        return "no slot has a name"
    if sorted(names) != list(range(count)):
        return f"{len(names)} names for {count} slots" if len(names) != count else "slots repeat"
    given = [names[at] for at in range(count)]
    counts = {name: len(places) for name, places in by_slot(slots, names).items()}
    wanted = list(expected(slots, counts))
    if side == "inputs":
        edges = op.edges
        while len(given) > len(wanted) and _unconnected(edges, len(given) - 1):
            given.pop()
        least = len(wanted)
        optional = {slot.name for slot in slots if slot.optional}
        while least and wanted[least - 1] in optional:
            least -= 1
        wanted = wanted[: max(least, min(len(given), len(wanted)))]
    if given != wanted:
        return f"they are {', '.join(given) or 'none'}, not {', '.join(wanted) or 'none'}"
    return None


def _unconnected(edges: tuple[Edge | None, ...], at: int) -> bool:
    return at >= len(edges) or edges[at] is None


@dataclass(frozen=True)
class AirSubject:
    """A file under check.

    Attributes:
        path: The file, as it was named.
        size: Its bytes.
        air: What it holds.
        target: The SoC that it is for.
        gears: Whether dims that are not known are meant for atc's --dynamic_dims.
    """

    path: Path
    size: int
    air: Air
    target: Target
    gears: bool = False

    @functools.cached_property
    def bodies(self) -> tuple[Body, ...]:
        """The graphs, the model's own first."""
        return tuple(Body(graph, at == 0) for at, graph in enumerate(self.air.graphs))

    @property
    def root(self) -> Body:
        """The model's own graph."""
        return self.bodies[0]

    @functools.cached_property
    def calls(self) -> tuple[Call, ...]:
        """The operators of all graphs."""
        return tuple(call for body in self.bodies for call in body.calls)

    def typed(self, *op_types: str) -> Iterator[Call]:
        """The operators of these types whose slots are known."""
        return (call for call in self.calls if call.op.type in op_types and call.named)

    @property
    def folder(self) -> Path:
        """The folder of the file, which paths of weights start from."""
        return self.path.absolute().parent
