"""What GE's type and shape inference finds in a graph: it runs behind the parser, on every node.

One model of it, for our check and for the simulated atc. Shapes are taken from `omforge.ir.infer`,
which describes; here a node is held against them:

- shapes that do not fit each other, by ONNX's own inference and by `ge_shape_rules` where that is
  more lenient than GE or a kernel;
- dtypes that differ where the operator has one type for several inputs, as GE makes them (its TopK
  gives int32, whatever ONNX says);
- sizes that only data decide, where a static graph has none (`data/ge_sizes.tsv`).
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import onnx

from omforge import ir
from omforge.ir.values import MAX_TRACKED, dims
from omforge.lowering.ge_shape_rules import misfit_of_shapes
from omforge.lowering.plugins import plugin_facts, plugin_node
from omforge.lowering.tables import table_rows
from omforge.lowering.target import dtype_name
from omforge.lowering.value_bounds import inline_numbers, integers, stored

Kind = Literal["shapes", "dtypes", "sizes", "output"]

_BRANCHING = (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS)
_RANDOM = frozenset(("Bernoulli", "Multinomial", "RandomNormal", "RandomUniform"))


@dataclass(frozen=True)
class Misfit:
    """One thing that inference refuses, or makes otherwise than the graph says."""

    node: ir.Node
    kind: Kind
    what: str
    why: str
    source: str = ""


@dataclass(frozen=True)
class SizeByValue:
    """An operator whose result's size its inputs' values decide."""

    op: str
    inputs: tuple[int, ...] | None
    """Which inputs; None for all of their data, whatever is known of them."""
    decides: str
    source: str


@functools.cache
def sizes_by_value() -> Mapping[str, SizeByValue]:
    """The operators of `data/ge_sizes.tsv`."""
    found: dict[str, SizeByValue] = {}
    for row in table_rows("ge_sizes.tsv"):
        inputs = None if row["inputs"] == "*" else tuple(map(int, row["inputs"].split(",")))
        found[row["op"]] = SizeByValue(row["op"], inputs, row["decides"], row["source"])
    return found


class GeInference:
    """Inference over one model, whose values `omforge.ir.infer` has given shapes.

    Args:
        model: Nothing of it is changed.
        opset: The default domain's opset.
    """

    def __init__(self, model: ir.Model, opset: int) -> None:
        self._model = model
        self._opset = opset
        self._dtypes: dict[int, ir.DataType] = {}
        self._fixed: dict[int, bool] = {}
        self._dynamic: set[int] = set()
        self._told: dict[_Question, str] = {}
        self._nodes = list(_in_order(model.graph))

    def misfits(self) -> Iterator[Misfit]:
        """Everything that is found, in the order of the nodes."""
        for node in self._nodes:
            if node.domain not in ("", "ai.onnx", "npu"):
                continue
            schema = None if node.domain == "npu" else _schema(node.op_type, self._opset)
            yield from self._sizes(node)
            if schema is None:
                yield from self._shapes(node, schema)
                continue
            yield from self._dtypes_of(node, schema)
            yield from self._shapes(node, schema)
        for value in self._model.graph.outputs:
            found = self._dtypes.get(id(value))
            producer = value.producer()
            if found is not None and producer is not None and value.dtype not in (None, found):
                yield Misfit(
                    producer,
                    "output",
                    f"output {value.name} comes out as {dtype_name(found)}",
                    f"the model says {dtype_name(value.dtype)}",
                )

    # --- dtypes ---------------------------------------------------------------------------------

    def dtype(self, value: ir.Value | None) -> ir.DataType | None:
        """The dtype that GE gives a value."""
        return None if value is None else self._dtypes.get(id(value), value.dtype)

    def _dtypes_of(self, node: ir.Node, schema: Any) -> Iterator[Misfit]:
        bound: dict[str, tuple[str, ir.DataType]] = {}
        for index, value in enumerate(node.inputs):
            formal = _formal(schema.inputs, index)
            dtype = self.dtype(value)
            if value is None or dtype is None or formal is None or not _is_variable(schema, formal):
                continue
            variable = _one_dtype(node, index, formal.type_str)
            first = bound.setdefault(variable, (formal.name, dtype))
            if first[1] != dtype:
                yield Misfit(
                    node,
                    "dtypes",
                    f"{node.op_type} with {dtype_name(first[1])} and {dtype_name(dtype)}",
                    self._why_differs(node, first[0], formal.name),
                )
                break
        self._set_dtypes(node, schema, bound)

    def _why_differs(self, node: ir.Node, left: str, right: str) -> str:
        changed = [
            f"{dtype_name(value.dtype)} of ONNX is {dtype_name(self._dtypes[id(value)])} in GE here"
            for value in node.inputs
            if value is not None and self._dtypes.get(id(value)) not in (None, value.dtype)
        ]
        told = (
            f"inputs {left} and {right} have one dtype" if left != right else "all have one dtype"
        )
        return "; ".join([told, *changed])

    def _set_dtypes(
        self, node: ir.Node, schema: Any, bound: Mapping[str, tuple[str, ir.DataType]]
    ) -> None:
        for index, output in enumerate(node.outputs):
            formal = _formal(schema.outputs, index)
            found = None if formal is None else bound.get(formal.type_str)
            if found is not None and output.dtype is not None and found[1] != output.dtype:
                self._dtypes[id(output)] = found[1]
        if node.op_type == "Pow":
            self._promote(node)
        facts = [f for f in plugin_facts(node.op_type, self._opset) if f.kind == "output"]
        if not facts:
            return
        seen = plugin_node(node)
        for fact in facts:
            index, _, name = fact.attribute.partition(":")
            if fact.broken_by(seen) and int(index) < len(node.outputs):
                self._dtypes[id(node.outputs[int(index)])] = _DTYPES[name]

    def _promote(self, node: ir.Node) -> None:
        """Pow is of the wider dtype of base and exponent, where ONNX has the base's.

        Source: hicann/ops-math:math/pow/op_graph/pow_proto.h (Promote).
        """
        base, exponent = (self.dtype(value) for value in node.inputs[:2])
        if base is None or exponent is None or base == exponent:
            return
        found = _promoted(base, exponent)
        if found != node.outputs[0].dtype:
            self._dtypes[id(node.outputs[0])] = found

    # --- sizes ----------------------------------------------------------------------------------

    def _sizes(self, node: ir.Node) -> Iterator[Misfit]:
        row = sizes_by_value().get(node.op_type)
        given = [value for value in node.inputs if value is not None]
        decisive = (
            []
            if row is None
            else given
            if row.inputs is None
            else [node.inputs[i] for i in row.inputs if i < len(node.inputs)]
        )
        loose = [value for value in decisive if value is not None and not self.fixed(value)]
        if row is not None and loose:
            names = ", ".join(value.name or "" for value in loose)
            yield Misfit(
                node,
                "sizes",
                f"the size of {node.op_type}'s result depends on data",
                f"not known before the run: its {row.decides}, {names}",
                row.source,
            )
        if loose or any(id(value) in self._dynamic for value in given):
            self._dynamic.update(
                id(output) for output in node.outputs if loose or not _is_static(output)
            )

    def fixed(self, value: ir.Value) -> bool:
        """Whether GE knows the value when it compiles: a constant, or computed of such."""
        known = self._fixed.get(id(value))
        if known is None:
            self._fixed[id(value)] = False  # in a cycle nothing is known
            known = self._fixed[id(value)] = self._is_fixed(value)
        return known

    def _is_fixed(self, value: ir.Value) -> bool:
        if value.is_initializer() or stored(value) is not None:
            return True
        node = value.producer()
        if node is None:
            return False
        if node.op_type in ("Shape", "Size"):
            source = node.inputs[0] if node.inputs else None
            return source is None or id(source) not in self._dynamic
        if node.op_type in _RANDOM or any(a.type in _BRANCHING for a in node.attributes.values()):
            return False
        return all(each is None or self.fixed(each) for each in node.inputs)

    # --- shapes ---------------------------------------------------------------------------------

    def _shapes(self, node: ir.Node, schema: Any) -> Iterator[Misfit]:
        if any(a.type in _BRANCHING for a in node.attributes.values()):
            return
        found = misfit_of_shapes(node, self._opset)
        question = None if found or schema is None else _question(node, self._opset)
        if question is not None:
            if question not in self._told:
                self._told[question] = _refused_by_onnx(node, schema, question)
            found = self._told[question]
        if found:
            shapes = " and ".join(_shown(value) for value in node.inputs if value is not None)
            yield Misfit(node, "shapes", f"{node.op_type} of {shapes}", found)


def _in_order(graph: ir.Graph) -> Iterator[ir.Node]:
    """The nodes so that each comes behind what it reads, those of branches before their node."""
    made: set[int] = set()
    waiting: list[tuple[ir.Node, bool]] = [(node, False) for node in reversed(list(graph))]
    while waiting:
        node, ready = waiting.pop()
        if id(node) in made and not ready:
            continue
        if ready:
            yield node
            continue
        made.add(id(node))
        waiting.append((node, True))
        for attribute in node.attributes.values():
            if attribute.type == ir.AttributeType.GRAPH:
                waiting += [(inner, False) for inner in reversed(list(attribute.as_graph()))]
        for value in node.inputs:
            producer = None if value is None else value.producer()
            if producer is not None and id(producer) not in made:
                waiting.append((producer, False))


@functools.cache
def _schema(op_type: str, opset: int) -> Any:
    try:
        return onnx.defs.get_schema(op_type, opset, "")
    except onnx.defs.SchemaError:
        return None


def _formal(formals: Any, index: int) -> Any:
    """The formal parameter of one input or output; the last may be variadic."""
    if index < len(formals):
        return formals[index]
    variadic = onnx.defs.OpSchema.FormalParameterOption.Variadic
    last = formals[-1] if formals else None
    return last if last is not None and last.option == variadic else None


def _is_variable(schema: Any, formal: Any) -> bool:
    if formal.option == onnx.defs.OpSchema.FormalParameterOption.Variadic and (
        not formal.is_homogeneous
    ):
        return False
    return any(each.type_param_str == formal.type_str for each in schema.type_constraints)


def _one_dtype(node: ir.Node, index: int, variable: str) -> str:
    """OneHot's plugin adds the depth to the indices, so that these two have one dtype."""
    return "indices and depth" if node.op_type == "OneHot" and index < 2 else variable


