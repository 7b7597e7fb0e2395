"""The pyACL backend: what a step moves, what is shared, and what is refused."""

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from omforge.ir.errors import InputError, OmforgeError
from omforge.om import read_om, write_om
from omforge.om.simulated import simulate_om
from omforge.runtime.acl_session import AclBackend, AclOptions
from omforge.runtime.acl_sim import simulated_acl
from omforge.runtime.bundle import Bundle
from omforge.runtime.generate import LanguageModel
from tests.runtime.tiny import Tiny

Bundles = Callable[[Tiny], Bundle]
TINY = Tiny(batches=(1, 4), om=True)


def opened(bundle: Bundle, batch: int = 1, acl: Any = None, **options: Any) -> LanguageModel:
    acl = acl or simulated_acl(strict=True)
    backend = AclBackend(bundle, batch, acl=acl, options=AclOptions(**options))
    return LanguageModel(bundle, batch=batch, backend=backend)


def changed(count: Any, before: Any) -> dict[str, int]:
    return {key: number - before[key] for key, number in count.items() if number != before[key]}


class Steps:
    """What the calls and copies of one decode step are."""

    def __init__(self, model: LanguageModel, acl: Any, rows: int) -> None:
        model.decode([1] * rows)
        calls, copies, moved = (c.copy() for c in (acl.sim.calls, acl.sim.copies, acl.sim.moved))
        memory = acl.sim.memory.device_bytes
        model.decode([1] * rows)
        self.calls = changed(acl.sim.calls, calls)
        self.copies = changed(acl.sim.copies, copies)
        self.moved = changed(acl.sim.moved, moved)
        self.allocated = acl.sim.memory.device_bytes - memory


@pytest.mark.parametrize("batch", [1, 4])
def test_a_decode_step_is_five_calls_and_moves_nothing_but_its_inputs_and_logits(
    tiny_bundle: Bundles, batch: int
):
    acl = simulated_acl(strict=True)
    with opened(tiny_bundle(TINY), batch, acl) as model:
        model.prefill([[1, 2, 3]] * batch)
        step = Steps(model, acl, batch)
    assert step.calls == {
        "acl.rt.memcpy_async": 2,
        "acl.mdl.execute_async": 1,
        "acl.rt.synchronize_stream": 1,
        "acl.rt.memcpy2d_async": 1,
    }
    assert step.copies == {"H2D": 1, "D2H": 1, "D2D": 1}
    assert step.allocated == 0
    # The inputs lie at multiples of 64 bytes, the mask [B, 1, 1, 25] last.
    assert step.moved == {
        "H2D": 3 * 64 + 4 * 25 * batch,
        "D2H": 4 * 32 * batch,  # logits [B, 32]
        "D2D": 4 * 2 * 2 * 2 * 4 * batch,  # [2*L*B, K, 1, D]
    }


def test_without_two_dimensional_copies_there_is_one_copy_for_each_row(tiny_bundle: Bundles):
    acl = simulated_acl(strict=True, memcpy2d_within_device=False)
    with opened(tiny_bundle(TINY), acl=acl) as model:
        model.prefill([[1, 2, 3]])
        step = Steps(model, acl, 1)
        found = model.prefill([[4, 5]])
    assert step.copies == {"H2D": 1, "D2H": 1, "D2D": 8}  # 2*L*B*K rows
    with opened(tiny_bundle(TINY)) as model:
        np.testing.assert_array_equal(model.prefill([[4, 5]]), found)


def test_gears_are_chosen_when_they_change_and_not_at_each_step(tiny_bundle: Bundles):
    acl = simulated_acl(strict=True)
    tiny = Tiny(windows=(None, 6), gears=True, om=True)
    with opened(tiny_bundle(tiny), acl=acl) as model:
        model.prefill([[1] * 12])  # gears of 8 and 4
        assert acl.sim.calls["acl.mdl.set_input_dynamic_dims"] == 2
        step = Steps(model, acl, 1)
        assert acl.sim.calls["acl.mdl.set_input_dynamic_dims"] == 3
        # The small inputs and the two masks, whose ends are near enough for one copy.
        assert step.copies == {"H2D": 1, "D2H": 1, "D2D": 1}
        assert "acl.mdl.set_input_dynamic_dims" not in step.calls
        assert step.allocated == 0


def test_everything_is_allocated_when_the_backend_opens(tiny_bundle: Bundles):
    acl = simulated_acl(strict=True)
    with opened(tiny_bundle(TINY), acl=acl) as model:
        before = acl.sim.calls["acl.rt.malloc"], acl.sim.calls["acl.rt.malloc_host"]
        model.prefill([[1] * 13])
        model.decode([2])
        model.reset()
        model.prefill([[1] * 2])
        after = acl.sim.calls["acl.rt.malloc"], acl.sim.calls["acl.rt.malloc_host"]
        assert after == before


