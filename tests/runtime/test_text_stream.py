"""Streaming text: nothing is shown before it is whole."""

import pytest

from omforge import ir
from omforge.runtime.text_stream import TextStream, chat_tokens, text_inputs


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


class Chatty(Bytes):
    """With a template, as transformers keeps it."""

    chat_template = "<user>{{ content }}<assistant>"
    missing = False

    def apply_chat_template(
        self, chat: list[dict[str, str]], *, tokenize: bool, add_generation_prompt: bool
    ) -> str:
        if self.missing:
            raise ImportError("apply_chat_template requires jinja2 to be installed")
        assert not tokenize
        assert add_generation_prompt
        return "".join(f"<{turn['role']}>{turn['content']}" for turn in chat) + "<assistant>"

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        return [*[0] * add_special_tokens, *text.encode()]


def test_a_message_goes_into_the_chat_template() -> None:
    # Without a beginning-of-text token: the template has the special tokens already.
    assert bytes(chat_tokens(Chatty(), "Hi")) == b"<user>Hi<assistant>"


def test_chat_without_a_template_is_refused() -> None:
    with pytest.raises(ir.InputError, match="no chat template"):
        chat_tokens(Bytes(), "Hi")


def test_chat_without_jinja2_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Chatty, "missing", True)
    with pytest.raises(ir.InputError, match="requires jinja2"):
        chat_tokens(Chatty(), "Hi")


class Pairs(Bytes):
    """A tokenizer that joins two texts, by a token between or by none."""

    def __init__(self, between: bytes) -> None:
        self.between = between

    def __call__(self, text: str, pair: str | None = None, **options: bool) -> dict[str, list[int]]:
        second = b"" if pair is None else self.between + pair.encode()
        kinds = [0] * len(text) + [1] * len(second)
        return {"input_ids": list(text.encode() + second), "token_type_ids": kinds}


@pytest.mark.parametrize(("between", "further"), [(b"|", []), (b"", ["token_type_ids"])])
def test_two_texts_are_told_apart_by_a_token_or_by_kinds(between: bytes, further: list[str]):
    tokens, numbers = text_inputs(Pairs(between), "ab", "cd", further)
    assert bytes(tokens) == b"ab" + between + b"cd"
    assert list(numbers) == further


def test_two_texts_that_nothing_tells_apart_are_refused():
    with pytest.raises(ir.InputError, match="does not tell two texts apart"):
        text_inputs(Pairs(b""), "ab", "cd", [])
    assert text_inputs(Pairs(b""), "ab", "", [])[0] == list(b"ab")
