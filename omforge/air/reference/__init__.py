"""A GE graph for ONNX Runtime: what the CPU backend and the simulated device run of an .air.

Each operator has a body of ONNX operators (`BODIES`), written from what GE's prototypes and the
kernels' documents say of it, and not from what emits it: so that what runs checks the file. Small
types compute as kernels do, in float32 inside.

A graph that writes its inputs (RefData) has one more output for each: what lies there afterwards.
An operator that reads such an input in no order with its writer may find it half written: it gets
NaN, or -1 for integers.

Asked to, a twin does not round what it quantises (see `between`).
"""

from __future__ import annotations

import dataclasses
import graphlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper

from omforge import ir
from omforge.air.graph import (
    CONST_TYPES,
    DATA_TYPES,
    NET_OUTPUT,
    Air,
    Desc,
    Edge,
    Graph,
    Op,
    Tensor,
)
from omforge.air.names import by_slot, input_names
from omforge.air.prototypes import prototype
from omforge.air.reference import elementwise, layout, linear, transformer, writers
from omforge.air.reference.between import CARRIERS, FLOAT, INTEGERS, Between
from omforge.air.reference.builder import OPSET, Body, Call, Twin, onnx_dtype
from omforge.air.reference.inference import ShapeFault, infer
from omforge.ir.bfloat16 import computed_wide
from omforge.ir.errors import InputError

__all__ = ["BODIES", "Reference", "ShapeFault", "reference"]

BODIES: Mapping[str, Body] = {
    **elementwise.BODIES,
    **layout.BODIES,
    **linear.BODIES,
    **transformer.BODIES,
    **writers.BODIES,
}
"""By operator."""

_IR_VERSION = 10


@dataclass(frozen=True)
class Reference:
    """The twin of a GE graph.

    Attributes:
        model: Its constants that are in files are external data of the same files.
        written: Of each input that the graph writes the output with what lies there afterwards.
        results: Dtype and shape of each output of each operator, by its name and the number.
    """

    model: onnx.ModelProto
    written: Mapping[str, str]
    results: Mapping[tuple[str, int], Desc]


def reference(
    air: Air,
    outputs: Sequence[str] = (),
    shapes: Mapping[str, Sequence[int]] | None = None,
    *,
    rounding: bool = True,
) -> Reference:
    """Return the twin of the model's graph.

    Args:
        air: The file.
        outputs: What to call the outputs; else they are named as atc would name them.
        shapes: Of inputs, in place of what the file says. With these, and be there none, all
            results are inferred from the inputs on, as GE does; else they are what the file says.
        rounding: Whether what is quantised is rounded to int8; else it is cut off only, and an int8
            cache is float32.

    Raises:
        ShapeFault: An operator does not take what comes in.
        InputError: An operator has no body, or the graph is damaged.
    """
    return _Assembly(air.graph, shapes, rounding=rounding).assembled(outputs)


