"""The linear layers of a model: which weights they have, and who else reads those."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from omforge import ir
from omforge.ir.errors import CheckError, InputError
from omforge.ir.values import attribute, constant_tensor, tensor_shape
from omforge.rewriting.events import record

_FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16)


@dataclass
class Linear:
    """A weight that products read, and the nodes that read it.

    Attributes:
        weight: The initializer, [K, N], or [N, K] under a Transpose or a Gemm with transB.
        axis: Its axis K, that products sum over.
        users: MatMul, Gemm and Transpose nodes that read it, in the order of the graph.
        products: The MatMul and Gemm nodes themselves.
        gathers: Embedding lookups in the same weight.
        others: What else reads it.
    """

    weight: ir.Value
    axis: int
    users: list[ir.Node] = field(default_factory=list[ir.Node])
    products: list[ir.Node] = field(default_factory=list[ir.Node])
    gathers: list[ir.Node] = field(default_factory=list[ir.Node])
    others: list[ir.Node] = field(default_factory=list[ir.Node])
    mixed: bool = False
    """Whether some products sum over the other axis."""

    @property
    def name(self) -> str:
        """The weight's name."""
        return self.weight.name or ""

    @property
    def nbytes(self) -> int:
        """Of the weight."""
        assert self.weight.const_value is not None
        return self.weight.const_value.nbytes

    def obstacle(self) -> str:
        """Why it cannot be quantised, empty if it can."""
        assert self.weight.const_value is not None
        shape = tensor_shape(self.weight.const_value)
        if self.others:
            other = self.others[0]
            return f"{other.op_type} {other.name} reads it too"
        if self.mixed:
            return "products sum over both of its axes"
        if self.weight.is_graph_output() or self.weight.is_graph_input():
            return "it is an input or output of the graph"
        if self.gathers and (self.axis != 1 or shape[1] % 2):
            return "its embedding lookup does not read rows of an even width"
        return ""


def find_linears(model: ir.Model) -> list[Linear]:
    """Every weight of the main graph that a MatMul or Gemm multiplies by, in the graph's order."""
    found: dict[ir.Value, Linear] = {}
    for node in model.graph:
        for weight, axis, user in _weights(node):
            linear = found.setdefault(weight, Linear(weight, axis))
            linear.mixed |= linear.axis != axis
            linear.products.append(node)
            if user not in linear.users:
                linear.users.append(user)
    order = {node: index for index, node in enumerate(model.graph)}
    for weight, linear in found.items():
        for user in weight.consumers():
            if user in linear.users:
                continue
            lookup = user.op_type == "Gather" and user.inputs[0] is weight
            rows = attribute(user, "axis", 0) == 0
            (linear.gathers if lookup and rows else linear.others).append(user)
        linear.users.sort(key=lambda node: order.get(node, 0))
    return list(found.values())


def stored_as_integers(model: ir.Model) -> list[ir.Value]:
    """The weights of products that are integers already, in the graph's order."""
    found: dict[ir.Value, None] = {}
    for node in model.graph:
        if node.domain or node.op_type not in ("MatMul", "Gemm") or len(node.inputs) < 2:
            continue
        producer = None if node.inputs[1] is None else node.inputs[1].producer()
        if producer is not None and producer.op_type == "Transpose" and producer.inputs[0]:
            producer = producer.inputs[0].producer()
        if producer is None or producer.domain or producer.op_type != "DequantizeLinear":
            continue
        stored = producer.inputs[0]
        if stored is not None and constant_tensor(stored) is not None:
            found[stored] = None
    return list(found)


def check_linears(model: ir.Model, linears: Sequence[Linear], pass_name: str) -> None:
    """Record what is stored as integers already, and refuse a model where nothing else is.

    Raises:
        InputError: There is nothing to quantise.
    """
    stored = stored_as_integers(model)
    for weight in stored:
        record(model, pass_name, weight, f"left as it is: it is stored as {weight.dtype} already")
    if not linears:
        raise InputError(
            "there is nothing to quantise",
            f"{len(stored)} weights of products are integers already, and none are floats"
            if stored
            else "no MatMul or Gemm multiplies by a constant matrix of floats",
            "Leave the quantisation out, or start from an export with float weights",
        )


def check_quantizable(wanted: Sequence[Linear], count: int) -> None:
    """Refuse layers that cannot be quantised.

    Args:
        wanted: Which layers shall be.
        count: Of the model's layers.

    Raises:
        CheckError: Some cannot; each is named with the reason.
    """
    refused = {linear.name: why for linear in wanted if (why := linear.obstacle())}
    if refused:
        raise CheckError(
            f"{len(refused)} of {count} linear layers cannot be quantised",
            "; ".join(f"{name}: {why}" for name, why in refused.items()),
            f"Leave them as they are: keep={','.join(refused)}",
        )


def kept_layers(linears: Sequence[Linear], keep: Sequence[str]) -> set[str]:
    """Return the names of the layers that `keep` names, `*` for anything.

    Raises:
        InputError: A name of `keep` is no layer's.
    """
    kept: set[str] = set()
    for pattern in keep:
        found = [x.name for x in linears if fnmatch.fnmatchcase(x.name, pattern)]
        if not found:
            raise InputError(
                f"keep={pattern} names no linear layer",
                f"the model has {len(linears)}: {', '.join(x.name for x in linears[:8])} ...",
                "Write a name from that list, or a pattern such as *down_proj*",
            )
        kept.update(found)
    return kept


def _weights(node: ir.Node) -> Iterator[tuple[ir.Value, int, ir.Node]]:
    """(weight, axis K, node that reads it) of a product."""
    if node.domain or node.op_type not in ("MatMul", "Gemm") or len(node.inputs) < 2:
        return
    operand = node.inputs[1]
    if operand is None:
        return
    turned = bool(node.op_type == "Gemm" and attribute(node, "transB", 0))
    user, weight = node, operand
    producer = operand.producer()
    if producer is not None and producer.op_type == "Transpose" and _swaps(producer):
        source = producer.inputs[0]
        if source is None:
            return
        user, weight, turned = producer, source, not turned
    tensor = weight.const_value
    if not weight.is_initializer() or tensor is None or tensor.dtype not in _FLOATS:
        return
    rank = len(tensor_shape(tensor))
    if rank >= 2:
        yield weight, rank - 1 if turned else rank - 2, user


def _swaps(node: ir.Node) -> bool:
    """Whether a Transpose swaps the last two axes, and nothing else."""
    order = list(attribute(node, "perm", ()))
    usual = list(range(len(order)))
    return len(order) >= 2 and order == [*usual[:-2], usual[-1], usual[-2]]
