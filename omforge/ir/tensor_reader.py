"""Reading parts of a tensor's bytes, on several threads, from wherever they are."""

from __future__ import annotations

import contextlib
import logging
import mmap
import os
import threading
from functools import cache
from typing import Self, cast

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from omforge.ir.errors import OmforgeError
from omforge.ir.weights import release, too_short

log = logging.getLogger(__name__)

_BLOCK = 4096
"""What a direct read begins and ends with, in the file and in memory."""

_NOWAIT = getattr(os, "RWF_NOWAIT", 0)  # Linux; elsewhere every read may wait


class TensorReader:
    """Reads parts of a tensor's bytes, for several threads at once.

    A file is read into a buffer that each thread uses again. That is faster than a mapping, whose
    pages are faulted in and given back, and whose short rows miss the caches: 4 GiB, quantised on
    two threads, 0.8 s instead of 1.6. A tensor that is mapped already is read from its mapping,
    as the file under its name may be another by now.

    A tensor that is not in memory, of a file that is large beside the machine's, comes straight
    from the disk (O_DIRECT): it would push out what others use, and the system's copies cost more
    than reading (4 GiB by three threads: 0.3 s of CPU instead of 3.1).

    Args:
        tensor: Of bytes as numpy has them: not of a type of less than a byte.
    """

    def __init__(self, tensor: ir.TensorProtocol) -> None:
        self._tensor = tensor
        self._buffers = threading.local()
        self._file: int | None = None
        self._bytes: npt.NDArray[np.uint8] | None = None
        self._mapped: mmap.mmap | None = None
        self._start = 0
        self._direct: int | None = None
        if isinstance(tensor, ir.ExternalTensor) and tensor.nbytes:
            self._start = tensor.offset or 0
            self._mapped = tensor.raw
            if self._mapped is None:
                try:
                    self._file = os.open(tensor.path, os.O_RDONLY)
                except OSError as error:
                    raise OmforgeError(
                        f"cannot read {tensor.path}, which holds tensor {tensor.name}",
                        error.strerror or str(error),
                        "The file was there when the model was loaded: put it back",
                    ) from error
                large = os.fstat(self._file).st_size > _memory() // 2
                if large and not _in_memory(self._file, self._start, tensor.nbytes):
                    self._direct = _open_direct(tensor.path)
            else:
                self._bytes = np.frombuffer(self._mapped, np.uint8)
        else:
            self._bytes = np.ascontiguousarray(tensor.numpy()).reshape(-1).view(np.uint8)

    def read(self, first: int, last: int, *, ahead: int = 0) -> npt.NDArray[np.uint8]:
        """Return bytes first..last; they are valid until this thread reads again.

        Args:
            first: The first byte.
            last: The byte behind the last one.
            ahead: Where the disk has to be waited for, let it go on to this byte.

        Raises:
            OmforgeError: The file has become shorter.
        """
        count = last - first
        if self._bytes is not None and self._mapped is None:
            return self._bytes[first:last]
        buffer: npt.NDArray[np.uint8] | None = getattr(self._buffers, "bytes", None)
        if buffer is None or buffer.size < count + 2 * _BLOCK:
            space = np.empty(count + 3 * _BLOCK, np.uint8)
            buffer = self._buffers.bytes = space[-space.ctypes.data % _BLOCK :]
        # A byte is as far behind the begin of a block here as it is in the file.
        pad = (self._start + first) % _BLOCK
        whole, buffer = buffer, buffer[pad : pad + count]
        if self._bytes is not None and self._mapped is not None:
            np.copyto(buffer, self._bytes[self._start + first : self._start + last])
            release(self._tensor, first, last)
        else:
            self._fill(buffer, self._start + first, self._start + ahead, whole)
        return buffer

    def _fill(
        self,
        buffer: npt.NDArray[np.uint8],
        start: int,
        ahead: int,
        whole: npt.NDArray[np.uint8],
    ) -> None:
        """Read bytes of the file from `start` on into `buffer`, a part of `whole`."""
        assert self._file is not None
        done = 0
        while done < len(buffer):
            rest, at, got = [buffer[done:].data], start + done, 0
            if self._direct is not None:
                got = self._read_direct(whole, start, len(buffer), at) - done
            elif not done:
                with contextlib.suppress(OSError):  # nothing is in memory, or nobody can say
                    got = os.preadv(self._file, rest, at, _NOWAIT)
            if got <= 0:
                if ahead > at and hasattr(os, "posix_fadvise"):
                    os.posix_fadvise(self._file, at, ahead - at, os.POSIX_FADV_WILLNEED)
                got = os.preadv(self._file, rest, at)
            if got <= 0:
                raise too_short(cast(ir.ExternalTensor, self._tensor), len(buffer) - done)
            done += got

    def _read_direct(self, whole: npt.NDArray[np.uint8], start: int, count: int, at: int) -> int:
        """Read from the block of byte `at` on; how many bytes from `start` on are there then."""
        assert self._direct is not None
        origin, block = start - start % _BLOCK, at - at % _BLOCK
        end = -(-(start + count) // _BLOCK) * _BLOCK
        try:
            got = os.preadv(self._direct, [whole[block - origin : end - origin].data], block)
        except OSError as error:  # this file system has other blocks, or wants none
            log.debug("no direct reading of %s: %s", self._tensor.name, error)
            return 0
        return min(block + got - start, count)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for file in (self._file, self._direct):
            if file is not None:
                os.close(file)
        self._file = self._direct = None


def _in_memory(file: int, start: int, count: int) -> bool:
    """Whether the first, the middle and the last byte of a part of a file are in memory."""
    if not hasattr(os, "posix_fadvise"):
        return True
    # Asked for a byte, the system would begin to read many.
    os.posix_fadvise(file, 0, 0, os.POSIX_FADV_RANDOM)
    try:
        return all(
            os.preadv(file, [bytearray(1)], at, _NOWAIT) == 1
            for at in (start, start + count // 2, start + count - 1)
        )
    except OSError:
        return False
    finally:
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_NORMAL)


def _open_direct(path: str) -> int | None:
    """A file for reads past the system's cache; None where there is no such thing."""
    try:
        return os.open(path, os.O_RDONLY | os.O_DIRECT)
    except (AttributeError, OSError):
        return None


@cache
def _memory() -> int:
    """Bytes of the machine's memory; more than any file has where that is not known."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return 1 << 62
