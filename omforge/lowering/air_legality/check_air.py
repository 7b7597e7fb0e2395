"""Preflight of a GE graph: what GE would take and get wrong, or refuse late, all of it at once."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Collection
from pathlib import Path

from omforge import ir
from omforge.air import messages
from omforge.air.files import read_air
from omforge.air.graph import Air, Graph
from omforge.lowering.air_legality.file_rules import RULES as FILE_RULES
from omforge.lowering.air_legality.rules import AIR_RULE_IDS, AIR_RULES
from omforge.lowering.air_legality.subject import AirSubject
from omforge.lowering.legality.check_file import FileCheck, allowed, require_allowable
from omforge.lowering.legality.subject import Offence, as_seen, judge
from omforge.lowering.target import Target

_FIRST_BYTES = (b"\x0a", b"\x10")  # ModelDef's name or version; an ONNX model starts with others


def is_air(path: str | os.PathLike[str]) -> bool:
    """Whether a file is a GE graph: by its name, or by its first byte where the name says nothing.

    ATC looks at neither.
    """
    file = Path(path)
    if file.suffix in (".air", ".onnx") or not file.is_file():
        return file.suffix == ".air"
    try:
        with file.open("rb") as stream:
            return stream.read(1) in _FIRST_BYTES
    except OSError:
        return False


def check_air_file(
    path: str | os.PathLike[str],
    target: Target,
    *,
    gears: bool = False,
    allow: Collection[str] = (),
) -> FileCheck:
    """Hold an .air file against GE. Weights outside of it are looked for, and not read.

    Args:
        path: Any .air file.
        target: The SoC that it is for.
        gears: Dims of inputs that are not known are meant for atc's --dynamic_dims.
        allow: Rules that are inferred, by name: their offences become advice.

    Raises:
        InputError: The file cannot be read or holds no GE graph, or `allow` names a rule that is
            not there or is no inference.
    """
    require_allowable(allow, AIR_RULE_IDS, target)
    file = Path(path)
    size = file.stat().st_size if file.is_file() else 0
    air = Air("", (Graph("", ()),)) if size > messages.LIMIT else _read(file)
    found = check_air(air, target, path=file, size=size, gears=gears)
    nodes = sum(len(graph.ops) for graph in air.graphs)
    return FileCheck(file, target, nodes, tuple(allowed(item, allow) for item in found))


def check_air(
    air: Air, target: Target, *, path: Path, size: int = 0, gears: bool = False
) -> list[Offence]:
    """Return all offences of a graph, which is or would be at `path`, in the order of the rules."""
    subject = AirSubject(path, size, air, target, gears)
    rules = FILE_RULES if size > messages.LIMIT else AIR_RULES  # such a file is not read
    found = (offence for rule in rules for offence in judge(rule, subject))
    return [as_seen(_printable(offence), target) for offence in found]


def _read(file: Path) -> Air:
    if file.exists() and not file.is_file():
        raise ir.InputError(f"{file} is no file", "a GE graph is one .air file", "Check the path")
    return read_air(file)


def _printable(offence: Offence) -> Offence:
    """Spell out bytes that are no text: a file may hold any in its attributes."""

    def spelled(text: str) -> str:
        return text.encode("utf-8", "backslashreplace").decode()

    return dataclasses.replace(
        offence,
        where=spelled(offence.where),
        what=spelled(offence.what),
        why=spelled(offence.why),
        remedy=spelled(offence.remedy),
    )
