"""Memory of the simulated device: every access is checked."""

import ctypes

import numpy as np
import pytest

from omforge.runtime.acl_sim.codes import Fault
from omforge.runtime.acl_sim.memory import DEVICE_BASE, UNSET, Memory


def memory() -> Memory:
    return Memory(1 << 20)


def test_device_pointers_are_no_host_addresses_and_fresh_memory_is_nan():
    m = memory()
    address = m.malloc(8)
    assert address >= DEVICE_BASE
    assert m.place(address) == "device"
    view = m.view(address, 8, "device", "t")
    assert (view == UNSET).all()
    assert np.isnan(view.view(np.float16)).all()


def test_host_memory_is_at_its_address():
    m = memory()
    address = m.malloc_host(4)
    assert (m.place(address), m.is_pinned(address)) == ("host", True)
    (ctypes.c_uint8 * 4).from_address(address)[1] = 7
    assert m.view(address + 1, 1, "host", "t")[0] == 7


def test_borrowed_bytes_are_host_memory_but_not_pinned():
    m = memory()
    address = m.borrow(b"abc")
    assert (m.place(address), m.is_pinned(address)) == ("host", False)
    assert m.view(address, 3, "host", "t").tobytes() == b"abc"


def refused(code: int, call, *arguments) -> str:
    with pytest.raises(Fault) as caught:
        call(*arguments)
    assert caught.value.code == code
    return caught.value.reason


def test_what_is_refused():
    m = memory()
    device, host = m.malloc(16), m.malloc_host(16)
    other = m.malloc(16)
    assert "run past the end" in refused(107000, m.view, device + 8, 9, "device", "t")
    assert "points to nothing" in refused(107000, m.view, device + 16, 1, "device", "t")
    assert "points to nothing" in refused(107000, m.view, 5, 1, "device", "t")
    assert "is on the host, not device" in refused(107016, m.view, host, 1, "device", "t")
    assert "is on the device, not host" in refused(107016, m.view, device, 1, "host", "t")
    assert "no host allocation" in refused(107000, m.free, device, "host")
    assert "no device allocation" in refused(107000, m.free, device + 1, "device")
    m.free(device, "device")
    assert "use after free" in refused(107000, m.view, device, 1, "device", "t")
    assert "double free" in refused(207002, m.free, device, "device")
    assert m.view(other, 16, "device", "t").size == 16
    assert "malloc of 0 bytes" in refused(107000, m.malloc, 0)
    assert "malloc_host of -1 bytes" in refused(107000, m.malloc_host, -1)


def test_a_full_device():
    m = memory()
    m.malloc(1 << 19)
    assert "524288 of 1048576 are in use" in refused(207001, m.malloc, (1 << 19) + 1)
    assert m.peak == m.device_bytes == 1 << 19


def test_live_allocations():
    m = memory()
    kept, freed = m.malloc(3), m.malloc(4)
    m.borrow(b"bytes are nobody's to free")
    m.free(freed, "device")
    assert [allocation.address for allocation in m.live()] == [kept]
