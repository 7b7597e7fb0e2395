"""QuantizeLinear and DequantizeLinear of what a step computes, in plain arithmetic."""

from typing import Any

import numpy as np
import pytest

from omforge import ir
from omforge.lowering.legality import check_legal
from omforge.lowering.legalize import NOT_LEGALIZED, legalize
from omforge.lowering.target import target
from tests.lowering.legalize.test_choices import SOCS

X = np.random.default_rng(0).normal(size=(1, 2, 3, 4)).astype(np.float32) * 40
CODES = np.random.default_rng(0).integers(-128, 128, (1, 2, 3, 4)).astype(np.int8)


@pytest.mark.parametrize("soc", SOCS)
@pytest.mark.parametrize("zero", ["", ", zero"])
def test_integers_are_those_of_the_standard(lower: Any, soc: str, zero: str) -> None:
    lowered = lower(
        f"""g (float[1,2,3,4] x) => (int8[1,2,3,4] y)
        <float[2] scale = {{0.5, 1.25}}, int8[2] zero = {{3, -4}}>
        {{ y = QuantizeLinear <axis = 1{", output_dtype = 3" * (not zero)}> (x, scale{zero}) }}""",
        {"x": X},
        soc=soc,
    )
    assert lowered.ops == ["Div", "Round", *["Add"] * bool(zero), "Clip", "Cast"]
    assert check_legal(lowered.model, target(soc)) == []


@pytest.mark.parametrize("soc", SOCS)
@pytest.mark.parametrize("zero", ["", ", zero"])
def test_floats_are_those_of_the_standard(lower: Any, soc: str, zero: str) -> None:
    lowered = lower(
        f"""g (int8[1,2,3,4] x) => (float[1,2,3,4] y)
        <float[2] scale = {{0.5, 1.25}}, int8[2] zero = {{3, -4}}>
        {{ y = DequantizeLinear <axis = 1> (x, scale{zero}) }}""",
        {"x": CODES},
        soc=soc,
    )
    assert lowered.ops == ["Cast", *["Sub"] * bool(zero), "Mul"]
    assert check_legal(lowered.model, target(soc)) == []


def test_one_scale_for_all(lower: Any) -> None:
    lowered = lower(
        """g (int8[1,2,3,4] x) => (float[1,2,3,4] y) <float scale = {0.5}>
        { y = DequantizeLinear (x, scale) }""",
        {"x": CODES},
    )
    assert lowered.ops == ["Cast", "Mul"]


def test_halves_go_to_the_even_integer(lower: Any) -> None:
    lowered = lower(
        """g (float[4] x) => (int8[4] y) <float scale = {1.0}>
        { y = QuantizeLinear <output_dtype = 3> (x, scale) }""",
        {"x": np.array([0.5, 1.5, -2.5, 300], np.float32)},
    )
    assert lowered.found[0].tolist() == [0, 2, -2, 127]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (
            """g (float[2,2,3] x) => (float[2,2,4] y)
            <int8[2,3,4] w = {1,2,3,4,5,6,7,8,9,1,2,3,1,2,3,4,5,6,7,8,9,1,2,3}, float s = {1.0}>
            { d = DequantizeLinear (w, s) e = Relu (d) y = MatMul (x, e) }""",
            "keep this layer as it is",
        ),
        (
            """g (float[2,3] x) => (uint8[2,3] y) <float s = {1.0}>
            { y = QuantizeLinear <output_dtype = 2> (x, s) }""",
            "only to int8",
        ),
        (
            "g (int8[2,3] x, float[3] s) => (float[2,3] y) { y = DequantizeLinear (x, s) }",
            "is computed",
        ),
    ],
)
def test_the_rest_is_refused_in_words(text_to_model: Any, text: str, reason: str) -> None:
    model: ir.Model = text_to_model(text)
    legalize(model, target("Ascend910B4"))
    refused = [node.metadata_props.get(NOT_LEGALIZED, "") for node in model.graph]
    assert any(reason in why for why in refused)
