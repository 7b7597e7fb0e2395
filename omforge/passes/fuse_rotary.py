"""Raise a rotary embedding to one `RotaryEmbedding`.

Before (heads split, half style; the tables are any function of position_ids)::

    x4  = Transpose<perm=[0,2,1,3]>(Reshape(x, [B, S, N, D]))
    rot = Concat<axis=-1>(Neg(x4[..., D/2:]), x4[..., :D/2])
    y4  = Add(Mul(x4, cos), Mul(rot, sin))

or, the two parts of each pair on their own::

    re, im = Sub(Mul(x1, cos), Mul(x2, sin)), Add(Mul(x2, cos), Mul(x1, sin))
    y4     = Concat<axis=-1>(re, im)

After::

    y  = RotaryEmbedding<num_heads=N>(x, cos_half, sin_half)
    y4 = Transpose<perm=[0,2,1,3]>(Reshape(y, [B, S, N, D]))

The rotation `rot` is found by running it on an index tensor, so its spelling does not matter; the
tables are rebuilt from their frequencies where they are `cos(position * inv_freq)`, and cut in half
where they are something else that has each number twice. A rotation the other way gets the negated
sine. Where pairs are neighbours before and halves after, the permutation stays in front.

Of a `RotaryEmbedding` that the exporter wrote, only the layout is changed (`rotary_operator.py`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from omforge import ir
from omforge.ir.edit import remove_dead
from omforge.ir.evaluate import Cutout, EvaluationError, sizes
from omforge.ir.infer import infer_model
from omforge.ir.values import attribute
from omforge.recognition.interface import activations, find_interface
from omforge.recognition.rotary import angles as positions
from omforge.recognition.rotary import operator as rotary_operator
from omforge.recognition.rotary import pairs as rotary_pairs
from omforge.recognition.rotary.pairs import Placed
from omforge.recognition.rotary.source import (
    Source,
    before_widening,
    find_layouts,
    find_source,
    find_whole,
    flat_heads,
    last_size,
    with_heads,
)
from omforge.recognition.rotary.tables import Tables, Wanted, check_layout
from omforge.recognition.views import bindings_for, shape_of
from omforge.rewriting.base import Pass
from omforge.rewriting.builder import Builder
from omforge.rewriting.events import record
from omforge.rewriting.match import NoMatch
from omforge.rewriting.splice import Names, splice

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Rotary:
    """One rotary embedding in the graph, as a sum of x and of x turned by a quarter.

    Attributes:
        output: What is replaced: [B, N, S, D] or [B, S, N, D].
        x: What is rotated, of the same shape, unrotated elements included.
        rotated: What meets the cosine: x itself, or its first `width` elements.
        turned: What meets the sine.
        cos: Table that broadcasts against `rotated`.
        sin: The same.
        minus: Whether the term with the sine is subtracted.
    """

    output: ir.Value
    x: ir.Value
    rotated: ir.Value
    turned: ir.Value
    cos: ir.Value
    sin: ir.Value
    minus: bool


@dataclass(frozen=True)
class FuseRotary(Pass):
    """Fuse rotary embeddings, full or partial, half style or interleaved, either way round."""

    name: ClassVar[str] = "fuse-rotary"

    def run(self, model: ir.Model) -> int:
        """Fuse; the number of embeddings raised. What looks like one and is not is an event."""
        infer_model(model)
        roots = [node for node in model.graph if node.op_type in ("Add", "Sub")]
        written = [node for node in model.graph if rotary_operator.is_own(node)]
        if not roots and not written:
            return 0
        try:
            interface = find_interface(model)
        except ir.InputError as error:  # any ONNX model may go through a pipeline
            record(model, self.name, "the whole graph", str(error))
            return 0
        live = activations(model)
        names = Names(model)
        tables = Tables(model, interface, names, self.name)
        count = 0
        told: set[ir.Node] = set()
        for node in written:
            try:
                rotary_operator.flatten(model, node, names, self.name)
            except NoMatch as miss:
                record(model, self.name, node, str(miss))
            else:
                count += 1
        for node in roots:
            if node.graph is None:
                continue
            try:
                pairs = rotary_pairs.find(node, live)
                found = _candidate(node, live) if pairs is None else None
                if pairs is not None:
                    _fuse_pairs(model, node, pairs, live, tables, names)
                elif found is not None:
                    _fuse(model, node, found, tables, names)
                else:
                    continue
            except NoMatch as miss:
                record(model, self.name, node, str(miss))
                told.add(node)
                continue
            count += 1
        for node in roots:
            if node.graph is not None and node not in told and _meets_waves(node, live):
                record(model, self.name, node, _HALF_A_ROTATION)
        if count:
            remove_dead(model)
        return count


_HALF_A_ROTATION = (
    "its products with a cosine and a sine are no rotation: neither of what they rotate is the "
    "other turned by a quarter, nor do p*cos - q*sin and q*cos + p*sin stand beside each other"
)


def _fuse(model: ir.Model, root: ir.Node, found: Rotary, tables: Tables, names: Names) -> None:
    interleaved, reverse = _style(found, model.opset_imports[""])
    source = find_source(found.x)
    width = last_size(found.rotated)
    size = last_size(found.x)
    wanted = Wanted(
        found.cos,
        found.sin,
        found.rotated,
        source.by_head,
        "interleaved" if interleaved else "half",
        reverse != found.minus,
    )
    cos, sin = tables.get(root, wanted)
    output, narrow = _cast_back(found, source)
    with Builder(model) as op:
        y = op.RotaryEmbedding(
            flat_heads(op, found.x, source),
            cos,
            sin,
            num_heads=source.heads,
            interleaved=1 if interleaved else None,
            rotary_embedding_dim=width if width != size else None,
        )
        y = y if narrow is None else op.Cast(y, to=int(narrow))
        new = with_heads(op, y, source, size)
        splice(op, [output], [new], by=FuseRotary.name, names=names)


def _fuse_pairs(
    model: ir.Model,
    root: ir.Node,
    pairs: rotary_pairs.Pairs,
    live: set[ir.Value],
    tables: Tables,
    names: Names,
) -> None:
    taken = rotary_pairs.origin(pairs)
    given = rotary_pairs.joined(pairs, live, model.opset_imports[""])
    wider = rotary_pairs.joined_with_more(pairs) if given is None else None
    style = (given.interleaved, given.swapped) if given else (False, False)
    if wider is not None:
        style = (False, wider[2])
    interleaved, swapped = style
    whole = taken if taken and (taken.interleaved, taken.swapped) == style else None
    if given is not None and given.interleaved and whole is None:
        given, interleaved, swapped = None, False, False
    size = shape_of(pairs.re)[3]
    if not isinstance(size, int):
        raise NoMatch("the head size is not a number", pairs.re)
    source, wanted = _pairfind_source(pairs, whole, swapped)
    cos, sin = tables.get(root, wanted)
    with Builder(model) as op:
        if whole is not None:
            x = flat_heads(op, whole.whole, source)
        else:
            parts = (pairs.q, pairs.p) if swapped else (pairs.p, pairs.q)
            if wanted.ends_in_unit:
                parts = tuple(op.Squeeze(part, [-1]) for part in parts)
            x = flat_heads(op, op.Concat(*parts, axis=-1), source)
        y = op.RotaryEmbedding(
            x, cos, sin, num_heads=source.heads, interleaved=1 if interleaved else None
        )
        new = with_heads(op, y, source, 2 * size)
        if given is not None:
            splice(op, [given.whole], [new], by=FuseRotary.name, names=names)
        elif wider is not None:
            node, place, _ = wider
            inputs = [*node.inputs[:place], new, *node.inputs[place + 2 :]]
            new = op.Concat(*inputs, axis=-1)
            splice(op, [node.outputs[0]], [new], by=FuseRotary.name, names=names)
        else:
            halves = op.Split(new, axis=-1, num_outputs=2, _outputs=2)
            if wanted.ends_in_unit:
                halves = tuple(op.Unsqueeze(half, [-1]) for half in halves)
            splice(op, [pairs.re, pairs.im], list(halves), by=FuseRotary.name, names=names)


def _pairfind_source(
    pairs: rotary_pairs.Pairs, whole: Placed | None, swapped: bool
) -> tuple[Source, Wanted]:
    """Where the heads come from, and the tables that belong to that."""
    shape = shape_of(pairs.re)
    sources = [find_source(whole.whole)] if whole is not None else find_layouts(shape, pairs.re)
    reasons: list[NoMatch] = []
    for source in sources:
        wanted = Wanted(pairs.cos, pairs.sin, pairs.re, source.by_head, "single", swapped)
        try:
            check_layout(wanted)
        except NoMatch as miss:
            reasons.append(miss)
        else:
            return source, wanted
    raise reasons[0]


def _candidate(node: ir.Node, live: set[ir.Value]) -> Rotary | None:
    """What `a * table + b * table` would be, whichever operand is which."""
    if len(shape_of(node.outputs[0])) != 4:
        return None
    terms: list[tuple[ir.Value, ir.Value]] = []
    for operand in node.inputs:
        product = None if operand is None else operand.producer()
        if product is None or product.op_type != "Mul":
            return None
        moving = [v for v in product.inputs if v is not None and v in live]
        still = [v for v in product.inputs if v is not None and v not in live]
        if len(moving) != 1 or len(still) != 1:
            return None
        terms.append((moving[0], still[0]))
    minus = node.op_type == "Sub"
    for (rotated, cos), (turned, sin) in (terms,) if minus else (terms, terms[::-1]):
        if _is_turned(turned, rotated):
            output, x = find_whole(node.outputs[0], rotated)
            return Rotary(output, x, rotated, turned, cos, sin, minus)
    return None


def _meets_waves(node: ir.Node, live: set[ir.Value]) -> bool:
    """Whether a sum is one of products with a cosine and a sine of something."""
    found: set[str] = set()
    for term in rotary_pairs.terms(node, live):
        pending, seen = [term.still], set[ir.Value]()
        while pending and len(seen) < _MOST_STEPS:
            value = pending.pop(0)
            maker = value.producer()
            if maker is None or value in seen:
                continue
            seen.add(value)
            if maker.op_type in ("Cos", "Sin"):
                found.add(maker.op_type)
            else:
                pending += [v for v in maker.inputs if v is not None]
    return bool(found) and len(shape_of(node.outputs[0])) in (4, 5)


_TURNING = {
    "Cast",
    "Concat",
    "Gather",
    "Mul",
    "Neg",
    "Reshape",
    "Slice",
    "Split",
    "Squeeze",
    "Transpose",
    "Unsqueeze",
}
_MOST_STEPS = 24


def _is_turned(turned: ir.Value, rotated: ir.Value) -> bool:
    """Whether `turned` is made of parts of `rotated`: a cheap look before anything is run."""
    wanted = {rotated, before_widening(rotated)}
    pending = [turned]
    for _ in range(_MOST_STEPS):
        if not pending:
            break
        node = pending.pop().producer()
        if node is None or node.op_type not in _TURNING:
            continue
        given = node.inputs if node.op_type in ("Concat", "Mul") else node.inputs[:1]
        if any(value in wanted for value in given):
            return True
        pending += [value for value in given if value is not None]
    return False


def _style(found: Rotary, opset: int) -> tuple[bool, bool]:
    """Whether pairs are neighbours (interleaved; half style is False), and turn the other way.

    Raises:
        NoMatch: `turned` is no rotation of `rotated` by a quarter.
    """
    rotated = found.rotated
    narrow = before_widening(rotated)
    styles = [(interleaved, other) for interleaved in (False, True) for other in (False, True)]
    try:
        part = Cutout([found.turned], [narrow], opset)
        _keeps_numbers(part, narrow)
        for bindings in bindings_for([rotated, found.turned]):
            shape = sizes(rotated, bindings)
            if narrow.dtype is None or narrow.name is None or shape[-1] % 2:
                raise NoMatch(f"it rotates {shape[-1]} elements, or their dtype is not known")
            # Whole numbers below 2048 are exact in float32 and float16.
            x = (np.arange(np.prod(shape)) % 2039 + 1).reshape(shape)
            x = x.astype(narrow.dtype.numpy())
            (turned,) = part.run({narrow.name: x}, bindings)
            styles = [style for style in styles if np.array_equal(turned, _turn(x, *style))]
    except EvaluationError as error:
        raise NoMatch(
            f"what meets the sine is not made of what meets the cosine: {error}", found.turned
        ) from error
    if not styles:
        raise NoMatch(
            "what meets the sine is neither (-x2, x1) nor (-x[1], x[0]) pair by pair, nor the same "
            "with the other sign",
            found.turned,
        )
    return styles[0]


def _keeps_numbers(part: Cutout, narrow: ir.Value) -> None:
    """Raise NoMatch if a part rounds what it moves."""
    for node in part.nodes:
        dtype = node.outputs[0].dtype
        if node.op_type == "Cast" and dtype not in (narrow.dtype, ir.DataType.FLOAT):
            raise NoMatch(f"what meets the sine is rounded to {dtype}", node)


def _turn(x: Array, interleaved: bool, other_way: bool) -> Array:
    first, second = positions.halves(x, interleaved)
    first, second = (-first, second) if other_way else (first, -second)
    if interleaved:
        return np.stack([second, first], axis=-1).reshape(x.shape)
    return np.concatenate([second, first], axis=-1)


def _cast_back(found: Rotary, source: Source) -> tuple[ir.Value, ir.DataType | None]:
    """What is replaced, and its dtype if the cast back to half precision goes with it.

    The heads' split then stays next to what takes it back.
    """
    uses = list(found.output.uses())
    cast = uses[0].node if len(uses) == 1 and not found.output.is_graph_output() else None
    if not source.widened or cast is None or cast.op_type != "Cast":
        return found.output, None
    return cast.outputs[0], ir.DataType(attribute(cast, "to"))
