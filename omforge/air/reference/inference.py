"""Dtypes and shapes behind an operator, as its body gives them: what InferShape is in GE.

GE looks at no description of a result that a file has: it infers all of them anew, from the inputs
on. So does this, operator by operator, by ONNX's inference over the body.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import onnx
from onnx import TensorProto, helper, shape_inference

from omforge.air.ge_types import byte_size
from omforge.air.graph import Desc, Op
from omforge.air.reference.builder import ONNX_DTYPES, OPSET
from omforge.ir.errors import InputError

_SMALL = 4096
"""Bytes of a constant that may be a shape, axes or bounds: the numbers of others are not read."""

_NAMES = {number: name for name, number in ONNX_DTYPES.items()}


class ShapeFault(InputError):
    """An operator cannot take what comes in: GE's inference would stop there.

    Attributes:
        op: The operator.
    """

    def __init__(self, op: Op, why: str) -> None:
        super().__init__(
            f"{op.type} {op.name} does not take what comes in",
            why,
            "`omforge check` says what atc would say of it",
        )
        self.op = op


def infer(
    op: Op,
    nodes: Sequence[onnx.NodeProto],
    results: Sequence[str],
    known: Mapping[str, Desc],
    constants: Mapping[str, TensorProto],
) -> list[Desc]:
    """Return dtype and shape of each result of a body; a dim that stays open is -1.

    Args:
        op: What the body is of.
        nodes: The body.
        results: Its outputs.
        known: What is known of the values that it reads.
        constants: The constants that it reads, by name.

    Raises:
        ShapeFault: It does not take what comes in.
    """
    made = {name for node in nodes for name in node.output}
    read = {name for node in nodes for name in node.input if name} | set(results)
    outer = sorted(read - made)
    inputs: list[onnx.ValueInfoProto] = []
    small: list[TensorProto] = []
    for name in outer:
        tensor = constants.get(name)
        if (
            tensor is not None
            and tensor.data_location != TensorProto.EXTERNAL
            and _is_small(tensor)
        ):
            small.append(tensor)
        elif tensor is not None:
            inputs.append(helper.make_tensor_value_info(name, tensor.data_type, tensor.dims))
        else:
            inputs.append(_info(op, name, known))
    # Outputs that are read, so that nothing is left out; what they are like is asked for.
    outputs = [onnx.ValueInfoProto(name=name) for name in dict.fromkeys(results) if name in made]
    graph = helper.make_graph(list(nodes), "body", inputs, outputs, small)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=10)
    try:
        inferred = shape_inference.infer_shapes(
            model, check_type=True, strict_mode=True, data_prop=True
        )
    except (shape_inference.InferenceError, RuntimeError, ValueError) as error:
        raise ShapeFault(op, str(error).strip().splitlines()[-1]) from error
    found = {info.name: _desc(info) for info in (*inferred.graph.output, *inputs)}
    found |= {t.name: Desc("", _NAMES.get(t.data_type, "undefined"), tuple(t.dims)) for t in small}
    return [found[name] for name in results]


def _is_small(tensor: TensorProto) -> bool:
    size = byte_size(_NAMES.get(tensor.data_type, ""), tuple(tensor.dims))
    return tensor.data_location != TensorProto.EXTERNAL and size <= _SMALL


def _info(op: Op, name: str, known: Mapping[str, Desc]) -> onnx.ValueInfoProto:
    desc = known.get(name)
    if desc is None or desc.dtype not in ONNX_DTYPES:
        raise ShapeFault(op, f"nothing is known of what it reads as {name}")
    shape = None
    if desc.shape is not None:
        shape = [f"{name}.{at}" if dim < 0 else dim for at, dim in enumerate(desc.shape)]
    return helper.make_tensor_value_info(name, ONNX_DTYPES[desc.dtype], shape)


def _desc(info: onnx.ValueInfoProto) -> Desc:
    tensor = info.type.tensor_type
    dtype = _NAMES.get(tensor.elem_type, "undefined")
    if not tensor.HasField("shape"):
        return Desc("", dtype, None)
    dims = (dim.dim_value if dim.HasField("dim_value") else -1 for dim in tensor.shape.dim)
    return Desc("", dtype, tuple(dims))
