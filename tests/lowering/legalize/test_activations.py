"""Swish and Gelu lowered, against ONNX Runtime's own."""

from typing import Any

import numpy as np
import pytest

from omforge.lowering.legalize import legalize
from omforge.lowering.target import target

NUMPY = {"float": np.float32, "float16": np.float16}


def feeds(dtype: str) -> dict[str, Any]:
    return {"x": np.linspace(-60, 60, 241).astype(NUMPY[dtype])}


@pytest.mark.parametrize("dtype", ["float", "float16"])
def test_swish_is_x_times_sigmoid(lower: Any, dtype: str) -> None:
    text = f"act ({dtype}[241] x) => ({dtype}[241] y) {{ y = Swish (x) }}"
    lowered = lower(text, feeds(dtype), atol=None if dtype == "float" else 3.2e-2)
    assert lowered.ops == ["Sigmoid", "Mul"]


def test_swish_with_another_alpha(lower: Any) -> None:
    text = "act (float[241] x) => (float[241] y) { y = Swish <alpha = 1.5> (x) }"
    assert lower(text, feeds("float")).ops == ["Mul", "Sigmoid", "Mul"]


@pytest.mark.parametrize("dtype", ["float", "float16"])
@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_gelu(lower: Any, dtype: str, approximate: str) -> None:
    text = f"""
        act ({dtype}[241] x) => ({dtype}[241] y) {{ y = Gelu <approximate = "{approximate}"> (x) }}
    """
    # One rounding of a value up to 60 is 0.03 in fp16; in fp32 a few roundings are 2e-5.
    lowered = lower(text, feeds(dtype), atol=2e-5 if dtype == "float" else 3.2e-2)
    assert ("Tanh" in lowered.ops) == (approximate == "tanh")
    assert ("Erf" in lowered.ops) == (approximate == "none")


@pytest.mark.parametrize("dtype", ["float", "float16"])
@pytest.mark.parametrize("soc", ["Ascend310P3", "Ascend910B4"])
def test_a_swish_of_1_702_is_one_kernel(lower: Any, soc: str, dtype: str) -> None:
    text = f"act ({dtype}[241] x) => ({dtype}[241] y) {{ y = Swish <alpha = 1.702> (x) }}"
    assert lower(text, feeds(dtype), soc=soc).ops == ["NPUFastGelu"]


@pytest.mark.parametrize("op", ["Swish", "Gelu"])
def test_dynamic_shapes_are_lowered_too(text_to_model: Any, op: str) -> None:
    model = text_to_model(f'act (float["seq",8] x) => (float["seq",8] y) {{ y = {op} (x) }}')
    assert legalize(model, target("Ascend310P3")) == 1
    assert all(str(value.shape) == "[seq,8]" for node in model.graph for value in node.outputs)
