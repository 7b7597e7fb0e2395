"""A GE graph as records: operators joined by edges of text, with attributes of stated kinds.

The records hold what the messages do (`messages`), under the same names; `rest` is what omforge has
no name for, kept as bytes so that a file that is read and written again loses nothing.

Dtypes are numpy-like names ("float16", "bfloat16", "int4"); "undefined" is GE's DT_UNDEFINED.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

DATA_TYPES = ("Data", "RefData")
"""Operators that are inputs of the model; RefData is one that the graph may write."""

CONST_TYPES = ("Const", "Constant", "FileConstant")
NET_OUTPUT = "NetOutput"

Kind = Literal["s", "i", "f", "b", "bt", "dt", "td", "t"]
"""The kinds of values, by the names of AttrDef's fields: text, integer, float, bool, bytes, dtype,
tensor description, tensor."""

LIST_TYPES: Mapping[int, Kind] = {
    1: "s", 2: "i", 3: "f", 4: "b", 5: "bt", 6: "td", 7: "t", 10: "dt",
}  # fmt: skip
"""ListValue.val_type to the kind of its items; 8 and 9, graphs and named attributes, stay raw."""


@dataclass(frozen=True)
class Desc:
    """A tensor of an operator's input or output; of one that is not connected, undefined.

    `shape` is () for a scalar, and None where nothing is said. -1 is a dim that is not known.
    """

    name: str = ""
    dtype: str = "undefined"
    shape: tuple[int, ...] | None = None
    layout: str = "ND"
    attributes: Mapping[str, Attr] = field(default_factory=dict[str, "Attr"])
    rest: bytes = b""


@dataclass(frozen=True)
class Tensor:
    """A constant: its description, and its numbers, little endian and dense."""

    desc: Desc
    data: bytes


Item = str | int | float | bool | bytes | Desc | Tensor


@dataclass(frozen=True)
class Attr:
    """One attribute.

    Attributes:
        kind: Of the value, or of each item; "raw" is a message that omforge does not take apart.
        value: The value. A dtype (`dt`) is its name; text is UTF-8, other bytes as surrogates.
        items: The values of a list; None where it is none.
        typed: A list says the type of its items (val_type). GE drops one that does not.
    """

    kind: Kind | Literal["raw", "none"]
    value: Item | None = None
    items: tuple[Item, ...] | None = None
    typed: bool = True


def text(value: str) -> Attr:
    """An attribute of type String."""
    return Attr("s", value)


def integer(value: int) -> Attr:
    """An attribute of type Int."""
    return Attr("i", value)


def number(value: float) -> Attr:
    """An attribute of type Float."""
    return Attr("f", value)


def boolean(value: bool) -> Attr:
    """An attribute of type Bool."""
    return Attr("b", value)


def dtype(value: str) -> Attr:
    """An attribute of type Type."""
    return Attr("dt", value)


def tensor(value: Tensor) -> Attr:
    """An attribute of type Tensor."""
    return Attr("t", value)


def integers(values: Sequence[int]) -> Attr:
    """An attribute of type ListInt."""
    return Attr("i", items=tuple(values))


def texts(values: Sequence[str], *, typed: bool = True) -> Attr:
    """An attribute of type ListString."""
    return Attr("s", items=tuple(values), typed=typed)


@dataclass(frozen=True)
class Op:
    """One operator.

    Attributes:
        name: Unique in its graph.
        type: The GE operator.
        inputs: By slot "producer:output"; "" is one that is not connected. "producer:-1" is a
            control edge, which takes no slot.
        input_desc: By slot.
        output_desc: By output.
        attributes: By name.
        rest: What omforge has no name for.
    """

    name: str
    type: str
    inputs: tuple[str, ...] = ()
    input_desc: tuple[Desc, ...] = ()
    output_desc: tuple[Desc, ...] = ()
    attributes: Mapping[str, Attr] = field(default_factory=dict[str, Attr])
    rest: bytes = b""

    @property
    def edges(self) -> tuple[Edge | None, ...]:
        """What is connected to each slot; control edges are not among them."""
        parsed = (parse_edge(item) for item in self.inputs)
        return tuple(edge for edge in parsed if edge is None or edge.output >= 0)

    @property
    def controls(self) -> tuple[str, ...]:
        """The operators that run before this one without giving it anything."""
        parsed = (parse_edge(item) for item in self.inputs)
        return tuple(edge.producer for edge in parsed if edge is not None and edge.output < 0)


@dataclass(frozen=True)
class Edge:
    """An output of an operator; -1 is none of them, and stands for control alone."""

    producer: str
    output: int


def parse_edge(item: str) -> Edge | None:
    """Read "producer:output"; None where there is no colon, which GE takes for not connected.

    Names may hold colons: the last one counts.
    """
    producer, colon, output = item.rpartition(":")
    if not colon:
        return None
    try:
        return Edge(producer, int(output))
    except ValueError:
        return None


@dataclass(frozen=True)
class Graph:
    """One graph. `inputs` and `outputs` are as the file names them; operators say the same."""

    name: str
    ops: tuple[Op, ...]
    inputs: tuple[str, ...] = ()
    outputs: tuple[str, ...] = ()
    attributes: Mapping[str, Attr] = field(default_factory=dict[str, Attr])
    rest: bytes = b""

    def by_name(self) -> dict[str, Op]:
        """The operators by name; of two with one name the last, as GE's loader has it."""
        return {op.name: op for op in self.ops}


@dataclass(frozen=True)
class Air:
    """A file: its first graph is the model, further ones are bodies of If, Case and the like."""

    name: str
    graphs: tuple[Graph, ...]
    version: int = 1
    attributes: Mapping[str, Attr] = field(default_factory=dict[str, Attr])
    rest: bytes = b""

    @property
    def graph(self) -> Graph:
        """The model's graph."""
        return self.graphs[0]
