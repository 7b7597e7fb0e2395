"""What lies between the product of queries and keys, the softmax and the product with the values.

Exporters scale, cap, mask, cast and reshape the scores in many orders. The walk starts at a Softmax
and ends at the two products; `Attention` scales, caps, masks and takes the softmax, in this order,
so what was met in another order is left alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

from omforge import ir
from omforge.ir import dims as d
from omforge.ir.dims import Dim, Expr
from omforge.ir.values import attribute, dims, known_ints
from omforge.recognition.attention.masks import Applied
from omforge.recognition.views import scalar, shape_of, trace
from omforge.rewriting.match import NoMatch

_ORDER_KEEPING = ("Reshape", "Unsqueeze", "Squeeze", "Identity")
_HALVES = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
_ROUNDED = 2 * 2.0**-23
"""Of the product of two float32 numbers that are inverse to each other. The inverse of a rounded
number, rounded again, is off by at most 0.75 ulp, and both may be such; anything else is a scale.
"""

DYNAMIC = "what is added to the scores depends on the tokens"
"""Why an attention with a mask or bias made of tokens is left alone: a kind of its own too."""


@dataclass
class Scores:
    """What was met on the way up from a Softmax to the product of queries and keys."""

    product: ir.Node
    scale: float = 1.0
    softcap: float = 0.0
    applied: list[tuple[Applied, ir.Node]] = field(default_factory=list[tuple[Applied, ir.Node]])
    """Masks with the nodes that apply them, the one nearest to the softmax first."""
    floor: float | None = None
    """What scores are raised to, behind the next mask that is met."""
    precision: int | None = None
    sink: ir.Value | None = None
    """Joined to the scores [B, N, S, T] as one more key, [B, N, S, 1]."""
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


def text(shape: tuple[Dim, ...] | None) -> str:
    """A shape in words."""
    return "a tensor of unknown rank" if shape is None else f"[{', '.join(map(str, shape))}]"


def joined_heads(value: ir.Value, batch: Dim) -> int | None:
    """N of a value [B*N, ...]; None where its first axis is no multiple of the batch."""
    first = shape_of(value)[0]
    heads = d.evaluate(first, dict.fromkeys(d.symbols(first), 1))
    if isinstance(batch, int):
        heads //= batch
    return heads if heads and batch * heads == first else None


def check_shapes(softmax: ir.Node, scores: Scores, mixed: Mixed, batch: Dim) -> None:
    """Reshapes on the way may but join the heads to the batch, and no mask may widen the scores.

    Reshapes keep the order of elements, so masks and a second product on the shape of the first,
    and a softmax over the same last axis, are those of the first product.

    Args:
        softmax: Between the two.
        scores: What is above it.
        mixed: What is below it.
        batch: B.
    """
    product = scores.product.outputs[0]
    shape = dims(product)
    if shape is None:
        raise NoMatch("the scores have no known shape", softmax)
    allowed = [shape]
    if len(shape) == 4 and isinstance(shape[1], int):
        allowed.append((batch * shape[1], *shape[2:]))
    elif len(shape) == 3 and (heads := joined_heads(product, batch)) is not None:
        allowed.append((batch, heads, *shape[1:]))
    masking = {node for _, node in scores.applied}
    now = shape
    for node in (*reversed(scores.path), softmax, *mixed.path):
        output = shape_of(node.outputs[0])
        if node in masking and now not in allowed:
            raise NoMatch(f"scores of {text(shape)} are masked as {text(now)}", node)
        if node.op_type == "Concat" or _cuts_last(node):  # of a sink
            now = output
        elif node.op_type in _ORDER_KEEPING:
            if shape_of(node.inputs[0])[-1:] != output[-1:]:
                raise NoMatch(f"scores of {text(now)} become {text(output)}", node)
            now = output
        elif not _agree(now, output):
            raise NoMatch(f"scores of {text(now)} become {text(output)}", node)
    if now not in allowed:
        raise NoMatch(f"scores of {text(shape)} become {text(now)}", mixed.product)


def _agree(shape: tuple[Dim, ...], other: tuple[Dim, ...]) -> bool:
    """Whether they can be equal: of two symbols that meet, inference keeps one."""
    return len(shape) == len(other) and all(
        a == b or (isinstance(a, Expr) and isinstance(b, Expr))
        for a, b in zip(shape, other, strict=True)
    )


# --- from the softmax up ----------------------------------------------------------------------


def find_scores(softmax: ir.Node, live: set[ir.Value]) -> Scores:
    """Walk up: casts, the mask, softcap and scale, to the product."""
    value = softmax.inputs[0]
    assert value is not None
    shape = dims(value)
    axis = attribute(softmax, "axis", -1)
    if shape is None or axis not in (-1, len(shape) - 1):
        raise NoMatch(f"the softmax is over axis {axis} of {text(shape)}", softmax)
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
        given = next((name for v in moving if (name := _given(v)) is not None), None)
        if given is not None:
            raise NoMatch(
                f"the input {given} is added to the scores: only a mask that the graph makes of an "
                "integer attention_mask [batch, length] is known for what it is",
                node,
            )
        raise NoMatch(DYNAMIC, node)
    _apply(found, Applied(still[0]), node)
    return moving[0]


def _given(value: ir.Value) -> str | None:
    """The name of the input that a value is, sliced or cast or not."""
    while (node := value.producer()) is not None:
        if node.op_type not in ("Cast", "Slice", *_ORDER_KEEPING) or node.inputs[0] is None:
            return None
        value = node.inputs[0]
    return value.name if value.is_graph_input() else None


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
    if found.softcap:
        raise NoMatch("the mask is applied before the scores are capped", node)
    mask = replace(mask, factor=found.scale, floor=found.floor)
    found.floor = None
    found.applied.append((mask, node))


def _up_max(node: ir.Node, found: Scores, live: set[ir.Value]) -> ir.Value:
    """A floor that no score is below but minus infinity."""
    for scores, floor in (node.inputs, reversed(node.inputs)) if len(node.inputs) == 2 else ():
        number, dtype = scalar(floor), node.outputs[0].dtype
        if scores is None or number is None or dtype is None:
            continue
        if number > float(dtype.min) or found.softcap:
            raise NoMatch(f"scores below {number:g} are cut off", node)
        found.floor = number if found.floor is None else max(found.floor, number)
        return scores
    raise NoMatch("the scores are compared with what is not one number", node)


def _up_sub(node: ir.Node, found: Scores, live: set[ir.Value]) -> ir.Value:
    """Their largest taken off all of a query's scores, which a softmax does itself."""
    scores, most = node.inputs
    most = most.producer() if most is not None else None
    if scores is None or most is None or most.op_type != "ReduceMax":
        raise NoMatch("what is taken off the scores is not their largest", node)
    rank = len(shape_of(scores))
    axes = known_ints(most.inputs[1]) if len(most.inputs) > 1 else attribute(most, "axes")
    kept = attribute(most, "keepdims", 1)
    if most.inputs[0] is not scores or not kept or list(axes or ()) not in ([-1], [rank - 1]):
        raise NoMatch("what is taken off the scores is not their largest", node)
    if found.softcap:
        raise NoMatch("the scores are capped after their largest is taken off", node)
    return scores


