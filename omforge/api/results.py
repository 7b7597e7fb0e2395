"""What all results are alike in: plain text, plain data, and a table in a notebook."""

from __future__ import annotations

import html
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import Any


class Result(ABC):
    """Something that was made or found out."""

    @abstractmethod
    def to_json(self) -> dict[str, Any]:
        """Return plain data, which `json.dumps` takes."""

    @abstractmethod
    def __str__(self) -> str:
        """The same in lines of text."""

    def _repr_html_(self) -> str:
        return f"<pre>{html.escape(str(self))}</pre>"


def table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Return rows of text under their headings, columns aligned."""
    cells = [list(map(str, columns)), *([str(cell) for cell in row] for row in rows)]
    widths = [max(len(row[index]) for row in cells) for index in range(len(columns))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in cells
    )
