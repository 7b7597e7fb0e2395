"""Reference bodies of `NPUWeightQuantBatchMatmulV2`: one for each way in which it is called.

ONNX functions cannot ask whether an input is there, nor what its dtype is, so the CPU twin of a
node gets the body for what the node has. The formula is that of
hicann/ops-nn:matmul/weight_quant_batch_matmul_v2/docs/aclnnWeightQuantBatchMatmulV2.md::

    y = x @ ((weight + antiquant_offset) * antiquant_scale) + bias

in the dtype of x, without casts to another: ONNX Runtime's CPU provider has no float16 arithmetic,
computes neighbouring float16 nodes in float32, and rounds where a cast ends them. A body with casts
would be rounded more often than the float MatMul that it stands beside.

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
    stored: bool = False,
    offset: bool = True,
    bias: bool = True,
    grouped: bool = True,
) -> str:
    """Return a body as ONNX function text for opset 16: the formula in the dtype of x.

    Args:
        name: Of the function.
        nibbles: How many int4 an element of the weight holds; 1 where it holds one int8.
        axis: Along which axis of the weight they are neighbours.
        stored: The weight is the bytes of the stored tensor, which an `axis` of 0 says is [N, K].
        offset: There is an antiquant_offset.
        bias: There is a bias.
        grouped: antiquant_group_size is not 0.
    """
    lines = [
        *(
            _looked_up(axis)
            if stored
            else _unpacked(nibbles, axis)
            if nibbles > 1
            else ["integers = Identity (weight)"]
        ),
        "codes = CastLike (integers, x)",
    ]
    if grouped:
        lines += [
            "zero = Constant <value = int64 {0}> ()",
            "one = Constant <value = int64 {1}> ()",
            "size = Constant <value_int: int = @antiquant_group_size> ()",
            "of_codes = Shape (codes)",
            "inputs = Gather (of_codes, zero)",
            "numbers = Range (zero, inputs, one)",
            "groups = Div (numbers, size)",
            "scales = Gather <axis = 0> (antiquant_scale, groups)",
            *(["offsets = Gather <axis = 0> (antiquant_offset, groups)"] if offset else []),
        ]
    else:
        lines.append("scales = Identity (antiquant_scale)")
        lines += ["offsets = Identity (antiquant_offset)"] * offset
    lines += [
        "shifted = Add (codes, offsets)" if offset else "shifted = Identity (codes)",
        "numbers_of_weight = Mul (shifted, scales)",
        "product = MatMul (x, numbers_of_weight)",
        *(["added = CastLike (bias, x)"] * bias),
        "y = Add (product, added)" if bias else "y = Identity (product)",
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
        "rest = Constant <value = int64[1] {-1}> ()",
    ]
    if axis == 0:
        return [
            *lines,
            "outputs = Shape <start = 1> (weight)",
            "sizes = Concat <axis = 0> (rest, outputs)",
            "integers = Reshape (signed, sizes)",
        ]
    return [
        *lines,
        "inputs_first = Shape <start = 0, end = 1> (weight)",
        "sizes = Concat <axis = 0> (inputs_first, rest)",
        "integers = Reshape (signed, sizes)",
    ]


def _looked_up(axis: int) -> list[str]:
    """Both int4 of a byte from a table of all bytes: ten times as fast as the arithmetic."""
    digits = [digit - 16 * (digit > 7) for byte in range(256) for digit in (byte & 15, byte >> 4)]
    return [
        "bytes = Cast <to = 6> (weight)",
        f"table = Constant <value = float[256, 2] {{{', '.join(map(str, digits))}}}> ()",
        "pairs = Gather <axis = 0> (table, bytes)",
        "rows = Shape <start = 0, end = 1> (weight)",
        "rest = Constant <value = int64[1] {-1}> ()",
        "sizes = Concat <axis = 0> (rows, rest)",
        "matrix = Reshape (pairs, sizes)",
        f"integers = {'Transpose <perm = [1, 0]>' if axis == 0 else 'Identity'} (matrix)",
    ]


def twin_of(node: ir.Node) -> tuple[str, str]:
    """Return the name and the text of the body for a node of a twin graph, as it is called.

    A packed weight that is stored becomes the bytes that hold it, in front of the Transpose if
    there is one: that is fast, and opset 16 has no operator that takes int4.

    Raises:
        InputError: The node quantises its output, or reads int4 that is not stored.
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
    dtype = _dtype(weight)
    nibbles, axis, stored = 1 if dtype is None else _NIBBLES.get(dtype, 1), 1, False
    if nibbles > 1:
        axis = 0 if _shape(weight)[-1:] == _shape(node.inputs[2])[-1:] else 1
        turned = weight.producer() is not None
        stored = turned == (axis == 0) and _as_bytes(node, weight)
    if dtype == ir.DataType.INT4:
        axis = 0 if weight.producer() is not None else 1
        stored = _as_bytes(node, weight)
        if not stored:
            raise InputError(
                f"{node.op_type} {node.name} has an int4 weight that is no constant",
                "the reference body needs its bytes",
                "Store it as an initializer, behind a Transpose at most",
            )
    size = node.attributes.get("antiquant_group_size")
    grouped = size is not None and size.as_int() > 0
    packed = f"_stored_{axis}" if stored else f"_{nibbles}_on_{axis}" * (nibbles > 1)
    name = (
        f"WeightQuantBatchMatmulV2{packed}{'_groups' * grouped}"
        f"{'_offset' * present[3]}{'_bias' * present[6]}"
    )
    body = reference_body(
        name,
        nibbles=nibbles,
        axis=axis,
        stored=stored,
        offset=present[3],
        bias=present[6],
        grouped=grouped,
    )
    return name, body


