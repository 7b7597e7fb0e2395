"""ALiBi: a bias that grows with the key's position, told from a mask and from other biases."""

import dataclasses

import numpy as np
import pytest

from omforge import ir
from omforge.ir.values import dims
from omforge.passes.fuse_attention import FuseAttention
from omforge.passes.fuse_kv_io import FuseKvIo
from omforge.recognition.attention import alibi, masks
from omforge.recognition.attention.alibi import Bias
from omforge.recognition.attention.masks import Mask, Prober
from omforge.recognition.interface import find_interface
from omforge.rewriting.builder import Builder
from omforge.rewriting.events import events
from omforge.rewriting.match import NoMatch
from omforge.rewriting.splice import insert
from omforge.runtime import generate
from tests.passes.blocks import LOW, WINDOW, Block, fused, named, ops

SLOPES = (0.25, 0.1, 0.015625, 0.00390625)
RAMPS = {
    # How the positions of the keys are counted, [.., T].
    "slots": "ages = Range (k_0, total0, k_1) ages_f = Cast <to = 1> (ages)",
    "from the newest": (
        "ages_a = Range (k_0, total0, k_1) last = Sub (total0, k_1) ages = Sub (ages_a, last)"
        " ages_f = Cast <to = 1> (ages)"
    ),
    "tokens": (
        "counted = CumSum (attention_mask, k_1) ages_a = Sub (counted, k_1)"
        " ages_b = Mul (ages_a, attention_mask) ages_c = Unsqueeze (ages_b, i_1_2)"
        " ages_f = Cast <to = 1> (ages_c)"
    ),
    "to the query": (
        "ages_q = Range (past0, total0, k_1) ages_r = Unsqueeze (ages_q, i_1)"
        " ages_a = Range (k_0, total0, k_1) ages = Sub (ages_a, ages_r)"
        " ages_f = Cast <to = 1> (ages)"
    ),
}
APPLIED = {
    # Bloom adds it before the mask; Falcon puts the mask in its place; MPT adds it, then replaces.
    "added": ("masked = Add (scaled, bias)", "tilt = Add (scaled, ramp) masked = Add (tilt, bias)"),
    "in place of 0": ("bias = Where (seen, zero, low)", "bias = Where (seen, ramp, low)"),
    "replaced": (
        "masked = Where (seen, scaled,",
        "tilt = Add (scaled, ramp) masked = Where (seen, tilt,",
    ),
}


def tilted(
    ramp: str = "slots", applied: str = "added", slopes: str = "", **options: object
) -> Block:
    """A block with a bias; `slopes` are nodes that make `ramp` of `ages_f` otherwise."""
    block = Block(applied="where" if applied == "replaced" else "added", **options)  # type: ignore[arg-type]
    old, new = APPLIED[applied]
    numbers = ", ".join(map(str, SLOPES))
    constants = (
        "<float[16, 8] table",
        f"<float[1, 4, 1, 1] slopes = {{{numbers}}}, float[1, 4, 1, 1] cut = {{-2, -3, -4, -5}}, "
        "int64 k_0 = {0}, int64 k_1 = {1}, int64 k_7 = {7}, float[16, 8] table",
    )
    made = slopes or "ramp = Mul (ages_f, slopes)"
    edits = [(old, f"{RAMPS[ramp]} {made} {new}"), constants]
    return dataclasses.replace(block, edits=tuple(edits))


def kind(model: ir.Model) -> Mask:
    (node,) = [node for node in model.graph if node.op_type == "Attention"]
    mask = node.inputs[3]
    assert mask is not None
    return masks.recognise(Prober(model, find_interface(model)), mask, [], None)


@pytest.mark.parametrize("applied", APPLIED)
@pytest.mark.parametrize("ramp", RAMPS)
def test_raises_every_spelling(ramp: str, applied: str) -> None:
    model = fused(FuseAttention(), tilted(ramp, applied), padding_rows=ramp != "to the query")
    counts = "token" if ramp == "tokens" else "slot"
    found = kind(model)
    assert (found.window, found.padding) == (None, True)
    assert found.bias is not None
    assert found.bias.counts == counts
    np.testing.assert_array_equal(np.float32(found.bias.slopes), np.float32(SLOPES))
    assert not events(model)
    assert "Softmax" not in ops(model)


@pytest.mark.parametrize("visible", ["trilu", "window"])
def test_raises_it_with_any_mask(visible: str) -> None:
    found = kind(fused(FuseAttention(), tilted(visible=visible)))
    assert found.window == (WINDOW if visible == "window" else None)
    assert found.bias is not None


def test_raises_it_without_a_padding_mask() -> None:
    found = kind(fused(FuseAttention(), tilted(padding=False)))
    assert found == Mask(None, False, False, found.bias)
    assert found.bias is not None


def test_rows_that_see_nothing_get_zeros() -> None:
    """Minus infinity gives them NaN, and a guard zeros."""
    model = fused(FuseAttention(), tilted(applied="in place of 0", low=-float("inf"), guard="nan"))
    assert kind(model).bias is not None


