"""Text out of a stream of tokens, when one character may take several tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from omforge.ir.errors import InputError

REPLACEMENT = "\ufffd"  # what a tokenizer shows for bytes that are not (yet) a character


class Tokenizer(Protocol):
    """What omforge needs of a transformers tokenizer."""

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Return the token ids of a text."""
        ...

    def decode(
        self,
        token_ids: list[int],
        *,
        skip_special_tokens: bool = False,
        clean_up_tokenization_spaces: bool | None = None,
    ) -> str:
        """Return the text of token ids."""
        ...


def chat_tokens(tokenizer: Tokenizer, message: str) -> list[int]:
    """Return a user's message in the form that the model was tuned to answer: its chat template.

    Raises:
        InputError: The tokenizer has no template, or jinja2, which templates are written for, is
            not installed.
    """
    told: Any = tokenizer  # not every tokenizer has templates, and the protocol asks for none
    if not getattr(told, "chat_template", None):
        raise InputError(
            "the tokenizer has no chat template",
            "the model was not tuned to chat, or its template was not exported",
            "Leave out --chat",
        )
    chat = [{"role": "user", "content": message}]
    try:
        text = told.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    except ImportError as error:
        raise InputError("cannot fill in the chat template", str(error)) from error
    # The template has the special tokens already.
    return tokenizer.encode(str(text), add_special_tokens=False)


def text_inputs(
    tokenizer: Tokenizer, text: str, pair: str, further: Sequence[str]
) -> tuple[list[int], dict[str, list[int]]]:
    """Return the token ids of a text or of two, and what else the tokenizer says of each token.

    Args:
        tokenizer: Of the model.
        text: The text.
        pair: The second one, for models that judge two; "" for none.
        further: Names of further inputs, as token_type_ids; those that it knows are returned.

    Raises:
        InputError: Nothing tells the model where the second text begins.
    """
    told: Any = tokenizer  # a tokenizer is called, and the protocol asks for no such thing
    found = told(text, pair or None, return_token_type_ids="token_type_ids" in further)
    tokens = [int(token) for token in found["input_ids"]]
    numbers = {name: [int(n) for n in found[name]] for name in further if name in found}
    if not pair:
        return tokens, numbers
    first, second = (told(t, add_special_tokens=False)["input_ids"] for t in (text, pair))
    if tokens == [*first, *second] and not any(map(any, numbers.values())):
        raise InputError(
            "the tokenizer does not tell two texts apart",
            "it joins them with no token between, and the model reads no kinds of tokens",
            "Write both into --prompt as the model expects them, without --pair",
        )
    return tokens, numbers


class TextStream:
    """Turns tokens into text as they come, and holds back what is not a whole character yet.

    Tokens are decoded together with a few before them, because a tokenizer drops the space in front
    of the first token that it is given.

    Args:
        tokenizer: The bundle's tokenizer.
        context: The tokens before the first one, such as the prompt; their text is not returned.
    """

    def __init__(self, tokenizer: Tokenizer, context: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        # Eight tokens are more than any character takes, and decode in no time.
        self._done = list(context)[
            -8:
        ]  # decoded and returned; only there for its effect on the next
        self._held: list[int] = []

    def push(self, token: int) -> str:
        """Take one token; the text that is complete with it, which may be empty."""
        self._held.append(token)
        text = self._new_text()
        if text.endswith(REPLACEMENT):
            return ""
        self._done = (self._done + self._held)[-8:]
        self._held = []
        return text

    def finish(self) -> str:
        """Return what is still held back; incomplete characters as replacement characters."""
        text = self._new_text()
        self._held = []
        return text

    def _new_text(self) -> str:
        # A prompt that ends inside a character: that character belongs to the new text.
        before = self._decode(self._done).rstrip(REPLACEMENT)
        return self._decode(self._done + self._held)[len(before) :]

    def _decode(self, tokens: list[int]) -> str:
        return self._tokenizer.decode(
            tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