def _promoted(left: ir.DataType, right: ir.DataType) -> ir.DataType:
    """The dtype that holds both: floats before integers, the wider before the narrower."""
    if left.is_floating_point() != right.is_floating_point():
        return left if left.is_floating_point() else right
    if left.is_floating_point() and left.bitwidth == right.bitwidth:
        return ir.DataType.FLOAT  # float16 and bfloat16
    return left if left.bitwidth >= right.bitwidth else right


def _is_static(value: ir.Value) -> bool:
    return value.shape is not None and value.shape.is_static()


_DTYPES: Mapping[str, ir.DataType] = {
    "int32": ir.DataType.INT32,
    "float32": ir.DataType.FLOAT,
}


@dataclass(frozen=True)
class _Question:
    """What ONNX is asked about a node: the layers of a model ask the same ones."""

    op: str
    opset: int
    attributes: tuple[tuple[str, str], ...]
    types: tuple[tuple[int, tuple[int | str | None, ...] | None] | None, ...]
    data: tuple[bytes | None, ...]
    outputs: int


def _question(node: ir.Node, opset: int) -> _Question | None:
    """The question; None where an input has no type, or nothing is given."""
    types: list[tuple[int, tuple[int | str | None, ...] | None] | None] = []
    data: list[bytes | None] = []
    for value in node.inputs:
        if value is None:
            types.append(None)
            data.append(None)
            continue
        if value.dtype is None or not isinstance(value.type, ir.TensorType):
            return None
        shape = value.shape
        dims = None if shape is None else tuple(d if isinstance(d, int) else d.value for d in shape)
        types.append((int(value.dtype), dims))
        tensor = _data(value)
        data.append(None if tensor is None else tensor.SerializeToString())
    attributes = tuple((name, repr(item.value)) for name, item in sorted(node.attributes.items()))
    if not types:
        return None
    counted = len(node.outputs)
    return _Question(node.op_type, opset, attributes, tuple(types), tuple(data), counted)


