"""A device through pyACL: what is made is undone, in reverse order, whatever happens."""

import sys
from typing import Any

import numpy as np
import pytest

from omforge.ir.errors import CheckError, InputError, OmforgeError
from omforge.runtime.acl_device import AclDevice, import_acl
from omforge.runtime.acl_sim import simulated_acl


def undone(acl: Any) -> list[str]:
    """The calls that give back, in the order in which they were first made."""
    words = ("free", "destroy", "reset", "finalize", "unload")
    return [name for name in acl.sim.calls if any(word in name for word in words)]


def test_a_device_is_given_back_in_reverse_order_and_once():
    acl = simulated_acl(strict=True)
    with AclDevice(acl, kv_copy="rows") as device:
        device.malloc(4)
        device.malloc_host(4)
        device.close()
    assert undone(acl) == [
        "acl.rt.free_host",
        "acl.rt.free",
        "acl.rt.destroy_stream",
        "acl.rt.destroy_context",
        "acl.rt.reset_device",
        "acl.finalize",
    ]
    assert max(acl.sim.calls[name] for name in undone(acl)) == 1
    assert acl.sim.leaks == []


@pytest.mark.parametrize("fails", ["set_device", "create_context", "create_stream", "malloc"])
def test_a_call_that_fails_while_beginning_undoes_the_rest(monkeypatch, fails):
    acl = simulated_acl(strict=True)
    result = 507000 if fails == "set_device" else (0, 507000)
    monkeypatch.setattr(acl.rt, fails, lambda *_: result)
    with pytest.raises(OmforgeError, match="it returned 507000"):
        AclDevice(acl)
    assert acl.sim.finalised
    assert acl.sim.leaks == []


def test_ctrl_c_while_beginning(monkeypatch):
    acl = simulated_acl(strict=True)

    def interrupted() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(acl.rt, "create_stream", interrupted)
    with pytest.raises(KeyboardInterrupt):
        AclDevice(acl)
    assert acl.sim.finalised
    assert acl.sim.leaks == []


def test_errors_name_the_call_the_code_and_pyacls_words():
    with AclDevice(simulated_acl()) as device, pytest.raises(OmforgeError) as caught:
        device.malloc(0)
    assert caught.value.what == "acl.rt.malloc failed"
    assert caught.value.why == "it returned 107000 (malloc of 0 bytes)"


def test_a_failure_at_the_end_is_logged_and_the_rest_is_undone(caplog):
    acl = simulated_acl()
    device = AclDevice(acl, kv_copy="rows")
    device.malloc(4)
    device.later(acl.rt.free, 5)
    device.close()
    assert "free returned 107000 at the end" in caplog.text
    assert acl.sim.leaks == []


def test_work_that_fails_at_the_end_does_not_hinder_the_rest(caplog):
    acl = simulated_acl()
    device = AclDevice(acl, kv_copy="rows")
    address, _ = acl.rt.malloc(64, 0)
    host, _ = device.malloc_host(64)
    device.upload(address, host, 64)
    acl.rt.free(address)
    device.close()
    assert "synchronize_stream returned 107000 at the end" in caplog.text
    assert acl.sim.leaks == []


def test_somebody_elses_pyacl_is_not_finalised():
    acl = simulated_acl()
    acl.init()
    with AclDevice(acl):
        pass
    assert not acl.sim.finalised
    assert acl.finalize() == 0


def test_strict_mode_tells_of_leaks_at_the_end():
    acl = simulated_acl(strict=True)
    device = AclDevice(acl)
    acl.rt.malloc(4, 0)
    with pytest.raises(CheckError, match="leaked 1 x device memory; leaked 4 bytes"):
        device.close()


@pytest.mark.parametrize(
    ("within", "kv_copy", "two_d"),
    [
        (True, "auto", True),
        (False, "auto", False),
        (True, "rows", False),
        (True, "2d", True),
        (False, "2d", True),
    ],
)
def test_whether_strided_copies_are_made_at_once(within, kv_copy, two_d):
    acl = simulated_acl(strict=True, memcpy2d_within_device=within)
    with AclDevice(acl, kv_copy=kv_copy) as device:
        assert device.two_d is two_d


def test_a_pyacl_without_two_dimensional_copies(monkeypatch):
    acl = simulated_acl()
    monkeypatch.setattr(acl.rt, "memcpy2d_async", None)
    with AclDevice(acl) as device:
        assert not device.two_d


def test_two_dimensional_copies_that_copy_something_else_are_not_used(monkeypatch, caplog):
    acl = simulated_acl()
    monkeypatch.setattr(acl.rt, "memcpy2d_async", lambda *_: 0)
    with AclDevice(acl) as device:
        assert not device.two_d
    assert "copies something else" in caplog.text


@pytest.mark.parametrize("kv_copy", ["2d", "rows"])
def test_rows_are_copied(kv_copy):
    with AclDevice(simulated_acl(strict=True), kv_copy=kv_copy) as device:
        source, target = device.malloc(256), device.malloc(256)
        host, view = device.malloc_host(256)
        view[:] = np.arange(256)
        device.upload(source, host, 256)
        device.zero(target, 256)
        device.copy_rows(target + 64, 128, source, 64, 32, 2)
        device.download(host, target, 256)
        device.synchronize()
        expected = np.zeros((4, 64), np.uint8)
        expected[1, :32], expected[3, :32] = np.arange(32), np.arange(64, 96)
        np.testing.assert_array_equal(view.reshape(4, 64), expected)


def test_pyacl_that_is_not_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "acl", None)
    with pytest.raises(InputError, match=r"Install CANN and source its set_env\.sh, or use --back"):
        import_acl()
