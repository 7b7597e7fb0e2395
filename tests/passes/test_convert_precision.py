"""convert-precision: what becomes half, and what must not."""

import dataclasses

import numpy as np
import pytest

from omforge import ir
from omforge.ir import numerics
from omforge.ir.bfloat16 import BFLOAT16
from omforge.ir.values import constant
from omforge.passes.convert_precision import ConvertPrecision
from omforge.passes.fuse_rotary import FuseRotary
from omforge.rewriting.events import events
from omforge.testing import example_feeds, outline, parse
from tests.passes.blocks import Block, named, steps

FLOAT, HALF = ir.DataType.FLOAT, ir.DataType.FLOAT16
OPEN = '<ir_version: 11, opset_import: ["" : 24]>\n'


def converted(text: str, dtype: str = "fp16") -> ir.Model:
    model = parse(OPEN + text)
    ConvertPrecision(dtype).run(model)  # type: ignore[arg-type]
    ir.check(model)
    return model


def lines(text: str) -> list[str]:
    """The outline of a text in which `half` stands for float16."""
    return outline(parse(OPEN + text))


def test_converts_weights_inputs_and_outputs() -> None:
    model = converted("""g (float[N, 2] x, int64[N] i) => (float[N, 2] y, int64[N] j)
    <float[2, 2] w = {1, 2, 3, 4}, int64[1] one = {1}> {
        a = MatMul (x, w) j = Add (i, one) f = Cast <to = 1> (j)
        u = Unsqueeze (f, one) y = Mul (a, u)
    }""")
    types = {v.name: v.dtype for v in (*model.graph.inputs, *model.graph.outputs)}
    assert types == {"x": HALF, "i": ir.DataType.INT64, "y": HALF, "j": ir.DataType.INT64}
    weights = {name: v.dtype for name, v in model.graph.initializers.items()}
    assert weights == {"w": HALF, "one": ir.DataType.INT64}
    (cast,) = [node for node in model.graph if node.op_type == "Cast"]
    assert cast.attributes["to"].as_int() == HALF


def test_buckets_of_distances_are_those_of_float() -> None:
    """T5's: a logarithm over a logarithm, cut to an integer, which half precision cuts beside it."""
    text = """g (int64[N] distance) => (float[N, 1] y)
<float exact = {8.0}, float ratio = {2.7725887}, float steps = {8.0}, float[32, 1] table> {
    far = Cast <to = 1> (distance) a = Div (far, exact) b = Log (a) c = Div (b, ratio)
    d = Mul (c, steps) bucket = Cast <to = 7> (d) y = Gather (table, bucket) }"""
    numbers = ", ".join(f"{n}.0" for n in range(32))
    text = text.replace("table>", f"table = {{{numbers}}}>")
    feeds = {"distance": np.arange(8, 128, dtype=np.int64)}
    expected = numerics.run(parse(OPEN + text), feeds)["y"]
    assert np.array_equal(numerics.run(converted(text), feeds)["y"], expected.astype(np.float16))


def test_counts_stay_in_float() -> None:
    """Experts that 3,000 tokens chose: in half precision, 2,048 + 1 is 2,048."""
    model = converted("""g (int64[n] chosen, float[n] x) => (int64[2] ends, float[n] y)
    <float[2] none = {0, 0}, float one = {1}, int64 i_0 = {0}> {
        all = Shape (chosen) ones = Expand (one, all)
        count = ScatterElements <reduction = "add"> (none, chosen, ones)
        whole = Cast <to = 7> (count) ends = CumSum (whole, i_0) y = Mul (x, one)
    }""")
    dtypes = {v.name: v.dtype for node in model.graph for v in node.outputs}
    assert (dtypes["count"], dtypes["y"]) == (FLOAT, HALF)
    chosen = np.arange(6001) % 2
    feeds = {"chosen": chosen, "x": np.ones(6001, np.float16)}
    assert numerics.run(model, feeds)["ends"].tolist() == [3001, 6001]


def test_what_is_computed_of_integers_and_stays_a_float_is_converted() -> None:
    model = converted("""g (int64[n] i, float[n] x) => (float[n] y) {
        f = Cast <to = 1> (i) y = Mul (x, f)
    }""")
    assert {v.dtype for node in model.graph for v in node.outputs} == {HALF}


