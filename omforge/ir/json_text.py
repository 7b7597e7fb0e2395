"""Parsing JSON that somebody else wrote."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any


def parse_json(text: str | bytes, *, constant: Callable[[str], Any] | None = None) -> Any:
    """Parse JSON; whatever is wrong with the text is a ValueError.

    Args:
        text: The text.
        constant: Told `NaN`, `Infinity` or `-Infinity`, which JSON does not have.

    Raises:
        ValueError: It is no JSON, or its brackets are nested deeper than the parser can follow.
    """
    try:
        return json.loads(text, parse_constant=constant)
    except RecursionError:
        raise ValueError("its brackets are nested too deep to be read") from None
