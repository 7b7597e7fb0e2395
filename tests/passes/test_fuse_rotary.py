"""fuse-rotary: which spellings become one `RotaryEmbedding`, and which must not."""

import dataclasses
import logging
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from omforge import ir
from omforge.ir.values import attribute, constant
from omforge.passes import make_pipeline
from omforge.passes.fuse_rotary import FuseRotary
from omforge.rewriting.events import events
from tests.passes.blocks import Block, fused, named, ops

ROTARY = Block(rotary="half", size=8, visible="", padding=False)


def edited(block: Block, changes: dict[str, str]) -> Block:
    """The block with its text changed."""
    return dataclasses.replace(block, edits=tuple(changes.items()))


def rotations(model: ir.Model) -> list[ir.Node]:
    return [node for node in model.graph if node.op_type == "RotaryEmbedding"]


# --- spellings --------------------------------------------------------------------------------


@pytest.mark.parametrize("rotary", ["half", "split", "interleaved"])
@pytest.mark.parametrize("width", [8, 4])
def test_raises_every_style_and_width(rotary: str, width: int) -> None:
    model = fused(FuseRotary(), dataclasses.replace(ROTARY, rotary=rotary, width=width))
    assert not events(model)
    for node, name, heads in zip(rotations(model), ("q", "k"), (4, 2), strict=True):
        options = {key: found.value for key, found in node.attributes.items()}
        expected = {"num_heads": heads}
        if rotary == "interleaved":
            expected["interleaved"] = 1
        if width != 8:
            expected["rotary_embedding_dim"] = width
        assert options == expected
        assert node.inputs[0] is not None
        assert node.inputs[0].name == name  # [B, S, N*D], before heads are split


def test_queries_and_keys_share_tables_of_cosine_and_sine() -> None:
    model = fused(FuseRotary(), ROTARY)
    first, second = rotations(model)
    assert first.inputs[1:] == second.inputs[1:]
    makers = [value.producer() for value in first.inputs[1:] if value is not None]
    assert [node.op_type for node in makers if node is not None] == ["Cos", "Sin"]
    (angle,) = {node.inputs[0] for node in makers if node is not None}
    assert angle is not None
    product = angle.producer()
    assert product is not None
    np.testing.assert_array_equal(
        constant(product.inputs[1]), (100.0 ** (-np.arange(4) / 4)).astype(np.float32)
    )


def test_finds_nothing_in_a_second_run() -> None:
    model = named(ROTARY)
    assert FuseRotary().run(model) == 2
    assert FuseRotary().run(model) == 0


def test_an_embedding_that_nothing_uses_takes_no_tables_away() -> None:
    model = named(ROTARY)
    values = {value.name: value for node in model.graph for value in node.outputs}
    scores = values["scores"].producer()
    assert scores is not None
    scores.replace_input_with(0, values["q4"])
    FuseRotary().run(model)
    ir.check(model)
    assert [attribute(node, "num_heads") for node in rotations(model)] == [2]


def test_leaves_a_graph_without_sums_alone() -> None:
    text = '<ir_version: 11, opset_import: ["" : 24]> g (float[2] x) => (float[2] y) {y = Neg (x)}'
    assert FuseRotary().run(ir.from_onnx_text(text)) == 0


SPELLINGS: dict[str, dict[str, str]] = {
    "the sine first": {"Add (q4_cos, q4_sin)": "Add (q4_sin, q4_cos)"},
    "tables first": {"Mul (q4, cos)": "Mul (cos, q4)", "Mul (q4_t, sin)": "Mul (sin, q4_t)"},
    "a scaled table": {
        "cos = Unsqueeze (cos_b": "cos_s = Mul (cos_b, big) cos = Unsqueeze (cos_s",
        "sin = Unsqueeze (sin_b": "sin_s = Mul (sin_b, big) sin = Unsqueeze (sin_s",
        "float[4] inv_freq": "float big = {1.25}, float[4] inv_freq",
    },
    "the angle doubled before the cosine": {
        "cos_a = Cos (angle)": "both = Concat <axis = -1> (angle, angle) cos_b = Cos (both)",
        "sin_a = Sin (angle)": "sin_b = Sin (both)",
        "cos_b = Concat <axis = -1> (cos_a, cos_a)": "",
        "sin_b = Concat <axis = -1> (sin_a, sin_a)": "",
    },
    "positions as a product of matrices": {
        "angle = Mul (position_u, inv_freq)": (
            "column = Unsqueeze (inv_freq, i_first) row = Unsqueeze (position, i_first2)"
            " turned = MatMul (column, row) angle = Transpose <perm = [0, 2, 1]> (turned)"
        ),
        "float[4] inv_freq": (
            "int64[2] i_first = {0, 2}, int64[1] i_first2 = {1}, float[4] inv_freq"
        ),
    },
    "32-bit positions": {
        "position = Cast <to = 1> (position_ids)": (
            "short = Cast <to = 6> (position_ids) position = Cast <to = 1> (short)"
        )
    },
}


