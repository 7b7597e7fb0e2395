"""acl.rt: copies, streams and events behave as a device may at its worst."""

import pytest

from omforge.runtime.acl_sim import simulated_acl
from omforge.runtime.acl_sim.rt import D2D, D2H, DEFAULT, H2D, H2H


def on_device(acl, data: bytes) -> int:
    address, ret = acl.rt.malloc(len(data), 0)
    assert ret == 0
    assert acl.rt.memcpy(address, len(data), acl.util.bytes_to_ptr(data), len(data), H2D) == 0
    return address


def from_device(acl, address: int, size: int) -> bytes:
    host, ret = acl.rt.malloc_host(size)
    assert ret == 0
    assert acl.rt.memcpy(host, size, address, size, D2H) == 0
    data = acl.util.ptr_to_bytes(host, size)
    acl.rt.free_host(host)
    return data


def pinned(acl, data: bytes) -> int:
    host, ret = acl.rt.malloc_host(len(data))
    assert ret == 0
    assert acl.rt.memcpy(host, len(data), acl.util.bytes_to_ptr(data), len(data), H2H) == 0
    return host


def test_copies_there_within_and_back(acl):
    a = on_device(acl, b"abcdef")
    b, _ = acl.rt.malloc(6, 2)
    assert acl.rt.memcpy(b, 6, a + 2, 4, D2D) == 0
    assert acl.rt.memset(b + 4, 2, 0x7A, 2) == 0
    assert from_device(acl, b, 6) == b"cdefzz"
    assert acl.rt.memcpy(b, 6, a, 6, DEFAULT) == 0
    assert from_device(acl, b, 6) == b"abcdef"
    assert dict(acl.sim.copies) == {"H2D": 1, "D2D": 2, "D2H": 2}
    assert acl.sim.moved["D2D"] == 10
    assert (acl.sim.errors, acl.sim.last_error) == ([], "")


@pytest.mark.parametrize(
    ("kind", "why"),
    [
        (H2H, "target: {device} is on the device, not host"),
        (D2H, "source: {host} is on the host, not device"),
        (D2D, "source: {host} is on the host, not device"),
    ],
)
def test_the_kind_must_fit_the_pointers(acl, kind, why):
    device = on_device(acl, b"ab")
    host = acl.util.bytes_to_ptr(b"xy")
    assert acl.rt.memcpy(device, 2, host, 2, kind) != 0
    assert why.format(device=hex(device), host=hex(host)) in acl.sim.last_error


def test_copies_that_do_not_fit(acl):
    device = on_device(acl, b"abcd")
    host = acl.util.bytes_to_ptr(b"12345678")
    assert acl.rt.memcpy(device, 4, host, 5, H2D) == 107000
    assert acl.sim.last_error == "memcpy of 5 bytes into at most 4"
    assert acl.rt.memcpy(device, 8, host, 2, H2D) == 107000
    assert "run past the end" in acl.sim.last_error
    assert acl.rt.memcpy(device, 0, host, 0, H2D) == 107000
    assert acl.rt.memcpy(device, 4, host, 4, 9) == 100000
    assert acl.rt.memset(device, 4, 0, 5) == 107000
    assert from_device(acl, device, 4) == b"abcd"
    assert acl.get_recent_err_msg() == acl.sim.last_error


def test_freed_memory(acl):
    device = on_device(acl, b"ab")
    assert acl.rt.free(device) == 0
    assert acl.rt.free(device) == 207002
    assert acl.rt.memset(device, 2, 0, 2) == 107000
    assert acl.sim.errors == [
        f"acl.rt.free: double free of {device:#x}",
        f"acl.rt.memset: memset: use after free of {device:#x}",
    ]


def test_work_in_a_stream_is_done_at_synchronize_and_not_before(acl):
    stream, _ = acl.rt.create_stream()
    device, host = on_device(acl, b"old"), pinned(acl, b"new")
    assert acl.rt.memcpy_async(device, 3, host, 3, H2D, stream) == 0
    assert from_device(acl, device, 3) == b"old"
    assert acl.rt.synchronize_stream(stream) == 0
    assert from_device(acl, device, 3) == b"new"


def test_a_host_buffer_that_is_refilled_too_early_is_copied_with_its_new_content(acl):
    stream, _ = acl.rt.create_stream()
    device, host = on_device(acl, b"...."), pinned(acl, b"good")
    acl.rt.memcpy_async(device, 4, host, 4, H2D, stream)
    acl.rt.memcpy(host, 4, acl.util.bytes_to_ptr(b"evil"), 4, H2H)
    acl.rt.synchronize_stream(stream)
    assert from_device(acl, device, 4) == b"evil"


def test_memory_that_is_freed_under_a_stream(acl):
    stream, _ = acl.rt.create_stream()
    device, host = on_device(acl, b"ab"), pinned(acl, b"cd")
    acl.rt.memcpy_async(device, 2, host, 2, H2D, stream)
    acl.rt.free(device)
    assert acl.rt.synchronize_stream(stream) == 107000
    assert acl.sim.last_error.startswith(
        "in a stream, memcpy_async: memcpy, target: use after free"
    )
    assert acl.rt.synchronize_stream(stream) == 0  # it was told once


def test_asynchronous_copies_need_pinned_memory(acl):
    stream, _ = acl.rt.create_stream()
    device = on_device(acl, b"ab")
    assert acl.rt.memcpy_async(device, 2, acl.util.bytes_to_ptr(b"cd"), 2, H2D, stream) == 107000
    assert "malloc_host did not allocate" in acl.sim.last_error
    a, b = pinned(acl, b"1"), pinned(acl, b"2")
    assert acl.rt.memcpy_async(a, 1, b, 1, H2H, stream) == 107000


