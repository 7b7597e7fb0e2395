"""What ATC would refuse of a model or get wrong, as `omforge check` lists it."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omforge import ir
from omforge.api.models import ModelLike, load
from omforge.api.results import Result
from omforge.compilation.cpu import require_device
from omforge.lowering.air_legality import check_air_file, is_air
from omforge.lowering.facts_file import target_with
from omforge.lowering.legality import report
from omforge.lowering.legality.check_file import FileCheck, check_file
from omforge.lowering.legality.subject import Offence


@dataclass(frozen=True)
class Checked(Result):
    """What a check found.

    Attributes:
        found: All of it.
    """

    found: FileCheck

    @property
    def legal(self) -> bool:
        """Whether atc takes the model and gets it right, as far as is known."""
        return not self.found.errors

    @property
    def errors(self) -> tuple[Offence, ...]:
        """What atc refuses or gets wrong: what, where, why, what next, and the source."""
        return tuple(self.found.errors)

    @property
    def advice(self) -> tuple[Offence, ...]:
        """What atc takes and a person may want to know."""
        return tuple(self.found.advice)

    def to_json(self) -> dict[str, Any]:
        """Return every offence at every place as plain data."""
        return report.to_json(self.found)

    def __str__(self) -> str:
        return "\n".join(report.lines(self.found))


def check(
    model: ModelLike,
    target: str,
    *,
    gears: bool = False,
    allow: Collection[str] = (),
    facts: str | os.PathLike[str] | None = None,
) -> Checked:
    """List everything in a model that ATC would refuse or get wrong.

    Args:
        model: What `load` takes; of a path its file, as it is on disk, a GE graph (.air) too.
        target: The SoC.
        gears: Symbolic dims of the inputs are meant for atc's --dynamic_dims.
        allow: Rules that are inferred, by name: their offences become advice.
        facts: What `omforge probe` saw: a file. It goes before what is inferred.

    Raises:
        InputError: It is no model or a damaged one, the SoC is not known, or `allow` names no such
            rule.
    """
    soc = target_with(target, facts)
    require_device(soc, "check", "it is ATC's law that is checked, and atc has no part there")
    if isinstance(model, str | os.PathLike):
        file = Path(os.fspath(model))
        if is_air(file):
            return Checked(check_air_file(file, soc, gears=gears, allow=allow))
        return Checked(check_file(file, soc, gears=gears, allow=allow, whole=True))
    loaded = load(model)
    with tempfile.TemporaryDirectory(prefix="omforge-") as scratch:
        file = Path(scratch) / "model.onnx"
        ir.save(loaded, file, external="model.data")
        return Checked(check_file(file, soc, gears=gears, allow=allow))
