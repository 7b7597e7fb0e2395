"""Store the weights of linear layers as integers with scales.

Before::

    y = MatMul(x, w)                                     w float [K, N]

After::

    y = MatMul(x, DequantizeLinear<axis=0, block_size=g>(q, scale, zero_point))

A tied embedding, `Gather(w, ids)` beside `MatMul(x, Transpose(w))`, reads rows of the same
integers.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt

from omforge import ir
from omforge.ir.edit import add_initializer
from omforge.ir.elementwise import ElementwiseTensor
from omforge.ir.infer import infer_model
from omforge.quantization.blockwise import Clip, Quantizer, Scheme, quantize
from omforge.quantization.budget import parse_size
from omforge.quantization.calibrate import (
    StoredWeight,
    calibrate,
    is_stacked,
    rounded_weight,
)
from omforge.quantization.dequantize import (
    Weight,
    dequantized,
    gathered_rows,
    half_range,
    unsigned,
)
from omforge.quantization.hqq import quantize_hqq
from omforge.quantization.linear import (
    Linear,
    check_linears,
    check_quantizable,
    find_linears,
    kept_layers,
)
from omforge.quantization.mixed import Chosen, Storage, blank_weight, plan_budget
from omforge.quantization.report import QuantizedLayer, add_layers, keep_plan
from omforge.quantization.tensors import QuantizedWeight
from omforge.quantization.token_file import read_tokens
from omforge.recognition.feeds import weight_bytes
from omforge.rewriting.base import Pass
from omforge.rewriting.builder import Builder
from omforge.rewriting.events import record
from omforge.rewriting.splice import Names, insert, splice

Array = npt.NDArray[Any]

log = logging.getLogger(__name__)

Method = Literal["rtn", "hqq", "gptq", "awq"]
_QUANTIZERS: dict[str, Quantizer] = {"rtn": quantize, "hqq": quantize_hqq}


@dataclass(frozen=True)
class QuantizeWeights(Pass):
    """Quantise the weights of all linear layers, the head included.

    Attributes:
        bits: 8 or 4.
        group: Weights that share a scale; 0 is one scale for each output.
        symmetric: Without zero points.
        method: How the integers are chosen: `rtn` is the nearest ones, `hqq` lets outliers be, and
            `gptq` and `awq` keep the layers' outputs on a calibration text.
        clip: How much of a group's range `rtn` covers.
        calibration: A .npy file of token numbers [pieces, S] for gptq and awq.
        keep: Names of weights that stay as they are, `*` for anything; several behind commas.
        budget: Bytes that all constants of the graph may have, such as 3.9GiB. Layers that bear it
            least are then stored with more bits, int8 or their floats; a calibration text tells
            which these are far better than the weights alone.
        unsigned: Integers without a sign, as ONNX Runtime's own products take them; NPUs' take
            signed ones.
        progress: Told the bytes of weights done and in all.
    """

    name: ClassVar[str] = "quantize-weights"
    changes_numbers: ClassVar[bool] = True
    bits: Literal[4, 8] = 8
    group: int = 0
    symmetric: bool = True
    method: Method = "rtn"
    clip: Clip = "mse"
    calibration: str = ""
    keep: tuple[str, ...] = ()
    budget: str = ""
    unsigned: bool = False
    tokens: Sequence[Array] | None = field(default=None, compare=False)
    """Instead of a calibration file: token numbers [S] of each piece."""
    progress: Callable[[int, int], None] | None = field(default=None, compare=False)
    given: Mapping[str, StoredWeight] | None = field(default=None, compare=False)
    """Weights whose integers another pass has chosen, by name; the others stay."""
    footprint: Callable[[ir.Model], int] | None = field(default=None, compare=False)
    """The bytes that `budget` counts of what this pass makes, as a later stage stores it in float16
    with float zero points; those of all constants if None."""

    def run(self, model: ir.Model) -> int:
        """Quantise; the number of weights that became integers.

        Raises:
            InputError: The options make no sense, a name in `keep` is no layer's, there is nothing
                to quantise, or the budget does not hold the model.
            CheckError: A linear layer that should be quantised cannot be.
        """
        scheme = self._scheme()
        infer_model(model)
        linears = find_linears(model)
        if self.given is None:
            check_linears(model, linears, self.name)
        kept = kept_layers(linears, self.keep)
        wanted = [
            linear
            for linear in linears
            if linear.name not in kept and (self.given is None or linear.name in self.given)
        ]
        check_quantizable(wanted, len(linears))
        for linear in linears:
            if linear.name in kept:
                record(model, self.name, linear.weight, "kept as it is, because keep names it")
        schemes = dict.fromkeys((linear.name for linear in wanted), scheme)
        if self.budget:
            schemes = self._planned(model, wanted, scheme)
            wanted = [linear for linear in wanted if linear.name in schemes]
        meter = _Meter(self.progress, sum(linear.nbytes for linear in wanted))
        weights = self._weights(model, wanted, schemes, meter)
        names = Names(model)
        layers = [
            self._rewrite(model, linear, weight, names)
            for linear, weight in zip(wanted, weights, strict=True)
        ]
        for linear in wanted:
            model.graph.initializers.pop(linear.name, None)
        add_layers(model, layers)
        before, after = (sum(getattr(x, f"bytes_{w}") for x in layers) for w in ("before", "after"))
        log.info(
            "%d of %d weights quantised, %d bytes to %d", len(wanted), len(linears), before, after
        )
        return len(wanted)

    def _scheme(self) -> Scheme:
        if self.group < 0 or self.group % 32:
            raise ir.InputError(
                f"a group of {self.group} weights makes no sense",
                "it must be a multiple of 32, or 0 for one scale for each output",
                "32, 64 and 128 are usual",
            )
        return Scheme(self.bits, self.group, self.symmetric, self.clip)

    def _planned(
        self, model: ir.Model, linears: Sequence[Linear], coarsest: Scheme
    ) -> dict[str, Scheme]:
        """How each layer is stored so that all fit the budget; one that keeps its floats is out."""

        def total(chosen: Chosen) -> int:
            copy = model.clone()
            blank = {x.name: blank_weight(x, chosen[x.name]) for x in linears if x.name in chosen}
            QuantizeWeights(given=blank).run(copy)
            return (self.footprint or weight_bytes)(copy)

        lowered = self.footprint is not None
        schemes, plan = plan_budget(
            model,
            linears,
            coarsest,
            parse_size(self.budget),
            Storage(total, width=2 if lowered else 0, wide_zeros=lowered),
            self._tokens(),
            _QUANTIZERS.get(self.method, quantize),
            _Meter(self.progress, sum(linear.nbytes for linear in linears)).add,
        )
        for linear in linears:
            if linear.name not in schemes:
                record(model, self.name, linear.weight, "kept as it is: the budget has room")
        keep_plan(model, plan)
        return schemes

    def _weights(
        self,
        model: ir.Model,
        linears: Sequence[Linear],
        schemes: Mapping[str, Scheme],
        meter: _Meter,
    ) -> list[Weight]:
        if self.given is not None:
            return [self.given[linear.name] for linear in linears]
        if self.method == "rtn" or self.method == "hqq":
            quantizer = _QUANTIZERS[self.method]
            made: list[Weight] = []
            for linear in linears:
                assert linear.weight.const_value is not None
                made.append(
                    QuantizedWeight(
                        linear.weight.const_value,
                        linear.axis,
                        schemes[linear.name],
                        quantizer=quantizer,
                        report=meter.add,
                    )
                )
            return made
        single = [linear for linear in linears if not is_stacked(linear)]
        found = calibrate(model, single, schemes, self.method, self._tokens(), meter.add)
        divide_norms(model, found.scales)
        for linear in filter(is_stacked, linears):
            why = f"rounded to nearest: {self.method} takes one matrix, and these are of experts"
            record(model, self.name, linear.weight, why)
            found.weights[linear.name] = rounded_weight(linear, schemes[linear.name])
            meter.add(linear.nbytes)
        return [found.weights[linear.name] for linear in linears]

    def _tokens(self) -> Sequence[Array]:
        return self.tokens if self.tokens is not None else read_tokens(self.calibration)

    def _rewrite(
        self, model: ir.Model, linear: Linear, weight: Weight, names: Names
    ) -> QuantizedLayer:
        tensor = linear.weight.const_value
        assert tensor is not None
        scheme, dtype = weight.scheme, tensor.dtype
        parameters = [_scale(weight, dtype)]
        if self.unsigned:
            weight = unsigned(weight)
        if weight.zero_point is not None:
            parameters.append(weight.zero_point)
        elif self.unsigned:
            parameters.append(half_range(weight))
        stored = [weight.codes, *parameters]
        with Builder(model) as op:
            made = [op.constant(part, part.name or "") for part in stored]
            float_weight = dequantized(op, weight, made)
            insert(op, linear.users[0], by=self.name, names=names)
        for user in linear.users:
            for index, value in enumerate(user.inputs):
                if value is linear.weight:
                    user.replace_input_with(index, float_weight)
        for gather in linear.gathers:
            with Builder(model) as op:
                ids = gather.inputs[1]
                assert ids is not None
                rows = gathered_rows(op, ids, weight, made)
                splice(op, [gather.outputs[0]], [rows], by=self.name, names=names)
        return QuantizedLayer(
            name=linear.name,
            shape=weight.shape,
            bits=scheme.bits,
            group=scheme.size(weight.shape[weight.axis]),
            symmetric=scheme.symmetric,
            method=self.method,
            bytes_before=tensor.nbytes,
            bytes_after=sum(part.nbytes for part in stored),
            shared=len(linear.users) + len(linear.gathers) > 1,
        )


def divide_norms(model: ir.Model, found: Mapping[ir.Value, Array]) -> None:
    """Divide what layers read by factors [K], in the norms that make it."""
    for value, scales in found.items():
        norm = value.producer()
        assert norm is not None
        for index in range(1, len(norm.inputs)):
            old = norm.inputs[index]
            assert old is not None
            assert old.const_value is not None
            numbers = old.const_value.numpy()
            divided = (numbers.astype(np.float32) / scales).astype(numbers.dtype)
            new = add_initializer(model.graph, f"{old.name}_scaled", divided)
            norm.replace_input_with(index, new)
            model.graph.initializers.pop(old.name or "", None)


def _scale(weight: Weight, dtype: ir.DataType) -> ir.TensorProtocol:
    if isinstance(weight, QuantizedWeight):
        return weight.scale_as(dtype)
    if dtype == weight.scale.dtype:
        return weight.scale
    return ElementwiseTensor(weight.scale, lambda part: part.astype(dtype.numpy()), dtype)


class _Meter:
    """Adds up the bytes that were read."""

    def __init__(self, progress: Callable[[int, int], None] | None, total: int) -> None:
        self._progress = progress
        self._total = total
        self._done = 0

    def add(self, count: int) -> None:
        self._done += count
        if self._progress is not None:
            self._progress(self._done, self._total)
