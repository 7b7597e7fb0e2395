"""Rotary tables: recognised by their angles, and rebuilt."""

import dataclasses

import numpy as np
import pytest

from omforge import ir
from omforge.ir.infer import infer_model
from omforge.recognition.attention.masks import Prober
from omforge.recognition.interface import find_interface
from omforge.recognition.rotary import angles as positions
from omforge.recognition.rotary.angles import Pairs, Rotation
from omforge.rewriting.builder import Builder
from omforge.rewriting.match import NoMatch
from omforge.rewriting.splice import insert
from tests.passes.blocks import Block, named

ROTARY = Block(rotary="half", size=8, visible="", padding=False)
INV_FREQ = (100.0 ** (-np.arange(4) / 4)).astype(np.float32)


def recognised(block: Block = ROTARY, changes: dict[str, str] | None = None) -> Rotation:
    model = named(dataclasses.replace(block, edits=tuple((changes or {}).items())))
    values = {v.name: v for node in model.graph for v in node.outputs}
    prober = Prober(model, find_interface(model))
    return positions.recognise(prober, values["cos"], values["sin"])


@pytest.mark.parametrize("rotary", ["half", "interleaved"])
def test_finds_the_frequencies_to_the_bit(rotary: Pairs) -> None:
    found = recognised(dataclasses.replace(ROTARY, rotary=rotary))
    assert found.scale == 1.0
    assert found.position.name == "position_ids"
    np.testing.assert_array_equal(found.frequencies(rotary), INV_FREQ)


def test_a_pair_turns_at_one_frequency() -> None:
    with pytest.raises(NoMatch, match="have different frequencies"):
        recognised().frequencies("interleaved")


def test_finds_a_scale_of_both_tables() -> None:
    changes = {
        "cos = Unsqueeze (cos_b": "cos_s = Mul (cos_b, big) cos = Unsqueeze (cos_s",
        "sin = Unsqueeze (sin_b": "sin_s = Mul (sin_b, big) sin = Unsqueeze (sin_s",
        "float[4] inv_freq": "float big = {1.25}, float[4] inv_freq",
    }
    assert recognised(changes=changes).scale == 1.25
    only_cosine = {key: text for key, text in changes.items() if "sin" not in key}
    with pytest.raises(NoMatch, match="it is not the sine of the angle"):
        recognised(changes=only_cosine)


def test_a_sine_of_the_other_sign_is_a_rotation_the_other_way() -> None:
    found = recognised(changes={"sin_a = Sin (angle)": "sin_m = Sin (angle) sin_a = Neg (sin_m)"})
    np.testing.assert_array_equal(found.frequencies("half"), -INV_FREQ)


@pytest.mark.parametrize("rotary", ["half", "interleaved"])
def test_half_of_a_doubled_table_has_half_of_its_frequencies(rotary: str) -> None:
    """Some double the angle, and then take every pair's number once after all."""
    part = "i_0, i_8, i_2, i_2" if rotary == "interleaved" else "i_0, i_4, i_2"
    changes = {
        "angle = Mul (position_u, inv_freq)": (
            "angle_a = Mul (position_u, inv_freq) angle_b = Unsqueeze (angle_a, i_3)"
            " angle_c = Concat <axis = 3> (angle_b, angle_b) angle = Reshape (angle_c, i_flat3)"
            if rotary == "interleaved"
            else "angle_a = Mul (position_u, inv_freq)"
            " angle = Concat <axis = -1> (angle_a, angle_a)"
        ),
        "cos_a = Cos (angle)": f"cos_w = Cos (angle) cos_a = Slice (cos_w, {part})",
        "sin_a = Sin (angle)": f"sin_w = Sin (angle) sin_a = Slice (sin_w, {part})",
        "cos = Unsqueeze (cos_b": "cos = Unsqueeze (cos_a",
        "sin = Unsqueeze (sin_b": "sin = Unsqueeze (sin_a",
        "float[4] inv_freq": (
            "int64[3] i_flat3 = {0, 0, 8}, int64[1] i_8 = {8}, float[4] inv_freq"
        ),
    }
    found = recognised(changes=changes)
    np.testing.assert_array_equal(found.frequencies("single"), INV_FREQ)


