"""Write what is scattered to the places that a TopK chose as a sum of one-hot rows.

Before, as routers of experts do::

    _, choices = TopK(scores [.., E], k)
    y = ScatterElements<axis=-1>(zeros [.., E], choices [.., k], x [.., k])

After::

    y = ReduceSum(OneHot(choices) [.., k, E] * x [.., k, 1], axis=-2)

An Ascend 310P has no AI Core kernel for ScatterElements. What a TopK chooses is never chosen twice,
so no element of the sum has more than one part.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from omforge import ir
from omforge.ir.infer import infer_model
from omforge.recognition.experts.scattered import Scattered
from omforge.recognition.views import shape_of
from omforge.rewriting.base import Pass
from omforge.rewriting.builder import Builder
from omforge.rewriting.events import record
from omforge.rewriting.match import NoMatch
from omforge.rewriting.splice import Names, splice


@dataclass(frozen=True)
class OneHotChoices(Pass):
    """Write what is scattered to the places that a TopK chose as a sum of one-hot rows."""

    name: ClassVar[str] = "one-hot-choices"

    def run(self, model: ir.Model) -> int:
        """Rewrite; the number of ScatterElements gone. One that stays is an event."""
        nodes = [n for n in model.graph if n.op_type == "ScatterElements" and n.domain == ""]
        if not nodes:
            return 0
        infer_model(model)
        names = Names(model)
        count = 0
        for node in nodes:
            try:
                _rewrite(model, node, names)
            except NoMatch as miss:
                record(model, self.name, node, str(miss))
            else:
                count += 1
        return count


def _rewrite(model: ir.Model, node: ir.Node, names: Names) -> None:
    scattered = Scattered.of(node)
    choices, updates = scattered.choices, scattered.updates
    data = node.inputs[0]
    assert data is not None
    shape = shape_of(data)
    dtype = data.dtype
    if dtype is None or dtype not in (ir.DataType.FLOAT, ir.DataType.FLOAT16):
        raise NoMatch(f"it scatters {dtype}", node)
    with Builder(model) as op:
        values = op.constant(np.array([0, 1], dtype.numpy()))
        depth = op.constant(np.array(shape[-1], np.int64))
        rows = op.OneHot(choices, depth, values, axis=-1)
        parts = op.Mul(rows, op.Unsqueeze(updates, [-1]))
        y = op.ReduceSum(parts, [-2], keepdims=0)
        splice(op, [node.outputs[0]], [y], by=OneHotChoices.name, names=names)
