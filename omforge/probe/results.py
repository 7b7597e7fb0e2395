"""What became of a kit: its result file, read and turned into a facts file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from omforge import __version__
from omforge.ir.errors import CheckError, InputError
from omforge.ir.json_text import parse_json
from omforge.ir.weights import replacing, writing
from omforge.lowering.facts_file import SCHEMA, file_name
from omforge.lowering.target import target
from omforge.probe.questions import probes_for
from omforge.probe.record import REFUSED

_AGAIN = "Run the kit of this omforge again: omforge probe --export"


@dataclass(frozen=True)
class Answer:
    """One line of the table.

    Attributes:
        probe: Its id.
        expected: The value that the tables suppose; "" for none.
        value: What was seen; None where nothing was.
        meaning: Of the value.
        evidence: What it was read from, or why there is no value.
        number: The figure of one that was measured.
    """

    probe: str
    expected: str
    value: str | None
    meaning: str
    evidence: str
    number: float | None


@dataclass(frozen=True)
class Outcome:
    """All answers of one SoC and one CANN; `simulated` ones say nothing of a device."""

    soc: str
    cann: str
    simulated: bool
    answers: tuple[Answer, ...]

    @property
    def seen(self) -> int:
        """How many have a value."""
        return sum(answer.value is not None for answer in self.answers)

    @property
    def surprises(self) -> tuple[Answer, ...]:
        """Those whose value is not what the tables suppose."""
        return tuple(a for a in self.answers if a.value is not None and a.expected != a.value != "")

    def document(self) -> dict[str, Any]:
        """The facts file's content."""
        return {
            "schema": SCHEMA,
            "omforge": __version__,
            "soc": self.soc,
            "cann": self.cann,
            "simulated": self.simulated,
            "answers": {
                answer.probe: {
                    "value": answer.value,
                    "number": answer.number,
                    "evidence": answer.evidence,
                    "expected": answer.expected,
                }
                for answer in self.answers
            },
        }

    def write(self, path: Path | None = None) -> Path:
        """Write the facts file, whole or not at all; return where.

        Raises:
            CheckError: Nothing was seen, so that there are no facts; or atc compiles nothing here,
                so that it says nothing.
        """
        first = self.answers[0] if self.answers else None
        told = "" if first is None else f"{first.probe}: {first.evidence}"
        if not self.seen or (first is not None and first.value == REFUSED):
            what = "atc does not compile one MatMul" if self.seen else "no probe gave an answer"
            raise CheckError(what, told, "Mend what it says; `--only onnx-taken` asks that alone")
        file = path or Path(file_name(self.cann, self.soc))
        text = json.dumps(self.document(), indent=1, sort_keys=True) + "\n"
        with writing(file), replacing(file) as temporary:
            temporary.write_text(text, encoding="utf-8")
        return file


def read_result(path: Path) -> Outcome:
    """Read the result file of a kit.

    Raises:
        InputError: It cannot be read, is none, was interrupted, or is of another omforge's kit.
    """
    try:
        document: Any = parse_json(path.read_bytes())
    except OSError as error:
        raise InputError(f"cannot read {path}", error.strerror or str(error), _AGAIN) from error
    except ValueError as error:
        raise InputError(f"{path} is no result of a kit", str(error), _AGAIN) from error
    return outcome(document, str(path))


def outcome(document: Any, where: str) -> Outcome:
    """Check a result, and put its answers in the order of the probes.

    Raises:
        InputError: As `read_result`.
    """
    held: dict[str, Any] = cast("dict[str, Any]", document) if isinstance(document, dict) else {}
    soc, cann, answers = held.get("soc"), held.get("cann"), held.get("answers")
    if not (isinstance(soc, str) and isinstance(cann, str) and isinstance(answers, dict)):
        raise InputError(
            f"{where} is no result of a kit", "soc, cann or answers is missing", _AGAIN
        )
    if held.get("complete") is not True:
        raise InputError(
            f"{where} was interrupted",
            f"it has {len(cast('dict[str, Any]', answers))} answers so far, which are not yet "
            "held against each other",
            "Run the same command again: it goes on from there",
        )
    family = target(soc).family.name
    known = {probe.id: probe for probe in probes_for(family)}
    found: dict[str, Answer] = {}
    for name, given in cast("dict[str, Any]", answers).items():
        if name not in known:
            raise InputError(f"{where}: {name} is no probe of {soc}", "", _AGAIN)
        found[name] = _answer(where, name, given, family)
    simulated = held.get("simulated") is not False
    return Outcome(soc, cann, simulated, tuple(found[name] for name in known if name in found))


def _answer(where: str, name: str, given: Any, family: str) -> Answer:
    probe = next(probe for probe in probes_for(family) if probe.id == name)
    fields: Mapping[str, Any] = cast("dict[str, Any]", given) if isinstance(given, dict) else {}
    value, number, evidence = (fields.get(key) for key in ("value", "number", "evidence"))
    allowed = probe.values(probe.make(family))
    if not isinstance(evidence, str) or not (value is None or value in allowed):
        raise InputError(
            f"{where}: {name} has the value {value!r}",
            f"it may have {', '.join(sorted(allowed))}",
            _AGAIN,
        )
    figure = float(number) if isinstance(number, int | float) else None
    meaning = "" if value is None else probe.means.get(value, "")
    return Answer(name, probe.expected, value, meaning, evidence, figure)
