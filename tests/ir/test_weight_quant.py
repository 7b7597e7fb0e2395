"""The reference bodies of NPUWeightQuantBatchMatmulV2, by the formula of its document."""

from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir
import pytest

from omforge import ir
from omforge.ir.errors import InputError
from omforge.ir.numerics import run
from omforge.ir.ops import reference_model
from omforge.ir.weight_quant import INPUTS

Array = npt.NDArray[Any]
K, N, GROUP = 40, 16, 32

RNG = np.random.default_rng(0)
X = RNG.integers(-4, 5, (3, K)).astype(np.float16)
CODES = RNG.integers(-8, 8, (K, N)).astype(np.int8)
SCALE = np.exp2(RNG.integers(-3, 2, (2, N))).astype(np.float16)
OFFSET = RNG.integers(-3, 4, (2, N)).astype(np.float16)
BIAS = RNG.integers(-3, 4, N).astype(np.float16)


def pack(codes: Array) -> Array:
    """Eight int4 of the last axis in an int32, the first in the low bits."""
    digits = (codes.astype(np.int64) & 15).reshape(*codes.shape[:-1], -1, 8)
    words = (digits << (4 * np.arange(8))).sum(-1)
    return words.astype(np.uint32).view(np.int32).reshape(words.shape)


def call(weight: onnx_ir.TensorProtocol, turned: bool, **given: Array) -> ir.Model:
    """A graph with one call; `given` are the other inputs by name, and perhaps groups."""
    initializers = {"w": weight, **{name: onnx_ir.tensor(a) for name, a in given.items()}}
    names = [name if name in given or name == "x" else "" for name in INPUTS]
    names[1] = "t" if turned else "w"
    grouped = given["antiquant_scale"].shape[0] == 2
    size = f"<antiquant_group_size = {GROUP}>" * grouped
    turn = "t = Transpose <perm = [1, 0]> (w)" if turned else ""
    head = ", ".join(["w", *given])
    model = ir.from_onnx_text(f"""<ir_version: 10, opset_import: ["" : 16]>
        g (float16[3, {K}] x, {", ".join(f"float16 {n}" for n in head.split(", "))})
            => (float16[3, {N}] y)
        {{ {turn} y = NPUWeightQuantBatchMatmulV2 {size}
           ({", ".join(n or '""' for n in names).rstrip(' ",')}) }}""")
    for value in list(model.graph.inputs)[1:]:
        tensor = initializers[value.name or ""]
        model.graph.inputs.remove(value)
        value.const_value, value.type = tensor, onnx_ir.TensorType(tensor.dtype)
        value.shape = onnx_ir.Shape(tensor.shape)
        model.graph.register_initializer(value)
    return model


