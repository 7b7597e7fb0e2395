"""A mixture of experts from the chosen experts' weights alone, node by node.

A value of every expert and token, [E, T, ..], becomes one of the choices, [T*k, 1, ..].
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from omforge import ir
from omforge.ir.values import attribute, constant, constant_tensor
from omforge.lowering.legalize.builder import (
    Builder,
    Dims,
    NotLegal,
    dims,
    int_attribute,
    number,
    optional_input,
    product,
    required_input,
    shape_text,
)
from omforge.lowering.legalize.quantized import check_choosing, chosen_products, dequantizer
from omforge.recognition.experts.block import Block
from omforge.recognition.views import is_same_movement, trace

_ELEMENTWISE = frozenset(
    (
        *("Abs", "Add", "Cast", "Clip", "Div", "Elu", "Erf", "Exp", "Gelu", "HardSigmoid", "Max"),
        *("HardSwish", "Identity", "LeakyRelu", "Log", "Min", "Mul", "Neg", "Pow", "Reciprocal"),
        *("Relu", "Sigmoid", "Softplus", "Sqrt", "Sub", "Swish", "Tanh", "Where"),
    )
)
_ALONG = frozenset(("Concat", "LayerNormalization", "RMSNormalization", "Softmax", "Split"))


@dataclass
class Region:
    """What every expert computes of all tokens, and the same of the chosen ones.

    A value [E, T, ..] becomes [T*k, 1, ..], and one whose first axis is E*T one of T*k.

    Attributes:
        block: The mixture.
        op: Records the nodes.
        dense: The nodes that are not needed once the chosen rows are there.
    """

    block: Block
    op: Builder
    dense: dict[ir.Node, None] = field(default_factory=dict[ir.Node, None])
    _made: dict[ir.Value, ir.Value] = field(default_factory=dict[ir.Value, ir.Value])
    _inside: dict[ir.Value, bool] = field(default_factory=dict[ir.Value, bool])
    reasons: dict[str, None] = field(default_factory=dict[str, None])
    """Why integers became floats ahead of their products."""
    _ids: ir.Value | None = None
    _each: list[ir.Value] | None = None

    @property
    def tokens(self) -> int:
        """T."""
        assert isinstance(self.block.tokens, int)
        return self.block.tokens

    @property
    def rows(self) -> int:
        """T*k."""
        return self.tokens * self.block.each

    @property
    def ids(self) -> ir.Value:
        """Integer [T*k], the expert of each row."""
        if self._ids is None:
            self._ids = self.op.reshape(self.block.choices, (self.rows,))
        return self._ids

    def result(self) -> ir.Value:
        """[T*k, D], what is taken, from the chosen experts' weights.

        Raises:
            NotLegal: Something in between does not work row by row.
        """
        self.dense[self.block.taken] = None
        return self.op.reshape(
            self.chosen(required_input(self.block.taken, 0)), dims(self.block.taken.outputs[0])
        )

    def chosen(self, value: ir.Value) -> ir.Value:
        """The rows of a dense value that were chosen."""
        if value not in self._made:
            node = value.producer()
            assert node is not None
            self.dense[node] = None
            self._make(node)
        return self._made[value]

    def is_dense(self, value: ir.Value | None) -> bool:
        """Whether a value has rows for every expert and token, which products made."""
        if value is None or constant_tensor(value) is not None:
            return False
        if value not in self._inside:
            node = value.producer()
            self._inside[value] = False
            if node is not None and node.op_type != "Gather":
                of_experts = node in self.block.products
                self._inside[value] = of_experts or any(map(self.is_dense, node.inputs))
        return self._inside[value]

    def _lead(self, shape: Dims) -> int:
        """How many axes are those of experts and tokens: two, or one of E*T."""
        experts, tokens = self.block.experts, self.tokens
        if shape[:1] == (experts * tokens,):
            return 1
        if shape[:2] == (experts, tokens):
            return 2
        raise NotLegal(f"{shape_text(shape)} is not of {experts} experts and {tokens} tokens")

    def _shape(self, shape: Dims) -> Dims:
        """The shape of the chosen rows of a value of this shape."""
        lead = self._lead(shape)
        return (self.rows, *(1,) * (lead - 1), *shape[lead:])

    def _make(self, node: ir.Node) -> None:
        op = self.op
        made = node.outputs[0]
        shape = self._shape(dims(made))
        match node.op_type:
            case "MatMul" if node in self.block.products:
                self._made[made] = self._product(node)
            case "Reshape" | "Squeeze" | "Unsqueeze" | "Flatten":
                before = required_input(node, 0)
                self._lead(dims(before))
                self._made[made] = op.reshape(self.chosen(before), shape)
            case kind if kind in _ELEMENTWISE or kind in _ALONG or kind in ("Slice",):
                self._check(node)
                inputs = [
                    None if given is None else self._operand(given, dims(made), node, at)
                    for at, given in enumerate(node.inputs)
                ]
                outputs = [(v.dtype, self._shape(dims(v))) for v in node.outputs]
                attributes = {name: a.value for name, a in node.attributes.items()}
                results = op.record(kind, inputs, outputs, attributes)  # pyright: ignore[reportArgumentType]
                self._made.update(zip(node.outputs, results, strict=True))
            case kind:
                raise NotLegal(f"{kind} between the experts' products may mix rows")

    def _check(self, node: ir.Node) -> None:
        """Refuse what works along the axes of experts and tokens."""
        shape = dims(required_input(node, 0) if node.op_type == "Split" else node.outputs[0])
        lead = self._lead(shape)
        axes: list[int] = []
        if node.op_type in _ALONG:
            axes = [int(attribute(node, "axis", 0 if node.op_type == "Split" else -1))]
        elif node.op_type == "Slice":
            given = optional_input(node, 3)
            numbers = constant(given)
            if numbers is None:
                raise NotLegal("a Slice without constant axes between the experts' products")
            axes = [int(axis) for axis in numbers.ravel()]
        if any(axis % len(shape) < lead for axis in axes):
            raise NotLegal(f"{node.op_type} mixes the rows of experts or tokens")

    def _operand(self, value: ir.Value, result: Dims, node: ir.Node, at: int) -> ir.Value:
        """What a node of the chosen rows reads in place of a value."""
        if self.is_dense(value):
            return self.chosen(value)
        if node.op_type in _ALONG or node.op_type == "Slice":
            if at == 0 or node.op_type == "Concat":
                raise NotLegal(f"{node.op_type} of what is not the experts'")
            return value  # a scale, sizes, bounds
        rank = len(result)
        shape = dims(value)
        aligned = (*(1,) * (rank - len(shape)), *shape)
        lead = self._lead(result)
        op, experts, tokens = self.op, self.block.experts, self.tokens
        if all(dim == 1 for dim in aligned[:lead]):
            return value
        rest = aligned[lead:]
        if lead == 1:
            table = self._table(value, rest)
            if table is None:
                raise NotLegal(f"{value.name} is neither the experts' nor the tokens'")
            return table
        if aligned[1] == 1:
            rows = op.gather(op.reshape(value, (experts, *rest)), self.ids)
        elif aligned[0] == 1:
            rows = self.of_tokens(op.reshape(value, (tokens, *rest)))
        else:
            raise NotLegal(f"{value.name} is of experts and tokens, and no product made it")
        return op.reshape(rows, (self.rows, 1, *rest))

    def _table(self, value: ir.Value, rest: Dims) -> ir.Value | None:
        """Rows [E*T, ..] that are taken of a table by expert, as [T*k, ..]."""
        node = value.producer()
        experts, tokens = self.block.experts, self.tokens
        if node is None:
            if tokens == 1:
                return self.op.gather(value, self.ids)
            numbers = constant(value)
            if numbers is None or value.dtype is None:
                return None
            apart = numbers.reshape(experts, tokens, *numbers.shape[1:])
            if (apart != apart[:, :1]).any():
                return None
            return self.op.gather(self.op.constant(apart[:, 0], value.dtype), self.ids)
        if node.op_type != "Gather" or int_attribute(node, "axis", 0):
            return None
        table, index = required_input(node, 0), constant(required_input(node, 1))
        wanted = np.repeat(np.arange(experts), tokens)
        if index is None or not np.array_equal(index.ravel(), wanted):
            return None
        self.dense[node] = None
        return self.op.gather(table, self.ids)

    def of_tokens(self, value: ir.Value) -> ir.Value:
        """Rows [T*k, ..] of a value [T, ..]; the value itself, [1, ..], of one token."""
        if self.tokens == 1:
            return value
        index = np.arange(self.rows) // self.block.each
        return self.op.gather(value, self.op.constant(index, ir.DataType.INT64))

    def _repeated(self, value: ir.Value) -> ir.Value:
        """The tokens [T, ..] that a value [E, T, ..] repeats for each expert; else the value."""
        shape = dims(value)
        if len(shape) != 3 or shape[0] != self.block.experts:
            return value

        def repeat(index: npt.NDArray[Any], _: Mapping[str, int]) -> npt.NDArray[Any] | None:
            whole = tuple(dim for dim in shape if isinstance(dim, int))
            fits = index.size == self.tokens * whole[-1]
            return np.broadcast_to(index.reshape(1, *whole[1:]), whole) if fits else None

        chains = trace(value).prefixes()
        return next((c.source for c in chains if is_same_movement(c, repeat)), value)

    def _product(self, node: ir.Node) -> ir.Value:
        """[T*k, 1, I], each row with the weights of its expert."""
        op = self.op
        x = required_input(node, 0)
        width = dims(x)[-1]
        if self.is_dense(x):
            rows = op.reshape(self.chosen(x), (self.rows, 1, width))
        else:
            x = self._repeated(x)
            if product(dims(x)) != self.tokens * width:
                raise NotLegal(f"a product reads {shape_text(dims(x))}, which is not of the tokens")
            flat = self.of_tokens(op.reshape(x, (self.tokens, width)))
            rows = op.reshape(flat, (1 if self.tokens == 1 else self.rows, 1, width))
        made = self._of_integers(node, rows)
        if made is None:
            weight, turned = self._weight(required_input(node, 1))
            outputs = dims(node.outputs[0])[-1]
            if turned:  # W x: a weight as it is stored, and one column of each row
                column = op.reshape(rows, (*dims(rows)[:1], width, 1))
                made = op.emit("MatMul", [weight, column], x.dtype, (self.rows, outputs, 1))
            else:
                made = op.emit("MatMul", [rows, weight], x.dtype, (self.rows, 1, outputs))
        return op.reshape(made, self._shape(dims(node.outputs[0])))

    def _of_integers(self, node: ir.Node, rows: ir.Value) -> ir.Value | None:
        """The product by kernels that read integers, each of one choice; None without any."""
        op, width = self.op, dims(rows)[-1]
        dequantize = dequantizer(node)
        if dequantize is None:
            return None
        try:
            stack = check_choosing(op, node)
        except NotLegal as reason:
            self.reasons[str(reason)] = None
            return None
        ones = op.constant([1] * self.rows, ir.DataType.INT64)
        flat = op.reshape(rows, (*dims(rows)[:1], width))
        one = [flat] * self.rows
        if dims(flat)[0] != 1:
            outputs = [(flat.dtype, (1, width))] * self.rows
            one = list(op.record("Split", [flat, ones], outputs, {"axis": 0}))
        if self._each is None:
            outputs = [(self.ids.dtype, (1,))] * self.rows
            self._each = list(op.record("Split", [self.ids, ones], outputs, {"axis": 0}))
        made = chosen_products(op, stack, one, self._each)
        self.dense[dequantize] = None
        turn = required_input(node, 1).producer()
        if turn is not None:
            self.dense[turn] = None
        return op.concat([op.reshape(y, (1, 1, dims(y)[-1])) for y in made], -3)

    def _weight(self, weight: ir.Value) -> tuple[ir.Value, bool]:
        """(the chosen experts' weights [T*k, D, I], whether they are [T*k, I, D] instead)."""
        op = self.op
        node = weight.producer()
        if constant_tensor(weight) is not None or node is None:
            return op.gather(weight, self.ids), False
        self.dense[node] = None
        if node.op_type == "Transpose":
            if tuple(attribute(node, "perm", ())) != (0, 2, 1):
                raise NotLegal("the experts' weights are moved in another way than turned")
            stored, turned = self._weight(required_input(node, 0))
            return stored, not turned
        if node.op_type != "DequantizeLinear":
            raise NotLegal(f"the experts' weights come out of {node.op_type}")
        return self._integers(node), False

    def _integers(self, node: ir.Node) -> ir.Value:
        """The chosen experts' weights of a DequantizeLinear, gathered as integers.

        They are scaled ahead of the product: its sums, unscaled, need not fit float16.
        """
        op = self.op
        codes, scale = required_input(node, 0), required_input(node, 1)
        zero = optional_input(node, 2)
        if codes.dtype != ir.DataType.INT8:
            why = "; ".join(self.reasons)
            raise NotLegal(f"Gather takes no {codes.dtype}, and {why}")
        if any(v is not None and constant_tensor(v) is None for v in (codes, scale, zero)):
            raise NotLegal("the experts' weights, scales or zero points are no constants")
        shape, of_scale, axis = dims(codes), dims(scale), int_attribute(node, "axis", 1) % 3
        if len(of_scale) != 3 or axis == 0:
            raise NotLegal(f"the experts' scales are {shape_text(of_scale)}, not of each expert")
        dtype = scale.dtype or ir.DataType.FLOAT16
        floats = op.cast(op.gather(codes, self.ids), dtype)
        if zero is not None:
            zeros = op.cast(op.gather(zero, self.ids), dtype)
            floats = self._by_group("Sub", floats, zeros, axis, shape)
        return self._by_group("Mul", floats, op.gather(scale, self.ids), axis, shape)

    def _by_group(
        self, kind: str, floats: ir.Value, groups: ir.Value, axis: int, shape: Dims
    ) -> ir.Value:
        """Weights with what is one for each group of them along an axis."""
        op, own, of_groups = self.op, (self.rows, *shape[1:]), dims(groups)
        if of_groups[axis] == 1:
            return op.binary(kind, floats, groups)
        size, left = divmod(number(shape[axis], "weights"), number(of_groups[axis], "groups"))
        if left:
            raise NotLegal(f"{shape[axis]} weights are no multiple of {of_groups[axis]} groups")
        apart = op.reshape(floats, (*own[:axis], of_groups[axis], size, *own[axis + 1 :]))
        each = op.reshape(groups, (*of_groups[: axis + 1], 1, *of_groups[axis + 1 :]))
        return op.reshape(op.binary(kind, apart, each), own)


def gathered(op: Builder, block: Block) -> tuple[ir.Value, dict[ir.Node, None]]:
    """(what a block takes, by the chosen experts' weights; the nodes that it makes needless).

    Raises:
        NotLegal: The block has no such form.
    """
    if not isinstance(block.tokens, int):
        raise NotLegal(f"the number of tokens, {block.tokens}, is known at run time only")
    region = Region(block, op)
    return region.result(), region.dense
