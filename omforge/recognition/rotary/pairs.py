"""Rotations written out as products of complex numbers, the parts of each pair on their own.

What is looked for, wherever p and q come from and whatever becomes of the results::

    re = Sub(Mul(p, cos), Mul(q, sin))
    im = Add(Mul(q, cos), Mul(p, sin))

Exporters join `re` and `im` as halves, or side by side (`stack` and `flatten`), and take p and q in
either way; some take them in one way and join in the other, which is a permutation on top.
"""

from __future__ import annotations

from collections.abc import Mapping, Set
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from omforge import ir
from omforge.ir.evaluate import Cutout, EvaluationError, sizes
from omforge.ir.values import attribute, dims
from omforge.recognition.rotary.angles import halves
from omforge.recognition.views import Movement, bindings_for, is_same_movement, shape_of, trace


@dataclass(frozen=True)
class Term:
    """A product of an activation and a table, and its sign."""

    moving: ir.Value
    still: ir.Value
    negative: bool


@dataclass(frozen=True)
class Pairs:
    """`(p + iq) * (cos + i sin)`: re and im are as p and q, [B, N, S, H] or [..., H, 1]."""

    re: ir.Value
    im: ir.Value
    p: ir.Value
    q: ir.Value
    cos: ir.Value
    sin: ir.Value


@dataclass(frozen=True)
class Placed:
    """Two values as the parts of the pairs of one.

    Attributes:
        whole: [..., 2 H].
        interleaved: Whether pairs are neighbours; half style is False.
        swapped: Whether the second of the two comes first.
    """

    whole: ir.Value
    interleaved: bool
    swapped: bool


def terms(node: ir.Node, live: Set[ir.Value]) -> tuple[Term, ...]:
    """The two terms of a sum or difference of products with tables; none where it is none."""
    found: list[Term] = []
    for index, operand in enumerate(node.inputs):
        term = _term(operand, live)
        if term is None:
            return ()
        flip = node.op_type == "Sub" and index == 1
        found.append(Term(term.moving, term.still, term.negative != flip))
    return tuple(found)


def _term(operand: ir.Value | None, live: Set[ir.Value]) -> Term | None:
    product, negative = _unsigned(operand)
    node = None if product is None else product.producer()
    if node is None or node.op_type != "Mul":
        return None
    moving = [v for v in node.inputs if v is not None and v in live]
    still = [v for v in node.inputs if v is not None and v not in live]
    if len(moving) != 1 or len(still) != 1:
        return None
    source, flip = _unsigned(moving[0])
    assert source is not None
    return Term(source, still[0], negative != flip)


def _unsigned(value: ir.Value | None) -> tuple[ir.Value | None, bool]:
    node = None if value is None else value.producer()
    if node is not None and node.op_type == "Neg":
        return node.inputs[0], True
    return value, False


def find(node: ir.Node, live: Set[ir.Value]) -> Pairs | None:
    """The pairs whose real part a node makes, None if it is no difference of products.

    The imaginary part is found as the sum that has the same tables the other way round.
    """
    positive, negative = _by_sign(terms(node, live))
    if positive is None or negative is None:
        return None
    p, cos, q, sin = positive.moving, positive.still, negative.moving, negative.still
    shape = dims(p)
    if shape is None or shape != dims(q) or shape != dims(node.outputs[0]):
        return None
    if len(shape) != 4 and (len(shape) != 5 or shape[-1] != 1):
        return None
    for user in dict.fromkeys(user for user, _ in q.uses() if user.op_type == "Mul"):
        for other in dict.fromkeys(n for n, _ in user.outputs[0].uses() if n.op_type == "Add"):
            wanted = {(q, cos, False), (p, sin, False)}
            if {(t.moving, t.still, t.negative) for t in terms(other, live)} == wanted:
                return Pairs(node.outputs[0], other.outputs[0], p, q, cos, sin)
    return None


def _by_sign(found: tuple[Term, ...]) -> tuple[Term | None, Term | None]:
    """The positive and the negative of two terms."""
    if len(found) != 2 or found[0].negative == found[1].negative:
        return None, None
    return (found[1], found[0]) if found[0].negative else (found[0], found[1])