NEAR_MISSES = {
    "grows with the square": "ages_2 = Mul (ages_f, ages_f) ramp = Mul (ages_2, slopes)",
    "ends somewhere": (
        "ages_7 = Cast <to = 1> (k_7) ages_m = Min (ages_f, ages_7) ramp = Mul (ages_m, slopes)"
    ),
    "grows with the logarithm": (
        "ages_1 = Cast <to = 1> (k_1) ages_p = Add (ages_f, ages_1) ages_l = Log (ages_p)"
        " ramp = Mul (ages_l, slopes)"
    ),
    "grows by steps": (
        "ages_2 = Div (ages, k_7) ages_g = Cast <to = 1> (ages_2) ramp = Mul (ages_g, slopes)"
    ),
    "grows with the padding": (
        "reals = Cast <to = 1> (attention_mask) few = ReduceMean <keepdims = 1> (reals)"
        " ages_x = Mul (ages_f, few) few_4 = Mul (ages_x, slopes) ramp = Mul (few_4, few)"
    ),
}


@pytest.mark.parametrize("case", NEAR_MISSES)
def test_takes_no_other_bias_for_it(case: str) -> None:
    model = named(tilted(slopes=NEAR_MISSES[case]))
    assert FuseAttention().run(model) == 0
    (event,) = events(model)
    assert "it adds more than a mask to the scores, and no ALiBi" in event.reason


@pytest.mark.parametrize("case", NEAR_MISSES)
def test_keeps_one_mask_with_another_bias_as_it_stands(case: str) -> None:
    model = fused(FuseAttention(), tilted(applied="in place of 0", slopes=NEAR_MISSES[case]))
    with pytest.raises(NoMatch, match="it adds more than a mask to the scores, and no ALiBi"):
        kind(model)


def test_heads_that_see_different_keys_are_no_mask() -> None:
    nearby = "nearby = Greater (ages_f, cut) ramp = Where (nearby, zero, low)"
    model = named(tilted("to the query", slopes=nearby))
    assert FuseAttention().run(model) == 0
    (event,) = events(model)
    assert "its heads see different keys" in event.reason


@pytest.mark.parametrize("ramp", ["slots", "tokens"])
def test_the_runtime_gives_the_positions_of_a_cache_of_fixed_capacity(ramp: str) -> None:
    model = named(tilted(ramp))
    assert FuseAttention().run(model) == 1
    FuseKvIo().run(model)
    ir.check(model)
    shapes = {v.name: [str(dim) for dim in dims(v) or ()] for v in model.graph.inputs}
    assert shapes[alibi.KEY_POSITIONS] == ["1", "1", "1", "capacity + seq"]
    assert shapes["attention_mask"] == ["batch", "1", "seq", "capacity + seq"]
    assert {"CumSum", "Range"}.isdisjoint(ops(model))
    assert generate.KEY_POSITIONS == alibi.KEY_POSITIONS


# --- its parts --------------------------------------------------------------------------------


def test_reads_slopes_exactly_beside_a_key_without_bias() -> None:
    slopes = np.float32([0.1, 0.3])[:, None]
    positions = np.arange(9, dtype=np.float32)
    for at in (positions, positions - 8, positions - 4):
        assert alibi.read_slopes(slopes * at) == tuple(slopes[:, 0].tolist())
    shifted = alibi.read_slopes(slopes * (positions + 100))
    assert shifted == pytest.approx(slopes[:, 0].tolist(), rel=1e-4)


def test_reads_no_slopes_where_nothing_rises() -> None:
    assert alibi.read_slopes(np.zeros((2, 5), np.float32)) is None
    assert alibi.read_slopes(np.full((2, 5), 0.5, np.float32)) is None
    assert alibi.read_slopes(np.full((2, 5), LOW, np.float32)) is None


def test_counts_slots_or_tokens() -> None:
    mask = np.array([[0, 1, 0, 1]])
    slopes = (0.5, 0.25)
    assert Bias(slopes, "slot").at(mask)[0, :, 0].tolist() == [
        [0, 0.5, 1, 1.5],
        [0, 0.25, 0.5, 0.75],
    ]
    assert Bias(slopes, "token").at(mask)[0, 0, 0].tolist() == [-0.5, 0, 0, 0.5]


@pytest.mark.parametrize("counts", ["slot", "token"])
@pytest.mark.parametrize("cache", [True, False])
def test_builds_what_it_recognises(counts: str, cache: bool) -> None:
    wanted = Mask(None, True, False, Bias(tuple(np.float32(SLOPES).tolist()), counts))  # type: ignore[arg-type]
    model = named(Block(cache=cache))
    interface = find_interface(model)
    with Builder(model) as op:
        made = masks.build(op, interface, wanted, ir.DataType.FLOAT)
        insert(op, next(iter(model.graph)), by="test")
    assert masks.recognise(Prober(model, interface), made, [], None) == wanted
    ir.check(model)
