"""Find everything that makes a model invalid, all of it at once.

onnx-ir keeps edges as objects and checks little: a graph can refer to a node that was removed, use
a value above its definition, or give two values one name, and only running it would tell.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache

import onnx
import onnx_ir as ir

from omforge.ir.diagnostics import Diagnostic, describe, format_diagnostics
from omforge.ir.errors import CheckError
from omforge.ir.ops import TARGET_OPS, is_target_op
from omforge.ir.target_op import TargetOp

NEIGHBOURS = 3  # nodes shown on either side of the first faulty one
ONNX_DOMAINS = frozenset({"", "ai.onnx.ml", "ai.onnx.preview.training"})
UNLIMITED = 1 << 30
# ONNX Runtime has these in the default domain, and onnxruntime-genai writes them so.
RUNTIME_OPS = frozenset({"SimplifiedLayerNormalization"})


def verify(model: ir.Model) -> list[Diagnostic]:
    """Return every fault of the model, in graph order; an empty list means that it is valid.

    Checked: names are unique; values are defined, and above their uses; graph outputs are produced;
    graph inputs and outputs have types; initializers have values; every domain is imported; and
    nodes agree with their operator's schema in arity, attributes and input types.
    """
    return [diagnostic for diagnostic, _ in _Verifier(model).faults()]


def check(model: ir.Model) -> None:
    """Raise unless the model is valid.

    Raises:
        CheckError: Lists every fault, and shows the nodes around the first.
    """
    faults = list(_Verifier(model).faults())
    if not faults:
        return
    plural = "s" if len(faults) > 1 else ""
    node = next((node for _, node in faults if node is not None), None)
    around = f"\naround the first:\n{_neighbourhood(node)}" if node is not None else ""
    text = format_diagnostics([diagnostic for diagnostic, _ in faults])
    raise CheckError(f"the model has {len(faults)} fault{plural}", f"\n{text}{around}")


def _neighbourhood(faulty: ir.Node) -> str:
    nodes = [faulty] if faulty.graph is None else list(faulty.graph)
    at = next(i for i, node in enumerate(nodes) if node is faulty)
    first = max(at - NEIGHBOURS, 0)
    return "\n".join(
        f"{'>' if node is faulty else ' '} {_line(node)}"
        for node in nodes[first : at + NEIGHBOURS + 1]
    )


def _line(node: ir.Node) -> str:
    outputs = ", ".join(value.name or "_" for value in node.outputs)
    inputs = ", ".join("_" if value is None else value.name or "?" for value in node.inputs)
    return f"{outputs} = {node.op_type}({inputs})"


@dataclass(frozen=True)
class _Parameter:
    name: str
    type: str  # a type variable such as "T", or one type such as "tensor(int64)"
    allowed: frozenset[str]
    required: bool
    homogeneous: bool


@dataclass(frozen=True)
class _Signature:
    """What an operator takes, from its ONNX schema or from our definition of a target op."""

    inputs: tuple[_Parameter, ...]
    arity: tuple[int, int]
    outputs: tuple[int, int]
    attributes: Mapping[str, tuple[str, bool]]  # name: (type, required)
    deprecated: bool = False

    def parameter(self, index: int) -> _Parameter:
        return self.inputs[min(index, len(self.inputs) - 1)]  # the last one may be variadic


@cache
def _onnx_signature(domain: str, op_type: str, opset: int) -> _Signature | None:
    try:
        schema = onnx.defs.get_schema(op_type, opset, domain)
    except onnx.defs.SchemaError:
        return None
    allowed = {c.type_param_str: frozenset(c.allowed_type_strs) for c in schema.type_constraints}
    inputs = tuple(
        _Parameter(
            item.name,
            item.type_str,
            allowed.get(item.type_str, frozenset({item.type_str})),
            item.option is onnx.defs.OpSchema.FormalParameterOption.Single,
            item.is_homogeneous and item.type_str in allowed,
        )
        for item in schema.inputs
    )
    return _Signature(
        inputs,
        (schema.min_input, schema.max_input),
        (schema.min_output, schema.max_output),
        {name: (_enum_name(a.type), a.required) for name, a in schema.attributes.items()},
        schema.deprecated,
    )


def _enum_name(member: object) -> str:
    return str(member).rpartition(".")[2]  # onnx's stub gives its enums no `name`


@cache
def _target_signature(name: str) -> _Signature:
    op: TargetOp = TARGET_OPS[name]
    # dtypes depend on the SoC, so the lowering's legality check has them, not this one.
    inputs = tuple(_Parameter(i.name, "", frozenset(), i.required, False) for i in op.inputs)
    return _Signature(
        inputs,
        (op.required_inputs, len(op.inputs)),
        (1, len(op.outputs)),
        {a.name: (a.type, a.required) for a in op.attributes},
    )


@cache
def _since(domain: str, op_type: str) -> int | None:
    """Return the opset that introduced the operator's newest version, None if there is none."""
    try:
        return onnx.defs.get_schema(op_type, domain).since_version
    except onnx.defs.SchemaError:
        return None


