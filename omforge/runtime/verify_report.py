"""What verify reports: every comparison, and what failed."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np

from omforge.bundle.manifest import Task
from omforge.ir.numerics import Tolerance
from omforge.runtime.same_cache import Tips


@dataclass(frozen=True)
class Comparison:
    """One level against one reference on one case.

    Attributes:
        level: What was compared.
        reference: With what.
        case: The case's name.
        lengths: Tokens of each row ahead of the steps; their number is the batch size.
        max_abs: The largest difference of a logit.
        max_rel: The same, relative to the largest logit of the reference.
        worst_step: Where it is; 0 is the prefill, then come the parts that go on at later places.
        max_abs_prefill: The largest difference of the logits behind the prompt, and the parts.
        max_abs_decode: That of the steps after it; 0 without steps.
        excess: The largest difference as a multiple of the tolerance; above 1 fails.
        divergence: The first step at which another token would be chosen, or None.
        gap: There, by how much the reference prefers its own token; the largest of the rows.
        ok: Whether the case passes.
        judged: Whether the tolerance counts. Between a quantised graph and the export it does not:
            that distance is the loss that was asked for (see `quality`). Nor does it where layers
            or the cache are int8, which float16 tips either way, unless both levels are without
            that rounding (see `unrounded`) or behind the same integers (see `same_cache`).
        output: What was compared; "" for the logits of what generates.
        finite: Whether no logit of either is infinite or NaN. (`excess` is infinite, too, where the
            tolerance is 0.)
        worst_position: The place in the text of the token that the logits of `worst_step` follow.
    """

    level: str
    reference: str
    case: str
    lengths: tuple[int, ...]
    max_abs: float
    max_rel: float
    worst_step: int
    max_abs_prefill: float
    max_abs_decode: float
    excess: float
    divergence: int | None
    gap: float | None
    ok: bool
    judged: bool = True
    finite: bool = True
    worst_position: int = 0
    output: str = ""


@dataclass(frozen=True)
class Failure:
    """One reason why a bundle is not what it was made from."""

    what: str
    why: str
    next_step: str


@dataclass(frozen=True)
class VerifyReport:
    """All comparisons of one bundle, and what failed."""

    reference: str
    steps: int
    seed: int
    tolerances: dict[str, Tolerance]
    comparisons: tuple[Comparison, ...]
    failures: tuple[Failure, ...]
    notes: tuple[str, ...]
    task: Task = "generate"
    tips: Mapping[str, Tips] = field(default_factory=dict[str, Tips])
    """By case, how an int8 cache's integers differ between lowered and canonical graph."""

    @property
    def ok(self) -> bool:
        """Whether nothing failed."""
        return not self.failures

    def worst(self, level: str) -> Comparison:
        """Return the comparison of `level` that is nearest to its tolerance, or farthest beyond."""
        return max((c for c in self.comparisons if c.level == level), key=lambda c: c.excess)

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON data; an infinite difference, which JSON lacks, becomes "inf"."""
        plain = cast("dict[str, Any]", _plain(dataclasses.asdict(self)))
        return {"ok": self.ok, **plain}


def _plain(data: object) -> object:
    if isinstance(data, Mapping):
        return {key: _plain(item) for key, item in cast("Mapping[str, object]", data).items()}
    if isinstance(data, list | tuple):
        return [_plain(item) for item in cast("Sequence[object]", data)]
    if isinstance(data, float) and not np.isfinite(data):
        return str(data)
    return data