def test_to_bfloat16_what_counts_and_what_turns_stays_in_float() -> None:
    """bfloat16 has no odd number above 256: positions and their cosines are float32."""
    model = converted(
        """g (float[N, 2] x, int64[N, 1] p) => (float[N, 2] y)
    <float[2] w = {1, 2}, float[2] r = {3, 4}> {
        f = Cast <to = 1> (p) a = Mul (f, w) c = Cos (a) b = Mul (x, r) y = Add (b, c) }""",
        "bf16",
    )
    three, four = np.array([3, 4], BFLOAT16).view(np.uint16)
    assert outline(model) == lines(f"""g (bfloat16[N, 2] x, int64[N, 1] p) => (bfloat16[N, 2] y)
    <float[2] w = {{1, 2}}, bfloat16[2] r = {{{three}, {four}}}> {{
        f = Cast <to = 1> (p) a = Mul (f, w) c = Cos (a) b = Mul (x, r)
        h = Cast <to = 16> (c) y = Add (b, h) }}""")
    feeds = {"x": np.ones((2, 2), BFLOAT16), "p": np.array([[0], [301]])}
    expected = np.cos(feeds["p"] * np.array([1.0, 2.0])) + np.array([3, 4])
    found = numerics.run(model, feeds)["y"].astype(np.float64)
    np.testing.assert_allclose(found, expected, atol=2.0**-6)


def test_a_weight_beyond_float16_stays_what_it_is_in_bfloat16() -> None:
    text = "g (float[2] x) => (float[2] y) <float[2] w = {100000, 2}> { y = Mul (x, w) }"
    model = converted(text, "bf16")
    assert not events(model)
    assert constant(model.graph.initializers["w"]).tolist() == [99840, 2]  # type: ignore[union-attr]
    assert len(events(converted(text))) == 1


def test_finds_nothing_in_a_second_run() -> None:
    model = named(dataclasses.replace(Block(rotary="half")))
    assert ConvertPrecision().run(model) > 0
    assert ConvertPrecision().run(model) == 0


@pytest.mark.parametrize("rotary", ["half", "interleaved"])
def test_angles_stay_in_float(rotary: str) -> None:
    """At position 4,000 an angle in half precision is off by whole radians."""
    block = Block(rotary=rotary, size=8)
    original, model = named(block), named(block)
    for step in (FuseRotary(), ConvertPrecision()):
        step.run(model)
    ir.check(model)
    values = {v.name: v for node in model.graph for v in node.outputs}
    angles = [node for node in model.graph if node.op_type in ("Cos", "Sin")]
    assert angles
    for node in angles:
        assert node.inputs[0] is not None
        assert node.inputs[0].dtype == FLOAT
        (user,) = node.outputs[0].consumers()
        assert user.op_type == "Cast"
    assert values["q"].dtype == HALF
    for feeds in steps(block):
        feeds["position_ids"] = feeds["position_ids"] + 3999
        half = {k: v.astype(np.float16) if v.dtype == np.float32 else v for k, v in feeds.items()}
        expected, got = numerics.run(original, feeds), numerics.run(model, half)
        allowed = numerics.TOLERANCES["float16"]
        assert numerics.within(got["present_key"], expected["present_key"], allowed)


def test_a_weight_of_both_kinds_is_cast_where_it_meets_the_converted() -> None:
    model = converted("""g (float[N, 2] x, int64[N, 1] p) => (float[N, 2] y)
    <float[2] w = {1, 2}> {
        f = Cast <to = 1> (p) a = Mul (f, w) c = Cos (a) b = Mul (x, w) y = Add (b, c) }""")
    assert outline(model)[2:] == [
        "%3 = Cast<to=1>(p)",
        "%4 = Mul(%3, float[2]{1, 2})",
        "%5 = Cos(%4)",
        "%6 = Cast<to=10>(float[2]{1, 2})",
        "%7 = Mul(x, %6)",
        "%8 = Cast<to=10>(%5)",
        "y = Add(%7, %8)",
        "output y: FLOAT16[N,2]",
    ]


def test_what_a_half_precision_model_computes_in_float_stays_so() -> None:
    text = """g (float16[N, 2] x) => (float16[N, 2] y) <float two = {2.0}, float16[2] w = {1, 2}> {
        a = Cast <to = 1> (x) b = Pow (a, two) c = Cast <to = 10> (b) y = Mul (c, w) }"""
    model = parse(OPEN + text)
    assert ConvertPrecision().run(model) == 0
    assert outline(model) == lines(text)


