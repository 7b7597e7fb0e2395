"""Write the targets of reshapes and expansions as constants.

Before::

    target = Concat(Shape(x)[0], Shape(x)[1], -1, 64)
    y      = Reshape(Reshape(x, ...), target)

After::

    y = Reshape(x, [0, 0, -1, 64])

Inference knows a target as expressions. Where each of its dimensions is a number, a copy of the
input's at the same place, or the one that is left, `Reshape` can say so in constants, and the
arithmetic behind it is dead.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from omforge import ir
from omforge.ir.dims import Dim
from omforge.ir.edit import remove_dead
from omforge.ir.infer import infer_model
from omforge.ir.values import constant_tensor, dims, known
from omforge.rewriting.base import Pass
from omforge.rewriting.builder import Builder
from omforge.rewriting.splice import insert, splice

_RESHAPES = {"Reshape", "Unsqueeze", "Squeeze", "Flatten"}


@dataclass(frozen=True)
class FoldShapes(Pass):
    """Make the targets of Reshape and Expand constant, and merge chains of reshapes."""

    name: ClassVar[str] = "fold-shapes"

    def run(self, model: ir.Model) -> int:
        """Fold; the number of nodes that changed."""
        infer_model(model)
        op = Builder(model)
        count = 0
        left: list[ir.Node] = []
        shapes: list[ir.Node] = []
        for node in model.graph:
            if node.op_type == "Shape":
                shapes.append(node)
                continue
            fold = _FOLDS.get(node.op_type)
            if fold is None:
                continue
            if fold(op, node):
                count += 1
            elif constant_tensor(node.inputs[1]) is None:
                left.append(node)
        for value in op.constants.values():
            model.graph.register_initializer(value)
        count += sum(_from_tokens(model, node, self.name) for node in left)
        if count:
            remove_dead(model)
        # Whatever else reads a size (Tile, Slice, Range) reads it from the tokens too.
        return count + sum(_read_tokens(model, node, self.name) for node in shapes)


def _fold_reshape(op: Builder, node: ir.Node) -> bool:
    result = dims(node.outputs[0])
    source = node.inputs[0]
    if result is None or source is None:
        return False
    for start in (_first_of_chain(source), source):
        target = _target(dims(start), result)
        if target is None:
            continue
        if start is source and constant_tensor(node.inputs[1]) is not None:
            return False
        node.replace_input_with(0, start)
        node.replace_input_with(1, op.constant(np.array(target, dtype=np.int64)))
        node.attributes.pop("allowzero", None)
        return True
    return False


def _first_of_chain(value: ir.Value) -> ir.Value:
    """What stands before all reshapes that end in `value`: only the last of them matters."""
    node = value.producer()
    while node is not None and node.op_type in _RESHAPES and node.inputs[0] is not None:
        value = node.inputs[0]
        node = value.producer()
    return value


def _target(shape: Sequence[Dim] | None, result: Sequence[Dim]) -> list[int] | None:
    if shape is None or 0 in result or 0 in shape:
        return None
    target: list[int] = []
    for i, dim in enumerate(result):
        if isinstance(dim, int):
            target.append(dim)
        elif i < len(shape) and shape[i] == dim:
            target.append(0)
        else:
            target.append(-1)
    return target if target.count(-1) <= 1 else None


def _fold_expand(op: Builder, node: ir.Node) -> bool:
    source, result = node.inputs[0], dims(node.outputs[0])
    shape = dims(source) if source is not None else None
    if shape is None or result is None or constant_tensor(node.inputs[1]) is not None:
        return False
    padded = (1,) * (len(result) - len(shape)) + shape
    target: list[int] = []
    for have, want in zip(padded, result, strict=True):
        if have == want:
            target.append(1)
        elif isinstance(want, int):
            target.append(want)
        else:
            return False
    node.replace_input_with(1, op.constant(np.array(target, dtype=np.int64)))
    return True


_FOLDS = {"Reshape": _fold_reshape, "Expand": _fold_expand}


def _from_tokens(model: ir.Model, node: ir.Node, by: str) -> bool:
    """Compute a target from the shape of the tokens alone, whatever it was computed from.

    The cache and the padding mask leave the interface later; a target must not hold on to them.
    """
    target = known(node.inputs[1])
    tokens = _tokens(model)
    if target is None or tokens is None or _reads_only(node.inputs[1], tokens):
        return False
    sizes = dict(zip(dims(tokens) or (), range(2), strict=False))
    parts: list[ir.Value] = []
    with Builder(model) as op:
        for dim in target.ravel():
            if isinstance(dim, int):
                parts.append(op.constant(np.array([dim], dtype=np.int64)))
            elif dim in sizes:
                parts.append(op.Shape(tokens, start=sizes[dim], end=sizes[dim] + 1))
            else:
                return False
        whole = op.Concat(*parts, axis=0)
        insert(op, node, by=by)
    node.replace_input_with(1, whole)
    return True


def _read_tokens(model: ir.Model, node: ir.Node, by: str) -> bool:
    """Read a size that the tokens have from the tokens, not from the cache or the mask."""
    tokens = _tokens(model)
    read = known(node.outputs[0])
    if node.graph is None or tokens is None or read is None or read.size != 1:
        return False
    sizes = dims(tokens) or ()
    dim = read.item()
    if node.inputs[0] is tokens or dim not in sizes or isinstance(dim, int):
        return False
    place = sizes.index(dim)
    op = Builder(model)
    size = op.Shape(tokens, start=place, end=place + 1)
    splice(op, [node.outputs[0]], [size], by=by)
    return True


def _tokens(model: ir.Model) -> ir.Value | None:
    fed = ("input_ids", "inputs_embeds")
    return next((v for v in model.graph.inputs if v.name in fed), None)


def _reads_only(value: ir.Value | None, tokens: ir.Value) -> bool:
    """Whether the shape arithmetic behind `value` starts from `tokens` and constants."""
    pending, seen = [value], set[ir.Value]()
    while pending:
        current = pending.pop()
        if current is None or current in seen or constant_tensor(current) is not None:
            continue
        seen.add(current)
        node = current.producer()
        if node is None or node.op_type == "Shape":
            if (node.inputs[0] if node is not None else current) is not tokens:
                return False
            continue
        pending += node.inputs
    return True
