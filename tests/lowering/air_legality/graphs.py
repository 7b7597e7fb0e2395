"""GE graphs for tests: a builder that writes descriptions and names, and edits of what it made."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from omforge.air import graph
from omforge.air.ge_types import byte_size
from omforge.air.graph import Air, Attr, Desc, Edge, Graph, Op, Tensor, parse_edge
from omforge.air.names import BOOKKEEPING, naming
from omforge.air.prototypes import prototype

UNFED = Desc("", layout="")

Given = str | Sequence[str]
Typed = tuple[str, tuple[int, ...]]


class Builder:
    """A graph, one operator after the other; inputs are "name" or "name:output"."""

    def __init__(self, name: str = "g") -> None:
        self.name, self.ops = name, list[Op]()

    def data(self, name: str, dtype: str, *shape: int, reference: bool = False) -> str:
        index = sum(op.type in graph.DATA_TYPES for op in self.ops)
        op = Op(
            name,
            "RefData" if reference else "Data",
            (),
            (Desc("x", dtype, shape),),
            (Desc("y", dtype, shape),),
            {"index": graph.integer(index), **naming(("x",), ("y",))},
        )
        return self._add(op)

    def const(self, name: str, dtype: str, *shape: int, values: Sequence[int] = ()) -> str:
        width = {"float16": 2, "int8": 1, "float32": 4, "int32": 4, "int64": 8, "uint64": 8}[dtype]
        data = bytes(width * int(np.prod(shape)))
        if values:
            data = np.array(values, dtype).tobytes()
        value = graph.tensor(Tensor(Desc("", dtype, shape), data))
        return self._add(
            Op(
                name,
                "Const",
                (),
                (),
                (Desc("y", dtype, shape),),
                {"value": value, **naming((), ("y",))},
            )
        )

    def stored(self, name: str, file: str, dtype: str, *shape: int, length: int) -> str:
        """A FileConstant, at the start of a file."""
        attributes = {
            "shape": graph.integers(shape),
            "dtype": graph.dtype(dtype),
            "location": graph.text(file),
            "offset": graph.integer(0),
            "length": graph.integer(length),
        }
        desc = Desc("y", dtype, shape)
        return self._add(
            Op(name, "FileConstant", (), (), (desc,), {**attributes, **naming((), ("y",))})
        )

    def op(
        self,
        kind: str,
        name: str,
        inputs: dict[str, Given],
        outputs: dict[str, Typed],
        **attributes,
    ) -> str:
        found = prototype(kind)
        assert found is not None
        edges, descs, names = list[str](), list[Desc](), list[str]()
        for slot in found.inputs:
            given = inputs.get(slot.name, ())
            members = [given] if isinstance(given, str) else list(given)
            if not members and not slot.dynamic:
                members = [""]
            for at, member in enumerate(members):
                own = f"{slot.name}{at}" if slot.dynamic else slot.name
                names.append(own)
                edges.append(member if not member or ":" in member else f"{member}:0")
                descs.append(replace(self._desc(edges[-1]), name=own))
        results = [Desc(own, dtype, shape) for own, (dtype, shape) in outputs.items()]
        kinds = {attribute.name: attribute.type for attribute in found.attributes}
        told = {key: _attribute(value, kinds.get(key, "")) for key, value in attributes.items()}
        told |= naming(names, list(outputs))
        return self._add(Op(name, kind, tuple(edges), tuple(descs), tuple(results), told))

    def air(self, *outputs: str) -> Air:
        edges = tuple(item if ":" in item else f"{item}:0" for item in outputs)
        names = [f"input{at}" for at in range(len(edges))]
        descs = tuple(
            replace(self._desc(edge), name=name) for edge, name in zip(edges, names, strict=True)
        )
        end = Op("NetOutput", "NetOutput", edges, descs, (), naming(names, ()))
        return Air(self.name, (Graph(self.name, (*self.ops, end)),))

    def _add(self, op: Op) -> str:
        self.ops.append(op)
        return op.name

    def _desc(self, item: str) -> Desc:
        edge = parse_edge(item)
        if edge is None:
            return UNFED
        return next(op for op in self.ops if op.name == edge.producer).output_desc[edge.output]


def _attribute(value: object, kind: str) -> Attr:
    if isinstance(value, Attr):
        return value
    if isinstance(value, bool):
        return graph.boolean(value)
    if isinstance(value, str):
        return graph.dtype(value) if kind == "Type" else graph.text(value)
    if isinstance(value, int | float):
        return (
            graph.number(value)
            if kind == "Float" or isinstance(value, float)
            else graph.integer(value)
        )
    assert isinstance(value, tuple)
    return graph.integers(value)


# Edits


def edit(air: Air, name: str, change: Callable[[Op], Op]) -> Air:
    """Change one operator."""
    (body,) = air.graphs
    assert name in body.by_name(), name
    ops = tuple(change(op) if op.name == name else op for op in body.ops)
    return replace(air, graphs=(replace(body, ops=ops),))


def told(air: Air, name: str, **attributes) -> Air:
    """Change attributes; None takes one away."""

    def change(op: Op) -> Op:
        found = prototype(op.type)
        kinds = {a.name: a.type for a in found.attributes} if found else {}
        kept = {k: v for k, v in op.attributes.items() if k not in attributes}
        new = {k: _attribute(v, kinds.get(k, "")) for k, v in attributes.items() if v is not None}
        return replace(op, attributes={**kept, **new})

    return edit(air, name, change)


def fed(air: Air, name: str, slot: int, item: str) -> Air:
    """Connect something else to a slot, described as what it is; "" for nothing."""
    made = {op.name: op for op in air.graph.ops}
    edge: Edge | None = parse_edge(item)
    found = made[edge.producer].output_desc[edge.output] if edge is not None else UNFED

    def change(op: Op) -> Op:
        edges, descs = [*op.inputs], [*op.input_desc]
        edges[slot], descs[slot] = item, replace(found, name=descs[slot].name)
        return replace(op, inputs=tuple(edges), input_desc=tuple(descs))

    return edit(air, name, change)


def described(air: Air, name: str, output: int = 0, **fields) -> Air:
    """Describe an output otherwise, at the operator and at its readers."""

    def change(op: Op) -> Op:
        descs = list(op.output_desc)
        descs[output] = replace(descs[output], **fields)
        if op.type in graph.DATA_TYPES:
            op = replace(op, input_desc=(replace(op.input_desc[0], **fields),))
        return replace(op, output_desc=tuple(descs))

    def follow(op: Op) -> Op:
        descs = [
            replace(desc, **fields) if edge == Edge(name, output) else desc
            for edge, desc in zip(op.edges, op.input_desc, strict=False)
        ]
        return replace(op, input_desc=(*descs, *op.input_desc[len(descs) :]))

    air = edit(air, name, change)
    (body,) = air.graphs
    return replace(air, graphs=(replace(body, ops=tuple(map(follow, body.ops))),))


def resized(air: Air, name: str, *shape: int) -> Air:
    """Give a constant another shape, and zeros."""
    (desc,) = air.graph.by_name()[name].output_desc
    zeros = bytes(byte_size(desc.dtype, shape))
    value = graph.tensor(Tensor(Desc("", desc.dtype, shape), zeros))
    return told(described(air, name, shape=shape), name, value=value)


def numbered(air: Air, name: str, *values: int) -> Air:
    """Give a constant other numbers."""
    (desc,) = air.graph.by_name()[name].output_desc
    value = graph.tensor(Tensor(replace(desc, name=""), np.array(values, desc.dtype).tobytes()))
    return told(air, name, value=value)


def added(air: Air, *ops: Op) -> Air:
    """Put operators behind the others."""
    (body,) = air.graphs
    return replace(air, graphs=(replace(body, ops=(*body.ops, *ops)),))


def without(air: Air, *names: str) -> Air:
    """Take operators away."""
    (body,) = air.graphs
    ops = tuple(op for op in body.ops if op.name not in names)
    return replace(air, graphs=(replace(body, ops=ops),))


def renamed(air: Air, name: str, key: str, *names: str) -> Air:
    """Give the slots of an operator other names."""
    assert key in BOOKKEEPING
    return told(air, name, **{key: graph.texts(names, typed=False)})
