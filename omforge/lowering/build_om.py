"""Run atc on the graphs of a finished bundle, and enter what it made in the manifest."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

from omforge import ir
from omforge.lowering.atc import AtcResult, run_atc
from omforge.lowering.manifest import Bucket, Manifest
from omforge.lowering.source import sha256

Progress = Callable[[str, int, int], None]


def build_om(folder: Path, program: Path, progress: Progress | None = None) -> Manifest:
    """Compile every bucket to om/<bucket>.om; the bundle stays usable whatever atc does.

    Args:
        folder: A bundle.
        program: The atc to run.
        progress: Told the step's name, steps done and steps in all.

    Returns:
        The manifest, which names the files made.

    Raises:
        CheckError: atc refused a graph; its log is in the bundle, and the buckets before it are
            entered in the manifest.
        InputError: atc cannot be started, or refuses the folder's path.
    """
    manifest = Manifest.load(folder)
    for index, bucket in enumerate(manifest.buckets):
        if progress is not None:
            progress(f"atc {bucket.name}", index, len(manifest.buckets))
        log = folder / "om" / f"{bucket.name}.log"
        result = run_atc(bucket.command, folder, log, program=program)
        if not result.ok or result.om is None:
            raise _refused(bucket, result)
        manifest = _entered(manifest, folder, bucket, result.om)
    return manifest


def _refused(bucket: Bucket, result: AtcResult) -> ir.CheckError:
    said = "; ".join(result.codes.values()) or f"exit status {result.exit_status}"
    return ir.CheckError(
        f"atc does not compile {bucket.file}",
        said,
        f"Its log is {result.log}; the bundle's graphs are complete, and compile.sh tries again",
    )


def _entered(manifest: Manifest, folder: Path, bucket: Bucket, om: Path) -> Manifest:
    name = om.resolve().relative_to(folder.resolve()).as_posix()
    buckets = tuple(
        dataclasses.replace(b, om=name) if b.name == bucket.name else b for b in manifest.buckets
    )
    files = {**manifest.files, name: sha256(om)}
    entered = dataclasses.replace(manifest, buckets=buckets, files=files)
    entered.save(folder)
    return entered
