"""Let every expert compute all tokens, where an export picks the tokens of each with NonZero.

Before, for the expert e (`rows` is any arithmetic that works row by row)::

    chosen = the router's choices [T, k] == e
    n      = NonZero(chosen)                       [2, as many as chose e]
    out    = ScatterElements(zeros, token(n), rows(x[token(n)], weight[token(n), slot(n)]))

After::

    n      = Concat(Range(T), ArgMax(chosen))      [2, T], each token and its choice of e, if any
    out    = rows(x[token(n)], weight[token(n), slot(n)]) * whether it chose e

A size that depends on the data exists in no graph that ATC compiles to fixed shapes. The price is
that of a dense layer: every expert's weights are read, and used for every token.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from omforge import ir
from omforge.ir import dims as d
from omforge.ir.dims import Dim, Expr
from omforge.ir.evaluate import Cutout, EvaluationError, sizes
from omforge.ir.infer import infer_model
from omforge.ir.values import attribute, constant, known
from omforge.recognition.interface import is_weight
from omforge.recognition.views import shape_of
from omforge.rewriting.base import Pass
from omforge.rewriting.builder import Builder
from omforge.rewriting.events import record
from omforge.rewriting.match import NoMatch
from omforge.rewriting.splice import Names, insert, splice

Array = npt.NDArray[Any]

_MOVES = {"Cast", "Expand", "Flatten", "Identity", "Reshape", "Split", "Squeeze", "Unsqueeze"}
_ELEMENTWISE = {
    *("Add", "Clip", "Div", "Erf", "Gelu", "Max", "Min", "Mul", "Neg", "Pow", "Relu"),
    *("Sigmoid", "Sub", "Swish", "Tanh", "Where"),
}


@dataclass(frozen=True)
class DenseExperts(Pass):
    """Replace the data-dependent choice of an expert's tokens by all tokens and weights of zero."""

    name: ClassVar[str] = "dense-experts"

    def run(self, model: ir.Model) -> int:
        """Rewrite; the number of NonZero gone. One that stays is an event."""
        nodes = [n for n in model.graph if n.op_type == "NonZero" and n.domain == ""]
        if not nodes:
            return 0
        infer_model(model)
        names = Names(model)
        count = 0
        for node in nodes:
            try:
                _rewrite(model, node, names)
            except NoMatch as miss:
                record(model, self.name, node, str(miss))
            else:
                count += 1
        if count:
            record(
                model,
                self.name,
                f"the tokens' choice of {count} experts",
                "every expert computes all tokens, since sizes cannot depend on the choice",
            )
            infer_model(model)
        return count


def _rewrite(model: ir.Model, node: ir.Node, names: Names) -> None:
    chosen = node.inputs[0]
    assert chosen is not None
    slots = _slots_axis(model, chosen)
    count = shape_of(node.outputs[0])[1:]
    if len(count) != 1 or not isinstance(count[0], Expr):
        raise NoMatch(f"it finds {count}, not a number that is known only later", node)
    tokens = shape_of(chosen)[1 - slots]
    scatters = _scatters(node, count[0], tokens)
    for scatter in scatters:
        _check_places(model, node, scatter, count[0], 1 - slots)
    by = DenseExperts.name
    with Builder(model) as op:
        numbers = op.Cast(chosen, to=int(ir.DataType.FLOAT))
        slot = op.Reshape(op.ArgMax(numbers, axis=slots, keepdims=0), [1, -1])
        length = op.Squeeze(op.Shape(chosen, start=1 - slots, end=2 - slots))
        zero, one = (op.constant(np.array(number, np.int64)) for number in (0, 1))
        token = op.Reshape(op.Range(zero, length, one), [1, -1])
        rows = [token, slot] if slots == 1 else [slot, token]
        all_tokens = op.Concat(*rows, axis=0)
        some = op.Reshape(op.ReduceMax(numbers, [slots], keepdims=0), [-1, 1])
        insert(op, node, by=by, names=names)
    node.outputs[0].replace_all_uses_with(all_tokens)
    for scatter in scatters:
        data, _, updates = scatter.inputs
        assert updates is not None
        with Builder(model) as op:
            share = some if updates.dtype == ir.DataType.FLOAT else op.CastLike(some, updates)
            rows = op.Mul(updates, share)
            if attribute(scatter, "reduction", "none") == "add":
                rows = op.Add(data, rows)
            splice(op, [scatter.outputs[0]], [rows], by=by, names=names)
    model.graph.remove(node, safe=True)


