"""What GE registers of an operator: names and order of inputs, outputs and attributes (REG_OP).

Source: CANN 8.1.RC1:opp/built-in/op_proto/inc/<header>, by way of `data/prototypes.tsv`.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from omforge.air.tables import table_rows

InputKind = Literal["input", "optional_input", "dynamic_input"]


@dataclass(frozen=True)
class Slot:
    """One input or output; `dtypes` is None where the prototype names no closed list."""

    name: str
    kind: str
    dtypes: frozenset[str] | None

    @property
    def dynamic(self) -> bool:
        """Whether it stands for any number of tensors, named name0, name1 and so on."""
        return self.kind.startswith("dynamic")

    @property
    def optional(self) -> bool:
        """Whether it may be left unconnected."""
        return self.kind == "optional_input"


@dataclass(frozen=True)
class Attribute:
    """One attribute: its type (`Int`, `ListInt`, `String` …) and its default as it is written."""

    name: str
    type: str
    default: str
    required: bool


@dataclass(frozen=True)
class Prototype:
    """One operator."""

    name: str
    inputs: tuple[Slot, ...]
    outputs: tuple[Slot, ...]
    attributes: tuple[Attribute, ...]
    header: str

    @property
    def refs(self) -> frozenset[str]:
        """The inputs that it writes: those that have an output of their name.

        Source: hicann/ge:compiler/graph/optimize/graph_optimize.cc (MarkRefRelations).
        """
        written = {slot.name for slot in self.outputs}
        return frozenset(slot.name for slot in self.inputs if slot.name in written)

    def attribute(self, name: str) -> Attribute | None:
        """Return the attribute of that name."""
        return next((item for item in self.attributes if item.name == name), None)


def prototype(op_type: str) -> Prototype | None:
    """Return the prototype of an operator, None where CANN 8.1.RC1 has none."""
    return prototypes().get(op_type)


@functools.lru_cache(maxsize=1)
def prototypes() -> Mapping[str, Prototype]:
    """All prototypes by operator."""
    gathered: dict[str, list[tuple[str, str, str]]] = {}
    for op, kind, spec, header in table_rows("prototypes.tsv"):
        gathered.setdefault(op, []).append((kind, spec, header))
    return {name: _prototype(name, rows) for name, rows in gathered.items()}


def _prototype(name: str, rows: list[tuple[str, str, str]]) -> Prototype:
    macros: dict[str, frozenset[str] | None] = {}
    for kind, spec, _ in rows:
        if kind == "datatype":
            first, _, rest = spec.partition(",")
            macros[first.strip()] = _dtypes(rest, {})
    inputs: list[Slot] = []
    outputs: list[Slot] = []
    attributes: list[Attribute] = []
    for kind, spec, _ in rows:
        first, _, rest = (part.strip() for part in spec.partition(","))
        if kind.endswith("input"):
            inputs.append(Slot(first, kind, _dtypes(rest, macros)))
        elif kind.endswith("output"):
            outputs.append(Slot(first, kind, _dtypes(rest, macros)))
        elif kind.endswith("attr"):
            type_, _, default = (part.strip() for part in rest.partition(","))
            attributes.append(Attribute(first, type_, default, kind == "required_attr"))
    return Prototype(name, tuple(inputs), tuple(outputs), tuple(attributes), rows[0][2])


_DTYPE = re.compile(r"DT_([A-Z0-9_]+)")
_NAMES: Mapping[str, str] = {
    "FLOAT": "float32",
    "FLOAT32": "float32",
    "DOUBLE": "float64",
    "BF16": "bfloat16",
    "BFLOAT16": "bfloat16",
}
_INDEX = frozenset(("int32", "int64"))


def _dtypes(spec: str, macros: Mapping[str, frozenset[str] | None]) -> frozenset[str] | None:
    """Read the closed list of a prototype; None for macros that the headers do not spell out."""
    word = spec.strip().strip('"')
    if word in macros:
        return macros[word]
    if "IndexNumberType" in spec:
        return _INDEX
    if re.search(r"::\w+|\w+Type\(\)", spec):
        return None
    names: list[str] = _DTYPE.findall(spec)
    return frozenset(_NAMES.get(name, name.lower()) for name in names) if names else None
