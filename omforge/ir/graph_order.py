"""The order of a graph's nodes, settled on reading: what no order exists for is refused there.

ONNX wants nodes above their readers. ONNX Runtime and ATC link them by name and take any order, so
files in another order exist, and are sorted. A graph with a cycle has no order, and everything that
walks it would walk for ever. So would inlining functions that call themselves, and almost so where
each calls the next one twice.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import onnx

from omforge.ir.errors import InputError

MOST_NODES = 1 << 18
"""Nodes that a model may have once its functions are inlined; a layer has some tens of them."""

MOST_NESTED = 100
"""Functions that may call each other in a chain."""

Body = onnx.GraphProto | onnx.FunctionProto
Key = tuple[str, str, str]


def settle(file: Path, message: onnx.ModelProto) -> None:
    """Sort the nodes of all graphs where they are out of order; in place.

    Raises:
        InputError: Nodes depend on each other in a circle; functions do; or the functions would
            become more than `MOST_NODES` nodes.
    """
    for body in (message.graph, *message.functions):
        _settle(file, body)
    _bound_functions(file, message)


def label(node: onnx.NodeProto) -> str:
    """Return the words for a node that is not loaded yet."""
    name = node.name or next((f"-> {output}" for output in node.output if output), "")
    return f"{node.op_type} {name}".strip()


def inner_graphs(node: onnx.NodeProto) -> Iterator[onnx.GraphProto]:
    """Yield the graphs in a node's attributes."""
    for attribute in node.attribute:
        if attribute.type == onnx.AttributeProto.GRAPH:
            yield attribute.g
        elif attribute.type == onnx.AttributeProto.GRAPHS:
            yield from attribute.graphs


# --- nodes ----------------------------------------------------------------------------------------


def _settle(file: Path, body: Body) -> set[str]:
    """Sort one body and those inside; the names that it takes from around it."""
    reads: list[set[str]] = []
    makers: dict[str, int] = {}
    for index, node in enumerate(body.node):
        taken = set(node.input)
        for graph in inner_graphs(node):
            taken |= _settle(file, graph)
        reads.append(taken)
        for name in node.output:
            makers.setdefault(name, index)
    makers.pop("", None)
    needs = [{makers[name] for name in taken if name in makers} for taken in reads]
    if any(max(before, default=-1) >= index for index, before in enumerate(needs)):
        order = _sorted(file, body.node, needs)
        nodes = [body.node[index] for index in order]
        copies = [type(node).FromString(node.SerializeToString()) for node in nodes]
        del body.node[:]
        body.node.extend(copies)
    free = set[str]().union(*reads) - makers.keys()
    if isinstance(body, onnx.GraphProto):
        free |= {value.name for value in body.output} - makers.keys()
        free -= {value.name for value in body.input} | {item.name for item in body.initializer}
        return free
    return free - set(body.input)


def _sorted(file: Path, nodes: Sequence[onnx.NodeProto], needs: Sequence[set[int]]) -> list[int]:
    """Each node behind those that it needs; where there is a choice, as the file has them."""
    users: list[list[int]] = [[] for _ in nodes]
    missing = [len(before) for before in needs]
    for index, before in enumerate(needs):
        for other in before:
            users[other].append(index)
    ready = [index for index, count in enumerate(missing) if not count]
    order: list[int] = []
    while ready:
        index = heapq.heappop(ready)
        order.append(index)
        for user in users[index]:
            missing[user] -= 1
            if not missing[user]:
                heapq.heappush(ready, user)
    if len(order) < len(nodes):
        raise _cycle(file, nodes, needs, set(range(len(nodes))) - set(order))
    return order


def _cycle(
    file: Path, nodes: Sequence[onnx.NodeProto], needs: Sequence[set[int]], left: set[int]
) -> InputError:
    """The error for nodes of which each needs another one."""
    at, path = min(left), list[int]()
    while at not in path:
        path.append(at)
        at = min(needs[at] & left)
    path = path[path.index(at) :]
    if len(path) == 1:
        why = f"{label(nodes[at])} reads its own output"
    else:
        around = " <- ".join(label(nodes[index]) for index in path[:6])
        more = f" and {len(path) - 6} more" if len(path) > 6 else ""
        why = f"{len(path)} nodes read each other in a circle: {around}{more}"
    return InputError(
        f"{file} has nodes that need each other", why, "No order computes them: export it again"
    )


# --- functions ------------------------------------------------------------------------------------


def _bound_functions(file: Path, message: onnx.ModelProto) -> None:
    if not message.functions:
        return
    calls: dict[Key, Counter[Key | None]] = {}
    known = {
        _key(function.domain, function.name, function.overload) for function in message.functions
    }
    for function in message.functions:
        key = _key(function.domain, function.name, function.overload)
        calls[key] = _calls(function, known)
    sizes, depths = _measure(file, calls)
    inside = _calls(message.graph, known)
    total = sum(count * (1 if key is None else sizes[key]) for key, count in inside.items())
    if total > MOST_NODES:
        raise InputError(
            f"the functions of {file} would become {_about(total)} nodes",
            f"at most {MOST_NODES} are inlined",
            "Export it without functions",
        )
    deepest = max((depths[key] for key in inside if key is not None), default=0)
    if deepest > MOST_NESTED:
        raise InputError(
            f"the functions of {file} call each other {deepest} deep",
            f"at most {MOST_NESTED} are followed",
            "Export it without functions",
        )


def _about(count: int) -> str:
    return str(count) if count < 10**9 else f"more than 10^{len(str(count)) - 1}"


def _key(domain: str, name: str, overload: str) -> Key:
    return ("" if domain == "ai.onnx" else domain, name, overload)


def _calls(body: Body, known: set[Key]) -> Counter[Key | None]:
    """How often each function is called in a body; None counts the other nodes."""
    found: Counter[Key | None] = Counter()
    pending: list[Body] = [body]
    while pending:
        for node in pending.pop().node:
            key = _key(node.domain, node.op_type, node.overload)
            found[key if key in known else None] += 1
            pending += inner_graphs(node)
    return found


def _measure(
    file: Path, calls: Mapping[Key, Counter[Key | None]]
) -> tuple[dict[Key, int], dict[Key, int]]:
    """Nodes of each function once all in it are inlined, and how deep its calls go."""
    sizes: dict[Key, int] = {}
    depths: dict[Key, int] = {}
    for start in calls:
        path = [start] if start not in sizes else []
        while path:  # no recursion: a chain may be as long as the file
            key = path[-1]
            called = [other for other in calls[key] if other is not None]
            waiting = next((other for other in called if other not in sizes), None)
            if waiting is None:
                counted = calls[key].items()
                # One for the call itself: a chain of empty functions costs too.
                sizes[key] = 1 + sum(n * (1 if k is None else sizes[k]) for k, n in counted)
                depths[key] = 1 + max((depths[other] for other in called), default=0)
                path.pop()
            elif waiting in path:
                names = [name for _, name, _ in (*path[path.index(waiting) :], waiting)]
                raise InputError(
                    f"{file} has a function that calls itself",
                    " -> ".join(names[:6]) + (" -> ..." if len(names) > 6 else ""),
                    "It cannot be inlined: export the model without functions",
                )
            else:
                path.append(waiting)
    return sizes, depths