class _Assembly:
    """Goes through the operators in an order that they can run in."""

    def __init__(
        self, graph: Graph, shapes: Mapping[str, Sequence[int]] | None, *, rounding: bool
    ) -> None:
        self.graph = graph
        self.shapes = shapes
        self.ops = graph.by_name()
        self.twin = Twin(rounds=rounding)
        self.between = None if rounding else Between(graph)
        self.values: dict[tuple[str, int], str] = {}
        self.descs: dict[tuple[str, int], Desc] = {}
        self.constants: dict[str, Tensor] = {}
        self.inputs: list[tuple[int, onnx.ValueInfoProto]] = []
        self.written: dict[str, tuple[str, int]] = {}
        """By RefData what holds it once all writers have run."""
        self._behind: dict[str, frozenset[str]] = {}
        self._tensors: dict[str, TensorProto] = {}

    def assembled(self, outputs: Sequence[str]) -> Reference:
        if len(self.ops) != len(self.graph.ops):
            raise _damaged(self.graph, "two operators have one name")
        needs = {op.name: self._needs(op) for op in self.graph.ops}
        try:
            order = list(graphlib.TopologicalSorter(needs).static_order())
        except graphlib.CycleError as error:
            raise _damaged(self.graph, "its operators read each other in a circle") from error
        for name in order:  # a set, so that each knows all that runs ahead of it
            ahead = frozenset(needs[name])
            self._behind[name] = ahead.union(*(self._behind[one] for one in ahead))
        for name in order:
            self._add(self.ops[name])
        results = self._results(outputs)
        written = {name: f"{name}.written" for name in self.written}
        for name, place in self.written.items():
            self.twin.nodes.append(
                helper.make_node("Identity", [self.values[place]], [written[name]])
            )
            results.append(self._info(written[name], self.values[place], self.descs[name, 0]))
        graph = helper.make_graph(
            self.twin.nodes,
            self.graph.name or "air",
            [info for _, info in sorted(self.inputs, key=lambda pair: pair[0])],
            results,
            self.twin.constants,
        )
        opset = helper.make_opsetid("", OPSET)
        model = helper.make_model(graph, opset_imports=[opset], ir_version=_IR_VERSION)
        return Reference(_computed(model), written, self.descs)

    def _needs(self, op: Op) -> list[str]:
        found = [edge.producer for edge in op.edges if edge is not None] + list(op.controls)
        for name in found:
            if name not in self.ops:
                raise _damaged(self.graph, f"{op.type} {op.name} reads {name}, which is not there")
        return found

    def _add(self, op: Op) -> None:
        if op.type in DATA_TYPES:
            self._add_input(op)
        elif op.type in CONST_TYPES:
            self._add_constant(op)
        elif op.type != NET_OUTPUT:
            self._add_op(op)

    def _add_input(self, op: Op) -> None:
        if not op.output_desc:
            raise _damaged(self.graph, f"{op.type} {op.name} says no dtype and shape")
        index = op.attributes.get("index")
        place = index.value if index is not None and isinstance(index.value, int) else 0
        desc = op.output_desc[0]
        if self.shapes is not None and op.name in self.shapes:
            desc = dataclasses.replace(desc, shape=tuple(self.shapes[op.name]))
        if self.between is not None and op.name in self.between.inputs:
            self.twin.floats.add(op.name)
        self.inputs.append((place, self._info(op.name, op.name, desc)))
        self._give(op, [op.name], [desc])

    def _add_constant(self, op: Op) -> None:
        if op.type == "FileConstant":
            desc, name = _file_constant(self.graph, op), f"{op.name}#file"
            self.twin.constants.append(external(op, name, desc))
        else:
            attribute = op.attributes.get("value")
            tensor = None if attribute is None else attribute.value
            if not isinstance(tensor, Tensor):
                raise _damaged(self.graph, f"{op.type} {op.name} has no value")
            desc, name = tensor.desc, f"{op.name}#const"
            self.twin.constants.append(_inline(self.graph, op, name, tensor))
            self.constants[name] = tensor
        self.values[op.name, 0] = name
        self.descs[op.name, 0] = desc

    def _add_op(self, op: Op) -> None:
        body, of = BODIES.get(op.type), prototype(op.type)
        if body is None or of is None:
            raise InputError(
                f"{op.type} {op.name} has no reference on the CPU",
                "omforge has no body for this operator",
                "Run it on a device",
            )
        edges = op.edges
        values = ["" if e is None else self._read(op, e.producer, e.output) for e in edges]
        descs = [
            Desc() if e is None else self.descs.get((e.producer, e.output), Desc()) for e in edges
        ]
        call = Call(op, of, values, descs, self.constants)
        exact = None if self.between is None else self.between.casts.get(op.name)
        before = len(self.twin.nodes)
        if exact is not None:
            results = [self.twin.cast(self.values[exact.producer, exact.output], FLOAT)]
        else:
            results = self._laid_out(call)
        if self.shapes is None:
            self._give(op, results, op.output_desc)
        else:
            self._give(op, results, self._inferred(call, before, results, exact))
        if exact is not None or (op.type in CARRIERS and self.twin.floats.intersection(values)):
            described = zip(results, op.output_desc, strict=False)
            self.twin.floats.update(value for value, desc in described if desc.dtype in INTEGERS)
        slots = by_slot(of.inputs, input_names(op))
        for name in of.refs:
            for at in slots.get(name, []):
                edge = edges[at] if at < len(edges) else None
                owner = None if edge is None else self._owner(edge.producer, edge.output)
                if owner is not None:
                    output = [slot.name for slot in of.outputs].index(name)
                    self.written[owner] = (op.name, output)

    def _laid_out(self, call: Call) -> list[str]:
        body = BODIES[call.op.type]
        if self.shapes is None:
            return body(self.twin, call)
        try:
            return body(self.twin, call)
        except (IndexError, KeyError, TypeError, ValueError, ZeroDivisionError) as error:
            raise ShapeFault(call.op, f"{type(error).__name__}: {error}") from error

    def _inferred(
        self, call: Call, before: int, results: Sequence[str], exact: Edge | None
    ) -> list[Desc]:
        """Dtype and shape of what comes out of an operator, whose nodes are those from `before`."""
        read = dict(zip(call.values, call.descs, strict=True))
        if exact is not None:
            place = (exact.producer, exact.output)
            read[self.values[place]] = self.descs[place]
        known = {
            value: dataclasses.replace(desc, dtype=FLOAT) if value in self.twin.floats else desc
            for value, desc in read.items()
            if value
        }
        for tensor in self.twin.constants[len(self._tensors) :]:
            self._tensors[tensor.name] = tensor
        found = infer(call.op, self.twin.nodes[before:], results, known, self._tensors)
        if self.between is None:
            return found
        # What is not rounded stays float32, and is described as what it would be.
        stated = zip(call.op.output_desc, found, strict=False)
        return [dataclasses.replace(desc, dtype=own.dtype) for own, desc in stated]

    def _owner(self, producer: str, output: int) -> str | None:
        """The RefData that a value is: itself, or what a writer gave back."""
        op = self.ops[producer]
        if op.type == "RefData":
            return producer
        return next((n for n, place in self.written.items() if place == (producer, output)), None)

    def _read(self, op: Op, producer: str, output: int) -> str:
        value = self.values.get((producer, output))
        if value is None:
            raise _damaged(self.graph, f"{op.name} reads output {output} of {producer}")
        if self.ops[producer].type != "RefData":
            return value
        writers_ = [w for w in self.graph.ops if self._writes(w, producer) and w.name != op.name]
        if not writers_:
            return value
        behind = self._behind[op.name]
        if all(w.name in behind for w in writers_):
            return self.values[self.written[producer]]
        if all(op.name in self._behind[w.name] for w in writers_):
            return value
        desc = self.descs[producer, 0]
        dtype = FLOAT if value in self.twin.floats else desc.dtype
        number = np.nan if dtype.startswith(("float", "bfloat")) else -1
        rubbish = self.twin.constant(number, dtype)
        return self.twin.op("Expand", rubbish, self.twin.op("Shape", value))

    def _writes(self, op: Op, ref_data: str) -> bool:
        """Whether an operator takes this RefData, as it comes in, to write it."""
        of = prototype(op.type)
        if of is None or not of.refs:
            return False
        slots, edges = by_slot(of.inputs, input_names(op)), op.edges
        places = [at for name in of.refs for at in slots.get(name, []) if at < len(edges)]
        return any(
            edge is not None and edge.producer == ref_data for edge in (edges[at] for at in places)
        )

    def _give(self, op: Op, results: Sequence[str], descs: Sequence[Desc]) -> None:
        for index, value in enumerate(results):
            self.values[op.name, index] = value
            if index < len(descs):
                self.descs[op.name, index] = descs[index]

    def _results(self, names: Sequence[str]) -> list[onnx.ValueInfoProto]:
        ends = [op for op in self.graph.ops if op.type == NET_OUTPUT]
        if len(ends) != 1:
            raise _damaged(self.graph, f"it has {len(ends)} NetOutput, must have one")
        found: list[onnx.ValueInfoProto] = []
        for index, edge in enumerate(ends[0].edges):
            if edge is None:
                raise _damaged(self.graph, f"nothing is connected to its output {index}")
            # As atc names the outputs of graphs that have no names of tensors.
            name = f"output_{index}_{edge.producer}_{edge.output}"
            name = names[index] if index < len(names) else name
            value = self._read(ends[0], edge.producer, edge.output)
            self.twin.nodes.append(helper.make_node("Identity", [value], [name]))
            found.append(self._info(name, value, self.descs[edge.producer, edge.output]))
        return found

    def _info(self, name: str, value: str, desc: Desc) -> onnx.ValueInfoProto:
        shape = [f"{name}.{at}" if dim < 0 else dim for at, dim in enumerate(desc.shape or ())]
        dtype = FLOAT if value in self.twin.floats else desc.dtype
        return helper.make_tensor_value_info(name, onnx_dtype(dtype, name), shape)


