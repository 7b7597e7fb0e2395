"""Take the rows of the chosen experts, where an export weighs those of all and sums them.

Before, as exporters write experts that are one batched product::

    scores = ScatterElements(zeros [T, E], choices [T, k], weights [T, k])
    y      = ReduceSum(down [E, T, D] * Transpose(scores) [E, T, 1], axis=0)

After, the canonical form of a mixture of experts::

    own = Gather(Reshape(down, [E*T, D]), choices * T + token)          [T*k, D]
    y   = ReduceSum(Reshape(own * weights, [T, k, D]), axis=1)

The zeros of E - k experts are not in the sum any more, and which experts count is stated: what they
alone compute can be told from it. It runs before `one-hot-choices`, which writes a scatter out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from omforge import ir
from omforge.ir.evaluate import sizes
from omforge.ir.infer import infer_model
from omforge.ir.values import attribute, known_ints
from omforge.recognition.experts.block import stacked_products
from omforge.recognition.experts.scattered import Scattered
from omforge.recognition.views import Chain, is_same_movement, shape_of, trace
from omforge.rewriting.base import Pass
from omforge.rewriting.builder import Builder
from omforge.rewriting.events import record
from omforge.rewriting.match import NoMatch
from omforge.rewriting.splice import Names, splice

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class TakeChoices(Pass):
    """Sum the rows of a token's own experts instead of all experts' rows times scores."""

    name: ClassVar[str] = "take-choices"

    def run(self, model: ir.Model) -> int:
        """Rewrite; the number of sums. Scattered scores that stay are an event."""
        nodes = [n for n in model.graph if n.op_type == "ScatterElements" and n.domain == ""]
        if not nodes:
            return 0
        infer_model(model)
        names = Names(model)
        count = 0
        for node in nodes:
            try:
                count += _rewrite(model, Scattered.of(node), names)
            except NoMatch as miss:
                record(model, self.name, node, str(miss))
        if count:
            infer_model(model)
        return count


def _rewrite(model: ir.Model, scattered: Scattered, names: Names) -> int:
    """Every sum of rows that the scores weigh; 0 where they weigh none.

    Raises:
        NoMatch: A sum is of another kind.
    """
    count = 0
    for product in _products(scattered.node.outputs[0]):
        total = product.outputs[0].consumers()
        if len(total) != 1 or total[0].op_type != "ReduceSum":
            continue
        _rewrite_sum(model, scattered, product, total[0], names)
        count += 1
    if not count:
        raise NoMatch(
            "no sum over experts follows, of what every one of them computes", scattered.node
        )
    return count


def _products(scores: ir.Value) -> list[ir.Node]:
    """The Mul nodes that scores reach by movement alone."""
    found: list[ir.Node] = []
    pending = [scores]
    while pending:
        for user in pending.pop().consumers():
            if user.op_type == "Mul":
                found.append(user)
            elif user.op_type in ("Cast", "Reshape", "Squeeze", "Transpose", "Unsqueeze"):
                pending += user.outputs
    return found


def _rewrite_sum(
    model: ir.Model, scattered: Scattered, product: ir.Node, total: ir.Node, names: Names
) -> None:
    axes = known_ints(total.inputs[1]) if len(total.inputs) > 1 else None
    if axes != [0] or attribute(total, "keepdims", 1):
        raise NoMatch("the sum is not over the experts, in front, alone", total)
    scores = scattered.node.outputs[0]
    chains = [trace(value) for value in product.inputs if value is not None]
    weighs = next((chain for chain in chains if chain.source is scores), None)
    rows = next((chain for chain in chains if chain is not weighs), None)
    if weighs is None or rows is None:
        raise NoMatch("the scores are not moved, but computed with", product)
    table = _table(rows)
    experts, tokens, width = shape_of(table)
    if shape_of(scores) != (tokens, experts):
        raise NoMatch("the scores are not of the same experts and tokens", scores)

    def transposed(index: Array, bindings: Mapping[str, int]) -> Array:
        return index.T.reshape(sizes(weighs.end, bindings))

    if not is_same_movement(weighs, transposed):
        raise NoMatch("the scores do not weigh the rows of their expert and token", product)
    each = shape_of(scattered.choices)[-1]
    if not isinstance(each, int) or not isinstance(width, int):
        raise NoMatch("how many experts a token has is not known", scattered.choices)
    updates = scattered.updates
    if shape_of(total.outputs[0])[-1] != width or updates.dtype != table.dtype:
        raise NoMatch("the sum is of another width or dtype than the rows", total)
    with Builder(model) as op:
        zero, one = (op.constant(np.array(number, np.int64)) for number in (0, 1))
        flat = op.Reshape(scattered.choices, np.array([-1]))
        length = op.Squeeze(op.Shape(flat))
        by = op.constant(np.array(each, np.int64))
        token = op.Div(op.Range(zero, length, one), by)
        index = op.Add(op.Mul(flat, op.Div(length, by)), token)
        own = op.Gather(op.Reshape(table, np.array([-1, width])), index, axis=0)
        weighed = op.Mul(own, op.Reshape(updates, np.array([-1, 1])))
        y = op.ReduceSum(op.Reshape(weighed, np.array([-1, each, width])), [1], keepdims=0)
        if len(shape_of(total.outputs[0])) != 2:
            y = op.Reshape(y, op.Shape(rows.end, start=1))
        splice(op, [total.outputs[0]], [y], by=TakeChoices.name, matched=[total], names=names)


def _table(rows: Chain) -> ir.Value:
    """[E, T, D], what every expert makes of all tokens, behind a reshape that rows may have."""
    for chain in rows.prefixes():
        if len(shape_of(chain.source)) == 3 and stacked_products(chain.source):

            def kept(index: Array, bindings: Mapping[str, int], end: ir.Value = chain.end) -> Array:
                return index.reshape(sizes(end, bindings))

            if is_same_movement(chain, kept):
                return chain.source
    raise NoMatch("no product of all tokens with stacked weights makes the rows", rows.end)