@cache
def _operators(domain: str) -> tuple[str, ...]:
    schemas = onnx.defs.get_all_schemas_with_history()
    return tuple(sorted({schema.name for schema in schemas if schema.domain == domain}))


Fault = tuple[Diagnostic, ir.Node | None]


class _Verifier:
    """One walk over a model; what a subgraph adds to the scope is taken back after it."""

    def __init__(self, model: ir.Model) -> None:
        self._model = model
        self._functions = {(f.domain, f.name) for f in model.functions.values()}
        self._visible: set[int] = set()
        self._names: dict[str, ir.Value] = {}
        self._node_names: set[str] = set()
        self._opsets: Mapping[str, int] = {}

    def faults(self) -> Iterator[Fault]:
        main = self._model.graph
        self._opsets = main.opset_imports
        yield from self._interface(main)
        yield from self._graph(main)
        for function in self._model.functions.values():
            self._visible, self._names, self._node_names = set(), {}, set()
            self._opsets = function.opset_imports
            yield from self._graph(function.graph)

    def _interface(self, graph: ir.Graph) -> Iterator[Fault]:
        for kind, values in (("input", graph.inputs), ("output", graph.outputs)):
            for value in values:
                if value.type is None:
                    yield _fault(
                        f"graph {kind} {value.name}",
                        f"a graph {kind} has no type",
                        "tools decide on buffers from it",
                        "Set value.type, or run shape inference",
                        "missing-type",
                    )

    def _graph(self, graph: ir.Graph) -> Iterator[Fault]:
        defined: list[ir.Value] = []
        for value in (*graph.inputs, *graph.initializers.values()):
            yield from self._define(value, None, defined)
        for value in graph.initializers.values():
            if value.const_value is None and not value.is_graph_input():
                yield _fault(
                    f"initializer {value.name}",
                    "an initializer has no value",
                    "it would be left out of the file",
                    "Set value.const_value",
                    "empty-initializer",
                )
        for node in graph:
            yield from self._node(node, graph)
            for value in node.outputs:
                yield from self._define(value, node, defined)
        for value in graph.outputs:
            if id(value) not in self._visible:
                yield _fault(
                    f"graph output {value.name}",
                    "a graph output is not produced",
                    "no node, input or initializer of the graph defines it",
                    "Give graph.outputs the value that replaced it",
                    "missing-output",
                )
        for value in defined:
            self._visible.discard(id(value))
            if value.name and self._names.get(value.name) is value:
                del self._names[value.name]

    def _define(
        self, value: ir.Value, node: ir.Node | None, defined: list[ir.Value]
    ) -> Iterator[Fault]:
        if id(value) in self._visible:
            return  # an initializer that is also an input
        self._visible.add(id(value))
        defined.append(value)
        stale = next((user for user, _ in value.uses() if user.graph is None), None)
        if stale is not None:
            yield _fault(
                f"value {value.name}" + (f" of {describe(node)}" if node else ""),
                f"a value is used by {describe(stale)}, which is in no graph",
                "a pass that counts its uses is wrong, and what makes it is never found unused",
                "Remove nodes with graph.remove(node, safe=True), or let a splice do it",
                "stale-use",
                node,
            )
        if not value.name:
            if value.uses() or value.is_graph_output():
                yield _fault(
                    describe(node) if node else "graph input",
                    "a value that is used has no name",
                    "edges are names in an ONNX file",
                    "Set value.name",
                    "unnamed-value",
                    node,
                )
            return
        if value.name in self._names:
            yield _fault(
                f"value {value.name}" + (f" of {describe(node)}" if node else ""),
                "two values have the same name",
                "edges are names in an ONNX file, so uses of one would read the other",
                "Rename one of them",
                "duplicate-value-name",
                node,
            )
            return
        self._names[value.name] = value

    def _node(self, node: ir.Node, graph: ir.Graph) -> Iterator[Fault]:
        if node.name and node.name in self._node_names:
            yield _fault(
                describe(node),
                "two nodes have the same name",
                "reports and ATC's messages name nodes",
                "Rename one of them",
                "duplicate-node-name",
                node,
            )
        self._node_names.add(node.name or "")
        for value in node.inputs:
            if value is not None and id(value) not in self._visible:
                yield _unseen(node, value, graph)
        yield from self._operator(node)
        for attribute in node.attributes.values():
            if attribute.is_ref():
                continue
            if attribute.type is ir.AttributeType.GRAPH:
                yield from self._graph(attribute.as_graph())
            elif attribute.type is ir.AttributeType.GRAPHS:
                for subgraph in attribute.as_graphs():
                    yield from self._graph(subgraph)

    def _operator(self, node: ir.Node) -> Iterator[Fault]:
        if (node.domain, node.op_type) in self._functions:
            return
        version = self._opsets.get(node.domain)
        if version is None:
            yield _fault(
                describe(node),
                f"domain {node.domain or 'ai.onnx'!r} is used but not imported",
                "the model's opset_import says which version of an operator is meant",
                f"Set model.opset_imports[{node.domain!r}]",
                "missing-opset-import",
                node,
            )
            return
        if is_target_op(node):
            yield from _against(node, _target_signature(node.op_type))
            return
        if node.domain not in ONNX_DOMAINS or node.op_type in RUNTIME_OPS:
            return  # another vendor's operators: no schema to hold them against
        signature = _onnx_signature(node.domain, node.op_type, version)
        if signature is None:
            yield _unknown(node, version)
            return
        yield from _against(node, signature)
        yield from _types(node, signature)


