"""Queries, keys and values of an attention, found by what moves the data.

The heads' split, the repeat of grouped keys, the transposes and the joining of heads and rows are
recognised by running them on an index tensor.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from omforge import ir
from omforge.ir.values import attribute, dims
from omforge.recognition.attention.scores import text
from omforge.recognition.views import Chain, Movement, is_same_movement, shape_of, trace
from omforge.rewriting.builder import Builder
from omforge.rewriting.match import NoMatch

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Operand:
    """Keys or values: the new ones as [B, S, K*D], and the cache that they are appended to.

    Attributes:
        new: [B, S, K*D].
        heads: K.
        size: D.
        factor: What they are scaled by behind it.
        past: [B, K, P, D].
        present: [B, K, P + S, D].
        strided: Whether query head n reads head n mod K, and not n // (N / K) as in `Attention`.
    """

    new: ir.Value
    heads: int
    size: int
    factor: float
    past: ir.Value | None = None
    present: ir.Value | None = None
    strided: bool = False


def operands(product: ir.Node) -> tuple[ir.Value, ir.Value]:
    """The two sides of a MatMul."""
    left, right = product.inputs
    assert left is not None
    assert right is not None
    return left, right


def last(value: ir.Value) -> int:
    """The last axis, which is a number.

    Raises:
        NoMatch: It is not.
    """
    shape = shape_of(value)
    if not shape or not isinstance(shape[-1], int):
        raise NoMatch(f"a head's size is not a number: {text(dims(value))}", value)
    return shape[-1]


def queries(
    op: Builder, q: ir.Value, heads: int, size: int, *, joined: bool
) -> tuple[ir.Value, float]:
    """Queries as [B, S, N*D], and the factor that was on the way.

    Args:
        op: Records what it takes to make them so.
        q: [B, N, S, D], or [B*N, S, D] where `joined`.
        heads: N.
        size: D.
        joined: Whether the heads are joined to the batch.
    """
    for prefix in trace(q, scalars=True).prefixes():
        if _is_flat(prefix.source) and is_same_movement(
            prefix, _split(heads, size, False, joined=joined)
        ):
            return prefix.source, prefix.factor
    return _flatten(op, _by_head(op, q, heads, joined=joined)), 1.0


def operand(
    op: Builder,
    value: ir.Value,
    heads: int,
    size: int,
    *,
    keys: bool,
    turned: bool,
    grouped: bool = False,
) -> Operand:
    """Keys or values, with their cache.

    Args:
        op: Records what it takes to make them so.
        value: [B, N or 1, T, D], or [B*N, T, D].
        heads: N.
        size: D.
        keys: Whether they are keys, which may be scaled.
        turned: Whether the last two axes are swapped, as a product takes keys.
        grouped: Whether any divisor of N will do for their heads.
    """
    shape = shape_of(value)
    joined = len(shape) == 3
    have = heads if joined else shape[1] if len(shape) == 4 else None
    fits = isinstance(have, int) and have and (have in (heads, 1) or grouped)
    if not fits or not isinstance(have, int) or heads % have:
        role = "keys" if keys else "values"
        raise NoMatch(f"the {role} are {text(shape)}, for {heads} heads of queries", value)
    for prefix in trace(value, scalars=keys).prefixes():
        source = shape_of(prefix.source)
        if len(source) == 3 and isinstance(source[2], int) and source[2] % size == 0:
            groups = source[2] // size
            for repeat in _orders(groups, have):
                if is_same_movement(prefix, _split(groups, size, turned, repeat, joined=joined)):
                    return Operand(
                        prefix.source, groups, size, prefix.factor, strided=repeat.strided
                    )
        if len(source) == 4 and isinstance(source[1], int):
            groups = source[1]
            for repeat in _orders(groups, have):
                if is_same_movement(prefix, _repeat(repeat, turned, joined=joined)):
                    found = _cached(op, prefix, groups, size)
                    found = found or Operand(
                        _flatten(op, prefix.source), groups, size, prefix.factor
                    )
                    return replace(found, strided=repeat.strided)
    return plain(op, value, heads, turned=turned)


def plain(op: Builder, value: ir.Value, heads: int, *, turned: bool) -> Operand:
    """Keys or values as the product wants them, whatever they are made by."""
    *first, rows, columns = shape_of(value)
    joined = len(first) == 1
    have = heads if joined else first[1]
    size = rows if turned else columns
    if not isinstance(have, int) or not isinstance(size, int):
        raise NoMatch(f"heads and their size are no numbers: {text(dims(value))}", value)
    whole = _by_head(op, value, heads, joined=joined)
    whole = op.Transpose(whole, perm=[0, 1, 3, 2]) if turned else whole
    return Operand(_flatten(op, whole), have, size, 1.0)


def _by_head(op: Builder, value: ir.Value, heads: int, *, joined: bool) -> ir.Value:
    """[B*N, S, D] as [B, N, S, D]."""
    if not joined:
        return value
    target = op.Concat(np.array([-1, heads], dtype=np.int64), op.Shape(value, start=1), axis=0)
    return op.Reshape(value, target)


@dataclass(frozen=True)
class _Repeat:
    """Each head `times` times: one by one, or `strided`, all of them over and over."""

    times: int = 1
    strided: bool = False

    def __call__(self, array: Array) -> Array:
        if self.strided:
            return np.concatenate([array] * self.times, axis=1)
        return np.repeat(array, self.times, axis=1)


_ONCE = _Repeat()


def _orders(groups: int, heads: int) -> tuple[_Repeat, ...]:
    """The ways in which K heads can be repeated to N."""
    if groups <= 0 or heads % groups:
        return ()
    times = heads // groups
    alike = times == 1 or groups == 1
    return (_Repeat(times),) if alike else (_Repeat(times), _Repeat(times, strided=True))


def reordered(op: Builder, value: ir.Value, rows: int, columns: int, size: int) -> ir.Value:
    """Heads that lie as a matrix [rows, columns] in [B, S, N*D], turned to [columns, rows]."""
    matrix = op.Reshape(value, [0, 0, rows, columns, size])
    return op.Reshape(op.Transpose(matrix, perm=[0, 1, 3, 2, 4]), [0, 0, -1])


def _cached(op: Builder, chain: Chain, groups: int, size: int) -> Operand | None:
    """[B, K, T, D] that is a cache with something new behind it; None if it is not."""
    whole = chain.source
    join = whole.producer()
    inputs = join.inputs if join is not None and join.op_type == "Concat" else ()
    past, new = inputs if len(inputs) == 2 else (None, None)
    if (
        join is None
        or past is None
        or new is None
        or not past.is_graph_input()
        or attribute(join, "axis") not in (2, -2)
        or shape_of(past)[1:2] != (groups,)
    ):
        return None
    for prefix in trace(new).prefixes():
        if _is_flat(prefix.source) and is_same_movement(prefix, _split(groups, size, False)):
            return Operand(prefix.source, groups, size, chain.factor, past, whole)
    return Operand(_flatten(op, new), groups, size, chain.factor, past, whole)


def _is_flat(value: ir.Value) -> bool:
    return len(shape_of(value)) == 3


def _flatten(op: Builder, value: ir.Value) -> ir.Value:
    """[B, N, S, D] as [B, S, N*D]."""
    return op.Reshape(op.Transpose(value, perm=[0, 2, 1, 3]), [0, 0, -1])


def _split(
    heads: int,
    size: int,
    transposed: bool,
    repeat: _Repeat = _ONCE,
    *,
    joined: bool = False,
) -> Movement:
    """[B, S, N*D] -> [B, N, S, D], heads repeated, keys' last two axes swapped."""

    def expected(array: Array, _: Mapping[str, int]) -> Array | None:
        if array.ndim != 3 or array.shape[2] != heads * size:
            return None
        split = array.reshape(*array.shape[:2], heads, size).transpose(0, 2, 1, 3)
        return _arranged(repeat(split), transposed, joined)

    return expected


def _repeat(repeat: _Repeat, transposed: bool, *, joined: bool) -> Movement:
    """[B, K, T, D] -> [B, N, T, D], keys' last two axes swapped."""

    def expected(array: Array, _: Mapping[str, int]) -> Array | None:
        return _arranged(repeat(array), transposed, joined)

    return expected


def _arranged(array: Array, transposed: bool, joined: bool) -> Array:
    array = array.swapaxes(-1, -2) if transposed else array
    return array.reshape(-1, *array.shape[2:]) if joined else array
