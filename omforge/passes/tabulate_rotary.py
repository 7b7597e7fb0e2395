"""Replace the computation of cos and sin by rows of a table.

Before::

    cos = Cos(Mul(Unsqueeze(Cast(position_ids)), inv_freq))

After::

    cos = Gather(table, position_ids)        # table [positions, R / 2]

Angles need 24 bits of mantissa: at position 4,000 a float16 angle is off by whole radians. A table
computed ahead in float32 can be rounded to any dtype afterwards, and costs a lookup.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from omforge import ir
from omforge.ir.edit import remove_dead
from omforge.ir.evaluate import Cutout, EvaluationError
from omforge.ir.infer import constant_tensor, dims, infer_model
from omforge.passes.builder import Builder
from omforge.passes.events import record
from omforge.passes.interface import find_interface
from omforge.passes.pipeline import Pass
from omforge.passes.splice import Names, splice

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
        ids = find_interface(model).position_ids
        names = Names(model)
        count = 0
        for value in wanted:
            if _is_lookup(value, ids):
                continue
            try:
                if ids is None:
                    raise EvaluationError("the model has no position_ids to look rows up by")
                table = self._table(model, value, ids)
            except EvaluationError as error:
                record(model, self.name, value, f"it is computed at run time: {error}")
                continue
            with Builder(model) as op:
                name = names.unique(f"{value.name}_table")
                rows = op.Gather(op.constant(table, name=name), ids, axis=0)
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
        few = min(self.positions, _AGAIN)
        order = np.random.default_rng(0).permutation(few)
        rows = np.stack([order, order[::-1]])
        if table.shape != (self.positions, shape[2]) or not np.array_equal(
            _at(part, ids, rows), table[rows]
        ):
            raise EvaluationError("it depends on more than the token's own position")
        length = 1
        while length < self.positions:  # LongRoPE turns at other frequencies once a text is long
            if not np.array_equal(_at(part, ids, np.arange(length)[None, :])[0], table[:length]):
                raise EvaluationError(
                    f"it depends on the length of the text: {length} and {self.positions} "
                    "positions give other rows"
                )
            length *= 2
        return table


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
