"""What quantisation did to each layer: to its weights, and to what it computes on a text.

Layers are found by the names of their products' outputs, which quantisation leaves as they are.
Weights are read a few rows at a time, and the graphs are run a few nodes at a time, side by side.

Letters: K inputs of a linear layer, N outputs, S tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from omforge import ir
from omforge.ir.diagnostics import layer_path
from omforge.ir.int8_ops import INPUTS_MULTIPLIED, OUTPUTS_DIVIDED
from omforge.ir.segment import Walk
from omforge.ir.values import attribute, constant_tensor, tensor_shape
from omforge.ir.weights import release
from omforge.runtime.bundle import Progress

Array = npt.NDArray[Any]

_PRODUCTS = ("MatMul", "Gemm")
_NORMS = ("RMSNormalization", "LayerNormalization")
_PIECE = 1 << 20
"""Weights that are compared at once."""


@dataclass(frozen=True)
class LayerError:
    """One linear layer.

    Attributes:
        name: Its place in the exported model.
        bits: Of its integers; 0 if it was left as it is.
        group: Weights that share a scale; 0 is one scale for each output.
        weight: ||w' - w|| / ||w||; factors that moved into the norm ahead of it are taken back.
        output: The same of what it computes on the text, behind all layers before it.
    """

    name: str
    bits: int
    group: int
    weight: float
    output: float


@dataclass(frozen=True)
class LayerErrors:
    """All linear layers, and what each block hands on.

    Attributes:
        layers: In the order of the graph.
        blocks: Relative error of each block's output on the text.
    """

    layers: tuple[LayerError, ...]
    blocks: tuple[float, ...]


def compare_layers(
    reference: ir.Model,
    quantized: ir.Model,
    feeds: Sequence[Mapping[str, Array]],
    progress: Progress | None = None,
) -> LayerErrors:
    """Compare a canonical graph in floats with what quantisation made of it.

    Args:
        reference: The graph in floats.
        quantized: The same graph with `DequantizeLinear` ahead of its products.
        feeds: Inputs of both.
        progress: Told of layers done and layers in all.
    """
    by_output = {node.outputs[0].name: node for node in reference.graph if _is_product(node)}
    pairs = [
        (by_output[node.outputs[0].name], node)
        for node in quantized.graph
        if _is_product(node) and node.outputs[0].name in by_output
    ]
    blocks = [name for name in block_outputs(reference) if _find(quantized, name) is not None]
    watched = [node.outputs[0].name or "" for _, node in pairs]
    errors = output_errors(reference, quantized, feeds, {*watched, *blocks})
    layers: list[LayerError] = []
    for done, (mine, other) in enumerate(pairs):
        if progress is not None:
            progress("weights", done, len(pairs))
        weight, stored = _weight(mine), _stored(other)
        if weight is None:
            continue
        layers.append(
            LayerError(
                name=layer_path(mine) or weight.name or "",
                bits=0 if stored is None else _bits(stored),
                group=0 if stored is None else int(attribute(stored, "block_size", 0)),
                weight=0.0 if stored is None else weight_error(mine, other),
                output=errors[other.outputs[0].name or ""],
            )
        )
    return LayerErrors(tuple(layers), tuple(errors[name] for name in blocks))


def output_errors(
    reference: ir.Model,
    quantized: ir.Model,
    feeds: Sequence[Mapping[str, Array]],
    names: set[str],
) -> dict[str, float]:
    """Return ||y' - y|| / ||y|| over all feeds of values that both graphs have, by name."""
    left, right = (
        Walk(model, [_fitting(model, given) for given in feeds]) for model in (reference, quantized)
    )
    others = {output.name: output for node in quantized.graph for output in node.outputs}
    found: dict[str, float] = {}
    for node in reference.graph:
        for output in node.outputs:
            name = output.name or ""
            if name not in names:
                continue
            expected, actual = left.advance(output), right.advance(others[name])
            maker = others[name].producer()
            if maker is not None and _is_divided(maker):
                fitted = _Fitted(expected[0].shape[-1])
                for a, b in zip(actual, expected, strict=True):
                    width = a.shape[-1]
                    fitted.add(a.reshape(-1, width), b.reshape(-1, width), None)
                found[name] = fitted.error()
                continue
            off = sum(_squares(a, b) for a, b in zip(actual, expected, strict=True))
            found[name] = _ratio(off, sum(_squares(b) for b in expected))
    return found