def _slots_axis(model: ir.Model, chosen: ir.Value) -> int:
    """Which axis of what NonZero reads is that of a token's k choices.

    Shown by running it: on choices that differ within each row, it must say where one expert is.
    """
    choices = _choices(chosen)
    shape = shape_of(choices)
    if len(shape) != 2 or not isinstance(shape[1], int):
        raise NoMatch(f"the router chooses {list(map(str, shape))}, not [T, k]", choices)
    axes = {0, 1}
    try:
        part = Cutout([chosen], [choices], model.opset_imports[""])
        depth = _experts(part)
        random = np.random.default_rng(0)
        experts: set[int] = set(range(depth))
        names = sorted(d.symbols(shape[0]))
        for base in (3, 5):
            bindings = {name: base + i for i, name in enumerate(names)}
            rows = sizes(choices, bindings)[0]
            drawn = np.stack([random.permutation(depth)[: shape[1]] for _ in range(rows)])
            assert choices.dtype is not None
            assert choices.name is not None
            (found,) = part.run({choices.name: drawn.astype(choices.dtype.numpy())}, bindings)
            found = found.astype(bool)
            fits = {
                (axis, expert)
                for axis in axes
                for expert in experts
                if np.array_equal(found, (drawn == expert) if axis == 1 else (drawn == expert).T)
            }
            axes, experts = {axis for axis, _ in fits}, {expert for _, expert in fits}
    except EvaluationError as error:
        raise NoMatch(f"the choice cannot be run alone: {error}", chosen) from error
    if len(axes) != 1 or len(experts) != 1:
        raise NoMatch("it does not say which of a token's choices are one expert", chosen)
    return axes.pop()


def _choices(chosen: ir.Value) -> ir.Value:
    """The TopK's indices that a value is made of."""
    pending, seen = [chosen], {chosen}
    while pending:
        value = pending.pop()
        node = value.producer()
        if node is None:
            continue
        if node.op_type == "TopK" and value is node.outputs[1]:
            rank = len(shape_of(value))
            if attribute(node, "axis", -1) not in (-1, rank - 1):
                raise NoMatch("the router chooses along another axis than the last", node)
            return value
        for given in node.inputs:
            if given is not None and given not in seen:
                seen.add(given)
                pending.append(given)
    raise NoMatch("no TopK chooses", chosen)


def _experts(part: Cutout) -> int:
    """How many experts there are to choose: the depth of the OneHot."""
    for node in part.nodes:
        depth = constant(node.inputs[1]) if node.op_type == "OneHot" else None
        if depth is not None:
            return int(depth.ravel()[0])
    raise NoMatch("no OneHot of known depth tells the experts apart", *part.outputs)


def _scatters(node: ir.Node, count: Dim, tokens: Dim) -> list[ir.Node]:
    """What puts the rows back; everything before must work row by row."""
    found: list[ir.Node] = []
    pending, seen = [node.outputs[0]], {node.outputs[0]}
    while pending:
        for user in pending.pop().consumers():
            if all(known(output) is not None for output in user.outputs):
                raise NoMatch("how many tokens chose the expert is used as a number", user)
            if user.op_type == "ScatterElements":
                if user not in found:
                    _check_scatter(user, count, tokens)
                    found.append(user)
                continue
            _check_row_wise(user, count)
            new = [output for output in user.outputs if output not in seen]
            seen.update(new)
            pending += new
    if not found:
        raise NoMatch("nothing puts the tokens back with ScatterElements", node)
    return found


