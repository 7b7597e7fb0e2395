"""sign-weights: unsigned integers become signed ones, and the weights stay what they were."""

from pathlib import Path

import numpy as np
import pytest

from omforge import ir
from omforge.ir.numerics import run
from omforge.passes.sign_weights import SignWeights
from omforge.rewriting.events import events
from omforge.testing import assert_rewrites, parse

HEADER = '<ir_version: 11, opset_import: ["" : 24]>\n'


def test_a_zero_point_in_the_middle_goes() -> None:
    assert_rewrites(
        SignWeights(),
        HEADER
        + """g (float[N, 2] x) => (float[N, 3] y)
        <uint8[2, 3] q = {128, 129, 0, 255, 1, 127}, float[3] s = {0.5, 1, 2},
         uint8[3] z = {128, 128, 128}>
        { w = DequantizeLinear <axis = 1> (q, s, z) y = MatMul (x, w) }""",
        HEADER
        + """g (float[N, 2] x) => (float[N, 3] y)
        <int8[2, 3] q = {0, 1, -128, 127, -127, -1}, float[3] s = {0.5, 1, 2}>
        { w = DequantizeLinear <axis = 1> (q, s) y = MatMul (x, w) }""",
    )


def test_other_zero_points_move() -> None:
    """Without one it is 0, which is as far below the middle as an integer can be."""
    assert_rewrites(
        SignWeights(),
        HEADER
        + """g (float[N, 2] x) => (float[N, 2] y, float[N, 2] t)
        <uint8[2, 2] q = {128, 129, 0, 255}, uint8[2, 2] p = {1, 2, 3, 4}, float[2] s = {0.5, 1},
         float r = {2.0}, uint8[2] z = {0, 255}>
        { w = DequantizeLinear <axis = 1> (q, s, z) v = DequantizeLinear (p, r)
          y = MatMul (x, w) t = MatMul (x, v) }""",
        HEADER
        + """g (float[N, 2] x) => (float[N, 2] y, float[N, 2] t)
        <int8[2, 2] q = {0, 1, -128, 127}, int8[2, 2] p = {-127, -126, -125, -124},
         float[2] s = {0.5, 1}, float r = {2.0}, int8[2] z = {-128, 127}, int8 m = {-128}>
        { w = DequantizeLinear <axis = 1> (q, s, z) v = DequantizeLinear (p, r, m)
          y = MatMul (x, w) t = MatMul (x, v) }""",
    )


@pytest.mark.parametrize("shape", [(4, 6), (3, 5), (2, 3, 4)])
@pytest.mark.parametrize("zeros", [True, False])
def test_four_bits_in_groups(shape: tuple[int, ...], zeros: bool, tmp_path: Path) -> None:
    random = np.random.default_rng(len(shape))
    uint4 = ir.DataType.UINT4.numpy()
    of_scale = (*shape[:-1], -(-shape[-1] // 4))
    given = f", uint4{list(of_scale)} z" if zeros else ""
    model = parse(
        HEADER
        + f"""g (float x, uint4{list(shape)} q, float{list(of_scale)} s{given})
        => (float{list(shape)} y)
        {{ w = DequantizeLinear <axis = -1, block_size = 4> (q, s{", z" * zeros})
          y = Mul (w, x) }}"""
    )
    arrays = {
        "q": random.integers(0, 16, shape).astype(uint4),
        "s": random.uniform(0.1, 1, of_scale).astype(np.float32),
    } | ({"z": random.integers(0, 16, of_scale).astype(uint4)} if zeros else {})
    for value in [value for value in model.graph.inputs if value.name in arrays]:
        value.const_value = ir.tensor(arrays[value.name or ""], name=value.name)
        model.graph.inputs.remove(value)
        model.graph.register_initializer(value)
    feeds = {"x": np.array(1, np.float32)}
    expected = run(model, feeds)["y"]
    assert SignWeights().run(model) == 1
    ir.check(model)
    np.testing.assert_array_equal(run(model, feeds)["y"], expected)
    ir.save(model, tmp_path / "m.onnx", external="m.bin", threshold=1)
    loaded = ir.load(tmp_path / "m.onnx")
    assert not any(v.dtype == ir.DataType.UINT4 for v in loaded.graph.initializers.values())
    np.testing.assert_array_equal(run(loaded, feeds)["y"], expected)


def test_two_nodes_that_read_the_same_integers_still_do() -> None:
    model = parse(
        HEADER
        + """g (float[N, 2] x) => (float[N, 2] y)
        <uint8[2, 2] q = {1, 2, 3, 4}, float s = {2.0}, uint8 z = {128}>
        { a = DequantizeLinear (q, s, z) b = DequantizeLinear (q, s, z)
          c = MatMul (x, a) y = MatMul (c, b) }"""
    )
    assert SignWeights().run(model) == 2
    assert sum(v.dtype == ir.DataType.INT8 for v in model.graph.initializers.values()) == 1


def test_constant_nodes_are_constants() -> None:
    model = parse(
        HEADER
        + """g (float[N, 2] x) => (float[N, 2] y) {
        q = Constant <value = uint8[2, 2] {1, 2, 3, 4}> () s = Constant <value_float = 2.0> ()
        z = Constant <value = uint8 {128}> ()
        w = DequantizeLinear (q, s, z) y = MatMul (x, w) }"""
    )
    feeds = {"x": np.ones((1, 2), np.float32)}
    expected = run(model, feeds)["y"]
    assert SignWeights().run(model) == 1
    np.testing.assert_array_equal(run(model, feeds)["y"], expected)


def test_activations_and_signed_weights_are_left_alone() -> None:
    model = parse(
        HEADER
        + """g (uint8[N, 2] x) => (float[N, 2] y)
        <int8[2, 2] q = {1, 2, 3, 4}, float s = {2.0}>
        { a = DequantizeLinear (x, s) w = DequantizeLinear (q, s) y = MatMul (a, w) }"""
    )
    assert SignWeights().run(model) == 0
    assert not events(model)


def test_an_unknown_zero_point_is_left_alone_and_said() -> None:
    model = parse(
        HEADER
        + """g (float[N, 2] x, uint8 z) => (float[N, 2] y)
        <uint8[2, 2] q = {1, 2, 3, 4}, float s = {2.0}>
        { w = DequantizeLinear (q, s, z) y = MatMul (x, w) }"""
    )
    assert SignWeights().run(model) == 0
    assert any("are no constants" in event.reason for event in events(model))
