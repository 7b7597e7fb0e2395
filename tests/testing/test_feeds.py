"""Example inputs: deterministic, of the declared types, of several sizes."""

import numpy as np
import pytest

from omforge import ir
from omforge.testing import example_feeds, several_feeds

MODEL = ir.from_onnx_text("""<ir_version: 11, opset_import: ["" : 24]>
g (float[N, S, 4] x, float16[N] h, int64[S] i, bool[N, 1] b) => (float[N, S, 4] y) {
    y = Identity (x) }""")


def test_a_symbol_is_one_size_everywhere() -> None:
    feeds = example_feeds(MODEL)
    assert {name: array.shape for name, array in feeds.items()} == {
        "x": (2, 3, 4),
        "h": (2,),
        "i": (3,),
        "b": (2, 1),
    }
    assert [str(array.dtype) for array in feeds.values()] == ["float32", "float16", "int64", "bool"]


def test_sizes_may_be_given() -> None:
    assert example_feeds(MODEL, bindings={"S": 7})["x"].shape[1:] == (7, 4)


def test_an_expression_is_evaluated() -> None:
    model = ir.from_onnx_text("""<ir_version: 11, opset_import: ["" : 24]>
    g (float[past] x, float[total] z) => (float[past] y) { y = Identity (x) }""")
    model.graph.inputs[1].shape = ir.Shape(["past + 2*seq"])
    assert {name: array.shape for name, array in example_feeds(model).items()} == {
        "x": (2,),
        "z": (2 + 2 * 3,),
    }


def test_the_same_seed_gives_the_same_numbers() -> None:
    first, second, third = (example_feeds(MODEL, seed)["x"] for seed in (0, 0, 1))
    assert np.array_equal(first, second)
    assert first.shape != third.shape


def test_one_of_several_is_small_and_one_has_other_sizes() -> None:
    feeds = several_feeds(MODEL)
    assert len({each["x"].shape for each in feeds}) == 2
    assert min(float(np.abs(each["x"]).max()) for each in feeds) < 0.01


def test_an_input_without_a_shape_is_an_error() -> None:
    model = ir.from_onnx_text("""<ir_version: 11, opset_import: ["" : 24]>
    g (float[] x) => (float y) { y = Identity (x) }""")
    model.graph.inputs[0].shape = None
    with pytest.raises(ValueError, match="input x has no shape"):
        example_feeds(model)
