"""The names of an operator's slots, which GE's loader takes from four attributes.

`_input_name_key` lists the names, `_input_name_value` the slot of each; likewise for outputs. A
dynamic input or output has its ordinal behind its name. Without them the graph loads, and no input
of the prototype maps to any slot. Source: hicann/ge:graph_metadef/graph/serialization/
model_serialize.cc, seen by running it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from omforge.air.graph import Attr, Op, texts
from omforge.air.prototypes import Prototype, Slot

INPUT_KEYS = ("_input_name_key", "_input_name_value")
OUTPUT_KEYS = ("_output_name_key", "_output_name_value")
BOOKKEEPING = frozenset((*INPUT_KEYS, *OUTPUT_KEYS))
"""Attributes that are no operator's own."""


def input_names(op: Op) -> dict[int, str]:
    """The name of each input slot, as the file says it."""
    return _names(op.attributes, *INPUT_KEYS)


def output_names(op: Op) -> dict[int, str]:
    """The name of each output, as the file says it."""
    return _names(op.attributes, *OUTPUT_KEYS)


def _names(attributes: Mapping[str, Attr], key: str, value: str) -> dict[int, str]:
    names, slots = attributes.get(key), attributes.get(value)
    if names is None or slots is None:
        return {}
    pairs = zip(names.items or (), slots.items or (), strict=False)
    return {slot: str(name) for name, slot in pairs if isinstance(slot, int)}


def naming(inputs: Sequence[str], outputs: Sequence[str]) -> dict[str, Attr]:
    """The four attributes for slots that are named in order."""
    return {
        INPUT_KEYS[0]: texts(inputs, typed=False),
        INPUT_KEYS[1]: Attr("i", items=tuple(range(len(inputs))), typed=False),
        OUTPUT_KEYS[0]: texts(outputs, typed=False),
        OUTPUT_KEYS[1]: Attr("i", items=tuple(range(len(outputs))), typed=False),
    }


def by_slot(slots: Sequence[Slot], names: Mapping[int, str]) -> dict[str, list[int]]:
    """The positions of each slot of a prototype: of a dynamic one several, in order."""
    found: dict[str, list[int]] = {}
    for slot in slots:
        if slot.dynamic:
            found[slot.name] = [at for at, name in sorted(names.items()) if _is_of(slot, name)]
        else:
            found[slot.name] = [at for at, name in names.items() if name == slot.name]
    return found


def _is_of(slot: Slot, name: str) -> bool:
    return name.startswith(slot.name) and name[len(slot.name) :].isdecimal()


def expected(slots: Sequence[Slot], counts: Mapping[str, int]) -> Iterator[str]:
    """The names in the order of a prototype; `counts` says how many a dynamic slot stands for."""
    for slot in slots:
        if slot.dynamic:
            yield from (f"{slot.name}{at}" for at in range(counts.get(slot.name, 0)))
        else:
            yield slot.name


def operand(op: Op, of: Prototype, name: str) -> str:
    """What is connected to the input of that name: "producer:output", or "" for nothing.

    Of a dynamic input it is the first.
    """
    places = by_slot(of.inputs, input_names(op)).get(name, [])
    edges = op.edges
    edge = edges[places[0]] if places and places[0] < len(edges) else None
    return "" if edge is None else f"{edge.producer}:{edge.output}"
