"""Choose int8 for what linear layers read and for their weights, by a calibration text.

The model is walked from its inputs on, as `calibrate` does, and what is chosen at a stop is what
the layers behind it see: the rounded inputs as well as the rounded weights.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from omforge import ir
from omforge.ir.errors import InputError
from omforge.ir.segment import Walk
from omforge.ir.values import attribute, tensor_shape
from omforge.quantization.blockwise import storable
from omforge.quantization.calibrate import (
    StoredWeight,
    float_weight,
    is_stacked,
    layer_groups,
    may_scale,
    rounded_weight,
    stored_weight,
)
from omforge.quantization.linear import Linear
from omforge.quantization.smooth import (
    POWERS,
    SCHEME,
    Smoothing,
    rounded,
    sample,
    search_smoothing,
)
from omforge.recognition.feeds import token_feeds

Array = npt.NDArray[Any]


@dataclass
class Int8Layers:
    """What a text made of a model's layers.

    Attributes:
        weights: By the name of the weight.
        norms: What the result of a norm is divided by, [K].
        factors: What layers' inputs are divided by, and their weights multiplied, [K], by the name
            of the weight.
        divisors: What layers' outputs are divided by, [N], likewise; `weights` have it.
        multiplied: The layers whose factors a layer before them is divided by, not a norm.
        steps: Of the int8 that layers read, likewise.
        floats: Why the other layers read floats, likewise.
        errors: Of the layers' outputs with both in int8, relative, likewise.
    """

    weights: dict[str, StoredWeight] = field(default_factory=dict[str, StoredWeight])
    norms: dict[ir.Value, Array] = field(default_factory=dict[ir.Value, Array])
    factors: dict[str, Array] = field(default_factory=dict[str, Array])
    divisors: dict[str, Array] = field(default_factory=dict[str, Array])
    multiplied: set[str] = field(default_factory=set[str])
    steps: dict[str, float] = field(default_factory=dict[str, float])
    floats: dict[str, str] = field(default_factory=dict[str, str])
    errors: dict[str, float] = field(default_factory=dict[str, float])


def choose_int8(
    model: ir.Model,
    linears: Sequence[Linear],
    tokens: Sequence[Array],
    *,
    smooth: bool,
    limit: float,
    report: Callable[[int], None] | None = None,
) -> Int8Layers:
    """Quantise layers and what they read by their inputs on a text.

    Args:
        model: With its exporter's interface; left as it is.
        linears: Which layers.
        tokens: Token numbers [S] of each piece of the text.
        smooth: Move the range of inputs into weights where something can take the division.
        limit: Of a layer's relative error: above it the layer reads floats.
        report: Told the bytes of the weights that are done.

    Raises:
        InputError: There is no text, a weight has more than two dimensions, or a number of the
            model on the text is not finite.
    """
    if not tokens:
        raise InputError(
            "int8 activations need a calibration text",
            "their scales are what the layers read on it",
            "Give --calibration FILE: a text, or token numbers as .npy",
        )
    feeds = [token_feeds(model, np.asarray(piece)[None]) for piece in tokens]
    groups = list(layer_groups(model, [x for x in linears if not is_stacked(x)]))
    walk = Walk(model, feeds, [source for source, _ in groups])
    found = Int8Layers()
    for linear in filter(is_stacked, linears):
        found.weights[linear.name] = rounded_weight(linear, SCHEME)
        found.floats[linear.name] = "the matrices of experts are stacked, and one step is of one"
    by_product = {product: linear for linear in linears for product in linear.products}
    replaced: dict[ir.Value, Array] = {}
    last: list[ir.Value] = []
    for source, group in groups:
        inputs = walk.advance(source, replaced)
        if not all(np.isfinite(piece).all() for piece in inputs):
            raise InputError(
                f"the calibration text makes {source.name} infinite",
                "an infinity or a NaN has no scale",
                "Check the text and the export",
            )
        divides = _divider(source, group, by_product, found) if smooth else None
        made = search_smoothing(
            sample(inputs),
            [float_weight(linear) for linear in group],
            () if divides is None else POWERS,
        )
        if divides is not None and made.scales is not None:
            divides(made.scales)
        decoded = _record(found, group, made, limit, report)
        replaced.update(decoded)
        if all(linear.name in found.steps for linear in group):
            _round_inputs(walk, source, group, inputs, made)
        # What reads these weights runs in the next step; nothing else does, but for shared ones.
        passed, last = last, [x.weight for x in group if len(x.products) == 1]
        for weight in passed:
            replaced.pop(weight, None)
    return found


def _record(
    found: Int8Layers,
    group: Sequence[Linear],
    made: Smoothing,
    limit: float,
    report: Callable[[int], None] | None,
) -> Mapping[ir.Value, Array]:
    """Note what was chosen for a group; the numbers that its weights have from here on."""
    numbers: dict[ir.Value, Array] = {}
    for linear, codes, error in zip(group, made.weights, made.errors, strict=True):
        found.weights[linear.name] = stored_weight(linear, codes, SCHEME)
        found.errors[linear.name] = error
        why = _obstacle(linear)
        if not why and not error <= limit:
            why = f"its outputs would be off by {error:.1%}, the limit is {limit:.1%}"
        if why:
            found.floats[linear.name] = why
        else:
            found.steps[linear.name] = made.step
        weight = codes.decoded(len(codes.codes))
        if made.scales is not None:
            found.factors[linear.name] = made.scales
            weight = weight / made.scales[:, None]
        numbers[linear.weight] = weight.T if linear.axis else weight
        if report is not None:
            report(linear.nbytes)
    return numbers


def _obstacle(linear: Linear) -> str:
    """Why a layer must read floats whatever the text says, empty if it need not."""
    if len(linear.products) > 1:
        return f"{len(linear.products)} products share its weight, each with inputs of its own"
    if attribute(linear.products[0], "transA", 0):
        return "its product turns its input"
    return ""


def _round_inputs(
    walk: Walk, source: ir.Value, group: Sequence[Linear], inputs: Sequence[Array], made: Smoothing
) -> None:
    """Let the layers read the integers, if nobody else reads what they read."""
    users = {product for linear in group for product in linear.products}
    if set(source.consumers()) != users:
        return
    by = np.float32(1) if made.scales is None else made.scales
    divided = [x.astype(np.float32) / by for x in inputs]
    arrays = zip(inputs, divided, strict=True)
    walk.put(source, [(rounded(y, made.step) * by).astype(x.dtype) for x, y in arrays])


def _divider(
    source: ir.Value,
    group: Sequence[Linear],
    by_product: Mapping[ir.Node, Linear],
    found: Int8Layers,
) -> Callable[[Array], None] | None:
    """What divides a value by factors [K] at no cost; None if nothing can.

    That is the norm that makes it, or, behind a Mul, a layer before it: the scales of its integers
    are divided, and the integers stay.
    """
    tied = {linear.name for linear in by_product.values() if linear.gathers}
    if may_scale(source, group, tied):

        def divide_norm(scales: Array) -> None:
            found.norms[source] = scales

        return divide_norm
    before = _layer_before(source, group, by_product, found)
    if before is None:
        return None

    def divide_layer(scales: Array) -> None:
        weight = found.weights[before]
        divided = ir.Tensor(storable(weight.scale.numpy() / scales), name=weight.scale.name)
        found.weights[before] = dataclasses.replace(weight, scale=divided)
        found.divisors[before] = scales
        found.multiplied.update(linear.name for linear in group)

    return divide_layer


def _layer_before(
    source: ir.Value,
    group: Sequence[Linear],
    by_product: Mapping[ir.Node, Linear],
    found: Int8Layers,
) -> str | None:
    """The quantised layer whose outputs a Mul makes `source` of, if only it and the group do."""
    maker = source.producer()
    users = {user for linear in group for user in linear.products}
    private = set(source.consumers()) == users and not source.is_graph_output()
    if maker is None or maker.op_type != "Mul" or maker.domain or not private:
        return None
    if any(len(linear.products) > 1 or linear.gathers for linear in group):
        return None
    inputs = tensor_shape(group[0].weight.const_value)[group[0].axis]  # pyright: ignore[reportArgumentType]
    for value in maker.inputs:
        product = None if value is None else value.producer()
        linear = None if product is None else by_product.get(product)
        if product is None or linear is None or linear.name not in found.weights:
            continue
        plain = product.op_type == "MatMul" and len(linear.products) == 1 and not linear.gathers
        wide = found.weights[linear.name].shape[1 - linear.axis] == inputs  # else it is broadcast
        if plain and wide and list(product.outputs[0].consumers()) == [maker]:
            return linear.name
    return None
