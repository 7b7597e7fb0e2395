"""File names that stand in a file: each is plain, and stays inside the file's own folder.

Models and bundles are handed around, so a name in one is not to be trusted: `..` and absolute paths
would reach any file of whoever opens it, and a link does the same with a harmless name. This is the
one place that says what a name may be.
"""

import os
from pathlib import Path, PurePosixPath

from omforge.ir.errors import InputError

_LONGEST_PART, _LONGEST_PATH = 255, 4096  # bytes; Linux' NAME_MAX and PATH_MAX


def path_fault(path: str) -> str:
    """Say why `path` is no plain path inside a folder, as an ending of "it ..."; "" if it is one.

    Plain: relative, parts parted by single slashes, none of them "..", none hidden behind control
    characters, and none longer than a file system takes.
    """
    if not path:
        return "is empty"
    if not path.isprintable():
        return "holds characters that cannot be printed"
    if "\\" in path:
        return "holds a backslash"
    if PurePosixPath(path).is_absolute():
        return "is absolute"
    parts = path.split("/")
    if ".." in parts:
        return "leads out of the folder"
    if "" in parts or not PurePosixPath(path).parts:
        return "has a part without a name"
    if len(os.fsencode(path)) >= _LONGEST_PATH or any(
        len(os.fsencode(part)) > _LONGEST_PART for part in parts
    ):
        return "is longer than a file's name may be"
    return ""


def name_fault(name: str) -> str:
    """Say why `name` is no plain name of one file or folder; "" if it is one."""
    fault = path_fault(name)
    if not fault and "/" in name:
        return "has a slash"
    if not fault and name == ".":
        return "is the folder itself"
    return fault


def inside(folder: Path, path: str) -> Path:
    """Return the file `path` in `folder`, to be written or deleted.

    Raises:
        InputError: The path is not plain, or a link on the way to it, or the file itself as a link,
            leads out of the folder.
    """
    fault = path_fault(path)
    if fault:
        raise InputError(
            f"{path!r} is not a file in {folder}",
            f"it {fault}",
            "Nothing was written; do not use a bundle that you do not trust",
        )
    file = folder / path
    root = os.path.realpath(folder)
    real = os.path.realpath(file)
    if os.path.commonpath((root, real)) != root:
        raise InputError(
            f"{file} leads out of {folder}",
            f"a link on the way makes it {real}",
            "Nothing was written; put a real file or folder in place of the link",
        )
    return file
