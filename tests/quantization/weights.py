"""Models from text whose last inputs become weights."""

import numpy as np

from omforge import ir


def weighted(model: ir.Model, inputs: int) -> ir.Model:
    """Turn every input but the first `inputs` into an initializer of random numbers."""
    rng = np.random.default_rng(0)
    for value in list(model.graph.inputs)[inputs:]:
        assert value.shape is not None
        assert value.dtype is not None
        model.graph.inputs.remove(value)
        numbers = rng.normal(size=tuple(value.shape.numpy())) / 8
        value.const_value = ir.Tensor(numbers.astype(value.dtype.numpy()), name=value.name)
        model.graph.register_initializer(value)
    return model
