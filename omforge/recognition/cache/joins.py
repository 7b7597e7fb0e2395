"""Where a graph appends new keys or values to a cache, and which axis of the cache is which.

Exporters lay a cache out as [B, K, P, D], [P, B, K, D], [B, P, K, D], [B*K, D, P], as slices of one
tensor of all layers, and otherwise. What they share is a `Concat` of a part of a graph input and
something new, whose axis is the one that grows; which of the others are batch, heads and sizes
shows in how the whole reaches its product.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from omforge import ir
from omforge.ir.dims import Dim
from omforge.ir.values import attribute, dims
from omforge.recognition.views import Chain, is_same_movement, shape_of, trace

Array = npt.NDArray[Any]

FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.DOUBLE)


@dataclass(frozen=True)
class Join:
    """One `Concat` of a past and what is new.

    Attributes:
        node: The Concat.
        axis: The axis that grows, from 0.
        path: From the part of the input that is joined back to the input.
        new: What is appended.
    """

    node: ir.Node
    axis: int
    path: Chain
    new: ir.Value

    @property
    def cache(self) -> ir.Value:
        """The graph input."""
        return self.path.source

    @property
    def past(self) -> ir.Value:
        """The part of it that is joined."""
        return self.path.end

    @property
    def whole(self) -> ir.Value:
        """Past and new."""
        return self.node.outputs[0]


def find_joins(model: ir.Model) -> list[Join]:
    """All joins, in the order of the graph."""
    found: list[Join] = []
    for node in model.graph:
        if node.op_type != "Concat" or node.domain != "" or len(node.inputs) != 2:
            continue
        past, new = node.inputs
        if past is None or new is None or past.dtype not in FLOATS:
            continue
        path = trace(past, casts=True)
        given = path.source
        if not given.is_graph_input() or given.is_initializer():
            continue
        if trace(new, casts=True).source.is_graph_input():
            continue  # two inputs, and nothing that the step made
        axis: int = attribute(node, "axis", 0)
        rank = len(shape_of(past))
        if axis < 0 and not rank:
            continue
        found.append(Join(node, axis % rank if rank else axis, path, new))
    return found


@dataclass(frozen=True)
class Layout:
    """How the axes of one layer's keys or values are made of those of [B, K, P, D].

    Attributes:
        axes: For each axis what it is: letters of `BKPD`, joined where it is several, "" for an
            axis of 1.
        heads: K.
        size: D.
        is_key: Whether it is multiplied by queries; else by what the softmax gives.
    """

    axes: tuple[str, ...]
    heads: int
    size: int
    is_key: bool

    def to_canonical(self, array: Array) -> Array:
        """An array of this layout as [B, K, P, D]; ValueError where the sizes do not fit."""
        sizes = {"K": self.heads, "D": self.size, "B": 1}
        for letters, size in zip(self.axes, array.shape, strict=True):
            if letters == "BK":
                sizes["B"] = -1
            elif len(letters) == 1:
                sizes[letters] = size
        split = [sizes[letter] for letters in self.axes for letter in letters]
        moved = array.reshape(split).transpose(self.permutation)
        return moved if "B" in "".join(self.axes) else moved[None]

    @property
    def permutation(self) -> list[int]:
        """From the letters in their own order to those of `BKPD` that are there."""
        letters = "".join(self.axes)
        return [letters.index(letter) for letter in "BKPD" if letter in letters]


def layout_of(join: Join, batch: Dim) -> Layout | None:
    """The layout of a join's result; None where no product reads it in a way that tells.

    Args:
        join: The join; the model's dimensions are named.
        batch: B.
    """
    reading = reading_of(join, batch)
    return None if reading is None else reading.layout


@dataclass(frozen=True)
class Reading:
    """How a product reads what a join gives.

    Attributes:
        layout: Of the join's result.
        path: From the product's operand back to the join.
        node: The product.
        index: Of its input.
        swapped: Whether the operand has its last two axes swapped.
    """

    layout: Layout
    path: Chain
    node: ir.Node
    index: int
    swapped: bool


def reading_of(join: Join, batch: Dim) -> Reading | None:
    """The nearest product that reads a join, if movement tells how."""
    shape = dims(join.whole)
    if shape is None:
        return None
    for operand in _operands(join.whole):
        for layout, swapped, expected in _candidates(join, shape, operand, batch):
            if is_same_movement(operand.path, expected):
                return Reading(layout, operand.path, operand.node, operand.index, swapped)
    return None


@dataclass(frozen=True)
class _Operand:
    """What a product reads of a join: the chain from it, and which input it is."""

    path: Chain
    node: ir.Node
    index: int


def _operands(whole: ir.Value) -> Iterator[_Operand]:
    """The products that read a value through movement, nearest first."""
    pending, seen = [whole], {whole}
    while pending:
        value = pending.pop(0)
        for node, index in value.uses():
            if node.op_type in ("MatMul", "Attention") and node.domain == "":
                path = trace(value, scalars=True, casts=True)
                prefix = next((p for p in path.prefixes() if p.source is whole), None)
                if prefix is not None:
                    yield _Operand(prefix, node, index)
                continue
            for output in node.outputs:
                if output not in seen and trace(output, scalars=True, casts=True).links:
                    seen.add(output)
                    pending.append(output)


def _candidates(
    join: Join, shape: tuple[Dim, ...], operand: _Operand, batch: Dim
) -> Iterator[tuple[Layout, bool, Any]]:
    """Layouts that the sizes admit, whether keys are swapped, and what movement that would take."""
    read = shape_of(operand.path.end)
    attention = operand.node.op_type == "Attention"
    if len(read) not in (3, 4) or (attention and operand.index not in (1, 2)):
        return
    # Keys come to the right of queries with their last two axes swapped, or to their left.
    swaps = (False,) if attention or operand.index == 0 else (True, False)
    for axes in _spellings(len(shape), join.axis):
        for swapped in swaps:
            size = read[-2] if swapped else read[-1]
            if not isinstance(size, int):
                continue
            flat = attention and len(read) == 3
            heads = _heads(axes, shape, batch, size)
            if flat:
                heads = attribute(operand.node, "kv_num_heads", 0)
                size = size // heads if heads else 0
            if not heads or not _fits(axes, shape, heads, size, batch):
                continue
            is_key = operand.index == 1 if attention else swapped or operand.index == 0
            layout = Layout(axes, heads, size, is_key)
            yield layout, swapped, _movement(layout, read, swapped, flat, batch)


def _spellings(rank: int, grows: int) -> Iterator[tuple[str, ...]]:
    """Ways to write B, K, P and D in so many axes, P at the one that grows."""
    parts = {
        5: [("", "B", "K", "P", "D")],
        4: [("B", "K", "P", "D"), ("", "BK", "P", "D"), ("", "K", "P", "D")],
        3: [("BK", "P", "D"), ("B", "P", "KD"), ("K", "P", "D")],
        2: [("P", "KD")],
    }
    for letters in parts.get(rank, []):
        for axes in itertools.permutations(letters):
            if axes[grows] == "P":
                yield axes


def _heads(axes: tuple[str, ...], shape: tuple[Dim, ...], batch: Dim, size: int) -> int:
    """K, 0 where it is no number."""
    for letters, dim in zip(axes, shape, strict=True):
        if letters == "K" and isinstance(dim, int):
            return dim
        if letters == "KD" and isinstance(dim, int) and size and dim % size == 0:
            return dim // size
        if letters == "BK":
            heads = dim // batch
            return heads if isinstance(heads, int) and heads * batch == dim else 0
    return 0


def _fits(axes: tuple[str, ...], shape: tuple[Dim, ...], heads: int, size: int, batch: Dim) -> bool:
    wanted: Mapping[str, Dim] = {
        "B": batch,
        "K": heads,
        "D": size,
        "BK": batch * heads,
        "KD": heads * size,
        "": 1,
    }
    if not any("B" in letters for letters in axes) and batch != 1:
        return False
    pairs = zip(axes, shape, strict=True)
    return all(letters == "P" or wanted[letters] == dim for letters, dim in pairs)


def _movement(layout: Layout, read: tuple[Dim, ...], swapped: bool, flat: bool, batch: Dim) -> Any:
    def expected(array: Array, bindings: Mapping[str, int]) -> Array | None:
        whole = layout.to_canonical(array)
        if flat:
            return whole.transpose(0, 2, 1, 3).reshape(whole.shape[0], whole.shape[2], -1)
        have = read[1] if len(read) == 4 else read[0] // batch
        if not isinstance(have, int) or have % layout.heads:
            return None
        whole = np.repeat(whole, have // layout.heads, axis=1)
        whole = whole.swapaxes(-1, -2) if swapped else whole
        return whole if len(read) == 4 else whole.reshape(-1, *whole.shape[2:])

    return expected