def test_the_cache_never_comes_to_the_host(tiny_bundle: Bundles):
    acl = simulated_acl(strict=True)
    bundle = tiny_bundle(Tiny(capacity=39, om=True))  # large enough to be seen in the sums
    with opened(bundle, acl=acl) as model:
        model.prefill([[1] * 30])
        before = acl.sim.moved.copy()
        for _ in range(5):
            model.decode([1])
        cache = 2 * 2 * 2 * 39 * 4 * 4
        assert changed(acl.sim.moved, before)["D2H"] == 5 * 4 * 32 < cache


@pytest.mark.parametrize("shared", [True, False])
def test_models_share_one_workspace(tiny_bundle: Bundles, shared: bool):
    acl = simulated_acl(strict=True)
    with opened(tiny_bundle(TINY), acl=acl, share_workspace=shared) as model:
        model.prefill([[1, 2]])
        name = "acl.mdl.load_from_file"
        assert acl.sim.calls[f"{name}_with_mem" if shared else name] == 3
        kinds = [a.what for a in acl.sim.memory.live()]
        assert kinds.count("workspace of a model") == (0 if shared else 3)


@pytest.mark.parametrize("share", ["auto", "no"])
def test_models_share_weights_where_pyacl_can(tiny_bundle: Bundles, share: str):
    bundle = tiny_bundle(TINY)
    files = sorted((bundle.folder / "om" / "weight").iterdir())
    assert files
    used: dict[bool, int] = {}
    for external in (False, True):
        acl = simulated_acl(strict=True, external_weights=external)
        with opened(bundle, acl=acl, share_weights=share) as model:
            logits = model.prefill([[1, 2, 3]])
            used[external] = acl.sim.memory.device_bytes
            shared = external and share == "auto"
            assert acl.sim.calls["acl.mdl.load_with_config"] == (3 if shared else 0)
        with opened(bundle) as model:
            np.testing.assert_array_equal(model.prefill([[1, 2, 3]]), logits)
    saved = used[False] - used[True]
    # Three models have the weights twice more than once.
    assert saved == (2 * sum(f.stat().st_size for f in files) if share == "auto" else 0)


def test_weights_are_shared_through_the_c_library(
    tiny_bundle: Bundles, monkeypatch: pytest.MonkeyPatch
):
    bundle = tiny_bundle(TINY)
    with pytest.raises(InputError, match=r"cannot be shared through libascendcl\.so"):
        opened(bundle, share_weights="ctypes")
    acl = simulated_acl(strict=True, external_weights=True)

    class Function:
        """The C function: bytes instead of text, pointers as numbers."""

        def __call__(self, handle: int, name: bytes, address: int, size: int) -> int:
            return acl.mdl.set_external_weight_address(handle, name.decode(), address, size)

    library = type("Library", (), {"aclmdlSetExternalWeightAddress": Function()})
    monkeypatch.setattr("ctypes.CDLL", lambda _: library)
    with opened(bundle, acl=acl, share_weights="ctypes") as model:
        model.prefill([[1, 2]])
        assert acl.sim.calls["acl.mdl.load_with_config"] == 3
        kinds = [a.what for a in acl.sim.memory.live()]
        # What is small stays in the .om, and every model has its own.
        assert kinds.count("weights of a model") == 3


def copied(bundle: Bundle, folder: Path) -> Bundle:
    shutil.copytree(bundle.folder, folder)
    return Bundle.open(folder)


def test_other_models_om_files_are_refused(tiny_bundle: Bundles, tmp_path: Path):
    bundle = copied(tiny_bundle(TINY), tmp_path / "bundle")
    one, other = bundle.bucket("decode", 1), bundle.bucket("prefill", 4)
    shutil.copy(bundle.folder / str(other.om), bundle.folder / str(one.om))
    acl = simulated_acl()
    with pytest.raises(
        InputError, match=r"input_ids is int32\[1, 4\] of 16 bytes in .* int32\[1, 1\]"
    ):
        AclBackend(bundle, acl=acl)
    assert acl.sim.leaks == []
    assert acl.sim.finalised


def test_inputs_of_other_names_are_refused(tiny_bundle: Bundles, tmp_path: Path):
    bundle = copied(tiny_bundle(TINY), tmp_path / "bundle")
    bucket = bundle.bucket("decode", 1)
    windows = copied(tiny_bundle(Tiny(windows=(3, 3), om=True)), tmp_path / "other")
    file = windows.folder / windows.bucket("decode", 1).file
    simulate_om(file, bundle.folder / str(bucket.om))
    with pytest.raises(InputError, match=r"its inputs are .*attention_mask_w3.*, not "):
        AclBackend(bundle, acl=simulated_acl())


