"""What atc reads of a bundle, checked before it runs and known by content.

Nothing that the manifest says of a file is believed: a hash that the cache of .om files is keyed by
is of the bytes that were read.
"""

from __future__ import annotations

import os
from pathlib import Path

from omforge import ir
from omforge.air.weights import check_weights
from omforge.atc.cache import cache_key
from omforge.atc.find import Atc
from omforge.atc.foreign_command import check_foreign
from omforge.bundle.manifest import Bucket, Manifest
from omforge.ir.digests import identity, require_digests
from omforge.ir.weights import location_of

OM_FOLDER = "om"


class BuildInputs:
    """The graphs of a bundle and their weights.

    Args:
        folder: The bundle.
        manifest: Its manifest.
        trusted: Whether its commands may write outside of it.

    Raises:
        InputError: A file is missing, a graph refers to a file that the manifest does not list, or
            a command does something else than compile its bucket.
        CheckError: A file is not the one that was built.
    """

    def __init__(self, folder: Path, manifest: Manifest, *, trusted: bool = False) -> None:
        self._folder = folder
        self._manifest = manifest
        files = {manifest.weights, *(bucket.file for bucket in manifest.buckets)}
        for name in sorted(files):
            if not (folder / name).is_file():
                raise ir.InputError(
                    f"the bundle {folder} is incomplete",
                    f"{name} is missing",
                    "Compile the model again, or copy the bundle as a whole",
                )
        self._identities = {name: identity(folder / name) for name in sorted(files)}
        require_digests(folder, {name: manifest.files[name] for name in files})
        for bucket in manifest.buckets:
            check_foreign(
                bucket.command, bucket.file, f"{OM_FOLDER}/{bucket.name}", trusted=trusted
            )
            self._require_own_weights(bucket)

    def key(self, bucket: Bucket, atc: Atc) -> str | None:
        """The hash of all that the bucket's .om depends on; None where it cannot be known."""
        files = {name: self._manifest.files[name] for name in self._files(bucket)}
        return cache_key(bucket.command, files, atc, self._folder)

    def require_unchanged(self, bucket: Bucket) -> None:
        """Refuse what was made while the files were written by somebody else.

        Raises:
            CheckError: A file is not the one whose hash was taken.
        """
        for name in self._files(bucket):
            file = self._folder / name
            if not file.is_file() or identity(file)[:4] != self._identities[name][:4]:
                raise ir.CheckError(
                    f"{file} changed while atc ran",
                    "what atc made of it is not kept",
                    "Run `omforge build` again when nothing else writes the bundle",
                )

    def _files(self, bucket: Bucket) -> tuple[str, str]:
        return bucket.file, self._manifest.weights

    def _require_own_weights(self, bucket: Bucket) -> None:
        if self._manifest.front == "air":
            self._require_own_file(bucket, check_weights(self._folder, bucket.file))
            return
        model = ir.load(self._folder / bucket.file)
        for label, tensor in ir.all_tensors(model):
            if not isinstance(tensor, ir.ExternalTensor):
                continue
            if not os.path.samefile(tensor.path, self._folder / self._manifest.weights):
                raise ir.InputError(
                    f"{self._folder / bucket.file} takes weights from {location_of(tensor)}",
                    f"tensor {label} is there, and the manifest names {self._manifest.weights}",
                    "Compile the export again",
                )

    def _require_own_file(self, bucket: Bucket, found: frozenset[str]) -> None:
        """A GE graph takes its weights from the manifest's file, and from no other."""
        other = sorted(found - {self._manifest.weights})
        if other:
            raise ir.InputError(
                f"{self._folder / bucket.file} takes weights from {other[0]}",
                f"the manifest names {self._manifest.weights}",
                "Compile the export again",
            )