def _up_scale(node: ir.Node, found: Scores, live: set[ir.Value]) -> ir.Value:
    left, right = node.inputs
    number, source = scalar(right), left
    if number is None and node.op_type == "Mul":
        number, source = scalar(left), right
    if number is None and node.op_type == "Mul":
        # Scores times 0 where they are hidden, and far below 0 by what is added afterwards.
        for scores, shown in ((left, right), (right, left)):
            if scores in live and shown is not None and shown not in live:
                _apply(found, Applied(shown, 0.0), node)
                return scores
    if number is None or source is None:
        raise NoMatch(f"the scores go through {node.op_type} by what is not one number", node)
    if number <= 0:
        raise NoMatch(f"the scores go through {node.op_type} by {number:g}", node)
    factor = number if node.op_type == "Mul" else 1.0 / number
    capped = source.producer()
    if capped is not None and capped.op_type == "Tanh":
        return _up_softcap(capped, factor, found)
    found.scale *= factor
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
    scaled = links and links[0].node.op_type in ("Mul", "Div")
    if scaled and abs(links[0].factor * cap - 1) < _ROUNDED:
        found.path.append(links[0].node)
        return links[0].before
    # The division may be part of the scale, before or behind the product.
    found.scale = cap
    return inner


def _up_concat(node: ir.Node, found: Scores, live: set[ir.Value]) -> ir.Value:
    """An attention sink: a score that belongs to no key."""
    *scores, extra = node.inputs
    last = attribute(node, "axis") in (-1, len(shape_of(node.outputs[0])) - 1)
    joined = len(scores) == 1 and scores[0] in live and extra is not None and extra not in live
    if not last or not joined or shape_of(extra)[-1:] != (1,):
        raise NoMatch("the scores come from Concat, not from a product", node)
    if found.sink is not None or found.applied or found.scale != 1.0 or found.softcap:
        raise NoMatch("an attention sink is scaled, capped or masked with the scores", node)
    found.sink = extra
    assert scores[0] is not None
    return scores[0]


