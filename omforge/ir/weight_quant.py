"""Reference bodies of `NPUWeightQuantBatchMatmulV2`: one for each way in which it is called.

ONNX functions cannot ask whether an input is there, nor what its dtype is, so the CPU twin of a
node gets the body for what the node has. The formula is that of
hicann/ops-nn:matmul/weight_quant_batch_matmul_v2/docs/aclnnWeightQuantBatchMatmulV2.md::

    y = x @ ((weight + antiquant_offset) * antiquant_scale) + bias

Letters: K inputs of a linear layer, N its outputs, g the group size, G = ceil(K/g) groups.
"""

from __future__ import annotations

import onnx_ir as ir

from omforge.ir.errors import InputError
from omforge.ir.streamed import ViewTensor

INPUTS = (
    "x",
    "weight",
    "antiquant_scale",
    "antiquant_offset",
    "quant_scale",
    "quant_offset",
    "bias",
)

_NIBBLES = {ir.DataType.INT32: 8, ir.DataType.UINT8: 2}
"""How many int4 an element holds, the first in the low bits."""


def reference_body(
    name: str,
    *,
    nibbles: int = 1,
    axis: int = 1,
    offset: bool = True,
    bias: bool = True,
    grouped: bool = True,
) -> str:
    """Return a body as ONNX function text for opset 16; it computes in float32.

    Args:
        name: Of the function.
        nibbles: How many int4 an element of the weight holds; 1 where it holds one int8.
        axis: Along which axis of the weight they are neighbours.
        offset: There is an antiquant_offset.
        bias: There is a bias.
        grouped: antiquant_group_size is not 0.
    """
    lines = [
        "wide = Cast <to = 1> (x)",
        *(_unpacked(nibbles, axis) if nibbles > 1 else ["codes = Cast <to = 1> (weight)"]),
        "scale = Cast <to = 1> (antiquant_scale)",
    ]
    if offset:
        lines.append("moved = Cast <to = 1> (antiquant_offset)")
    if grouped:
        lines += [
            "zero = Constant <value = int64 {0}> ()",
            "one = Constant <value = int64 {1}> ()",
            "size = Constant <value_int: int = @antiquant_group_size> ()",
            "of_codes = Shape (codes)",
            "inputs = Gather (of_codes, zero)",
            "numbers = Range (zero, inputs, one)",
            "groups = Div (numbers, size)",
            "scales = Gather <axis = 0> (scale, groups)",
            *(["offsets = Gather <axis = 0> (moved, groups)"] if offset else []),
        ]
    else:
        lines += ["scales = Identity (scale)", *(["offsets = Identity (moved)"] * offset)]
    lines += [
        "shifted = Add (codes, offsets)" if offset else "shifted = Identity (codes)",
        "numbers_of_weight = Mul (shifted, scales)",
        "product = MatMul (wide, numbers_of_weight)",
        *(["added = Cast <to = 1> (bias)"] * bias),
        "sum = Add (product, added)" if bias else "sum = Identity (product)",
        "y = CastLike (sum, x)",
    ]
    return (
        '<domain: "npu", opset_import: ["" : 16]>\n'
        f"{name} <antiquant_group_size: int = 0, dtype: int = -1> ({', '.join(INPUTS)}) => (y)\n"
        "{\n" + "\n".join(lines) + "\n}"
    )


def _unpacked(nibbles: int, axis: int) -> list[str]:
    """Two's complement of 4 bits out of int32 or bytes: int32 holds every step exactly."""
    powers = ", ".join(str(16**index) for index in range(nibbles))
    shape = f"{nibbles}, 1" if axis == 0 else f"{nibbles}"
    lines = [
        "words = Cast <to = 6> (weight)",
        f"behind = Constant <value = int64[1] {{{axis + 1}}}> ()",
        "apart = Unsqueeze (words, behind)",
        f"powers = Constant <value = int32[{shape}] {{{powers}}}> ()",
        "sixteen = Constant <value = int32 {16}> ()",
        "eight = Constant <value = int32 {8}> ()",
        "below = Mod (apart, powers)",
        "above = Sub (apart, below)",
        "from_there = Div (above, powers)",
        "nibbles = Mod (from_there, sixteen)",
        "raised = Add (nibbles, eight)",
        "turned = Mod (raised, sixteen)",
        "signed = Sub (turned, eight)",
        "floats = Cast <to = 1> (signed)",
        "rest = Constant <value = int64[1] {-1}> ()",
    ]
    if axis == 0:
        return [
            *lines,
            "outputs = Shape <start = 1> (weight)",
            "sizes = Concat <axis = 0> (rest, outputs)",
            "codes = Reshape (floats, sizes)",
        ]
    return [
        *lines,
        "inputs_first = Shape <start = 0, end = 1> (weight)",
        "sizes = Concat <axis = 0> (inputs_first, rest)",
        "codes = Reshape (floats, sizes)",
    ]


