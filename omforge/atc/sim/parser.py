"""atc's ONNX parser: from the protobuf to a graph of GE operators, or an error.

Source of every rule that names no other: hicann/ge:parser/parser/onnx/onnx_parser.cc, with the
function in the docstring. The order of the checks is the parser's, so that a model with several
faults is refused for the one that atc would name.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

import onnx
from google.protobuf.message import DecodeError

from omforge.atc.sim import plugins, tensors
from omforge.atc.sim.checks import PRE_CHECK
from omforge.atc.sim.command_line import Arguments
from omforge.atc.sim.graph import Checked, GeNode, GraphInput, GraphOutput, Parsed
from omforge.atc.sim.reports import Refused, Report
from omforge.atc.sim.shapes import Shapes

# Types that are not looked up, in any domain and at any opset.
_BUILT_IN = {"Input": "Data", "Constant": "Const", "FileConstant": "FileConstant"}

_TYPE_UNSUPPORTED, _NAME_REPEATED = 1, 9  # parser/parser/common/pre_checker.h:ErrorCode

_BRANCHES = ("then_branch", "else_branch")

FILE_LIMIT = tensors.INT_MAX
"""Bytes of a model file (parser/parser/common/acl_graph_parser_util.cc:GetFileLength)."""


def parse_model(arguments: Arguments, shapes: Shapes, report: Report) -> Parsed | None:
    """Parse --model; None in --mode=3, which ends with the pre-check.

    The pre-checking report is written when that finds errors, and always in --mode=3
    (hicann/ge:api/atc/omg.cc:ParseGraph).

    Raises:
        Refused: The parser stops.
    """
    path = Path(arguments["model"])
    model = load(path, report)
    only_check = arguments.number("mode") == PRE_CHECK
    name = Path(arguments["output"]).name or "default_graph"
    parser = _Parser(model, shapes, report, name)
    parser.prepare()
    try:
        parser.begin()
        return None if only_check else parser.parse()
    except Refused:
        report.inner(f"Model parse to graph failed, graph name:{name}.")
        raise
    finally:
        if only_check or any(op.causes for op in parser.checked):
            save_report(Path(arguments["check_report"]), name, parser.checked)


def load(path: Path, report: Report) -> onnx.ModelProto:
    """Read the protobuf (acl_graph_parser_util.cc:ReadProtoFromBinaryFile), no external data."""
    model = onnx.ModelProto()
    size = os.stat(path).st_size
    if not 0 < size <= FILE_LIMIT:
        report.error("E13015", file=path, size=size, maxsize=FILE_LIMIT)
        report.inner(f"Read onnx model file:{path} failed.")
        raise Refused
    try:
        model.ParseFromString(path.read_bytes())
    except DecodeError as error:
        report.error("E13005", file=path)
        report.inner(f"Read onnx model file:{path} failed.")
        raise Refused from error
    return model


def save_report(path: Path, name: str, checked: list[Checked]) -> None:
    """Write the pre-checking report (parser/parser/common/pre_checker.cc:Save)."""
    failed = sum(bool(op.causes) for op in checked)

    def entry(op: Checked) -> dict[str, object]:
        told: dict[str, object] = {"name": op.name, "type": op.type}
        told["result"] = "failed" if op.causes else "success"
        if op.causes:
            told["cause"] = [{"code": code, "message": text} for code, text in op.causes]
        return told

    content = {
        "name": name,
        "result": "failed" if failed else "success",
        "total": len(checked),
        "pass": len(checked) - failed,
        "fail": failed,
        "op": [entry(op) for op in checked],
    }
    path.write_text(json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False) + "\n")


class _Parser:
    """The state of one run over the root graph, then its subgraphs in the order found."""

    def __init__(self, model: onnx.ModelProto, shapes: Shapes, report: Report, name: str) -> None:
        self.model = model
        self.shapes = shapes
        self.report = report
        self.name = name
        self.checked: list[Checked] = []
        self.registry = plugins.Registry()
        self.versions: dict[str, int] = {}
        self.branches: list[onnx.GraphProto] = []

    def prepare(self) -> None:
        """ModelParseToGraph, ahead of the first graph."""
        if not self.model.HasField("graph"):
            self.report.error("E16004")
            raise Refused
        self._name_nodes_and_find_branches()
        for item in self.model.opset_import:
            self.versions[item.domain or "ai.onnx"] = item.version

    def begin(self) -> None:
        """ModelParseToGraphImpl of the root graph, up to and with its pre-check."""
        self.root = _Graph(self, self.model.graph, is_branch=False)
        self.root.collect()
        self.root.pre_check()

    def parse(self) -> Parsed:
        """The rest: operators, wires, outputs, expansion; then so for each branch of an If."""
        parsed = Parsed(self.model)
        self.root.build(parsed)
        for branch in self.branches:
            graph = _Graph(self, branch, is_branch=True)
            graph.collect()
            graph.pre_check()
            graph.build(Parsed(self.model))
        return parsed

    def _name_nodes_and_find_branches(self) -> None:
        """AdaptAndFindAllOnnxGraph; subgraph_adapter/if_subgraph_adapter.cc."""
        unnamed = 0
        queue = [self.model.graph]
        while queue:
            graph = queue.pop(0)
            for node in graph.node:
                if not node.name:
                    node.name = f"{node.op_type}_{unnamed}"
                    unnamed += 1
                if node.op_type == "If":
                    queue += self._adapt_if(node)
        # A branch is parsed after the graph that holds it, breadth first.

    def _adapt_if(self, node: onnx.NodeProto) -> list[onnx.GraphProto]:
        found: list[onnx.GraphProto] = []
        if len(node.attribute) != len(_BRANCHES):
            self.report.inner(
                f"Invalid graph, if node attribute size:{len(node.attribute)} must be 2."
            )
            self._adapt_failed(node)
        captured: set[str] = set()
        for attribute in node.attribute:
            if attribute.name not in _BRANCHES:
                self.report.inner(
                    f"Invalid attribute name:{attribute.name}, "
                    "it should be then_branch or else_branch."
                )
                self._adapt_failed(node)
            found.append(attribute.g)
            made = {name for inner in attribute.g.node for name in inner.output}
            made |= {tensor.name for tensor in attribute.g.initializer}
            captured |= {name for inner in attribute.g.node for name in inner.input} - made
        for graph in found:
            for name in sorted(captured):
                graph.input.add().name = name
        node.input.extend(sorted(captured))
        self.branches += found
        return found

    def _adapt_failed(self, node: onnx.NodeProto) -> None:
        self.report.inner(f"adapt subgraph of node:{node.name} failed.")
        raise Refused

    def key(self, node: onnx.NodeProto) -> str:
        """`domain::version::op` (ConstructOriType)."""
        if node.op_type in _BUILT_IN:
            return node.op_type
        domain = node.domain or "ai.onnx"
        version = self.versions.get(domain)
        if version is None:
            self.report.inner(f"The opset of domain[{domain}] has no responding version.")
            raise Refused
        return f"{domain}::{version}::{node.op_type}"


class _Graph:
    """One graph on its way: ModelParseToGraphImpl."""

    def __init__(self, parser: _Parser, graph: onnx.GraphProto, *, is_branch: bool) -> None:
        self.parser = parser
        self.report = parser.report
        self.graph = graph
        self.is_branch = is_branch
        self.inputs: dict[str, onnx.ValueInfoProto] = {}
        # (name, operator as the parser looks it up, the proto or None for an input)
        self.entries: list[tuple[str, str, onnx.NodeProto]] = []
        self.constants: dict[str, onnx.TensorProto] = {}
        # Shapes that a plugin can read while it parses.
        self.known: dict[str, tuple[int, ...]] = {}

    def collect(self) -> None:
        """ParseInput, ParseInitializer, ParseOutput, UpdateNodeNameAndOpType."""
        graph = self.graph
        named = {tensor.name: tensor for tensor in graph.initializer if tensor.name}
        if not self.is_branch and not graph.input:
            self.report.error("E16001", value="input")
            raise Refused
        self.inputs = {value.name: value for value in graph.input if value.name not in named}
        if not graph.output:
            self.report.error("E16001", value="output")
            raise Refused
        self.nodes = [*graph.node, *self._input_nodes(), *self._constant_nodes(named)]
        for index, node in enumerate(n for n in self.nodes if not n.name):
            node.name = f"{node.op_type}_{index}"
        for node in self.nodes:
            if node.op_type == "Constant":
                value = next((a for a in node.attribute if a.name == "value"), None)
                if value is not None:
                    self.constants[node.output[0] if node.output else node.name] = value.t

    def _input_nodes(self) -> Iterator[onnx.NodeProto]:
        named = {tensor.name for tensor in self.graph.initializer}
        for value in self.graph.input:
            if value.name not in named:
                yield onnx.NodeProto(name=value.name, op_type="Input", output=[value.name])

    def _constant_nodes(self, named: Mapping[str, onnx.TensorProto]) -> Iterator[onnx.NodeProto]:
        for index, name in enumerate(sorted(named)):
            self.constants[name] = named[name]
            yield onnx.NodeProto(
                name=f"{name}_Initializer_{index}", op_type="Constant", output=[name]
            )

    def pre_check(self) -> None:
        """Prechecker: names and types of all nodes, each fault reported."""
        names: dict[str, int] = {}
        causes: list[list[tuple[int, str]]] = []
        checked: list[tuple[str, str]] = []
        failed = False
        try:
            for node in self.nodes:
                key = self._built_in(node) or self.parser.key(node)
                checked.append((node.name, key))
                causes.append([])
                first = names.setdefault(node.name, len(causes) - 1)
                if first != len(causes) - 1:
                    self.report.error("E13009", opname=node.name)
                    for place in (first, len(causes) - 1):
                        causes[place].append((_NAME_REPEATED, "The name is repeated in the graph."))
                    failed = True
                if node.op_type not in _BUILT_IN and self.parser.registry.ge_type(key) is None:
                    self.report.error("E13010", opname=node.name, optype=key)
                    causes[-1].append((_TYPE_UNSUPPORTED, "The type is not supported."))
                    failed = True
        finally:
            self.parser.checked += [
                Checked(name, key, tuple(dict.fromkeys(why)))
                for (name, key), why in zip(checked, causes, strict=True)
            ]
        failed |= self._older_release()
        if failed:
            raise Refused

    def _built_in(self, node: onnx.NodeProto) -> str:
        """The type of an input or a constant, "" for others (UpdateNodeNameAndOpType)."""
        if node.op_type == "Constant" and node.output:
            tensor = self.constants.get(node.output[0])
            if tensor is not None and tensors.is_external(tensor):
                return "FileConstant"
        return node.op_type if node.op_type in _BUILT_IN else ""

    def _older_release(self) -> bool:
        """E16005 of releases before 9: a node without a domain, and several opset imports.

        Source: hicann/ge:docs/zh/user_guides/error_codes (E16005); the code is registered and no
        longer raised. OMFORGE_ATC_SIM_RELEASE=9 simulates the newer parser.
        """
        imports = self.parser.model.opset_import
        if os.environ.get("OMFORGE_ATC_SIM_RELEASE", "") == "9" or len(imports) < 2:
            return False
        if all(node.domain for node in self.graph.node if node.op_type not in _BUILT_IN):
            return False
        self.report.error("E16005", domain_version_size=len(imports))
        return True

    def build(self, parsed: Parsed) -> None:
        """ParseAllNodeProto, SetOperatorInputs, GetGraphOutputs, ExpandOneToManyGraph."""
        calls: list[plugins.Call] = []
        self.known = {name: tuple(tensor.dims) for name, tensor in self.constants.items()}
        self.known |= {name: _dims(value) or () for name, value in self.inputs.items()}
        for node in self.nodes:
            if node.op_type == "Input":
                self._build_input(node.name, parsed)
            elif node.op_type == "Constant":
                self._build_constant(node)
            else:
                call = self._call(node)
                plugins.check_parameters(call, self.report)
                calls.append(call)
        self._wire(parsed, calls)
        self._find_outputs(parsed)
        for call in calls:
            plugins.check_expansion(call, self.report)
        parsed.tensors.update(self.constants)

    def _call(self, node: onnx.NodeProto) -> plugins.Call:
        key = self.parser.key(node)
        ge_type = self.parser.registry.ge_type(key) or ""
        version = self.parser.versions.get("ai.onnx", 0)
        return plugins.Call(node, version, ge_type, self.known)

    def _build_input(self, name: str, parsed: Parsed) -> None:
        """onnx_data_parser.cc:ParseParams."""
        if self.is_branch:
            return  # its type and shape come from outside
        value = self.inputs[name]
        tensors.check_dtype(value.type.tensor_type.elem_type, self.report)
        dims, chosen = _dims(value), self.parser.shapes.dims.get(name)
        if chosen is not None:
            # A missing shape takes any; another rank is refused without a message of its own.
            if dims and len(dims) != len(chosen):
                raise Refused
            for axis, (own, new) in enumerate(zip(dims or (), chosen, strict=False)):
                if own >= 0 and new >= 0 and own != new:
                    self.report.trap(
                        "SIM030",
                        f"input {name}: --input_shape says {new} at axis {axis}, the model {own}; "
                        "atc takes the flag's (onnx_data_parser.cc:ParseInputFromUser).",
                    )
            dims = chosen
        elif dims is None:
            self.report.trap(
                "SIM031",
                f"input {name} has no shape: atc makes a scalar of it (seen).",
            )
        if 0 in (dims or ()):
            self.report.trap("SIM032", f"input {name} has a dim of 0, which no kernel takes.")
        dtype = tensors.GE_DTYPES[value.type.tensor_type.elem_type]
        parsed.inputs.append(GraphInput(name, dtype, dims or ()))

    def _build_constant(self, node: onnx.NodeProto) -> None:
        tensor = self.constants.get(node.output[0] if node.output else node.name)
        if tensor is None:
            spelled = ", ".join(a.name for a in node.attribute) or "no attribute"
            self.report.trap(
                "SIM033",
                f"{node.name}: a Constant with {spelled} becomes an empty tensor: only `value` is "
                "read (onnx_constant_parser.cc:ParseConstFromInput; seen).",
            )
            return
        if not tensors.is_external(tensor):
            tensors.check_constant(node.name, tensor, self.report)
            return
        tensors.check_external(node.name, tensor, self.report)
        if self.is_branch:
            self.report.trap(
                "SIM034",
                f"{node.name}: external data inside a branch keeps its relative path, and the file "
                "is not found (SetExternalPath).",
            )

    def _wire(self, parsed: Parsed, calls: list[plugins.Call]) -> None:
        """SetOperatorInputs: by tensor name, whatever the order of the nodes."""
        made: dict[str, list[tuple[onnx.NodeProto, int]]] = {}
        for node in self.nodes:
            for index, name in enumerate(node.output):
                made.setdefault(name, []).append((node, index))
        types = {id(call.node): call.ge_type for call in calls}
        for name, producers in made.items():
            if name and len(producers) > 1:
                self.report.trap(
                    "SIM035",
                    f"tensor {name} is made by {len(producers)} nodes; atc wires its readers to "
                    "one of them.",
                )
        if "" in made:
            readers = sum(list(node.input).count("") for node in self.nodes)
            self.report.trap(
                "SIM036",
                f'{made[""][0][0].name} has an output named "": atc wires every "" input of the '
                f"graph ({readers} now) to it (seen).",
            )
        for node in self.nodes:
            connected = [
                self._edge(node, i, name, made, types) for i, name in enumerate(node.input)
            ]
            ge_type = types.get(id(node)) or _BUILT_IN[self._built_in(node)]
            parsed.nodes.append(GeNode(node.name, ge_type, tuple(connected), len(node.output)))
        for call in calls:
            self._check_required(call)

    def _edge(
        self,
        node: onnx.NodeProto,
        index: int,
        name: str,
        made: Mapping[str, list[tuple[onnx.NodeProto, int]]],
        types: Mapping[int, str],
    ) -> tuple[str, int] | None:
        if name not in made:
            if name:
                self.report.trap(
                    "SIM037",
                    f"{node.name}: nothing makes its input {name}; atc leaves it unconnected "
                    "(SetOperatorInputs).",
                )
            return None
        source, output = made[name][-1]
        slots = self.parser.registry.slots(types.get(id(node), ""))
        from_ = self.parser.registry.slots(types.get(id(source), ""))
        too_many = slots is not None and slots.inputs is not None and index >= slots.inputs
        no_output = from_ is not None and from_.outputs is not None and output >= from_.outputs
        if name and (too_many or no_output):
            self.report.inner(
                f"Resolve operator IO name failed, tensor[{name}], "
                f"src op[{source.name}:{types.get(id(source), source.op_type)}], "
                f"src index[{output}], src name[{'' if no_output else '...'}], "
                f"dst op[{node.name}:{types.get(id(node), node.op_type)}], "
                f"dst index[{index}], dst name[{'' if too_many else '...'}]."
            )
            raise Refused
        return source.name, output

    def _check_required(self, call: plugins.Call) -> None:
        """A node without a required input is accepted without a word (seen)."""
        missing = plugins.missing_inputs(call.node, call.opset) if not call.node.domain else ""
        if missing:
            text = f"{call.place()}: {missing}; the parser does not look."
            self.report.trap("SIM038", text)
        slots = self.parser.registry.slots(call.ge_type)
        if slots is None or not call.node.op_type.startswith(("NPU", "Ascend", "Quant", "Weight")):
            return
        if any(not name for name in call.node.input[: slots.required]) or (
            len(call.node.input) < slots.required
        ):
            self.report.trap(
                "SIM038",
                f"{call.place()}: {call.ge_type} requires {slots.required} inputs, "
                f"{call.given} are given; the parser does not look.",
            )

    def _find_outputs(self, parsed: Parsed) -> None:
        """GetGraphOutputs, SetOutputsInfo."""
        made = {
            name: (node, index) for node in self.nodes for index, name in enumerate(node.output)
        }
        seen: set[str] = set()
        for value in self.graph.output:
            if value.name not in made:
                self.report.inner(f"[Get][Outputs] Cannot find output:{value.name} in graph.")
                raise Refused
            node, index = made[value.name]
            if value.name in seen or node.op_type in ("Input", "Constant"):
                why = "is listed twice" if value.name in seen else "is an input or a constant"
                self.report.trap(
                    "SIM039",
                    f"output {value.name} {why}: NetOutput would be fed by it directly. Insert an "
                    "Identity.",
                )
            seen.add(value.name)
            dtype = tensors.GE_DTYPES.get(value.type.tensor_type.elem_type, "float32")
            parsed.outputs.append(
                GraphOutput(node.name, index, value.name, dtype, _dims(value) or ())
            )


def _dims(value: onnx.ValueInfoProto) -> tuple[int, ...] | None:
    """A dim that is no number is -1; None for no shape at all (ParseInput)."""
    if not value.type.tensor_type.HasField("shape"):
        return None
    return tuple(
        dim.dim_value if dim.WhichOneof("value") == "dim_value" else -1
        for dim in value.type.tensor_type.shape.dim
    )
