"""How atc loads a GE graph (--framework=1): GE's own loader, and what the command line changes.

The loader is lenient, and so is this: it refuses what cannot be linked, and takes the rest as GE
does. Sources: hicann/ge:graph_metadef/graph/normal_graph/model.cc (LoadFromFile),
graph_metadef/graph/serialization/model_serialize.cc (UnserializeModel) and api/atc/main_impl.cc
(GenerateModelBySingleGraph); the function stands beside each rule.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from omforge.air.files import read_air
from omforge.air.ge_types import byte_size
from omforge.air.graph import DATA_TYPES, NET_OUTPUT, Air, Attr, Desc, Graph, Op, Tensor, integer
from omforge.air.names import BOOKKEEPING, naming
from omforge.atc.sim import emit
from omforge.atc.sim.command_line import Arguments
from omforge.atc.sim.graph import GeNode
from omforge.atc.sim.reports import Refused, Report
from omforge.atc.sim.shapes import Shapes
from omforge.ir.errors import InputError

_CONST = ("Const", "Constant")
_RECOVERED = ("_ir_inputs_key", "_ir_outputs_key")


@dataclass(frozen=True)
class LoadedAir:
    """A graph as the builder gets it: linked, its inputs numbered.

    Attributes:
        graph: One NetOutput at the end; names are unique.
        inputs: Data and RefData in the order of their indices.
        shapes: Of each input, as the file or --input_shape says; -1 where it is open.
    """

    graph: Graph
    inputs: tuple[Op, ...]
    shapes: Mapping[str, tuple[int, ...]]


def load_air(arguments: Arguments, shapes: Shapes, report: Report) -> LoadedAir:
    """Load --model, and number and describe its inputs.

    Raises:
        Refused: It cannot be loaded, or --input_shape names what is no input.
    """
    path = Path(arguments["model"])
    try:
        air = read_air(path)
        graph = _Loader(air, path, report).linked()
    except (InputError, _NotLoadedError) as error:
        report.error("E10041", parameter=path)
        if isinstance(error, _NotLoadedError):
            report.inner(str(error), error.code)
        raise Refused from error
    if air.graphs[1:]:
        names = ", ".join(other.name for other in air.graphs[1:])
        report.inner(f"the simulator runs no subgraphs: {names}", "SIM061")
        raise Refused
    data = [op.name for op in graph.ops if op.type in DATA_TYPES]
    nodes = [GeNode(op.name, op.type, (), len(op.output_desc)) for op in graph.ops]
    emit.check_names(data, nodes, shapes, report)  # by CheckParamForAirInput
    return _numbered(graph, shapes, report)


class _NotLoadedError(Exception):
    """The loader stops; `code` is the one of its inner message."""

    def __init__(self, text: str, code: str = "E19999") -> None:
        super().__init__(text)
        self.code = code


class _Loader:
    """UnserializeModel: operators first, then the edges between them."""

    def __init__(self, air: Air, path: Path, report: Report) -> None:
        self.graph = air.graph
        self.folder = Path(os.path.abspath(path)).parent
        self.report = report

    def linked(self) -> Graph:
        ops = [self._op(op) for op in self._uniquely_named()]
        by_name = {op.name: op for op in ops}
        for op in ops:
            self._check_edges(op, by_name)
        for end in (*self.graph.inputs, *self.graph.outputs):
            name, colon, _ = end.rpartition(":")
            if colon and name not in by_name:
                raise _NotLoadedError(f"Assert failed: node {name} is not in node_map_")
        return dataclasses.replace(self.graph, ops=tuple(self._with_end(ops)))

    def _uniquely_named(self) -> Iterator[Op]:
        """UnserializeNode: of two operators with one name, edges bind to the last."""
        last = {op.name: at for at, op in enumerate(self.graph.ops)}
        told: set[str] = set()
        for at, op in enumerate(self.graph.ops):
            if last[op.name] == at:
                yield op
                continue
            if op.name not in told:
                self.report.trap(
                    "SIM071",
                    f"two operators are called {op.name}: atc binds every edge to the last of them "
                    "(model_serialize.cc:UnserializeNode).",
                )
            told.add(op.name)
            yield dataclasses.replace(op, name=f"{op.name}#{at}")

    def _op(self, op: Op) -> Op:
        kept: dict[str, Attr] = {}
        for name, attribute in op.attributes.items():
            if attribute.kind == "none":
                continue
            untyped = attribute.items is not None and not attribute.typed
            if untyped and name not in (*BOOKKEEPING, *_RECOVERED):
                self.report.trap(
                    "SIM073",
                    f"{op.type} {op.name}: its attribute {name} is a list that does not say its "
                    "type: atc drops it (model_serialize.cc:DeserializeAllAttrsToAttrHolder).",
                )
                continue
            kept[name] = attribute
        if op.type in _CONST:
            kept = self._with_weight(op, kept)
        return dataclasses.replace(op, attributes=kept)

    def _with_weight(self, op: Op, attributes: dict[str, Attr]) -> dict[str, Attr]:
        """SetWeightForModel: a constant's bytes in a file, from the folder of the .air on."""
        location, length = attributes.get("location"), attributes.get("length")
        if location is None or length is None:
            return attributes
        value = attributes.get("value")
        if value is None or not isinstance(value.value, Tensor):
            raise _NotLoadedError(f"find attr [value] of op[{op.name}] failed.")
        file = self.folder / str(location.value)
        try:
            data = file.read_bytes()
        except OSError as error:
            raise _NotLoadedError(f"Load weight from path {location.value} failed.") from error
        if len(data) != length.value:
            raise _NotLoadedError(
                f"weight {location.value} has {len(data)} bytes, not {length.value}."
            )
        kept = {n: a for n, a in attributes.items() if n not in ("location", "length")}
        return {**kept, "value": Attr("t", Tensor(value.value.desc, data))}

    def _check_edges(self, op: Op, by_name: Mapping[str, Op]) -> None:
        """HandleNodeNameRef: both ends of an edge have to be there."""
        for slot, edge in enumerate(op.edges):
            if edge is None:
                continue
            source = by_name.get(edge.producer)
            if source is None:
                raise _NotLoadedError(f"Assert failed: node {edge.producer} is not in node_map_")
            if edge.output >= len(source.output_desc) or slot >= len(op.input_desc):
                raise _NotLoadedError(
                    f"Assert failed: no anchor for {edge.producer}:{edge.output} -> "
                    f"{op.name}:{slot}"
                )
        for name in op.controls:
            if name not in by_name:
                raise _NotLoadedError(f"Assert failed: node {name} is not in node_map_")

    def _with_end(self, ops: list[Op]) -> list[Op]:
        """Without a NetOutput, GraphDef.output says the outputs (net_output_pass.cc)."""
        if any(op.type == NET_OUTPUT for op in ops):
            return ops
        descs: list[Desc] = []
        by_name = {op.name: op for op in ops}
        for end in self.graph.outputs:
            name, _, index = end.rpartition(":")
            outputs = by_name[name].output_desc
            if not index.isdecimal() or int(index) >= len(outputs):
                raise _NotLoadedError(f"Assert failed: no output anchor for {end}")
            descs.append(outputs[int(index)])
        names = [f"input{at}" for at in range(len(descs))]
        described = tuple(map(_renamed, descs, names))
        outputs = tuple(self.graph.outputs)
        end = Op("Node_Output", NET_OUTPUT, outputs, described, (), naming(names, []))
        return [*ops, end]


