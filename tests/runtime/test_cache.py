"""The KV cache: one strided copy a step, in both layouts."""

import dataclasses

import numpy as np
import pytest

from omforge.bundle.manifest import KvCache as KvSpec
from omforge.bundle.manifest import LayerSizes, StateSpec
from omforge.ir.errors import CheckError, InputError
from omforge.runtime.cache import KvCache, cache_specs, state_specs

SPEC = KvSpec("stacked", 2, 3, 4, 4, capacity=5, dtype="float16")
PER_LAYER = KvSpec("per-layer", 2, 3, 4, 6, capacity=5, dtype="float16")
UNLIKE = dataclasses.replace(PER_LAYER, layer_sizes=(LayerSizes(3, 4, 6), LayerSizes(1, 8, 2)))


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


def test_layers_that_differ_have_heads_and_sizes_of_their_own():
    shapes = {name: a.shape for name, a in KvCache(UNLIKE, batch=2).feeds.items()}
    assert shapes == {
        "past_key_values.0.key": (2, 3, 5, 4),
        "past_key_values.0.value": (2, 3, 5, 6),
        "past_key_values.1.key": (2, 1, 5, 8),
        "past_key_values.1.value": (2, 1, 5, 2),
    }


@pytest.mark.parametrize("spec", [SPEC, PER_LAYER, UNLIKE])
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


STATES = state_specs([StateSpec("past_state.0", "present_state.0", "float32", (1, "batch", 3))], 2)


def with_state(seq: int, value: float, shape: tuple[int, ...] = (1, 2, 3)) -> dict[str, np.ndarray]:
    state = np.full(shape, value, np.float32)
    return step(PER_LAYER, 2, seq, value) | {"present_state.0": state}


def test_a_state_is_zero_then_what_the_last_step_made_and_zero_again():
    cache = KvCache(PER_LAYER, batch=2, states=STATES)
    assert cache.feeds["past_state.0"].shape == (1, 2, 3)
    assert not cache.feeds["past_state.0"].any()
    for value in (1.0, 2.0):
        cache.append(with_state(2, value), count=2)
        assert (cache.feeds["past_state.0"] == value).all()
    kept = cache.feeds["past_state.0"]
    cache.reset()
    assert not cache.feeds["past_state.0"].any()
    assert kept.all()  # it is an output of a session, and not the cache's to overwrite


def test_a_state_that_does_not_fit_is_refused_and_nothing_is_kept():
    cache = KvCache(PER_LAYER, batch=2, states=STATES)
    with pytest.raises(InputError, match=r"present_state\.0 does not fit .* is missing"):
        cache.append(step(PER_LAYER, 2, seq=1, value=1.0), count=1)
    with pytest.raises(InputError, match=r"float32\[1, 2, 4\], the state is float32\[1, 2, 3\]"):
        cache.append(with_state(1, 1.0, (1, 2, 4)), count=1)
    assert cache.length == 0
    assert not any(array.any() for array in cache.feeds.values())


def test_what_is_held_is_repeated_up_to_a_length():
    cache = KvCache(SPEC, batch=1)
    for value in (1.0, 2.0):
        cache.append(step(SPEC, 1, 1, value), 1)
    cache.repeat(5)
    assert slots(cache) == [[1, 2, 1, 2, 1]]
    assert cache.length == 5
    with pytest.raises(CheckError, match="the context is full"):
        cache.repeat(6)
    cache.reset()
    assert slots(cache) == [[0] * 5]
    with pytest.raises(InputError, match="0 tokens cannot be repeated to 3"):
        cache.repeat(3)
