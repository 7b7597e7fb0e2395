"""Standard operators whose plugins do less than ONNX says."""

from typing import Any

import numpy as np
import pytest

from omforge.lowering.legality import check_legal
from omforge.lowering.legalize import legalize
from omforge.lowering.target import target


def floats(*shape: int) -> Any:
    return np.random.default_rng(sum(shape)).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("attributes", ["start = 1", "end = -1", "start = -2, end = 3"])
def test_shape_of_some_axes_is_a_slice_of_the_whole(lower: Any, attributes: str) -> None:
    lowered = lower(
        f"g (float[2,3,4] x) => (int64[n] y) {{ y = Shape <{attributes}> (x) }}",
        {"x": floats(2, 3, 4)},
    )
    assert lowered.ops == ["Shape", "Slice"]
    assert not lowered.model.graph[0].attributes


def test_a_clip_of_nothing_goes(lower: Any) -> None:
    text = "g (float[4] x) => (float[4] y) { z = Clip (x)  y = Neg (z) }"
    assert lower(text, {"x": floats(4)}).ops == ["Neg"]


def test_a_clip_of_one_side_stays(lower: Any) -> None:
    text = "g (float[4] x, float least) => (float[4] y) { y = Clip (x, least) }"
    feeds = {"x": floats(4), "least": np.array(0, np.float32)}
    assert lower(text, feeds).ops == ["Clip"]


def test_fmod_is_what_the_device_does(lower: Any) -> None:
    for kind, numbers in (("float", np.float32), ("int32", np.int32)):
        text = f"g ({kind}[6] x, {kind}[6] y) => ({kind}[6] z) {{ z = Mod <fmod = 1> (x, y) }}"
        feeds = {
            "x": np.array([5, -5, 5, -5, 0, 7], numbers),
            "y": np.array([2, 2, -2, -2, 3, 3], numbers),
        }
        assert lower(text, feeds).ops == ["Mod"]


def test_mod_takes_the_sign_of_the_divisor(lower: Any) -> None:
    text = "g (int32[6] x, int32[6] y) => (int32[6] z) { z = Mod (x, y) }"
    feeds = {
        "x": np.array([5, -5, 5, -5, 0, 7], np.int32),
        "y": np.array([2, 2, -2, -2, 3, 3], np.int32),
    }
    lowered = lower(text, feeds)  # which compares with ONNX Runtime
    assert lowered.ops == ["Mod", "Add", "Mod"]
    assert {
        node.attributes["fmod"].as_int() for node in lowered.model.graph if node.attributes
    } == {1}


def test_mod_of_what_is_never_negative_stays(lower: Any) -> None:
    text = """g (float[2,8] x) => (int64[2,2] z) <int64[1] k = {2}, int64 n = {3}>
        { v, rows = TopK (x, k) z = Mod (rows, n) }"""
    feeds = {"x": floats(2, 8)}
    assert [op for op in lower(text, feeds).ops if op == "Mod"] == ["Mod"]


@pytest.mark.parametrize(
    ("batch_dims", "indices", "result"), [(1, [2, 2, 1], [2, 2, 4]), (2, [2, 3, 1], [2, 3])]
)
def test_gather_nd_counts_its_batches_itself(
    lower: Any, batch_dims: int, indices: list[int], result: list[int]
) -> None:
    text = f"""
        g (float[2,3,4] x, int64{indices} i) => (float{result} y)
        {{ y = GatherND <batch_dims = {batch_dims}> (x, i) }}
    """
    rows = np.random.default_rng(0).integers(0, 3, indices)
    lowered = lower(text, {"x": floats(2, 3, 4), "i": rows})
    assert lowered.ops[-2:] == ["Concat", "GatherND"]


def test_top_k_says_in_ge_what_onnx_says(lower: Any) -> None:
    """Routing of a mixture of experts: the two best of four, as one-hot rows."""
    text = """
        route (float[5,4] scores) => (float[5,2] best, float[5,2,4] rows)
        <int64[1] k = {2}, int64 experts = {4}, float[2] values = {0.0, 1.0}>
        {
            best, at = TopK <axis = -1> (scores, k)
            rows = OneHot <axis = -1> (at, experts, values)
        }
    """
    lowered = lower(text, {"scores": floats(5, 4)})
    assert lowered.ops == ["TopK", "Cast", "OneHot"]
    assert legalize(lowered.model, target("Ascend310P3")) == 0