def _check_scatter(node: ir.Node, count: Dim, tokens: Dim) -> None:
    data, indices, updates = node.inputs
    if attribute(node, "axis", 0) != 0 or shape_of(data)[:1] != (tokens,):
        raise NoMatch("the rows are not put back by token", node)
    if shape_of(indices)[:1] != (count,) or shape_of(updates)[:1] != (count,):
        raise NoMatch("what is put back is not one row for each chosen token", node)
    if len(shape_of(updates)) != 2:
        raise NoMatch(f"rows of rank {len(shape_of(updates))} are put back", node)
    maker = None if data is None else data.producer()
    fill = None if maker is None else maker.attributes.get("value")
    zeros = maker is not None and maker.op_type == "ConstantOfShape"
    zeros = zeros and (fill is None or not fill.as_tensor().numpy().any())
    if attribute(node, "reduction", "none") != "add" and not zeros:
        raise NoMatch("the rows replace what is no zero", node)


def _check_places(
    model: ir.Model, node: ir.Node, scatter: ir.Node, count: Expr, tokens_axis: int
) -> None:
    """Make sure that each row goes back to the token that it came from."""
    indices, found = scatter.inputs[1], node.outputs[0]
    assert indices is not None
    assert found.name is not None
    pairs = np.random.default_rng(0).integers(0, 1 << 20, (2, 5))
    try:
        part = Cutout([indices], [found], model.opset_imports[""])
        bindings = {name: pairs.shape[1] for name in d.symbols(count)}
        (places,) = part.run({found.name: pairs}, bindings)
    except EvaluationError as error:
        raise NoMatch(f"where rows are put cannot be run alone: {error}", scatter) from error
    if not np.array_equal(places, np.broadcast_to(pairs[tokens_axis][:, None], places.shape)):
        raise NoMatch("the rows are not put back by token", scatter)
    if places.shape[1:] != tuple(shape_of(scatter.inputs[2])[1:]):
        raise NoMatch("only a part of each row is put back", scatter)


def _check_row_wise(node: ir.Node, count: Dim) -> None:
    """Whether each row that a node makes depends on the same row of its inputs alone."""
    long = [count in shape_of(value) for value in node.inputs]
    outputs = [shape_of(output) for output in node.outputs]
    if any(shape.count(count) != 1 for shape in outputs):
        raise NoMatch(f"{node.op_type} does not keep one row for each chosen token", node)
    match node.op_type:
        case "Gather":
            axis: int = attribute(node, "axis", 0)
            fine = long == [False, True] or (
                long == [True, False] and shape_of(node.inputs[0]).index(count) != axis
            )
        case "MatMul":
            weight = node.inputs[1]
            fine = long[0] and weight is not None and is_weight(weight)
        case "Gemm":
            rest = [v for v in node.inputs[1:] if v is not None]
            fine = long[0] and not attribute(node, "transA", 0) and all(map(is_weight, rest))
        case "Transpose":
            fine = True
        case kind if kind in _MOVES:
            # Only axes of size 1 before it: then the order of elements keeps rows together.
            before = shape_of(node.inputs[0])
            fine = all(_leads(shape, count) for shape in outputs) and (
                _leads(before, count) or kind in ("Cast", "Identity", "Split")
            )
        case kind if kind in _ELEMENTWISE:
            places = {
                len(shape_of(v)) - shape_of(v).index(count)
                for v in node.inputs
                if v is not None and count in shape_of(v)
            }
            fine = len(places) == 1
        case _:
            fine = False
    if not fine:
        raise NoMatch(f"{node.op_type} may mix the tokens of an expert", node)


def _leads(shape: tuple[Dim, ...], count: Dim) -> bool:
    """Whether nothing but axes of size 1 is before the rows."""
    return count in shape and all(dim == 1 for dim in shape[: shape.index(count)])