@pytest.mark.parametrize("case", SPELLINGS)
def test_raises_every_spelling(case: str) -> None:
    model = fused(FuseRotary(), edited(ROTARY, SPELLINGS[case]))
    assert len(rotations(model)) == 2
    assert not events(model)


def test_rotates_before_the_heads_are_moved() -> None:
    """[B, S, N, D], as models do that transpose afterwards."""
    changes = {
        "q4 = Transpose <perm = [0, 2, 1, 3]> (qs)": "q4 = Identity (qs)",
        "k4 = Transpose <perm = [0, 2, 1, 3]> (ks)": "k4 = Identity (ks)",
        "cos = Unsqueeze (cos_b, i_1)": "cos = Unsqueeze (cos_b, i_2)",
        "sin = Unsqueeze (sin_b, i_1)": "sin = Unsqueeze (sin_b, i_2)",
        "(past_key, k4_r)": "(past_key, k4_m)",
        "present_key =": "k4_m = Transpose <perm = [0, 2, 1, 3]> (k4_r) present_key =",
        "scores = MatMul (q4_r,": (
            "q4_m = Transpose <perm = [0, 2, 1, 3]> (q4_r) scores = MatMul (q4_m,"
        ),
    }
    model = fused(FuseRotary(), edited(ROTARY, changes))
    assert [node.attributes["num_heads"].as_int() for node in rotations(model)] == [4, 2]


def test_rotates_heads_that_come_from_one_product() -> None:
    """Query, key and value of a head side by side: no [B, S, N*D] is there to start from."""
    changes = {
        "q4_1 = Slice (q4,": "q4_w = Neg (q4) q4_1 = Slice (q4_w,",
        "q4_2 = Slice (q4,": "q4_2 = Slice (q4_w,",
        "q4_cos = Mul (q4, cos)": "q4_cos = Mul (q4_w, cos)",
    }
    model = fused(FuseRotary(), edited(ROTARY, changes))
    assert len(rotations(model)) == 2


@pytest.mark.parametrize(
    "block",
    [
        dataclasses.replace(ROTARY, batch="1"),
        dataclasses.replace(ROTARY, seq="1"),
        dataclasses.replace(ROTARY, batch="2", seq="4", past="3"),
        dataclasses.replace(ROTARY, cache=False),
    ],
)
def test_raises_exports_with_fixed_sizes(block: Block) -> None:
    model = fused(FuseRotary(), block)
    assert len(rotations(model)) == 2
    assert not events(model)


def test_raises_one_row_of_positions_for_the_whole_batch() -> None:
    """Positions counted from the cache's length, as models without position_ids do."""
    changes = {
        "position = Cast <to = 1> (position_ids)": (
            "places = Range (past0, total0, n_1) row = Unsqueeze (places, i_0)"
            " position = Cast <to = 1> (row)"
        ),
        "float[4] inv_freq": "int64 n_1 = {1}, float[4] inv_freq",
    }
    block = dataclasses.replace(ROTARY, positions=False)
    model = fused(FuseRotary(), edited(block, changes))
    assert len(rotations(model)) == 2
    assert not events(model)


# --- the other way round ----------------------------------------------------------------------

OTHER_WAY: dict[str, dict[str, str]] = {
    "turned the other way": {
        "{x}_n = Neg ({x}_2)": "{x}_m = Neg ({x}_1)", "({x}_n, {x}_1)": "({x}_2, {x}_m)",
    },
    "subtracted": {"{x}_r = Add ({x}_cos, {x}_sin)": "{x}_r = Sub ({x}_cos, {x}_sin)"},
    "a sine of the other sign": {"sin_a = Sin (angle)": "sin_m = Sin (angle) sin_a = Neg (sin_m)"},
}  # fmt: skip


def other_way(case: str, block: Block) -> Block:
    changes = OTHER_WAY[case]
    return edited(
        block,
        {old.format(x=x): new.format(x=x) for x in ("q4", "k4") for old, new in changes.items()},
    )


