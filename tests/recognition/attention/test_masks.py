"""Masks: recognised by what they let through, and rebuilt."""

import dataclasses

import numpy as np
import pytest

from omforge import ir
from omforge.compilation.compare_feeds import make_feeds
from omforge.ir.infer import infer_model
from omforge.ir.numerics import max_abs_diff, run
from omforge.ir.values import constant
from omforge.passes.fuse_attention import FuseAttention
from omforge.passes.fuse_kv_io import FuseKvIo
from omforge.recognition.attention import masks
from omforge.recognition.attention.masks import Applied, Mask, Probe, Prober
from omforge.recognition.interface import find_interface
from omforge.rewriting.builder import Builder
from omforge.rewriting.events import events
from omforge.rewriting.match import NoMatch
from omforge.rewriting.splice import insert
from tests.passes.blocks import CHUNK, LOW, WINDOW, Block, named

INFINITE = -float("inf")


def value_of(model: ir.Model, name: str) -> ir.Value:
    """A value by its name; folding may have made a constant of it."""
    made = {v.name: v for node in model.graph for v in node.outputs}
    return made.get(name) or model.graph.initializers[f"{name}_folded"]


def edited(block: Block, changes: dict[str, str]) -> Block:
    """The block with its text changed."""
    return dataclasses.replace(block, edits=tuple(changes.items()))


def recognised(block: Block, name: str = "bias", hidden: float | None = None) -> Mask:
    model = named(block)
    prober = Prober(model, find_interface(model))
    return masks.recognise(prober, value_of(model, name), [], hidden)


@pytest.mark.parametrize("padding", [True, False])
@pytest.mark.parametrize(
    ("visible", "window"),
    [("causal", None), ("trilu", None), ("table", None), ("window", WINDOW)],
)
def test_recognises(visible: str, window: int | None, padding: bool) -> None:
    assert recognised(Block(visible=visible, padding=padding)) == Mask(window, padding, False)


@pytest.mark.parametrize(
    "fixed",
    [
        {"batch": "1"},
        {"seq": "1"},
        {"batch": "1", "seq": "4", "past": "9"},
        {"cache": False},
        {"cache": False, "batch": "1", "seq": "7"},
    ],
    ids=str,
)
@pytest.mark.parametrize("visible", ["causal", "window"])
@pytest.mark.parametrize("padding", [True, False])
def test_recognises_in_exports_of_fixed_sizes(
    fixed: dict[str, str], visible: str, padding: bool
) -> None:
    """An export of one row must be probed with padding too."""
    found = recognised(Block(visible=visible, padding=padding, **fixed))  # type: ignore[arg-type]
    assert found == Mask(WINDOW if visible == "window" else None, padding, False)


@pytest.mark.parametrize("fixed", [{}, {"batch": "1", "seq": "7"}], ids=str)
@pytest.mark.parametrize(("visible", "window"), [("all", None), ("near", WINDOW)])
@pytest.mark.parametrize("padding", [True, False])
def test_recognises_what_looks_ahead_where_there_is_no_cache(
    fixed: dict[str, str], visible: str, window: int | None, padding: bool
) -> None:
    block = Block(visible=visible, padding=padding, cache=False, **fixed)  # type: ignore[arg-type]
    assert recognised(block) == Mask(window, padding, False, causal=False)


@pytest.mark.parametrize("visible", ["all", "near", "causal", "window"])
@pytest.mark.parametrize("padding", [True, False])
def test_a_mask_without_a_cache_is_built_again(visible: str, padding: bool) -> None:
    block = Block(visible=visible, padding=padding, cache=False)
    model = named(block)
    interface = find_interface(model)
    prober = Prober(model, interface)
    kind = masks.recognise(prober, value_of(model, "bias"), [], None)
    with Builder(model) as op:
        built = masks.build(op, interface, kind, ir.DataType.FLOAT)
        insert(op, list(model.graph)[-1], by="test")
    infer_model(model)
    (again,) = (masks.recognise(prober, value, [], None) for value in [built])
    assert again == kind