def _renamed(desc: Desc, name: str) -> Desc:
    return dataclasses.replace(desc, name=name)


def _numbered(graph: Graph, shapes: Shapes, report: Report) -> LoadedAir:
    """main_impl.cc:CreateInputsForInference: indices, and shapes from --input_shape."""
    data = [op for op in graph.ops if op.type in DATA_TYPES]
    found = [_index(op) for op in data]
    numbers = {op.name: index for op, index in zip(data, found, strict=True)}
    if sorted(found) != list(range(len(data))):
        numbers = {op.name: at for at, op in enumerate(data)}
        report.trap(
            "SIM072",
            f"the inputs' indices are {', '.join(map(str, found))}: as they are not 0 to "
            f"{len(data) - 1}, each once, atc numbers the inputs in the order of the file: "
            f"{', '.join(op.name for op in data)} (main_impl.cc:CreateInputsForInference).",
        )
    described: dict[str, tuple[int, ...]] = {}
    for op in data:
        if not op.input_desc or not op.output_desc:
            # ConstructAndUpdateInputTensors: GE_CHECK_NOTNULL of both
            reason = "Failed to create inputs for inference from --graph and --inputs."
            report.error("E10003", value="N/A", parameter="graph", reason=reason)
            report.inner(f"{op.type} {op.name} does not describe its input and output.")
            raise Refused
        described[op.name] = _shape(op, shapes, report)
        if 0 in described[op.name]:
            report.trap("SIM032", f"input {op.name} has a dim of 0, which no kernel takes.")
    ops = tuple(
        _with_shape(op, numbers[op.name], described[op.name]) if op.name in numbers else op
        for op in graph.ops
    )
    inputs = sorted((op for op in ops if op.name in numbers), key=_index)
    _check_ref_data(inputs, report)
    return LoadedAir(
        dataclasses.replace(graph, ops=ops),
        tuple(inputs),
        {op.name: described[op.name] for op in inputs},
    )


