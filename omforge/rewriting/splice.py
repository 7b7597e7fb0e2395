"""Putting recorded nodes into a graph in place of others: the only code that edits graphs.

A splice is a transaction. It happens whole, or raises `NoMatch` and leaves the graph as it was.
"""

import ast
import os.path
from collections import deque
from collections.abc import Collection, Iterable, Sequence
from typing import cast

from omforge import ir
from omforge.ir.infer import infer_nodes
from omforge.ir.values import dims
from omforge.rewriting.builder import Builder
from omforge.rewriting.match import NoMatch

REWRITTEN_BY = "rewritten_by"
_PATH_LISTS = ("pkg.torch.onnx.name_scopes", "pkg.torch.onnx.class_hierarchy")
_NAMESPACE = "namespace"


class Names:
    """The names that a model has, so that new ones are unique and the same in every run."""

    def __init__(self, model: ir.Model) -> None:
        self._taken: set[str] = set()
        for graph in ir.all_graphs(model):
            self._taken.update(value.name for value in graph.inputs if value.name)
            self._taken.update(graph.initializers)
            for node in graph:
                self._taken.add(node.name or "")
                self._taken.update(value.name for value in node.outputs if value.name)

    def unique(self, wanted: str) -> str:
        """Return `wanted`, with a number after it if it is taken, and take it."""
        name, count = wanted, 0
        while name in self._taken:
            count += 1
            name = f"{wanted}_{count}"
        self._taken.add(name)
        return name


def splice(
    op: Builder,
    old: Sequence[ir.Value],
    new: Sequence[ir.Value],
    *,
    by: str,
    matched: Sequence[ir.Node] = (),
    names: Names | None = None,
) -> None:
    """Replace values with what a builder recorded.

    Dtype, shape and name of each old value are carried over, so that graph outputs keep their
    names. Nodes and initializers that nothing uses afterwards are removed.

    Args:
        op: The builder, with the new nodes.
        old: The values to replace, made by nodes of the builder's graph.
        new: What replaces them, one each: outputs of new nodes, or values that exist.
        by: The pass's name, kept in the metadata of new nodes.
        matched: All nodes that the new ones stand for; they give the layer path. The makers of
            `old` by default.
        names: The model's names, if many splices share them.

    Raises:
        NoMatch: A new value differs in dtype or shape, or the splice would close a cycle. The
            builder still holds its nodes, for the caller to discard.
    """
    if len(old) != len(new):
        raise ValueError(f"{by}: {len(new)} values replace {len(old)}")
    roots = list(dict.fromkeys(_maker(value) for value in old))
    matched = matched or roots
    _check_acyclic(op, old, matched)
    _place(op, roots[0], names)
    try:
        for before, after in zip(old, new, strict=True):
            _check_type(before, after)
    except NoMatch:
        op.graph.remove(op.nodes)
        raise
    _adopt(op, matched, by)
    for before, after in zip(old, new, strict=True):
        _replace(op, before, after)
    _remove_dead(op.graph, [*roots, *matched, *op.nodes])
    _remove_dead_constants(op.graph, op.constants.values())
    if len(roots) > 1:
        # What the later roots need may stand after the first one.
        op.graph.sort()


def insert(
    op: Builder,
    before: ir.Node,
    *,
    by: str,
    matched: Sequence[ir.Node] = (),
    names: Names | None = None,
) -> None:
    """Put what a builder recorded before a node, where nothing uses it yet.

    Args:
        op: The builder, with the new nodes.
        before: A node of the builder's graph that comes after all inputs of the new ones.
        by: The pass's name, kept in the metadata of new nodes.
        matched: The nodes that give the layer path, `before` by default.
        names: The model's names, if many insertions share them.
    """
    _place(op, before, names)
    _adopt(op, matched or [before], by)


def withdraw(graph: ir.Graph, kept: Collection[ir.Node]) -> None:
    """Take out again what was inserted and then not used.

    Args:
        graph: The graph.
        kept: The nodes that it had before.
    """
    _remove_dead(graph, [node for node in reversed(graph) if node not in kept])


def _place(op: Builder, before: ir.Node, names: Names | None) -> None:
    _name(op, before, names or Names(op.model))
    op.graph.insert_before(before, op.nodes)
    infer_nodes(op.nodes)


def _adopt(op: Builder, matched: Sequence[ir.Node], by: str) -> None:
    for value in op.constants.values():
        op.graph.register_initializer(value)
    for node in op.nodes:
        op.model.opset_imports.setdefault(node.domain, 1)
    _stamp(op.nodes, matched, by)


def _maker(value: ir.Value) -> ir.Node:
    node = value.producer()
    assert node is not None, f"{value.name} is not made by a node"
    return node