@pytest.mark.parametrize("case", OTHER_WAY)
def test_turns_the_other_way_by_the_sign_of_the_sine(case: str) -> None:
    model = fused(FuseRotary(), other_way(case, ROTARY))
    assert len(rotations(model)) == 2
    assert not events(model)
    assert "Neg" not in ops(model)  # the sign is in the frequencies


def test_twice_the_other_way_is_the_usual_one() -> None:
    both = dict(other_way("subtracted", ROTARY).edits)
    both |= dict(other_way("a sine of the other sign", ROTARY).edits)
    model = fused(FuseRotary(), edited(ROTARY, both))
    usual = fused(FuseRotary(), ROTARY)
    assert [*map(frequencies, rotations(model))] == [*map(frequencies, rotations(usual))]


def frequencies(node: ir.Node) -> list[float]:
    cos = node.inputs[1]
    assert cos is not None
    angle = cos.producer().inputs[0].producer()  # type: ignore[union-attr]
    assert angle is not None
    found = constant(angle.inputs[1])
    assert found is not None
    return found.tolist()


@pytest.mark.parametrize("case", ["turned the other way", "subtracted"])
def test_negates_a_sine_that_is_looked_up(case: str) -> None:
    block = dataclasses.replace(ROTARY, tables="gathered")
    model = fused(FuseRotary(), other_way(case, block))
    assert len(rotations(model)) == 2
    assert ops(model).count("Neg") == 1  # of the table, once for both


def test_subtracts_nothing_from_the_sine() -> None:
    """In x * sin(a) - turned * cos(a) the first term is not the one that is turned."""
    changes = {"q4_r = Add (q4_cos, q4_sin)": "q4_r = Sub (q4_sin, q4_cos)"}
    model = fused(FuseRotary(), edited(ROTARY, changes))
    assert len(rotations(model)) == 1
    assert any("are no rotation" in event.reason for event in events(model))


# --- rotated in float, in a half-precision model ----------------------------------------------


def half_precision(where: str) -> Block:
    """What is rotated goes through half precision, before or after it is turned."""
    changes: dict[str, str] = {}
    for x in ("q4", "k4"):
        changes |= {
            f"{x}_1 = Slice ({x}, ": f"{x}_h = Cast <to = 10> ({x}) {x}_f = Cast <to = 1> ({x}_h)"
            f" {x}_1 = Slice ({x}_{where}, ",
            f"{x}_2 = Slice ({x}, ": f"{x}_2 = Slice ({x}_{where}, ",
            f"{x}_cos = Mul ({x}, cos)": f"{x}_cos = Mul ({x}_f, cos)",
            f"{x}_r = Add ({x}_cos, {x}_sin)": (
                f"{x}_a = Add ({x}_cos, {x}_sin) {x}_b = Cast <to = 10> ({x}_a)"
                f" {x}_r = Cast <to = 1> ({x}_b)"
            ),
        }
        if where == "h":
            changes[f"{x}_sin = Mul ({x}_t, sin)"] = (
                f"{x}_tf = Cast <to = 1> ({x}_t) {x}_sin = Mul ({x}_tf, sin)"
            )
    return edited(ROTARY, changes)


@pytest.mark.parametrize("where", ["h", "f"])
def test_rotates_in_float_what_is_widened_before_or_after_it_is_turned(where: str) -> None:
    model = fused(FuseRotary(), half_precision(where))
    assert len(rotations(model)) == 2
    assert not events(model)


def test_the_casts_move_out_of_the_heads() -> None:
    """[B, S, N*D] is cast: the heads' split stays next to what undoes it."""
    changes = dict(half_precision("f").edits)
    for x, flat in (("q4", "q"), ("k4", "k")):  # narrow before the heads are split
        changes[f"{flat}s = Reshape ({flat}, "] = (
            f"{flat}_h = Cast <to = 10> ({flat}) {flat}s = Reshape ({flat}_h, "
        )
        changes[f"{x}_1 = Slice ({x}, "] = f"{x}_f = Cast <to = 1> ({x}) {x}_1 = Slice ({x}_f, "
    model = fused(FuseRotary(), edited(ROTARY, changes))
    for node in rotations(model):
        assert node.inputs[0] is not None
        maker = node.inputs[0].producer()
        assert maker is not None
        assert maker.op_type == "Cast"
        assert [user.op_type for user, _ in node.outputs[0].uses()] == ["Cast"]