def _index(op: Op) -> int:
    attribute = op.attributes.get("index")
    value = None if attribute is None or attribute.kind != "i" else attribute.value
    return value if isinstance(value, int) else 2**63 - 1


def _shape(op: Op, shapes: Shapes, report: Report) -> tuple[int, ...]:
    own, dtype = op.input_desc[0].shape or (), op.input_desc[0].dtype
    chosen = shapes.dims.get(op.name)
    if not byte_size(dtype, (8,)):
        # graph_prepare.cc:UpdateDataInputOutputDesc
        reason = (
            f"The input tensor is invalid. The input data type {dtype} of operator "
            f"{op.name} is not supported"
        )
        report.error("E13025", reason=reason)
        raise Refused
    if chosen is None:
        if any(dim < -2 for dim in own):
            reason = f"The dims {list(own)} of DATA node {op.name} are invalid"
            report.error("E13025", reason=reason)
            raise Refused
        return own
    if len(chosen) != len(own) or any(
        new not in (old, -1) for old, new in zip(own, chosen, strict=True) if old >= 0
    ):
        report.trap(
            "SIM030",
            f"input {op.name}: --input_shape says {list(chosen)}, the graph {list(own)}; atc "
            "takes the flag's (main_impl.cc:ConstructAndUpdateInputTensors).",
        )
    return chosen


def _with_shape(op: Op, index: int, shape: tuple[int, ...]) -> Op:
    return dataclasses.replace(
        op,
        attributes={**op.attributes, "index": integer(index)},
        input_desc=tuple(dataclasses.replace(desc, shape=shape) for desc in op.input_desc),
        output_desc=tuple(
            dataclasses.replace(desc, shape=shape, dtype=op.input_desc[0].dtype)
            for desc in op.output_desc
        ),
    )


def _check_ref_data(inputs: list[Op], report: Report) -> None:
    first = next((at for at, op in enumerate(inputs) if op.type == "RefData"), len(inputs))
    behind = [op.name for op in inputs[first:] if op.type == "Data"]
    if behind:
        report.trap(
            "SIM079",
            f"Data {behind[0]} has an index behind RefData {inputs[first].name}: GE's prototype "
            "asks for all Data first (array_ops.h: RefData).",
        )
    for op in inputs[first:]:
        if op.type == "RefData" and any(dim < 0 for dim in op.output_desc[0].shape or ()):
            report.trap(
                "SIM080",
                f"RefData {op.name} has an open size: what lies in it would move with the gear.",
            )