def _fitting(model: ir.Model, feeds: Mapping[str, Array]) -> dict[str, Array]:
    """The feeds of the graph's own inputs, in its dtypes: an empty cache is as empty in floats."""
    kinds = {v.name or "": v.dtype for v in model.graph.inputs if v.dtype is not None}
    return {
        name: array.astype(kinds[name].numpy(), copy=False)
        for name, array in feeds.items()
        if name in kinds
    }


def block_outputs(model: ir.Model) -> list[str]:
    """Return the name of what each block hands on to the next, the last one's to the final norm."""
    starts = [
        _residual(node.inputs[0])
        for node in model.graph
        if node.op_type == "Attention" and not node.domain
    ]
    logits = next((v for v in model.graph.outputs if v.name == "logits"), None)
    ends = [*starts[1:], _residual(logits)]
    return [value.name for value in ends if value is not None and value.name is not None]


def weight_error(product: ir.Node, quantized: ir.Node) -> float:
    """Return ||w' - w|| / ||w|| of one layer in both graphs; holds some rows of it at a time."""
    weight, stored = _weight(product), _stored(quantized)
    assert weight is not None
    assert stored is not None
    exact = constant_tensor(weight)
    assert exact is not None
    factors = _factors(product, quantized)
    before, after = _axis(product), _axis(quantized)
    shape = tensor_shape(exact)
    if before != after:  # stored the other way round
        shape = (*shape[:-2], shape[-1], shape[-2])
    off = total = 0.0
    inner = after == len(shape) - 1
    # Factors that no norm tells are fitted: of outputs, or of inputs.
    by_input = INPUTS_MULTIPLIED in quantized.metadata_props
    by_row = inner != by_input
    fits = by_input or _is_divided(quantized)
    fitted = _Fitted(shape[-2] if by_row else shape[-1]) if fits else None
    for first, last, rows in dequantized_rows(stored):
        given = _float_rows(exact, first, last, turned=before != after)
        if factors is not None:
            rows = rows / (factors if inner else factors[np.arange(first, last) % shape[-2], None])
        if fitted is not None:
            fitted.add(rows, given, slice(first, last) if by_row else None)
        off += _squares(rows, given)
        total += _squares(given)
    return _ratio(off, total) if fitted is None else fitted.error()


class _Fitted:
    """The error of numbers whose outputs, or inputs, have factors that are not known.

    The factor of each is the one that leaves the least.

    Args:
        count: How many factors there are.
    """

    def __init__(self, count: int) -> None:
        self._sums = np.zeros((3, count))

    def add(self, found: Array, exact: Array, rows: slice | None) -> None:
        """Add matrices with a factor for each of these rows, or for each column."""
        a, b = found.astype(np.float64), exact.astype(np.float64)
        axis, where = (0, slice(None)) if rows is None else (1, rows)
        for index, product in enumerate((a * a, a * b, b * b)):
            self._sums[index, where] += product.sum(axis)

    def error(self) -> float:
        """Relative."""
        own, both, exact = self._sums
        explained = np.divide(both * both, own, out=np.zeros_like(own), where=own > 0)
        return _ratio(float(np.maximum(exact - explained, 0).sum()), float(exact.sum()))


def _is_divided(product: ir.Node) -> bool:
    """Whether quantize-activations divided its outputs."""
    return OUTPUTS_DIVIDED in product.metadata_props


