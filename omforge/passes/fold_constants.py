"""Fold what depends on nothing but constants, and integers that shape inference already knows.

onnx-ir has no folder and onnxscript's evaluates node by node; here every constant node is found
first and one ONNX Runtime session computes them all, so that the numbers are those that the model
itself would see.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from omforge import ir
from omforge.ir.edit import add_initializer, remove_dead, replace_value, value_names
from omforge.ir.evaluate import Cutout, EvaluationError
from omforge.ir.infer import infer_model
from omforge.ir.values import constant_tensor, dims, known, known_ints
from omforge.rewriting.base import Pass
from omforge.rewriting.events import record

_NOT_FOLDED = {
    # Another number in each run.
    "Bernoulli",
    "Dropout",
    "Multinomial",
    "RandomNormal",
    "RandomNormalLike",
    "RandomUniform",
    "RandomUniformLike",
    # The float tensor behind it is what quantising saved.
    "DequantizeLinear",
}


@dataclass(frozen=True)
class FoldConstants(Pass):
    """Turn constant nodes into initializers.

    Attributes:
        limit: The most elements that a folded tensor may have. Larger results (a transposed
            embedding, say) stay computed, so that no weight is stored twice.
    """

    name: ClassVar[str] = "fold-constants"
    limit: int = 1 << 16

    def run(self, model: ir.Model) -> int:
        """Fold; the number of values that became initializers."""
        infer_model(model)
        lifted = _lift(model)
        taken = value_names(model.graph)
        folded = 0
        while count := self._fold_known(model, taken) + self._fold_computed(model, taken):
            folded += count
            if all(node.op_type != "NonZero" for node in model.graph):
                break
            infer_model(model)  # a NonZero that is a constant now gives what is behind it a size
        if lifted or folded:
            remove_dead(model)
        return lifted + folded

    def _fold_known(self, model: ir.Model, taken: set[str]) -> int:
        """Shape arithmetic whose result holds no symbol."""
        count = 0
        for node in list(model.graph):
            for output in node.outputs:
                if not output.uses() or constant_tensor(output) is not None:
                    continue
                array = _known_array(output)
                if array is not None:
                    count += _store(model.graph, output, array, taken) is not None
        return count

    def _fold_computed(self, model: ir.Model, taken: set[str]) -> int:
        """Nodes whose inputs are all constant, directly or through other such nodes."""
        constant: set[ir.Value] = set()
        for node in model.graph:
            if self._is_constant(node, constant):
                constant.update(node.outputs)
        wanted = [
            output
            for node in model.graph
            for output in node.outputs
            if output in constant
            and not output.is_graph_output()  # a graph computes its outputs
            and any(user.outputs[0] not in constant for user in output.consumers())
        ]
        count = 0
        stored: dict[tuple[object, ...], ir.Value] = {}
        for value, array in self._compute(model, wanted):
            content = (array.dtype, array.shape, sha256(array.tobytes()).digest())
            same = stored.get(content)  # what was computed twice is still one value to the matchers
            if same is not None:
                count += replace_value(value, same)
            elif made := _store(model.graph, value, array, taken):
                stored[content] = made
                count += 1
        return count

    def _compute(
        self, model: ir.Model, wanted: Sequence[ir.Value]
    ) -> list[tuple[ir.Value, npt.NDArray[Any]]]:
        """All in one session; each on its own where that fails, so that one does not stop all."""
        if not wanted:
            return []
        try:
            arrays = Cutout(wanted, (), model.opset_imports[""]).run({}, {})
        except EvaluationError as error:
            if len(wanted) == 1:
                record(model, self.name, wanted[0], str(error))
                return []
            return [pair for value in wanted for pair in self._compute(model, [value])]
        return list(zip(wanted, arrays, strict=True))

    def _is_constant(self, node: ir.Node, constant: set[ir.Value]) -> bool:
        if node.domain != "" or node.op_type in _NOT_FOLDED or not node.inputs:
            return False
        kinds = {attribute.type for attribute in node.attributes.values()}
        if kinds & {ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS}:
            return False
        given = [value for value in node.inputs if value is not None]
        if any(value not in constant and constant_tensor(value) is None for value in given):
            return False
        if node.op_type != "NonZero":  # which gives at most the rank times its input
            given += node.outputs
        return all(_elements(value) <= self.limit for value in given)


def _known_array(value: ir.Value) -> npt.NDArray[Any] | None:
    numbers, array = known_ints(value), known(value)
    if numbers is None or array is None or value.dtype is None:
        return None
    kind = value.dtype.numpy()
    if kind.kind in "iu":
        limits = np.iinfo(kind)
        if any(not limits.min <= number <= limits.max for number in numbers):
            return None  # inference counts without end, the model wraps around
    return np.array(numbers, dtype=kind).reshape(array.shape)


def _elements(value: ir.Value) -> float:
    shape = dims(value)
    if shape is None:
        return math.inf
    return math.prod(dim if isinstance(dim, int) else math.inf for dim in shape)


def _store(
    graph: ir.Graph, value: ir.Value, array: npt.NDArray[Any], taken: set[str]
) -> ir.Value | None:
    """The initializer that replaces a value; None for an output, which is computed."""
    if value.is_graph_output():
        return None
    stored = add_initializer(graph, f"{value.name}_folded", array, taken)
    replace_value(value, stored)
    return stored


def _lift(model: ir.Model) -> int:
    """Constant nodes as initializers.

    ATC's plugin (hicann/ge:parser/parser/onnx/onnx_constant_parser.cc) reads a Constant's `value`,
    and nothing of its other spellings.
    """
    before = _initializers(model)
    ir.common_passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    return _initializers(model) - before


def _initializers(model: ir.Model) -> int:
    return sum(len(graph.initializers) for graph in ir.all_graphs(model))
