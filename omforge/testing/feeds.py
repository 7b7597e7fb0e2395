"""Inputs for small models: from a seed, and of several sizes."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from omforge import ir
from omforge.ir.dims import Dim, evaluate, symbols
from omforge.ir.values import dims

Feeds = dict[str, npt.NDArray[Any]]

SIZES = (2, 3, 5, 4, 7, 6)
"""What the first, second ... symbol of a model is bound to."""


def example_feeds(
    model: ir.Model, seed: int = 0, *, scale: float = 1.0, bindings: Mapping[str, int] | None = None
) -> Feeds:
    """Return one set of inputs; the same arguments give the same numbers.

    Args:
        model: Its inputs have dtypes and shapes.
        seed: Another one gives other numbers, and other sizes to the symbols.
        scale: The standard deviation of floats. A small one makes an epsilon matter.
        bindings: Sizes of symbols by name, before those chosen here.

    Raises:
        ValueError: An input has no shape.
    """
    random = np.random.Generator(np.random.PCG64(seed))
    sizes = dict(bindings or {})
    feeds: Feeds = {}
    for value in model.graph.inputs:
        if value.shape is None or value.dtype is None:
            raise ValueError(f"input {value.name} has no shape")
        shape = [_size(dim, sizes, seed) for dim in dims(value) or ()]
        feeds[str(value.name)] = _numbers(random, shape, value.dtype, scale)
    return feeds


def several_feeds(model: ir.Model) -> list[Feeds]:
    """Return three sets: ordinary numbers, other sizes, and numbers so small that epsilons show."""
    return [
        example_feeds(model, 0),
        example_feeds(model, 1, scale=4.0),
        example_feeds(model, 0, scale=1e-3),
    ]


def _size(dim: Dim, sizes: dict[str, int], seed: int) -> int:
    for symbol in sorted(symbols(dim)):
        sizes.setdefault(symbol, SIZES[(len(sizes) + seed) % len(SIZES)])
    return evaluate(dim, sizes)


def _numbers(
    random: np.random.Generator, shape: list[int], dtype: ir.DataType, scale: float
) -> npt.NDArray[Any]:
    if dtype is ir.DataType.BOOL:
        return random.integers(0, 2, shape).astype(bool)
    if dtype.is_integer():
        return random.integers(0, 4, shape).astype(dtype.numpy())
    return (scale * random.standard_normal(shape)).astype(dtype.numpy())