def test_half_of_a_doubled_table_may_be_doubled_again() -> None:
    """Side by side, after halves of the width apart."""
    changes = {
        "cos_c = Unsqueeze (cos_a, i_3)": (
            "cos_x = Concat <axis = -1> (cos_a, cos_a) cos_y = Slice (cos_x, i_0, i_4, i_2)"
            " cos_c = Unsqueeze (cos_y, i_3)"
        ),
        "angle = Mul (position_u, inv_freq)": (
            "angle_a = Mul (position_u, inv_freq) angle_b = Concat <axis = -1> (angle_a, angle_a)"
            " angle = Identity (angle_b)"
        ),
        "sin_c = Unsqueeze (sin_a, i_3)": (
            "sin_y = Slice (sin_a, i_0, i_4, i_2) sin_c = Unsqueeze (sin_y, i_3)"
        ),
        "float[4] inv_freq": "int64[1] i_4 = {4}, int64[1] i_0 = {0}, float[4] inv_freq",
    }
    block = dataclasses.replace(ROTARY, rotary="interleaved")
    text = block.text()
    known = [name for name in ("i_4", "i_0") if f"int64[1] {name} = " in text]
    for name in known:
        changes["float[4] inv_freq"] = changes["float[4] inv_freq"].replace(
            f"int64[1] {name} = {{{name[2:]}}}, ", ""
        )
    found = recognised(block, changes)
    np.testing.assert_array_equal(found.frequencies("interleaved"), INV_FREQ)


def test_remembers_what_tables_are_rounded_to() -> None:
    """Half-precision models make tables in float, round them, and rotate in float."""
    changes = {
        "cos = Unsqueeze (cos_b": (
            "cos_h = Cast <to = 10> (cos_b) cos_f = Cast <to = 1> (cos_h) cos = Unsqueeze (cos_f"
        ),
        "sin = Unsqueeze (sin_b": (
            "sin_h = Cast <to = 10> (sin_b) sin_f = Cast <to = 1> (sin_h) sin = Unsqueeze (sin_f"
        ),
    }
    found = recognised(changes=changes)
    assert found.rounded == ir.DataType.FLOAT16
    np.testing.assert_array_equal(found.frequencies("half"), INV_FREQ)
    only_cosine = {key: text for key, text in changes.items() if "sin" not in key}
    with pytest.raises(NoMatch, match="only one of cosine and sine is rounded"):
        recognised(changes=only_cosine)


@pytest.mark.parametrize("fixed", [{"seq": "1"}, {"batch": "1"}, {"batch": "1", "seq": "3"}])
def test_finds_them_in_exports_of_fixed_sizes(fixed: dict[str, str]) -> None:
    found = recognised(dataclasses.replace(ROTARY, **fixed))  # type: ignore[arg-type]
    np.testing.assert_array_equal(found.frequencies("half"), INV_FREQ)


def test_one_position_tells_nothing() -> None:
    with pytest.raises(NoMatch, match="the export fixes a single position"):
        recognised(dataclasses.replace(ROTARY, batch="1", seq="1"))


def longer(condition: str) -> dict[str, str]:
    """Frequencies that are others if a condition holds, as in LongRoPE and dynamic NTK scaling."""
    return {
        "angle = Mul (position_u, inv_freq)": (
            f"{condition} slow = Mul (inv_freq, slower) chosen = Where (long, slow, inv_freq)"
            " angle = Mul (position_u, chosen)"
        ),
        "float[4] inv_freq": (
            "float limit = {4096.0}, int64 most = {4096}, float slower = {0.25}, float[4] inv_freq"
        ),
    }