def _refused_by_onnx(node: ir.Node, schema: Any, question: _Question) -> str:
    """What ONNX's inference for the operator says of the shapes; "" where it takes them."""
    names = [f"x{at}" if given else "" for at, given in enumerate(question.types)]
    types = {
        name: onnx.helper.make_tensor_type_proto(*given)
        for name, given in zip(names, question.types, strict=True)
        if given is not None
    }
    data = {
        name: onnx.TensorProto.FromString(given)
        for name, given in zip(names, question.data, strict=True)
        if given is not None
    }
    asked = onnx.NodeProto(op_type=node.op_type, input=names)
    asked.output.extend(f"y{at}" for at in range(question.outputs))
    asked.attribute.extend(ir.to_proto(item) for item in node.attributes.values())
    imports = [onnx.helper.make_opsetid("", question.opset)]
    try:
        onnx.shape_inference.infer_node_outputs(schema, asked, types, data, opset_imports=imports)
    except onnx.shape_inference.InferenceError as error:
        kind, _, text = str(error).partition("]")
        # An attribute that does not fit the shapes is a matter of types to ONNX.
        if "ShapeInferenceError" not in kind and "attribute" not in text:
            return ""
        return text.partition("(op_type")[0].strip(" :.\n")
    except (RuntimeError, ValueError, onnx.checker.ValidationError):
        return ""  # of another matter than shapes: types, attributes
    return ""


def _data(value: ir.Value) -> onnx.TensorProto | None:
    numbers = inline_numbers(value, limit=MAX_TRACKED)
    if numbers is not None:
        return onnx.numpy_helper.from_array(numbers)
    known = integers(value)
    dtype = value.dtype
    if known is None or dtype is None or dtype not in (ir.DataType.INT64, ir.DataType.INT32):
        return None
    shape = [] if value.shape is None or value.shape.rank() == 0 else [len(known)]
    return onnx.helper.make_tensor("", int(dtype), shape, known)


def _shown(value: ir.Value) -> str:
    shape = dims(value)
    return "?" if shape is None else f"[{', '.join(map(str, shape))}]"