def test_recognises_a_window_wherever_its_number_is() -> None:
    """In shape arithmetic, that is folded; and wider than any short prompt."""
    changes = {
        "near = Less (far, n_3)": (
            "start = Sub (total0, n_5000) near = GreaterOrEqual (key, start)"
        ),
        "int64 n_3 = {3}": "int64 n_5000 = {5000}",
    }
    assert recognised(edited(Block(visible="window", seq="1"), changes)).window == 5000


def test_recognises_a_wide_window_in_a_model_without_a_cache() -> None:
    block = Block(visible="window", cache=False)
    assert recognised(edited(block, {"int64 n_3 = {3}": "int64 n_3 = {900}"})).window == 900


def test_a_window_too_wide_to_be_probed_is_no_causal_mask() -> None:
    """Without a cache the mask is a square; one of 40,000 tokens is too large to be run."""
    block = edited(Block(visible="window", cache=False), {"int64 n_3 = {3}": "int64 n_3 = {40000}"})
    with pytest.raises(NoMatch, match="may have a window of 40000"):
        recognised(block)


@pytest.mark.parametrize(("low", "zero_rows"), [(LOW, False), (-1e4, False), (INFINITE, True)])
def test_tells_what_rows_get_that_see_nothing(low: float, zero_rows: bool) -> None:
    assert recognised(Block(low=low)).zero_rows == zero_rows
    assert recognised(Block(applied="where"), "seen", low).zero_rows == zero_rows


@pytest.mark.parametrize("zeroing", [True, False])
def test_a_guard_zeroes_rows_that_see_nothing(zeroing: bool) -> None:
    edits = () if zeroing else (("empty = Equal (most, zero)", "empty = Less (most, zero)"),)
    model = named(Block(guard="rows", edits=edits))
    prober = Prober(model, find_interface(model))
    bias, empty = value_of(model, "bias"), value_of(model, "empty")
    assert masks.recognise(prober, bias, [empty], None) == Mask(None, True, zeroing)


def test_a_guard_that_zeroes_only_some_of_them_is_left_alone() -> None:
    """Every key is hidden, and the guard knows only of those that are padding."""
    model = named(
        edited(Block(guard="rows"), {"Where (seen, zero, low)": "Where (seen, low, low)"})
    )
    prober = Prober(model, find_interface(model))
    bias, empty = value_of(model, "bias"), value_of(model, "empty")
    with pytest.raises(NoMatch, match="some rows that see nothing are zeroed, and some are not"):
        masks.recognise(prober, bias, [empty], None)


def test_masks_applied_one_after_the_other_are_one() -> None:
    model = named(Block(applied="two"))
    prober = Prober(model, find_interface(model))
    both = [Applied(value_of(model, "order"), LOW), Applied(value_of(model, "bias"))]
    assert masks.recognise_applied(prober, both, []) == Mask(None, True, False)
    assert masks.recognise_applied(prober, both[:1], []) == Mask(None, False, False)


def test_what_follows_a_mask_decides_too() -> None:
    """Scores that are halved hide less; a floor leaves a row that sees nothing its mean."""
    model = named(Block(low=INFINITE))
    prober = Prober(model, find_interface(model))
    bias = value_of(model, "bias")
    assert masks.recognise_applied(prober, [Applied(bias, factor=0.5)], []).zero_rows
    assert not masks.recognise_applied(prober, [Applied(bias, floor=LOW)], []).zero_rows
    model = named(Block(low=-2e3))
    prober = Prober(model, find_interface(model))
    halved = Applied(value_of(model, "bias"), factor=0.4)
    with pytest.raises(NoMatch, match="it adds more than a mask"):
        masks.recognise_applied(prober, [halved], [])


def test_an_inverted_mask() -> None:
    model = named(Block(applied="inverted"))
    prober = Prober(model, find_interface(model))
    hidden = value_of(model, "hidden_keys")
    assert masks.recognise_applied(prober, [Applied(hidden, LOW, True)], []).padding
    with pytest.raises(NoMatch, match="it is no causal mask"):
        masks.recognise_applied(prober, [Applied(hidden, LOW)], [])


