"""Mixtures of experts: the chosen experts' weights are read, where that is less than all."""

from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest

from omforge import ir
from omforge.ir.infer import infer_model
from omforge.ir.numerics import run as run_model
from omforge.ir.numerics import tolerance, within
from omforge.ir.ops import reference_model
from omforge.ir.values import dims, to_shape
from omforge.lowering.air_legality import check_air
from omforge.lowering.legalize import Decision, legalize
from omforge.lowering.legalize.experts import DENSE, EXPERTS, GATHERED
from omforge.lowering.target import target
from omforge.passes import make_pipeline
from omforge.passes.quantize_weights import QuantizeWeights
from omforge.passes.take_choices import TakeChoices
from omforge.passes.turn_weights import TurnWeights
from omforge.passes.ungroup_experts import UngroupExperts
from omforge.testing import parse
from tests.lowering.emit.twins import computed, emitted
from tests.passes.test_take_choices import TEXT as BATCHED
from tests.passes.test_ungroup_experts import TEXT

SOCS = ("Ascend310P3", "Ascend910B4", "Ascend310B4")


def raised(tokens: int, *steps: str) -> ir.Model:
    """Three experts of which a token chooses two, with numbers for its sizes."""
    model = parse(TEXT)
    UngroupExperts().run(model)
    for value in model.graph.inputs:
        shape = dims(value) or ()
        value.shape = to_shape([tokens, *shape[1:]])
    infer_model(model)
    make_pipeline(",".join(("fold-constants", "remove-no-ops", *steps))).run(model)
    infer_model(model)
    return model


def feeds(tokens: int) -> dict[str, Any]:
    random = np.random.default_rng(tokens)
    x, scores = (random.standard_normal((tokens, size)) for size in (4, 3))
    scores[0] = 1.0  # a tie, which the first two win
    return {"x": x.astype(np.float32), "scores": scores.astype(np.float32)}


def run(model: ir.Model, fed: dict[str, Any]) -> dict[str, Any]:
    """What a model gives, target operators by their bodies, integers as wide as it wants them."""
    kinds = {v.name: v.dtype.numpy() for v in model.graph.inputs if v.dtype is not None}
    given = {name: array.astype(kinds[name]) for name, array in fed.items()}
    lowered = model.opset_imports[""] == 16
    return run_model(reference_model(model) if lowered else model, given)


def decided(model: ir.Model, soc: str = "Ascend910B4", **forms: str) -> Decision:
    told: list[Decision] = []
    legalize(model, target(soc), forms=forms, told=told)
    (decision,) = [each for each in told if each.op == EXPERTS]
    return decision


@pytest.mark.parametrize("tokens", [1, 2, 5])
@pytest.mark.parametrize("soc", SOCS)
def test_gathered_weights_give_the_same_numbers(tokens: int, soc: str) -> None:
    before, model = parse(TEXT), raised(tokens)
    assert decided(model, soc, **{EXPERTS: GATHERED}).form == GATHERED
    products = [node for node in model.graph if node.op_type == "MatMul"]
    weights = [p.inputs[1] for p in products]
    assert [dims(w) for w in weights if w] == [(2 * tokens, 4, 2), (2 * tokens, 2, 4)]
    expected, got = run(before, feeds(tokens)), run(model, feeds(tokens))
    assert within(got["y"], expected["y"], tolerance("float32"))


def test_few_experts_are_all_computed() -> None:
    """Two of three experts: the gathered weights would be read, written and read."""
    model = raised(1)
    decision = decided(model)
    assert decision.form == DENSE
    (refusal,) = decision.refused
    assert (refusal.form, refusal.reason) == (GATHERED, "it moves more bytes")
    assert refusal.traffic[0].total > decision.traffic[0].total


def many(experts: int, tokens: int, width: int = 64) -> ir.Model:
    """Experts of one product each, of which a token chooses one."""
    model = parse(f"""<ir_version: 11, opset_import: ["" : 24]>
    g (float16[{tokens}, {width}] x, int64[{tokens}] choices, float16[{experts}, {width}, {width}] w)
        => (float16[{tokens}, {width}] y)
    <int64[2] flat = {{-1, {width}}}, int64 count = {{{tokens}}}, int64 zero = {{0}},
     int64 one = {{1}}> {{
        token = Range (zero, count, one)
        all = MatMul (x, w)
        rows = Reshape (all, flat)
        before = Mul (choices, count)
        index = Add (before, token)
        y = Gather <axis = 0> (rows, index)
    }}""")
    random = np.random.default_rng(0)
    numbers = random.standard_normal((experts, width, width)).astype(np.float16)
    weight = model.graph.inputs.pop()
    weight.const_value = ir.tensor(numbers, name="w")
    model.graph.register_initializer(weight)
    infer_model(model)
    make_pipeline("fold-constants,remove-no-ops").run(model)
    infer_model(model)
    return model


