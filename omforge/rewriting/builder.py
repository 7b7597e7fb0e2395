"""Recording the nodes of a replacement, without touching the graph.

`Builder` is the second namespace of a pass: in `rewrite`, `op.RMSNormalization(x, gamma, axis=-1)`
makes a node that exists on its own until `splice` puts it into the graph.
"""

import hashlib
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from typing import Any, Protocol, Self, TypeAlias, cast, overload

import numpy as np
import numpy.typing as npt
from onnx import defs

from omforge import ir
from omforge.ir.errors import InputError
from omforge.rewriting import schema

Number: TypeAlias = bool | int | float
Input: TypeAlias = ir.Value | Number | Sequence[Number] | npt.NDArray[Any] | None


class BuilderCall(Protocol):
    """What `op.Name` is: inputs by position, attributes by name."""

    @overload
    def __call__(
        self, *inputs: Input, _domain: str = "", _outputs: None = None, **attributes: Any
    ) -> ir.Value: ...
    @overload
    def __call__(
        self, *inputs: Input, _domain: str = "", _outputs: int, **attributes: Any
    ) -> tuple[ir.Value, ...]: ...
    def __call__(self, *inputs: Any, **attributes: Any) -> Any:
        """Return the node's output, or all of them with `_outputs=2`."""
        ...


class Builder:
    """Records new nodes: `op.Mul(x, 2.0)`, `op.Split(x, axis=0, _outputs=2)`.

    Attributes are given as Python values, and typed by the operator's schema. A number given as an
    input becomes an initializer with the dtype that the schema asks for (that of the operands which
    share its type, int64 for axes and shapes); a list is one-dimensional, an array stays as it is.
    Equal constants are one initializer, whose name says what it holds.

    Recorded nodes are users of their inputs at once. Build under `with Builder(model) as op:`,
    which takes back whatever did not go into the graph.

    Args:
        model: The model that the nodes are for; it decides the opset.
        graph: The graph that they will go into, the main one by default.

    Attributes:
        nodes: The new nodes in the order in which they were made.
        constants: The new initializers by name.
    """

    def __init__(self, model: ir.Model, graph: ir.Graph | None = None) -> None:
        self.model = model
        self.graph = model.graph if graph is None else graph
        self.nodes: list[ir.Node] = []
        self.constants: dict[str, ir.Value] = {}
        self._names: set[str] | None = None

    def __getattr__(self, op_type: str) -> BuilderCall:
        if op_type.startswith("_"):
            raise AttributeError(op_type)

        def call(
            *inputs: Input, _domain: str = "", _outputs: int | None = None, **attributes: Any
        ) -> Any:
            node = self.node(op_type, inputs, attributes, domain=_domain, outputs=_outputs or 1)
            return node.outputs[0] if _outputs is None else tuple(node.outputs)

        return call

    def node(
        self,
        op_type: str,
        inputs: Sequence[Input],
        attributes: Mapping[str, Any],
        *,
        domain: str = "",
        outputs: int = 1,
    ) -> ir.Node:
        """Record a node; `op.Name(...)` is the short form.

        Raises:
            InputError: The model's opset does not have the operator.
            TypeError: The operator does not have an attribute of that name, or takes another number
                of inputs or outputs.
        """
        found = self._schema(op_type, domain)
        if found is not None:
            schema.require_arity(
                op_type,
                schema.Arity(found.min_input, found.max_input, found.max_output),
                len(inputs),
                outputs,
            )
        operands = self._operands(found, inputs)
        node = ir.Node(
            domain,
            op_type,
            operands,
            [
                _attribute(found, op_type, name, value)
                for name, value in attributes.items()
                if value is not None
            ],
            num_outputs=outputs,
        )
        # A number beside this output, in the next node, takes its dtype.
        dtypes = _dtypes(schema.input_types(found, len(operands)), operands)
        for value, variable in zip(node.outputs, schema.output_types(found, outputs), strict=False):
            if op_type == "Cast":
                value.dtype = ir.DataType(node.attributes["to"].as_int())
            elif variable in dtypes:
                value.dtype = dtypes[variable]
        self.nodes.append(node)
        return node

    def constant(self, array: npt.ArrayLike | ir.TensorProtocol, name: str = "") -> ir.Value:
        """Return an initializer, the one that the graph has already if it holds the same.

        Args:
            array: The numbers; a tensor of the IR is taken as it is, and may be external.
            name: Its name, with a number after it if that is taken; tells the content by default.
        """
        tensor = _tensor(array)
        wanted = name or _content_name(tensor)
        unique, count = wanted, 0
        while (known := self._initializer(unique)) is not None or (
            name and unique in self._value_names()
        ):
            if not name and known is not None and _holds(known, tensor):
                return known
            count += 1
            unique = f"{wanted}_{count}"
        value = ir.Value(
            name=unique,
            shape=ir.Shape(tensor.shape.numpy()),
            type=ir.TensorType(tensor.dtype),
            const_value=tensor,
        )
        self.constants[unique] = value
        return value

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.discard()

    def discard(self) -> None:
        """Take nodes that did not go into a graph off the users of their inputs."""
        for node in self.nodes:
            if node.graph is None:
                for index in range(len(node.inputs)):
                    node.replace_input_with(index, None)

    def _value_names(self) -> set[str]:
        """What inputs and nodes of the graph call their values; read when it is asked for first."""
        if self._names is None:
            made = (value for node in self.graph for value in node.outputs)
            self._names = {value.name or "" for value in (*self.graph.inputs, *made)}
        return self._names

    def _initializer(self, name: str) -> ir.Value | None:
        return self.constants.get(name) or self.graph.initializers.get(name)

    def _schema(self, op_type: str, domain: str) -> defs.OpSchema | None:
        opset = self.model.opset_imports.get(domain, schema.LATEST)
        found = schema.find(op_type, domain, opset)
        latest = schema.find(op_type, domain, schema.LATEST)
        if found is None and latest is not None:
            raise InputError(
                f"a rewrite makes {op_type}",
                f"it came with opset {latest.since_version}, and the model has opset {opset}",
                "Run convert-opset before",
            )
        return found

    def _operands(
        self, found: defs.OpSchema | None, inputs: Sequence[Input]
    ) -> list[ir.Value | None]:
        formal = schema.input_types(found, len(inputs))
        dtypes = _dtypes(formal, inputs)
        return [
            self._operand(value, dtypes.get(variable), allowed)
            for (variable, allowed), value in zip(formal, inputs, strict=True)
        ]

    def _adopted(self, value: ir.Value) -> ir.Value:
        """The value, or an initializer for a number that a matcher worked out, in no graph yet."""
        if value.const_value is None or value.producer() is not None or value.graph is not None:
            return value
        known = self.constants.get(str(value.name)) is value
        return value if known else self.constant(value.const_value)

    def _operand(
        self, value: Input, dtype: ir.DataType | None, allowed: frozenset[str]
    ) -> ir.Value | None:
        if value is None:
            return value
        if isinstance(value, ir.Value):
            return self._adopted(value)
        array = np.asarray(value)
        if isinstance(value, np.ndarray):
            return self.constant(array)
        if dtype is None:
            # No operand shares the type: an axis, a shape, a scale.
            floats = array.dtype.kind == "f" or (allowed and "tensor(int64)" not in allowed)
            dtype = ir.DataType.FLOAT if floats else ir.DataType.INT64
        return self.constant(array.astype(dtype.numpy()))


