"""What ATC's plugins do with the attributes of single operators, read from `data/onnx_plugins.tsv`.

A row is what the source of one plugin says:

- `reads`: the attributes of an operator of ATC's own, with the type that it reads each as;
- `needs`: attributes without which it fails; commas separate what must all be there, bars what must
  be there in one form, `a:INT` is an attribute of that type;
- `refuses`: what it fails at; `ignores`: what it drops without a word; `changes`: what comes out
  otherwise than ONNX says;
- `output`: `1:int32`, an output of another dtype than ONNX's.

`when` is a condition on the node, in the words of `_holds`. Our check and the simulated atc both
ask this table, and no operator is named beside it.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import onnx

from omforge import ir
from omforge.lowering.tables import table_rows

Kind = Literal["reads", "needs", "refuses", "ignores", "changes", "output"]


@dataclass(frozen=True)
class Given:
    """An attribute as a node has it: the name of its type, and its value."""

    type: str
    value: Any
    raw: bool = True
    """Of a tensor: whether its numbers are in raw_data."""


@dataclass(frozen=True)
class PluginNode:
    """A node as a plugin sees it.

    Attributes:
        op: Its op type.
        attributes: By name.
        inputs: Whether each input is connected.
        outputs: Whether each output is named and in use.
        ranks: The rank of each input; None where it is not known, as while atc parses.
    """

    op: str
    attributes: Mapping[str, Given]
    inputs: Sequence[bool]
    outputs: Sequence[bool]
    ranks: Sequence[int | None] = ()


@dataclass(frozen=True)
class PluginFact:
    """One row of the table."""

    op: str
    opsets: range | None
    kind: Kind
    attribute: str
    when: str
    atc: str
    why: str
    remedy: str
    certainty: str
    source: str

    def broken_by(self, node: PluginNode) -> bool:
        """Whether the node lacks what the plugin needs, or is what `when` describes."""
        if self.kind == "needs":
            return not all(_has(node, each) for each in self.attribute.split(","))
        return all(_holds(clause, node) for clause in self.when.split(" and ") if clause)

    def told(self, node: PluginNode) -> str:
        """The fault in words."""
        if self.kind == "needs":
            names = [
                " or ".join(part.split(":")[0] for part in each.split("|"))
                for each in self.attribute.split(",")
                if not _has(node, each)
            ]
            return f"{node.op} without {' and '.join(names)}"
        given = node.attributes.get(self.attribute)
        if given is None:
            without = f" without {self.attribute}" if self.attribute else ""
            return f"{node.op}{without or f' with {len(node.inputs)} inputs'}"
        shown = "" if given.type == "TENSOR" else f" {_shown(given.value)}"
        return f"{node.op} with {self.attribute}{shown}"


def plugin_facts(op: str, opset: int) -> tuple[PluginFact, ...]:
    """The rows of an operator at one opset of its domain (those of domain npu hold at any)."""
    return tuple(
        fact for fact in _table().get(op, ()) if fact.opsets is None or opset in fact.opsets
    )


def all_plugin_facts() -> tuple[PluginFact, ...]:
    """Every row, in the table's order."""
    return tuple(fact for facts in _table().values() for fact in facts)


def attribute_types(op: str, opset: int) -> Mapping[str, str]:
    """The type of each attribute: ONNX's, or for an operator of ATC's own what its plugin reads."""
    try:
        schema: Any = onnx.defs.get_schema(op, opset, "")
    except onnx.defs.SchemaError:
        reads = (fact.attribute for fact in plugin_facts(op, opset) if fact.kind == "reads")
        pairs = (each.partition(":") for names in reads for each in names.split(",") if each)
        return {name: type_ for name, _, type_ in pairs if type_}
    return {name: item.type.name for name, item in schema.attributes.items()}


@functools.cache
def _table() -> Mapping[str, tuple[PluginFact, ...]]:
    table: dict[str, tuple[PluginFact, ...]] = {}
    for row in table_rows("onnx_plugins.tsv"):
        low, _, high = row.pop("opsets").partition("-")
        opsets = range(int(low), int(high or low) + 1) if low else None
        fact = PluginFact(opsets=opsets, **row)  # pyright: ignore[reportArgumentType]
        table[fact.op] = (*table.get(fact.op, ()), fact)
    return table


def _has(node: PluginNode, alternatives: str) -> bool:
    for each in alternatives.split("|"):
        name, _, type_ = each.partition(":")
        given = node.attributes.get(name)
        # An empty list or text is none: the plugins test for that.
        if (
            given is not None
            and type_ in ("", given.type)
            and given.value not in ((), [], "", None)
        ):
            return True
    return False


