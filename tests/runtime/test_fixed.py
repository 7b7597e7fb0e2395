"""Fixed inputs: given by name, zeros where absent, and refused where they do not fit."""

import numpy as np
import pytest

from omforge.bundle.manifest import FixedInput
from omforge.ir.errors import InputError
from omforge.runtime.fixed import fixed_feeds, fixed_specs

FIXED = (
    FixedInput("lora_a", "float16", (4, 2), "adapter"),
    FixedInput("memory", "float16", ("batch", 3), "memory"),
)


def test_shapes_have_the_batch_for_its_name() -> None:
    assert [spec.shape for spec in fixed_specs(FIXED, 2)] == [(4, 2), (2, 3)]


def test_what_is_absent_is_zeros_and_floats_become_the_graphs() -> None:
    feeds = fixed_feeds(FIXED, 2, {"lora_a": np.ones((4, 2), np.float32)}, {"memory": "float32"})
    assert {name: (a.dtype.name, a.shape) for name, a in feeds.items()} == {
        "lora_a": ("float16", (4, 2)),
        "memory": ("float32", (2, 3)),
    }
    assert feeds["lora_a"].all()
    assert not feeds["memory"].any()


def test_one_row_of_a_memory_does_for_all() -> None:
    feeds = fixed_feeds(FIXED, 2, {"memory": np.array([[1.0, 2.0, 3.0]])})
    assert feeds["memory"].tolist() == [[1, 2, 3], [1, 2, 3]]


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ({"lora": np.ones(3)}, "the fixed inputs of the bundle are lora_a, memory"),
        ({"lora_a": np.ones((1, 2))}, r"takes float16\[4, 2\], given is float64\[1, 2\]"),
        ({"memory": np.ones((3, 3))}, r"takes float16\[2, 3\], given is float64\[3, 3\]"),
        ({"memory": np.ones(3)}, r"given is float64\[3\]"),
        ({"memory": np.ones((2, 3), np.int64)}, r"given is int64\[2, 3\]"),
    ],
    ids=["unknown", "an adapter of one row", "too many rows", "a rank less", "integers"],
)
def test_what_does_not_fit_is_refused(given: dict[str, np.ndarray], why: str) -> None:
    with pytest.raises(InputError, match=why):
        fixed_feeds(FIXED, 2, given)
