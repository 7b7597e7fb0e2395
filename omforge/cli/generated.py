"""What `omforge run` shows of a text that was generated."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from omforge.cli import interrupts
from omforge.runtime.generate import Generation
from omforge.runtime.text_stream import TextStream

_STOPPED = {
    "eos": "the model ended the text",
    "length": "--max-new-tokens",
    "context": "the context is full",
    "interrupted": "interrupted",
}


@dataclass(frozen=True)
class Generated:
    """A text that was generated, and what it took."""

    prompt: str
    text: str
    level: str
    prompt_tokens: int
    tokens: tuple[int, ...]
    stopped: str
    prefill_seconds: float
    decode_seconds: float

    def __str__(self) -> str:
        return (
            f"[{self.level}: {self.prompt_tokens} prompt tokens in {self.prefill_seconds:.2f} s, "
            f"{len(self.tokens)} new tokens, {self.tokens_per_second:.1f} tokens/s; "
            f"stopped: {_STOPPED.get(self.stopped, self.stopped)}]"
        )

    @property
    def tokens_per_second(self) -> float:
        """New tokens by the time behind the prefill."""
        return len(self.tokens) / self.decode_seconds if self.decode_seconds else 0.0

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON data."""
        return {**dataclasses.asdict(self), "tokens_per_second": self.tokens_per_second}


def stream_text(
    generation: Generation, text: TextStream, write: Callable[[str], None] | None
) -> tuple[str, bool]:
    """Write text as its tokens come; all of it, and whether Ctrl-C ended it."""
    pieces: list[str] = []

    def put(piece: str) -> None:
        pieces.append(piece)
        if write is not None and piece:
            write(piece)

    interrupted = False
    try:
        for token in generation:
            put(text.push(token))
    except KeyboardInterrupt:
        interrupted = True
        interrupts.said()  # by what is shown of the text
    put(text.finish())
    return "".join(pieces), interrupted