def test_float_that_reaches_an_output_does_not() -> None:
    """Stored in half and computed in float: then float is what the model is in."""
    model = converted("""g (float[N, 2] x) => (float[N, 2] y, float[N, 2] z)
    <float16[2] w = {1, 2}> {
        a = Cast <to = 1> (w) y = Mul (x, a) h = Cast <to = 10> (x) z = Cast <to = 1> (h) }""")
    assert [value.dtype for value in model.graph.outputs] == [HALF, HALF]


def test_goes_back_to_float() -> None:
    text = """g (float16[N, 2] x, int64[N, 1] p) => (float16[N, 2] y)
    <float16[2] w = {15360, 16384}> {
        f = Cast <to = 10> (p) c = Cos (f) a = Mul (x, w) b = Add (a, c)
        y = RMSNormalization <stash_type = 10> (b, w) }"""
    model = converted(text, "fp32")
    assert {v.dtype for node in model.graph for v in node.outputs} == {FLOAT}
    norm = next(node for node in model.graph if node.op_type == "RMSNormalization")
    assert norm.attributes["stash_type"].as_int() == FLOAT
    before = parse(OPEN + text)
    feeds = example_feeds(before)
    wide = {k: v.astype(np.float32) if v.dtype == np.float16 else v for k, v in feeds.items()}
    expected, got = numerics.run(before, feeds)["y"], numerics.run(model, wide)["y"]
    np.testing.assert_allclose(got, expected, rtol=2e-2, atol=2e-2)


def test_a_norm_goes_on_to_sum_in_float() -> None:
    model = converted("""g (float[N, 2] x) => (float[N, 2] y) <float[2] w = {1, 2}> {
        y = RMSNormalization <stash_type = 1> (x, w) }""")
    (norm,) = model.graph
    assert norm.attributes["stash_type"].as_int() == FLOAT


def test_a_layer_norm_stays_in_float_with_its_scale_and_bias() -> None:
    text = """g (float[N, 2] x) => (float[N, 2] y)
    <float[2] scale = {1, 2}, float[2] bias = {3, 4}> {
        a = LayerNormalization (x, scale, bias) b = Neg (a) y = Mul (a, b) }"""
    model = converted(text)
    assert outline(model) == [
        "input x: FLOAT16[N,2]",
        "%2 = Cast<to=1>(x)",
        "%3 = LayerNormalization(%2, float[2]{1, 2}, float[2]{3, 4})",
        "%4 = Cast<to=10>(%3)",
        "%5 = Neg(%4)",
        "y = Mul(%4, %5)",
        "output y: FLOAT16[N,2]",
    ]
    assert ConvertPrecision().run(model) == 0


def test_a_layer_norm_that_leaves_the_graph_is_converted() -> None:
    model = converted("""g (float[N, 2] x) => (float[N, 2] y) <float[2] scale = {1, 2}> {
        y = LayerNormalization (x, scale) }""")
    (norm,) = model.graph
    assert [value.dtype for value in (*norm.inputs, *norm.outputs) if value] == [HALF] * 3


def test_converts_the_numbers_that_nodes_hold() -> None:
    model = converted("""g (float[N, 2] x, int64[1] n) => (float[N, 2] y) {
        a = ConstantOfShape (n) b = ConstantOfShape <value = float[1] {3.0}> (n)
        i = ConstantOfShape <value = int64[1] {3}> (n) f = Cast <to = 1> (i)
        c = Constant <value_float = 0.5> ()
        d = Add (a, b) e = Mul (d, c) g = Add (e, f) y = Add (x, g) }""")
    assert model.graph.outputs[0].dtype == HALF
    feeds = {"x": np.ones((3, 2), np.float16), "n": np.array([2])}
    np.testing.assert_array_equal(numerics.run(model, feeds)["y"], np.full((3, 2), 5.5))


def test_whole_numbers_in_float_stay_exact() -> None:
    """`Range` counts, and half precision cannot count beyond 2,048."""
    model = converted("""g (float[N] x, float n) => (float y)
    <float one = {1.0}, float nought = {0.0}> {
        r = Range (nought, n, one) m = ReduceMax (r) y = Add (x, m) }""")
    feeds = {"x": np.zeros(2, np.float16), "n": np.array(3000, np.float32)}
    assert model.graph.inputs[1].dtype == FLOAT
    np.testing.assert_array_equal(numerics.run(model, feeds)["y"], [3000, 3000])


