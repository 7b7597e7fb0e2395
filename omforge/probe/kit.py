"""The kit: a folder with the models of all probes, what each outcome means, and the runner.

    kit.json            the probes of one SoC
    probe.py            the runner, which needs Python 3.8, numpy and CANN alone
    probe.sh            the same with CANN's environment
    models/ID/          a probe's models and arrays

The same omforge gives the same bytes for a SoC.
"""

from __future__ import annotations

import io
import json
import os
import shutil
from collections.abc import Callable, Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from omforge.air.files import encode
from omforge.air.graph import Air
from omforge.ir.errors import InputError
from omforge.ir.weights import write_error
from omforge.lowering.target import Target
from omforge.probe.portable import SCHEMA
from omforge.probe.questions import probes_for
from omforge.probe.record import Array, Build, Experiment, Probe, Step

Progress = Callable[[str, int, int], None]

ONNX, AIR = 5, 1
"""Values of atc's --framework."""

_SCRIPT = """#!/bin/sh
# Asks this machine's CANN what omforge wants to know of it. Needs Python 3.8, numpy and CANN.
#   ./probe.sh                      atc and device 0
#   ./probe.sh --backend none       atc alone, where there is no device
# Bring result.json back: omforge probe --read result.json
# atc refuses folders with other characters than A-Z a-z 0-9 _ - . / in their path.
set -eu
unset CDPATH
cd -- "$(dirname -- "$0")"
for home in "${ASCEND_HOME_PATH:-}" "${ASCEND_TOOLKIT_HOME:-}" /usr/local/Ascend/cann \\
    /usr/local/Ascend/ascend-toolkit/latest; do
    for script in "$home/set_env.sh" "$home/../set_env.sh"; do
        if [ -n "$home" ] && [ -f "$script" ] && ! command -v atc >/dev/null; then
            set +u
            . "$script"
            set -u
        fi
    done
done
exec "${PYTHON:-python3}" probe.py --target @SOC@ "$@"
"""


def write_kit(folder: Path, target: Target, progress: Progress | None = None) -> None:
    """Write the kit of a SoC into a folder that is not there yet, whole or not at all.

    Raises:
        InputError: There is such a folder.
        OmforgeError: It cannot be written.
    """
    if folder.exists():
        raise InputError(f"{folder} is there", "a kit is written into a new folder", "Name another")
    part = folder.with_name(f".{folder.name}.{os.getpid()}.part")
    try:
        _write(part, target, progress)
        part.rename(folder)
    except OSError as error:
        raise write_error(folder, error) from error
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _write(folder: Path, target: Target, progress: Progress | None) -> None:
    probes = probes_for(target.family.name)
    held: list[dict[str, Any]] = []
    for done, probe in enumerate(probes):
        if progress is not None:
            progress(f"write {probe.id}", done, len(probes))
        held.append(_probe(folder, probe, probe.make(target.family.name)))
    kit = {"schema": SCHEMA, "soc": target.soc_version, "probes": held}
    text = json.dumps(kit, indent=1, sort_keys=True) + "\n"
    (folder / "kit.json").write_text(text, encoding="utf-8")
    runner = files("omforge.probe").joinpath("portable.py").read_bytes()
    (folder / "probe.py").write_bytes(runner)
    (folder / "probe.sh").write_text(_SCRIPT.replace("@SOC@", target.soc_version))
    for name in ("probe.py", "probe.sh"):
        (folder / name).chmod(0o755)


def _probe(folder: Path, probe: Probe, experiment: Experiment) -> dict[str, Any]:
    place = f"models/{probe.id}"
    (folder / place).mkdir(parents=True)
    arrays = _Arrays(folder, place)
    judged = {
        value: {name: arrays.file(f"{value}-{name}", array) for name, array in wanted.items()}
        for value, wanted in experiment.judged.items()
    }
    return {
        "id": probe.id,
        "question": probe.question,
        "means": dict(probe.means),
        "expected": probe.expected,
        "after": list(probe.after),
        "builds": [_build(folder, place, build) for build in experiment.builds],
        "steps": [_step(arrays, step) for step in experiment.steps],
        "judged": judged,
        "rtol": experiment.rtol,
        "atol": experiment.atol,
        "unit": experiment.unit,
        "over": list(experiment.over),
        "more_than": experiment.more_than,
        "count": experiment.count,
        "counts": {str(number): value for number, value in experiment.counts.items()},
        "built": probe.built,
        "refused": probe.refused,
        "codes": dict(probe.codes),
        "failed": probe.failed,
        "otherwise": probe.otherwise,
        "limit": probe.limit,
    }


def _build(folder: Path, place: str, build: Build) -> dict[str, Any]:
    air = isinstance(build.model, Air)
    file = f"{place}/{build.name}.{'air' if air else 'onnx'}"
    (folder / file).write_bytes(_bytes(build.model))
    for name, data in build.files.items():
        (folder / place / name).write_bytes(data)
    return {
        "name": build.name,
        "model": file,
        "framework": AIR if air else ONNX,
        "flags": list(build.flags),
    }


def _bytes(model: onnx.ModelProto | Air) -> bytes:
    return encode(model) if isinstance(model, Air) else model.SerializeToString(deterministic=True)


def _step(arrays: _Arrays, step: Step) -> dict[str, Any]:
    given: Mapping[str, Any] = step.given
    held = {name: value for name, value in given.items() if name != "array"}
    if "array" in given:
        held["from"] = arrays.file(str(given["buffer"]), given["array"])
    return {"do": step.do, **held}


class _Arrays:
    """Writes arrays beside a probe's models."""

    def __init__(self, folder: Path, place: str) -> None:
        self._folder, self._place = folder, place

    def file(self, name: str, array: Array) -> str:
        """Write an array; return the file, from the kit's folder."""
        path = f"{self._place}/{name.replace(' ', '-')}.npy"
        held = io.BytesIO()
        np.save(held, np.ascontiguousarray(array).reshape(np.shape(array)), allow_pickle=False)
        (self._folder / path).write_bytes(held.getvalue())
        return path