def _fault(
    where: str, what: str, why: str, remedy: str, code: str, node: ir.Node | None = None
) -> Fault:
    return Diagnostic(where, what, why, remedy, code), node


def _unseen(node: ir.Node, value: ir.Value, graph: ir.Graph) -> Fault:
    """Say why `value` cannot be read by `node`."""
    producer = value.producer()
    where = f"{describe(node)} input {value.name}"
    if producer is None:
        return _fault(
            where,
            "a node uses an undefined value",
            "it is no graph input, no initializer and no node's output",
            "Register the initializer or input, or connect the node to another value",
            "undefined-value",
            node,
        )
    if producer.graph is graph:
        return _fault(
            where,
            "a node uses a value that is defined after it",
            "nodes must be in topological order",
            "Insert new nodes before their first user, or call graph.sort()",
            "use-before-definition",
            node,
        )
    return _fault(
        where,
        "a node uses the output of a node outside its scope",
        "the producer was removed from the graph, or is in another subgraph",
        "Replace all uses of a node's outputs before it is removed",
        "dangling-edge",
        node,
    )


def _unknown(node: ir.Node, version: int) -> Fault:
    since = _since(node.domain, node.op_type)
    domain = node.domain or "ai.onnx"
    if since is None:
        why = f"no opset of {domain} defines it"
        near = get_close_matches(node.op_type, _operators(node.domain), n=1)
        remedy = f"Did you mean {near[0]}?" if near else "Check its spelling and domain"
    else:
        why = f"the model imports opset {version} of {domain}, and {node.op_type} came with {since}"
        remedy = "Convert the model's opset first"
    return _fault(
        describe(node), f"operator {node.op_type} is unknown", why, remedy, "unknown-op", node
    )