def twin_of(node: ir.Node) -> tuple[str, str]:
    """Return the name and the text of the body for a node of a twin graph, as it is called.

    An int4 weight becomes the bytes that hold it: opset 16, which bodies are written for, has no
    operator that takes int4.

    Raises:
        InputError: The node quantises its output, which the reference does not.
    """
    present = [value is not None for value in node.inputs] + [False] * (7 - len(node.inputs))
    if present[4] or present[5]:
        raise InputError(
            f"{node.op_type} {node.name} quantises its output",
            "the reference body gives floats only",
            "Quantise behind it",
        )
    weight = node.inputs[1]
    assert weight is not None
    if weight.dtype == ir.DataType.INT4:
        _as_bytes(node, weight)
        weight = node.inputs[1]
        assert weight is not None
    nibbles = 1 if weight.dtype is None else _NIBBLES.get(weight.dtype, 1)
    size = node.attributes.get("antiquant_group_size")
    grouped = size is not None and size.as_int() > 0
    axis = 1
    if nibbles > 1:
        of_weight, of_scale = _shape(weight), _shape(node.inputs[2])
        axis = 0 if of_weight[-1:] == of_scale[-1:] else 1
    packed = "" if nibbles == 1 else f"_{nibbles}_on_{axis}"
    name = (
        f"WeightQuantBatchMatmulV2{packed}{'_groups' * grouped}"
        f"{'_offset' * present[3]}{'_bias' * present[6]}"
    )
    body = reference_body(
        name, nibbles=nibbles, axis=axis, offset=present[3], bias=present[6], grouped=grouped
    )
    return name, body


def _as_bytes(node: ir.Node, weight: ir.Value) -> None:
    producer = weight.producer()
    source = weight if producer is None else producer.inputs[0]
    if source is None or source.const_value is None:
        raise InputError(
            f"{node.op_type} {node.name} has an int4 weight that is no constant",
            "the reference body needs its bytes",
            "Store it as an initializer, behind a Transpose at most",
        )
    if producer is None:
        node.replace_input_with(1, _bytes_of(node, source))
        return
    turned = ir.node("Transpose", [_bytes_of(node, source)], {"perm": [1, 0]})
    turned.outputs[0].name = f"{weight.name}.bytes.{node.name}"
    turned.outputs[0].dtype = ir.DataType.UINT8
    graph = node.graph
    assert isinstance(graph, ir.Graph)
    graph.insert_before(node, turned)
    node.replace_input_with(1, turned.outputs[0])
    if not weight.uses():
        graph.remove(producer, safe=True)
        _forget(graph, source)


def _bytes_of(node: ir.Node, source: ir.Value) -> ir.Value:
    graph, tensor, name = node.graph, source.const_value, f"{source.name}.bytes"
    assert isinstance(graph, ir.Graph)
    assert tensor is not None
    if name not in graph.initializers:
        rows, columns = (int(dim) for dim in tensor.shape.numpy())
        view = ViewTensor(tensor, ir.DataType.UINT8, (rows, columns // 2), name)
        value = ir.Value(
            name=name, shape=ir.Shape(view.shape), type=ir.TensorType(view.dtype), const_value=view
        )
        graph.register_initializer(value)
    return graph.initializers[name]


def _forget(graph: ir.Graph, source: ir.Value) -> None:
    if not source.uses():
        graph.initializers.pop(source.name or "", None)


def _shape(value: ir.Value | None) -> tuple[int | str | None, ...]:
    """Of a constant, or of a Transpose(1, 0) of one: a graph that was loaded states no others."""
    assert value is not None
    producer = value.producer()
    if value.const_value is not None:
        return tuple(int(dim) for dim in value.const_value.shape.numpy())
    if producer is not None and producer.op_type == "Transpose" and producer.inputs[0] is not None:
        return _shape(producer.inputs[0])[::-1]
    return (
        ()
        if value.shape is None
        else tuple(dim if isinstance(dim, int) else dim.value for dim in value.shape)
    )
