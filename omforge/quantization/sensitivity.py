"""What it costs to store each linear layer by each of several schemes.

Without a text, the cost is the weights' own relative squared error. On a text it is what counts in
the end: how far the model's next-token distributions move (Kullback-Leibler divergence) when this
layer alone is stored by the coarsest scheme. All layers are tried in one walk through the model:
behind each layer the walk goes on with one more set of activations, in which that layer's outputs
are off by what its rounding does. A finer scheme costs less as the layer's own outputs err less,
since a small divergence grows with the square of an error.

Letters: K inputs of a linear layer, N outputs, S tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from omforge import ir
from omforge.ir.errors import InputError
from omforge.ir.segment import Walk
from omforge.ir.streamed import in_order
from omforge.ir.values import attribute, tensor_shape
from omforge.ir.weights import release
from omforge.quantization.blockwise import Quantizer, Scheme, decode, quantize, widened
from omforge.quantization.linear import Linear
from omforge.recognition.feeds import token_feeds
from omforge.recognition.interface import find_interface

Array = npt.NDArray[Any]

TOKENS = 128
"""Of the text, read as one piece: on as few, the layers come in much the same order as on more."""

_PIECE = 1 << 20
"""Weights that are rounded at once."""

_ROWS = 32
"""Rows of logits that are compared at once."""

_LIVE = 512 << 20
"""Bytes of activations beyond which the layers are tried in several walks."""

_WIDTHS = 3
"""Activations that a set holds at once, in units of the widest layer's: gate, up and the rest."""


@dataclass(frozen=True)
class Sensitivity:
    """One layer.

    Attributes:
        weights: ||w' - w||^2 / ||w||^2 for each scheme.
        outputs: ||x w' - x w||^2 / ||x w||^2 on the text for each scheme; () without a text.
        divergence: Of the model's distributions, in nats a token, with this layer alone stored by
            the first scheme; None without a text.
    """

    weights: tuple[float, ...]
    outputs: tuple[float, ...] = ()
    divergence: float | None = None

    @property
    def costs(self) -> tuple[float, ...]:
        """Of each scheme: the divergence, or without a text the weights' error."""
        if self.divergence is None:
            return self.weights
        first = self.outputs[0]
        shares = (error / first if first else 1.0 for error in self.outputs)
        return tuple(self.divergence * share for share in shares)


def measure_sensitivity(
    model: ir.Model,
    linears: Sequence[Linear],
    schemes: Sequence[Scheme],
    tokens: Sequence[Array] = (),
    *,
    quantizer: Quantizer = quantize,
    report: Callable[[int], None] | None = None,
) -> dict[str, Sensitivity]:
    """Measure layers, by the names of their weights; a weight is read once, some of it at a time.

    Args:
        model: With its exporter's interface; left as it is.
        linears: Which layers.
        schemes: How they may be stored, the coarsest first.
        tokens: Token numbers [S] of each piece of a text; the first piece is used.
        quantizer: How integers are chosen.
        report: Told the bytes of each weight when it was read.

    Raises:
        InputError: A weight or a number of the model on the text is not finite.
    """
    rounding = _Rounding(schemes, quantizer, report)
    if not tokens:
        return {x.name: Sensitivity(rounding.of(x).weights) for x in linears}
    feeds = token_feeds(model, np.asarray(tokens[0])[None, :TOKENS])
    found: dict[str, Sensitivity] = {}
    for group in _batches(linears, min(TOKENS, len(tokens[0]))):
        found |= _Trial(model, linears, group, feeds, rounding).run()
    return found