_UPWARD: Mapping[str, Callable[[ir.Node, Scores, set[ir.Value]], ir.Value]] = {
    "Add": _up_add,
    "Where": _up_where,
    "Mul": _up_scale,
    "Div": _up_scale,
    "Cast": _up_cast,
    "Concat": _up_concat,
    "Max": _up_max,
    "Sub": _up_sub,
    **dict.fromkeys(_ORDER_KEEPING, _up_first),
}


# --- from the softmax down --------------------------------------------------------------------


def find_mixed(softmax: ir.Node, live: set[ir.Value], *, sink: bool = False) -> Mixed:
    """Walk down: casts, a guard against NaN, to the product with the values, a guard on rows.

    With an attention sink, its share is cut off on the way.
    """
    value = softmax.outputs[0]
    path: list[ir.Node] = []
    while True:
        guard = _nan_guard(value)
        node = guard or _only_consumer(value)
        if sink and _cuts_last(node):
            sink = False
            path.append(node)
            value = node.outputs[0]
            continue
        if node.op_type == "MatMul" and node.inputs[0] is value:
            if sink:
                raise NoMatch("the share of an attention sink meets a value", node)
            return replace(row_guard(node.outputs[0], live), path=path)
        if node.op_type == "Cast" and node.outputs[0].dtype not in (*_HALVES, ir.DataType.FLOAT):
            raise NoMatch(f"the probabilities are cast to {node.outputs[0].dtype}", node)
        if guard is None and node.op_type not in ("Cast", *_ORDER_KEEPING):
            raise NoMatch(f"the probabilities go into {node.op_type}", node)
        path.append(node)
        value = node.outputs[0]


def _cuts_last(node: ir.Node) -> bool:
    """Whether it leaves out the last element of the last axis, and moves nothing."""
    if node.op_type != "Slice" or len(node.inputs) < 4:
        return False
    starts, ends, axes, *steps = (None if v is None else known_ints(v) for v in node.inputs[1:])
    rank = len(shape_of(node.inputs[0]))
    return (starts, ends, [[1]]) == ([0], [-1], [step or [1] for step in steps] or [[1]]) and (
        axes in ([-1], [rank - 1])
    )


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


def row_guard(output: ir.Value, live: set[ir.Value] | None) -> Mixed:
    """Where(guard, 0, out): rows that see nothing are zeroed behind what mixes the values.

    Args:
        output: Of a product with the values, or of an `Attention`.
        live: What depends on tokens, which no guard does; None to ask of the form alone.
    """
    product = output.producer()
    assert product is not None
    found = Mixed(product, output)
    nodes = output.consumers()
    if len(nodes) != 1 or nodes[0].op_type != "Where" or output.is_graph_output():
        return found
    condition, shown, other = nodes[0].inputs
    if condition is None or (live is not None and condition in live) or other is not output:
        return found
    if scalar(shown) == 0.0 and dims(nodes[0].outputs[0]) == dims(output):
        found.guards.append(condition)
        found.output = nodes[0].outputs[0]
    return found