NOT_MASKS: dict[str, tuple[Block, dict[str, str], str]] = {
    "everything": (Block(visible="all"), {}, "it is no causal mask for 3 tokens after"),
    "chunks": (Block(visible="chunk"), {}, "it is no causal mask for 3 tokens after"),
    "wide chunks": (
        Block(visible="chunk"),
        {f"int64 n_{CHUNK} = {{{CHUNK}}}": "int64 n_4 = {4096}"},
        "it is no causal mask for 3 tokens after 131069",
    ),
    "a bias for each head and no mask": (
        Block(visible="alibi"),
        {},
        "it is no causal mask for 3 tokens after",
    ),
    "a bias": (Block(), {"float zero = {0.0}": "float zero = {0.5}"}, "it adds more than a mask"),
    "a weak mask": (Block(low=-10.0), {}, "it adds more than a mask"),
    "a head that sees nothing": (
        Block(),
        {
            "bias = Where (seen, zero, low)": (
                "alike = Where (seen, zero, low) bias = Add (alike, second)"
            ),
            "float zero = {0.0}": (
                f"float zero = {{0.0}}, float[1, 4, 1, 1] second = {{0.0, {LOW / 4}, 0.0, 0.0}}"
            ),
        },
        "its heads see different keys",
    ),
    "not a number": (
        Block(),
        {"bias = Where (seen, zero, low)": "nan = Div (zero, zero) bias = Where (seen, zero, nan)"},
        "it adds more than a mask",
    ),
    "one behind": (
        Block(),
        {"LessOrEqual (key, query)": "Less (key, query)"},
        "it is no causal mask",
    ),
    "one ahead": (
        Block(),
        {"query = Unsqueeze (query_a,": "more = Add (query_a, n_1) query = Unsqueeze (more,"},
        "it is no causal mask",
    ),
    "the cache's length left out": (
        Block(),
        {
            "query_a = Range (past0, total0, n_1)": (
                "seq0 = Squeeze (seq1) query_a = Range (n_0, seq0, n_1)"
            )
        },
        "it is no causal mask",
    ),
    "padding of the first row for all": (
        Block(),
        {
            "shown = Unsqueeze (real,": (
                "some = Slice (real, i_none, i_one, i_none) shown = Unsqueeze (some,"
            ),
            "int64 n_0 = {0}": "int64 n_0 = {0}, int64[1] i_none = {0}, int64[1] i_one = {1}",
        },
        "it is no causal mask",
    ),
    "positions in place of slots": (
        Block(),
        {
            "query = Unsqueeze (query_a, i_1)": "query = Unsqueeze (position_ids, i_around)",
            "int64 n_0 = {0}": "int64 n_0 = {0}, int64[2] i_around = {1, 3}",
        },
        "it is no causal mask",
    ),
}


@pytest.mark.parametrize("case", NOT_MASKS)
def test_takes_nothing_else_for_a_mask(case: str) -> None:
    block, changes, why = NOT_MASKS[case]
    with pytest.raises(NoMatch, match=why):
        recognised(edited(block, changes))


def test_what_depends_on_the_tokens_is_no_mask() -> None:
    changes = {"real = Cast <to = 9> (attention_mask)": "real = Cast <to = 9> (input_ids)"}
    with pytest.raises(NoMatch, match="it depends on input_ids"):
        recognised(edited(Block(), changes))


def test_a_past_that_is_no_cache_of_the_interface_is_not_taken_for_empty() -> None:
    """Nothing is known of a cache that the interface does not know: its length is not 0."""
    changes = {
        "Concat <axis = 2> (past_key, k4)": "Max (past_key, past_key)",
        "Concat <axis = 2> (past_value, v4)": "Max (past_value, past_value)",
    }
    with pytest.raises(NoMatch, match="cannot be compared"):
        recognised(edited(Block(), changes))


