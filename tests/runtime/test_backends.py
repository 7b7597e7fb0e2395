"""Opening a bundle on a backend by name."""

import sys
from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import pytest

from omforge.ir.errors import InputError, OmforgeError
from omforge.runtime.acl_device import AclDevice
from omforge.runtime.acl_session import AclOptions
from omforge.runtime.backends import open_model
from omforge.runtime.bundle import Bundle
from tests.runtime.tiny import Tiny

Bundles = Callable[[Tiny], Bundle]


def test_the_backends_agree(tiny_bundle: Bundles):
    bundle = tiny_bundle(Tiny(om=True))
    with open_model(bundle) as cpu, open_model(bundle, backend="sim") as sim:
        np.testing.assert_array_equal(cpu.prefill([[1, 2, 3]]), sim.prefill([[1, 2, 3]]))


@pytest.mark.parametrize("kv_copy", ["2d", "rows"])
def test_a_device_is_used_as_it_is_told(
    tiny_bundle: Bundles, kv_copy: Literal["2d", "rows"], monkeypatch: pytest.MonkeyPatch
):
    made: list[bool] = []
    begin = AclDevice.__init__

    def noted(self: AclDevice, *given: Any) -> None:
        begin(self, *given)
        made.append(self.two_d)

    monkeypatch.setattr(AclDevice, "__init__", noted)
    options = AclOptions(kv_copy=kv_copy)
    with open_model(tiny_bundle(Tiny(om=True)), backend="sim", options=options):
        assert made == [kv_copy == "2d"]


def test_a_bundle_without_om_files_says_how_to_make_them(tiny_bundle: Bundles):
    with pytest.raises(InputError, match=r"has no \.om: atc was not run .*omforge build"):
        open_model(tiny_bundle(Tiny()), backend="sim")


def test_the_canonical_graph_runs_on_the_cpu_only(tiny_bundle: Bundles):
    with pytest.raises(InputError, match="canonical does not run on the backend sim"):
        open_model(tiny_bundle(Tiny(om=True)), "canonical", backend="sim")


def test_without_cann_the_error_says_so(tiny_bundle: Bundles, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "acl", None)
    with pytest.raises(InputError, match=r"there is no pyACL here: `import acl` says"):
        open_model(tiny_bundle(Tiny(om=True)), backend="acl")


def test_the_device_is_given_back_if_the_model_does_not_open(
    tiny_bundle: Bundles, monkeypatch: pytest.MonkeyPatch
):
    closed: list[bool] = []
    monkeypatch.setattr("omforge.runtime.acl_device.AclDevice.close", lambda _: closed.append(True))

    def fail(*_: object, **__: object) -> None:
        raise OmforgeError("no")

    monkeypatch.setattr("omforge.runtime.backends.LanguageModel", fail)
    with pytest.raises(OmforgeError, match="no"):
        open_model(tiny_bundle(Tiny(om=True)), backend="sim")
    assert closed == [True]