def test_one_hot_adds_numbers_of_one_dtype(text_to_model: Any) -> None:
    """ONNX Runtime has no kernel for these dtypes; what a OneHot gives depends on numbers alone."""
    model = text_to_model("""
        g (int32[3] at) => (float[3,4] rows) <int64 depth = {4}, float[2] values = {0.0, 1.0}>
        { rows = OneHot <axis = -1> (at, depth, values) }
    """)
    assert legalize(model, target("Ascend310P3")) == 1
    (node,) = model.graph
    assert [value.dtype.name for value in node.inputs[:2] if value and value.dtype] == ["INT32"] * 2
    depth = node.inputs[1]
    assert depth is not None
    assert depth.const_value is not None
    assert depth.const_value.numpy() == 4


def test_padded_axes_become_all_axes(lower: Any) -> None:
    text = """
        g (float[2,3] x) => (float[2,6] y)
        <int64[2] pads = {1, 2}, float fill = {0.5}, int64[1] axes = {-1}>
        { y = Pad (x, pads, fill, axes) }
    """
    lowered = lower(text, {"x": floats(2, 3)})
    assert len(lowered.model.graph[0].inputs) == 3


def test_mish(lower: Any) -> None:
    text = "g (float[9] x) => (float[9] y) { y = Mish (x) }"
    assert lower(text, {"x": floats(9)}).ops == ["Softplus", "Tanh", "Mul"]


@pytest.mark.parametrize("dtype", ["float", "float16"])
@pytest.mark.parametrize("soc", ["Ascend310P3", "Ascend910B4"])
def test_what_blocks_of_other_models_are_made_of_is_legal(lower: Any, soc: str, dtype: str) -> None:
    """As opset 24 spells it, and with the forms that opset 16 and the plugins know."""
    text = f"""
        block ({dtype}[2,4,4] x, bool[4,4] seen, int64[2,4,1] at,
               {dtype} least, {dtype} highest, {dtype}[4,1] column)
            => ({dtype}[2,4,4] y, {dtype}[2,4,1] most, {dtype}[2,2,4] left, {dtype}[2,2,4] right)
        <int64[1] last = {{-1}}, int64[3] whole = {{2, 4, 4}}, int64 axis = {{1}},
         int64 none = {{0}}>
        {{
            most = ReduceMax <keepdims = 1> (x, last)
            low = Trilu <upper = 0> (x, none)
            masked = Where (seen, low, least)
            wide = Expand (column, whole)
            running = CumSum <exclusive = 0> (wide, axis)
            spread = ScatterElements <axis = 2> (running, at, most)
            total = Add (masked, spread)
            clipped = Clip (total, least, highest)
            y = Mul (clipped, x)
            left, right = Split <axis = 1, num_outputs = 2> (y)
        }}
    """
    kind = np.float32 if dtype == "float" else np.float16
    feeds = {
        "x": floats(2, 4, 4).astype(kind),
        "seen": np.triu(np.ones((4, 4), bool)),
        "at": np.random.default_rng(1).integers(0, 4, (2, 4, 1)),
        "least": np.array(-2, kind),
        "highest": np.array(2, kind),
        "column": np.arange(4, dtype=kind)[:, None],
    }
    lowered = lower(text, feeds, soc=soc)
    assert [
        found for found in check_legal(lowered.model, target(soc)) if found.level == "error"
    ] == []


def test_a_reduction_that_opset_16_does_not_have_is_named(text_to_model: Any) -> None:
    model = text_to_model("""
        g (float[4] x, int64[2] at, float[2] new) => (float[4] y)
        { y = ScatterElements <reduction = "max"> (x, at, new) }
    """)
    soc = target("Ascend310P3")
    legalize(model, soc)
    assert any("ScatterElements" in str(found) for found in check_legal(model, soc))
