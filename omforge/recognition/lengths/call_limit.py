"""How many new tokens an export with recurrent states takes at once and is still right.

A layer that works through its tokens in chunks is exported with as many chunks as its sample had:
given more, it leaves tokens out, without a word. So what renews the states is cut out, from one
product with weights to the next, and run on numbers: all tokens at once must give what they give
in pieces. That needs none of the weights.

Letters: B batch, S new tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from omforge import ir
from omforge.ir.evaluate import Cutout, EvaluationError, sizes
from omforge.ir.values import constant_tensor, known
from omforge.recognition.attention.masks import Prober
from omforge.recognition.interface import Interface, find_interface, states
from omforge.recognition.lengths.bounds import Bound
from omforge.recognition.lengths.texts import longest_text

Array = npt.NDArray[Any]

_PRODUCTS = ("MatMul", "Gemm")

_CLOSE = 1e-2
"""Of the largest number: chunks and pieces round in other places, and a lost token is far off."""


def find_call_limit(model: ir.Model, longest: int) -> Bound | None:
    """The most new tokens that all recurrent layers take at once; None if `longest` are right.

    Args:
        model: An export whose dimensions `name-dims` has named.
        longest: Tokens of the longest text.
    """
    try:
        interface = find_interface(model)
    except ir.InputError:
        return None
    carried = states(model, interface)
    found: list[Bound] = []
    seen: set[tuple[str, ...]] = set()
    for layer in _layers(model, carried) if carried else ():
        try:
            trial = _Trial(model, interface, layer)
        except EvaluationError:
            continue  # something else that has to be given
        kind = tuple(node.op_type for node in trial.part.nodes)
        if kind in seen or not trial.agrees(2):
            continue  # as another layer, or never to be judged
        seen.add(kind)
        tokens = longest_text(trial.agrees, longest)
        if tokens < longest:
            names = ", ".join(str(past.name) for past, _ in layer.carried)
            why = (
                f"what renews {names} in the export is something else for more than {tokens} new "
                "tokens at once than for the same tokens in pieces"
            )
            found.append(Bound(tokens, why))
    return min(found, key=lambda bound: bound.tokens, default=None)


@dataclass(frozen=True)
class _Layer:
    """States that are renewed together, and what is made of them up to the next products."""

    carried: tuple[tuple[ir.Value, ir.Value], ...]
    exits: tuple[ir.Value, ...]


def _layers(model: ir.Model, carried: Sequence[tuple[ir.Value, ir.Value]]) -> list[_Layer]:
    reached = {past: _reached(past) for past, _ in carried}
    left, layers = list(carried), list[_Layer]()
    while left:
        group = [left.pop(0)]
        for pair in group:
            near = [
                other
                for other in left
                if other[1] in reached[pair[0]] or pair[1] in reached[other[0]]
            ]
            group += near
            left = [other for other in left if other not in near]
        inside = set[ir.Value]().union(*(reached[past] for past, _ in group))
        exits = [
            value
            for node in model.graph
            if _multiplies(node)
            for value in node.inputs
            if value is not None and value in inside
        ]
        layers.append(_Layer(tuple(group), tuple(dict.fromkeys(exits))))
    return layers


def _reached(past: ir.Value) -> set[ir.Value]:
    """What is made of a state, up to the next products with weights."""
    found, pending = {past}, [past]
    while pending:
        for node in pending.pop().consumers():
            if not _multiplies(node):
                new = [v for v in node.outputs if v not in found and known(v) is None]
                found.update(new)
                pending += new
    return found


def _multiplies(node: ir.Node) -> bool:
    """Whether it is a product with weights, which works token by token."""
    weight = node.inputs[1] if node.op_type in _PRODUCTS and node.domain == "" else None
    return constant_tensor(weight) is not None


def _embeds(node: ir.Node) -> bool:
    """Whether it looks tokens up."""
    is_lookup = node.op_type == "Gather" and node.domain == ""
    return is_lookup and constant_tensor(node.inputs[0]) is not None


class _Trial:
    """A layer run alone, on the same random numbers at once and in pieces.

    Raises:
        EvaluationError: It depends on something that is not given.
    """

    def __init__(self, model: ir.Model, interface: Interface, layer: _Layer) -> None:
        self._prober = Prober(model, interface)
        self._interface = interface
        self._layer = layer
        made = [node.outputs[0] for node in model.graph if _multiplies(node) or _embeds(node)]
        told = [v for v in (interface.attention_mask, interface.position_ids) if v is not None]
        pasts = [past for past, _ in layer.carried]
        outputs = [*(present for _, present in layer.carried), *layer.exits]
        self.part = Cutout(outputs, [*pasts, *made, *told], self._prober.opset)
        used = self.part.used
        self._given = [v for v in made if v.name in used]
        self._told = [v for v in told if v.name in used]
        self._axes = [self._axis(value) for value in self._given]

    def agrees(self, count: int) -> bool:
        """Whether `count` tokens at once give what they give in pieces."""
        random = np.random.default_rng(0)
        bindings = self._prober.bindings(1, count, 0)
        given = [_draw(value, sizes(value, bindings), random) for value in self._given]
        carried = {
            past: np.zeros(sizes(past, bindings), _kind(past)) for past, _ in self._layer.carried
        }
        ends = sorted({*(1 << power for power in range(count.bit_length())), count})
        try:
            whole, _ = self._run(given, 0, count, carried)
            outputs: list[Array] = []
            for start, end in pairwise([0, *ends]):
                outputs, carried = self._run(given, start, end, carried)
        except EvaluationError:
            return False
        last = len(self._layer.carried)
        pairs = list(zip(whole, outputs, strict=True))
        exits = [(_last(one), _last(other)) for one, other in pairs[last:]]
        return all(_near(one, other) for one, other in (*pairs[:last], *exits))

    def _run(
        self, given: Sequence[Array], start: int, end: int, carried: dict[ir.Value, Array]
    ) -> tuple[list[Array], dict[ir.Value, Array]]:
        """Run tokens `start` to `end`; the outputs, and the states behind them."""
        feeds = {str(past.name): array for past, array in carried.items()}
        for value, axis, array in zip(self._given, self._axes, given, strict=True):
            feeds[str(value.name)] = np.take(array, range(start, end), axis=axis)
        for value in self._told:
            is_mask = value is self._interface.attention_mask
            row = np.ones(end) if is_mask else np.arange(start, end)
            feeds[str(value.name)] = row[None].astype(_kind(value))
        bindings = self._prober.bindings(1, end - start, start)
        outputs = self.part.run(feeds, bindings)
        renewed = zip(self._layer.carried, outputs, strict=False)
        return outputs, {past: array for (past, _), array in renewed}

    def _axis(self, value: ir.Value) -> int:
        """The axis of the tokens."""
        one, other = (sizes(value, self._prober.bindings(1, n, 0)) for n in (5, 7))
        axes = [axis for axis, pair in enumerate(zip(one, other, strict=True)) if pair == (5, 7)]
        if len(axes) != 1:
            raise EvaluationError(f"{value.name} has no axis of tokens")
        return axes[0]


def _kind(value: ir.Value) -> Any:
    if value.dtype is None:
        raise EvaluationError(f"{value.name} has no dtype")
    return value.dtype.numpy()


def _draw(value: ir.Value, shape: tuple[int, ...], random: np.random.Generator) -> Array:
    return (0.5 * random.standard_normal(shape)).astype(_kind(value))


def _last(array: Array) -> Array:
    """What is made of the last token, wherever its axis is: batch 1 leaves no doubt."""
    rows = array.reshape(array.shape[1:] if array.shape[0] == 1 and array.ndim > 2 else array.shape)
    return rows[-1]


def _near(one: Array, other: Array) -> bool:
    if one.shape != other.shape or not np.isfinite(one).all():
        return False
    one, other = one.astype(np.float64), other.astype(np.float64)
    return bool(
        np.abs(one - other).max(initial=0) <= _CLOSE * (np.abs(other).max(initial=0) + 1e-6)
    )