def _batches(linears: Sequence[Linear], count: int) -> Iterator[Sequence[Linear]]:
    """Layers that are tried in one walk: each adds a set of activations of `count` tokens."""
    widest = max((max(_matrix(x)) for x in linears if not x.gathers), default=1)
    size = max(8, _LIVE // (4 * _WIDTHS * count * widest))
    for start in range(0, len(linears), size):
        yield linears[start : start + size]


# --- rounding -------------------------------------------------------------------------------------


@dataclass
class _Rounded:
    """What rounding a layer does.

    Attributes:
        weights: Relative squared errors.
        outputs: Sums of squared errors of x w, for each scheme.
        delta: x (w' - w) by the first scheme, [.., N].
    """

    weights: tuple[float, ...]
    outputs: tuple[float, ...] = ()
    delta: Array | None = None


@dataclass
class _Rounding:
    """Rounds layers by several schemes."""

    schemes: Sequence[Scheme]
    quantizer: Quantizer
    report: Callable[[int], None] | None
    _told: set[str] = field(default_factory=set[str])

    def of(self, linear: Linear, x: Array | None = None) -> _Rounded:
        """Read the layer's weight once.

        Args:
            linear: The layer.
            x: What it reads, float32 [.., K].
        """
        tensor = linear.weight.const_value
        assert tensor is not None
        numbers: Array = tensor.numpy()
        turned, (_, outputs) = is_turned(linear), _matrix(linear)
        step = max(1, _PIECE // (numbers.size // outputs))
        bounds = [(start, min(start + step, outputs)) for start in range(0, outputs, step)]

        def work(index: int) -> tuple[list[float], list[Array]]:
            columns = slice(*bounds[index])
            block = widened(numbers[..., columns, :] if turned else numbers[..., columns])
            sums = [float(np.square(block, dtype=np.float64).sum())]
            products: list[Array] = []
            for scheme in self.schemes:
                error = self.rounded(block, scheme, linear) - block
                sums.append(float(np.square(error, dtype=np.float64).sum()))
                if x is not None:
                    products.append(np.matmul(x, np.swapaxes(error, -1, -2) if turned else error))
            return sums, products

        parts = list(in_order(work, len(bounds)))
        release(tensor, 0, tensor.nbytes)
        if self.report is not None and linear.name not in self._told:
            self._told.add(linear.name)
            self.report(tensor.nbytes)
        whole, *errors = np.sum([sums for sums, _ in parts], 0).tolist()
        weights = tuple(error / whole if whole else 0.0 for error in errors)
        if x is None:
            return _Rounded(weights)
        squares = [[_squares(product) for product in products] for _, products in parts]
        delta = np.concatenate([products[0] for _, products in parts], -1)
        return _Rounded(weights, tuple(np.sum(squares, 0).tolist()), delta)

    def rows_off(self, linear: Linear, ids: Array) -> Array:
        """What an embedding's rows [.., K] are off by the first scheme."""
        tensor = linear.weight.const_value
        assert tensor is not None
        numbers: Array = tensor.numpy()
        unique, inverse = np.unique(ids, return_inverse=True)
        rows = np.array(widened(numbers[unique]))
        error = self.rounded(rows, self.schemes[0], linear) - rows
        return error[inverse.reshape(ids.shape)]

    def rounded(self, block: Array, scheme: Scheme, linear: Linear) -> Array:
        """What a block of the layer's outputs becomes, all its inputs in it; float32."""
        axis = block.ndim - 1 if is_turned(linear) else block.ndim - 2
        size = scheme.size(block.shape[axis])
        whole = block.shape[axis] // size * size
        parts = [part for part in np.split(block, [whole], axis) if part.shape[axis]]
        try:
            return np.concatenate([self._groups(part, axis, scheme, size) for part in parts], axis)
        except InputError as error:
            raise InputError(
                f"{linear.name} cannot be quantised", f"{error.what}: {error.why}", error.next_step
            ) from error

    def _groups(self, block: Array, axis: int, scheme: Scheme, size: int) -> Array:
        """Whole groups, or one that is shorter."""
        shape = list(block.shape)
        shape[axis : axis + 1] = [-1, min(size, shape[axis])]
        made = self.quantizer(block.reshape(shape), axis + 1, scheme)
        return decode(made.codes, made.scale, made.zero).reshape(block.shape)


def is_turned(linear: Linear) -> bool:
    """Whether the weight is stored [.., N, K]."""
    tensor = linear.weight.const_value
    return tensor is not None and linear.axis == len(tensor_shape(tensor)) - 1


def _matrix(linear: Linear) -> tuple[int, int]:
    """K and N."""
    assert linear.weight.const_value is not None
    shape = tensor_shape(linear.weight.const_value)
    return (shape[-1], shape[-2]) if is_turned(linear) else (shape[-2], shape[-1])


# --- trying on a text -----------------------------------------------------------------------------


class _Trial:
    """One walk, in which some of the layers are rounded, each in a set of activations of its own.

    Args:
        model: The model.
        linears: All layers: the walk stops at each, so that few weights are in memory.
        group: Those that are tried.
        feeds: The text.
        rounding: How.
    """

    def __init__(
        self,
        model: ir.Model,
        linears: Sequence[Linear],
        group: Sequence[Linear],
        feeds: Mapping[str, Array],
        rounding: _Rounding,
    ) -> None:
        self._walk = Walk(model, [feeds])
        self._model = model
        self._tried = {linear.name for linear in group}
        self._layers = {node: x for x in linears for node in (*x.products, *x.gathers)}
        self._rounding = rounding
        self._sets: dict[str, int] = {}
        self._made: dict[str, _Rounded] = {}
        self._squares: dict[str, float] = {}

    def run(self) -> dict[str, Sensitivity]:
        """Walk to the end; what was found of each layer that was tried."""
        *nodes, last = (node for node in self._model.graph if node in self._layers)
        for node in nodes:
            if node.op_type == "Gather":
                self._embed(node)
            else:
                self._multiply(node)
        divergences = self._ends(last)
        return {
            name: Sensitivity(
                made.weights,
                tuple(
                    error / self._squares[name] if self._squares[name] else 0.0
                    for error in made.outputs
                ),
                divergences[self._sets[name]],
            )
            for name, made in self._made.items()
        }

    def _embed(self, node: ir.Node) -> None:
        linear, (_, ids) = self._layers[node], node.inputs
        assert ids is not None
        if linear.name not in self._tried:
            return
        tokens = self._walk.advance(ids)[0]
        rows = self._walk.advance(node.outputs[0])
        off = self._rounding.rows_off(linear, tokens)
        self._change(linear, node.outputs[0], rows, off)

    def _multiply(self, node: ir.Node) -> None:
        linear, source = self._layers[node], node.inputs[0]
        assert source is not None
        inputs = self._walk.advance(source)
        if linear.name not in self._tried:
            return
        off = self._off(node, linear, inputs)
        outputs = self._walk.advance(node.outputs[0])
        self._squares.setdefault(linear.name, _squares(outputs[0]))
        self._change(linear, node.outputs[0], outputs, off)

    def _off(self, node: ir.Node, linear: Linear, inputs: Sequence[Array]) -> Array:
        """What the product is off."""
        x = np.asarray(inputs[self._sets.get(linear.name, 0)], np.float32)
        if attribute(node, "transA", 0):
            x = np.swapaxes(x, -1, -2)
        made = self._rounding.of(linear, x * np.float32(attribute(node, "alpha", 1.0)))
        self._made.setdefault(linear.name, made)
        assert made.delta is not None
        return made.delta

    def _change(self, linear: Linear, value: ir.Value, arrays: Sequence[Array], off: Array) -> None:
        if linear.name not in self._sets:
            self._sets[linear.name] = self._walk.fork(0)
        index = self._sets[linear.name]
        array = arrays[index] if index < len(arrays) else arrays[0]
        self._walk.change(index, value, (array + off).astype(array.dtype))

    def _ends(self, node: ir.Node) -> list[float]:
        """The divergence of each set of activations; behind the last layer one set at a time.

        All sets' logits at once would be as large as the model.
        """
        linear, source, product = self._layers[node], node.inputs[0], node.outputs[0]
        assert source is not None
        off, changed = None, -1
        inputs = self._walk.advance(source)
        if linear.name in self._tried:
            off = self._off(node, linear, inputs)
            if linear.name not in self._sets:
                self._sets[linear.name] = self._walk.fork(0)
            changed = self._sets[linear.name]

        def change(index: int, value: ir.Value, array: Array) -> Array:
            if value is product and index == 0:
                self._squares.setdefault(linear.name, _squares(array))
            if value is not product or index != changed:
                return array
            return (array + off).astype(array.dtype)

        logits = find_interface(self._model).logits
        values = [product] if logits is product else [product, logits]
        ends = self._walk.finish(values, change)
        reference = _Distribution(next(ends))
        found = [0.0, *(reference.divergence(array) for array in ends)]
        if not np.isfinite(found).all():
            names = [name for name, index in self._sets.items() if not np.isfinite(found[index])]
            raise InputError(
                f"with {names[0]} quantised, the logits on the text are not all finite",
                "a layer before it overflows, or the layer has weights that are not finite",
                "Repair the export, or keep this layer as it is (keep=...)",
            )
        return found


class _Distribution:
    """The tokens that a model expects at each place, from logits [.., V]."""

    def __init__(self, logits: Array) -> None:
        self._logits = np.asarray(logits, np.float32).reshape(-1, logits.shape[-1])
        shifted = self._logits - self._logits.max(-1, keepdims=True)
        self._shares = np.exp(shifted, out=shifted)
        self._shares /= self._shares.sum(-1, keepdims=True)

    def divergence(self, logits: Array) -> float:
        """KL of another model's distributions from these, in nats, the mean of all places.

        With d the difference of logits less its mean under p, it is log(1 + sum p (exp(d) - 1)),
        which keeps its digits where the distributions are nearly equal.
        """
        others = logits.reshape(self._logits.shape)
        total = 0.0
        for start in range(0, len(others), _ROWS):
            rows = slice(start, start + _ROWS)
            shares = self._shares[rows]
            apart = others[rows].astype(np.float32) - self._logits[rows]
            apart -= (apart * shares).sum(-1, keepdims=True)
            np.minimum(apart, 80, out=apart)  # exp stays finite
            terms = np.expm1(apart, out=apart)
            terms *= shares
            total += float(np.log1p(terms.sum(-1, dtype=np.float64)).sum())
        return max(total / len(others), 0.0)


def _squares(array: Array) -> float:
    return float(np.square(array, dtype=np.float64).sum())
