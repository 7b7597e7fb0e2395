"""Transformations that leave every operator as it is: names, order, no-ops, functions."""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from random import Random

import numpy as np
import onnx

from omforge import ir
from omforge.ir.edit import add_initializer, fresh_name
from omforge.ir.values import attribute, constant, constant_tensor, dims
from omforge.passes.convert_opset import ConvertOpset
from omforge.recognition.interface import find_interface
from omforge.rewriting.builder import Builder
from omforge.rewriting.matcher import SMALL
from omforge.rewriting.splice import Names
from omforge.testing.edits import BY, FLOATS, chosen, fresh_names, insert_noise, of_type

# --- names, metadata, order -------------------------------------------------------------------


def rename_values(model: ir.Model, random: Random) -> int:
    """Rename every value and node; inputs and outputs of the model keep their names."""
    graph = model.graph
    kept = {*graph.inputs, *graph.outputs}
    values = [v for v in graph.initializers.values() if v not in kept]
    values += [v for node in graph for v in node.outputs if v not in kept and v.name]
    numbers = random.sample(range(10 * len(values)), len(values))
    for index, value in enumerate(values):  # in two steps, so that no name is taken on the way
        value.name = f"{BY}_{index}"
    for value, index in zip(values, numbers, strict=True):
        value.name = f"t{index}"
    for index, node in enumerate(graph):
        node.name = f"n{random.randrange(1 << 30)}_{index}"
    return len(values)


def rename_cache(model: ir.Model, random: Random) -> int:
    """Rename the inputs and outputs of the cache, as every exporter has its own names."""
    try:
        caches = find_interface(model).caches
    except ir.InputError:
        return 0
    stem = random.choice(("cache", "kv", "state.layers"))
    for index, (past, present) in enumerate(caches):
        past.name, present.name = f"{stem}.in.{index}", f"{stem}.out.{index}"
    return len(caches)


def drop_metadata(model: ir.Model, random: Random) -> int:
    """Drop shapes and dtypes of inner values, the names of nodes, and metadata."""
    graph = model.graph
    kept = {*graph.inputs, *graph.outputs}
    for thing in (model, graph):
        thing.metadata_props.clear()
        thing.doc_string = None
    for node in graph:
        node.name, node.doc_string = None, None
        node.metadata_props.clear()
        for value in node.outputs:
            value.metadata_props.clear()
            if value not in kept:
                value.type, value.shape = None, None
    return len(graph)


def permute_nodes(model: ir.Model, random: Random) -> int:
    """Put the nodes into another valid order."""
    graph = model.graph
    nodes = list(graph)
    waiting = {
        node: sum(1 for value in set(_reads(node)) if _inside(value, graph)) for node in nodes
    }
    readers: dict[ir.Value, list[ir.Node]] = {}
    for node in nodes:
        for value in set(_reads(node)):
            readers.setdefault(value, []).append(node)
    ready = [(random.random(), i, node) for i, node in enumerate(nodes) if not waiting[node]]
    heapq.heapify(ready)
    order: list[ir.Node] = []
    while ready:
        _, _, node = heapq.heappop(ready)
        order.append(node)
        for reader in (r for value in node.outputs for r in readers.get(value, ())):
            waiting[reader] -= 1
            if not waiting[reader]:
                heapq.heappush(ready, (random.random(), len(order), reader))
    assert len(order) == len(nodes)
    graph.remove(nodes)
    graph.extend(order)
    return sum(a is not b for a, b in zip(nodes, order, strict=True))


def _reads(node: ir.Node) -> Iterator[ir.Value]:
    """Inputs of a node, and what the graphs inside it read from outside."""
    yield from (value for value in node.inputs if value is not None)
    for graph in (a.value for a in node.attributes.values() if a.type == ir.AttributeType.GRAPH):
        for inner in graph:
            yield from _reads(inner)
        yield from graph.outputs


def _inside(value: ir.Value, graph: ir.Graph) -> bool:
    node = value.producer()
    return node is not None and node.graph is graph


# --- what changes nothing ---------------------------------------------------------------------


def insert_identity(model: ir.Model, random: Random) -> int:
    """Put Identity on edges."""
    return insert_noise(model, random, lambda op, value, _: op.Identity(value))


def insert_casts(model: ir.Model, random: Random) -> int:
    """Put casts to the same dtype, or to a wider one and back, on edges."""

    def noise(op: Builder, value: ir.Value, random: Random) -> ir.Value | None:
        own = value.dtype
        wider = {ir.DataType.BOOL: ir.DataType.INT64, ir.DataType.FLOAT: ir.DataType.DOUBLE}
        wide = wider.get(own, own) if own is not None else None
        if own is None or wide is None or own == ir.DataType.STRING:
            return None
        if random.random() < 0.5:
            return op.Cast(value, to=int(own))
        return op.Cast(op.Cast(value, to=int(wide)), to=int(own))

    return insert_noise(model, random, noise)


