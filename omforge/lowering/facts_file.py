"""Facts files: where they are, what is in them, and which SoC they hold for."""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from omforge.ir.errors import InputError
from omforge.ir.json_text import parse_json
from omforge.lowering.facts import Facts, Seen
from omforge.lowering.target import Target, target

SCHEMA = 1
_AGAIN = "Write it again: omforge probe, or omforge probe --read"


def target_with(soc: str, facts: str | os.PathLike[str] | None) -> Target:
    """Return the target of a SoC with what a facts file has; None is no file.

    Raises:
        InputError: The SoC is not known, or as `read_facts`.
    """
    found = target(soc)
    return found if facts is None else dataclasses.replace(found, facts=read_facts(facts, found))


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