def test_what_meets_the_sine_is_not_rounded_on_its_way() -> None:
    changes = {
        "q4_sin = Mul (q4_t, sin)": (
            "q4_h = Cast <to = 10> (q4_t) q4_f = Cast <to = 1> (q4_h) q4_sin = Mul (q4_f, sin)"
        )
    }
    model = fused(FuseRotary(), edited(ROTARY, changes))
    assert len(rotations(model)) == 1
    (event,) = events(model)
    assert "what meets the sine is rounded to FLOAT16" in event.reason


# --- tables kept as they stand ----------------------------------------------------------------


@pytest.mark.parametrize("rotary", ["half", "interleaved"])
@pytest.mark.parametrize("width", [8, 4])
def test_halves_a_table_that_is_looked_up(rotary: str, width: int) -> None:
    block = dataclasses.replace(ROTARY, rotary=rotary, width=width, tables="gathered")
    model = fused(FuseRotary(), block)
    assert len(rotations(model)) == 2
    (event,) = events(model)
    assert "its table is kept as it stands: 0 Cos and 0 Sin" in event.reason


KEPT: dict[str, tuple[dict[str, str], str]] = {
    "cosine and sine swapped": (
        {"Mul (q4, cos)": "Mul (q4, sin)", "Mul (q4_t, sin)": "Mul (q4_t, cos)"},
        "0 Cos and 0 Sin make the tables",
    ),
    "two angles": (
        {"sin_a = Sin (angle)": "angle_b = Neg (angle) sin_a = Sin (angle_b)"},
        "not one of each on one angle",
    ),
    "a sine of more": (
        {"sin_a = Sin (angle)": "sin_m = Sin (angle) sin_a = Mul (sin_m, sin_m)"},
        "it is not the sine of the angle",
    ),
    "squared positions": (
        {"angle = Mul (position_u,": "p2 = Mul (position_u, position_u) angle = Mul (p2,"},
        "the angle is not position times frequency",
    ),
    "frequencies that depend on the length": (
        {
            "angle = Mul (position_u, inv_freq)": (
                "most = ReduceMax <keepdims = 0> (position) long = Greater (most, limit)"
                " slow = Mul (inv_freq, slower) chosen = Where (long, slow, inv_freq)"
                " angle = Mul (position_u, chosen)"
            ),
            "float[4] inv_freq": "float limit = {9.0}, float slower = {0.25}, float[4] inv_freq",
        },
        "its frequencies depend on the length",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", KEPT)
def test_keeps_other_tables_as_they_stand(case: str) -> None:
    changes, why = KEPT[case]
    model = fused(FuseRotary(), edited(ROTARY, changes))
    assert len(rotations(model)) == 2
    assert any(why in event.reason for event in events(model))


def test_keeps_a_table_for_keys_behind_the_cache() -> None:
    """Keys rotated after they are joined with the cache: the positions are not the new tokens'."""
    changes = {
        "present_key = Concat <axis = 2> (past_key, k4_r)": "",
        "k4_1 = Slice (k4,": (
            "present_key = Concat <axis = 2> (past_key, k4) k4_1 = Slice (present_key,"
        ),
        "k4_2 = Slice (k4,": "k4_2 = Slice (present_key,",
        "k4_cos = Mul (k4, cos)": "k4_cos = Mul (present_key, cos_all)",
        "k4_sin = Mul (k4_t, sin)": "k4_sin = Mul (k4_t, sin_all)",
        "present_key_u = Unsqueeze (present_key,": "present_key_u = Unsqueeze (k4_r,",
        "position = Cast": (
            "all_a = Range (n_0, total0, n_1) all_b = Unsqueeze (all_a, i_0)"
            " all_c = Cast <to = 1> (all_b) all_u = Unsqueeze (all_c, i_2)"
            " all_angle = Mul (all_u, inv_freq) all_cos = Cos (all_angle) all_sin = Sin (all_angle)"
            " all_cos2 = Concat <axis = -1> (all_cos, all_cos)"
            " all_sin2 = Concat <axis = -1> (all_sin, all_sin)"
            " cos_all = Unsqueeze (all_cos2, i_1) sin_all = Unsqueeze (all_sin2, i_1)"
            " position = Cast"
        ),
        "float[4] inv_freq": "int64 n_0 = {0}, int64 n_1 = {1}, float[4] inv_freq",
    }
    model = fused(FuseRotary(), edited(ROTARY, changes))
    assert len(rotations(model)) == 2
    (event,) = events(model)
    assert "those of the new tokens" in event.reason


# --- left alone -------------------------------------------------------------------------------

LEFT_ALONE: dict[str, tuple[dict[str, str], str]] = {
    "halves swapped, and the sign with them": (
        {"q4_n = Neg (q4_2)": "q4_n = Identity (q4_2)", "(q4_n, q4_1)": "(q4_m, q4_n)",
         "q4_t =": "q4_m = Neg (q4_1) q4_t ="},
        "what meets the sine is neither (-x2, x1) nor (-x[1], x[0]) pair by pair",
    ),
    "both halves negative": (
        {"(q4_n, q4_1)": "(q4_n, q4_m)", "q4_t =": "q4_m = Neg (q4_1) q4_t ="},
        "what meets the sine is neither (-x2, x1) nor (-x[1], x[0]) pair by pair",
    ),
    "not turned": (
        {"(q4_n, q4_1)": "(q4_1, q4_n)"},
        "what meets the sine is neither",
    ),
    "no sign": (
        {"q4_n = Neg (q4_2)": "q4_n = Identity (q4_2)"},
        "what meets the sine is neither",
    ),
    "scaled": (
        {"q4_n = Neg (q4_2)": "q4_d = Add (q4_2, q4_2) q4_n = Neg (q4_d)"},
        "what meets the sine is neither",
    ),
    "tables per head": (
        {"q4_cos = Mul (q4, cos)": "head_cos = Mul (cos, sizes) q4_cos = Mul (q4, head_cos)",
         "float[4] inv_freq": "float[4, 1, 1] sizes = {1, 2, 3, 4}, float[4] inv_freq"},
        "does not run over [B, S, R]",
    ),
    "one cosine for all": (
        {"q4_cos = Mul (q4, cos)": "few = Slice (cos, i_0, i_1, i_3) q4_cos = Mul (q4, few)"},
        "does not run over [B, S, R]",
    ),
    "a pair with two frequencies": (
        {"cos_b = Concat <axis = -1> (cos_a,": (
            "cos_x = Neg (cos_a) cos_b = Concat <axis = -1> (cos_x,")},
        "the two elements of a rotated pair meet different numbers",
    ),
    "half-style tables for neighbours": (
        {"q4_t = Concat <axis = -1> (q4_n, q4_1)": (
            "q4_o = Slice (q4, i_1, i_9999, i_3, i_2) q4_e = Slice (q4, i_0, i_9999, i_3, i_2)"
            " q4_m = Neg (q4_o) q4_mu = Unsqueeze (q4_m, i_4) q4_eu = Unsqueeze (q4_e, i_4)"
            " q4_c = Concat <axis = 4> (q4_mu, q4_eu) q4_t = Reshape (q4_c, i_flat)"),
         "float[4] inv_freq": "int64[4] i_flat = {0, 0, 0, -1}, float[4] inv_freq"},
        "the two elements of a rotated pair",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", LEFT_ALONE)
def test_leaves_alone(case: str, caplog: pytest.LogCaptureFixture) -> None:
    changes, why = LEFT_ALONE[case]
    with caplog.at_level(logging.INFO, logger="omforge"):
        model = fused(FuseRotary(), edited(ROTARY, changes))
    assert why in caplog.text
    # The keys' embedding is as it should be: alone the queries' is spoilt.
    assert len(rotations(model)) <= 1
    assert "q4_cos" in [value.name for node in model.graph for value in node.outputs]


def test_does_not_look_at_sums_of_other_ranks() -> None:
    """A gated sum of products is no rotary embedding."""
    changes = {"hidden = MatMul (joined, wo)": (
        "hidden_a = MatMul (joined, wo) hidden_b = Mul (hidden_a, cold)"
        " hidden_c = Mul (x, cold) hidden = Add (hidden_b, hidden_c)"),
        "float[4] inv_freq": "float cold = {0.5}, float[4] inv_freq"}  # fmt: skip
    model = fused(FuseRotary(), edited(ROTARY, changes))
    assert ops(model).count("RotaryEmbedding") == 2
    assert not events(model)


# --- real exports -----------------------------------------------------------------------------


@pytest.mark.parametrize("route", ["optimum", "dynamo", "hfexporter", "torchscript-op17"])
def test_raises_every_embedding_of_an_export(
    route: str, exported: Callable[[str, str], Path]
) -> None:
    model = ir.load(exported(route, "llama_gqa"))
    make_pipeline("canonicalize,fuse-rotary").run(model)
    found = rotations(model)
    assert [attribute(node, "num_heads") for node in found] == [4, 2, 4, 2]
    assert len({node.inputs[1] for node in found}) == 1
    assert not events(model)
