"""SHA-256 of files, remembered for large ones that have not changed since.

What is remembered is bound to the file's identity: device, inode, size, and the times of its last
change in nanoseconds (mtime, and ctime, which no program can set). It is kept in one small file of
the user's cache folder that may be deleted at any time.
"""

import contextlib
import hashlib
import json
import os
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from omforge.ir.errors import CheckError
from omforge.ir.weights import replacing

REMEMBERED_FROM = 16 << 20
"""Bytes from which a digest is worth remembering: below, reading the file takes milliseconds."""

_BLOCK = 4 << 20
_MOST = 1024  # entries, the oldest go first
_TICK_SECONDS, _COARSE_TICK_SECONDS = 0.1, 2.0

Report = Callable[[int], None]
"""Called with the number of bytes that were read since the last call."""


def cache_root(environment: Mapping[str, str] | None = None) -> Path:
    """Return the cache's folder: $OMFORGE_CACHE, or omforge in the XDG cache folder."""
    environment = os.environ if environment is None else environment
    if environment.get("OMFORGE_CACHE"):
        return Path(environment["OMFORGE_CACHE"])
    base = environment.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "omforge"


def sha256(file: Path, report: Report | None = None) -> str:
    """Return the hash of a file, read in pieces."""
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(_BLOCK):
            digest.update(block)
            if report is not None:
                report(len(block))
    return digest.hexdigest()


def known_sha256(file: Path, report: Report | None = None) -> str:
    """Return the hash of a file; a large one is read only if it changed since it was read last.

    A file that changed just now could change again within the same tick of the file system's
    clock: a tenth of a second is waited for; where times are whole seconds nothing is remembered.
    """
    key = identity(file)
    if key[2] < REMEMBERED_FROM:
        return sha256(file, report)
    store = cache_root() / "digests.json"
    text = ":".join(map(str, key))
    found = _read(store).get(text)
    if found is not None:
        if report is not None:
            report(key[2])
        return found
    settled = _settled(key[3:])
    digest = sha256(file, report)
    if settled and identity(file) == key:
        _remember(store, text, digest)
    return digest


def require_digests(
    folder: Path,
    expected: Mapping[str, str],
    *,
    remembered: bool = True,
    progress: Callable[[str, int, int], None] | None = None,
) -> None:
    """Compare files with the hashes that they had; several are read at a time.

    Args:
        folder: Where they are.
        expected: SHA-256 by name.
        remembered: Whether a large file that has not changed since it was read need not be read.
        progress: Told what is done, and the bytes read and in all.

    Raises:
        CheckError: A file is another one now.
    """
    read = known_sha256 if remembered else sha256
    total = sum((folder / name).stat().st_size for name in expected)
    done = 0
    lock = threading.Lock()

    def one(name: str) -> str:
        def report(count: int) -> None:
            nonlocal done
            with lock:
                done += count
                if progress is not None:
                    progress(f"hashing {name}", done, total)

        return read(folder / name, report)

    names = sorted(expected)
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        for name, digest in zip(names, pool.map(one, names), strict=True):
            if digest != expected[name]:
                raise CheckError(
                    f"{folder / name} is not the file that was built",
                    f"its sha256 is {digest}, the manifest says {expected[name]}",
                    "Copy the bundle again, or build it again",
                )


def identity(file: Path) -> tuple[int, ...]:
    """Return what changes when a file does: device, inode, size, mtime and ctime."""
    stat = file.stat()
    return (stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)


def _settled(times: tuple[int, ...]) -> bool:
    """Whether a change from now on gives other times than these."""
    age = time.time() - max(times) / 1e9
    if age < 0 or all(each % 1_000_000_000 == 0 for each in times):
        return age > _COARSE_TICK_SECONDS
    time.sleep(max(0.0, _TICK_SECONDS - age))
    return True


def _read(store: Path) -> dict[str, str]:
    try:
        found: Any = json.loads(store.read_text(encoding="utf-8"))
        return {str(key): str(digest) for key, digest in found.items()}
    except (OSError, ValueError, AttributeError, RecursionError):
        return {}  # absent or damaged: files are read again


def _remember(store: Path, key: str, digest: str) -> None:
    """Add an entry. Two processes at once may lose one of theirs, which costs a reading."""
    found = _read(store)
    found.pop(key, None)
    kept = dict([*found.items(), (key, digest)][-_MOST:])
    with contextlib.suppress(OSError):  # a cache that cannot be written does not matter
        store.parent.mkdir(parents=True, exist_ok=True)
        with replacing(store) as temporary:
            temporary.write_text(json.dumps(kept), encoding="utf-8")