@pytest.mark.parametrize(
    ("number", "expected", "why"),
    [
        (1e6, 65504.0, "1e+06 is beyond the range of FLOAT16: clipped"),
        (-3e38, -65504.0, "3e+38 is beyond the range of FLOAT16: clipped"),
        (1e-12, 0.0, "1e-12 is below the range of FLOAT16: it becomes 0"),
    ],
)
def test_numbers_out_of_range_are_events(number: float, expected: float, why: str) -> None:
    model = converted(
        f"g (float[N] x) => (float[N] y) <float w = {{{number}}}> {{ y = Add (x, w) }}"
    )
    array = constant(model.graph.initializers["w"])
    assert array is not None
    assert float(array) == expected
    (event,) = events(model)
    assert why in event.reason


def test_infinity_stays_infinite() -> None:
    model = parse(OPEN + "g (float[N] x) => (float[N] y) <float w = {1}> { y = Add (x, w) }")
    numbers = np.array([-np.inf, 1e6, np.nan], np.float32)
    model.graph.initializers["w"].const_value = ir.tensor(numbers, name="w")
    ConvertPrecision().run(model)
    array = constant(model.graph.initializers["w"])
    np.testing.assert_array_equal(array, np.array([-np.inf, 65504, np.nan], np.float16))


def test_large_weights_are_converted_when_they_are_read() -> None:
    model = parse(
        OPEN + "g (float[N, 1] x) => (float y) <float[1, 1] w = {1}> { y = MatMul (x, w) }"
    )
    reads: list[int] = []

    def weight() -> ir.TensorProtocol:
        reads.append(1)
        return ir.tensor(np.full((1, 3000), 1e6, np.float32), name="w")

    lazy = ir.LazyTensor(weight, dtype=FLOAT, shape=ir.Shape([1, 3000]), name="w")
    model.graph.initializers["w"].const_value = lazy
    ConvertPrecision().run(model)
    assert not reads
    array = constant(model.graph.initializers["w"])
    assert array is not None
    assert (array == 65504).all()
    assert len(reads) == 1
    assert "clipped" in events(model)[0].reason


def test_refuses_subgraphs() -> None:
    text = """g (float[4] x, bool c) => (float[4] y) {
        y = If (c) <then_branch = t () => (float[4] a) { a = Neg (x) },
                    else_branch = e () => (float[4] b) { b = Abs (x) }> }"""
    with pytest.raises(ir.InputError, match="it holds a subgraph"):
        ConvertPrecision().run(parse(OPEN + text))


def test_a_block_in_half_precision_gives_the_same_numbers() -> None:
    block = Block(low=-30000.0)
    original, model = named(block), named(block)
    ConvertPrecision().run(model)
    ir.check(model)
    for feeds in steps(block):
        half = {k: v.astype(np.float16) if v.dtype == np.float32 else v for k, v in feeds.items()}
        expected, got = numerics.run(original, feeds), numerics.run(model, half)
        real = feeds["attention_mask"][:, -got["logits"].shape[1] :] != 0
        assert got["logits"].dtype == np.float16
        allowed = numerics.TOLERANCES["float16"]
        assert numerics.within(got["logits"][real], expected["logits"][real], allowed)


def test_what_a_float_island_reads_is_cast_back_to_float() -> None:
    """A rotary table moved about in between, where a half-precision model rotates in float32."""
    model = converted("""g (float16[N, 2] x, int64[N] p) => (float16[N, 2] y)
    <int64[1] one = {1}> {
        position = Cast <to = 1> (p) cosine = Cos (position) table = Unsqueeze (cosine, one)
        up = Cast <to = 1> (x) turned = Mul (up, table) y = Cast <to = 10> (turned)
    }""")
    (product,) = [node for node in model.graph if node.op_type == "Mul"]
    assert [value.dtype for value in product.inputs if value is not None] == [FLOAT, FLOAT]
    (cosine,) = [node for node in model.graph if node.op_type == "Cos"]
    assert cosine.outputs[0].dtype == FLOAT
    feeds = {"x": np.ones((3, 2), np.float16), "p": np.array([0, 1, 4000])}
    got = numerics.run(model, feeds)["y"]
    assert np.allclose(got[:, 0], np.cos([0, 1, 4000]), atol=1e-3)
