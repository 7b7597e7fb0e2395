"""The tables of raised rotary embeddings: one cosine and one sine per pair, made once for all."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from omforge import ir
from omforge.ir.dims import Dim
from omforge.ir.evaluate import EvaluationError
from omforge.ir.values import dims
from omforge.recognition.attention.masks import Probe, Prober
from omforge.recognition.interface import Interface
from omforge.recognition.rotary import angles as positions
from omforge.recognition.rotary.angles import Pairs
from omforge.recognition.views import shape_of
from omforge.rewriting.builder import Builder
from omforge.rewriting.events import record
from omforge.rewriting.match import NoMatch
from omforge.rewriting.splice import Names, insert


@dataclass(frozen=True)
class Wanted:
    """Two exported tables, and how they meet what they rotate.

    Attributes:
        cos: Broadcasts against `meets`.
        sin: The same.
        meets: [B, N, S, R] or [B, S, N, R], or the same with a unit axis behind.
        by_head: Whether heads come before tokens in `meets`.
        pairs: Where in a table the numbers of a pair are.
        reverse: Whether the rotation turns the other way.
    """

    cos: ir.Value
    sin: ir.Value
    meets: ir.Value
    by_head: bool
    pairs: Pairs
    reverse: bool

    @property
    def ends_in_unit(self) -> bool:
        """Whether each number stands in an axis of its own, behind the others."""
        return len(shape_of(self.meets)) == 5


class Tables:
    """Canonical tables by the exported ones they come from: layers share them.

    Args:
        model: The model that they are for.
        interface: Its inputs' roles.
        names: The model's names.
        by: The pass that makes them.
    """

    def __init__(self, model: ir.Model, interface: Interface, names: Names, by: str) -> None:
        self._model = model
        self._interface = interface
        self._names = names
        self._by = by
        self._prober = Prober(model, interface)
        self._made: dict[tuple[Any, ...], tuple[ir.Value, ir.Value]] = {}

    def get(self, root: ir.Node, wanted: Wanted) -> tuple[ir.Value, ir.Value]:
        """Both tables [B, S, R / 2], put ahead of the first node that needs them.

        Raises:
            NoMatch: The exported tables do not run over tokens and pairs alone.
        """
        check_layout(wanted)
        dtype = wanted.meets.dtype
        assert dtype is not None
        w = wanted
        key = (w.cos, w.sin, w.pairs, w.by_head, w.reverse, dtype)
        made = self._made.get(key)
        # An embedding that nothing uses takes its tables along when it is removed.
        if made is None or not all(map(_is_in_graph, made)):
            made = self._made[key] = self._make(root, wanted, dtype)
        return made

    def _make(self, root: ir.Node, wanted: Wanted, dtype: ir.DataType) -> tuple[ir.Value, ir.Value]:
        try:
            with Builder(self._model) as op:
                rotation = positions.recognise(self._prober, wanted.cos, wanted.sin)
                made = positions.build(
                    op, self._interface, rotation, wanted.pairs, dtype, reverse=wanted.reverse
                )
                insert(op, root, by=self._by, names=self._names)
                return made
        except NoMatch as miss:
            reason = f"its table is kept as it stands: {miss}"
        for table in (wanted.cos, wanted.sin):
            self._check_pairs(table, wanted.pairs)
        with Builder(self._model) as op:
            cos = self._once(op, wanted.cos, wanted)
            sin = self._once(op, wanted.sin, wanted)
            sin = op.Neg(sin) if wanted.reverse else sin
            insert(op, root, by=self._by, names=self._names)
        record(self._model, self._by, wanted.cos, reason)
        return cos, sin

    def _once(self, op: Builder, table: ir.Value, wanted: Wanted) -> ir.Value:
        """One number for each pair of an exported table, as [B, S, R / 2]."""
        batch = shape_of(wanted.meets)[0]
        shape = shape_of(table)
        if wanted.ends_in_unit:
            table, shape = op.Squeeze(table, [-1]), shape[:-1]
        missing = 4 - len(shape)
        whole = op.Unsqueeze(table, list(range(missing))) if missing else table
        rows = op.Squeeze(whole, [1 if wanted.by_head else 2])
        width = shape[-1]
        assert isinstance(width, int)
        if wanted.pairs != "single":
            first, end, step = (
                (0, width, 2) if wanted.pairs == "interleaved" else (0, width // 2, 1)
            )
            rows = op.Slice(rows, [first], [end], [-1], [step])
        if not missing and shape[0] == batch:
            return rows
        count = op.Shape(self._interface.input_ids, start=0, end=1)
        return op.Expand(rows, op.Concat(count, op.constant(np.array([1, 1])), axis=0))

    def _check_pairs(self, table: ir.Value, pairs: Pairs) -> None:
        """Raise NoMatch unless the elements of each pair meet the same number."""
        if pairs == "single":
            return
        try:
            part = self._prober.cut([table])
            for batch, seq, past in ((2, 5, 3), (2, 3, 9)):
                batch, seq, past = self._prober.sizes(batch, seq, past)
                probe = Probe(past, seq, np.ones((batch, past + seq), dtype=np.int64))
                (array,) = self._prober.run(part, probe)
                first, second = positions.halves(array, pairs == "interleaved")
                if not np.array_equal(first, second):
                    raise NoMatch(
                        "the two elements of a rotated pair meet different numbers", table
                    )
        except EvaluationError as error:
            raise NoMatch(f"the rotary table cannot be run alone: {error}", table) from error


def _is_in_graph(value: ir.Value) -> bool:
    maker = value.producer()
    return maker is not None and maker.graph is not None


def check_layout(wanted: Wanted) -> None:
    """Raise NoMatch unless the tables run over B, S and the width, wherever the heads are."""
    x = shape_of(wanted.meets)
    for table in (wanted.cos, wanted.sin):
        shape = dims(table)
        if shape is None:
            raise NoMatch("a rotary table has no known shape", table)
        if table.dtype != wanted.meets.dtype:
            raise NoMatch(f"a rotary table of {table.dtype} meets {wanted.meets.dtype}", table)
        if not _runs_over(shape, x, wanted):
            raise NoMatch(
                f"a rotary table of shape {[str(n) for n in shape]} does not run over [B, S, R] "
                f"of {[str(n) for n in x]}",
                table,
            )


def _runs_over(shape: tuple[Dim, ...], x: tuple[Dim, ...], wanted: Wanted) -> bool:
    if wanted.ends_in_unit:
        if not shape or shape[-1] != 1:
            return False
        shape, x = shape[:-1], x[:-1]
    padded = (1,) * (4 - len(shape)) + shape
    if len(padded) != 4:
        return False
    heads, seq = (padded[1], padded[2]) if wanted.by_head else (padded[2], padded[1])
    length = x[2] if wanted.by_head else x[1]
    return (heads, seq, padded[3]) == (1, length, x[3]) and padded[0] in (1, x[0])