GIVEN = {
    "int64[batch, total] attention_mask": "float[batch, 1, seq, total] attention_mask",
    "bias = Where (seen, zero, low)": "bias = Identity (attention_mask)",
}
TRUTHS = {
    "int64[batch, total] attention_mask": "bool[batch, 1, seq, total] attention_mask",
    "bias = Where (seen, zero, low)": "bias = Where (attention_mask, zero, low)",
}


@pytest.mark.parametrize("changes", [GIVEN, TRUTHS], ids=["floats", "booleans"])
def test_a_mask_that_the_caller_makes_is_the_causal_one(changes: dict[str, str]) -> None:
    assert recognised(edited(Block(), changes)) == Mask(None, True, False)
    original, model = named(edited(Block(), changes)), named(edited(Block(), changes))
    assert FuseAttention().run(model) == 1
    for feeds in make_feeds(model):
        assert feeds["attention_mask"].shape[1:3] == (1, feeds["input_ids"].shape[1])
        expected, found = run(original, feeds), run(model, feeds)
        assert max_abs_diff(found["logits"], expected["logits"]) < 1e-5
    FuseKvIo().run(model)
    mask = next(v for v in model.graph.inputs if v.name == "attention_mask")
    assert str(mask.shape) == "[batch,1,seq,capacity + seq]"


def test_another_mask_beside_that_of_the_caller_is_left_alone() -> None:
    model = named(
        edited(
            Block(visible="window"),
            {
                **GIVEN,
                "bias = Where (seen, zero, low)": (
                    "own = Where (near, zero, low) bias = Add (own, attention_mask)"
                ),
            },
        )
    )
    assert FuseAttention().run(model) == 0
    assert any("makes another beside it" in event.reason for event in events(model))


# --- rebuilt ----------------------------------------------------------------------------------


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("padding", [True, False])
@pytest.mark.parametrize("zero_rows", [True, False])
@pytest.mark.parametrize("cache", [True, False])
def test_builds_what_it_says(
    window: int | None, padding: bool, zero_rows: bool, cache: bool
) -> None:
    mask = Mask(window, padding, zero_rows)
    model = named(Block(cache=cache))
    interface = find_interface(model)
    with Builder(model) as op:
        made = masks.build(op, interface, mask, ir.DataType.FLOAT)
        insert(op, next(iter(model.graph)), by="test")
    infer_model(model)
    hidden = INFINITE if zero_rows else None
    found = masks.recognise(Prober(model, interface), made, [], hidden)
    # Without padding every query sees something, itself at least.
    assert found == dataclasses.replace(mask, zero_rows=zero_rows and padding)
    ir.check(model)
    assert made.dtype == (ir.DataType.BOOL if zero_rows else ir.DataType.FLOAT)


@pytest.mark.parametrize("dtype", [ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16])
def test_builds_a_mask_that_leaves_room_for_a_score(dtype: ir.DataType) -> None:
    model = named(Block())
    with Builder(model) as op:
        masks.build(op, find_interface(model), Mask(None, True, False), dtype)
    numbers = [constant(v) for v in op.constants.values() if v.dtype == dtype]
    smallest = min(float(array) for array in numbers if array is not None)
    assert float(dtype.min) < smallest <= 0.49 * float(dtype.min)


def test_a_probe_counts_positions_as_callers_do() -> None:
    probe = Probe(1, 3, np.array([[0, 1, 1, 1], [1, 1, 1, 0]]))
    np.testing.assert_array_equal(probe.position_ids, [[0, 1, 2], [1, 2, 2]])


def test_a_query_sees_itself_and_what_is_before() -> None:
    probe = Probe(1, 2, np.array([[0, 1, 1]]))
    causal = Mask(None, False, False).visible(probe)
    np.testing.assert_array_equal(causal, [[[True, True, False], [True, True, True]]])
    padded = Mask(None, True, False).visible(probe)
    np.testing.assert_array_equal(padded, [[[False, True, False], [False, True, True]]])
    narrow = Mask(1, False, False).visible(probe)
    np.testing.assert_array_equal(narrow, [[[False, True, False], [False, False, True]]])
