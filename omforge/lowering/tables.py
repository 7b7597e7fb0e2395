"""The tables of `omforge/lowering/data`, read as they are.

Our check and the simulated atc both read them from here, two of them by way of `plugins` and
`ge_inference`. How each reads a model, and what it says, is its own.
"""

from __future__ import annotations

import csv
import importlib.resources
from collections.abc import Iterator


def table_rows(file: str) -> Iterator[dict[str, str]]:
    """Yield the rows of one table, by column."""
    path = importlib.resources.files("omforge.lowering") / "data" / file
    lines = path.read_text(encoding="utf-8").splitlines()
    # QUOTE_NONE: a dtype given as a template parameter is written "T1", quotes included.
    yield from csv.DictReader(lines, delimiter="\t", quoting=csv.QUOTE_NONE)
