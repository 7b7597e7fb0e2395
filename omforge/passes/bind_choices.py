"""Put the branch that all texts of a context take in place of a choice by length.

Before, with the same condition for any text of up to `context` tokens::

    inv_freq = Where(Greater(longest, 4096), long_factors, short_factors)

After::

    inv_freq = short_factors

An `If` alike: the nodes of its branch come into the graph. Whether a context crosses a choice is
another question (`context_bounds`): what depends on more than the length is left alone here.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from omforge import ir
from omforge.ir.edit import fresh_name, remove_dead, replace_value, value_names
from omforge.ir.evaluate import Cutout, EvaluationError
from omforge.ir.infer import infer_model
from omforge.ir.values import constant_tensor, dims, known_ints
from omforge.passes.fold_constants import FoldConstants
from omforge.recognition.attention.masks import Prober
from omforge.recognition.interface import find_interface
from omforge.recognition.lengths.choices import is_choice
from omforge.recognition.lengths.texts import Ruler, moving
from omforge.rewriting.base import Pass
from omforge.rewriting.events import record


@dataclass(frozen=True)
class BindChoices(Pass):
    """Bind what a graph chooses by length to what it chooses for texts of up to `context` tokens.

    Attributes:
        context: Tokens of the longest text.
    """

    name: ClassVar[str] = "bind-choices"
    context: int

    def run(self, model: ir.Model) -> int:
        """Bind; the number of choices that are gone, each of them an event.

        Raises:
            InputError: No length is given.
        """
        if self.context < 1:
            raise ir.InputError(f"a context of {self.context} tokens", "a text has at least 1")
        if not any(is_choice(node) for node in model.graph):
            return 0
        infer_model(model)
        try:
            interface = find_interface(model)
        except ir.InputError:
            return 0
        ruler = Ruler(Prober(model, interface), interface)
        live = moving(model)
        count = 0
        for node in list(model.graph):
            taken = self._taken(node, live, ruler) if is_choice(node) else None
            if taken is None:
                continue
            branch = _bind_if(model, node, taken) if node.op_type == "If" else _bind(node, taken)
            if branch:
                reason = f"a text of up to {self.context} tokens always takes {branch}"
                record(model, self.name, node, f"{reason}, which stands in its place", done=True)
                count += 1
        if count:
            remove_dead(model)
            infer_model(model)
            FoldConstants().run(model)
        return count

    def _taken(self, node: ir.Node, live: set[ir.Value], ruler: Ruler) -> bool | None:
        """What the condition is for every text; None if it is not the same for all, or unknown."""
        condition = node.inputs[0]
        if condition is None or condition in live or constant_tensor(condition) is not None:
            return None
        seen: set[bool] = set()
        try:
            part = ruler.cut([condition])
            for length, new, padding in self._texts(part):
                (array,) = ruler.run(part, length, new, padding)
                seen |= set(array.astype(np.bool_).ravel().tolist())
        except EvaluationError:
            return None
        return seen.pop() if len(seen) == 1 else None

    def _texts(self, part: Cutout) -> Iterator[tuple[int, int, int]]:
        """Lengths around all that the condition may compare with; new tokens; padding of a row."""
        named = {n for node in part.nodes for v in node.inputs for n in known_ints(v) or ()}
        lengths = {n + near for n in named for near in (-1, 0, 1)}
        lengths |= {1 << power for power in range(self.context.bit_length())}
        for length in sorted({*lengths, self.context}):
            if 1 <= length <= self.context:
                for new in {1, min(3, length), length}:
                    yield length, new, 0
                if length > 1:
                    yield length, 1, length // 2


def _bind(node: ir.Node, taken: bool) -> str:
    """Let the readers of a Where read the branch itself; what it is called, "" if it is smaller."""
    branch, output = node.inputs[1 if taken else 2], node.outputs[0]
    if branch is None or dims(branch) is None or dims(branch) != dims(output):
        return ""
    return str(branch.name) if replace_value(output, branch) else ""


def _bind_if(model: ir.Model, node: ir.Node, taken: bool) -> str:
    """Put the nodes of a branch in front of the If, and its outputs in place of the If's."""
    name = "then_branch" if taken else "else_branch"
    graph, branch = model.graph, node.attributes[name].as_graph()
    if any(output.is_graph_output() for output in node.outputs):
        return ""
    names = value_names(graph) - value_names(branch)
    results = list(branch.outputs)
    branch.outputs.clear()
    for value in list(branch.initializers.values()):
        del branch.initializers[str(value.name)]
        value.name = fresh_name(graph, str(value.name), names)
        graph.register_initializer(value)
    inner = list(branch)
    branch.remove(inner)
    for value in (output for each in inner for output in each.outputs if output.name):
        value.name = fresh_name(graph, str(value.name), names)
    graph.insert_before(node, inner)
    for output, result in zip(node.outputs, results, strict=True):
        output.replace_all_uses_with(result)
    return name
