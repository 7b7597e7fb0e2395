"""A file of lengths: what it says, and what it must not say."""

from pathlib import Path

import pytest

from omforge import ir
from omforge.planning.lengths import Lengths, read_lengths


def read(tmp_path: Path, text: str) -> Lengths:
    (tmp_path / "lengths.txt").write_text(text)
    return read_lengths(tmp_path / "lengths.txt")


def test_a_line_is_a_prompt(tmp_path: Path) -> None:
    found = read(tmp_path, "# prompts\n12\n700\n\n12\n")
    assert found.prompts == {12: 2, 700: 1}
    assert (found.count, found.tokens, found.longest) == (3, 724, 700)
    assert found.steps == {}


def test_a_second_number_is_the_answer(tmp_path: Path) -> None:
    found = read(tmp_path, "5 3\n6,2\n")
    # The prompt itself gives the first token of an answer.
    assert found.steps == {6: 1, 7: 2}
    assert found.longest == 8


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "has no lengths: it is empty"),
        ("# nothing\n", "has no lengths: it is empty"),
        ("12\ntwelve\n", "line 2: 'twelve' is no length"),
        ("-3\n", "line 1: '-3' is no length"),
        ("1 2 3\n", "line 1: '1 2 3' is no length"),
        ("0\n", "line 1: a prompt of 0 tokens"),
    ],
)
def test_what_is_no_list_of_lengths_says_so(tmp_path: Path, text: str, why: str) -> None:
    with pytest.raises(ir.InputError, match=why):
        read(tmp_path, text)


def test_a_file_that_is_not_there_says_so(tmp_path: Path) -> None:
    with pytest.raises(ir.InputError, match=r"cannot read the lengths .*none.*Write one number"):
        read_lengths(tmp_path / "none")