@pytest.mark.parametrize(
    ("experts", "tokens", "form"),
    [(4, 1, GATHERED), (64, 8, GATHERED), (2, 1, DENSE), (8, 4, DENSE), (16, 64, DENSE)],
)
def test_the_form_that_moves_fewer_bytes_is_taken(experts: int, tokens: int, form: str) -> None:
    """A weight that is gathered is read, written and read: a third of the experts is the limit."""
    decision = decided(many(experts, tokens))
    assert decision.form == form
    (refusal,) = decision.refused
    assert decision.traffic[0].total < refusal.traffic[0].total


def fed_to(tokens: int, experts: int) -> dict[str, Any]:
    random = np.random.default_rng(1)
    x = random.standard_normal((tokens, 64)).astype(np.float16)
    return {"x": x, "choices": random.integers(0, experts, tokens)}


@pytest.mark.parametrize("soc", SOCS)
@pytest.mark.parametrize("group", [0, 32])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("turned", [False, True])
def test_int8_is_gathered_as_int8(soc: str, group: int, symmetric: bool, turned: bool) -> None:
    """A2 multiplies by what was gathered; 310P and 310B have no kernel for it, and dequantise."""
    model = many(64, 2)
    QuantizeWeights(8, group, symmetric).run(model)
    if turned:
        assert TurnWeights().run(model) == 1
    fed = fed_to(2, 64)
    expected = run(model, fed)["y"].astype(np.float32)
    assert decided(model, soc).form == GATHERED
    kinds = [node.op_type for node in model.graph]
    assert kinds.count("NPUWeightQuantBatchMatmulV2") == (2 if soc == "Ascend910B4" else 0)
    gathers = [node.inputs[0] for node in model.graph if node.op_type == "Gather"]
    assert ir.DataType.INT8 in [value.dtype for value in gathers if value is not None]
    assert within(run(model, fed)["y"].astype(np.float32), expected, tolerance("float16"))


@pytest.mark.parametrize("symmetric", [True, False])
def test_int4_is_gathered_where_a_kernel_takes_it(symmetric: bool) -> None:
    model = many(64, 2)
    QuantizeWeights(4, 32, symmetric).run(model)
    fed = fed_to(2, 64)
    expected = run(model, fed)["y"].astype(np.float32)
    assert decided(model).form == GATHERED
    assert within(run(model, fed)["y"].astype(np.float32), expected, tolerance("float16"))
    other = many(64, 2)
    QuantizeWeights(4, 32, symmetric).run(other)
    decision = decided(other, "Ascend310P3")
    assert decision.form == DENSE
    assert decision.refused[0].reason.startswith("Gather takes no INT4, and 310p has no kernel")


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("turned", [False, True])
def test_every_expert_has_a_product_of_its_own_where_all_are_computed(
    bits: Literal[4, 8], turned: bool
) -> None:
    model = many(4, 6)
    QuantizeWeights(bits, 32).run(model)
    if turned:
        TurnWeights().run(model)
    random = np.random.default_rng(1)
    fed = {
        "x": random.standard_normal((6, 64)).astype(np.float16),
        "choices": random.integers(0, 4, 6),
    }
    expected = run(model, fed)["y"].astype(np.float32)
    decided(model)
    kinds = [node.op_type for node in model.graph]
    assert kinds.count("NPUWeightQuantBatchMatmulV2") == 4
    got = run(model, fed)["y"].astype(np.float32)
    assert within(got, expected, tolerance("float16"))


@pytest.mark.parametrize("bits", [16, 8, 4])
@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("soc", SOCS)
def test_ge_graphs_gather_the_same(bits: int, turned: bool, soc: str) -> None:
    """The law for .air files takes them, and their twin gives the same numbers."""
    model = many(64, 2)
    if bits < 16:
        (QuantizeWeights(8) if bits == 8 else QuantizeWeights(4, 32)).run(model)
        if turned:
            assert TurnWeights().run(model) == 1
    fed = fed_to(2, 64)
    expected = run(model, fed)["y"].astype(np.float32)
    told: list[Decision] = []
    legalize(model, target(soc), "air", told=told)
    if bits == 4 and (turned or soc != "Ascend910B4"):
        assert told[0].form == DENSE
        return
    assert told[0].form == GATHERED
    air, names = emitted(model)
    found = check_air(air, target(soc), path=Path("experts.air"))
    assert [item for item in found if item.level == "error"] == []
    narrow = {"x": fed["x"], "choices": fed["choices"].astype(np.int32)}
    got = computed(air, narrow, names)["y"].astype(np.float32)
    assert within(got, expected, tolerance("float16"))


def test_tokens_that_are_copied_for_each_expert_are_read_once() -> None:
    text = BATCHED.replace("float[b, s, 2]", "float[1, 2, 2]").replace("float[n, 3]", "float[2, 3]")
    before, model = parse(text), parse(text)
    TakeChoices().run(model)
    make_pipeline("fold-constants,remove-no-ops").run(model)
    infer_model(model)
    assert decided(model, **{EXPERTS: GATHERED}).form == GATHERED
    assert "Tile" not in {node.op_type for node in model.graph}
    random = np.random.default_rng(0)
    fed = {
        "x": random.standard_normal((1, 2, 2)).astype(np.float32),
        "scores": random.standard_normal((2, 3)).astype(np.float32),
    }
    assert within(run(model, fed)["y"], run(before, fed)["y"], tolerance("float32"))
