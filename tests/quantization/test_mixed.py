"""Layers share a budget: what is counted is what is there, and what is chosen is told."""

import itertools

import numpy as np
import pytest

from omforge import ir
from omforge.ir.numerics import run
from omforge.passes.quantize_weights import QuantizeWeights
from omforge.quantization.blockwise import Scheme
from omforge.quantization.linear import find_linears
from omforge.quantization.mixed import Storage, blank_weight, schemes_from
from omforge.quantization.report import BudgetPlan, budget_plan, quantized_layers
from omforge.recognition.feeds import weight_bytes
from omforge.rewriting.events import events
from tests.quantization.test_calibrate import HELD_OUT, TOKENS, model

NAMES = ("gate", "up", "down", "embedding")


def planned(
    size: int, text: bool = True, **options: object
) -> tuple[ir.Model, BudgetPlan, dict[str, int]]:
    """The model in a budget, its plan, and the bits of each layer."""
    made = model()
    given = TOKENS if text else ()
    QuantizeWeights(4, 64, budget=str(size), tokens=given, **options).run(made)
    ir.check(made)
    plan = budget_plan(made)
    assert plan is not None
    bits = dict.fromkeys(NAMES, 32) | {layer.name: layer.bits for layer in quantized_layers(made)}
    return made, plan, bits


def bytes_with(bits: tuple[int, ...], symmetric: bool = True) -> int:
    """Of a model whose layers were quantised one by one."""
    made = model()
    for name, width in zip(NAMES, bits, strict=True):
        if width < 32:
            keep = tuple(x.name for x in find_linears(made) if x.name != name)
            QuantizeWeights(width, 64 if width == 4 else 0, symmetric, keep=keep).run(made)
    return weight_bytes(made)


SIZES = {bits: bytes_with(bits) for bits in itertools.product((4, 8, 32), repeat=4)}
LEAST, MOST = min(SIZES.values()), SIZES[32, 32, 32, 32]


