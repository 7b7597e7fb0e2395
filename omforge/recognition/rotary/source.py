"""How the heads of what is rotated were split, found by running the split on an index tensor."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy.typing as npt

from omforge import ir
from omforge.ir.dims import Dim
from omforge.ir.values import dims
from omforge.recognition.views import Movement, is_same_movement, shape_of, trace
from omforge.rewriting.builder import Builder
from omforge.rewriting.match import NoMatch

Array = npt.NDArray[Any]


def last_size(value: ir.Value) -> int:
    """The size of a value's last axis."""
    shape = shape_of(value)
    if not shape or not isinstance(shape[-1], int):
        raise NoMatch("the head size is not a number", value)
    return shape[-1]


def before_widening(value: ir.Value) -> ir.Value:
    """The half-precision value that this one is in float; itself if it is none."""
    node = value.producer()
    if node is None or node.op_type != "Cast" or value.dtype != ir.DataType.FLOAT:
        return value
    narrow = node.inputs[0]
    halves = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
    return narrow if narrow is not None and narrow.dtype in halves else value


def find_whole(output: ir.Value, rotated: ir.Value) -> tuple[ir.Value, ir.Value]:
    """Output and input of a partial rotation; as they are if it is none.

    It is one if the output is joined with what follows `rotated` in the same x.
    """
    uses = list(output.uses())
    join = uses[0].node if len(uses) == 1 and not output.is_graph_output() else None
    if join is None or join.op_type != "Concat" or len(join.inputs) != 2:
        return output, rotated
    first, rest = join.inputs
    if first is not output or rest is None:
        return output, rotated
    width = last_size(rotated)
    tails = {tail.source: tail for tail in trace(rest).prefixes()}
    for head in trace(rotated).prefixes():
        x = head.source
        tail = tails.get(x)
        if tail is None or dims(x) != dims(join.outputs[0]):
            continue
        if is_same_movement(head, lambda a, _: a[..., :width]) and is_same_movement(
            tail, lambda a, _: a[..., width:]
        ):
            return join.outputs[0], x
    return output, rotated


@dataclass(frozen=True)
class Source:
    """How the heads of what is rotated were split.

    Attributes:
        heads: N.
        flat: The [B, S, ...] that was split. None where the heads come from something else, such as
            a fused QKV product that keeps query, key and value of a head together.
        by_head: Whether heads come before tokens.
        widened: Whether the heads are in float and `flat` in half precision.
    """

    heads: int
    flat: ir.Value | None
    by_head: bool
    widened: bool = False


def find_source(x: ir.Value, *, by_head: bool | None = None) -> Source:
    """Heads, what they were split from, and how.

    Args:
        x: What is rotated.
        by_head: Whether heads come before tokens, where that is known.
    """
    narrow = before_widening(x)
    shape = shape_of(x)
    possible = [one for one in find_layouts(shape, x) if by_head in (None, one.by_head)]
    if not possible:
        raise NoMatch("the number of heads is not known", x)
    size = last_size(x)
    for layout in possible:
        rows = (shape[0], shape[2 if layout.by_head else 1])
        for prefix in trace(narrow).prefixes():
            start = shape_of(prefix.source)
            if len(start) < 3 or start[:2] != rows:
                continue
            if is_same_movement(prefix, _split_heads(layout.heads, size, layout.by_head)):
                return Source(layout.heads, prefix.source, layout.by_head, narrow is not x)
    return possible[0]


def find_layouts(shape: tuple[Dim, ...], x: ir.Value) -> list[Source]:
    """How heads and tokens can lie: the heads are a number."""
    if len(shape) not in (4, 5):
        raise NoMatch(f"it is not [B, N, S, D] but {[str(n) for n in shape]}", x)
    found = [
        Source(heads, None, by_head)
        for by_head, heads in ((True, shape[1]), (False, shape[2]))
        if isinstance(heads, int)
    ]
    if not found:
        raise NoMatch("the number of heads is not known", x)
    return found


def flat_heads(op: Builder, x: ir.Value, source: Source) -> ir.Value:
    """What is rotated, as [B, S, N * D]."""
    if source.flat is None:
        moved = op.Transpose(x, perm=[0, 2, 1, 3]) if source.by_head else x
        return op.Reshape(moved, [0, 0, -1])
    flat = source.flat
    flat = flat if len(shape_of(flat)) == 3 else op.Reshape(flat, [0, 0, -1])
    return op.Cast(flat, to=int(ir.DataType.FLOAT)) if source.widened else flat


def with_heads(op: Builder, y: ir.Value, source: Source, size: int) -> ir.Value:
    """[B, S, N * D] with its heads as they were."""
    heads = op.Reshape(y, [0, 0, source.heads, size])
    return op.Transpose(heads, perm=[0, 2, 1, 3]) if source.by_head else heads


def _split_heads(heads: int, size: int, by_head: bool) -> Movement:
    def expected(array: Array, _: Mapping[str, int]) -> Array | None:
        if array.size != array.shape[0] * array.shape[1] * heads * size:
            return None
        split = array.reshape(array.shape[0], array.shape[1], heads, size)
        return split.transpose(0, 2, 1, 3) if by_head else split

    return expected
