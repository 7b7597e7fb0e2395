"""Token numbers in files."""

from pathlib import Path

import numpy as np
import pytest

from omforge.ir.errors import InputError
from omforge.quantization.token_file import leading_tokens, read_tokens


def test_pieces_are_the_rows_of_the_file(tmp_path: Path) -> None:
    np.save(tmp_path / "t.npy", np.arange(6).reshape(2, 3))
    np.testing.assert_array_equal(
        np.stack(read_tokens(str(tmp_path / "t.npy"))), [[0, 1, 2], [3, 4, 5]]
    )
    assert read_tokens("") == ()


@pytest.mark.parametrize(
    "array", [np.zeros((2, 3)), np.zeros(3, np.int64), np.zeros((2, 1), np.int64)]
)
def test_other_arrays_are_refused(tmp_path: Path, array: np.ndarray) -> None:
    np.save(tmp_path / "t.npy", array)
    with pytest.raises(InputError, match="token numbers are integers"):
        read_tokens(str(tmp_path / "t.npy"))


def test_a_file_that_is_not_there_is_named() -> None:
    with pytest.raises(InputError, match="cannot read token numbers from nothing"):
        read_tokens("nothing.npy")


@pytest.mark.parametrize("kept", [0, 4, 100, 130])
def test_a_file_that_was_cut_off_is_refused(tmp_path: Path, kept: int) -> None:
    file = tmp_path / "t.npy"
    np.save(file, np.arange(6).reshape(2, 3))
    file.write_bytes(file.read_bytes()[:kept])
    with pytest.raises(InputError, match="cannot read token numbers") as caught:
        read_tokens(str(file))
    assert caught.value.next_step == "Write them with numpy.save, or give a text"


def test_of_a_text_no_more_is_read_than_is_needed(tmp_path: Path) -> None:
    """42 MB once went through the tokenizer whole, and took over 9 GB there."""
    file = tmp_path / "t.txt"
    file.write_text("\u00e9bcd" * (1 << 20), encoding="utf-8")
    seen: list[int] = []

    def encode(text: str) -> list[int]:
        seen.append(len(text))
        return [ord(character) for character in text[::4]]

    assert leading_tokens(file, encode, 8192) == [0xE9] * 8192
    assert seen == [1 << 16]
    assert len(leading_tokens(file, encode, 40_000)) == 40_000
    assert seen[1:] == [1 << 16, 1 << 17, 1 << 18]
    # Nothing but blanks, say, has hardly a token: that ends too.
    assert leading_tokens(file, lambda text: [len(text)], 100) == [1 << 20]


def test_all_of_a_short_text_is_read(tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text("abc")
    assert leading_tokens(tmp_path / "t.txt", lambda text: [*map(ord, text)], 9) == [97, 98, 99]