def _as_bytes(node: ir.Node, weight: ir.Value) -> bool:
    """Let the node read the bytes of a weight that is stored; whether it is."""
    transpose = weight.producer()
    source = weight if transpose is None else transpose.inputs[0]
    if source is None or source.const_value is None:
        return False
    graph = node.graph
    assert isinstance(graph, ir.Graph)
    node.replace_input_with(1, _bytes_of(node, source))
    if transpose is not None and not weight.uses():
        graph.remove(transpose, safe=True)
    if not source.uses():
        graph.initializers.pop(source.name or "", None)
    return True


def _bytes_of(node: ir.Node, source: ir.Value) -> ir.Value:
    graph, tensor, name = node.graph, source.const_value, f"{source.name}.bytes"
    assert isinstance(graph, ir.Graph)
    assert tensor is not None
    if name not in graph.initializers:
        rows = int(tensor.shape.numpy()[0])
        shape = (rows, tensor.nbytes // rows)
        view = _bytes(tensor, shape, name)
        value = ir.Value(
            name=name, shape=ir.Shape(shape), type=ir.TensorType(view.dtype), const_value=view
        )
        graph.register_initializer(value)
    return graph.initializers[name]


def _bytes(tensor: ir.TensorProtocol, shape: tuple[int, int], name: str) -> ir.TensorProtocol:
    """The tensor as bytes; one in a file stays in the file."""
    if isinstance(tensor, ir.ExternalTensor):
        return ir.ExternalTensor(
            tensor.location,  # pyright: ignore[reportUnknownMemberType, reportUnknownArgumentType]
            tensor.offset,
            tensor.length,
            ir.DataType.UINT8,
            shape=ir.Shape(shape),
            name=name,
            base_dir=tensor.base_dir,  # pyright: ignore[reportUnknownMemberType, reportUnknownArgumentType]
        )
    return ViewTensor(tensor, ir.DataType.UINT8, shape, name)


def _dtype(value: ir.Value) -> ir.DataType | None:
    """Of a constant, or of a Transpose of one."""
    producer = value.producer()
    if value.dtype is None and producer is not None and producer.inputs[0] is not None:
        return _dtype(producer.inputs[0])
    return value.dtype


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
