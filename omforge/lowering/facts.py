"""What was seen on a device, and what follows for the tables.

`omforge probe` writes a facts file; a `Facts` is one that was read. What a table infers, a line of
`data/claims.tsv` hangs on a probe's answer: the *claim* `zero-element-pse=right` holds where that
probe answered `right`, and does not where it answered anything else. Nothing follows from a probe
that was not asked or gave no answer.

Sources of a fact are then the file, its SoC and its CANN; `Verdict.words` says so.
"""

from __future__ import annotations

import functools
import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

from omforge.ir.errors import InputError
from omforge.ir.json_text import parse_json
from omforge.lowering.tables import table_rows
from omforge.lowering.target import Target, target

SCHEMA = 1
_AGAIN = "Write it again: omforge probe, or omforge probe --read"


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

    @property
    def front(self) -> Literal["onnx", "air"]:
        """The front that the device has shown to be the better one; `onnx` where it has not."""
        wanted = ("air-taken=taken", "cache-in-place=in-place", "two-models-one-cache=right")
        return "air" if all(map(self.is_seen, wanted)) else "onnx"

    def __str__(self) -> str:
        cann = f" and CANN {self.cann}" if self.cann else ""
        return f"{self.path}: {len(self.seen)} facts of {self.soc}{cann}"


NOTHING_SEEN = Facts()

Table = Literal["rule", "form", "operator", "release", "plugin"]
"""A table with rows that are inferred: the rules, `choices`, llm_ops.tsv, cann_releases.tsv and
onnx_plugins.tsv."""


@functools.lru_cache(maxsize=1)
def claims() -> Mapping[tuple[Table, str], str]:
    """What each inferred row claims, by table and key; the key of a row is `row_key`'s."""
    return {
        (cast("Table", row["table"]), row["key"]): row["claim"] for row in table_rows("claims.tsv")
    }


def row_key(name: str, what: str) -> str:
    """The key of a row that has no name of its own: what it is about, and how it begins."""
    return f"{name}: {' '.join(what.split()[:6])}"


def read_facts(path: str | os.PathLike[str], soc: Target) -> Facts:
    """Read a facts file for a SoC.

    Raises:
        InputError: It cannot be read, is none, is of a simulation, or is another family's.
    """
    file = Path(path)
    try:
        data = file.read_bytes()
    except OSError as error:
        raise InputError(f"cannot read {file}", error.strerror or str(error), _AGAIN) from error
    try:
        document: Any = parse_json(data)
    except ValueError as error:
        raise InputError(f"{file} is no facts file", str(error), _AGAIN) from error
    found = _facts(file, document, hashlib.sha256(data).hexdigest())
    if target(found.soc).family.name != soc.family.name:
        raise InputError(
            f"{file} has facts of {found.soc}",
            f"{soc.soc_version} is of another family ({soc.family.name})",
            "Give the facts of a SoC of that family, or none",
        )
    return found


def _facts(file: Path, document: Any, digest: str) -> Facts:
    if not isinstance(document, dict):
        raise InputError(f"{file} is no facts file", "it is no JSON object", _AGAIN)
    held = cast("dict[str, Any]", document)
    if held.get("schema") != SCHEMA:
        raise InputError(
            f"{file} is no facts file of this omforge",
            f"its schema is {held.get('schema')!r}, not {SCHEMA}",
            _AGAIN,
        )
    if held.get("simulated") is not False:
        raise InputError(
            f"{file} says nothing of a device",
            "its answers are the simulator's",
            "Run omforge probe where CANN and a device are",
        )
    soc, cann, answers = held.get("soc"), held.get("cann"), held.get("answers")
    if not (isinstance(soc, str) and isinstance(cann, str) and isinstance(answers, dict)):
        raise InputError(f"{file} is no facts file", "soc, cann or answers is missing", _AGAIN)
    seen: dict[str, Seen] = {}
    for probe, answer in cast("dict[str, Any]", answers).items():
        value, evidence, number = _answer(file, probe, answer)
        if value is not None:
            seen[probe] = Seen(value, evidence, number)
    return Facts(soc, cann, seen, file, digest)


def _answer(file: Path, probe: str, answer: Any) -> tuple[str | None, str, float | None]:
    fields: dict[str, Any] = cast("dict[str, Any]", answer) if isinstance(answer, dict) else {}
    value, evidence, number = (fields.get(name) for name in ("value", "evidence", "number"))
    right = (
        (value is None or isinstance(value, str))
        and isinstance(evidence, str)
        and (number is None or (isinstance(number, int | float) and not isinstance(number, bool)))
    )
    if not right:
        raise InputError(f"{file}: the answer of {probe} is none", f"it is {answer!r}", _AGAIN)
    assert isinstance(evidence, str)
    return value, evidence, number


def facts_folder(environment: Mapping[str, str] | None = None) -> Path:
    """Where facts are found without being named: omforge in the XDG configuration folder."""
    environment = os.environ if environment is None else environment
    base = environment.get("XDG_CONFIG_HOME") or Path.home() / ".config"
    return Path(base) / "omforge"


def find_facts(soc: Target, environment: Mapping[str, str] | None = None) -> tuple[Path, ...]:
    """The facts files of exactly that SoC in the user's configuration folder, by name."""
    folder = facts_folder(environment)
    return tuple(sorted(folder.glob(f"facts-*-{soc.soc_version}.json")))


def file_name(cann: str, soc: str) -> str:
    """What the facts of a CANN and a SoC are called."""
    return f"facts-{cann or 'unknown'}-{soc}.json"
