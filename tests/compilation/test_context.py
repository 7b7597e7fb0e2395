"""context: how long a text and a prefill may be."""

import numpy as np
import pytest

from omforge import ir
from omforge.compilation.context import choose_context, choose_prefill, cut_pieces
from omforge.recognition.lengths.bounds import Bound

BOUNDS = (Bound(4096, "config.json says n_ctx = 4096"), Bound(100, "the table t has 100 rows"))


def test_the_tightest_bound_counts() -> None:
    assert choose_context(None, BOUNDS) == 100
    assert choose_context(64, BOUNDS) == 64
    with pytest.raises(ir.InputError, match="a context of 101 tokens is too long") as told:
        choose_context(101, BOUNDS)
    assert told.value.why == "the table t has 100 rows"
    assert told.value.next_step == "Choose --context 100 or less"


def test_without_a_bound_it_is_2048_or_what_was_asked() -> None:
    assert choose_context(None, BOUNDS[:1]) == choose_context(None, ()) == 2048
    assert choose_context(9999, ()) == 9999


def test_a_prefill_fits_in_the_context() -> None:
    assert choose_prefill((), 4096) == (128,)
    assert choose_prefill((), 100) == (100,)
    assert choose_prefill((64, 16, 64), 100) == (16, 64)
    for wrong in (1, 101):
        with pytest.raises(ir.InputError, match=f"bucket of {wrong} tokens makes no sense"):
            choose_prefill((wrong,), 100)


def test_a_prefill_is_no_longer_than_the_export_can_run() -> None:
    call = Bound(64, "what renews ssm in the export is something else for more than 64 tokens")
    assert choose_prefill((), 4096, call) == (64,)
    assert choose_prefill((16, 64), 4096, call) == (16, 64)
    with pytest.raises(ir.InputError, match="128 tokens is more than the export can run") as told:
        choose_prefill((16, 128), 4096, call)
    assert told.value.why == call.why
    assert "Choose --prefill 64 or less" in told.value.next_step


def test_a_calibration_text_is_cut_into_pieces_that_fit() -> None:
    pieces = (np.arange(5), np.arange(2), np.arange(4))
    assert [piece.tolist() for piece in cut_pieces(pieces, 2)] == [
        *([0, 1], [2, 3]),  # one token is no text
        [0, 1],
        *([0, 1], [2, 3]),
    ]
    assert [len(piece) for piece in cut_pieces(pieces, None)] == [5, 2, 4]
