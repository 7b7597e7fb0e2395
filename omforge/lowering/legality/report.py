"""What `omforge check` shows: the same fault at many places once, errors before advice."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, cast

from omforge import ir
from omforge.lowering.legality.check_file import FileCheck
from omforge.lowering.legality.subject import Offence

_PLACES = 5


def lines(check: FileCheck, *, all_places: bool = False) -> list[str]:
    """Return the text of a check."""
    soc = check.target.soc_version
    told: list[str] = []
    if check.errors:
        told += _groups(check.errors, all_places)
    if check.advice:
        told += ["", "advice (atc takes these):"] if told else ["advice (atc takes these):"]
        told += _groups(check.advice, all_places)
    told += [""] if told else []
    advice = f", {len(check.advice)} pieces of advice" if check.advice else ""
    if check.errors:
        told.append(
            f"{check.path}: {len(check.errors)} offences for {soc} in {check.nodes} nodes{advice}"
        )
    else:
        told.append(f"{check.path}: legal for {soc}, {check.nodes} nodes{advice}")
    return told


def _groups(offences: Sequence[Offence], all_places: bool) -> list[str]:
    told: list[str] = []
    for first, places in ir.group(offences):
        fault = cast(Offence, first)
        count = f"{len(places)} x " if len(places) > 1 else ""
        codes = ", ".join(code for code in (fault.code, fault.atc) if code)
        told.append(f"{count}{fault.what} [{codes}]")
        shown = places if all_places else places[:_PLACES]
        told += [f"    at {place}" for place in shown]
        if len(places) > len(shown):
            told.append(f"    and {len(places) - len(shown)} more")
        told.append(f"    why: {fault.why}")
        told.append(f"    do: {fault.remedy}")
    return told


def to_json(check: FileCheck) -> dict[str, Any]:
    """Return what `lines` tells, with every place."""
    return {
        "model": str(check.path),
        "target": check.target.soc_version,
        "nodes": check.nodes,
        "legal": not check.errors,
        "diagnostics": [dataclasses.asdict(offence) for offence in check.offences],
    }
