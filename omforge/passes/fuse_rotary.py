"""Raise a rotary embedding to one `RotaryEmbedding`.

Before (heads split, half style; the tables are any function of position_ids)::

    x4  = Transpose<perm=[0,2,1,3]>(Reshape(x, [B, S, N, D]))
    rot = Concat<axis=-1>(Neg(x4[..., D/2:]), x4[..., :D/2])
    y4  = Add(Mul(x4, cos), Mul(rot, sin))

After::

    y  = RotaryEmbedding<num_heads=N>(x, cos_half, sin_half)
    y4 = Transpose<perm=[0,2,1,3]>(Reshape(y, [B, S, N, D]))

The rotation `rot` is found by running it on an index tensor, so its spelling does not matter; the
tables are rebuilt from their frequencies where they are `cos(position * inv_freq)`, and cut in half
where they are something else that has each number twice.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from omforge import ir
from omforge.ir.dims import Dim
from omforge.ir.edit import remove_dead
from omforge.ir.evaluate import Cutout, EvaluationError, sizes
from omforge.ir.infer import dims, infer_model
from omforge.passes import positions
from omforge.passes.builder import Builder
from omforge.passes.events import record
from omforge.passes.interface import Interface, activations, find_interface
from omforge.passes.masks import Probe, Prober
from omforge.passes.match import NoMatch
from omforge.passes.pipeline import Pass
from omforge.passes.splice import Names, insert, splice
from omforge.passes.views import Movement, bindings_for, is_same_movement, shape_of, trace

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Rotary:
    """One rotary embedding in the graph.

    Attributes:
        output: What is replaced: [B, N, S, D] or [B, S, N, D].
        x: What is rotated, of the same shape, unrotated elements included.
        rotated: What meets the cosine: x itself, or its first `width` elements.
        turned: What meets the sine.
        cos: Table that broadcasts against `rotated`.
        sin: The same.
    """

    output: ir.Value
    x: ir.Value
    rotated: ir.Value
    turned: ir.Value
    cos: ir.Value
    sin: ir.Value


@dataclass(frozen=True)
class FuseRotary(Pass):
    """Fuse rotary embeddings, full or partial, half style or interleaved."""

    name: ClassVar[str] = "fuse-rotary"

    def run(self, model: ir.Model) -> int:
        """Fuse; the number of embeddings raised. What looks like one and is not is an event."""
        infer_model(model)
        roots = [node for node in model.graph if node.op_type == "Add"]
        if not roots:
            return 0
        try:
            interface = find_interface(model)
        except ir.InputError as error:  # any ONNX model may go through a pipeline
            record(model, self.name, "the whole graph", str(error))
            return 0
        live = activations(model)
        names = Names(model)
        tables = _Tables(model, interface, names)
        count = 0
        for node in roots:
            if node.graph is None:
                continue
            try:
                found = _candidate(node, live)
                if found is None:
                    continue
                self._fuse(model, node, found, tables, names)
            except NoMatch as miss:
                record(model, self.name, node, str(miss))
                continue
            count += 1
        if count:
            remove_dead(model)
        return count

    def _fuse(
        self, model: ir.Model, root: ir.Node, found: Rotary, tables: _Tables, names: Names
    ) -> None:
        interleaved = _style(found, model.opset_imports[""])
        heads, source, by_head = _source(found.x)
        width = _number(found.rotated)
        size = _number(found.x)
        cos, sin = tables.get(root, found, interleaved, by_head)
        with Builder(model) as op:
            if source is None:
                source = op.Transpose(found.x, perm=[0, 2, 1, 3]) if by_head else found.x
                flat = op.Reshape(source, [0, 0, -1])
            elif len(shape_of(source)) == 3:
                flat = source
            else:
                flat = op.Reshape(source, [0, 0, -1])
            y = op.RotaryEmbedding(
                flat,
                cos,
                sin,
                num_heads=heads,
                interleaved=1 if interleaved else None,
                rotary_embedding_dim=width if width != size else None,
            )
            split = op.Reshape(y, [0, 0, heads, size])
            new = op.Transpose(split, perm=[0, 2, 1, 3]) if by_head else split
            splice(op, [found.output], [new], by=self.name, names=names)


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
    for (rotated, cos), (turned, sin) in (terms, terms[::-1]):
        if _is_turned(turned, rotated):
            output, x = _whole(node.outputs[0], rotated)
            return Rotary(output, x, rotated, turned, cos, sin)
    return None


_TURNING = {
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
    pending = [turned]
    for _ in range(_MOST_STEPS):
        if not pending:
            break
        node = pending.pop().producer()
        if node is None or node.op_type not in _TURNING:
            continue
        given = node.inputs if node.op_type in ("Concat", "Mul") else node.inputs[:1]
        if any(value is rotated for value in given):
            return True
        pending += [value for value in given if value is not None]
    return False


def _whole(output: ir.Value, rotated: ir.Value) -> tuple[ir.Value, ir.Value]:
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
    width = _number(rotated)
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


def _number(value: ir.Value) -> int:
    """The size of a value's last axis."""
    shape = shape_of(value)
    if not shape or not isinstance(shape[-1], int):
        raise NoMatch("the head size is not a number", value)
    return shape[-1]


