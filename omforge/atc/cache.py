"""What atc made before, by the content of everything that went into it.

An entry is a small JSON file that lists the made files with their hashes; the files themselves are
kept once each by hash, so that buckets which share weights share them here too. Everything is
written whole or not at all, and files are copied in and out: nobody else's writing reaches them.

Nothing is thrown away: an entry is as large as the .om with its weights, and the folder may be
deleted at any time, whole or in part.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omforge.atc.find import Atc
from omforge.atc.flags import flag_name
from omforge.ir.digests import cache_root, sha256
from omforge.ir.json_text import parse_json
from omforge.ir.paths import path_fault
from omforge.ir.weights import replacing

_SCHEMA = 2  # 1 was keyed by hashes that a manifest said

# Flags that change what atc says or where it works, not what it makes.
_WITHOUT_EFFECT = frozenset(("log", "op_compiler_cache_mode", "op_compiler_cache_dir", "debug_dir"))

# Flags whose value is a file that goes into what atc makes.
_FILES = (
    "fusion_switch_file",
    "modify_mixlist",
    "compress_weight_conf",
    "keep_dtype",
    "customize_dtypes",
    "op_precision_mode",
    "raw_ge_options",
    "compression_optimize_conf",
    "insert_op_conf",
)


def cache_folder(environment: Mapping[str, str] | None = None) -> Path:
    """Return where the cache is: $OMFORGE_CACHE, or omforge in the XDG cache folder."""
    environment = os.environ if environment is None else environment
    if environment.get("OMFORGE_CACHE"):
        return Path(environment["OMFORGE_CACHE"])
    return cache_root(environment) / "atc"


def cache_key(
    command: Sequence[str], files: Mapping[str, str], atc: Atc, folder: Path
) -> str | None:
    """Return the hash of what a compilation depends on.

    Args:
        command: The atc command.
        files: SHA-256 of the graph and of the weights that it refers to, by name.
        atc: The program.
        folder: What paths in the command are relative to.

    Returns:
        None where it cannot be known, because a file that a flag names is absent.
    """
    words = [word for word in command[1:] if flag_name(word)[0] not in _WITHOUT_EFFECT]
    extra: dict[str, str] = {}
    for word in words:
        name, value = flag_name(word)
        if name in _FILES and value:
            file = folder / value
            if not file.is_file():
                return None
            extra[value] = sha256(file)
    parts = [_SCHEMA, words, sorted(files.items()), atc.identity, sorted(extra.items())]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


@dataclass(frozen=True)
class AtcCache:
    """A folder of what was made, by key."""

    folder: Path

    def restore(self, key: str, to: Path) -> Mapping[str, str] | None:
        """Copy an entry's files below a folder.

        Returns:
            Their names with their SHA-256; None if there is no such entry, or not all of it.
        """
        try:
            entry: Any = parse_json(self._entry(key).read_bytes())
            files = {str(name): str(digest) for name, digest in entry["files"].items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return None  # absent or damaged: it is made again
        if not files or any(path_fault(name) for name in files):
            return None  # somebody else wrote it
        for name, digest in files.items():
            blob = self._blob(digest)
            if not re.fullmatch(r"[0-9a-f]{64}", digest) or not blob.is_file():
                return None
            target = to / name
            target.parent.mkdir(parents=True, exist_ok=True)
            _copy(blob, target)
            if sha256(target) != digest:
                target.unlink()
                blob.unlink(missing_ok=True)
                return None
        return files

    def store(self, key: str, made: Path) -> Mapping[str, str]:
        """Keep all files below a folder under a key.

        Returns:
            Their names with their SHA-256.
        """
        files = hashes_below(made)
        for name, digest in files.items():
            blob = self._blob(digest)
            if not blob.is_file():
                blob.parent.mkdir(parents=True, exist_ok=True)
                _copy(made / name, blob)
        entry = self._entry(key)
        entry.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps({"schema": _SCHEMA, "files": files}, sort_keys=True) + "\n"
        with replacing(entry) as temporary:
            temporary.write_text(text, encoding="utf-8")
        return files

    def _entry(self, key: str) -> Path:
        return self.folder / "entries" / f"{key}.json"

    def _blob(self, digest: str) -> Path:
        return self.folder / "files" / digest[:2] / digest


def hashes_below(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of every file below a folder, by its name there."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): sha256(path) for path in files}


def _copy(source: Path, target: Path) -> None:
    with replacing(target) as temporary:
        shutil.copyfile(source, temporary)
