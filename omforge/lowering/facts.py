"""What was seen on a device, and what follows for the tables.

`omforge probe` writes a facts file; a `Facts` is one that was read (`facts_file`), and is part of
the target that it is about. What a table infers, a line of
`data/claims.tsv` hangs on a probe's answer: the *claim* `zero-element-pse=right` holds where that
probe answered `right`, and does not where it answered anything else. Nothing follows from a probe
that was not asked or gave no answer.

Sources of a fact are then the file, its SoC and its CANN; `Verdict.words` says so.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, cast

from omforge.ir.fronts import Front
from omforge.lowering.tables import table_rows


@dataclass(frozen=True)
class Seen:
    """One probe's answer: its value, a figure where it is one, and what it was read from."""

    value: str
    evidence: str
    number: float | None = None


@dataclass(frozen=True)
class Verdict:
    """Whether a claim holds, and in words what was seen."""

    holds: bool
    words: str


@dataclass(frozen=True)
class Facts:
    """What was seen with one CANN on one SoC. `Facts()` has seen nothing.

    Attributes:
        soc: The SoC, as atc's --soc_version.
        cann: The version of CANN; "" where no file said so.
        seen: The answers by probe.
        path: The file; None for facts that are none's.
        sha256: Of the file.
    """

    soc: str = ""
    cann: str = ""
    seen: Mapping[str, Seen] = field(default_factory=dict[str, Seen])
    path: Path | None = None
    sha256: str = ""

    def verdict(self, claim: str) -> Verdict | None:
        """Judge a claim `PROBE=VALUE|VALUE…`; None where the probe gave no answer."""
        probe, _, values = claim.partition("=")
        found = self.seen.get(probe)
        if found is None:
            return None
        where = f"{self.soc} with CANN {self.cann}" if self.cann else self.soc
        words = f"seen on {where}: {probe} is {found.value} ({found.evidence})"
        return Verdict(found.value in values.split("|"), words)

    def of(self, table: Table, key: str) -> Verdict | None:
        """Judge what `claims.tsv` says of a row of a table."""
        claim = claims().get((table, key))
        return None if claim is None else self.verdict(claim)

    def is_seen(self, claim: str) -> bool:
        """Whether a claim was seen to hold."""
        found = self.verdict(claim)
        return found is not None and found.holds

    def figure(self, probe: str) -> float | None:
        """What a probe has measured; None where it was not asked."""
        found = self.seen.get(probe)
        return None if found is None else found.number

    @property
    def front(self) -> Front:
        """The front that the device has shown to be the better one; `onnx` where it has not."""
        wanted = ("air-taken=taken", "cache-in-place=in-place", "two-models-one-cache=right")
        return "air" if all(map(self.is_seen, wanted)) else "onnx"

    def __str__(self) -> str:
        cann = f" and CANN {self.cann}" if self.cann else ""
        return f"{self.path}: {len(self.seen)} facts of {self.soc}{cann}"


NOTHING_SEEN = Facts()

Table = Literal["rule", "form", "target", "operator", "release", "plugin"]
"""A table with rows that are inferred: the rules, `choices`, the targets' facts, llm_ops.tsv,
cann_releases.tsv and onnx_plugins.tsv."""


@functools.lru_cache(maxsize=1)
def claims() -> Mapping[tuple[Table, str], str]:
    """What each inferred row claims, by table and key; the key of a row is `row_key`'s."""
    return {
        (cast("Table", row["table"]), row["key"]): row["claim"] for row in table_rows("claims.tsv")
    }


def row_key(name: str, what: str) -> str:
    """The key of a row that has no name of its own: what it is about, and how it begins."""
    return f"{name}: {' '.join(what.split()[:6])}"
