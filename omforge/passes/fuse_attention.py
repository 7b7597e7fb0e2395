"""Raise one attention block to `Attention`, found from its Softmax outwards.

Before (one of many spellings; `view` is any chain of Reshape, Transpose, Expand and the like)::

    scores = Add(MatMul(view(q) * s, view(Concat(past_k, view(k)))), mask)
    out    = MatMul(Softmax(scores), view(Concat(past_v, view(v))))

After::

    y, present_k, present_v = Attention<q_num_heads=N, kv_num_heads=K, scale=s>(
        q, k, v, mask, past_k, past_v)
    out = Transpose<perm=[0,2,1,3]>(Reshape(y, [B, S, N, D]))

with q [B, S, N*D], k and v [B, S, K*D]. The heads' split, the repeat of grouped keys and the
transposes are found by running them on an index tensor, the mask by running it on chosen paddings.
`Attention` scales, caps, masks and takes the softmax, in this order; another order is left alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from omforge import ir
from omforge.ir.dims import Dim, Expr
from omforge.ir.edit import remove_dead
from omforge.ir.infer import attribute, dims, infer_model
from omforge.passes import masks
from omforge.passes.builder import Builder
from omforge.passes.events import record
from omforge.passes.interface import Interface, activations, find_interface
from omforge.passes.masks import Applied
from omforge.passes.match import NoMatch
from omforge.passes.pipeline import Pass
from omforge.passes.splice import Names, insert, splice
from omforge.passes.views import Chain, Movement, is_same_movement, scalar, shape_of, trace

Array = npt.NDArray[Any]

_ORDER_KEEPING = ("Reshape", "Unsqueeze", "Squeeze", "Identity")
_HALVES = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)


@dataclass
class Scores:
    """What was met on the way up from a Softmax to the product of queries and keys."""

    product: ir.Node
    scale: float = 1.0
    softcap: float = 0.0
    applied: list[tuple[Applied, ir.Node]] = field(default_factory=list[tuple[Applied, ir.Node]])
    """Masks with the nodes that apply them, the one nearest to the softmax first."""
    precision: int | None = None
    path: list[ir.Node] = field(default_factory=list[ir.Node])
    """The nodes between, the one nearest to the softmax first."""


@dataclass
class Mixed:
    """What was met on the way down from a Softmax to the mixed values."""

    product: ir.Node
    output: ir.Value
    guards: list[ir.Value] = field(default_factory=list[ir.Value])
    """Booleans that zero a row of the output."""
    path: list[ir.Node] = field(default_factory=list[ir.Node])
    """The nodes between, the one nearest to the softmax first."""


@dataclass(frozen=True)
class Operand:
    """Keys or values: the new ones as [B, S, K*D], and the cache that they are appended to."""

    new: ir.Value
    heads: int
    size: int
    factor: float
    past: ir.Value | None = None
    present: ir.Value | None = None


@dataclass(frozen=True)
class FuseAttention(Pass):
    """Fuse attention blocks: multi-head and grouped, cached or not, scaled, softcapped, masked."""

    name: ClassVar[str] = "fuse-attention"

    def run(self, model: ir.Model) -> int:
        """Fuse; the number of blocks raised. A Softmax that stays is an event."""
        infer_model(model)
        softmaxes = [node for node in model.graph if node.op_type == "Softmax"]
        if not softmaxes:
            return 0
        try:
            interface = find_interface(model)
        except ir.InputError as error:  # any ONNX model may go through a pipeline
            record(model, self.name, "the whole graph", str(error))
            return 0
        names = Names(model)
        live = activations(model)
        made = _Masks(model, interface, names)
        count = 0
        for softmax in softmaxes:
            try:
                _fuse(model, softmax, live, made, names)
            except NoMatch as miss:
                record(model, self.name, softmax, str(miss))
            else:
                count += 1
        if count:
            remove_dead(model)
        return count


def _fuse(
    model: ir.Model, softmax: ir.Node, live: set[ir.Value], made: _Masks, names: Names
) -> None:
    scores = _scores(softmax, live)
    mixed = _mixed(softmax, live)
    _check_shapes(softmax, scores, mixed)
    q, k = _operands(scores.product)
    _, v = _operands(mixed.product)
    if q.dtype is None or not q.dtype == k.dtype == v.dtype:
        raise NoMatch(f"queries are {q.dtype}, keys {k.dtype} and values {v.dtype}", q)
    shape = dims(q)
    if shape is None or len(shape) != 4 or not isinstance(shape[1], int):
        raise NoMatch(f"the queries are {_text(shape)}, not [B, N, S, D]", q)
    heads, size = shape[1], _last(q)
    with Builder(model) as op:
        query, factor = _queries(op, q, heads, size)
        key = _operand(op, k, heads, size, transposed=True)
        value = _operand(op, v, heads, _last(v), transposed=False)
        if key.heads != value.heads or (key.past is None) != (value.past is None):
            key, value = _plain(op, k, transposed=True), _plain(op, v, transposed=False)
        if key.heads != value.heads:
            raise NoMatch(f"keys have {key.heads} heads and values {value.heads}", k, v)
        scale = scores.scale * factor * key.factor
        if scale <= 0:
            raise NoMatch(f"its scale is {scale:g}, and `Attention` takes a positive one", softmax)
        mask = made.get(op, softmax, scores, mixed, query, key, q.dtype)
        pasts = [key.past, value.past] if key.past is not None else []
        inputs = [query, key.new, value.new, *([mask] if mask is not None or pasts else []), *pasts]
        options: dict[str, Any] = {
            "q_num_heads": heads,
            "kv_num_heads": key.heads,
            "scale": scale,
            "softcap": scores.softcap or None,
            "softmax_precision": scores.precision,
        }
        block = op.node("Attention", inputs, options, outputs=1 + len(pasts))
        split = op.Reshape(block.outputs[0], [0, 0, heads, value.size])
        output = op.Transpose(split, perm=[0, 2, 1, 3])
        by = FuseAttention.name
        splice(op, [mixed.output], [output], by=by, matched=[softmax], names=names)
    for present, new in zip((key.present, value.present), block.outputs[1:], strict=False):
        if present is not None:
            _hand_over(model.graph, present, new, names)


def _operands(product: ir.Node) -> tuple[ir.Value, ir.Value]:
    left, right = product.inputs
    assert left is not None
    assert right is not None
    return left, right


def _last(value: ir.Value) -> int:
    shape = shape_of(value)
    if not shape or not isinstance(shape[-1], int):
        raise NoMatch(f"a head's size is not a number: {_text(dims(value))}", value)
    return shape[-1]


def _text(shape: tuple[Dim, ...] | None) -> str:
    return "of unknown rank" if shape is None else f"[{', '.join(map(str, shape))}]"


def _hand_over(graph: ir.Graph, old: ir.Value, new: ir.Value, names: Names) -> None:
    """Let `new` be the graph output that `old` is, its name included.

    Only the output moves: another reader of `old` (its Shape, in a mask; a layer that shares the
    cache) may come before the attention, and keeps what it has.
    """
    for index, output in enumerate(graph.outputs):
        if output is old:
            name = old.name
            old.name = names.unique(f"{name}_joined")
            new.name = name
            new.type, new.shape = old.type, old.shape
            graph.outputs[index] = new


def _check_shapes(softmax: ir.Node, scores: Scores, mixed: Mixed) -> None:
    """Reshapes on the way must end where they began, and no mask may widen the scores.

    Reshapes keep the order of elements, so masks and a second product on the shape of the first,
    and a softmax over the same last axis, are those of the first product.
    """
    shape = dims(scores.product.outputs[0])
    if shape is None:
        raise NoMatch("the scores have no known shape", softmax)
    masking = {node for _, node in scores.applied}
    now = shape
    for node in (*reversed(scores.path), softmax, *mixed.path):
        output = shape_of(node.outputs[0])
        if node in masking and now != shape:
            raise NoMatch(f"scores of {_text(shape)} are masked as {_text(now)}", node)
        if node.op_type in _ORDER_KEEPING:
            if shape_of(node.inputs[0])[-1:] != output[-1:]:
                raise NoMatch(f"scores of {_text(now)} become {_text(output)}", node)
            now = output
        elif not _agree(now, output):
            raise NoMatch(f"scores of {_text(now)} become {_text(output)}", node)
    if now != shape:
        raise NoMatch(f"scores of {_text(shape)} become {_text(now)}", mixed.product)


def _agree(shape: tuple[Dim, ...], other: tuple[Dim, ...]) -> bool:
    """Whether they can be equal: of two symbols that meet, inference keeps one."""
    return len(shape) == len(other) and all(
        a == b or (isinstance(a, Expr) and isinstance(b, Expr))
        for a, b in zip(shape, other, strict=True)
    )


# --- from the softmax up ----------------------------------------------------------------------


def _scores(softmax: ir.Node, live: set[ir.Value]) -> Scores:
    """Walk up: casts, the mask, softcap and scale, to the product."""
    value = softmax.inputs[0]
    assert value is not None
    shape = dims(value)
    axis = attribute(softmax, "axis", -1)
    if shape is None or axis not in (-1, len(shape) - 1):
        raise NoMatch(f"the softmax is over axis {axis} of {_text(shape)}", softmax)
    found = Scores(softmax)
    while True:
        node = value.producer()
        if node is None or node.domain != "":
            raise NoMatch(f"the scores come from {value.name}, not from a product", softmax)
        if node.op_type == "MatMul":
            found.product = node
            return found
        step = _UPWARD.get(node.op_type)
        if step is None:
            raise NoMatch(f"the scores come from {node.op_type}, not from a product", node)
        found.path.append(node)
        value = step(node, found, live)


def _up_first(node: ir.Node, found: Scores, live: set[ir.Value]) -> ir.Value:
    assert node.inputs[0] is not None
    return node.inputs[0]


def _up_cast(node: ir.Node, found: Scores, live: set[ir.Value]) -> ir.Value:
    source = _up_first(node, found, live)
    to = node.outputs[0].dtype
    if to == ir.DataType.FLOAT and source.dtype in _HALVES:
        found.precision = int(to)
    elif to != source.dtype:
        raise NoMatch(f"the scores are cast from {source.dtype} to {to}", node)
    return source


def _up_add(node: ir.Node, found: Scores, live: set[ir.Value]) -> ir.Value:
    moving = [v for v in node.inputs if v is not None and v in live]
    still = [v for v in node.inputs if v is not None and v not in live]
    if len(moving) != 1 or len(still) != 1:
        raise NoMatch("what is added to the scores depends on the tokens", node)
    _apply(found, Applied(still[0]), node)
    return moving[0]


def _up_where(node: ir.Node, found: Scores, live: set[ir.Value]) -> ir.Value:
    condition, shown, other = node.inputs
    if condition is None or condition in live:
        raise NoMatch("which scores are hidden depends on the tokens", node)
    for scores, fill, inverted in ((shown, other, False), (other, shown, True)):
        number = scalar(fill)
        if scores is not None and scores in live and number is not None:
            _apply(found, Applied(condition, number, inverted), node)
            return scores
    raise NoMatch("hidden scores are replaced by something other than one number", node)


def _apply(found: Scores, mask: Applied, node: ir.Node) -> None:
    if found.scale != 1.0 or found.softcap:
        raise NoMatch("the mask is applied before the scores are scaled or capped", node)
    found.applied.append((mask, node))


def _up_scale(node: ir.Node, found: Scores, live: set[ir.Value]) -> ir.Value:
    left, right = node.inputs
    number, source = scalar(right), left
    if number is None and node.op_type == "Mul":
        number, source = scalar(left), right
    if number is None or source is None:
        raise NoMatch(f"the scores go through {node.op_type} by what is not one number", node)
    if number <= 0:
        raise NoMatch(f"the scores go through {node.op_type} by {number:g}", node)
    capped = source.producer()
    if node.op_type == "Mul" and capped is not None and capped.op_type == "Tanh":
        return _up_softcap(capped, number, found)
    found.scale *= number if node.op_type == "Mul" else 1.0 / number
    return source


def _up_softcap(tanh: ir.Node, cap: float, found: Scores) -> ir.Value:
    """A softcap is `cap * tanh(x / cap)`: the x; a divisor that is not there scales x by cap."""
    inner = tanh.inputs[0]
    assert inner is not None
    links = trace(inner, scalars=True).links[:1]
    if found.scale != 1.0 or found.softcap:
        raise NoMatch("the scores are capped before they are scaled", tanh)
    found.softcap = cap
    found.path.append(tanh)
    if links and links[0].node.op_type in ("Mul", "Div") and abs(links[0].factor * cap - 1) < 1e-5:
        found.path.append(links[0].node)
        return links[0].before
    # The division may be part of the scale, before or behind the product.
    found.scale = cap
    return inner


_UPWARD: Mapping[str, Callable[[ir.Node, Scores, set[ir.Value]], ir.Value]] = {
    "Add": _up_add,
    "Where": _up_where,
    "Mul": _up_scale,
    "Div": _up_scale,
    "Cast": _up_cast,
    **dict.fromkeys(_ORDER_KEEPING, _up_first),
}


# --- from the softmax down --------------------------------------------------------------------


def _mixed(softmax: ir.Node, live: set[ir.Value]) -> Mixed:
    """Walk down: casts, a guard against NaN, to the product with the values, a guard on rows."""
    value = softmax.outputs[0]
    path: list[ir.Node] = []
    while True:
        guard = _nan_guard(value)
        node = guard or _only_consumer(value)
        if node.op_type == "MatMul" and node.inputs[0] is value:
            found = Mixed(node, node.outputs[0], path=path)
            _row_guard(found, live)
            return found
        if node.op_type == "Cast" and node.outputs[0].dtype not in (*_HALVES, ir.DataType.FLOAT):
            raise NoMatch(f"the probabilities are cast to {node.outputs[0].dtype}", node)
        if guard is None and node.op_type not in ("Cast", *_ORDER_KEEPING):
            raise NoMatch(f"the probabilities go into {node.op_type}", node)
        path.append(node)
        value = node.outputs[0]


def _only_consumer(value: ir.Value) -> ir.Node:
    nodes = value.consumers()
    if value.is_graph_output():
        raise NoMatch(f"the probabilities {value.name} are an output of the graph", value)
    if len(nodes) != 1:
        others = ", ".join(sorted(node.op_type for node in nodes)) or "nothing"
        raise NoMatch(f"the probabilities are used by {others}", value)
    return nodes[0]


def _nan_guard(value: ir.Value) -> ir.Node | None:
    """Where(IsNaN(p), 0, p), which gives an empty row zeros."""
    nodes = {node.op_type: node for node in value.consumers()}
    if set(nodes) != {"IsNaN", "Where"} or len(value.consumers()) != 2:
        return None
    test, where = nodes["IsNaN"].outputs[0], nodes["Where"]
    if where.inputs[0] is test and scalar(where.inputs[1]) == 0.0 and where.inputs[2] is value:
        return where
    return None


def _row_guard(found: Mixed, live: set[ir.Value]) -> None:
    """Where(guard, 0, out): rows that see nothing are zeroed behind the product."""
    nodes = found.output.consumers()
    if len(nodes) != 1 or nodes[0].op_type != "Where" or found.output.is_graph_output():
        return
    condition, shown, other = nodes[0].inputs
    if condition is None or condition in live or other is not found.output:
        return
    if scalar(shown) == 0.0 and dims(nodes[0].outputs[0]) == dims(found.output):
        found.guards.append(condition)
        found.output = nodes[0].outputs[0]


# --- queries, keys and values -----------------------------------------------------------------


def _queries(op: Builder, q: ir.Value, heads: int, size: int) -> tuple[ir.Value, float]:
    """Queries as [B, S, N*D], and the factor that was on the way."""
    for prefix in trace(q, scalars=True).prefixes():
        if _is_flat(prefix.source) and is_same_movement(prefix, _split(heads, size, False)):
            return prefix.source, prefix.factor
    return _flatten(op, q), 1.0


def _operand(op: Builder, value: ir.Value, heads: int, size: int, *, transposed: bool) -> Operand:
    """Keys (transposed for the product) or values, with their cache."""
    shape = shape_of(value)
    have = shape[1] if len(shape) == 4 else None
    if have not in (heads, 1) or not isinstance(have, int):
        role = "keys" if transposed else "values"
        raise NoMatch(f"the {role} are {_text(shape)}, for {heads} heads of queries", value)
    for prefix in trace(value, scalars=transposed).prefixes():  # values are not scaled
        source = shape_of(prefix.source)
        if len(source) == 3 and isinstance(source[2], int) and source[2] % size == 0:
            groups = source[2] // size
            if _divides(groups, have) and is_same_movement(
                prefix, _split(groups, size, transposed, have // groups)
            ):
                return Operand(prefix.source, groups, size, prefix.factor)
        if len(source) == 4 and isinstance(source[1], int) and _divides(source[1], have):
            groups = source[1]
            if is_same_movement(prefix, _repeat(have // groups, transposed)):
                whole = _cached(op, prefix, groups, size)
                return whole or Operand(_flatten(op, prefix.source), groups, size, prefix.factor)
    return _plain(op, value, transposed=transposed)


def _plain(op: Builder, value: ir.Value, *, transposed: bool) -> Operand:
    """Keys or values as the product wants them, whatever they are made by."""
    _, heads, rows, columns = shape_of(value)
    size = rows if transposed else columns
    if not isinstance(heads, int) or not isinstance(size, int):
        raise NoMatch(f"heads and their size are no numbers: {_text(dims(value))}", value)
    whole = op.Transpose(value, perm=[0, 1, 3, 2]) if transposed else value
    return Operand(_flatten(op, whole), heads, size, 1.0)


def _divides(groups: int, heads: int) -> bool:
    return groups > 0 and heads % groups == 0


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


def _split(heads: int, size: int, transposed: bool, repeat: int = 1) -> Movement:
    """[B, S, N*D] -> [B, N, S, D], each head `repeat` times, keys' last two axes swapped."""

    def expected(array: Array, _: Mapping[str, int]) -> Array | None:
        if array.ndim != 3 or array.shape[2] != heads * size:
            return None
        split = array.reshape(*array.shape[:2], heads, size).transpose(0, 2, 1, 3)
        split = np.repeat(split, repeat, axis=1)
        return split.swapaxes(-1, -2) if transposed else split

    return expected


