"""Near misses: graphs one change away from one that a pass rewrites.

A matcher that is too loose rewrites them too, and gives wrong numbers without a word. So every
attribute, constant, operand and edge of a graph is changed in turn, and each mutant must be left
alone or keep its numbers.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import onnx

from omforge import ir
from omforge.ir import numerics
from omforge.ir.infer import infer_model
from omforge.rewriting import schema
from omforge.rewriting.base import Pass
from omforge.testing.assertions import assert_same_numbers
from omforge.testing.feeds import example_feeds

SMALL = 16
"""Constants of at most so many elements are changed element by element."""

Edit = Callable[[ir.Model], None]


@dataclass(frozen=True)
class Mutant:
    """A valid model, and what was changed in it."""

    change: str
    model: ir.Model


def assert_near_misses_are_safe(
    step: Pass, text: str, *, allowed: numerics.Tolerance | None = None
) -> int:
    """Assert that each mutant of a model is left alone or keeps its numbers.

    Args:
        step: The pass.
        text: ONNX text that the pass rewrites.
        allowed: The tolerance, instead of the table's for each output's dtype.

    Returns:
        The number of mutants that were left alone, never 0.
    """
    left_alone = 0
    for mutant in mutants(ir.from_onnx_text(text)):
        original = mutant.model.clone()
        if not step.run(mutant.model):
            left_alone += 1
            continue
        if _refusal(original) is not None:
            continue  # ONNX Runtime is stricter than the checker
        try:
            assert _refusal(mutant.model) is None, _refusal(mutant.model)
            assert_same_numbers(original, mutant.model, allowed=allowed)
        except AssertionError as error:
            raise AssertionError(f"{step} rewrote a near miss, {mutant.change}: {error}") from None
    assert left_alone, f"{step} rewrote every mutant: does it rewrite anything that it should not?"
    return left_alone


def mutants(model: ir.Model) -> Iterator[Mutant]:
    """Yield every valid model that is one change away from `model`."""
    for change, edit in edits(model):
        copy = model.clone()
        edit(copy)
        if _is_valid(copy):
            infer_model(copy)
            yield Mutant(change, copy)


def _is_valid(model: ir.Model) -> bool:
    checker: Any = onnx.checker  # its stub is incomplete
    try:
        checker.check_model(ir.to_proto(model), full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError, ValueError):
        return False
    return True


def _refusal(model: ir.Model) -> str | None:
    """Why ONNX Runtime does not run a model, None if it does."""
    try:
        numerics.run(model, example_feeds(model))
    except Exception as error:  # onnxruntime's own errors share no base class
        if type(error).__module__.startswith("onnxruntime"):
            return str(error)
        raise
    return None


def edits(model: ir.Model) -> Iterator[tuple[str, Edit]]:
    """Yield every single change of a model, by words: `edit(model.clone())` makes it."""
    for index, node in enumerate(model.graph):
        if node.op_type == "Constant":
            yield from _constant_edits(
                f"{node.outputs[0].name}", node.attributes["value"].as_tensor(), index
            )
            continue
        yield from _attribute_edits(node, index, model)
        yield from _operand_edits(node, index, model)
        yield from _edge_edits(node, index)
    for name, value in model.graph.initializers.items():
        if value.const_value is not None:
            yield from _constant_edits(name, value.const_value, name)


# --- attributes -------------------------------------------------------------------------------


# In casts to other types, ONNX Runtime returns memory as it finds it if these are not the default.
_FLOAT8_ONLY = {("Cast", "saturate"), ("Cast", "round_mode")}


def _attribute_edits(node: ir.Node, index: int, model: ir.Model) -> Iterator[tuple[str, Edit]]:
    defaults = schema.defaults(node.op_type, node.domain, model.opset_imports.get(node.domain, 1))
    given = {name: attribute.value for name, attribute in node.attributes.items()}
    for name, value in {**defaults, **given}.items():
        if (node.op_type, name) in _FLOAT8_ONLY:
            continue
        for other in _others(value):
            yield f"{node.op_type}.{name}={other}", _set_attribute(index, name, other)


def _others(value: Any) -> list[Any]:
    """Values near to one."""
    if isinstance(value, float):
        return [value * 2 + 1, value / 2]
    if isinstance(value, int):
        return [int(value) + 1, int(value) - 1]
    if isinstance(value, str):
        return [{"none": "tanh", "tanh": "none"}.get(value, value.swapcase())]
    if isinstance(value, tuple):
        elements = cast("tuple[Any, ...]", value)
        return [
            (*elements[:at], other, *elements[at + 1 :])
            for at, element in enumerate(elements)
            for other in _others(element)
        ]
    return []


def _set_attribute(index: int, name: str, value: Any) -> Edit:
    def edit(model: ir.Model) -> None:
        model.graph[index].attributes[name] = ir.convenience.convert_attribute(name, value)

    return edit


# --- constants --------------------------------------------------------------------------------


def _constant_edits(
    name: str, tensor: ir.TensorProtocol, where: int | str
) -> Iterator[tuple[str, Edit]]:
    if tensor.size > SMALL or tensor.dtype is ir.DataType.STRING:
        return
    array = tensor.numpy()
    for at in range(array.size):
        element = array.flat[at]
        with np.errstate(over="ignore"):  # the lowest number, which masks are made of
            others = (element * 2 + 1, element - 1, element * 0)
        for other in others:
            changed = array.copy()
            changed.flat[at] = other
            if not np.array_equal(changed, array):
                yield f"{name}[{at}]={changed.flat[at]}", _set_constant(where, changed)


def _set_constant(where: int | str, array: Any) -> Edit:
    def edit(model: ir.Model) -> None:
        tensor = ir.tensor(array)
        if isinstance(where, int):
            model.graph[where].attributes["value"] = ir.AttrTensor("value", tensor)
        else:
            tensor.name = where
            model.graph.initializers[where].const_value = tensor

    return edit


# --- operands and edges -----------------------------------------------------------------------


def _operand_edits(node: ir.Node, index: int, model: ir.Model) -> Iterator[tuple[str, Edit]]:
    if len(node.inputs) == 2:
        yield f"{node.op_type} of {node.outputs[0].name} swapped", _swap(index)
    for position, value in enumerate(node.inputs):
        for other, given in enumerate(model.graph.inputs):
            if value is not None and value is not given:
                change = f"input {position} of {node.op_type} is {given.name}"
                yield change, _use_graph_input(index, position, other)


def _swap(index: int) -> Edit:
    def edit(model: ir.Model) -> None:
        node = model.graph[index]
        first, second = node.inputs
        node.replace_input_with(0, second)
        node.replace_input_with(1, first)

    return edit


def _use_graph_input(index: int, position: int, other: int) -> Edit:
    def edit(model: ir.Model) -> None:
        model.graph[index].replace_input_with(position, model.graph.inputs[other])

    return edit


def _edge_edits(node: ir.Node, index: int) -> Iterator[tuple[str, Edit]]:
    if any(value.is_graph_output() for value in node.outputs):
        return
    for position, value in enumerate(node.inputs):
        if value is not None:
            yield f"{node.op_type} dropped for its input {position}", _drop(index, position)
    yield f"{node.outputs[0].name} is an output too", _expose(index)


def _drop(index: int, position: int) -> Edit:
    def edit(model: ir.Model) -> None:
        node = model.graph[index]
        value = node.inputs[position]
        assert value is not None
        node.outputs[0].replace_all_uses_with(value)

    return edit


def _expose(index: int) -> Edit:
    def edit(model: ir.Model) -> None:
        infer_model(model)  # an output needs a type
        model.graph.outputs.append(model.graph[index].outputs[0])

    return edit