def test_real_om_files_need_a_device_and_simulated_ones_a_simulation(
    tiny_bundle: Bundles, tmp_path: Path
):
    bundle = copied(tiny_bundle(TINY), tmp_path / "bundle")

    class Device:
        """A module that is not the simulator: it has no `sim`."""

    with pytest.raises(InputError, match="is a simulation: omforge-atc-sim made it"):
        AclBackend(bundle, acl=Device())
    file = bundle.folder / str(bundle.bucket("decode", 1).om)
    model = read_om(file).models[0]
    write_om(
        file, name="m", inputs=model.inputs, outputs=model.outputs, partitions={2: b"", 3: b""}
    )
    with pytest.raises(InputError, match="needs a device: atc compiled it"):
        AclBackend(bundle, acl=simulated_acl())


def test_feeds_are_checked_and_the_cache_is_none_of_them(tiny_bundle: Bundles):
    bundle = tiny_bundle(TINY)
    with AclBackend(bundle, acl=simulated_acl(strict=True)) as backend:
        session = backend.open(bundle.bucket("decode", 1))
        assert session.inputs == bundle.bucket("decode", 1).inputs
        assert session.outputs == bundle.bucket("decode", 1).outputs
        with pytest.raises(InputError, match="missing: input_ids, position_ids, logits_index"):
            session.run({"attention_mask": np.zeros((1, 1, 1, 25), np.float32)})
        feeds = {
            spec.name: np.zeros(spec.shape, spec.dtype)
            for spec in session.inputs
            if spec.name != "past_key_values"
        }
        assert session.run(feeds)["logits"].shape == (1, 32)
        with pytest.raises(InputError, match="not inputs of the graph: past_key_values"):
            session.run(feeds | {"past_key_values": np.zeros(1)})
        session.close()


def test_a_length_that_is_no_gear(tiny_bundle: Bundles):
    bundle = tiny_bundle(Tiny(gears=True, om=True))
    with AclBackend(bundle, acl=simulated_acl(strict=True)) as backend:
        session = backend.open(bundle.manifest.buckets[0])
        feeds = {
            "input_ids": np.zeros((1, 3), np.int32),
            "position_ids": np.zeros((1, 3), np.int32),
            "logits_index": np.zeros(1, np.int32),
            "attention_mask": np.zeros((1, 1, 3, 27), np.float32),
        }
        with pytest.raises(InputError, match="has no gear of 3 tokens: it has 1, 4, 8"):
            session.run(feeds)


@pytest.mark.parametrize("call", ["mdl.load_from_file_with_mem", "mdl.create_dataset", "rt.malloc"])
@pytest.mark.parametrize("stop", [OmforgeError, KeyboardInterrupt])
def test_whatever_stops_the_opening_leaves_nothing_behind(
    tiny_bundle: Bundles, monkeypatch: pytest.MonkeyPatch, call: str, stop: type[BaseException]
):
    acl = simulated_acl()
    part, name = call.split(".")
    real = getattr(getattr(acl, part), name)
    made: list[int] = []

    def fail(*arguments: Any) -> Any:
        made.append(1)
        if len(made) < 3:
            return real(*arguments)
        if stop is KeyboardInterrupt:
            raise KeyboardInterrupt
        return 0 if name == "create_dataset" else (0, 507000)

    monkeypatch.setattr(getattr(acl, part), name, fail)
    with pytest.raises(stop):
        AclBackend(tiny_bundle(TINY), acl=acl)
    assert acl.sim.finalised
    assert acl.sim.leaks == []


def test_ctrl_c_in_a_step_leaves_nothing_behind(
    tiny_bundle: Bundles, monkeypatch: pytest.MonkeyPatch
):
    acl = simulated_acl(strict=True)

    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    def interrupted_step() -> None:
        with opened(tiny_bundle(TINY), acl=acl) as model:
            model.prefill([[1, 2]])
            monkeypatch.setattr(acl.mdl, "execute_async", interrupted)
            model.decode([1])

    with pytest.raises(KeyboardInterrupt):
        interrupted_step()
    assert acl.sim.finalised
    assert acl.sim.leaks == []


def test_closing_twice(tiny_bundle: Bundles):
    acl = simulated_acl(strict=True)
    model = opened(tiny_bundle(TINY), acl=acl)
    model.close()
    model.close()
    assert acl.sim.calls["acl.finalize"] == 1


def test_options_are_values():
    assert AclOptions() == dataclasses.replace(AclOptions(kv_copy="rows"), kv_copy="auto")
