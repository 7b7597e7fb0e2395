"""Every form of the front air computes what the canonical operator does, on random shapes."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from omforge import ir
from omforge.ir.numerics import run, tolerance, within
from omforge.lowering.air_legality import check_air
from omforge.lowering.legalize import Decision, legalize
from omforge.lowering.legalize.ge_choices import GE_CHOICES
from omforge.lowering.target import target
from omforge.testing import parse
from tests.lowering.emit.twins import computed, emitted, random

Array = npt.NDArray[Any]
SOCS = {"310p": "Ascend310P3", "910b": "Ascend910B4", "310b": "Ascend310B4"}


def _check(
    text: str, op: str, form: str, soc: str, feeds: Mapping[str, Array]
) -> tuple[dict[str, Array], ir.Model]:
    """Lower one operator to a form, and compare; what the GE graph gave."""
    model = parse(text)
    expected = run(model, feeds)
    told: list[Decision] = []
    legalize(model, target(soc), "air", forms={op: form}, told=told)
    chosen = next(item for item in told if item.op == op)
    assert chosen.form == form, [refusal.reason for refusal in chosen.refused]
    air, names = emitted(model)
    errors = check_air(air, target(soc), path=None)  # type: ignore[arg-type]
    assert [item for item in errors if item.level == "error"] == []
    narrow = {value.name: value.dtype for value in model.graph.inputs}
    given_ = {
        name: array.astype((narrow[name] or ir.DataType.FLOAT).numpy())
        for name, array in feeds.items()
    }
    found = computed(air, given_, names)
    for name, array in expected.items():
        if name in found:
            allowed = tolerance(array.dtype.name)
            assert within(found[name], array, allowed), (name, found[name], array)
    return found, model


sizes = st.integers(1, 3)
families = st.sampled_from(["310p", "910b"])


@settings(max_examples=12, deadline=None)
@given(sizes, sizes, st.sampled_from([16, 48]), st.sampled_from([1e-6, 1e-5, 3e-3]), families)
def test_rms_norm(batch: int, seq: int, width: int, epsilon: float, family: str) -> None:
    shape = f"{batch}, {seq}, {width}"
    text = f"""<ir_version: 11, opset_import: ["" : 24]>
        g (float16[{shape}] x, float16[{width}] gamma) => (float16[{shape}] y)
        {{ y = RMSNormalization <axis = -1, epsilon = {epsilon:f}> (x, gamma) }}"""
    feeds = {"x": random(1, (batch, seq, width)) / 30, "gamma": random(2, (width,))}
    feeds = {name: array.astype(np.float16) for name, array in feeds.items()}
    _check(text, "RMSNormalization", "RmsNorm", SOCS[family], feeds)


@settings(max_examples=8, deadline=None)
@given(sizes, st.sampled_from([16, 48]), st.sampled_from([1e-6, 3e-3]), families)
def test_add_rms_norm(seq: int, width: int, epsilon: float, family: str) -> None:
    shape = f"1, {seq}, {width}"
    text = f"""<ir_version: 11, opset_import: ["" : 24]>
        g (float16[{shape}] a, float16[{shape}] b, float16[{width}] gamma)
            => (float16[{shape}] y, float16[{shape}] z)
        {{ x = Add (a, b)
           y = RMSNormalization <axis = -1, epsilon = {epsilon:f}> (x, gamma)
           z = Neg (x) }}"""
    feeds = {"a": random(1, (1, seq, width)), "b": random(2, (1, seq, width))}
    _, model = _check(
        text,
        "RMSNormalization",
        "AddRmsNorm",
        SOCS[family],
        feeds | {"gamma": random(3, (width,))},
    )
    assert "Add" not in [node.op_type for node in model.graph]


@settings(max_examples=8, deadline=None)
@given(sizes, st.sampled_from([1.0, 1.702]), st.sampled_from(list(SOCS)))
def test_swish(size: int, alpha: float, family: str) -> None:
    text = f"""<ir_version: 11, opset_import: ["" : 24]>
        g (float16[2, {size}] x) => (float16[2, {size}] y)
        {{ y = Swish <alpha = {alpha:f}> (x) }}"""
    _check(text, "Swish", "Swish", SOCS[family], {"x": random(1, (2, size)) * 3})


@settings(max_examples=8, deadline=None)
@given(sizes, st.sampled_from(["none", "tanh"]), st.sampled_from(list(SOCS)))
def test_gelu(size: int, approximate: str, family: str) -> None:
    text = f"""<ir_version: 11, opset_import: ["" : 24]>
        g (float16[2, {size}] x) => (float16[2, {size}] y)
        {{ y = Gelu <approximate = "{approximate}"> (x) }}"""
    _check(text, "Gelu", "GeluV2", SOCS[family], {"x": random(1, (2, size)) * 3})


@settings(max_examples=16, deadline=None)
@given(sizes, sizes, sizes, st.integers(0, 4), st.sampled_from([16, 32]), st.data())
def test_a_cache_in_place(
    batch: int, heads: int, seq: int, start: int, size: int, data: st.DataObject
) -> None:
    """Scatter and ScatterNdUpdate: new slots lie where they are said to, and the rest stays."""
    form, family = data.draw(
        st.sampled_from(
            [
                ("Scatter", "310p"),
                ("Scatter", "910b"),
                ("ScatterNdUpdate", "310b"),
                ("ScatterNdUpdate", "910b"),
            ]
        )
    )
    cache, new = f"{batch}, {heads}, 8, {size}", f"{batch}, {heads}, {seq}, {size}"
    text = f"""<ir_version: 11, opset_import: ["" : 24]>
        g (float16[{new}] new, int64[{batch}] at, float16[{cache}] cache)
            => (float16[{cache}] whole, float16[{cache}] read)
        {{ whole = TensorScatter <axis = -2> (cache, new, at)
           read = Neg (whole) }}"""
    feeds = {
        "new": random(1, (batch, heads, seq, size)),
        "at": np.array([(start + row) % (9 - seq) for row in range(batch)]),
        "cache": random(2, (batch, heads, 8, size)),
    }
    found, _ = _check(text, "TensorScatter", form, SOCS[family], feeds)
    for row, place in enumerate(feeds["at"]):
        whole, old = found["cache.written"][row], feeds["cache"][row]
        assert np.array_equal(whole[:, place : place + seq], feeds["new"][row])
        kept = [slot for slot in range(8) if not place <= slot < place + seq]
        assert np.array_equal(whole[:, kept], old[:, kept])


ATTENTION = [
    ("IncreFlashAttention", "310p", 1),
    ("IncreFlashAttention", "910b", 4),
    ("IncreFlashAttention-grouped", "310p", 4),
    ("FusedInferAttentionScore", "910b", 4),
    ("MatMul-Softmax", "310p", 4),
    ("MatMul-Softmax", "310b", 4),
]


@pytest.mark.parametrize("integers", [False, True], ids=["float16", "int8"])
@pytest.mark.parametrize(("form", "family", "most"), ATTENTION)
@settings(max_examples=3, deadline=None)
@given(st.integers(1, 2), st.integers(1, 2), st.integers(1, 4), st.sampled_from([32, 64]), sizes)
def test_attention_over_a_cache(
    form: str, family: str, most: int, integers: bool, batch: int, heads: int, group: int,
    size: int, seq: int,
) -> None:  # fmt: skip
    """With a mask that hides slots; grouped heads; a cache of integers, too."""
    group = min(group, most)
    seq = 1 if form.startswith("Incre") else seq
    queries = heads * group
    kind = "int8" if integers else "float16"
    cast = (
        "key = Cast <to = 10> (k) value = Cast <to = 10> (v)"
        if integers
        else "key = Identity (k) value = Identity (v)"
    )
    text = f"""<ir_version: 11, opset_import: ["" : 24]>
        g (float16[{batch}, {queries}, {seq}, {size}] q, float16[{batch}, 1, {seq}, 16] mask,
           {kind}[{batch}, {heads}, 16, {size}] k, {kind}[{batch}, {heads}, 16, {size}] v)
            => (float16[{batch}, {queries}, {seq}, {size}] y)
        {{ {cast} y = Attention (q, key, value, mask) }}"""
    hidden = random(3, (batch, 1, seq, 16), "bool")
    hidden[..., 0] = False
    cache = (batch, heads, 16, size)
    if integers:
        rng = np.random.default_rng(4)
        keys, values = (rng.integers(-127, 128, cache).astype(np.int8) for _ in range(2))
    else:
        keys, values = random(4, cache), random(5, cache)
    feeds = {
        "q": (random(1, (batch, queries, seq, size)) / (100 if integers else 1)).astype(np.float16),
        "mask": np.where(hidden, -30000.0, 0.0).astype(np.float16),
        "k": keys,
        "v": values,
    }
    _, model = _check(text, "Attention", form, SOCS[family], feeds)
    fused = [node for node in model.graph if node.op_type == form.removesuffix("-grouped")]
    if fused and integers:
        assert "Cast" not in [node.op_type for node in model.graph]


def test_every_form_is_tried() -> None:
    tried = {
        "Scatter",
        "ScatterNdUpdate",
        "RmsNorm",
        "AddRmsNorm",
        "Swish",
        "GeluV2",
        "sum of taps",
    }
    tried |= {form for form, _, _ in ATTENTION}
    assert {row.form for row in GE_CHOICES if row.families} <= tried


@pytest.mark.parametrize(
    ("family", "heads", "size", "reason"),
    [
        ("310p", (4, 2), 32, "grouped heads on 310P"),
        ("910b", (2, 2), 24, "multiples of 16"),
        ("910b", (2, 2), 1024, "up to 512"),
    ],
)
def test_where_incre_flash_attention_does_not_reach(
    family: str, heads: tuple[int, int], size: int, reason: str
) -> None:
    queries, keys = heads
    text = f"""<ir_version: 11, opset_import: ["" : 24]>
        g (float16[1, {queries}, 1, {size}] q, float16[1, 1, 1, 16] mask,
           float16[1, {keys}, 16, {size}] k, float16[1, {keys}, 16, {size}] v)
            => (float16[1, {queries}, 1, {size}] y)
        {{ y = Attention (q, k, v, mask) }}"""
    told: list[Decision] = []
    legalize(parse(text), target(SOCS[family]), "air", told=told)
    (found,) = told
    refused = {refusal.form: refusal.reason for refusal in found.refused}
    assert reason in refused["IncreFlashAttention"]
    assert found.form == "MatMul-Softmax"


@settings(max_examples=8, deadline=None)
@given(sizes, sizes, st.integers(1, 4), st.booleans(), st.sampled_from(list(SOCS)))
def test_a_short_convolution(batch: int, channels: int, taps: int, pad: bool, family: str) -> None:
    pads = [taps - 1, 1] if pad else [0, 0]
    length = 6 + sum(pads) - taps + 1
    text = f"""<ir_version: 11, opset_import: ["" : 24]>
        g (float16[{batch}, {channels}, 6] x) => (float16[{batch}, {channels}, {length}] y)
        <float16[{channels}, 1, {taps}] w = {{{", ".join(["15360"] * (channels * taps))}}},
         float16[{channels}] b = {{{", ".join(["14336"] * channels)}}}>
        {{ y = Conv <group = {channels}, pads = {pads}> (x, w, b) }}"""
    _check(text, "Conv", "sum of taps", SOCS[family], {"x": random(1, (batch, channels, 6))})