def _style(found: Rotary, opset: int) -> bool:
    """Whether pairs are neighbours (interleaved); half style is False.

    Raises:
        NoMatch: `turned` is no rotation of `rotated` by a quarter.
    """
    rotated = found.rotated
    styles = [False, True]
    try:
        part = Cutout([found.turned], [rotated], opset)
        for bindings in bindings_for([rotated, found.turned]):
            shape = sizes(rotated, bindings)
            if rotated.dtype is None or rotated.name is None or shape[-1] % 2:
                raise NoMatch(f"it rotates {shape[-1]} elements, or their dtype is not known")
            # Whole numbers below 2048 are exact in float32 and float16.
            x = (np.arange(np.prod(shape)) % 2039 + 1).reshape(shape)
            x = x.astype(rotated.dtype.numpy())
            (turned,) = part.run({rotated.name: x}, bindings)
            styles = [style for style in styles if np.array_equal(turned, _turn(x, style))]
    except EvaluationError as error:
        raise NoMatch(
            f"what meets the sine is not made of what meets the cosine: {error}", found.turned
        ) from error
    if not styles:
        raise NoMatch(
            "what meets the sine is neither (-x2, x1) nor (-x[1], x[0]) pair by pair", found.turned
        )
    return styles[0]


def _turn(x: Array, interleaved: bool) -> Array:
    first, second = positions.halves(x, interleaved)
    if interleaved:
        return np.stack([-second, first], axis=-1).reshape(x.shape)
    return np.concatenate([-second, first], axis=-1)


def _source(x: ir.Value) -> tuple[int, ir.Value | None, bool]:
    """Heads, the [B, S, ...] that x was split from, and whether x is [B, N, S, D] (by head).

    The source is None where the heads come from something else, such as a fused QKV product that
    keeps query, key and value of a head together.
    """
    shape = dims(x)
    if shape is None or len(shape) != 4:
        raise NoMatch(f"it is not [B, N, S, D] but {shape}", x)
    size = _number(x)
    layouts = [
        (by_head, heads)
        for by_head, heads in ((True, shape[1]), (False, shape[2]))
        if isinstance(heads, int)
    ]
    if not layouts:
        raise NoMatch("the number of heads is not known", x)
    for by_head, heads in layouts:
        rows = (shape[0], shape[2 if by_head else 1])
        for prefix in trace(x).prefixes():
            start = shape_of(prefix.source)
            if len(start) < 3 or start[:2] != rows:
                continue
            if is_same_movement(prefix, _split_heads(heads, size, by_head)):
                return heads, prefix.source, by_head
    by_head, heads = layouts[0]
    return heads, None, by_head


def _split_heads(heads: int, size: int, by_head: bool) -> Movement:
    def expected(array: Array, _: Mapping[str, int]) -> Array | None:
        if array.size != array.shape[0] * array.shape[1] * heads * size:
            return None
        split = array.reshape(array.shape[0], array.shape[1], heads, size)
        return split.transpose(0, 2, 1, 3) if by_head else split

    return expected


