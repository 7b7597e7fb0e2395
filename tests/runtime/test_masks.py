"""The additive masks and positions, drawn: `.` is visible, `x` is masked."""

import numpy as np
import pytest

from omforge.runtime.masks import additive_mask, key_positions, positions


def drawn(window: int | None, first: list[int], **sizes: int) -> list[list[str]]:
    """The mask as one list of text rows for each batch entry: cache slots | new tokens."""
    mask = additive_mask(window, np.array(first), dtype="float32", mask_value=-9.0, **sizes)
    assert mask.shape == (len(first), 1, sizes["seq"], sizes["capacity"] + sizes["seq"])
    assert set(np.unique(mask)) <= {0.0, -9.0}
    split = sizes["capacity"]
    rows = [
        ["".join(".x"[int(value < 0)] for value in line) for line in entry[0]] for entry in mask
    ]
    return [[f"{line[:split]}|{line[split:]}" for line in entry] for entry in rows]


def test_a_prefill_is_causal_and_sees_no_empty_slot():
    assert drawn(None, [0], past=0, seq=3, count=3, capacity=4) == [
        ["xxxx|.xx", "xxxx|..x", "xxxx|..."]
    ]


def test_a_decode_step_sees_the_valid_slots_and_itself():
    assert drawn(None, [0], past=2, seq=1, count=1, capacity=4) == [["..xx|."]]


def test_a_chunk_sees_the_cache_and_its_own_past():
    assert drawn(None, [0], past=3, seq=2, count=2, capacity=4) == [["...x|.x", "...x|.."]]


def test_a_window_of_three_reaches_two_tokens_back_across_the_cache_border():
    assert drawn(3, [0], past=3, seq=3, count=3, capacity=4) == [
        ["x..x|.xx", "xx.x|..x", "xxxx|..."]
    ]


def test_a_window_of_one_sees_only_itself():
    assert drawn(1, [0], past=2, seq=2, count=2, capacity=2) == [["xx|.x", "xx|x."]]


def test_left_padding_stays_hidden_and_each_padded_query_sees_itself():
    assert drawn(None, [2, 0], past=0, seq=3, count=3, capacity=1) == [
        ["x|.xx", "x|x.x", "x|xx."],
        ["x|.xx", "x|..x", "x|..."],
    ]


def test_left_padding_is_hidden_in_later_steps_too():
    assert drawn(None, [2, 0], past=3, seq=1, count=1, capacity=4) == [["xx.x|."], ["...x|."]]


def test_bucket_padding_on_the_right_is_seen_by_nothing_but_itself():
    assert drawn(None, [0], past=1, seq=4, count=2, capacity=2) == [
        [".x|.xxx", ".x|..xx", ".x|...x", ".x|..x."]
    ]


@pytest.mark.parametrize("window", [None, 1, 3])
@pytest.mark.parametrize(("past", "count"), [(0, 1), (0, 5), (4, 2), (6, 5)])
def test_no_row_is_masked_throughout(window: int | None, past: int, count: int):
    sizes = {"past": past, "seq": 5, "count": count, "capacity": 8}
    first = np.array([0, past, past + count - 1])
    mask = additive_mask(window, first, dtype="float16", mask_value=-30000.0, **sizes)
    assert mask.dtype == np.float16
    assert (mask.max(axis=-1) == 0).all()


def test_positions_start_at_the_first_real_token():
    first = np.array([2, 0])
    assert positions(first, past=0, seq=4, count=4).tolist() == [[0, 0, 0, 1], [0, 1, 2, 3]]
    assert positions(first, past=4, seq=1, count=1).tolist() == [[2], [4]]


def test_positions_of_bucket_padding_never_leave_the_table():
    assert positions(np.array([0]), past=6, seq=4, count=2).tolist() == [[6, 7, 7, 7]]


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_key_positions_count_back_from_the_newest_token(dtype: str) -> None:
    # Three of five slots are valid, and three of four new tokens real.
    found = key_positions(past=3, seq=4, count=3, capacity=5, dtype=dtype)
    assert found.dtype == dtype
    assert found.shape == (1, 1, 1, 9)
    assert found[0, 0, 0, :3].tolist() == [-5, -4, -3]
    assert found[0, 0, 0, 5:8].tolist() == [-2, -1, 0]
    assert np.abs(found).max() == 5  # what is hidden stays near too


def test_key_positions_rise_by_one_from_the_cache_to_the_new_tokens() -> None:
    found = key_positions(past=5, seq=1, count=1, capacity=5, dtype="float32")
    assert np.diff(found[0, 0, 0]).tolist() == [1] * 5


def test_key_positions_stay_finite() -> None:
    found = key_positions(past=70000, seq=1, count=1, capacity=70000, dtype="float16")
    assert np.isfinite(found).all()


def drawn_in_place(window: int | None, first: list[int], **sizes: int) -> list[list[str]]:
    """The mask of a cache that the step writes first: its tokens are among the slots."""
    mask = additive_mask(
        window, np.array(first), dtype="float32", mask_value=-9.0, in_place=True, **sizes
    )
    assert mask.shape == (len(first), 1, sizes["seq"], sizes["capacity"])
    return [["".join(".x"[int(v < 0)] for v in line) for line in entry[0]] for entry in mask]


def test_in_place_a_chunk_sees_the_slots_up_to_its_own():
    assert drawn_in_place(None, [0], past=2, seq=2, count=2, capacity=6) == [["...xxx", "....xx"]]


def test_in_place_a_window_and_padding_on_the_left():
    assert drawn_in_place(2, [0, 3], past=3, seq=2, count=2, capacity=6) == [
        ["xx..xx", "xxx..x"],
        ["xxx.xx", "xxx..x"],
    ]


def test_in_place_the_padding_of_a_bucket_sees_itself_and_nobody_sees_it():
    assert drawn_in_place(None, [0], past=1, seq=3, count=1, capacity=5) == [
        ["..xxx", "...xx", "..x.x"]
    ]


@pytest.mark.parametrize("window", [None, 2])
@pytest.mark.parametrize(("past", "count"), [(0, 3), (2, 1), (3, 3)])
def test_in_place_says_the_same_as_beside_the_cache(window: int | None, past: int, count: int):
    """A key is seen in its slot where it is seen among the new tokens."""
    sizes = {"past": past, "seq": 3, "count": count, "capacity": 8}
    first = np.array([0, past])
    beside = additive_mask(window, first, dtype="float32", mask_value=-9.0, **sizes)[:, 0]
    within = additive_mask(window, first, dtype="float32", mask_value=-9.0, in_place=True, **sizes)[
        :, 0
    ]
    for query in range(count):
        assert np.array_equal(within[:, query, :past], beside[:, query, :past])
        assert np.array_equal(
            within[:, query, past : past + count], beside[:, query, 8 : 8 + count]
        )
        assert (within[:, query, past + count :] == -9.0).all()


def test_in_place_key_positions_stop_at_the_newest_token() -> None:
    found = key_positions(past=3, seq=2, count=1, capacity=6, dtype="float32", in_place=True)
    assert found[0, 0, 0].tolist() == [-3, -2, -1, 0, 0, 0]
