"""The prompts that a server sees, as a file of numbers."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from omforge.ir.errors import InputError

_FORMAT = "Write one number of tokens a line; a second one, if any, is how many tokens answer it"


@dataclass(frozen=True)
class Lengths:
    """How long prompts are, and their answers where that is known.

    Attributes:
        prompts: How many prompts there are of each number of tokens.
        steps: How many decode steps there are behind each number of tokens; empty where no answer's
            length is known.
        longest: Tokens of the longest prompt with its answer.
    """

    prompts: Mapping[int, int]
    steps: Mapping[int, int] = field(default_factory=dict[int, int])
    longest: int = 0

    @property
    def count(self) -> int:
        """How many prompts there are."""
        return sum(self.prompts.values())

    @property
    def tokens(self) -> int:
        """Tokens of all prompts."""
        return sum(length * count for length, count in self.prompts.items())


def read_lengths(path: str | os.PathLike[str]) -> Lengths:
    """Read a file of lengths: a line is a prompt's tokens and, if known, its answer's.

    Raises:
        InputError: It cannot be read, has no number, or a line is none.
    """
    try:
        lines = Path(os.fspath(path)).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read the lengths {path}", str(error), _FORMAT) from error
    prompts, steps = Counter[int](), Counter[int]()
    longest = 0
    for at, line in enumerate(lines, 1):
        words = line.replace(",", " ").split()
        if not words or words[0].startswith("#"):
            continue
        if not all(word.isascii() and word.isdigit() for word in words) or len(words) > 2:
            raise InputError(f"{path}, line {at}: {line.strip()[:40]!r} is no length", "", _FORMAT)
        prompt, answer = int(words[0]), int(words[1]) if len(words) > 1 else 0
        if prompt < 1:
            raise InputError(f"{path}, line {at}: a prompt of 0 tokens", "", _FORMAT)
        prompts[prompt] += 1
        # The prompt gives the first token; each other one is a step behind all before it.
        steps.update(range(prompt + 1, prompt + answer))
        longest = max(longest, prompt + answer)
    if not prompts:
        raise InputError(f"{path} has no lengths", "it is empty", _FORMAT)
    return Lengths(dict(sorted(prompts.items())), dict(sorted(steps.items())), longest)