def insert_reshapes(model: ir.Model, random: Random) -> int:
    """Put reshapes to a value's own shape on edges."""

    def noise(op: Builder, value: ir.Value, _: Random) -> ir.Value | None:
        return op.Reshape(value, op.Shape(value)) if dims(value) else None

    return insert_noise(model, random, noise)


def insert_transposes(model: ir.Model, random: Random) -> int:
    """Put a transpose and its inverse on edges."""

    def noise(op: Builder, value: ir.Value, random: Random) -> ir.Value | None:
        rank = len(dims(value) or ())
        if not rank:
            return None
        perm = random.sample(range(rank), rank)
        inverse = [perm.index(axis) for axis in range(rank)]
        return op.Transpose(op.Transpose(value, perm=perm), perm=inverse)

    return insert_noise(model, random, noise)


def insert_unsqueezes(model: ir.Model, random: Random) -> int:
    """Put a unit axis in and take it away again on edges."""

    def noise(op: Builder, value: ir.Value, random: Random) -> ir.Value | None:
        shape = dims(value)
        if shape is None:
            return None
        axis = random.randint(-len(shape) - 1, len(shape))
        return op.Squeeze(op.Unsqueeze(value, [axis]), [axis])

    return insert_noise(model, random, noise)


def add_dead_nodes(model: ir.Model, random: Random) -> int:
    """Add nodes that nothing uses."""
    graph = model.graph
    names = Names(model)
    values = [v for node in graph for v in node.outputs if v.name]
    count = 0
    for value in chosen(random, values):
        node = value.producer()
        assert node is not None
        op_type = random.choice(("Identity", "Shape", "Add"))
        inputs = [value, value] if op_type == "Add" else [value]
        if op_type == "Add" and value.dtype not in (*FLOATS, ir.DataType.INT64):
            continue
        dead = ir.node(op_type, inputs, name=names.unique(f"{BY}/dead"))
        dead.outputs[0].name = names.unique(f"{dead.name}_output")
        graph.insert_after(node, dead)
        count += 1
    return count


def duplicate_nodes(model: ir.Model, random: Random) -> int:
    """Compute a value again for one of its users, and what it is made of too."""
    names = Names(model)
    edges = [
        (user, index)
        for node in model.graph
        if node.domain == "" and len(node.outputs) == 1 and not node.op_type.startswith("Random")
        for user, index in sorted(
            node.outputs[0].uses(), key=lambda use: (use[0].name or "", use[1])
        )
        if len(node.outputs[0].uses()) > 1 or node.outputs[0].is_graph_output()
    ]
    picked = chosen(random, edges)
    for user, index in picked:
        value = user.inputs[index]
        assert value is not None
        copy = _copy(value, random.randint(1, 4), user, names)
        if copy is not None:
            user.replace_input_with(index, copy)
    return len(picked)


def _copy(value: ir.Value, depth: int, user: ir.Node, names: Names) -> ir.Value | None:
    node = value.producer()
    graph = user.graph
    if not depth or node is None or node.domain != "" or len(node.outputs) != 1:
        return None
    if constant_tensor(value) is not None and constant(value, SMALL) is None:
        return None  # a weight: nobody stores it twice
    if graph is None or any(a.type == ir.AttributeType.GRAPH for a in node.attributes.values()):
        return None
    inputs = [v if v is None else _copy(v, depth - 1, user, names) or v for v in node.inputs]
    name = names.unique(f"{node.name or node.op_type}_again")
    again = ir.Node("", node.op_type, inputs, list(node.attributes.values()), name=name)
    made = again.outputs[0]
    made.name, made.type, made.shape = names.unique(f"{name}_output"), value.type, value.shape
    graph.insert_before(user, again)
    return made


# --- constants --------------------------------------------------------------------------------


def lift_constants(model: ir.Model, random: Random) -> int:
    """Make initializers of Constant nodes."""
    graph = model.graph
    taken = fresh_names(model)
    count = 0
    for node in chosen(random, of_type(model, "Constant")):
        tensor = constant_tensor(node.outputs[0])
        if tensor is None or node.outputs[0].is_graph_output():
            continue
        value = add_initializer(graph, f"{node.outputs[0].name}_lifted", tensor.numpy(), taken)
        node.outputs[0].replace_all_uses_with(value)
        graph.remove(node, safe=True)
        count += 1
    return count


def lower_initializers(model: ir.Model, random: Random) -> int:
    """Make Constant nodes of initializers, small ones in any spelling of a constant."""
    graph = model.graph
    taken = fresh_names(model)
    values = [
        value
        for value in graph.initializers.values()
        if not (value.is_graph_input() or value.is_graph_output()) and value.const_value is not None
    ]
    picked = chosen(random, values)
    for value in picked:
        assert value.const_value is not None
        node = ir.Node("", "Constant", [], [_spelled(value.const_value, random)])
        made = node.outputs[0]
        made.name = fresh_name(graph, f"{value.name}_node", taken)
        made.type, made.shape = value.type, value.shape
        graph.insert_before(graph[0], node)
        value.replace_all_uses_with(made)
        del graph.initializers[str(value.name)]
    return len(picked)