_COMPARISON = re.compile(r"(.+?) (=|!=|<|>|in|not in) (.+)")


def _holds(clause: str, node: PluginNode) -> bool:
    """Whether one clause describes the node; of what is not there, none does.

    `given a`, `absent a`, `absent-input i`, `present-input i`, `present-output i`, `odd len(a)`,
    `even a`, `far a x` (further than the 1e-5 of the plugin), `typed a` (a tensor whose data are
    not raw, in a list that the plugin does not read), `inner-axis d` (the axis, d by default, is
    not the last one); and comparisons of `a`, `any a`, `len(a)`, `rank i`, `inputs`, `outputs`.
    """
    word, _, rest = clause.partition(" ")
    match word:
        case "given":
            return rest in node.attributes
        case "absent":
            return rest not in node.attributes
        case "present-input":
            return int(rest) < len(node.inputs) and node.inputs[int(rest)]
        case "absent-input":
            return not (int(rest) < len(node.inputs) and node.inputs[int(rest)])
        case "present-output":
            return int(rest) < len(node.outputs) and node.outputs[int(rest)]
        case "odd" | "even":
            number = _operand(rest, node)
            return isinstance(number, int) and number % 2 == (word == "odd")
        case "far":
            name, _, centre = rest.partition(" ")
            number = _operand(name, node)
            return isinstance(number, float) and abs(number - float(centre)) > 1e-5
        case "typed":
            given = node.attributes.get(rest)
            return given is not None and not given.raw
        case "inner-axis":
            return _inner_axis(node, int(rest))
        case _:
            return _compares(clause, node)


def _compares(clause: str, node: PluginNode) -> bool:
    found = _COMPARISON.fullmatch(clause)
    if found is None:
        raise ValueError(f"onnx_plugins.tsv: {clause!r} is no condition")
    left, operator, right = found.groups()
    value = _operand(left.removeprefix("any "), node)
    if value is None:
        return False
    values = list(value) if left.startswith("any ") and not isinstance(value, str) else [value]
    others = [_literal(word, node) for word in right.split()]
    return any(_test(each, operator, others) for each in values)


def _test(value: Any, operator: str, others: Sequence[Any]) -> bool:
    match operator:
        case "=" | "in":
            return value in others
        case "!=" | "not in":
            return value not in others
        case "<":
            return value < others[0]
        case _:
            return value > others[0]


def _operand(text: str, node: PluginNode) -> Any:
    """What a clause speaks of; None where it is not there, or of another type."""
    if text in ("inputs", "outputs"):
        return len(node.inputs if text == "inputs" else node.outputs)
    if text.startswith("rank "):
        index = int(text.removeprefix("rank "))
        return node.ranks[index] if index < len(node.ranks) else None
    counted = text.startswith("len(")
    given = node.attributes.get(text[4:-1] if counted else text)
    if given is None or counted != (given.type in ("INTS", "FLOATS", "STRINGS")):
        # `any a` asks for the elements of a list.
        return given.value if given is not None and not counted and given.type == "INTS" else None
    return len(given.value) if counted else given.value


def _literal(word: str, node: PluginNode) -> Any:
    if word == "outputs":
        return len(node.outputs)
    try:
        return float(word) if "." in word else int(word)
    except ValueError:
        return word


def _inner_axis(node: PluginNode, default: int) -> bool:
    rank = node.ranks[0] if node.ranks else None
    given = node.attributes.get("axis")
    axis = default if given is None else given.value
    return rank is not None and isinstance(axis, int) and axis % max(rank, 1) != rank - 1


def _shown(value: Any) -> str:
    return str(list(value)) if isinstance(value, (list, tuple)) else str(value)  # pyright: ignore[reportUnknownArgumentType]


# What the plugin of ConstantOfShape reads of a tensor that is not raw.
_TYPED = frozenset(("FLOAT", "DOUBLE", "INT32", "INT64"))


def plugin_node(node: ir.Node) -> PluginNode:
    """A loaded node in the words of the table."""
    return PluginNode(
        op=node.op_type,
        attributes={name: _given(item) for name, item in node.attributes.items()},
        inputs=[value is not None for value in node.inputs],
        outputs=[bool(value.uses()) or value.is_graph_output() for value in node.outputs],
        ranks=[
            None if value is None or value.shape is None else value.shape.rank()
            for value in node.inputs
        ],
    )


def _given(attribute: ir.Attr) -> Given:
    value, raw = attribute.value, True
    if attribute.type == ir.AttributeType.TENSOR:
        proto = getattr(value, "raw", None)
        raw = value.dtype.name in _TYPED or bool(getattr(proto, "raw_data", b"-"))
    return Given(attribute.type.name, value, raw)
