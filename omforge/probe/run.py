"""Runs the probes from here: the kit is written, and its own runner asks the questions.

What is built lies beside the facts file in `<file>.work` until all is answered: an interrupted run
goes on there.
"""

from __future__ import annotations

import os
import shlex
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from omforge.atc.command import check_path
from omforge.atc.find import DEFAULT_HOMES, HOME_VARIABLES, Atc, choose_atc
from omforge.ir.errors import InputError
from omforge.ir.weights import writing
from omforge.lowering.facts_file import file_name
from omforge.lowering.target import Target
from omforge.probe import portable
from omforge.probe.kit import write_kit
from omforge.probe.questions import PROBES, probes_for
from omforge.probe.results import Outcome, outcome

Progress = Callable[[str, int, int], None]
Backend = Literal["acl", "sim", "none"]


@dataclass(frozen=True)
class ProbeOptions:
    """How the probes are run.

    Attributes:
        atc: `auto`, `sim` or a path.
        backend: `acl` asks the device, `sim` the simulated one, `none` asks atc alone.
        device: Its number.
        only: Probes by id, with those that they stand on; all if empty.
        jobs: Probes at a time; the device is asked by one at a time. 0: as the runner has it.
        timeout: Seconds for each probe; 0: as each says.
        again: Ask also what an interrupted run has answered.
    """

    atc: str = "auto"
    backend: Backend = "acl"
    device: int = 0
    only: Sequence[str] = ()
    jobs: int = 0
    timeout: float = 0.0
    again: bool = False


def run_probes(
    target: Target,
    options: ProbeOptions,
    output: Path | None = None,
    progress: Progress | None = None,
) -> tuple[Outcome, Path]:
    """Ask the questions of a SoC, and write what was seen.

    Args:
        target: The SoC.
        options: How.
        output: The facts file; named after CANN and SoC if None.
        progress: Told what was answered, and how many of how many.

    Returns:
        The answers, and the facts file.

    Raises:
        InputError: atc is not there, an id is none of a probe for this SoC, or the path has
            characters that atc refuses.
        CheckError: No probe gave an answer.
    """
    _check_names(options.only, target)
    atc = choose_atc(options.atc)
    if atc is None:
        places = ", ".join((*HOME_VARIABLES, *DEFAULT_HOMES))
        raise InputError(
            "atc was not found",
            f"it is neither on the PATH nor below {places}",
            "Name it with --atc, or take the probes to the machine that has it: --export DIR",
        )
    file = (output or Path(file_name(atc.version, target.soc_version))).absolute()
    work = file.with_name(f"{file.name}.work")
    check_path("work folder", str(work))
    with writing(file):
        work.mkdir(parents=True, exist_ok=True)
    kit = _kit(work, target)
    found = outcome(
        portable.answer_kit(str(kit), _words(work, target, atc, options), _tell(progress)),
        str(file),
    )
    shutil.rmtree(work, ignore_errors=True)  # all is answered: the next run asks anew
    return found, found.write(file)


def _check_names(names: Sequence[str], target: Target) -> None:
    known = [probe.id for probe in probes_for(target.family.name)]
    for name in names:
        if name not in known:
            elsewhere = name in PROBES
            raise InputError(
                f"there is no probe {name!r}" + (f" for {target.soc_version}" if elsewhere else ""),
                "its families have no such operator" if elsewhere else "",
                "omforge probe --list shows them",
            )


def _kit(work: Path, target: Target) -> Path:
    """Write the kit; one that is there and is the same stays, with what was built of it."""
    kit, fresh = work / "kit", work / "kit.new"
    shutil.rmtree(fresh, ignore_errors=True)
    write_kit(fresh, target)
    if kit.is_dir() and (kit / "kit.json").read_bytes() == (fresh / "kit.json").read_bytes():
        shutil.rmtree(fresh)
        return kit
    shutil.rmtree(kit, ignore_errors=True)
    fresh.rename(kit)
    return kit


def _words(work: Path, target: Target, atc: Atc, options: ProbeOptions) -> Any:
    """The runner's own command line, as it parses it."""
    words = ["--target", target.soc_version, "--atc", shlex.join(atc.words)]
    words += ["--backend", "none" if options.backend == "none" else "acl"]
    words += ["--device", str(options.device), "--timeout", str(options.timeout)]
    words += ["--work", str(work / "work"), "--output", str(work / "result.json")]
    words += ["--cann", atc.version or "unknown"]
    words += [word for name in options.only for word in ("--only", name)]
    words += ["--again"] if options.again else []
    words += ["--jobs", str(options.jobs)] if options.jobs else []
    parsed = portable.arguments(words)
    os.makedirs(parsed.work, exist_ok=True)
    parsed.environment = _environment(atc, options.backend)
    return parsed


def _environment(atc: Atc, backend: Backend) -> Mapping[str, str]:
    environment = dict(os.environ if atc.environment is None else atc.environment)
    room = Path(__file__).parent
    added = [str(room / "simulated")] if backend == "sim" else []
    if backend == "sim" or atc.simulated:
        added.append(str(room.parents[1]))
        environment["PYTHONPATH"] = os.pathsep.join(
            [*added, *filter(None, [environment.get("PYTHONPATH", "")])]
        )
    return environment


def _tell(progress: Progress | None) -> Callable[[str, dict[str, Any], int, int], None]:
    def tell(name: str, found: dict[str, Any], done: int, total: int) -> None:
        if progress is not None:
            progress(f"{name}: {found['value'] or 'no answer'}", done, total)

    return tell