def test_a_two_dimensional_copy(acl):
    stream, _ = acl.rt.create_stream()
    source = on_device(acl, b"abcdefgh")
    target = on_device(acl, b"." * 11)
    assert acl.rt.memcpy2d_async(target + 1, 5, source, 4, 3, 2, D2D, stream) == 0
    acl.rt.synchronize_stream(stream)
    assert from_device(acl, target, 11) == b".abc..efg.."
    assert acl.sim.moved["D2D"] == 6


def test_two_dimensional_copies_that_are_refused(acl):
    stream, _ = acl.rt.create_stream()
    source, target = on_device(acl, b"abcdefgh"), on_device(acl, b"." * 8)

    def copy(**changed):
        given = {"dst": target, "dpitch": 4, "src": source, "spitch": 4, "width": 3, "height": 2}
        return acl.rt.memcpy2d_async(*(given | changed).values(), D2D, stream)

    assert copy(width=5) == 100000
    assert copy(height=0) == 107000
    assert copy(height=3) == 107000
    assert "run past the end" in acl.sim.last_error
    assert copy(spitch=6, height=2) == 107000
    assert acl.rt.synchronize_stream(stream) == 0


def test_a_device_whose_two_dimensional_copies_are_not_within_it():
    acl = simulated_acl(memcpy2d_within_device=False)
    acl.init()
    acl.rt.set_device(0)
    stream, _ = acl.rt.create_stream()
    a = on_device(acl, b"ab")
    assert acl.rt.memcpy2d_async(a, 1, a, 1, 1, 1, D2D, stream) == 207000
    assert acl.sim.last_error == "memcpy2d_async does not copy D2D"
    assert acl.sim.errors == []  # to ask is no mistake


def test_events_order_streams(acl):
    first, _ = acl.rt.create_stream()
    second, _ = acl.rt.create_stream()
    event, _ = acl.rt.create_event()
    device, other = on_device(acl, b"0"), on_device(acl, b"0")
    host = pinned(acl, b"1")
    acl.rt.memcpy_async(device, 1, host, 1, H2D, first)
    acl.rt.record_event(event, first)
    acl.rt.stream_wait_event(second, event)
    acl.rt.memcpy_async(other, 1, device, 1, D2D, second)
    assert acl.rt.synchronize_stream(second) == 0
    assert from_device(acl, other, 1) == b"1"
    assert acl.rt.synchronize_stream(first) == 0


def test_without_the_event_the_second_stream_sees_old_bytes(acl):
    first, _ = acl.rt.create_stream()
    second, _ = acl.rt.create_stream()
    device, other = on_device(acl, b"0"), on_device(acl, b"9")
    acl.rt.memcpy_async(device, 1, pinned(acl, b"1"), 1, H2D, first)
    acl.rt.memcpy_async(other, 1, device, 1, D2D, second)
    acl.rt.synchronize_stream(second)
    acl.rt.synchronize_stream(first)
    assert from_device(acl, other, 1) == b"0"


def test_events_measure_time(acl):
    stream, _ = acl.rt.create_stream()
    start, _ = acl.rt.create_event()
    end, _ = acl.rt.create_event()
    acl.rt.record_event(start, stream)
    acl.rt.record_event(end, stream)
    assert acl.rt.event_elapsed_time(start, end) == (0.0, 107006)
    assert acl.rt.synchronize_event(end) == 0
    elapsed, ret = acl.rt.event_elapsed_time(start, end)
    assert ret == 0
    assert elapsed >= 0
    never, _ = acl.rt.create_event()
    assert acl.rt.synchronize_event(never) == 107000


def test_handles(acl):
    stream, _ = acl.rt.create_stream()
    event, _ = acl.rt.create_event()
    assert acl.rt.synchronize_stream(event) == 107017
    assert acl.sim.last_error == f"{event:#x} is a event, no stream"
    acl.rt.record_event(event, stream)
    assert acl.rt.destroy_stream(stream) == 507004
    assert acl.rt.synchronize_device() == 0
    assert acl.rt.destroy_stream(stream) == 0
    assert acl.rt.destroy_stream(stream) == 107017
    assert "was destroyed" in acl.sim.last_error
    assert acl.rt.destroy_event(event) == 0
    assert acl.rt.record_event(event, stream) == 107017
    assert acl.rt.synchronize_stream(12) == 107017


def test_devices_and_contexts(acl):
    assert acl.rt.set_device(99) == 107001
    assert acl.rt.create_context(1) == (0, 107001)
    context, ret = acl.rt.create_context(0)
    assert ret == 0
    assert acl.rt.destroy_context(context) == 0
    assert acl.rt.destroy_context(context) == 100000
    assert acl.rt.reset_device(0) == 0
    assert acl.rt.reset_device(0) == 107001
    assert acl.rt.malloc(4, 0) == (0, 107002)
    assert acl.rt.malloc_host(4) == (0, 107002)


def test_nothing_works_ahead_of_init():
    acl = simulated_acl()
    assert acl.rt.set_device(0) == 100001
    assert acl.rt.malloc(4, 0) == (0, 100001)
    assert acl.rt.create_stream() == (0, 100001)


def test_calls_are_counted(acl):
    acl.rt.malloc(4, 0)
    acl.rt.malloc(0, 0)
    acl.rt.malloc(4, 7)
    assert acl.sim.calls["acl.rt.malloc"] == 3
    assert acl.sim.calls["acl.init"] == 1
