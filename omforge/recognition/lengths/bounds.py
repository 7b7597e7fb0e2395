"""How long a text may be for what the graph itself holds: tables that end, choices by length.

Exporters write learned positions, caches of cosines and triangles of ones as tables, and a text
that is longer reads behind their end, or gets less of a mask than it has tokens. None has a
spelling that could be relied upon. So what depends on positions, masks and lengths alone is run on
texts of growing length: where it no longer runs, no longer fits what it meets, or gives a position
something else than in a shorter text, that length is the bound.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeGuard

import numpy.typing as npt

from omforge import ir
from omforge.ir.evaluate import Cutout, EvaluationError, sizes
from omforge.ir.values import constant_tensor, dims, known
from omforge.recognition.attention.masks import Prober
from omforge.recognition.cache.exported import exported_caches
from omforge.recognition.config import ModelConfig
from omforge.recognition.interface import find_interface
from omforge.recognition.lengths.choices import choices
from omforge.recognition.lengths.texts import (
    Check,
    Ruler,
    frontier,
    longest_text,
    lookup,
    moving,
    small,
)

Array = npt.NDArray[Any]

_ELEMENTWISE = {"Add", "And", "Div", "Max", "Min", "Mul", "Or", "Pow", "Sub", "Where"}

_NEW = 3
"""New tokens of the runs that look where tables end: a row for each, and a past before them."""


@dataclass(frozen=True)
class Bound:
    """The longest text that something allows.

    Attributes:
        tokens: Its length.
        why: What says so, as a sentence without its end.
    """

    tokens: int
    why: str


def config_bounds(config: ModelConfig | None) -> tuple[Bound, ...]:
    """What the configuration beside a model says."""
    if config is None or config.max_positions is None:
        return ()
    return (Bound(config.max_positions, config.positions_source),)


def find_bounds(model: ir.Model, longest: int) -> tuple[Bound, ...]:
    """What bounds a text to less than `longest` tokens in a graph, shortest first.

    Args:
        model: An export whose dimensions `name-dims` has named.
        longest: The longest text that is wanted.
    """
    try:
        interface = find_interface(model)
    except ir.InputError:
        return ()
    live = moving(model)
    ruler = Ruler(Prober(model, interface), interface)
    found: dict[int, Bound] = {}
    for cache in exported_caches(model):
        slots = cache.shape[cache.axis]
        if isinstance(slots, int) and slots < longest:
            found[slots] = Bound(slots, f"the export's own cache {cache.input} has {slots} slots")
            longest = slots
    # Choices second: nothing can be run behind the end of a table.
    for checks in (_tables, choices):
        for check in checks(model, live, ruler):
            tokens = longest_text(check.holds, longest)
            why = check.why(tokens) if check.least <= tokens < longest else ""
            if why:
                found.setdefault(tokens, Bound(tokens, why))
        longest = min((longest, *found))
    return tuple(found[tokens] for tokens in sorted(found))


def _tables(model: ir.Model, live: set[ir.Value], ruler: Ruler) -> Iterator[Check]:
    """Lookups by position, and what has to fit what it meets."""
    seen: set[object] = set()
    for node in model.graph:
        found = lookup(node)
        if found is None or found[1] in live or found[0] in live or known(found[1]) is not None:
            continue
        table, rows, axis = found
        if rows.is_graph_input() and re.search("type|segment", rows.name or ""):
            continue  # BERT's kinds of tokens
        shape = dims(table)
        key = (rows, None if shape is None else shape[axis], table if shape is None else None)
        if constant_tensor(rows) is None and key not in seen:
            seen.add(key)
            yield _ends(table, rows, axis, ruler)
    for value in frontier(model, live):
        maker = value.producer()
        if maker is None or lookup(maker) is None:
            yield _fits(value, live, ruler)


def _ends(table: ir.Value, rows: ir.Value, axis: int, ruler: Ruler) -> Check:
    """No row of a text of that length lies behind the table's end."""
    shape = dims(table)
    size = shape[axis] if shape is not None and axis < len(shape) else None
    parts: list[Cutout] = []

    def run(length: int) -> tuple[int, Array]:
        if not parts:
            parts.append(ruler.cut([rows] if isinstance(size, int) else [rows, table]))
        numbers, *tables = ruler.run(parts[0], length, min(_NEW, length))
        return (size if isinstance(size, int) else tables[0].shape[axis]), numbers

    def holds(length: int) -> bool:
        try:
            count, numbers = run(length)
        except EvaluationError:
            return not isinstance(size, int) and length > 1 and not _runs(run, 1)
        return numbers.size == 0 or (numbers.max() < count and numbers.min() >= -count)

    def why(length: int) -> str:
        try:
            count, numbers = run(length)
        except EvaluationError:
            return f"the table {table.name} in the graph ends there"
        first = int(numbers.max()) - (length - 1)
        begins = f", and the first token has row {first}" if first else ""
        return f"the table {_name_of(table)} in the graph has {count} rows{begins}"

    return Check(holds, why)


def _runs(run: Callable[[int], object], length: int) -> bool:
    try:
        run(length)
    except EvaluationError:
        return False
    return True


def _name_of(value: ir.Value) -> str:
    """A table's name, or that of the constant that it is made of."""
    maker = value.producer()
    if constant_tensor(value) is None and maker is not None:
        given = [v for v in maker.inputs if v is not None and constant_tensor(v) is not None]
        largest = max(given, key=lambda v: math.prod(_numbers(v)), default=value)
        return str(largest.name)
    return str(value.name)


def _fits(value: ir.Value, live: set[ir.Value], ruler: Ruler) -> Check:
    """The value still runs, and fits what it meets, in a text of that length."""
    meets = [
        other
        for node in value.consumers()
        if node.op_type in _ELEMENTWISE and node.domain == ""
        for other in node.inputs
        if other is not None and other is not value and other in live
    ]
    parts: list[Cutout] = []

    def holds(length: int) -> bool:
        new = min(_NEW, length)
        try:
            if not parts:
                parts.append(small(ruler.cut([value])))
            bindings = ruler.bindings(length, new)
        except EvaluationError:
            return True  # it is not to be run at any length
        try:
            (array,) = ruler.run(parts[0], length, new)
        except EvaluationError as error:
            return "ONNX Runtime" not in error.what
        return all(_broadcasts(array.shape, other, bindings) for other in meets)

    def why(length: int) -> str:
        tables = [v for node in parts[0].nodes for v in node.inputs if _is_table(v, length)]
        if not tables:
            return ""  # as where a cache that slides is shorter than the text
        least = min(tables, key=lambda v: max(_numbers(v)))
        return f"the table {least.name} in the graph is [{', '.join(map(str, _numbers(least)))}]"

    return Check(holds, why)


def _is_table(value: ir.Value | None, length: int) -> TypeGuard[ir.Value]:
    """Whether a value is a constant that ends at a length, or a few rows behind it."""
    if value is None or constant_tensor(value) is None:
        return False
    return any(length <= size < length + 2 * _NEW for size in _numbers(value) if size > 1)


def _numbers(value: ir.Value) -> list[int]:
    return [dim for dim in (dims(value) or ()) if isinstance(dim, int)]


def _broadcasts(shape: tuple[int, ...], other: ir.Value, bindings: dict[str, int]) -> bool:
    try:
        theirs = sizes(other, bindings)
    except EvaluationError:
        return True
    pairs = zip(reversed(shape), reversed(theirs), strict=False)
    return all(mine == their or 1 in (mine, their) for mine, their in pairs)
