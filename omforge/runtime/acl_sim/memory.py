"""Two kinds of memory: the host's, at true addresses, and the device's, at made-up ones.

A device pointer is a number that no Python code can follow. Every access is checked against the
allocation that it begins in; what was freed is remembered, so that its use can be named.
"""

from __future__ import annotations

import ctypes
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from omforge.runtime.acl_sim.codes import (
    RT_INVALID_MEMORY_TYPE,
    RT_MEMORY_ALLOCATION,
    RT_MEMORY_FREE,
    RT_PARAM_INVALID,
    Fault,
)

Place = Literal["device", "host"]
Bytes = npt.NDArray[np.uint8]

DEVICE_BASE = 0x1200_0000_0000
GUARD = 4096
ALIGNMENT = 512

UNSET = 0xFF
"""What fresh memory holds: NaN in every float dtype, so that nobody gets away with reading it."""


@dataclass
class Allocation:
    """One allocation; `data` is None once it is freed."""

    place: Place
    address: int
    size: int
    pinned: bool
    what: str
    data: Bytes | None
    keep: Any = None


class Memory:
    """All allocations of a simulated process.

    Args:
        capacity: Bytes of the device.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.peak = 0
        self._next = DEVICE_BASE
        self._starts: list[int] = []
        self._found: dict[int, Allocation] = {}

    def live(self) -> Iterator[Allocation]:
        """Yield what is allocated and was asked for by a call of malloc."""
        return (a for a in self._found.values() if a.data is not None and a.pinned)

    @property
    def device_bytes(self) -> int:
        """Bytes that are allocated on the device."""
        return sum(
            a.size for a in self._found.values() if a.data is not None and a.place == "device"
        )

    def malloc(self, size: int, what: str = "device memory", *, fill: bool = True) -> int:
        """Allocate on the device; the content is `UNSET`, or of no interest to anybody."""
        if size <= 0:
            raise Fault(RT_PARAM_INVALID, f"malloc of {size} bytes")
        if self.device_bytes + size > self.capacity:
            raise Fault(
                RT_MEMORY_ALLOCATION,
                f"malloc of {size} bytes: {self.device_bytes} of {self.capacity} are in use",
            )
        address = self._next
        # A guard, so that no access past one allocation's end begins in the next.
        self._next += -(-size // ALIGNMENT) * ALIGNMENT + GUARD
        # What nobody looks at is never touched, and costs no memory of the host.
        data = np.full(size, UNSET, np.uint8) if fill else np.empty(size, np.uint8)
        self._add(Allocation("device", address, size, True, what, data))
        self.peak = max(self.peak, self.device_bytes)
        return address

    def malloc_host(self, size: int) -> int:
        """Allocate pinned host memory at a true address."""
        if size <= 0:
            raise Fault(RT_PARAM_INVALID, f"malloc_host of {size} bytes")
        raw = (ctypes.c_uint8 * (size + ALIGNMENT))()
        address = -(-ctypes.addressof(raw) // ALIGNMENT) * ALIGNMENT
        data = np.frombuffer(memoryview(raw), np.uint8)[address - ctypes.addressof(raw) :][:size]
        data[:] = UNSET
        self._add(Allocation("host", address, size, True, "host memory", data, raw))
        return address

    def borrow(self, data: bytes) -> int:
        """Give the address of a bytes object, which is kept alive."""
        address = ctypes.cast(ctypes.c_char_p(data), ctypes.c_void_p).value or 0
        view = np.frombuffer(data, np.uint8)
        self._add(Allocation("host", address, len(data), False, "bytes", view, data))
        return address

    def free(self, address: int, place: Place) -> None:
        """Free an allocation by its first address."""
        found = self._found.get(address)
        if found is None or not found.pinned or found.place != place:
            raise Fault(RT_PARAM_INVALID, f"free of {address:#x}, which is no {place} allocation")
        if found.data is None:
            raise Fault(RT_MEMORY_FREE, f"double free of {address:#x}")
        # The host bytes stay: views of them may be around, and must not crash the interpreter.
        found.data = None

    def place(self, address: int) -> Place | None:
        """Say where a pointer points to, if anywhere."""
        found = self._holder(address)
        return None if found is None else found.place

    def is_pinned(self, address: int) -> bool:
        """Say whether a pointer is into memory that the runtime allocated."""
        found = self._holder(address)
        return found is not None and found.pinned

    def view(self, address: int, count: int, place: Place, what: str) -> Bytes:
        """Return `count` bytes at an address, as an array that writes through.

        Raises:
            Fault: They are not within one live allocation of that place.
        """
        found = self._holder(address)
        if found is None:
            raise Fault(RT_PARAM_INVALID, f"{what}: {address:#x} points to nothing")
        if found.place != place:
            raise Fault(
                RT_INVALID_MEMORY_TYPE, f"{what}: {address:#x} is on the {found.place}, not {place}"
            )
        if found.data is None:
            raise Fault(RT_PARAM_INVALID, f"{what}: use after free of {address:#x}")
        start = address - found.address
        if start + count > found.size:
            raise Fault(
                RT_PARAM_INVALID,
                f"{what}: {count} bytes at {address:#x} run past the end of an allocation of "
                f"{found.size} bytes, of which {found.size - start} are left there",
            )
        return found.data[start : start + count]

    def _add(self, allocation: Allocation) -> None:
        if allocation.address not in self._found:
            self._starts.insert(bisect_right(self._starts, allocation.address), allocation.address)
        self._found[allocation.address] = allocation

    def _holder(self, address: int) -> Allocation | None:
        index = bisect_right(self._starts, address) - 1
        if index < 0:
            return None
        found = self._found[self._starts[index]]
        return found if address < found.address + max(found.size, 1) else None
