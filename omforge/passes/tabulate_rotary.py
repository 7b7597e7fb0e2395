"""Replace the computation of cos and sin by rows of a table.

Before::

    cos = Cos(Mul(Unsqueeze(Cast(position_ids)), inv_freq))

After::

    cos = Gather(table, position_ids)        # table [positions, R / 2]

or, where a model without a cache counts its slots, the first S rows of it. Angles need 24 bits of
mantissa: at position 4,000 a float16 angle is off by whole radians. A table computed ahead in
float32 can be rounded to any dtype afterwards, and costs a lookup.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from omforge import ir
from omforge.ir.edit import remove_dead
from omforge.ir.evaluate import Cutout, EvaluationError
from omforge.ir.infer import infer_model
from omforge.ir.values import constant_tensor, dims
from omforge.recognition.interface import find_interface
from omforge.rewriting.base import Pass
from omforge.rewriting.builder import Builder
from omforge.rewriting.events import record
from omforge.rewriting.splice import Names, splice

Array = npt.NDArray[Any]

_AGAIN = 64
"""Positions computed a second time, in another order and with none that is longer."""


@dataclass(frozen=True)
class TabulateRotary(Pass):
    """Tabulate the rotary tables for positions below `positions`.

    Attributes:
        positions: Rows of the tables: the most tokens that a sequence will hold.
    """

    name: ClassVar[str] = "tabulate-rotary"
    positions: int

    def run(self, model: ir.Model) -> int:
        """Tabulate; the number of tables.

        A table that is no function of the position alone is an event.

        Raises:
            InputError: The graph is no causal LM, or no position is asked for.
        """
        if self.positions < 1:
            raise ir.InputError(
                f"rotary tables of {self.positions} positions", "a sequence has at least 1"
            )
        infer_model(model)
        wanted = {
            value: None
            for node in model.graph
            if node.op_type == "RotaryEmbedding" and node.domain == ""
            for value in node.inputs[1:3]
            if value is not None and constant_tensor(value) is None
        }
        if not wanted:
            return 0
        interface = find_interface(model)
        ids = interface.position_ids
        names = Names(model)
        count = 0
        for value in wanted:
            if _is_lookup(value, ids):
                continue
            try:
                if ids is not None:
                    table = self._table(model, value, ids)
                elif interface.caches:
                    raise EvaluationError("the model has no position_ids to look rows up by")
                else:
                    table = self._slots(model, value)
            except EvaluationError as error:
                record(model, self.name, value, f"it is computed at run time: {error}")
                continue
            with Builder(model) as op:
                held = op.constant(table, name=names.unique(f"{value.name}_table"))
                if ids is not None:
                    rows = op.Gather(held, ids, axis=0)
                else:
                    rows = _first_rows(op, held, interface.input_ids, table.shape[1])
                splice(op, [value], [rows], by=self.name, names=names)
            count += 1
        if count:
            remove_dead(model)
        return count

    def _table(self, model: ir.Model, value: ir.Value, ids: ir.Value) -> Array:
        """One row for each position: [positions, R / 2]."""
        shape, expected = dims(value), dims(ids)
        if shape is None or len(shape) != 3 or shape[:2] != expected:
            raise EvaluationError(f"it is {shape}, not [B, S, R / 2]")
        part = Cutout([value], [ids], model.opset_imports[""])
        table = _at(part, ids, np.arange(self.positions)[None, :])[0]
        if table.shape != (self.positions, shape[2]):
            raise EvaluationError("it depends on more than the token's own position")
        few = min(self.positions, _AGAIN)
        order = np.random.default_rng(0).permutation(few)
        rows = np.stack([order, order[::-1]])
        if not np.array_equal(_at(part, ids, rows), table[rows]):
            raise EvaluationError("it depends on more than the token's own position")
        for length in self._lengths():
            found = _at(part, ids, np.arange(length)[None, :])[0]
            self._check_length(found, table)
        return table

    def _slots(self, model: ir.Model, value: ir.Value) -> Array:
        """The same of tables that are made of the length alone, one row for each slot."""
        shape = dims(value)
        if shape is None or len(shape) != 3:
            raise EvaluationError(f"it is {shape}, not [B, S, R / 2]")
        part = Cutout([value], [], model.opset_imports[""])

        def at(length: int) -> Array:
            found = part.run({}, {"batch": 2, "seq": length})[0]
            if found.shape[1:] != (length, shape[2]) or not np.array_equal(found[0], found[-1]):
                raise EvaluationError("it depends on more than the token's own slot")
            return found[0]

        table = at(self.positions)
        for length in self._lengths():
            self._check_length(at(length), table)
        return table

    def _lengths(self) -> list[int]:
        return [1 << power for power in range((self.positions - 1).bit_length())]

    def _check_length(self, found: Array, table: Array) -> None:
        """LongRoPE turns at other frequencies once a text is long."""
        if not np.array_equal(found, table[: len(found)]):
            raise EvaluationError(
                f"it depends on the length of the text: {len(found)} and {self.positions} "
                "positions give other rows"
            )


def _first_rows(op: Builder, table: ir.Value, ids: ir.Value, width: int) -> ir.Value:
    """The first S rows of a table for each row of the batch, [B, S, R / 2]."""
    seq = op.Shape(ids, start=1, end=2)
    rows = op.Slice(table, np.array([0]), seq, np.array([0]))
    size = op.Concat(op.Shape(ids, start=0, end=1), seq, np.array([width]), axis=0)
    return op.Expand(op.Unsqueeze(rows, np.array([0])), size)


def _at(part: Cutout, ids: ir.Value, positions: Array) -> Array:
    assert ids.name is not None
    assert ids.dtype is not None
    feeds = {ids.name: positions.astype(ids.dtype.numpy())}
    return part.run(feeds, {"batch": positions.shape[0], "seq": positions.shape[1]})[0]


def _is_lookup(value: ir.Value, ids: ir.Value | None) -> bool:
    node = value.producer()
    return (
        node is not None
        and node.op_type == "Gather"
        and node.inputs[1] is ids
        and constant_tensor(node.inputs[0]) is not None
    )