def _dtypes(
    formal: Sequence[tuple[str, frozenset[str]]], inputs: Sequence[Input]
) -> dict[str, ir.DataType]:
    """The dtypes of a schema's type variables, as far as the inputs tell."""
    return {
        variable: value.dtype
        for (variable, _), value in zip(formal, inputs, strict=True)
        if isinstance(value, ir.Value) and value.dtype is not None
    }


def _attribute(found: defs.OpSchema | None, op_type: str, name: str, value: Any) -> ir.Attr:
    if found is not None and name not in found.attributes:
        close = get_close_matches(name, list(found.attributes), n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise TypeError(f"{op_type} has no attribute {name!r}{hint}")
    kind = schema.attribute_type(found, name)
    if isinstance(value, int):  # True and DataType.FLOAT are integers in ONNX
        value = float(value) if kind is ir.AttributeType.FLOAT else int(value)
    elif isinstance(value, np.ndarray):
        value = ir.tensor(cast("npt.NDArray[Any]", value))
    elif isinstance(value, list | tuple) and kind is ir.AttributeType.FLOATS:
        value = [float(element) for element in cast("Sequence[float]", value)]
    return ir.convenience.convert_attribute(name, cast("Any", value), kind)


def _tensor(array: npt.ArrayLike | ir.TensorProtocol) -> ir.TensorProtocol:
    if isinstance(array, ir.TensorProtocol):
        return array
    return ir.Tensor(np.ascontiguousarray(array).reshape(np.shape(array)))


def _content_name(tensor: ir.TensorProtocol) -> str:
    kind = tensor.dtype.name.lower()
    shape = tensor.shape.numpy()
    if not shape:
        return f"const_{kind}_{tensor.numpy().item()}"
    if len(shape) == 1 and shape[0] <= 8:
        return f"const_{kind}_[{','.join(map(str, tensor.numpy().tolist()))}]"
    digest = hashlib.sha256(tensor.tobytes()).hexdigest()[:12]
    return f"const_{kind}_{'x'.join(map(str, shape))}_{digest}"


def _holds(value: ir.Value, tensor: ir.TensorProtocol) -> bool:
    known = value.const_value
    return (
        known is not None
        and not value.is_graph_input()
        and known.dtype == tensor.dtype
        and known.shape.numpy() == tensor.shape.numpy()
        and known.tobytes() == tensor.tobytes()
    )