def _against(node: ir.Node, signature: _Signature) -> Iterator[Fault]:
    """Compare arity and attributes."""
    op, where = node.op_type, describe(node)
    if signature.deprecated:
        yield _fault(
            where,
            f"{op} is deprecated at this opset",
            "runtimes need not have it",
            "Use the operator that replaced it",
            "deprecated-op",
            node,
        )
    given = len(node.inputs)
    while given and node.inputs[given - 1] is None:
        given -= 1
    for kind, count, (least, most) in (
        ("inputs", given, signature.arity),
        ("outputs", len(node.outputs), signature.outputs),
    ):
        if not least <= count <= most:
            wanted = str(least) if least == most else f"{least} to {most}"
            wanted = f"{least} or more" if most >= UNLIMITED else wanted
            yield _fault(
                where,
                f"{op} has {count} {kind}",
                f"it takes {wanted}" if kind == "inputs" else f"it has {wanted}",
                f"Fix the node's {kind}",
                "arity",
                node,
            )
    for index in range(min(given, len(signature.inputs))):
        parameter = signature.inputs[index]
        if node.inputs[index] is None and parameter.required:
            yield _fault(
                where,
                f"{op} lacks its input {parameter.name}",
                "only optional inputs may be left out",
                "Connect the input",
                "missing-input",
                node,
            )
    yield from _attributes(node, signature, where)


def _attributes(node: ir.Node, signature: _Signature, where: str) -> Iterator[Fault]:
    for name, attribute in node.attributes.items():
        expected = signature.attributes.get(name)
        if expected is None:
            known = ", ".join(sorted(signature.attributes)) or "none"
            yield _fault(
                where,
                f"{node.op_type} has no attribute {name}",
                f"at this opset its attributes are: {known}",
                "Remove it, or give what it says as an input if the opset moved it there",
                "unknown-attribute",
                node,
            )
        elif attribute.type.name != expected[0]:
            yield _fault(
                where,
                f"attribute {name} of {node.op_type} is of type {attribute.type.name}",
                f"it must be {expected[0]}",
                "Set it with the right type",
                "attribute-type",
                node,
            )
    for name, (_, required) in signature.attributes.items():
        if required and name not in node.attributes:
            yield _fault(
                where,
                f"{node.op_type} lacks its attribute {name}",
                "it is required",
                "Set it",
                "missing-attribute",
                node,
            )


def _types(node: ir.Node, signature: _Signature) -> Iterator[Fault]:
    """Compare the known dtypes of inputs with the schema, and with each other."""
    bound: dict[str, tuple[str, str]] = {}
    for index, value in enumerate(node.inputs):
        if value is None or not signature.inputs or not isinstance(value.type, ir.TensorType):
            continue
        parameter = signature.parameter(index)
        text = _type_text(value.type.dtype)
        if text not in parameter.allowed:
            yield _fault(
                f"{describe(node)} input {value.name}",
                f"{node.op_type} does not take {value.type.dtype.name} as {parameter.name}",
                f"its schema allows {', '.join(sorted(parameter.allowed))}",
                "Cast the input",
                "input-type",
                node,
            )
        if not parameter.homogeneous:
            continue
        first, first_type = bound.setdefault(parameter.type, (value.name or "?", text))
        if first_type != text:
            yield _fault(
                f"{describe(node)} input {value.name}",
                f"inputs of {node.op_type} have different types",
                f"{first} is {first_type} and {value.name} is {text}; both must be the same "
                f"{parameter.type}",
                "Cast one of them",
                "mixed-types",
                node,
            )


@cache
def _type_text(dtype: ir.DataType) -> str:
    return f"tensor({dtype.name.lower()})"
