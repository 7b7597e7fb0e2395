"""A row of the table of forms (`choices`): the record, and the sets that rows are written with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from omforge.ir.fronts import Front

Certainty = Literal["parser", "source", "documented", "uncertain"]
"""How it is known: the real parser was run, CANN's sources say so, its documents say so, or the
sources leave it open."""

ALL = frozenset(("310p", "910b", "910_93", "310b", "950"))
# What CANN 8.1's operator tables list for RmsNorm, AddRmsNorm.
NORMS = frozenset(("310p", "910b", "910_93", "950"))
WEIGHT_QUANT = frozenset(("310p", "910b", "910_93", "950"))
QUANT_MATMUL = frozenset(("310p", "910b", "910_93", "950"))
NOWHERE = frozenset[str]()

BOTH = frozenset[Front](("onnx", "air"))
ONNX, AIR = frozenset[Front](("onnx",)), frozenset[Front](("air",))


@dataclass(frozen=True)
class Choice:
    """One form of one operator.

    Attributes:
        op: The canonical operator, or a subject of the whole graph ("cache").
        form: The form's name, as `forms` and reports spell it.
        families: The SoC families that have it (`target.Family.name`).
        when: Its conditions.
        reason: Why it is preferred, or why not.
        source: Where that was read.
        certainty: How it is known.
        fronts: Where it can be said: in ONNX graphs, in GE's, or in both.
        opt_in: It is chosen only when asked for.
    """

    op: str
    form: str
    families: frozenset[str]
    when: str
    reason: str
    source: str
    certainty: Certainty
    opt_in: bool = False
    fronts: frozenset[Front] = BOTH


DECOMPOSED = "decomposed"
