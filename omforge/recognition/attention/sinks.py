"""Attention sinks: a learned score for each head that takes its share of the softmax, and no value.

As exporters write it::

    p = Softmax(Concat<axis=-1>(scores [B, N, S, T], sink [B, N, S, 1]))
    y = MatMul(p[..., :-1], v)

or, which is the same, with the share that the sink leaves to the keys as a gate behind the values::

    y = Mul(MatMul(Softmax(scores), v), Sigmoid(Sub(ReduceLogSumExp<axes=-1>(scores), sink)))

Canonically it is one more key, of zeros, whose mask is the sink and whose value is zeros::

    mask1 = Concat<axis=-1>(Expand(mask [B, 1, S, T]), sink [B, N, S, 1])      [B, N, S, T + 1]
    y     = Attention(q, Pad(k), Pad(v), mask1, past_k, past_v)                k [B, S + 1, K*D]

The extra row is no part of the cache: what the model returns of its keys and values is without it.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from omforge import ir
from omforge.ir.evaluate import Cutout, EvaluationError
from omforge.ir.values import attribute, constant, known_ints
from omforge.recognition.views import bindings_for, shape_of
from omforge.rewriting.builder import Builder
from omforge.rewriting.match import NoMatch

_ONE_ROW = [0, 0, 0, 0, 1, 0]
"""Pads of a [B, S, K*D]: one row behind the tokens."""

ONE_ROW_BY_HEAD = [0, 0, 0, 0, 0, 0, 1, 0]
"""Pads of a [B, K, C, D], a cache that is attended to as a whole: one row behind its slots."""


@dataclass(frozen=True)
class Sink:
    """The parts of a canonical attention with a sink.

    Attributes:
        key: New keys [B, S, K*D] without the extra row; or a cache that is written in place, as a
            whole [B, K, C, D].
        value: New values, likewise.
        mask: Additive [B, 1, S, T], for the real keys.
        column: The sink of each head, [B, N, S, 1].
    """

    key: ir.Value
    value: ir.Value
    mask: ir.Value
    column: ir.Value


def read(extra: ir.Value, heads: int, opset: int) -> npt.NDArray[Any]:
    """The numbers [N] of what is joined to the scores.

    Args:
        extra: [B, N, S, 1], or [B, N, S].
        heads: N.
        opset: Of the model.

    Raises:
        NoMatch: It is not one number for each head.
    """
    found: npt.NDArray[Any] | None = None
    try:
        part = Cutout([extra], [], opset)
        for bindings in bindings_for([extra]):
            (array,) = part.run({}, bindings)
            array = array[..., None] if array.ndim == 3 else array
            if array.ndim != 4 or array.shape[1] not in (1, heads) or array.shape[3] != 1:
                raise NoMatch(f"what is joined to the scores is {list(array.shape)}", extra)
            numbers = np.broadcast_to(array[0, :, 0, 0], (heads,))
            same = array == array[:1, :, :1]
            if not same.all() or (found is not None and not np.array_equal(found, numbers)):
                raise NoMatch("an attention sink differs between queries", extra)
            found = numbers
    except EvaluationError as error:
        raise NoMatch(f"what is joined to the scores is no constant: {error}", extra) from error
    assert found is not None
    return found


def gate(
    output: ir.Value, scores: ir.Value, live: Collection[ir.Value]
) -> tuple[ir.Value, ir.Value] | None:
    """The sink, and what is gated by the share that it leaves; None where there is no such gate.

    Args:
        output: Of the product with the values, [B, N, S, E].
        scores: What the softmax reads, [B, N, S, T].
        live: What depends on tokens, which a sink does not.
    """
    users = output.consumers()
    if len(users) != 1 or users[0].op_type != "Mul" or output.is_graph_output():
        return None
    share = next((value for value in users[0].inputs if value is not output), None)
    if share is None or shape_of(share) != (*shape_of(output)[:3], 1):
        return None
    sigmoid = _behind(share, "Sigmoid")
    difference = None if sigmoid is None else _behind(sigmoid.inputs[0], "Sub")
    if difference is None:
        return None
    total, sink = _behind(difference.inputs[0], "ReduceLogSumExp"), difference.inputs[1]
    if total is None or sink is None or sink in live or len(shape_of(difference.outputs[0])) < 3:
        return None
    axes = total.inputs[1] if len(total.inputs) > 1 else None
    given = attribute(total, "axes") if axes is None else known_ints(axes)
    if list(given or ()) not in ([-1], [3]) or _uncast(total.inputs[0]) is not _uncast(scores):
        return None
    return sink, users[0].outputs[0]


def _behind(value: ir.Value | None, op_type: str) -> ir.Node | None:
    """The node of a kind that makes a value, but for casts and axes of one."""
    node = None if value is None else value.producer()
    while node is not None and node.op_type in ("Cast", "Identity", "Squeeze", "Unsqueeze"):
        value = node.inputs[0]
        node = None if value is None else value.producer()
    return node if node is not None and node.op_type == op_type and node.domain == "" else None


def _uncast(value: ir.Value | None) -> ir.Value | None:
    while value is not None and (node := value.producer()) is not None and node.op_type == "Cast":
        value = node.inputs[0]
    return value


def append(
    op: Builder, key: ir.Value, value: ir.Value, mask: ir.Value, column: ir.Value
) -> tuple[ir.Value, ir.Value, ir.Value]:
    """Keys, values and mask with one more key; see `Sink` for the arguments."""
    heads = shape_of(column)[1]
    assert isinstance(heads, int)
    by_head = op.Expand(mask, [1, heads, 1, 1])
    return op.Pad(key, _ONE_ROW), op.Pad(value, _ONE_ROW), op.Concat(by_head, column, axis=-1)


def column(
    op: Builder, numbers: npt.NDArray[Any], tokens: ir.Value, dtype: ir.DataType
) -> ir.Value:
    """The sinks of N heads as [B, N, S, 1].

    Args:
        op: Records the nodes.
        numbers: [N].
        tokens: Token ids [B, S].
        dtype: Of the mask.
    """
    one = np.array([1], dtype=np.int64)
    batch, seq = op.Shape(tokens, start=0, end=1), op.Shape(tokens, start=1, end=2)
    by_head = numbers.astype(dtype.numpy())[None, :, None, None]
    return op.Expand(op.constant(by_head), op.Concat(batch, one, seq, one, axis=0))


def find(node: ir.Node) -> Sink | None:
    """The sink of a canonical `Attention`; None if it has none."""
    key, value = _unpadded(node.inputs[1]), _unpadded(node.inputs[2])
    whole = node.inputs[3] if len(node.inputs) > 3 else None
    join = None if whole is None else whole.producer()
    if key is None or value is None or join is None or join.op_type != "Concat":
        return None
    if len(join.inputs) != 2 or attribute(join, "axis") not in (-1, 3):
        return None
    by_head, last = join.inputs
    spread = None if by_head is None else by_head.producer()
    if last is None or shape_of(last)[3:] != (1,) or spread is None or spread.op_type != "Expand":
        return None
    mask = spread.inputs[0]
    return None if mask is None else Sink(key, value, mask, last)


def mask_of(node: ir.Node) -> ir.Value | None:
    """The mask of an `Attention` over real keys."""
    found = find(node)
    if found is not None:
        return found.mask
    return node.inputs[3] if len(node.inputs) > 3 else None


def new_of(node: ir.Node) -> tuple[ir.Value | None, ir.Value | None]:
    """The real new keys and values of an `Attention`."""
    found = find(node)
    return (node.inputs[1], node.inputs[2]) if found is None else (found.key, found.value)


def _unpadded(value: ir.Value | None) -> ir.Value | None:
    """What is before the extra row of zeros; None if there is none."""
    node = None if value is None else value.producer()
    if node is None or node.op_type != "Pad" or node.domain != "":
        return None
    given = [v for v in node.inputs[2:] if v is not None]
    pads = constant(node.inputs[1]) if len(node.inputs) > 1 else None
    zero = constant(given[0]) if given else np.zeros(1)
    if attribute(node, "mode", "constant") != "constant" or len(given) > 1 or zero is None:
        return None
    plain = pads is not None and pads.tolist() in (_ONE_ROW, ONE_ROW_BY_HEAD) and not zero.any()
    return node.inputs[0] if plain else None