class _Tables:
    """Canonical tables by the exported ones they come from: layers share them."""

    def __init__(self, model: ir.Model, interface: Interface, names: Names) -> None:
        self._model = model
        self._interface = interface
        self._names = names
        self._prober = Prober(model, interface)
        self._made: dict[tuple[Any, ...], tuple[ir.Value, ir.Value]] = {}

    def get(
        self, root: ir.Node, found: Rotary, interleaved: bool, by_head: bool
    ) -> tuple[ir.Value, ir.Value]:
        """Both tables [B, S, R / 2], put ahead of the first sum that needs them."""
        _check_layout(found, by_head)
        dtype = found.rotated.dtype
        assert dtype is not None
        key = (found.cos, found.sin, interleaved, by_head, dtype)
        if key not in self._made:
            self._made[key] = self._make(root, found, interleaved, by_head, dtype)
        return self._made[key]

    def _make(
        self, root: ir.Node, found: Rotary, interleaved: bool, by_head: bool, dtype: ir.DataType
    ) -> tuple[ir.Value, ir.Value]:
        try:
            with Builder(self._model) as op:
                rotation = positions.recognise(self._prober, found.cos, found.sin)
                made = positions.build(op, self._interface, rotation, interleaved, dtype)
                insert(op, root, by=FuseRotary.name, names=self._names)
                return made
        except NoMatch as miss:
            reason = f"its table is kept as it stands: {miss}"
        for table in (found.cos, found.sin):
            self._check_pairs(table, interleaved)
        batch = shape_of(found.rotated)[0]
        with Builder(self._model) as op:
            cos = self._half(op, found.cos, batch, interleaved, by_head)
            sin = self._half(op, found.sin, batch, interleaved, by_head)
            insert(op, root, by=FuseRotary.name, names=self._names)
        record(self._model, FuseRotary.name, found.cos, reason)
        return cos, sin

    def _half(
        self, op: Builder, table: ir.Value, batch: Dim, interleaved: bool, by_head: bool
    ) -> ir.Value:
        """One of each pair of an exported table that broadcasts to the heads, as [B, S, R / 2]."""
        shape = shape_of(table)
        missing = 4 - len(shape)
        whole = op.Unsqueeze(table, list(range(missing))) if missing else table
        rows = op.Squeeze(whole, [1 if by_head else 2])
        width = _number(table)
        first, end, step = (0, width, 2) if interleaved else (0, width // 2, 1)
        half = op.Slice(rows, [first], [end], [-1], [step])
        if not missing and shape[0] == batch:
            return half
        count = op.Shape(self._interface.input_ids, start=0, end=1)
        return op.Expand(half, op.Concat(count, op.constant(np.array([1, 1])), axis=0))

    def _check_pairs(self, table: ir.Value, interleaved: bool) -> None:
        """Raise NoMatch unless the elements of each pair meet the same number."""
        try:
            part = self._prober.cut([table])
            for batch, seq, past in ((2, 5, 3), (2, 3, 9)):
                batch, seq, past = self._prober.sizes(batch, seq, past)
                probe = Probe(past, seq, np.ones((batch, past + seq), dtype=np.int64))
                (array,) = self._prober.run(part, probe)
                first, second = positions.halves(array, interleaved)
                if not np.array_equal(first, second):
                    raise NoMatch(
                        "the two elements of a rotated pair meet different numbers", table
                    )
        except EvaluationError as error:
            raise NoMatch(f"the rotary table cannot be run alone: {error}", table) from error


def _check_layout(found: Rotary, by_head: bool) -> None:
    """The tables run over B, S and the rotated width, wherever the heads are."""
    x = shape_of(found.rotated)
    for table in (found.cos, found.sin):
        shape = dims(table)
        if shape is None:
            raise NoMatch("a rotary table has no known shape", table)
        if table.dtype != found.rotated.dtype:
            raise NoMatch(f"a rotary table of {table.dtype} meets {found.rotated.dtype}", table)
        padded = (1,) * (4 - len(shape)) + shape
        heads, seq = (padded[1], padded[2]) if by_head else (padded[2], padded[1])
        length = x[2] if by_head else x[1]
        if (heads, seq, padded[3]) != (1, length, x[3]) or padded[0] not in (1, x[0]):
            raise NoMatch(
                f"a rotary table of shape {[str(n) for n in shape]} does not run over [B, S, R] "
                f"of {[str(n) for n in x]}",
                table,
            )
