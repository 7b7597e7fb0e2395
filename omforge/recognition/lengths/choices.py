"""Choices that a graph makes by the length of the text: LongRoPE, dynamic NTK, an If on a length.

A position then has one row in a short text and another in a long one, while its key is in the cache
as it was turned first: no step that follows can make up for that. There are many spellings, so what
a position has is compared between texts of different lengths.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from omforge import ir
from omforge.ir.dims import symbol, symbols
from omforge.ir.evaluate import Cutout, EvaluationError
from omforge.ir.values import constant_tensor, dims, known
from omforge.recognition.attention.masks import Probe, Prober
from omforge.recognition.interface import find_interface
from omforge.recognition.lengths.texts import Check, Ruler, frontier, lookup, moving, small
from omforge.rewriting.events import place

Array = npt.NDArray[Any]

_TOKENS, _KEYS = symbol("seq"), symbol("past") + symbol("seq")

_ROWS = 2
"""Tokens of a row where rows of a batch are compared: few, so that one row is short."""

_CLOSE = 2e-6
"""Rows that differ by less are one row, computed among another number of rows."""


def choices(model: ir.Model, live: set[ir.Value], ruler: Ruler) -> Iterator[Check]:
    """What a position has, whatever the length of the text that it is in."""
    for value in _tables(model, live):
        axis = _axis(value, live)
        if axis is not None:
            yield _keeps(value, axis, ruler)


def _tables(model: ir.Model, live: set[ir.Value]) -> list[ir.Value]:
    """What may have a row for each token: floats that tokens meet, and the rows of lookups."""
    wanted = [
        value
        for value in frontier(model, live)
        if value.dtype is not None and value.dtype.is_floating_point() and not _is_lookup(value)
    ]
    wanted += [
        found[1]
        for node in model.graph
        if (found := lookup(node)) is not None and found[1].producer() is not None
    ]
    return [
        value
        for value in dict.fromkeys(wanted)
        if value not in live and known(value) is None and constant_tensor(value) is None
    ]


def _is_lookup(value: ir.Value) -> bool:
    maker = value.producer()
    found = None if maker is None else lookup(maker)
    return found is not None and constant_tensor(found[0]) is not None


def _axis(value: ir.Value, live: set[ir.Value]) -> int | None:
    """The axis of a value's rows, one for each token; -1 if it has none, None if it is no table."""
    shape = dims(value)
    if shape is None:
        return None
    long = [axis for axis, dim in enumerate(shape) if {"seq", "past"} & symbols(dim)]
    if len(long) > 1:
        return None  # a mask, which is recognised as a whole
    if not long:
        return -1
    users = [node for node in value.consumers() if any(v in live for v in node.outputs)]
    if shape[long[0]] == _KEYS and all(node.op_type == "Mul" for node in users):
        # A row for each key turns it; what is added to scores may count from the last key.
        return long[0]
    return long[0] if shape[long[0]] == _TOKENS else None


def _keeps(value: ir.Value, axis: int, ruler: Ruler) -> Check:
    """Each position has the row that it has in any shorter text."""
    parts: list[Cutout] = []
    rows: dict[tuple[int, int], Array] = {}

    def table(length: int, new: int) -> Array:
        """Rows first: those of the new tokens, or of all where the value has those."""
        if (length, new) not in rows:
            if not parts:
                parts.append(small(ruler.cut([value])))
            (array,) = ruler.run(parts[0], length, new)
            rows[length, new] = array[None] if axis < 0 else np.moveaxis(array, axis, 0)
        return rows[length, new]

    def holds(length: int) -> bool:
        try:
            whole = table(length, length)
            shorter = [n for n in (*_powers(length), length - 1) if n > 0]
            for n in shorter:
                if not _same(table(n, n), whole[:n]):
                    return False
                step = table(n, 1)
                if not _same(step, whole if axis < 0 else whole[max(0, n - len(step)) : n]):
                    return False
        except EvaluationError:
            return True
        return True

    def why(length: int) -> str:
        node = _chooser(parts[0])
        by = f" ({ir.describe(node)} chooses)" if node is not None else ""
        return (
            f"beyond {length} tokens the graph computes something else for the same positions{by}, "
            "while the cache holds what it computed before"
        )

    return Check(holds, why, least=2)


def tied_rows(model: ir.Model, longest: int) -> str:
    """What makes the rows of a batch depend on each other's positions; "" if nothing does.

    Args:
        model: An export whose dimensions `name-dims` has named.
        longest: Tokens of the longest text.
    """
    try:
        interface = find_interface(model)
    except ir.InputError:
        return ""
    ids = interface.position_ids
    prober, live = Prober(model, interface), moving(model)
    new = min(_ROWS, longest)
    if ids is None or prober.sizes(2, new, 0) != (2, new, 0):
        return ""
    near, far = np.arange(new), np.arange(longest - new, longest)
    for value in _tables(model, live):
        if _axis(value, live) is None or _axis(value, live) == -1:
            continue
        try:
            part = small(prober.cut([value]))
            if ids.name not in part.used:
                continue
            alone = [_at(prober, part, np.stack([rows, rows])) for rows in (near, far)]
            for first, second in ((0, 1), (1, 0)):
                rows = np.stack([(near, far)[first], (near, far)[second]])
                mixed = _at(prober, part, rows)
                wanted = np.stack([alone[first][0], alone[second][-1]])
                if len(mixed) != 2 or not _same(mixed, wanted):
                    return f"the row of {place(value)} follows the positions of other rows"
        except EvaluationError:
            continue
    return ""


def _at(prober: Prober, part: Cutout, positions: Array) -> Array:
    """A value at positions [B, S] of a first step."""
    probe = Probe(0, positions.shape[1], np.ones(positions.shape, dtype=np.int64))
    return prober.run(part, probe, positions)[0]


def _powers(length: int) -> list[int]:
    found = [1]
    while found[-1] * 2 < length:
        found.append(found[-1] * 2)
    return found


def _same(rows: Array, others: Array) -> bool:
    if rows.shape != others.shape:
        return True  # not a row for each token
    return bool(np.allclose(rows, others, rtol=_CLOSE, atol=_CLOSE, equal_nan=True))


def is_choice(node: ir.Node) -> bool:
    """Whether a node takes one of two branches as a whole: on a single condition."""
    condition = node.inputs[0] if node.op_type in ("If", "Where") and node.domain == "" else None
    shape = None if condition is None else dims(condition)
    return shape is not None and shape == (1,) * len(shape)


def _chooser(part: Cutout) -> ir.Node | None:
    """The node that most likely chooses by length: on a single condition."""
    for node in reversed(part.nodes):
        if is_choice(node):
            return node
    return next((node for node in part.nodes if node.op_type in ("Max", "Min", "Clip")), None)