def expected(scale: Array, offset: Array | None, bias: Array | None) -> Array:
    """Y = x @ ((weight + offset) * scale) + bias."""

    def each(of: Array) -> Array:
        return of[np.arange(K) // GROUP] if of.shape[0] == 2 else of

    shifted = CODES.astype(np.float32) + (0 if offset is None else each(offset))
    y = X.astype(np.float32) @ (shifted * each(scale).astype(np.float32))
    return y + (0 if bias is None else bias)


def stored(kind: str, turned: bool) -> onnx_ir.TensorProtocol:
    """The weight as it is stored."""
    codes = CODES.T.copy() if turned else CODES
    if kind == "int8":
        return onnx_ir.tensor(codes)
    if kind == "int32":
        return onnx_ir.tensor(pack(codes))
    return onnx_ir.tensor(codes, dtype=onnx_ir.DataType.INT4)


@pytest.mark.parametrize("kind", ["int8", "int32", "int4"])
@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("with_offset", [False, True])
@pytest.mark.parametrize("with_bias", [False, True])
def test_the_body_is_the_formula(
    kind: str, turned: bool, grouped: bool, with_offset: bool, with_bias: bool
) -> None:
    scale, offset = (SCALE, OFFSET) if grouped else (SCALE[:1], OFFSET[:1])
    given = {"antiquant_scale": scale}
    given |= {"antiquant_offset": offset} if with_offset else {}
    given |= {"bias": BIAS} if with_bias else {}
    model = call(stored(kind, turned), turned, **given)
    (y,) = run(reference_model(model), {"x": X}).values()
    wanted = expected(scale, offset if with_offset else None, BIAS if with_bias else None)
    np.testing.assert_allclose(y.astype(np.float32), wanted, rtol=1e-3, atol=0)


@pytest.mark.parametrize("stored_in_graph", [True, False])
def test_every_bit_pattern_of_a_word_is_read(stored_in_graph: bool) -> None:
    """By a table where the weight is stored, else by arithmetic."""
    words = np.array([0, -1, 2**31 - 1, -(2**31), 0x12345678, -0x12345678], np.int32)
    digits = ((words.view(np.uint32)[:, None] >> (4 * np.arange(8, dtype=np.uint32))) & 15) ^ 8
    inputs = "float16[6, 6] x, float16[8] s, int32[6, 1] w"
    weight = "<int32[6, 1] w = {0, -1, 2147483647, -2147483648, 305419896, -305419896}>"
    if stored_in_graph:
        inputs = inputs.removesuffix(", int32[6, 1] w")
    model = ir.from_onnx_text(f"""<ir_version: 10, opset_import: ["" : 16]>
        g ({inputs}) => (float16[6, 8] y) {weight * stored_in_graph}
        {{ y = NPUWeightQuantBatchMatmulV2 (x, w, s) }}""")
    feeds = {"x": np.eye(6, dtype=np.float16), "s": np.ones(8, np.float16)}
    feeds |= {} if stored_in_graph else {"w": words[:, None]}
    (y,) = run(reference_model(model), feeds).values()
    np.testing.assert_array_equal(y, digits.astype(np.int64) - 8)


def test_words_along_k_are_read_by_arithmetic() -> None:
    """Packed along K without a Transpose in front, as the infershape takes it too."""
    codes = np.random.default_rng(1).integers(-8, 8, (16, 8)).astype(np.int8)
    model = ir.from_onnx_text("""<ir_version: 10, opset_import: ["" : 16]>
        g (float16[16, 16] x, float16[8] s, int32[2, 8] w) => (float16[16, 8] y)
        { y = NPUWeightQuantBatchMatmulV2 (x, w, s) }""")
    words = pack(codes.T.copy()).T.copy()
    feeds = {"x": np.eye(16, dtype=np.float16), "s": np.ones(8, np.float16), "w": words}
    (y,) = run(reference_model(model), feeds).values()
    np.testing.assert_array_equal(y, codes)


def test_a_quantised_output_has_no_reference() -> None:
    model = call(
        stored("int8", False),
        False,
        antiquant_scale=SCALE[:1],
        quant_scale=np.ones(1, np.float32),
    )
    with pytest.raises(InputError, match="quantises its output"):
        reference_model(model)


def test_a_product_is_rounded_where_a_float_one_is() -> None:
    """ONNX Runtime computes neighbouring float16 nodes in float32; a cast in a body would end that."""
    x = RNG.normal(size=(3, K)).astype(np.float16)
    quantised = call(onnx_ir.tensor(CODES), False, antiquant_scale=SCALE[:1])
    floats = ir.from_onnx_text(f"""<ir_version: 10, opset_import: ["" : 16]>
        g (float16[3, {K}] x, float16[{K}, {N}] w) => (float16[3, {N}] y) {{ y = MatMul (x, w) }}""")
    weight = CODES.astype(np.float16) * SCALE[0]  # exact: scales are powers of two
    found: list[Array] = []
    for model, feeds in ((quantised, {"x": x}), (floats, {"x": x, "w": weight})):
        y = model.graph.outputs[0]
        squared = ir.node("Mul", [y, y])
        squared.outputs[0].name, squared.outputs[0].type = "squared", y.type
        squared.outputs[0].shape = y.shape
        model.graph.append(squared)
        model.graph.outputs[0] = squared.outputs[0]
        found.append(run(reference_model(model), feeds)["squared"])
    np.testing.assert_array_equal(found[0], found[1])