def _check_acyclic(op: Builder, old: Sequence[ir.Value], matched: Sequence[ir.Node]) -> None:
    """With several outputs, no input of the new nodes may depend on a use of one of them."""
    if len(old) == 1:
        return
    own, replaced = set(op.nodes), set(old)
    inside = set(matched)
    stack = [
        v for node in op.nodes for v in node.inputs if v is not None and v.producer() not in own
    ]
    seen: set[ir.Value] = set()
    while stack:
        value = stack.pop()
        if value in seen:
            continue
        seen.add(value)
        node = value.producer()
        if node is None:
            continue
        for given in node.inputs:
            if given in replaced and node not in inside:
                raise NoMatch(f"{value.name} depends on {given.name}, and would feed it", node)
            if given is not None:
                stack.append(given)


def _name(op: Builder, root: ir.Node, names: Names) -> None:
    """Name new nodes after the root: its module's path where the name is one, itself otherwise."""
    base = os.path.dirname(root.name or "") or root.name or "node"
    for node in op.nodes:
        node.name = names.unique(f"{base}/{node.op_type}")
        for index, value in enumerate(node.outputs):
            value.name = names.unique(f"{node.name}_output_{index}")


def _check_type(before: ir.Value, after: ir.Value) -> None:
    if None not in (before.dtype, after.dtype) and before.dtype != after.dtype:
        raise NoMatch(f"the result would be {after.dtype}, not {before.dtype}", before)
    old, new = dims(before), dims(after)
    if old is None or new is None:
        return
    # Two symbols may be one size under two names; two numbers are not.
    differ = any(
        a != b for a, b in zip(old, new, strict=False) if isinstance(a, int) and isinstance(b, int)
    )
    if differ or len(old) != len(new):
        shown = [f"[{', '.join(map(str, shape))}]" for shape in (new, old)]
        raise NoMatch(f"the result would be {shown[0]}, not {shown[1]}", before)


def _replace(op: Builder, before: ir.Value, after: ir.Value) -> None:
    name = before.name
    if before.is_graph_output() and not _may_rename(op, after):
        identity = ir.Node("", "Identity", [after], name=f"{name}/Identity")
        op.graph.insert_before(_maker(before), identity)
        op.nodes.append(identity)
        after = identity.outputs[0]
    rename = _may_rename(op, after)
    after.type = before.type or after.type
    after.shape = before.shape or after.shape
    before.replace_all_uses_with(after, replace_graph_outputs=True)
    if rename:
        before.name = f"{name}/replaced"
        after.name = name


def _may_rename(op: Builder, value: ir.Value) -> bool:
    """Whether a value is new: others are known to somebody by their names."""
    return value.producer() in op.nodes and not value.is_graph_output()


def _remove_dead(graph: ir.Graph, nodes: Iterable[ir.Node]) -> None:
    """Remove those of `nodes` that nothing uses, then what only they used."""
    queue = deque(nodes)
    while queue:
        node = queue.popleft()
        if node.graph is not graph or any(v.uses() or v.is_graph_output() for v in node.outputs):
            continue
        inputs = [value for value in node.inputs if value is not None]
        graph.remove(node, safe=True)
        queue.extend(node for value in inputs if (node := value.producer()) is not None)
        _remove_dead_constants(graph, inputs)


def _remove_dead_constants(graph: ir.Graph, values: Iterable[ir.Value]) -> None:
    for value in values:
        if not value.is_initializer() or value.graph is not graph or value.uses():
            continue
        if not value.is_graph_input() and not value.is_graph_output():
            del graph.initializers[str(value.name)]


# --- provenance -------------------------------------------------------------------------------


def _stamp(nodes: Sequence[ir.Node], matched: Sequence[ir.Node], by: str) -> None:
    """Write the pass's name, and the part of the exporter's layer path that all matched share."""
    properties = _common_path(matched)
    history = [node.metadata_props.get(REWRITTEN_BY, "") for node in matched]
    passes = [name for entry in history for name in entry.split(",") if name and name != by]
    properties[REWRITTEN_BY] = ",".join(dict.fromkeys([*passes, by]))
    for node in nodes:
        node.metadata_props.update(properties)


def _common_path(nodes: Sequence[ir.Node]) -> dict[str, str]:
    """Merge what dynamo exporters write: paths, from the outermost to the traced operation."""
    found: dict[str, str] = {}
    for key in (*_PATH_LISTS, _NAMESPACE):
        texts = [node.metadata_props[key] for node in nodes if key in node.metadata_props]
        paths = [text.split("/") if key == _NAMESPACE else _parse(text) for text in texts]
        if paths and all(paths):
            # The last entry is the operation itself: the root's stands for all of them.
            shared = [*_common_prefix([path[:-1] for path in paths]), paths[0][-1]]
            found[key] = "/".join(shared) if key == _NAMESPACE else repr(shared)
    return found


def _parse(text: str) -> list[str]:
    try:
        parsed = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return []  # metadata is free text: another tool may have put anything there
    return [str(part) for part in cast("list[object]", parsed)] if isinstance(parsed, list) else []


def _common_prefix(lists: Sequence[list[str]]) -> list[str]:
    shared: list[str] = []
    for parts in zip(*lists, strict=False):
        if len(set(parts)) > 1:
            break
        shared.append(parts[0])
    return shared
