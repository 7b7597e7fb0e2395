"""Put the branch of an If that is taken in the If's place.

Before (Optimum's decoder_model_merged.onnx)::

    logits, presents = If<then_branch=with past, else_branch=without>(use_cache_branch)

After::

    logits, presents = the nodes of the branch with a past

A condition may be a constant, or a boolean input: a flag that says whether there is a past. What a
bundle needs is the branch that reads the cache, which is empty at first.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from omforge import ir
from omforge.ir.edit import all_values, remove_dead, replace_value
from omforge.ir.values import constant
from omforge.rewriting.base import Pass
from omforge.rewriting.events import record

_KEY = "omforge.cache_flag"
_BRANCHES = ("then_branch", "else_branch")
_MOVERS = ("Identity", "Squeeze", "Unsqueeze", "Reshape", "Cast")


@dataclass(frozen=True)
class CacheFlag:
    """A boolean input that said whether there is a past.

    Attributes:
        input: Its name.
        cached: Its value where there is one.
    """

    input: str
    cached: bool


def cache_flag(model: ir.Model) -> CacheFlag | None:
    """The flag that a model had, kept in memory as events are."""
    kept: Any = model.meta
    return kept.get(_KEY)


@dataclass(frozen=True)
class TakeBranches(Pass):
    """Replace an If by the branch that its constant, or a past, chooses.

    Attributes:
        cached: Take the branch that reads the cache; otherwise the other one.
    """

    name: ClassVar[str] = "take-branches"
    changes_interface: ClassVar[bool] = True
    cached: bool = True

    def run(self, model: ir.Model) -> int:
        """Replace; the number of Ifs that are gone. One that stays is an event."""
        count = 0
        left: set[ir.Node] = set()
        while (node := _next(model.graph, left)) is not None:
            taken = self._choose(model, node)
            if taken is None:
                left.add(node)
                record(model, self.name, node, "what it asks is neither constant nor an input")
                continue
            for name in _BRANCHES:
                if (branch := node.attributes[name].as_graph()) is not taken:
                    _detach(branch)
            _inline(model.graph, node, taken)
            count += 1
        if count:
            remove_dead(model)
            self._drop_inputs(model)
        return count

    def _drop_inputs(self, model: ir.Model) -> None:
        """The flag, and the cache of a branch that was not taken, are asked for no more."""
        flag = cache_flag(model)
        if flag is None:
            return
        for value in list(model.graph.inputs):
            gone = value.name == flag.input or (not self.cached and _is_float(value))
            if gone and not value.uses():
                model.graph.inputs.remove(value)

    def _choose(self, model: ir.Model, node: ir.Node) -> ir.Graph | None:
        then, other = (node.attributes[name].as_graph() for name in _BRANCHES)
        condition = node.inputs[0]
        fixed = constant(condition)
        if fixed is not None and fixed.size == 1:
            return then if fixed.ravel()[0] else other
        given = _moved_input(condition)
        if given is None or given.dtype != ir.DataType.BOOL:
            return None
        caches = {v for v in model.graph.inputs if _is_float(v)}
        reads = [len(caches & _read(branch)) for branch in (then, other)]
        if reads[0] == reads[1]:
            return None
        cached = reads[0] > reads[1]
        model.meta[_KEY] = CacheFlag(str(given.name), cached)
        return then if cached == self.cached else other


def _next(graph: ir.Graph, left: set[ir.Node]) -> ir.Node | None:
    return next((n for n in graph if n.op_type == "If" and n.domain == "" and n not in left), None)


def _moved_input(value: ir.Value | None) -> ir.Value | None:
    while value is not None and not value.is_graph_input():
        node = value.producer()
        value = node.inputs[0] if node is not None and node.op_type in _MOVERS else None
    return None if value is None or value.is_initializer() else value


def _is_float(value: ir.Value) -> bool:
    return value.dtype is not None and value.dtype.is_floating_point()


def _read(branch: ir.Graph) -> set[ir.Value]:
    """What the nodes of a branch, and of graphs in them, read."""
    return {v for node in branch.all_nodes() for v in node.inputs if v is not None}


def _detach(branch: ir.Graph) -> None:
    """Take the nodes of a branch off the users of what is outside."""
    for node in list(branch.all_nodes()):
        for index in range(len(node.inputs)):
            node.replace_input_with(index, None)


def _inline(graph: ir.Graph, node: ir.Node, branch: ir.Graph) -> None:
    taken = {value.name for value in all_values(graph)} | {each.name for each in graph}
    results = list(branch.outputs)
    branch.outputs.clear()
    for name, value in list(branch.initializers.items()):
        del branch.initializers[name]
        value.name = _fresh(name, taken)
        graph.register_initializer(value)
    nodes = list(branch)
    branch.remove(nodes)
    for each in nodes:
        each.name = _fresh(each.name or "", taken) if each.name else each.name
        for output in each.outputs:
            if output.name:
                output.name = _fresh(output.name, taken)
    graph.insert_before(node, nodes)
    for old, new in zip(node.outputs, results, strict=True):
        # An output of its own: two of the branch's may be one value, or one of the graph around it.
        identity = ir.Node("", "Identity", [new], num_outputs=1)
        identity.name = _fresh(f"{old.name}/Identity", taken)
        identity.outputs[0].name = _fresh(f"{old.name}_taken", taken)
        identity.outputs[0].type, identity.outputs[0].shape = old.type, old.shape
        graph.insert_before(node, identity)
        replace_value(old, identity.outputs[0])
    graph.remove(node, safe=True)


def _fresh(stem: str, taken: set[str | None]) -> str:
    name, count = stem, 0
    while name in taken:
        count += 1
        name = f"{stem}_{count}"
    taken.add(name)
    return name