def _float_rows(tensor: ir.TensorProtocol, first: int, last: int, *, turned: bool) -> Array:
    """Rows of a weight, its last axis a row, float32; of a turned one, its columns."""
    numbers: Array = tensor.numpy()
    if turned:
        return np.swapaxes(numbers, -1, -2).reshape(-1, numbers.shape[-2])[first:last].astype("f4")
    width = numbers.shape[-1]
    rows = numbers.reshape(-1, width)[first:last].astype(np.float32)
    release(tensor, first * width * numbers.itemsize, last * width * numbers.itemsize)
    return rows


def dequantized_rows(node: ir.Node) -> Iterator[tuple[int, int, Array]]:
    """Yield (first, last, float32 rows) of what a `DequantizeLinear` of constants computes.

    Its tensor is seen as a matrix whose rows are its last axis.
    """
    codes, scale, *rest = (constant_tensor(value) for value in node.inputs if value is not None)
    assert codes is not None
    assert scale is not None
    shape = tensor_shape(codes)
    axis, size = int(attribute(node, "axis", 1)) % len(shape), int(attribute(node, "block_size", 0))
    count, width = int(np.prod(shape[:-1])), shape[-1]
    scales = scale.numpy().astype(np.float32)
    zeros = np.zeros_like(scales) if not rest or rest[0] is None else rest[0].numpy()
    zeros = zeros.astype(np.float32)
    data = _bytes(codes)
    # Two rows at least, so that 4-bit integers begin on a byte.
    step = max(2, _PIECE // width // 2 * 2)
    for first in range(0, count, step):
        last = min(first + step, count)
        integers = _integers(codes, data, first, last, width)
        by = [_rows_of(p, shape, axis, size, first, last) for p in (scales, zeros)]
        yield first, last, (integers - by[1]) * by[0]


def _rows_of(
    parameter: Array, shape: Sequence[int], axis: int, size: int, first: int, last: int
) -> Array:
    """A scale or zero point for rows first..last of the matrix, which broadcasts to them."""
    rows, inner = np.arange(first, last), axis == len(shape) - 1
    if not size:  # one number for each index of `axis`, or one in all
        if parameter.ndim == 0 or inner:
            return parameter.reshape(1, -1)
        below = int(np.prod(shape[axis + 1 : -1]))
        return parameter[rows // below % shape[axis], None]
    if inner:
        return parameter.reshape(-1, parameter.shape[-1])[first:last].repeat(size, 1)[
            :, : shape[-1]
        ]
    inputs, groups = shape[-2], parameter.shape[-2]
    return parameter.reshape(-1, shape[-1])[rows // inputs * groups + rows % inputs // size]


def _bytes(tensor: ir.TensorProtocol) -> Array:
    if isinstance(tensor, ir.ExternalTensor) and tensor.nbytes:
        # onnx-ir would unpack 4-bit integers to a byte each, and keep them.
        return np.memmap(tensor.path, np.uint8, "r", tensor.offset or 0, (tensor.nbytes,))
    return np.frombuffer(tensor.tobytes(), np.uint8)


def _integers(tensor: ir.TensorProtocol, data: Array, first: int, last: int, width: int) -> Array:
    """float32 [rows, width]."""
    if _width(tensor) == 8:
        whole = data[first * width : last * width].view(tensor.dtype.numpy())
        return whole.reshape(-1, width).astype(np.float32)
    pairs = data[first * width // 2 : -(-last * width // 2)]
    flat = np.stack([pairs & 15, pairs >> 4], -1).reshape(-1)[: (last - first) * width]
    signed = tensor.dtype == ir.DataType.INT4
    numbers = flat.astype(np.float32)
    return (numbers - 16 * (numbers > 7) * signed).reshape(-1, width).astype(np.float32)


def _width(tensor: ir.TensorProtocol) -> int:
    return 4 if tensor.dtype in (ir.DataType.INT4, ir.DataType.UINT4) else 8


def _bits(node: ir.Node) -> int:
    codes = constant_tensor(node.inputs[0])
    assert codes is not None
    return _width(codes)


def _factors(product: ir.Node, quantized: ir.Node) -> Array | None:
    """What AWQ multiplied the rows of a weight by, [K]: its norm is divided by the same."""
    gammas = [_gamma(node) for node in (product, quantized)]
    if gammas[0] is None or gammas[1] is None or gammas[0].shape != gammas[1].shape:
        return None
    before, after = (gamma.astype(np.float32) for gamma in gammas if gamma is not None)
    if np.array_equal(before, after):
        return None
    return np.divide(before, after, out=np.ones_like(before), where=(before != 0) & (after != 0))


def _gamma(product: ir.Node) -> Array | None:
    norm = _maker(product.inputs[0])
    if norm is None or norm.op_type not in _NORMS:
        return None
    tensor = constant_tensor(norm.inputs[1])
    return None if tensor is None else tensor.numpy()


def _maker(value: ir.Value | None) -> ir.Node | None:
    """What makes a value, ahead of its integers if a product reads those."""
    node = None if value is None else value.producer()
    while node is not None and node.op_type in ("QuantizeLinear", "DequantizeLinear"):
        node = None if node.inputs[0] is None else node.inputs[0].producer()
    return node


def _is_product(node: ir.Node) -> bool:
    return node.op_type in _PRODUCTS and not node.domain and _operand(node) is not None


def _operand(node: ir.Node) -> ir.Value | None:
    """What a product multiplies by, ahead of a Transpose, if it is constant."""
    value = node.inputs[1] if len(node.inputs) > 1 else None
    maker = None if value is None else value.producer()
    if maker is not None and maker.op_type == "Transpose":
        value = maker.inputs[0]
        maker = None if value is None else value.producer()
    if maker is not None and maker.op_type == "DequantizeLinear":
        constant = all(constant_tensor(v) is not None for v in maker.inputs if v is not None)
        return value if constant else None
    return value if constant_tensor(value) is not None else None


def _weight(node: ir.Node) -> ir.Value | None:
    value = _operand(node)
    return value if value is not None and constant_tensor(value) is not None else None


def _stored(node: ir.Node) -> ir.Node | None:
    value = _operand(node)
    maker = None if value is None else value.producer()
    return maker if maker is not None and maker.op_type == "DequantizeLinear" else None


def _axis(node: ir.Node) -> int:
    """The axis of the weight, as it is stored, that the product sums over."""
    value, stored = node.inputs[1], _stored(node)
    weight = _weight(node) if stored is None else stored.inputs[0]
    tensor = constant_tensor(weight)
    assert tensor is not None
    rank = len(tensor_shape(tensor))
    turned = value is not _operand(node)
    if node.op_type == "Gemm" and attribute(node, "transB", 0):
        turned = not turned
    return rank - 1 if turned else rank - 2


def _residual(value: ir.Value | None) -> ir.Value | None:
    """What the norm ahead of the next product upwards reads, or the product if it has no norm."""
    passed = False
    while value is not None and (node := value.producer()) is not None:
        source = _first_variable(node)
        if passed and node.op_type in _NORMS:
            return source
        if passed and node.op_type not in ("Reshape", "Gather"):
            return value
        passed = passed or _is_product(node)
        value = source
    return value if passed else None


def _first_variable(node: ir.Node) -> ir.Value | None:
    found = (v for v in node.inputs if v is not None and constant_tensor(v) is None)
    return next(found, None)


def _find(model: ir.Model, name: str) -> ir.Value | None:
    outputs = (output for node in model.graph for output in node.outputs)
    return next((output for output in outputs if output.name == name), None)


def _squares(a: Array, b: Array | None = None) -> float:
    difference = a.astype(np.float64) if b is None else a.astype(np.float64) - b
    return float(np.square(difference).sum())


def _ratio(off: float, total: float) -> float:
    """Of two sums of squares; 0 of 0 is no error."""
    return float(np.sqrt(off / total)) if total else float(off > 0)
