"""What the bodies of GE operators are made of: ONNX nodes, and an operator's slots by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper

from omforge.air.ge_types import ge_dtype
from omforge.air.graph import Desc, Item, Op, Tensor
from omforge.air.names import by_slot, input_names, output_names
from omforge.air.prototypes import Prototype
from omforge.ir.errors import InputError

Array = npt.NDArray[Any]

OPSET = 21  # the first whose Cast takes int4

ONNX_DTYPES: Mapping[str, int] = {
    "float32": TensorProto.FLOAT,
    "float16": TensorProto.FLOAT16,
    "bfloat16": TensorProto.BFLOAT16,
    "float64": TensorProto.DOUBLE,
    "int8": TensorProto.INT8,
    "uint8": TensorProto.UINT8,
    "int16": TensorProto.INT16,
    "uint16": TensorProto.UINT16,
    "int32": TensorProto.INT32,
    "uint32": TensorProto.UINT32,
    "int64": TensorProto.INT64,
    "uint64": TensorProto.UINT64,
    "bool": TensorProto.BOOL,
    "int4": TensorProto.INT4,
}
_NUMPY: Mapping[str, Any] = {"bfloat16": ml_dtypes.bfloat16}


def onnx_dtype(name: str, where: str) -> int:
    """Return ONNX's number of a dtype.

    Raises:
        InputError: ONNX Runtime has none such.
    """
    if name not in ONNX_DTYPES:
        raise InputError(
            f"{where} is {name}", "the CPU's reference has no such numbers", "Use another dtype"
        )
    return ONNX_DTYPES[name]


@dataclass
class Twin:
    """The ONNX graph under construction; values go by their names.

    Attributes:
        nodes: In order.
        constants: Those of the file, and those that bodies need.
        rounds: Whether what is quantised is rounded; else it is cut off only.
        floats: Values that are float32 although the file says integers: they are not rounded.
    """

    nodes: list[onnx.NodeProto] = field(default_factory=list[onnx.NodeProto])
    constants: list[TensorProto] = field(default_factory=list[TensorProto])
    rounds: bool = True
    floats: set[str] = field(default_factory=set[str])
    _made: int = 0
    _known: dict[tuple[str, tuple[int, ...], bytes], str] = field(
        default_factory=dict[tuple[str, tuple[int, ...], bytes], str]
    )

    def fresh(self, hint: str) -> str:
        """Return a name that no other value has."""
        self._made += 1
        return f"{hint}#{self._made}"

    def op(self, op_type: str, *inputs: str, **attributes: Any) -> str:
        """Add a node of one output; return it."""
        return self.ops(op_type, 1, *inputs, **attributes)[0]

    def ops(self, op_type: str, count: int, *inputs: str, **attributes: Any) -> list[str]:
        """Add a node of several outputs; return them."""
        given = list(inputs)
        while given and not given[-1]:
            given.pop()
        outputs = [self.fresh(op_type) for _ in range(count)]
        # Names make what ONNX Runtime says of a node readable.
        self.nodes.append(helper.make_node(op_type, given, outputs, outputs[0], **attributes))
        return outputs

    def constant(self, array: npt.ArrayLike, dtype: str = "") -> str:
        """Return a constant; the same numbers give the same."""
        numbers = np.asarray(array)
        numbers = numbers.astype(_NUMPY.get(dtype, dtype)) if dtype else numbers
        name = dtype or numbers.dtype.name
        key = (name, numbers.shape, numbers.tobytes())
        if key not in self._known:
            self._known[key] = self.fresh("constant")
            self.constants.append(
                helper.make_tensor(
                    self._known[key], ONNX_DTYPES[name], numbers.shape, numbers.tobytes(), raw=True
                )
            )
        return self._known[key]

    def integers(self, values: Sequence[int]) -> str:
        """Return a constant int64 list: a shape, axes, sizes."""
        return self.constant(np.asarray(values, np.int64))

    def cast(self, x: str, dtype: str) -> str:
        """Return x in another dtype."""
        return self.op("Cast", x, to=ONNX_DTYPES[dtype])

    def reshape(self, x: str, shape: Sequence[int]) -> str:
        """Return x in another shape; one dim may be -1, and none 0 but in an empty tensor."""
        return self.op("Reshape", x, self.integers(shape), allowzero=int(0 in shape))

    def is_constant(self, value: str) -> bool:
        """Whether a value is a constant of the file."""
        return any(tensor.name == value for tensor in self.constants)

    def respelled(self, call: Call, value: str, desc: Desc) -> str:
        """Return a constant of the file as another dtype and shape over the same bytes.

        Raises:
            InputError: It is computed.
        """
        found = next((tensor for tensor in self.constants if tensor.name == value), None)
        if found is None:
            raise call.fault("what it reads as packed integers is no constant")
        name = f"{value}:{desc.dtype}"
        if all(tensor.name != name for tensor in self.constants):
            other = TensorProto()
            other.CopyFrom(found)
            other.name, other.data_type = name, ONNX_DTYPES[desc.dtype]
            del other.dims[:]
            other.dims.extend(desc.shape or ())
            self.constants.append(other)
        return name

    def slice(self, x: str, axis: int, start: int, end: int) -> str:
        """Return x[..., start:end, ...] along an axis."""
        return self.op(
            "Slice", x, self.integers([start]), self.integers([end]), self.integers([axis])
        )


@dataclass(frozen=True)
class Call:
    """One GE operator, its slots by the names of its prototype."""

    op: Op
    prototype: Prototype
    values: Sequence[str]
    """The ONNX value of each input slot, "" where nothing is connected."""
    descs: Sequence[Desc]
    """What comes into each input slot."""
    constants: Mapping[str, Tensor]
    """The constants that are in the file, by the name of their ONNX value."""

    def input(self, name: str) -> str:
        """The ONNX value of an input, "" where it is not connected."""
        return next(iter(self.inputs(name)), "")

    def inputs(self, name: str) -> list[str]:
        """The ONNX values of a dynamic input, or of another the one or none."""
        return [self.values[at] for at in self._places(name) if at < len(self.values)]

    def desc(self, name: str) -> Desc:
        """Dtype and shape of an input; of a dynamic one, of its first."""
        places = [at for at in self._places(name) if at < len(self.descs)]
        return self.descs[places[0]] if places else Desc()

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of an input.

        Raises:
            InputError: The file does not say it.
        """
        found = self.desc(name).shape
        if found is None:
            raise self.fault(f"the shape of its input {name} is not said")
        return found

    def output(self, index: int = 0) -> Desc:
        """Dtype and shape of an output."""
        descs = self.op.output_desc
        return descs[index] if index < len(descs) else Desc()

    def result_shape(self, index: int = 0) -> tuple[int, ...]:
        """The shape of an output.

        Raises:
            InputError: The file does not say it.
        """
        found = self.output(index).shape
        if found is None:
            raise self.fault(f"the shape of its output {index} is not said")
        return found

    def outputs(self, name: str) -> list[int]:
        """The places of a dynamic output."""
        return by_slot(self.prototype.outputs, output_names(self.op)).get(name, [])

    def integer(self, name: str, default: int | None = None) -> int:
        """The value of an Int attribute."""
        value = self._value(name, default)
        return value if isinstance(value, int) else int(default or 0)

    def number(self, name: str, default: float) -> float:
        """The value of a Float attribute."""
        value = self._value(name, default)
        return float(value) if isinstance(value, int | float) else default

    def flag(self, name: str, default: bool = False) -> bool:
        """The value of a Bool attribute."""
        return bool(self._value(name, default))

    def text(self, name: str, default: str = "") -> str:
        """The value of a String attribute."""
        return str(self._value(name, default))

    def integers(self, name: str, default: Sequence[int] | None = None) -> list[int]:
        """The value of a ListInt attribute."""
        found = self.op.attributes.get(name)
        if found is None and default is None:
            raise self.fault(f"it has no attribute {name}")
        items = (default or ()) if found is None else (found.items or ())
        return [item for item in items if isinstance(item, int)]

    def dtype(self, name: str, default: str = "") -> str:
        """The dtype that an attribute says: of type Type, or an Int with GE's number."""
        value = self._value(name, default)
        if isinstance(value, str) and value:
            return value
        return ge_dtype(value if isinstance(value, int) else 0)

    def number_list(self, name: str) -> Array:
        """The numbers of an input that is a constant of the file.

        Raises:
            InputError: It is computed.
        """
        tensor = self.constants.get(self.input(name))
        if tensor is None:
            raise self.fault(f"its input {name} is no constant of the file")
        return np.frombuffer(tensor.data, tensor.desc.dtype).reshape(tensor.desc.shape or ())

    def fault(self, why: str) -> InputError:
        """The error to raise for an operator that has no body."""
        return InputError(
            f"{self.op.type} {self.op.name} has no reference on the CPU",
            why,
            "`omforge check` says what atc would say of it",
        )

    def _value(self, name: str, default: Item | None) -> Item | None:
        found = self.op.attributes.get(name)
        if found is None and default is None:
            raise self.fault(f"it has no attribute {name}")
        return default if found is None else found.value

    def _places(self, name: str) -> list[int]:
        return by_slot(self.prototype.inputs, input_names(self.op)).get(name, [])


Body = Callable[[Twin, Call], list[str]]
"""From an operator to its outputs' ONNX values."""
