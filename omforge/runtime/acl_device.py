"""A device through pyACL: one context, one stream, and everything that has to be given back.

`acl` is the module, or the simulated one. Every call is checked; what was made is undone in reverse
order, once, whatever happened before. Calls and their results: hiascend.com, aclpythondevg_01_*.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import logging
from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from omforge.ir.errors import InputError, OmforgeError

log = logging.getLogger(__name__)

Bytes = npt.NDArray[np.uint8]
KvCopy = Literal["auto", "2d", "rows"]

HUGE_FIRST = 0
HOST_TO_DEVICE, DEVICE_TO_HOST, DEVICE_TO_DEVICE = 1, 2, 3
ALIGNMENT = 64
"""Of every address that is copied from or to (pyACL's reference up to CANN 8.0, memcpy_async)."""

_REPEATED_INIT = 100002
_PROBE = 64


def import_acl() -> Any:
    """Return the module `acl`.

    Raises:
        InputError: CANN is not installed, or its environment is not set.
    """
    try:
        return importlib.import_module("acl")
    except ImportError as error:
        raise InputError(
            "there is no pyACL here",
            f"`import acl` says: {error}",
            "Install CANN and source its set_env.sh, or use --backend sim or cpu",
        ) from error


class AclDevice:
    """A device that is in use; close it, or use it as a context manager.

    Args:
        acl: The module.
        number: Which device.
        kv_copy: How strided copies within the device are made: `2d` by acl.rt.memcpy2d_async,
            `rows` by one memcpy_async for each row, `auto` by the first if the device does it.
            The reference up to CANN 8.5 says that it copies only between host and device;
            hicann/runtime:src/runtime/api/impl/api_error.cc does it within the device, too.

    Raises:
        OmforgeError: A call failed; what was made until then is undone.
    """

    def __init__(self, acl: Any, number: int = 0, kv_copy: KvCopy = "auto") -> None:
        self.acl = acl
        self._undo = contextlib.ExitStack()
        self._closed = False
        try:
            self._begin(number)
            self.stream: int = self.made(acl.rt.create_stream(), "create_stream")
            self.later(acl.rt.destroy_stream, self.stream)
            # Ahead of all frees: nothing may be freed under a stream that still works on it.
            self.two_d = self._can_copy_2d(kv_copy)
        except BaseException:  # Ctrl-C too: a device that is not reset stays occupied
            self.close()
            raise

    def _begin(self, number: int) -> None:
        acl = self.acl
        ret = acl.init()
        if ret == _REPEATED_INIT:
            # Somebody else in this process began, and will end.
            log.info("acl.init was called before; it is not finalised here")
        else:
            self.check(ret, "acl.init")
            self.later(acl.finalize)
        self.check(acl.rt.set_device(number), "acl.rt.set_device")
        self.later(acl.rt.reset_device, number)
        context: int = self.made(acl.rt.create_context(number), "create_context")
        self.later(acl.rt.destroy_context, context)

    def check(self, ret: int, what: str) -> None:
        """Refuse a return code other than 0.

        Raises:
            OmforgeError: Names the call, the code and what pyACL says of it.
        """
        if ret == 0:
            return
        tell = getattr(self.acl, "get_recent_err_msg", None)
        said = str(tell()).strip() if tell is not None else ""
        raise OmforgeError(
            f"{what} failed",
            f"it returned {ret}{f' ({said})' if said else ''}",
            "aclError in the CANN reference lists the codes; the log is below ~/ascend/log",
        )

    def made(self, result: tuple[Any, int], what: str) -> Any:
        """Return the value of a call of the form `value, ret = ...`."""
        value, ret = result
        self.check(ret, what)
        return value

    def handle(self, value: int, what: str) -> int:
        """Return what a call of the form `handle = ...` made.

        Raises:
            OmforgeError: It made nothing.
        """
        if not value:
            self.check(-1, what)
        return value

    def later(self, call: Callable[..., Any], *arguments: Any) -> None:
        """Have `call` undo something at the end; a failure then is logged, and ends nothing."""

        def undo() -> None:
            ret = call(*arguments)
            if ret:
                log.warning("%s returned %s at the end", getattr(call, "__name__", call), ret)

        self._undo.callback(undo)

    # Memory

    def malloc(self, size: int) -> int:
        """Allocate device memory until the end."""
        address: int = self.made(self.acl.rt.malloc(size, HUGE_FIRST), "acl.rt.malloc")
        self.later(self.acl.rt.free, address)
        return address

    def malloc_host(self, size: int) -> tuple[int, Bytes]:
        """Allocate pinned host memory until the end; return its address and a view of it."""
        address: int = self.made(self.acl.rt.malloc_host(size), "acl.rt.malloc_host")
        self.later(self.acl.rt.free_host, address)
        raw = (ctypes.c_uint8 * size).from_address(address)
        return address, np.frombuffer(memoryview(raw), np.uint8)

    def zero(self, address: int, size: int) -> None:
        """Set device memory to zero, after all work in the stream."""
        self.synchronize()
        self.check(self.acl.rt.memset(address, size, 0, size), "acl.rt.memset")

    # Copies in the stream

    def upload(self, address: int, host: int, size: int) -> None:
        """Copy pinned host bytes to the device."""
        ret = self.acl.rt.memcpy_async(address, size, host, size, HOST_TO_DEVICE, self.stream)
        self.check(ret, "acl.rt.memcpy_async")

    def download(self, host: int, address: int, size: int) -> None:
        """Copy device bytes to pinned host memory."""
        ret = self.acl.rt.memcpy_async(host, size, address, size, DEVICE_TO_HOST, self.stream)
        self.check(ret, "acl.rt.memcpy_async")

    def copy_rows(
        self, target: int, target_pitch: int, source: int, source_pitch: int, width: int, rows: int
    ) -> None:
        """Copy `rows` rows of `width` bytes within the device."""
        if self.two_d:
            ret = self.acl.rt.memcpy2d_async(
                target,
                target_pitch,
                source,
                source_pitch,
                width,
                rows,
                DEVICE_TO_DEVICE,
                self.stream,
            )
            self.check(ret, "acl.rt.memcpy2d_async")
            return
        for row in range(rows):
            ret = self.acl.rt.memcpy_async(
                target + row * target_pitch,
                width,
                source + row * source_pitch,
                width,
                DEVICE_TO_DEVICE,
                self.stream,
            )
            self.check(ret, "acl.rt.memcpy_async")

    def synchronize(self) -> None:
        """Wait for the stream."""
        ret = self.acl.rt.synchronize_stream(self.stream)
        self.check(ret, "acl.rt.synchronize_stream")

    def close(self) -> None:
        """Undo everything, in reverse order; a second time does nothing."""
        if self._closed:
            return
        self._closed = True
        stream = getattr(self, "stream", None)
        if stream is not None:
            # Nothing may be freed under a stream that still works on it. If work fails now, its
            # results are not wanted any more.
            ret = self.acl.rt.synchronize_stream(stream)
            if ret:
                log.warning("synchronize_stream returned %s at the end", ret)
        self._undo.close()

    def __enter__(self) -> AclDevice:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _can_copy_2d(self, kv_copy: KvCopy) -> bool:
        """Try a copy of two rows, unless it was said which way to go."""
        if kv_copy != "auto":
            return kv_copy == "2d"
        copy = getattr(self.acl.rt, "memcpy2d_async", None)
        if copy is None:
            return False
        source, target = (self.malloc(4 * _PROBE) for _ in range(2))
        host, view = self.malloc_host(4 * _PROBE)
        view[:] = np.arange(4 * _PROBE) % 251
        self.upload(source, host, 4 * _PROBE)
        self.synchronize()
        self.zero(target, 4 * _PROBE)
        pitch = 2 * _PROBE
        kind = DEVICE_TO_DEVICE
        if copy(target + _PROBE, pitch, source, pitch, _PROBE, 2, kind, self.stream):
            log.info("memcpy2d_async does not copy within the device: one copy a row instead")
            return False
        if self.acl.rt.synchronize_stream(self.stream):
            log.info("memcpy2d_async failed within the device: one copy a row instead")
            return False
        expected = np.zeros_like(view)
        expected[_PROBE:pitch] = view[:_PROBE]
        expected[pitch + _PROBE :] = view[pitch : pitch + _PROBE]
        self.download(host, target, 4 * _PROBE)
        self.synchronize()
        right = bool((view == expected).all())
        if not right:
            log.warning("memcpy2d_async copies something else within the device: not used")
        return right
