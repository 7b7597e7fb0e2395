"""Give each linear layer the scheme it needs, so that the whole graph fits a number of bytes.

What is counted is the finished graph's constants: integers, scales and zero points, and whatever
else the graph holds, such as norms and a float embedding. Each choice is tried on a copy of the
graph whose quantised weights have no numbers yet, so the count is exact, and nothing is read.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from omforge import ir
from omforge.ir.diagnostics import layer_path
from omforge.ir.errors import InputError
from omforge.ir.streamed import StreamedTensor
from omforge.ir.values import tensor_shape
from omforge.quantization.blockwise import Quantizer, Scheme
from omforge.quantization.budget import Assignment, Option, assign, size_text
from omforge.quantization.calibrate import StoredWeight
from omforge.quantization.linear import Linear
from omforge.quantization.report import BudgetPlan, Candidate, PlannedLayer
from omforge.quantization.sensitivity import Sensitivity, measure_sensitivity

Array = npt.NDArray[Any]

Chosen = Mapping[str, Scheme]
"""By the name of the weight; a weight that is not there stays as it is."""

log = logging.getLogger(__name__)

_CHUNK = 1 << 20


@dataclasses.dataclass(frozen=True)
class Storage:
    """How a finished graph stores what this module chooses.

    Attributes:
        total: Bytes of all its constants.
        width: Bytes of a float, scales included; 0 for the weight's own.
        wide_zeros: Zero points are floats too.
    """

    total: Callable[[Chosen], int]
    width: int = 0
    wide_zeros: bool = False

    def float_width(self, linear: Linear) -> int:
        """Bytes of a float of a layer."""
        assert linear.weight.const_value is not None
        return self.width or linear.weight.const_value.dtype.bitwidth // 8

    def nbytes(self, linear: Linear, scheme: Scheme | None) -> int:
        """Bytes of a layer's weight."""
        inputs, outputs = _sizes(linear)
        width = self.float_width(linear)
        if scheme is None:
            return inputs * outputs * width
        scales = scheme.groups(inputs) * outputs
        zeros = 0 if scheme.symmetric else scales * (8 * width if self.wide_zeros else scheme.bits)
        return -(-inputs * outputs * scheme.bits // 8) + scales * width + -(-zeros // 8)


def schemes_from(coarsest: Scheme) -> tuple[Scheme | None, ...]:
    """The schemes that a layer may have: the one that was asked for, int8 per channel, floats."""
    finer = (dataclasses.replace(coarsest, bits=8, group=0),) if coarsest.bits < 8 else ()
    return (coarsest, *finer, None)


def plan_budget(
    model: ir.Model,
    linears: Sequence[Linear],
    coarsest: Scheme,
    budget: int,
    storage: Storage,
    tokens: Sequence[Array],
    quantizer: Quantizer,
    report: Callable[[int], None] | None = None,
) -> tuple[dict[str, Scheme], BudgetPlan]:
    """Choose a scheme for each layer; those that are not among the chosen keep their floats.

    Args:
        model: With its exporter's interface; left as it is.
        linears: The layers to choose for.
        coarsest: What takes the fewest bytes.
        budget: Bytes of all constants of the finished graph.
        storage: Counts them.
        tokens: A text to measure on; () measures the weights alone.
        quantizer: How integers are chosen, as far as the measurement goes.
        report: Told the bytes of each weight when it was measured.

    Raises:
        InputError: The budget does not hold the graph whatever is chosen, or a weight or a number
            of the model on the text is not finite.
    """
    schemes = schemes_from(coarsest)
    coarse = storage.total({linear.name: coarsest for linear in linears})
    sizes = list(_option_bytes(linears, schemes, storage, coarse))
    rest = coarse - sum(each[0] for each in sizes)
    least = rest + sum(min(each) for each in sizes)
    if least > budget:
        raise InputError(
            f"a budget of {size_text(budget)} does not hold the model",
            f"with {scheme_text(coarsest)} wherever that is smallest, its constants are "
            f"{size_text(least)}",
            "Give a larger budget, larger groups or int4, or leave fewer layers out (keep=...)",
        )
    log.info("measuring %d layers %s", len(linears), "on a text" if tokens else "without a text")
    integers = [scheme for scheme in schemes if scheme is not None]
    found = measure_sensitivity(
        model, linears, integers, tokens, quantizer=quantizer, report=report
    )
    options = [
        [Option(n, cost) for n, cost in zip(each, (*found[x.name].costs, 0.0), strict=True)]
        for x, each in zip(linears, sizes, strict=True)
    ]
    made, total = _fitted(linears, schemes, options, budget, rest, storage)
    chosen = {
        linear.name: scheme
        for linear, index in zip(linears, made.chosen, strict=True)
        if (scheme := schemes[index]) is not None
    }
    plan = BudgetPlan(
        budget=budget,
        nbytes=total,
        least=least,
        most=rest + sum(each[-1] for each in sizes),
        measure="divergence" if tokens else "weights",
        cost=made.cost,
        bound=made.bound,
        layers=tuple(_planned(linears, schemes, options, made, found, storage)),
    )
    return chosen, plan


def _fitted(
    linears: Sequence[Linear],
    schemes: Sequence[Scheme | None],
    options: Sequence[Sequence[Option]],
    budget: int,
    rest: int,
    storage: Storage,
) -> tuple[Assignment, int]:
    """A choice whose graph is within the budget, and the graph's bytes."""
    room = budget - rest
    while True:
        made = assign(options, room)
        pairs = zip(linears, made.chosen, strict=True)
        total = storage.total({x.name: s for x, i in pairs if (s := schemes[i]) is not None})
        if total <= budget:
            return made, total
        # What the sizes do not foresee, such as a copy of a constant that two layers shared.
        least = sum(min(option.nbytes for option in choice) for choice in options)
        room = max(least, made.nbytes - (total - budget))


def _option_bytes(
    linears: Sequence[Linear], schemes: Sequence[Scheme | None], storage: Storage, coarse: int
) -> Iterator[list[int]]:
    """The bytes of each layer's options; those of a tied weight are counted in a graph with each.

    An embedding lookup may read another form of the same integers, which then is a constant too.
    """
    coarsest = {linear.name: schemes[0] for linear in linears}
    for linear in linears:
        sizes = [storage.nbytes(linear, scheme) for scheme in schemes]
        if linear.gathers:
            for index, scheme in enumerate(schemes[1:], 1):
                tried = coarsest | {linear.name: scheme}
                total = storage.total({k: v for k, v in tried.items() if v is not None})
                sizes[index] = sizes[0] + total - coarse
        yield sizes


def _planned(
    linears: Sequence[Linear],
    schemes: Sequence[Scheme | None],
    options: Sequence[Sequence[Option]],
    made: Assignment,
    found: Mapping[str, Sensitivity],
    storage: Storage,
) -> Iterator[PlannedLayer]:
    for linear, choice, index in zip(linears, options, made.chosen, strict=True):
        names = [scheme_text(s) or f"fp{8 * storage.float_width(linear)}" for s in schemes]
        measured = found[linear.name]
        outputs = (*measured.outputs, 0.0) if measured.outputs else (None,) * len(schemes)
        yield PlannedLayer(
            name=linear.name,
            place=layer_path(linear.products[0]) or linear.name,
            chosen=names[index],
            candidates=tuple(
                Candidate(name, option.nbytes, option.cost, weights, output)
                for name, option, weights, output in zip(
                    names, choice, (*measured.weights, 0.0), outputs, strict=True
                )
            ),
        )


def scheme_text(scheme: Scheme | None) -> str:
    """Return a scheme as `--quantize` spells it; "" for floats."""
    if scheme is None:
        return ""
    words = [f"int{scheme.bits}", *[f"g{scheme.group}"] * bool(scheme.group)]
    return ":".join([*words, *["asym"] * (not scheme.symmetric)])


def blank_weight(linear: Linear, scheme: Scheme) -> StoredWeight:
    """A weight that is stored by a scheme, of zeros that take no memory."""
    assert linear.weight.const_value is not None
    shape = tensor_shape(linear.weight.const_value)
    groups = scheme.groups(shape[linear.axis])
    parts = [n if i != linear.axis else groups for i, n in enumerate(shape)]
    if groups == 1 and len(shape) == 2:
        del parts[linear.axis]
    name = linear.name
    return StoredWeight(
        shape,
        linear.axis,
        scheme,
        _Zeros(scheme.dtype, shape, f"{name}_quantized"),
        _Zeros(ir.DataType.FLOAT, parts, f"{name}_scale"),
        None if scheme.symmetric else _Zeros(scheme.dtype, parts, f"{name}_zero_point"),
    )


class _Zeros(StreamedTensor):
    """A tensor of zeros."""

    def pieces(self) -> Iterator[bytes]:
        """Zeros."""
        for start in range(0, self.nbytes, _CHUNK):
            yield bytes(min(_CHUNK, self.nbytes - start))


def _sizes(linear: Linear) -> tuple[int, int]:
    """K, and how many weights there are for each input."""
    assert linear.weight.const_value is not None
    shape = tensor_shape(linear.weight.const_value)
    inputs = shape[linear.axis]
    return inputs, int(np.prod(shape, dtype=np.int64)) // inputs
