"""The cache on a device does what the cache on the host does."""

import dataclasses

import numpy as np
import pytest

from omforge.bundle.manifest import KvCache as KvSpec
from omforge.bundle.manifest import LayerSizes, StateSpec
from omforge.ir.errors import CheckError, InputError
from omforge.runtime.acl_cache import DeviceCache, Slice, place
from omforge.runtime.acl_device import AclDevice
from omforge.runtime.acl_sim import simulated_acl
from omforge.runtime.cache import KvCache, cache_tensors, state_specs


def spec(layout: str = "stacked", key: int = 16, value: int = 16) -> KvSpec:
    return KvSpec(layout, 2, 2, key, value, 8, "float16")


def unlike() -> KvSpec:
    """Two layers that differ in heads and sizes, though not in the bytes of a slot."""
    sizes = (LayerSizes(2, 16, 16), LayerSizes(1, 32, 32))
    return dataclasses.replace(spec("per-layer"), layer_sizes=sizes)


class Step:
    """New keys and values on the host and on the device."""

    def __init__(self, device: AclDevice, of: KvSpec, batch: int, seq: int, gap: int = 0) -> None:
        random = np.random.default_rng(seq)
        tensors = cache_tensors(of, batch)
        self.arrays = {
            t.present: random.standard_normal((t.rows, t.heads, seq, t.size)).astype(np.float16)
            for t in tensors
        }
        size, offsets = place([array.nbytes + gap for array in self.arrays.values()])
        block = device.malloc(size)
        addresses = {}
        for (name, array), offset in zip(self.arrays.items(), offsets, strict=True):
            host, view = device.malloc_host(array.nbytes)
            view[:] = array.reshape(-1).view(np.uint8)
            device.upload(block + offset, host, array.nbytes)
            addresses[name] = block + offset
        self.slice = Slice(addresses, seq)


def content(device: AclDevice, cache: DeviceCache) -> dict[str, np.ndarray]:
    found = {}
    for tensor in cache.tensors:
        size = cache.size(tensor.past)
        host, view = device.malloc_host(size)
        device.download(host, cache.addresses[tensor.past], size)
        device.synchronize()
        shape = (tensor.rows, tensor.heads, cache.capacity, tensor.size)
        found[tensor.past] = view.copy().view(np.float16).reshape(shape)
    return found


@pytest.mark.parametrize("kv_copy", ["2d", "rows"])
@pytest.mark.parametrize(
    "of", [spec(), spec("per-layer"), spec("per-layer", 16, 32), unlike()], ids=lambda s: s.layout
)
def test_it_holds_what_the_hosts_cache_holds(of, kv_copy):
    with AclDevice(simulated_acl(strict=True), kv_copy=kv_copy) as device:
        cache, reference = DeviceCache(device, of, 2), KvCache(of, 2)
        assert cache.feeds == {}
        for seq, count in ((4, 3), (1, 1), (4, 4)):
            step = Step(device, of, 2, seq)
            cache.produced(step.slice)
            cache.append({}, count)
            reference.append(step.arrays, count)
            assert cache.length == reference.length
        found = content(device, cache)
        for name, array in reference.feeds.items():
            np.testing.assert_array_equal(found[name], array)
        cache.reset()
        assert cache.length == 0
        assert not any(array.any() for array in content(device, cache).values())


@pytest.mark.parametrize(
    ("of", "gap", "copies"),
    [
        (spec(), 0, 1),
        (spec("per-layer"), 0, 1),  # they lie one behind the other
        (spec("per-layer"), 64, 4),  # the new ones have gaps, as with gears
        (spec("per-layer", 16, 32), 0, 4),
        (unlike(), 0, 2),  # a layer's keys and values at once
    ],
)
def test_tensors_that_lie_one_behind_the_other_are_copied_at_once(of, gap, copies):
    acl = simulated_acl(strict=True)
    with AclDevice(acl) as device:
        cache = DeviceCache(device, of, 1)
        step = Step(device, of, 1, 4, gap)
        before = acl.sim.calls["acl.rt.memcpy2d_async"]
        cache.produced(step.slice)
        cache.append({}, 2)
        assert acl.sim.calls["acl.rt.memcpy2d_async"] - before == copies
        assert cache.copies(step.slice) == copies


def test_a_full_cache_and_steps_that_were_not_made():
    with AclDevice(simulated_acl(strict=True)) as device:
        cache = DeviceCache(device, spec(), 1)
        step = Step(device, spec(), 1, 4)
        with pytest.raises(InputError, match="the step made none, not 1"):
            cache.append({}, 1)
        cache.produced(step.slice)
        with pytest.raises(InputError, match="the step made 4, not 5"):
            cache.append({}, 5)
        for _ in range(2):
            cache.produced(step.slice)
            cache.append({}, 4)
        cache.produced(step.slice)
        with pytest.raises(CheckError, match="the context is full"):
            cache.append({}, 1)
        with pytest.raises(InputError, match="has no tensor x"):
            cache.size("x")


def test_states_are_copied_whole_and_zeroed():
    states = state_specs([StateSpec("in", "out", "float32", ("batch", 3))], 2)
    with AclDevice(simulated_acl(strict=True)) as device:
        cache = DeviceCache(device, spec(), 2, states)
        host, view = device.malloc_host(24)

        def state() -> list[float]:
            device.download(host, cache.addresses["in"], 24)
            device.synchronize()
            return view.view(np.float32).tolist()

        assert state() == [0.0] * 6
        view[:] = np.arange(1, 7, dtype=np.float32).view(np.uint8)
        renewed = device.malloc(24)
        device.upload(renewed, host, 24)
        step = Step(device, spec(), 2, 4)
        cache.produced(Slice({**step.slice.addresses, "out": renewed}, 4))
        cache.append({}, 4)
        assert state() == [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]
        cache.reset()
        assert state() == [0.0] * 6


def test_placing():
    assert place([64, 65, 1]) == (256, [0, 64, 192])
    assert place([]) == (64, [])