@pytest.mark.parametrize("size", [LEAST, LEAST + 2500, (LEAST + MOST) // 2, MOST - 1, MOST + 1])
@pytest.mark.parametrize("text", [True, False])
def test_all_constants_are_within_the_budget(size: int, text: bool) -> None:
    made, plan, bits = planned(size, text)
    assert plan.nbytes == weight_bytes(made) == SIZES[tuple(bits[name] for name in NAMES)] <= size
    assert (plan.least, plan.most) == (LEAST, MOST)
    assert plan.measure == ("divergence" if text else "weights")
    assert plan.bound <= plan.cost
    # Nothing more fits: each upgrade of one layer is above the budget.
    for index, width in enumerate(bits[name] for name in NAMES):
        for wider in {4: (8, 32), 8: (32,), 32: ()}[width]:
            other = list(bits[name] for name in NAMES)
            other[index] = wider
            assert SIZES[tuple(other)] > size


def test_the_choice_is_the_best_there_is() -> None:
    _, plan, _ = planned((LEAST + MOST) // 2)
    costs = {
        bits: sum(
            layer.candidates[(4, 8, 32).index(width)].cost
            for layer in plan.layers
            for name, width in zip(NAMES, bits, strict=True)
            if layer.name == name
        )
        for bits, size in SIZES.items()
        if size <= plan.budget
    }
    assert plan.cost == pytest.approx(min(costs.values()), rel=1e-9)


def test_a_layer_that_keeps_its_floats_is_told() -> None:
    made, plan, bits = planned((LEAST + MOST) // 2)
    floats = [name for name in NAMES if bits[name] == 32]
    assert floats
    told = [(event.where, event.reason) for event in events(made)]
    assert told == [
        (x.name, "kept as it is: the budget has room") for x in plan.layers if x.name in floats
    ]
    assert plan.counts["fp32"] == len(floats)
    assert sum(plan.counts.values()) == 4
    assert list(plan.counts) == ["int4:g64", "int8", "fp32"]


def test_the_plan_names_the_most_sensitive_layer_first() -> None:
    _, plan, _ = planned(LEAST + 2500)
    costs = [layer.candidates[0].cost for layer in plan.most_sensitive]
    assert costs == sorted(costs, reverse=True)
    for layer in plan.layers:
        assert layer.candidates[-1].cost == 0
        assert layer.candidates[1].output_error < layer.candidates[0].output_error
        assert [x.kind for x in layer.candidates] == ["int4:g64", "int8", "fp32"]


@pytest.mark.parametrize("method", ["hqq", "gptq", "awq"])
def test_every_method_mixes(method: str) -> None:
    exact = run(model(), HELD_OUT)["logits"]
    errors: list[float] = []
    for size in (LEAST, LEAST + 5000, MOST):
        made, plan, bits = planned(size, method=method)
        assert plan.nbytes == weight_bytes(made)
        errors.append(float(np.linalg.norm(run(made, HELD_OUT)["logits"] - exact)))
        if size == LEAST + 5000:
            assert len(set(bits.values())) > 1
    assert errors[0] > errors[1] > errors[2] == 0


def test_what_keep_names_is_not_part_of_the_plan() -> None:
    made, plan, bits = planned(MOST - 5000, keep=("down",))
    assert bits["down"] == 32
    assert [layer.name for layer in plan.layers] == ["gate", "up", "embedding"]
    assert weight_bytes(made) <= MOST - 5000


def test_a_budget_that_holds_nothing_names_what_would_do() -> None:
    with pytest.raises(ir.InputError, match=rf"does not hold the model.*\({LEAST:,} bytes\)"):
        planned(LEAST - 1)
    with pytest.raises(ir.InputError, match="'much' is no size"):
        QuantizeWeights(4, 64, budget="much").run(model())


def test_int8_is_the_coarsest_where_it_was_asked_for() -> None:
    made = model()
    QuantizeWeights(8, budget=str(SIZES[8, 8, 8, 8]), tokens=TOKENS).run(made)
    plan = budget_plan(made)
    assert plan is not None
    assert plan.counts == {"int8": 4, "fp32": 0}
    assert schemes_from(Scheme(8, 32)) == (Scheme(8, 32), None)


@pytest.mark.parametrize("symmetric", [True, False])
def test_a_footprint_counts_what_a_later_stage_stores(symmetric: bool) -> None:
    seen: list[int] = []

    def footprint(made: ir.Model) -> int:
        """Floats in half precision, zero points too."""
        total = 0
        for value in made.graph.initializers.values():
            tensor = value.const_value
            zeros = str(value.name).endswith("zero_point")
            halves = zeros or tensor.dtype == ir.DataType.FLOAT
            total += tensor.size * 2 if halves else tensor.nbytes
        seen.append(total)
        return total

    made = model()
    QuantizeWeights(4, 64, symmetric, budget="11000", tokens=TOKENS, footprint=footprint).run(made)
    tries = len(seen)
    plan = budget_plan(made)
    assert plan is not None
    assert plan.nbytes == footprint(made) == seen[tries - 1] <= 11000
    assert tries == 4, "all coarse, two more for the embedding, the choice: no second choice"


def test_a_blank_weight_is_stored_as_a_real_one() -> None:
    for linear in find_linears(model()):
        for scheme in (Scheme(4, 32, symmetric=False), Scheme(8, 0)):
            blank = blank_weight(linear, scheme)
            given, real = model(), model()
            QuantizeWeights(given={linear.name: blank}).run(given)
            keep = tuple(x.name for x in find_linears(real) if x.name != linear.name)
            QuantizeWeights(scheme.bits, scheme.group, scheme.symmetric, keep=keep).run(real)
            mine, theirs = (
                {
                    k: (v.shape, v.dtype, v.const_value.nbytes)
                    for k, v in x.graph.initializers.items()
                }
                for x in (given, real)
            )
            assert mine == theirs
            assert not blank.codes.numpy().any()


def test_storage_counts_a_weight() -> None:
    linear = next(x for x in find_linears(model()) if x.name == "gate")
    plain, half = Storage(lambda _: 0), Storage(lambda _: 0, width=2, wide_zeros=True)
    assert plain.nbytes(linear, None) == 64 * 64 * 4
    assert half.nbytes(linear, None) == 64 * 64 * 2
    assert plain.nbytes(linear, Scheme(4, 32)) == 64 * 32 + 2 * 64 * 4
    assert plain.nbytes(linear, Scheme(4, 32, symmetric=False)) == 64 * 32 + 2 * 64 * 4 + 64
    assert half.nbytes(linear, Scheme(8, 0, symmetric=False)) == 64 * 64 + 64 * 4