def _spelled(tensor: ir.TensorProtocol, random: Random) -> ir.Attr:
    kind = {ir.DataType.INT64: "int", ir.DataType.FLOAT: "float"}.get(tensor.dtype)
    shape = tuple(tensor.shape.numpy())
    if kind is not None and random.random() < 0.5 and tensor.size <= 8:
        content = tensor.numpy().tolist()
        if shape == ():
            return ir.convenience.convert_attribute(f"value_{kind}", content)
        if len(shape) == 1 and content:
            return ir.convenience.convert_attribute(f"value_{kind}s", content)
    return ir.AttrTensor("value", ir.tensor(np.array(tensor.numpy())))


# --- functions and opsets ---------------------------------------------------------------------


def outline_functions(model: ir.Model, random: Random) -> int:
    """Make model-local functions of runs of nodes, as exporters do for modules."""
    names = Names(model)
    return sum(_outline(model, random, names) for _ in range(random.randint(1, 3)))


def _outline(model: ir.Model, random: Random, names: Names) -> bool:
    graph = model.graph
    nodes = list(graph)
    start = random.randrange(max(1, len(nodes) - 2))
    run = nodes[start : start + random.randint(2, 12)]  # a run of the order has no way out and in
    if any(a.type == ir.AttributeType.GRAPH for node in run for a in node.attributes.values()):
        return False
    inside = set(run)
    given = list(dict.fromkeys(v for n in run for v in _reads(n) if v.producer() not in inside))
    made = [
        value
        for node in run
        for value in node.outputs
        if value.is_graph_output() or any(user not in inside for user in value.consumers())
    ]
    if not made:
        return False
    copies: dict[ir.Value, ir.Value] = {value: ir.Value(name=value.name) for value in given}
    body: list[ir.Node] = []
    for node in run:
        inputs = [None if v is None else copies[v] for v in node.inputs]
        outputs = [ir.Value(name=value.name) for value in node.outputs]
        copies.update(zip(node.outputs, outputs, strict=True))
        attributes = list(node.attributes.values())
        copy = ir.Node(node.domain, node.op_type, inputs, attributes, outputs=outputs)
        copy.name = node.name
        body.append(copy)
    imports = dict(model.opset_imports)
    inner = ir.Graph(
        [copies[v] for v in given], [copies[v] for v in made], nodes=body, opset_imports=imports
    )
    function = ir.Function(BY, _unnamed(model, names), graph=inner, attributes=[])
    model.functions[function.identifier()] = function
    model.opset_imports.setdefault(BY, 1)
    call = ir.Node(BY, function.name, given, num_outputs=len(made), name=names.unique("call"))
    graph.insert_before(run[0], call)
    for old, new in zip(made, call.outputs, strict=True):
        name = str(old.name)
        new.type, new.shape = old.type, old.shape
        old.replace_all_uses_with(new, replace_graph_outputs=True)
        old.name = names.unique(f"{name}_inner")
        new.name = name
    graph.remove(run, safe=True)
    return True


def _unnamed(model: ir.Model, names: Names) -> str:
    """A name for a function, also beside those of an earlier step."""
    known = {function.name for function in model.functions.values()}
    while (name := names.unique("Block")) in known:
        continue
    return name


def raise_opset(model: ir.Model, random: Random) -> int:
    """Convert to a higher opset."""
    source = model.opset_imports.get("", 0)
    if model.functions or not source < 24:
        return 0
    return ConvertOpset(random.randint(source + 1, 24)).run(model)


def lower_opset(model: ir.Model, random: Random) -> int:
    """Declare a lower opset, where every node means the same in it."""
    source = model.opset_imports.get("", 0)
    if model.functions or source <= 18:
        return 0
    target = random.randint(18, source - 1)
    if not all(_means_the_same(node, target) for node in model.graph if node.domain == ""):
        return 0
    model.opset_imports[""] = target
    for node in model.graph:
        node.version = None
    return 1


def _means_the_same(node: ir.Node, target: int) -> bool:
    """Between 18 and 24 operators only gained dtypes, inputs and attributes."""
    try:
        schema = onnx.defs.get_schema(node.op_type, target, "")
    except onnx.defs.SchemaError:
        return False
    if node.op_type == "Attention":
        return False
    known = all(name in schema.attributes for name in node.attributes)
    return known and len(node.inputs) <= schema.max_input


def turn_axes(model: ir.Model, random: Random) -> int:
    """Count axes from the other end."""
    ops = ("Softmax", "Concat", "Split", "Gather", "LayerNormalization", "RMSNormalization")
    count = 0
    for node in chosen(random, of_type(model, *ops)):
        rank = len(dims(node.outputs[0]) or ())
        if node.op_type == "Gather":
            rank = len(dims(node.inputs[0]) or ()) if node.inputs[0] is not None else 0
        default = 0 if node.op_type in ("Split", "Gather") else -1
        axis: int = attribute(node, "axis", default)
        if rank:
            turned = axis - rank if axis >= 0 else axis + rank
            node.attributes["axis"] = ir.AttrInt64("axis", turned)
            count += 1
    return count
