"""Quantise by what a calibration text does to each layer, one layer after the other.

The model is walked from its inputs on. At each group of linear layers that read the same value, the
walk stops: the inputs are there, the layers are quantised, and the walk goes on through what they
became, so that later layers see the errors of earlier ones.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from omforge import ir
from omforge.ir.errors import InputError
from omforge.ir.segment import Walk
from omforge.ir.values import tensor_shape
from omforge.quantization.awq import group_products, round_clipped, search_scales
from omforge.quantization.blockwise import Scheme, pack, widened
from omforge.quantization.gptq import DAMPING, Codes, quantize_gptq
from omforge.quantization.hessian import Hessian
from omforge.quantization.linear import Linear
from omforge.quantization.tensors import QuantizedWeight
from omforge.recognition.feeds import token_feeds

Array = npt.NDArray[Any]
CalibratedMethod = Literal["gptq", "awq"]
_Rounder = Callable[[Linear, Array, Scheme], Codes]

TIED_DAMPING = 1.0
"""An embedding is read as it is, too: as a head it must not stray far from its own numbers."""

_SAMPLE = 512
"""Tokens that a search over scales multiplies again and again."""


@dataclass(frozen=True)
class StoredWeight:
    """A weight that was quantised already; the attributes are those of `QuantizedWeight`."""

    shape: tuple[int, ...]
    axis: int
    scheme: Scheme
    codes: ir.TensorProtocol
    scale: ir.TensorProtocol
    zero_point: ir.TensorProtocol | None

    @property
    def per_channel(self) -> bool:
        """Whether a column has one scale."""
        return self.scheme.groups(self.shape[self.axis]) == 1


def rounded_weight(linear: Linear, scheme: Scheme) -> StoredWeight:
    """A weight with the nearest integers, computed when they are read."""
    assert linear.weight.const_value is not None
    made = QuantizedWeight(linear.weight.const_value, linear.axis, scheme)
    return StoredWeight(made.shape, made.axis, scheme, made.codes, made.scale, made.zero_point)


def is_stacked(linear: Linear) -> bool:
    """Whether it is the matrices of several experts: no text says what each of them reads."""
    return len(linear.weight.const_value.shape) > 2  # pyright: ignore[reportOptionalMemberAccess]


@dataclass(frozen=True)
class Calibrated:
    """What a text made of a model's layers.

    Attributes:
        weights: By the name of the weight.
        scales: What AWQ divides the input of some products by, [K], by that input.
    """

    weights: dict[str, StoredWeight]
    scales: dict[ir.Value, Array]


def calibrate(
    model: ir.Model,
    linears: Sequence[Linear],
    schemes: Mapping[str, Scheme],
    method: CalibratedMethod,
    tokens: Sequence[Array],
    report: Callable[[int], None] | None = None,
) -> Calibrated:
    """Quantise layers by their inputs on a text.

    Args:
        model: With its exporter's interface; left as it is.
        linears: Which layers.
        schemes: How to store each, by the name of its weight.
        method: How to choose.
        tokens: Token numbers [S] of each piece of the text.
        report: Told the bytes of the weights that are done.

    Raises:
        InputError: There is no text, a weight has more than two dimensions, or a number of the
            model on the text is not finite.
    """
    if not tokens:
        raise InputError(
            f"{method} needs a calibration text", "none was given", "Give --calibration FILE"
        )
    feeds = [token_feeds(model, np.asarray(piece)[None]) for piece in tokens]
    groups = list(layer_groups(model, linears))
    sources = [source for source, _ in groups]
    walk = Walk(model, feeds, sources)
    exact = Walk(model, feeds, sources) if method == "gptq" else None
    found = Calibrated({}, {})
    replaced: dict[ir.Value, Array] = {}
    last_group: list[ir.Value] = []
    tied = {linear.name for linear in linears if linear.gathers}
    for source, group in groups:
        inputs = walk.advance(source, replaced)
        weights = [float_weight(linear) for linear in group]
        scales = None
        if method == "awq" and may_scale(source, group, tied):
            scales = search_scales(_sample(inputs), weights, [schemes[x.name] for x in group])
            found.scales[source] = scales
            weights = [weight * scales[:, None] for weight in weights]
        were = None if exact is None else exact.advance(source)
        made = _quantized(group, weights, (inputs, were), scales, schemes, method)
        for linear, codes in zip(group, made, strict=True):
            scheme = schemes[linear.name]
            found.weights[linear.name] = stored_weight(linear, codes, scheme)
            numbers = codes.decoded(scheme.size(len(codes.codes)))
            if scales is not None:
                numbers = numbers / scales[:, None]
            replaced[linear.weight] = numbers.T if linear.axis else numbers
            if report is not None:
                report(linear.nbytes)
        # What reads these weights runs in the next step; nothing else does, but for shared ones.
        last = [linear.weight for linear in group if len(linear.products) == 1]
        passed, last_group = last_group, last
        for weight in passed:
            replaced.pop(weight, None)
    return found


def _quantized(
    group: Sequence[Linear],
    weights: Sequence[Array],
    inputs: tuple[Sequence[Array], Sequence[Array] | None],
    scales: Array | None,
    schemes: Mapping[str, Scheme],
    method: CalibratedMethod,
) -> Iterator[Codes]:
    """The layers' integers, by what they read and what they would read in floats."""
    make = _gptq(*inputs) if method == "gptq" else _awq(inputs[0], scales)
    for linear, weight in zip(group, weights, strict=True):
        try:
            yield make(linear, weight, schemes[linear.name])
        except InputError as error:
            raise InputError(
                f"{linear.name} cannot be quantised", f"{error.what}: {error.why}", error.next_step
            ) from error


