"""A folder that is written whole or not at all, by one process at a time, whatever kills it.

It is made under a hidden name beside its place, `.NAME.omforge-TOKEN`, and takes the place in one
step. Who writes holds the lock file `.NAME.omforge-lock`, which the kernel releases when the
process ends: so a hidden folder that is found under the lock is a dead process', and goes.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import hashlib
import logging
import os
import secrets
import shutil
from collections.abc import Generator
from pathlib import Path

from omforge.ir.errors import InputError
from omforge.ir.weights import write_error

log = logging.getLogger(__name__)

_OLD = "-old"
_LONGEST = 180  # bytes of a name that leave room for what is added to it
_RENAME_EXCHANGE = 2  # linux/fs.h
_AT_FDCWD = -100
_NOT_HERE = (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EPERM)
_NO_LOCK_FILE = (errno.EACCES, errno.EROFS, errno.EPERM)


class MadeFolder:
    """A folder that takes `path`'s place when the block ends well, and vanishes otherwise.

    A second process that makes the same folder waits until the first is done.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Path:
        made = self._path.with_name(f"{_prefix(self._path)}{secrets.token_hex(4)}")
        try:
            self._stack.enter_context(only_writer(self._path))
            made.mkdir()
        except OSError as error:
            self._stack.close()
            raise InputError(
                f"cannot write beside {self._path}",
                error.strerror or str(error),
                "Choose an -o in a folder that can be written",
            ) from error
        self._made = made
        return made

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        with self._stack:
            if error is not None:
                shutil.rmtree(self._made, ignore_errors=True)
                return
            try:
                _put(self._made, self._path)
            except OSError as fault:
                raise write_error(self._path, fault) from fault


@contextlib.contextmanager
def only_writer(path: Path) -> Generator[None]:
    """Hold the lock on a folder for a block; who holds it is waited for, and named in the log.

    What a killed process left behind is put right first.
    """
    with _lock(path, wait=True) as held:
        if held:
            _put_right(path)
        yield


def recover(path: Path) -> None:
    """Put right what a process left that was killed between two renames; nothing if one is at work.

    Only file systems that cannot exchange two folders in one step have anything to put right.
    """
    if os.path.lexists(path) or not list(path.parent.glob(f"{_escaped(path)}*{_OLD}")):
        return
    with contextlib.suppress(OSError), _lock(path, wait=False) as held:
        if held:
            _put_right(path)


def _prefix(path: Path) -> str:
    name = path.name
    if len(os.fsencode(name)) > _LONGEST:
        name = hashlib.sha256(os.fsencode(name)).hexdigest()
    return f".{name}.omforge-"


def _escaped(path: Path) -> str:
    """The prefix as a pattern of glob: a name may hold its special characters."""
    return "".join(f"[{char}]" if char in "*?[" else char for char in _prefix(path))


@contextlib.contextmanager
def _lock(path: Path, *, wait: bool) -> Generator[bool]:
    """Yield whether the lock is held."""
    file = path.with_name(f"{_prefix(path)}lock")
    try:
        descriptor = _acquire(file, path, wait=wait)
    except OSError as error:
        if error.errno not in _NO_LOCK_FILE or not path.is_dir():
            raise
        # Nobody can make a folder beside this one, so the folder itself is what is locked.
        file, descriptor = path, _flock(os.open(path, os.O_RDONLY), path, wait=wait)
    try:
        yield descriptor is not None
    finally:
        if descriptor is not None:
            if file != path:
                file.unlink(missing_ok=True)
            os.close(descriptor)


def _acquire(file: Path, path: Path, *, wait: bool) -> int | None:
    while True:
        opened = os.open(file, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        descriptor = _flock(opened, path, wait=wait)
        if descriptor is None:
            return None
        # Whoever held it before has removed the file: then this lock is on nothing.
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), file.stat()):
                os.truncate(descriptor, 0)
                os.pwrite(descriptor, str(os.getpid()).encode(), 0)
                return descriptor
        os.close(descriptor)


def _flock(descriptor: int, path: Path, *, wait: bool) -> int | None:
    """Lock an open file; None if another has it and is not waited for."""
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if not wait:
                os.close(descriptor)
                return None
            owner = "" if os.path.isdir(descriptor) else os.pread(descriptor, 32, 0).decode()
            log.warning("%s: waiting for process %s, which writes it", path, owner or "?")
            fcntl.flock(descriptor, fcntl.LOCK_EX)
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):
            os.close(descriptor)
            raise
        log.warning("%s: this file system has no locks: nothing else may write it now", path)
    except BaseException:  # Ctrl-C while waiting
        os.close(descriptor)
        raise
    return descriptor


def _put_right(path: Path) -> None:
    """Finish a replacement that was cut between its two renames, and remove what is left over."""
    left = sorted(
        found for found in path.parent.glob(f"{_escaped(path)}*") if not found.name.endswith("lock")
    )
    for old in (found for found in left if found.name.endswith(_OLD)):
        made = old.with_name(old.name.removesuffix(_OLD))
        if not os.path.lexists(path):
            # The new one is complete: the old one leaves its place only then.
            (made if made.is_dir() else old).rename(path)
            log.warning("%s: recovered from a process that was killed", path)
    for found in left:
        if found.is_dir() and not found.is_symlink():
            shutil.rmtree(found, ignore_errors=True)


def _put(made: Path, path: Path) -> None:
    if not path.exists():
        made.rename(path)
        return
    if _exchange(made, path):
        shutil.rmtree(made, ignore_errors=True)
        return
    old = made.with_name(made.name + _OLD)
    path.rename(old)
    made.rename(path)
    shutil.rmtree(old, ignore_errors=True)


def _exchange(first: Path, second: Path) -> bool:
    """Exchange two folders in one step (renameat2); False where the system cannot."""
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):  # another system, or an old C library
        return False
    names = (ctypes.c_char_p(os.fsencode(first)), ctypes.c_char_p(os.fsencode(second)))
    if rename(_AT_FDCWD, names[0], _AT_FDCWD, names[1], ctypes.c_uint(_RENAME_EXCHANGE)) == 0:
        return True
    number = ctypes.get_errno()
    if number in _NOT_HERE:
        return False
    raise OSError(number, os.strerror(number), str(second))
