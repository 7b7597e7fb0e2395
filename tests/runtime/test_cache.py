"""The KV cache: one strided copy a step, in both layouts."""

import numpy as np
import pytest

from omforge.ir.errors import CheckError, InputError
from omforge.lowering.manifest import KvCache as KvSpec
from omforge.runtime.cache import KvCache, cache_specs

SPEC = KvSpec("stacked", 2, 3, 4, 4, capacity=5, dtype="float16")
PER_LAYER = KvSpec("per-layer", 2, 3, 4, 6, capacity=5, dtype="float16")


def step(spec: KvSpec, batch: int, seq: int, value: float) -> dict[str, np.ndarray]:
    """A step's present outputs, all of one value."""
    _, present = cache_specs(spec, batch, seq, spec.dtype)
    return {t.name: np.full(t.shape, value, t.dtype) for t in present}


def slots(cache: KvCache) -> list[list[float]]:
    """What each buffer holds by slot; all rows, heads and columns of a slot must be equal."""
    found = []
    for buffer in cache.feeds.values():
        assert (buffer == buffer[:1, :1, :, :1]).all()
        found.append(buffer[0, 0, :, 0].tolist())
    return found


def test_stacked_is_one_buffer_of_all_layers_keys_and_values():
    feeds = KvCache(SPEC, batch=2).feeds
    assert {name: a.shape for name, a in feeds.items()} == {"past_key_values": (8, 3, 5, 4)}
    assert feeds["past_key_values"].dtype == np.float16


def test_per_layer_is_a_key_and_a_value_for_each_layer():
    shapes = {name: a.shape for name, a in KvCache(PER_LAYER, batch=2).feeds.items()}
    assert shapes == {
        "past_key_values.0.key": (2, 3, 5, 4),
        "past_key_values.0.value": (2, 3, 5, 6),
        "past_key_values.1.key": (2, 3, 5, 4),
        "past_key_values.1.value": (2, 3, 5, 6),
    }


@pytest.mark.parametrize("spec", [SPEC, PER_LAYER])
def test_append_keeps_real_tokens_only(spec: KvSpec):
    cache = KvCache(spec, batch=2)
    cache.append(step(spec, 2, seq=4, value=1.0), count=2)
    cache.append(step(spec, 2, seq=1, value=2.0), count=1)
    assert cache.length == 3
    assert slots(cache) == [[1, 1, 2, 0, 0]] * len(cache.feeds)


def test_the_last_slot_can_be_filled_and_no_further():
    cache = KvCache(SPEC, batch=1)
    cache.append(step(SPEC, 1, seq=5, value=1.0), count=5)
    with pytest.raises(CheckError) as error:
        cache.append(step(SPEC, 1, seq=1, value=2.0), count=1)
    assert str(error.value) == (
        "the context is full: 5 tokens are in the cache and 1 more would exceed its capacity 5. "
        "Start a new sequence, or build the bundle with a larger context"
    )
    assert cache.length == 5
    assert slots(cache) == [[1] * 5]


def test_reset_zeroes_what_an_overflow_left():
    cache = KvCache(SPEC, batch=1)
    cache.append(step(SPEC, 1, seq=2, value=np.inf), count=2)
    cache.reset()
    assert cache.length == 0
    assert slots(cache) == [[0] * 5]


def test_another_number_of_heads_is_refused_with_both_sides():
    cache = KvCache(SPEC, batch=1)
    wrong = {"present_key_values": np.zeros((4, 2, 1, 4), np.float16)}
    with pytest.raises(InputError, match=r"float16\[4, 2, 1, 4\].*float16\[4, 3, new tokens, 4\]"):
        cache.append(wrong, 1)


def test_a_missing_present_is_refused():
    with pytest.raises(
        InputError, match="present_key_values does not fit the cache: it is missing"
    ):
        KvCache(SPEC, batch=1).append({}, 1)


def test_fewer_tokens_than_the_step_has_are_refused():
    with pytest.raises(InputError, match="it holds 1 tokens, the step has 2"):
        KvCache(SPEC, batch=1).append(step(SPEC, 1, seq=1, value=1.0), 2)