@pytest.mark.parametrize(
    "condition",
    [
        "far = ReduceMax <keepdims = 0> (position) long = Greater (far, limit)",
        "long = Greater (total0, most)",
        "long = Greater (position_u, limit)",
    ],
    ids=["by the largest position", "by the length", "by each position"],
)
def test_frequencies_that_depend_on_the_length_are_none(condition: str) -> None:
    with pytest.raises(NoMatch, match=r"depend on the length|not position times frequency"):
        recognised(changes=longer(condition))


OTHERS: dict[str, tuple[dict[str, str], str]] = {
    "positions squared": (
        {"angle = Mul (position_u,": "p2 = Mul (position_u, position_u) angle = Mul (p2,"},
        "the angle is not position times frequency",
    ),
    "shifted by one": (
        {"angle = Mul (position_u,": "p2 = Add (position_u, one) angle = Mul (p2,",
         "float[4] inv_freq": "float one = {1.0}, float[4] inv_freq"},
        "the angle is not position times frequency",
    ),
    "a cosine of more": (
        {"cos_a = Cos (angle)": "cos_x = Cos (angle) cos_a = Mul (cos_x, cos_x)"},
        "it is not the cosine of the angle",
    ),
    "a sine of more": (
        {"sin_a = Sin (angle)": "sin_x = Sin (angle) sin_a = Mul (sin_x, sin_x)"},
        "it is not the sine of the angle",
    ),
    "two angles": (
        {"sin_a = Sin (angle)": "angle_b = Add (angle, angle) sin_a = Sin (angle_b)"},
        "not one of each on one angle",
    ),
    "positions of two kinds": (
        {"angle = Mul (position_u,": (
            "places = Cast <to = 1> (total0) p0 = Sub (places, places) p2 = Add (position_u, p0)"
            " odd = Cast <to = 6> (position_ids) odd_f = Cast <to = 1> (odd)"
            " odd_u = Unsqueeze (odd_f, i_2) p3 = Add (p2, odd_u) angle = Mul (p3,")},
        "the angle is made of 2 integer tensors",
    ),
    "of the tokens": (
        {"Cast <to = 1> (position_ids)": "Cast <to = 1> (input_ids)"},
        "it depends on input_ids",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", OTHERS)
def test_takes_nothing_else_for_a_rotation(case: str) -> None:
    changes, why = OTHERS[case]
    with pytest.raises(NoMatch, match=why):
        recognised(changes=changes)


@pytest.mark.parametrize("reverse", [True, False])
@pytest.mark.parametrize("pairs", ["half", "interleaved", "single"])
@pytest.mark.parametrize("scale", [1.0, 1.25])
def test_builds_what_it_says(pairs: Pairs, scale: float, reverse: bool) -> None:
    model = named(ROTARY)
    interface = find_interface(model)
    assert interface.position_ids is not None
    wide = {"half": np.tile(INV_FREQ, 2), "interleaved": np.repeat(INV_FREQ, 2)}
    rotation = Rotation(wide.get(pairs, INV_FREQ), scale, interface.position_ids)
    with Builder(model) as op:
        cos, sin = positions.build(
            op, interface, rotation, pairs, ir.DataType.FLOAT, reverse=reverse
        )
        insert(op, next(iter(model.graph)), by="test")
    infer_model(model)
    found = positions.recognise(Prober(model, interface), cos, sin)
    np.testing.assert_array_equal(found.inv_freq, -INV_FREQ if reverse else INV_FREQ)
    assert found.scale == scale


def test_builds_no_tables_for_other_positions_than_the_new_tokens() -> None:
    model = named(ROTARY)
    interface = find_interface(model)
    past = interface.caches[0][0]
    elsewhere = ir.Value(
        name="slots", shape=ir.Shape(["past"]), type=ir.TensorType(ir.DataType.INT64)
    )
    assert past.shape is not None
    rotation = Rotation(np.tile(INV_FREQ, 2), 1.0, elsewhere)
    with Builder(model) as op, pytest.raises(NoMatch, match="those of the new tokens"):
        positions.build(op, interface, rotation, "half", ir.DataType.FLOAT)
