"""`acl.rt`: devices, memory, copies, streams and events.

Arguments and results as in pyACL's reference (hiascend.com, aclpythondevg_01_*).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

from omforge.runtime.acl_sim.codes import (
    INVALID_PARAM,
    RT_EVENT_TIMESTAMP_INVALID,
    RT_FEATURE_NOT_SUPPORT,
    RT_INVALID_DEVICE,
    RT_INVALID_HANDLE,
    RT_PARAM_INVALID,
    RT_STREAM_NOT_COMPLETE,
    UNINITIALIZE,
    Fault,
)
from omforge.runtime.acl_sim.memory import Place
from omforge.runtime.acl_sim.process import Part, returns_code, returns_pair
from omforge.runtime.acl_sim.streams import Event, Stream, Task, happen

DEVICES = 8

H2H, H2D, D2H, D2D, DEFAULT = range(5)
_PLACES: dict[int, tuple[Place, Place]] = {
    H2H: ("host", "host"),
    H2D: ("host", "device"),
    D2H: ("device", "host"),
    D2D: ("device", "device"),
}
_NAMES = {H2H: "H2H", H2D: "H2D", D2H: "D2H", D2D: "D2D"}

MAX_ROWS, MAX_WIDTH = 5 * 1024 * 1024, 5_000_000
"""Of a two-dimensional copy (hicann/runtime:src/runtime/core/inc/common/
internal_error_define.hpp)."""


class Runtime(Part):
    """`acl.rt`."""

    PREFIX: ClassVar[str] = "acl.rt"

    # Device

    @returns_code
    def set_device(self, device: int) -> None:
        """Choose a device, and make its default context the current one."""
        if not self.process.initialised:
            raise Fault(UNINITIALIZE, "acl.init was not called")
        if not 0 <= device < DEVICES:
            raise Fault(RT_INVALID_DEVICE, f"there is no device {device}")
        self.process.devices.add(device)
        self.process.context = 0

    @returns_code
    def reset_device(self, device: int) -> None:
        """Give a device back."""
        if device not in self.process.devices:
            raise Fault(RT_INVALID_DEVICE, f"device {device} was not set")
        self.process.devices.discard(device)
        if not self.process.devices:
            self.process.context = None

    @returns_pair(0)
    def create_context(self, device: int) -> int:
        """Create a context, which becomes the current one."""
        if device not in self.process.devices:
            raise Fault(RT_INVALID_DEVICE, f"device {device} was not set")
        self.process.context = self.process.create("context", device)
        return self.process.context

    @returns_code
    def destroy_context(self, context: int) -> None:
        """Destroy a context."""
        self.process.destroy(context, "context")
        if self.process.context == context:
            self.process.context = 0 if self.process.devices else None

    @returns_code
    def synchronize_device(self) -> None:
        """Wait for all streams."""
        self.process.need_context()
        for stream in self.process.streams():
            stream.synchronize()

    # Memory

    @returns_pair(0)
    def malloc(self, size: int, policy: int) -> int:
        """Allocate device memory."""
        self.process.need_context()
        if policy not in (0, 1, 2):
            raise Fault(INVALID_PARAM, f"there is no malloc policy {policy}")
        return self.process.memory.malloc(size)

    @returns_code
    def free(self, address: int) -> None:
        """Free device memory."""
        self.process.need_context()
        self.process.memory.free(address, "device")

    @returns_pair(0)
    def malloc_host(self, size: int) -> int:
        """Allocate pinned host memory."""
        self.process.need_context()
        return self.process.memory.malloc_host(size)

    @returns_code
    def free_host(self, address: int) -> None:
        """Free pinned host memory."""
        self.process.memory.free(address, "host")

    @returns_code
    def memset(self, address: int, max_count: int, value: int, count: int) -> None:
        """Set device bytes, at once."""
        self._checked_memset(address, max_count, value, count)()

    @returns_code
    def memset_async(
        self, address: int, max_count: int, value: int, count: int, stream: int
    ) -> None:
        """Set device bytes, in a stream."""
        work = self._checked_memset(address, max_count, value, count)
        self._stream(stream).add(Task("memset", work))

    def _checked_memset(
        self, address: int, max_count: int, value: int, count: int
    ) -> Callable[[], None]:
        self.process.need_context()
        if count > max_count:
            raise Fault(RT_PARAM_INVALID, f"memset of {count} bytes, at most {max_count} allowed")

        def work() -> None:
            self.process.memory.view(address, count, "device", "memset")[:] = value & 0xFF

        self.process.memory.view(address, count, "device", "memset")
        return work

    # Copies

    @returns_code
    def memcpy(self, dst: int, dst_max: int, src: int, count: int, kind: int) -> None:
        """Copy at once."""
        self._checked_copy(dst, dst_max, src, count, kind)()

    @returns_code
    def memcpy_async(
        self, dst: int, dst_max: int, src: int, count: int, kind: int, stream: int
    ) -> None:
        """Copy in a stream; the host's side must come from malloc_host."""
        work = self._checked_copy(dst, dst_max, src, count, kind)
        self._need_pinned(dst, src, kind)
        self._stream(stream).add(Task("memcpy_async", work))

    @returns_code
    def memcpy2d_async(
        self,
        dst: int,
        dpitch: int,
        src: int,
        spitch: int,
        width: int,
        height: int,
        kind: int,
        stream: int,
    ) -> None:
        """Copy `height` rows of `width` bytes in a stream.

        Within the device: the reference up to CANN 8.5 says that only H2D and D2H are supported,
        hicann/runtime:src/runtime/api/impl/api_error.cc takes D2D too. The simulator can be either.
        """
        self.process.need_context()
        kind = self._kind(dst, src, kind)
        if kind == H2H or (kind == D2D and not self.process.two_d):
            raise Fault(RT_FEATURE_NOT_SUPPORT, f"memcpy2d_async does not copy {_NAMES[kind]}")
        if not 0 < width <= min(dpitch, spitch):
            raise Fault(
                INVALID_PARAM, f"width {width} is not within the pitches {dpitch} and {spitch}"
            )
        if not 0 < height <= MAX_ROWS or width > MAX_WIDTH:
            raise Fault(
                RT_PARAM_INVALID, f"{height} rows of {width}: at most {MAX_ROWS} of {MAX_WIDTH}"
            )
        self._need_pinned(dst, src, kind)
        source, target = _PLACES[kind]

        def work() -> None:
            memory = self.process.memory
            # The last row ends before the pitch does.
            read = memory.view(src, (height - 1) * spitch + width, source, "memcpy2d_async, source")
            write = memory.view(
                dst, (height - 1) * dpitch + width, target, "memcpy2d_async, target"
            )
            for row in range(height):
                line = read[row * spitch : row * spitch + width]
                write[row * dpitch : row * dpitch + width] = line

        memory = self.process.memory
        memory.view(src, (height - 1) * spitch + width, source, "memcpy2d_async, source")
        memory.view(dst, (height - 1) * dpitch + width, target, "memcpy2d_async, target")
        self._count(kind, width * height)
        self._stream(stream).add(Task("memcpy2d_async", work))

    def _checked_copy(
        self, dst: int, dst_max: int, src: int, count: int, kind: int
    ) -> Callable[[], None]:
        self.process.need_context()
        kind = self._kind(dst, src, kind)
        if not 0 < count <= dst_max:
            raise Fault(RT_PARAM_INVALID, f"memcpy of {count} bytes into at most {dst_max}")
        source, target = _PLACES[kind]
        memory = self.process.memory

        def work() -> None:
            read = memory.view(src, count, source, "memcpy, source")
            memory.view(dst, count, target, "memcpy, target")[:] = read

        memory.view(src, count, source, "memcpy, source")
        memory.view(dst, dst_max, target, "memcpy, target")
        self._count(kind, count)
        return work

    def _kind(self, dst: int, src: int, kind: int) -> int:
        if kind != DEFAULT:
            if kind not in _PLACES:
                raise Fault(INVALID_PARAM, f"there is no copy kind {kind}")
            return kind
        places = (self.process.memory.place(src), self.process.memory.place(dst))
        for number, pair in _PLACES.items():
            if pair == places:
                return number
        raise Fault(RT_PARAM_INVALID, f"{src:#x} or {dst:#x} points to nothing")

    def _need_pinned(self, dst: int, src: int, kind: int) -> None:
        kind = self._kind(dst, src, kind)
        if kind == H2H:
            raise Fault(RT_PARAM_INVALID, "no asynchronous copies within the host")
        host = src if kind == H2D else dst if kind == D2H else None
        if host is not None and not self.process.memory.is_pinned(host):
            raise Fault(
                RT_PARAM_INVALID,
                f"an asynchronous copy with {host:#x}, which malloc_host did not allocate",
            )

    def _count(self, kind: int, size: int) -> None:
        self.process.moved[_NAMES[kind]] += size
        self.process.copies[_NAMES[kind]] += 1

    # Streams and events

    @returns_pair(0)
    def create_stream(self) -> int:
        """Create a stream."""
        self.process.need_context()
        return self.process.create("stream", Stream())

    @returns_code
    def destroy_stream(self, stream: int) -> None:
        """Destroy a stream, which must have no work left."""
        if self._stream(stream).tasks:
            raise Fault(RT_STREAM_NOT_COMPLETE, "the stream has work left: synchronize it first")
        self.process.destroy(stream, "stream", RT_INVALID_HANDLE)

    @returns_code
    def synchronize_stream(self, stream: int) -> None:
        """Do a stream's work."""
        self.process.need_context()
        self._stream(stream).synchronize()

    @returns_pair(0)
    def create_event(self) -> int:
        """Create an event."""
        self.process.need_context()
        return self.process.create("event", Event())

    @returns_code
    def destroy_event(self, event: int) -> None:
        """Destroy an event."""
        self.process.destroy(event, "event", RT_INVALID_HANDLE)

    @returns_code
    def record_event(self, event: int, stream: int) -> None:
        """Let an event happen when a stream gets here."""
        found = self._event(event)
        self._stream(stream).add(Task("record_event", _nothing, event=found))

    @returns_code
    def stream_wait_event(self, stream: int, event: int) -> None:
        """Let a stream wait for an event of another."""
        found = self._event(event)
        self._stream(stream).add(Task("stream_wait_event", _nothing, event=found, waits=True))

    @returns_code
    def synchronize_event(self, event: int) -> None:
        """Do the work ahead of an event."""
        happen(self._event(event))

    @returns_pair(0.0)
    def event_elapsed_time(self, start: int, end: int) -> float:
        """Return the milliseconds between two events."""
        first, last = self._event(start).at, self._event(end).at
        if first is None or last is None:
            raise Fault(RT_EVENT_TIMESTAMP_INVALID, "an event has not happened yet")
        return 1000 * (last - first)

    def _stream(self, stream: int) -> Stream:
        found: Stream = self.process.get(stream, "stream", RT_INVALID_HANDLE)
        return found

    def _event(self, event: int) -> Event:
        found: Event = self.process.get(event, "event", RT_INVALID_HANDLE)
        return found


def _nothing() -> None:
    """The work of a marker."""