def _computed(model: onnx.ModelProto) -> onnx.ModelProto:
    """The same in float32 where the graph is in bfloat16, for which the CPU has no kernels."""
    narrow = ir.from_proto(model)
    wide = computed_wide(narrow)
    return model if wide is narrow else ir.to_proto(wide)


def _inline(graph: Graph, op: Op, name: str, tensor: Tensor) -> TensorProto:
    shape = tensor.desc.shape or ()
    dtype = onnx_dtype(tensor.desc.dtype, op.name)
    if any(dim < 0 for dim in shape):
        raise _damaged(graph, f"{op.type} {op.name} has a size below zero")
    return helper.make_tensor(name, dtype, shape, tensor.data, raw=True)


def _file_constant(graph: Graph, op: Op) -> Desc:
    shape, dtype = op.attributes.get("shape"), op.attributes.get("dtype")
    if shape is None or dtype is None or not isinstance(dtype.value, str):
        raise _damaged(graph, f"FileConstant {op.name} says no shape or no dtype")
    dims = tuple(item for item in shape.items or () if isinstance(item, int))
    return Desc("y", dtype.value, dims)


def external(op: Op, name: str, desc: Desc) -> TensorProto:
    """A constant in a file, as ONNX's external data of the same file."""
    tensor = TensorProto(
        name=name, data_type=onnx_dtype(desc.dtype, op.name), dims=desc.shape or ()
    )
    tensor.data_location = TensorProto.EXTERNAL
    for key, attribute in (("location", "location"), ("offset", "offset"), ("length", "length")):
        found = op.attributes.get(attribute)
        if key == "location" and found is None:
            found = op.attributes.get("file_path")
        if found is not None and found.value not in (None, 0):  # a length of 0: all of it
            tensor.external_data.add(key=key, value=str(found.value))
    return tensor


def location_folder(path: str | os.PathLike[str]) -> Path:
    """The folder that relative locations in a file are meant from: its own."""
    return Path(path).absolute().parent


def _damaged(graph: Graph, why: str) -> InputError:
    return InputError(f"the graph {graph.name} is damaged", why, "`omforge check` lists its faults")
