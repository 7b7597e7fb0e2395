"""Streaming text: nothing is shown before it is whole."""

import pytest

from omforge.runtime.text_stream import TextStream


class Bytes:
    """A tokenizer of one token a byte that, as SentencePiece does, drops a leading space."""

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        return list(text.encode())

    def decode(
        self,
        token_ids: list[int],
        *,
        skip_special_tokens: bool = False,
        clean_up_tokenization_spaces: bool | None = None,
    ) -> str:
        assert skip_special_tokens
        assert clean_up_tokenization_spaces is False
        return bytes(token_ids).decode(errors="replace").removeprefix(" ")


def pieces(data: bytes, context: bytes = b"") -> list[str]:
    stream = TextStream(Bytes(), list(context))
    return [*(stream.push(token) for token in data), stream.finish()]


def test_ascii_comes_token_by_token():
    assert pieces(b"abc") == ["a", "b", "c", ""]


def test_a_character_of_several_tokens_comes_at_once():
    assert pieces("aé😀b".encode()) == ["a", "", "é", "", "", "", "😀", "b", ""]


@pytest.mark.parametrize("text", ["naïve – 東京 😀😀", "🏳️‍🌈", " x  y "])
def test_the_pieces_are_the_whole_text(text: str):
    assert "".join(pieces(text.encode(), context=b"_")) == text


def test_a_space_in_front_is_kept_behind_a_prompt():
    assert pieces(b" a", context=b"prompt") == [" ", "a", ""]


def test_an_unfinished_character_is_shown_at_the_end_only():
    assert pieces("a😀".encode()[:-1]) == ["a", "", "", "", "\ufffd"]


def test_bytes_that_are_no_character_do_not_block_what_follows():
    assert pieces(b"a\xffb") == ["a", "", "\ufffdb", ""]


def test_a_prompt_that_ends_inside_a_character_is_completed():
    smile = "😀".encode()
    assert pieces(smile[2:] + b"!", context=b"ab" + smile[:2]) == ["", "😀", "!", ""]


def test_a_long_text_is_not_decoded_again_and_again():
    class Counting(Bytes):
        longest = 0

        def decode(self, token_ids: list[int], **options: bool | None) -> str:
            self.longest = max(self.longest, len(token_ids))
            return super().decode(token_ids, **options)

    tokenizer = Counting()
    stream = TextStream(tokenizer)
    assert "".join(stream.push(token) for token in b"ab" * 200) == "ab" * 200
    assert tokenizer.longest < 20
