"""length-choices: a position that has another row in a longer text."""

import pytest

from omforge.recognition.lengths.bounds import find_bounds
from omforge.recognition.lengths.choices import tied_rows
from tests.passes import lengths


@pytest.mark.parametrize(
    ("frequency", "tokens", "chooser"),
    [
        (lengths.LONGEST, 7, " (Where -> frequency chooses)"),  # positions count from 0
        (lengths.BRANCHES, 6, " (If -> frequency chooses)"),
        (lengths.SCALED, 6, ""),
    ],
    ids=["where", "if", "max"],
)
def test_a_text_ends_where_its_rows_change(frequency: str, tokens: int, chooser: str) -> None:
    model = lengths.model(frequency + lengths.TURNED)
    (bound,) = find_bounds(model, 100)
    assert bound.tokens == tokens
    assert bound.why == (
        f"beyond {tokens} tokens the graph computes something else for the same positions{chooser}, "
        "while the cache holds what it computed before"
    )


def test_what_counts_from_the_last_token_is_no_choice() -> None:
    """It never is the same in two texts: a decay towards the end, a bias that softmax ignores."""
    body = "ahead = ReduceMax (position_ids) p = Sub (ahead, position_ids) " + lengths.TURNED
    body = body.replace("p = Unsqueeze (position_ids, last)", "r = Unsqueeze (p, last)")
    body = body.replace("(p)", "(r)").replace("frequency", "slow")
    assert find_bounds(lengths.model(body), 100) == ()


def test_rows_of_a_batch_may_have_one_length() -> None:
    model = lengths.model(lengths.LONGEST + lengths.TURNED)
    assert "place, which Cos" in tied_rows(model, 20)  # the longest row decides for all
    assert tied_rows(model, 7) == ""


def test_rows_that_read_the_first_ones_positions_are_tied() -> None:
    body = "mine = Gather (position_ids, first, axis = 0) " + lengths.TURNED
    body = body.replace("(position_ids, last)", "(mine, last)").replace("frequency", "slow")
    body = body.replace(
        "Gather (position_ids, first, axis = 0)", "Gather <axis = 0> (position_ids, first)"
    )
    assert "follows the positions of other rows" in tied_rows(lengths.model(body), 20)
