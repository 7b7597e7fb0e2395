"""The simulated module as a whole: beginning, end, strict mode."""

import pytest

from omforge.ir.errors import CheckError
from omforge.runtime.acl_sim import simulated_acl


def test_beginning_and_end():
    acl = simulated_acl()
    assert acl.finalize() == 100001
    assert acl.init() == 0
    assert acl.init("config.json") == 100002
    assert acl.finalize() == 0
    assert acl.finalize() == 100037


def test_two_modules_know_nothing_of_each_other():
    first, second = simulated_acl(), simulated_acl()
    first.init()
    assert second.rt.set_device(0) == 100001


def test_strict_mode_raises_at_the_end_for_errors_and_leaks():
    acl = simulated_acl(strict=True)
    acl.init()
    acl.rt.set_device(0)
    acl.rt.malloc(4, 0)
    acl.rt.free(77)
    with pytest.raises(CheckError) as caught:
        acl.finalize()
    text = str(caught.value)
    assert "faults in the use of pyACL" in text
    assert "acl.rt.free: free of 0x4d, which is no device allocation" in text
    assert "leaked 1 x device memory; leaked 1 x device that was not reset; leaked 4 bytes" in text


def test_strict_mode_is_content_with_clean_use():
    acl = simulated_acl(strict=True)
    assert (acl.init(), acl.rt.set_device(0), acl.rt.reset_device(0), acl.finalize()) == (0,) * 4


def test_data_buffers():
    acl = simulated_acl()
    buffer = acl.create_data_buffer(5, 6)
    assert (acl.get_data_buffer_addr(buffer), acl.get_data_buffer_size(buffer)) == (5, 6)
    assert acl.update_data_buffer(buffer, 7, 0) == 100000
    assert acl.update_data_buffer(buffer, 7, 8) == 0
    assert acl.get_data_buffer_addr(buffer) == 7
    assert acl.destroy_data_buffer(buffer) == 0
    assert acl.destroy_data_buffer(buffer) == 100000


def test_bytes_and_pointers():
    acl = simulated_acl()
    pointer = acl.util.bytes_to_ptr(b"hello")
    assert acl.util.ptr_to_bytes(pointer + 1, 4) == b"ello"
    assert acl.util.ptr_to_bytes(pointer, 6) == b""
    assert "run past the end" in acl.sim.last_error
