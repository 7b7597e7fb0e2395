"""Where a bundle may be made."""

from __future__ import annotations

import os
from pathlib import Path

from omforge.bundle.manifest import FILE_NAME
from omforge.ir.errors import InputError
from omforge.ir.folders import recover


def destination_of(path: Path) -> Path:
    """The folder to make, with those above it; what is there must be a bundle or nothing."""
    path = Path(os.path.realpath(path))  # a link stays, and what it leads to is replaced
    recover(path)
    if path.is_dir() and any(path.iterdir()) and not (path / FILE_NAME).is_file():
        raise InputError(
            f"{path} is a folder that holds other files",
            "only a bundle is replaced",
            "Choose another -o",
        )
    if path.exists() and not path.is_dir():
        raise InputError(f"{path} is a file", "a bundle is a folder", "Choose another -o")
    there = next(parent for parent in path.parents if parent.exists())
    if not there.is_dir():
        raise InputError(f"{there} is a file", f"{path} would be below it", "Choose another -o")
    return path