def _gptq(now: Sequence[Array], were: Sequence[Array] | None) -> _Rounder:
    hessian = Hessian(now[0].shape[-1])
    for x, exact in zip(now, were or [None] * len(now), strict=True):
        hessian.add(x, exact)

    def rounded(linear: Linear, weight: Array, scheme: Scheme) -> Codes:
        damping = TIED_DAMPING if linear.gathers else DAMPING
        return quantize_gptq(weight, hessian, scheme, damping=damping)

    return rounded


def _awq(now: Sequence[Array], scales: Array | None) -> _Rounder:
    by = np.ones(now[0].shape[-1], np.float32) if scales is None else scales
    sample = _sample(now) / by
    products: dict[int, list[Array]] = {}

    def rounded(linear: Linear, weight: Array, scheme: Scheme) -> Codes:
        size = scheme.size(len(weight))
        if size not in products:
            products[size] = group_products(now, by, size)
        return round_clipped(weight, products[size], sample, scheme)

    return rounded


def layer_groups(
    model: ir.Model, linears: Sequence[Linear]
) -> Iterator[tuple[ir.Value, list[Linear]]]:
    """Layers that read the same value, in the graph's order; a shared weight where it is first."""
    by_product = {linear.products[0]: linear for linear in reversed(linears)}
    groups: dict[ir.Value, list[Linear]] = {}
    for node in model.graph:
        linear, source = by_product.get(node), node.inputs[0] if node.inputs else None
        if linear is not None and source is not None:
            groups.setdefault(source, []).append(linear)
    for linear in linears:
        if len(linear.weight.const_value.shape) != 2:  # pyright: ignore[reportOptionalMemberAccess]
            raise InputError(
                f"{linear.name} has more than two dimensions",
                "only round-to-nearest and hqq quantise those",
                f"keep={linear.name}, or another method",
            )
    yield from groups.items()


def float_weight(linear: Linear) -> Array:
    """float32 [K, N], a copy."""
    assert linear.weight.const_value is not None
    wide = widened(linear.weight.const_value.numpy())
    return np.array(wide.T if linear.axis else wide, np.float32, order="C")


def may_scale(source: ir.Value, group: Sequence[Linear], tied: set[str]) -> bool:
    """Whether a division of the layers' input can go into the norm that makes it.

    A tied weight is an embedding too, which must not change.
    """
    maker = source.producer()
    if maker is None or maker.op_type not in ("RMSNormalization", "LayerNormalization"):
        return False
    users = {user for linear in group for user in linear.products}
    alone = all(len(linear.products) == 1 for linear in group)
    private = all(v is None or len(v.consumers()) == 1 for v in maker.inputs[1:])
    return (
        alone
        and private
        and not source.is_graph_output()
        and set(source.consumers()) == users
        and not any(linear.name in tied for linear in group)
    )


def _sample(inputs: Sequence[Array]) -> Array:
    """Some tokens of all pieces, float32 [T, K]."""
    flat = np.concatenate([x.reshape(-1, x.shape[-1]) for x in inputs])
    return np.asarray(flat[:: max(1, len(flat) // _SAMPLE)], np.float32)


def stored_weight(linear: Linear, made: Codes, scheme: Scheme) -> StoredWeight:
    """The integers of a weight [K, N] in a layer's own order of axes."""
    assert linear.weight.const_value is not None
    shape = tensor_shape(linear.weight.const_value)
    codes, scale, zero = made.codes, made.scale, made.zero
    if linear.axis:
        codes, scale, zero = codes.T, scale.T, zero.T
    if scheme.groups(shape[linear.axis]) == 1:
        scale, zero = scale.reshape(-1), zero.reshape(-1)
    return StoredWeight(
        shape,
        linear.axis,
        scheme,
        _on_disk(codes, scheme, f"{linear.name}_quantized"),
        ir.Tensor(np.asarray(scale, order="C"), name=f"{linear.name}_scale"),
        None if scheme.symmetric else _on_disk(zero, scheme, f"{linear.name}_zero_point"),
    )


def _on_disk(codes: Array, scheme: Scheme, name: str) -> ir.TensorProtocol:
    """Integers in a file without a name, so that a model's worth of them is not in memory."""
    data = pack(codes, scheme.bits)
    with tempfile.TemporaryFile() as file:
        file.write(data)
        file.flush()
        mapped = np.memmap(file, np.uint8, "r")
    if scheme.bits == 4:
        return ir.PackedTensor(mapped, scheme.dtype, shape=ir.Shape(codes.shape), name=name)
    return ir.Tensor(mapped.view(np.int8).reshape(codes.shape), name=name)