def _repeat(times: int, transposed: bool) -> Movement:
    """[B, K, T, D] -> [B, N, T, D], keys' last two axes swapped."""

    def expected(array: Array, _: Mapping[str, int]) -> Array | None:
        repeated = np.repeat(array, times, axis=1)
        return repeated.swapaxes(-1, -2) if transposed else repeated

    return expected


# --- masks ------------------------------------------------------------------------------------


class _Masks:
    """Canonical masks by the exported ones they come from: layers share them."""

    def __init__(self, model: ir.Model, interface: Interface, names: Names) -> None:
        self._model = model
        self._interface = interface
        self._names = names
        self._prober = masks.Prober(model, interface)
        self._kinds: dict[tuple[Any, ...], masks.Mask | NoMatch] = {}
        self._made: dict[tuple[masks.Mask, ir.DataType], ir.Value] = {}

    def get(
        self,
        op: Builder,
        root: ir.Node,
        scores: Scores,
        mixed: Mixed,
        query: ir.Value,
        key: Operand,
        dtype: ir.DataType,
    ) -> ir.Value | None:
        """The mask to attach: rebuilt where it is recognised, else as it stands."""
        applied = [mask for mask, _ in reversed(scores.applied)]
        if not applied:
            if mixed.guards:
                raise NoMatch("rows are zeroed though nothing is masked", mixed.guards[0])
            return None
        kind = self._kind(applied, mixed.guards)
        if isinstance(kind, NoMatch):
            if mixed.guards or len(applied) > 1 or applied[0].fill is not None:
                raise kind
            return self._as_it_stands(op, applied[0].value, kind, query, key, dtype)
        made = (kind, dtype)
        if made not in self._made:
            with Builder(self._model) as own:
                self._made[made] = masks.build(own, self._interface, kind, dtype)
                insert(own, root, by=FuseAttention.name, names=self._names)
        return self._made[made]

    def _kind(self, applied: list[Applied], guards: list[ir.Value]) -> masks.Mask | NoMatch:
        key = (*applied, *guards)
        if key not in self._kinds:
            try:
                self._kinds[key] = masks.recognise_applied(self._prober, applied, guards)
            except NoMatch as miss:
                self._kinds[key] = miss
        return self._kinds[key]

    def _as_it_stands(
        self,
        op: Builder,
        mask: ir.Value,
        miss: NoMatch,
        query: ir.Value,
        key: Operand,
        dtype: ir.DataType,
    ) -> ir.Value:
        if mask.dtype != dtype:
            raise NoMatch(f"a mask of {mask.dtype} is added to scores of {dtype}: {miss}", mask)
        record(self._model, FuseAttention.name, mask, f"its mask is kept as it stands: {miss}")
        # ONNX Runtime gives a row of nothing but the lowest number zeros, and not a mean of values.
        lowest = np.array(dtype.min, dtype=dtype.numpy())
        mask = op.Where(op.Equal(mask, op.constant(lowest)), op.constant(lowest / 2), mask)
        # ONNX Runtime broadcasts the batch and the heads of a mask, not its queries and keys.
        seq = op.Shape(query, start=1, end=2)
        total = op.Shape(key.new, start=1, end=2)
        if key.past is not None:
            total = op.Add(op.Shape(key.past, start=2, end=3), total)
        return op.Expand(mask, op.Concat(np.array([1, 1]), seq, total, axis=0))
