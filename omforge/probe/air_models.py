"""Tiny GE graphs for probes: operators by the names of their slots, in the prototypes' order."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from omforge.air import graph as g
from omforge.air.names import expected, naming
from omforge.air.prototypes import Prototype, prototype
from omforge.probe.record import Array

Given = str | Sequence[str]
"""What an input reads, "operator:output"; of a dynamic input several."""


class AirModel:
    """Puts a GE graph together; `air()` gives it."""

    def __init__(self) -> None:
        self._ops: list[g.Op] = []
        self._descs: dict[str, g.Desc] = {}
        self._inputs: list[tuple[str, str, g.Desc]] = []

    def data(self, name: str, dtype: str, *shape: int, kind: str = "Data") -> str:
        """An input of the model; with kind `RefData` one that the graph writes."""
        desc = g.Desc("x", dtype, tuple(shape))
        self._inputs.append((name, kind, desc))
        self._descs[f"{name}:0"] = desc
        return f"{name}:0"

    def const(self, name: str, array: Array, dtype: str = "") -> str:
        """A constant inside the file."""
        data = array.astype(array.dtype.newbyteorder("<")).tobytes()
        return self.constant(name, dtype or array.dtype.name, tuple(array.shape), data)

    def constant(self, name: str, dtype: str, shape: tuple[int, ...], data: bytes) -> str:
        """A constant of any dtype."""
        desc = g.Desc("y", dtype, shape)
        value = g.tensor(g.Tensor(g.Desc("", dtype, shape), data))
        attributes = {"value": value, **naming((), ("y",))}
        self._ops.append(g.Op(name, "Const", output_desc=(desc,), attributes=attributes))
        self._descs[f"{name}:0"] = desc
        return f"{name}:0"

    def file_constant(
        self, name: str, dtype: str, shape: tuple[int, ...], location: str, offset: int, length: int
    ) -> str:
        """A constant in a file, from an offset on."""
        desc = g.Desc("y", dtype, shape)
        attributes = {
            "shape": g.integers(shape),
            "dtype": g.dtype(dtype),
            "location": g.text(location),
            "offset": g.integer(offset),
            "length": g.integer(length),
            **naming((), ("y",)),
        }
        self._ops.append(g.Op(name, "FileConstant", output_desc=(desc,), attributes=attributes))
        self._descs[f"{name}:0"] = desc
        return f"{name}:0"

    def op(
        self,
        type_: str,
        name: str,
        inputs: Mapping[str, Given],
        outputs: Mapping[str, tuple[str, tuple[int, ...]]],
        **attributes: g.Attr,
    ) -> tuple[str, ...]:
        """An operator; the slots that `inputs` leaves out are not connected."""
        of = prototype(type_)
        assert of is not None, type_
        counts = {slot: len(given) for slot, given in inputs.items() if not isinstance(given, str)}
        slots = _up_to_the_last(of, inputs, list(expected(of.inputs, counts)))
        edges = _edges(inputs)
        descs = tuple(self._desc(slot, edges.get(slot, "")) for slot in slots)
        given = {slot: len([n for n in outputs if n.startswith(slot)]) for slot in _dynamic(of)}
        names = tuple(expected(of.outputs, given))
        made = tuple(
            g.Desc(out, *outputs[out]) if out in outputs else g.Desc(out, "float32", ())
            for out in names
        )
        self._ops.append(
            g.Op(
                name,
                type_,
                inputs=tuple(edges.get(slot, "") for slot in slots),
                input_desc=descs,
                output_desc=made,
                attributes={**naming(slots, names), **attributes},
            )
        )
        for index, desc in enumerate(made):
            self._descs[f"{name}:{index}"] = desc
        return tuple(f"{name}:{index}" for index in range(len(names)))

    def _desc(self, slot: str, edge: str) -> g.Desc:
        found = self._descs.get(edge)
        return g.Desc(slot, layout="") if found is None else g.Desc(slot, found.dtype, found.shape)

    def air(self, outputs: Sequence[str], after: Sequence[str] = ()) -> g.Air:
        """The file: `outputs` are the model's, and what is in `after` runs ahead of its end."""
        ordered = sorted(self._inputs, key=lambda item: item[1] == "RefData")  # Data come first
        ops: list[g.Op] = []
        for index, (name, kind, desc) in enumerate(ordered):
            of_output = g.Desc("y", desc.dtype, desc.shape)
            attributes = {"index": g.integer(index), **naming(("x",), ("y",))}
            ops.append(g.Op(name, kind, (), (desc,), (of_output,), attributes))
        slots = [f"input{index}" for index in range(len(outputs))]
        end = g.Op(
            "NetOutput",
            g.NET_OUTPUT,
            inputs=(*outputs, *(f"{name}:-1" for name in after)),
            input_desc=tuple(self._desc(*pair) for pair in zip(slots, outputs, strict=True)),
            attributes=naming(slots, ()),
        )
        inputs = tuple(f"{name}:0" for name, _, _ in ordered)
        return g.Air("probe", (g.Graph("probe", (*ops, *self._ops, end), inputs),))


def _dynamic(of: Prototype) -> list[str]:
    return [slot.name for slot in of.outputs if slot.dynamic]


def _edges(inputs: Mapping[str, Given]) -> dict[str, str]:
    found: dict[str, str] = {}
    for slot, given in inputs.items():
        if isinstance(given, str):
            found[slot] = given
        else:
            found.update((f"{slot}{index}", edge) for index, edge in enumerate(given))
    return found


def _up_to_the_last(of: Prototype, inputs: Mapping[str, Given], slots: list[str]) -> list[str]:
    """The slots, without unconnected ones at the end: a later release may have more of them."""
    edges = _edges(inputs)
    wrong = sorted(set(inputs) - {slot.name for slot in of.inputs})
    assert not wrong, (of.name, wrong)
    while slots and slots[-1] not in edges:
        slots.pop()
    return slots
