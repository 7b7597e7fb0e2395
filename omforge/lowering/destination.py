"""The bundle's folder: made beside its place, and put there whole."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

from omforge.ir.errors import InputError
from omforge.lowering.manifest import FILE_NAME


def destination_of(path: Path) -> Path:
    """The folder to make; what is there must be a bundle or nothing."""
    path = Path(os.path.abspath(path))
    if path.is_dir() and any(path.iterdir()) and not (path / FILE_NAME).is_file():
        raise InputError(
            f"{path} is a folder that holds other files",
            "only a bundle is replaced",
            "Choose another -o",
        )
    if path.exists() and not path.is_dir():
        raise InputError(f"{path} is a file", "a bundle is a folder", "Choose another -o")
    if not path.parent.is_dir():
        raise InputError(f"{path.parent} does not exist", "", "Create it or choose another -o")
    return path


class MadeFolder:
    """A folder that takes `path`'s place when the block ends well, and vanishes otherwise."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __enter__(self) -> Path:
        try:
            self._made = Path(
                tempfile.mkdtemp(prefix=f".{self._path.name}-", dir=self._path.parent)
            )
        except OSError as error:
            raise InputError(
                f"cannot write beside {self._path}",
                error.strerror or str(error),
                "Choose an -o in a folder that can be written",
            ) from error
        self._made.chmod(0o755)
        return self._made

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if error is not None:
            shutil.rmtree(self._made, ignore_errors=True)
            return
        old = self._made.with_name(self._made.name + "-old")
        if self._path.exists():
            self._path.rename(old)
        self._made.rename(self._path)
        shutil.rmtree(old, ignore_errors=True)
