"""Store the weights of linear layers as int8, and let the layers read int8 as well (W8A8).

Before::

    y = MatMul(x, w)                                                     w float [K, N]

After::

    q = QuantizeLinear(x, step)                                          one step for all of x
    y = MatMul(DequantizeLinear(q, step), DequantizeLinear<axis=1>(codes, scale))

A kernel that multiplies int8 by int8 serves this form. Inputs of very unequal channels are evened
out first: a norm, or the layer in front of a Mul, divides them and the weights take the factors
(SmoothQuant). Integers are symmetric: with a zero point of x a product would need the sums of its
weights' columns, which kernels take as an int32 bias only.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt

from omforge import ir
from omforge.ir.infer import infer_model
from omforge.ir.int8_ops import INPUTS_MULTIPLIED, OUTPUTS_DIVIDED
from omforge.ir.values import tensor_shape
from omforge.passes.quantize_weights import QuantizeWeights, divide_norms
from omforge.quantization.activations import Int8Layers, choose_int8
from omforge.quantization.linear import (
    Linear,
    check_linears,
    check_quantizable,
    find_linears,
    kept_layers,
)
from omforge.quantization.token_file import read_tokens
from omforge.rewriting.base import Pass
from omforge.rewriting.builder import Builder
from omforge.rewriting.events import record
from omforge.rewriting.splice import Names, insert

Array = npt.NDArray[Any]

log = logging.getLogger(__name__)

LIMIT = 0.05


@dataclass(frozen=True)
class QuantizeActivations(Pass):
    """Let linear layers read int8, with int8 weights: one scale for x, one for each output of w.

    A layer whose outputs would suffer reads floats; `otherwise` says how its weight is stored then.

    Attributes:
        smooth: Divide x by factors, and multiply the weights by them, where that is free.
        limit: The relative error of a layer's outputs above which it reads floats.
        otherwise: How the weights of such layers are stored: `int8` too, or as they `float`.
        calibration: A .npy file of token numbers [pieces, S].
        keep: Names of weights that stay as they are, `*` for anything; several behind commas.
        progress: Told the bytes of weights done and in all.
    """

    name: ClassVar[str] = "quantize-activations"
    changes_numbers: ClassVar[bool] = True
    smooth: bool = True
    limit: float = LIMIT
    otherwise: Literal["int8", "float"] = "int8"
    calibration: str = ""
    keep: tuple[str, ...] = ()
    tokens: Sequence[Array] | None = field(default=None, compare=False)
    """Instead of a calibration file: token numbers [S] of each piece."""
    progress: Callable[[int, int], None] | None = field(default=None, compare=False)

    def run(self, model: ir.Model) -> int:
        """Quantise; the number of layers that read int8.

        Raises:
            InputError: There is no calibration text, a name in `keep` is no layer's, or a number of
                the model on the text is not finite.
            CheckError: A linear layer that should be quantised cannot be.
        """
        infer_model(model)
        linears = find_linears(model)
        check_linears(model, linears, self.name)
        kept = kept_layers(linears, self.keep)
        wanted = [linear for linear in linears if linear.name not in kept]
        check_quantizable(wanted, len(linears))
        tokens = self.tokens if self.tokens is not None else read_tokens(self.calibration)
        found = choose_int8(
            model,
            wanted,
            tokens,
            smooth=self.smooth,
            limit=self.limit,
            report=self._meter(wanted),
        )
        for linear in linears:
            if linear.name in kept:
                record(model, self.name, linear.weight, "kept as it is, because keep names it")
            elif linear.name in found.floats:
                record(model, self.name, linear.weight, self._told(found.floats[linear.name]))
        divide_norms(model, found.norms)
        if self.otherwise == "float":
            _restore(wanted, found)
        integers = [linear for linear in wanted if linear.name in found.steps]
        _round_inputs(model, integers, found)
        QuantizeWeights(8, given=found.weights).run(model)
        for linear in wanted:
            marks = linear.products[0].metadata_props
            if linear.name in found.divisors:
                marks[OUTPUTS_DIVIDED] = "by factors of the layer behind it"
            if linear.name in found.multiplied:
                marks[INPUTS_MULTIPLIED] = "a layer before it is divided by the same"
        log.info("%d of %d layers read int8", len(integers), len(linears))
        return len(integers)

    def _told(self, why: str) -> str:
        stored = "its weight is int8" if self.otherwise == "int8" else "its weight stays as it is"
        return f"it reads floats, and {stored}: {why}"

    def _meter(self, wanted: Sequence[Linear]) -> Callable[[int], None] | None:
        if self.progress is None:
            return None
        progress, total, done = self.progress, sum(linear.nbytes for linear in wanted), 0

        def add(count: int) -> None:
            nonlocal done
            done += count
            progress(done, total)

        return add


def _restore(wanted: Sequence[Linear], found: Int8Layers) -> None:
    """Let layers that read floats keep their weights, but for the factors of inputs and outputs."""
    for linear in wanted:
        if linear.name not in found.floats:
            continue
        del found.weights[linear.name]
        factors, divisors = found.factors.get(linear.name), found.divisors.get(linear.name)
        if factors is not None or divisors is not None:
            linear.weight.const_value = _scaled(linear, factors, divisors)


def _scaled(linear: Linear, factors: Array | None, divisors: Array | None) -> ir.TensorProtocol:
    """The weight with its inputs K multiplied, its outputs N divided; computed when it is read."""
    tensor = linear.weight.const_value
    assert tensor is not None
    shape = ir.Shape(tensor_shape(tensor))

    def product() -> ir.TensorProtocol:
        numbers = tensor.numpy()
        turned = numbers.astype(np.float32)
        wide = turned.T if linear.axis else turned
        wide = wide if factors is None else wide * factors[:, None]
        wide = wide if divisors is None else wide / divisors
        stored = wide.T if linear.axis else wide
        return ir.Tensor(np.ascontiguousarray(stored, numbers.dtype), name=tensor.name)

    return ir.LazyTensor(product, dtype=tensor.dtype, shape=shape, name=tensor.name)


def _round_inputs(model: ir.Model, linears: Sequence[Linear], found: Int8Layers) -> None:
    """Let products read their inputs through integers; those of one value share them."""
    readers: dict[ir.Value, list[Linear]] = {}
    for linear in linears:
        source = linear.products[0].inputs[0]
        assert source is not None
        readers.setdefault(source, []).append(linear)
    names = Names(model)
    for source, group in readers.items():
        assert source.dtype is not None
        step = np.array(found.steps[group[0].name], source.dtype.numpy())
        with Builder(model) as op:
            scale = op.constant(step)
            codes = op.QuantizeLinear(source, scale, output_dtype=int(ir.DataType.INT8))
            wide = op.DequantizeLinear(codes, scale)
            insert(op, group[0].products[0], by=QuantizeActivations.name, names=names)
        for linear in group:
            linear.products[0].replace_input_with(0, wide)
