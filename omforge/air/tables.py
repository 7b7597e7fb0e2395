"""The tables of `omforge/air/data`, read as they are.

`prototypes.tsv`: every operator that CANN 8.1.RC1 registers (opp/built-in/op_proto/inc/*.h), in the
order of its headers. `kernels.tsv`: the AI Core kernels of CANN 8.1.RC1 by SoC family
(opp/built-in/op_impl/ai_core/tbe/config/<soc>/aic-<soc>-ops-info.json), for 221 operators.
"""

from __future__ import annotations

import importlib.resources
from collections.abc import Iterator


def table_rows(file: str) -> Iterator[tuple[str, ...]]:
    """Yield the rows of one table behind its heading."""
    path = importlib.resources.files("omforge.air") / "data" / file
    for line in path.read_text(encoding="utf-8").splitlines()[1:]:
        yield tuple(line.split("\t"))