def origin(pairs: Pairs) -> Placed | None:
    """The value that p and q are all of, if there is one."""
    size = shape_of(pairs.p)[3]
    heads = {head.source: head for head in trace(pairs.p).prefixes()}
    for tail in reversed(list(trace(pairs.q).prefixes())):
        head, shape = heads.get(tail.source), shape_of(tail.source)
        if head is None or len(shape) != 4 or shape[3] != 2 * size:
            continue
        for interleaved in (False, True):
            for swapped in (False, True):
                if is_same_movement(
                    head, _part(pairs.p, interleaved, int(swapped))
                ) and is_same_movement(tail, _part(pairs.q, interleaved, int(not swapped))):
                    return Placed(tail.source, interleaved, swapped)
    return None


def _part(part: ir.Value, interleaved: bool, index: int) -> Movement:
    def expected(
        array: npt.NDArray[np.int64], bindings: Mapping[str, int]
    ) -> npt.NDArray[np.int64]:
        return halves(array, interleaved)[index].reshape(sizes(part, bindings))

    return expected


_JOINING = {"Concat", "Identity", "Reshape", "Unsqueeze", "Squeeze"}
_MOST_STEPS = 8


def joined(pairs: Pairs, live: Set[ir.Value], opset: int) -> Placed | None:
    """The value that re and im are all of, if they become one and nothing else."""
    reached = [pairs.re, pairs.im]
    for value in reached:  # it grows
        if len(reached) > _MOST_STEPS:
            break
        for user in dict.fromkeys(user for user, _ in value.uses()):
            moved = [v for v in user.inputs if v is not None and v in live]
            new = user.outputs[0]
            if user.op_type in _JOINING and set(moved) <= set(reached) and new not in reached:
                reached.append(new)
    size = shape_of(pairs.re)[3]
    for whole in reached[2:]:
        shape = shape_of(whole)
        if len(shape) == 4 and shape[3] == 2 * size and not _leaks(pairs, whole):
            found = _placed(pairs, whole, opset)
            if found is not None:
                return found
    return None


def _leaks(pairs: Pairs, whole: ir.Value) -> bool:
    """Whether a value between the pairs and the whole is used elsewhere."""
    pending, inside = [pairs.re, pairs.im], set[ir.Value]()
    while pending:
        value = pending.pop()
        if value is whole or value in inside:
            continue
        inside.add(value)
        if value.is_graph_output():
            return True
        users = [user for user, _ in value.uses()]
        if any(user.op_type not in _JOINING for user in users):
            return True
        pending += [user.outputs[0] for user in users]
    return False


def _placed(pairs: Pairs, whole: ir.Value, opset: int) -> Placed | None:
    re, im = pairs.re, pairs.im
    possible = [(style, swapped) for style in (False, True) for swapped in (False, True)]
    if re.name is None or im.name is None or re.dtype is None:
        return None
    try:
        part = Cutout([whole], [re, im], opset)
        for bindings in bindings_for([re, whole]):
            shape = sizes(re, bindings)
            # Whole numbers up to 2048 are exact in float32 and float16.
            array = (np.arange(np.prod(shape)) % 1021 + 1).reshape(shape)
            feeds = {re.name: array.astype(re.dtype.numpy())}
            feeds[im.name] = (array + 1021).astype(re.dtype.numpy())
            (got,) = part.run(feeds, bindings)
            first, second = (feeds[v.name].reshape(shape[:4]) for v in (re, im) if v.name)
            possible = [
                (style, swapped)
                for style, swapped in possible
                if all(
                    np.array_equal(half, part_of)
                    for half, part_of in zip(
                        halves(got, style),
                        (second, first) if swapped else (first, second),
                        strict=True,
                    )
                )
            ]
    except EvaluationError:
        return None
    return Placed(whole, *possible[0]) if possible else None


def joined_with_more(pairs: Pairs) -> tuple[ir.Node, int, bool] | None:
    """A Concat along the last axis in which re and im are neighbours, among others.

    Returns:
        The node, the place of the first of the two, and whether that is im.
    """
    shape = shape_of(pairs.re)
    uses = [list(value.uses()) for value in (pairs.re, pairs.im)]
    if len(shape) != 4 or any(len(use) != 1 for use in uses):
        return None
    if pairs.re.is_graph_output() or pairs.im.is_graph_output():
        return None
    (node, first), (other, second) = uses[0][0], uses[1][0]
    if node is not other or node.op_type != "Concat" or abs(first - second) != 1:
        return None
    if attribute(node, "axis") not in (-1, len(shape) - 1):
        return None
    return node, min(first, second), second < first
