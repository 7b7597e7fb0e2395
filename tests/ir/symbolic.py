"""Small graphs for tests of shape inference, and ONNX Runtime as the judge of what it says."""

from collections.abc import Mapping

import numpy as np

from omforge import ir
from omforge.ir.dims import evaluate, symbols
from omforge.ir.infer import infer_model
from omforge.ir.numerics import run
from omforge.ir.values import dims, known

BINDINGS = ({"n": 2, "s": 3, "p": 4}, {"n": 3, "s": 7, "p": 1}, {"n": 1, "s": 1, "p": 6})


def inferred(inputs: str, body: str, constants: str = "", opset: int = 24) -> ir.Model:
    """The model that computes `y` by `body`, after inference."""
    model = ir.from_onnx_text(
        f'<ir_version: 10, opset_import: ["" : {opset}]>\n'
        f"g ({inputs}) => (float[] y) <{constants}> {{ {body} }}"
    )
    infer_model(model)
    return model


def shape(model: ir.Model, name: str = "y") -> str | None:
    """The inferred dimensions of a value, as in `n, 4`."""
    found = dims(value(model, name))
    return None if found is None else ", ".join(map(str, found))


def elements(model: ir.Model, name: str = "y") -> str | None:
    """The inferred elements of a value, as in `n, 4`."""
    found = known(value(model, name))
    return None if found is None else ", ".join(map(str, found.ravel()))


def value(model: ir.Model, name: str = "y") -> ir.Value:
    """A node's output by its name."""
    return next(v for node in model.graph for v in node.outputs if v.name == name)


def assert_onnxruntime_agrees(model: ir.Model, bindings: Mapping[str, int], limit: int = 4) -> int:
    """Assert that dtype, shape and elements of every value are what ONNX Runtime computes.

    Shapes with unknowns count for their rank.

    Args:
        model: An inferred model.
        bindings: The sizes to run it at.
        limit: Integer inputs are below this, so that they may be indices.

    Returns:
        The number of values compared.
    """
    values = [v for node in model.graph for v in node.outputs if v.name]
    names = {v.name: v for v in values}
    twin = model.clone()
    inner = {v.name: v for node in twin.graph for v in node.outputs}
    twin.graph.outputs[:] = [inner[name] for name in names]
    for output in twin.graph.outputs:
        output.shape = None  # what inference says is judged, not told
    rng = np.random.default_rng(0)
    feeds = {
        given.name: _feed(given, tuple(evaluate(d, bindings) for d in dims(given)), rng, limit)
        for given in model.graph.inputs
    }
    for name, array in run(twin, feeds).items():
        _compare(names[name], array, bindings)
    return len(values)


def _feed(
    given: ir.Value, sizes: tuple[int, ...], rng: np.random.Generator, limit: int
) -> np.ndarray:
    if given.dtype == ir.DataType.BOOL:
        return rng.integers(0, 2, sizes).astype(bool)
    if given.dtype.is_integer():
        return rng.integers(0, limit, sizes).astype(given.dtype.numpy())
    return rng.standard_normal(sizes).astype(given.dtype.numpy())


def _compare(value: ir.Value, array: np.ndarray, bindings: Mapping[str, int]) -> None:
    found = dims(value)
    assert value.dtype is not None, value.name
    assert value.dtype.numpy() == array.dtype, value.name
    assert found is not None, value.name
    assert len(found) == array.ndim, f"{value.name}: {found} is {array.shape}"
    for dim, size in zip(found, array.shape, strict=True):
        if symbols(dim) <= set(bindings):
            assert evaluate(dim, bindings) == size, f"{value.name}: {found} is {array.shape}"
    elements = known(value)
    if elements is not None:
        numbers = [evaluate(element, bindings) for element in elements.ravel()]
        np.testing.assert_array_equal(
            np.array(numbers).reshape(elements.shape), array, err_msg=str(value.name)
        )
