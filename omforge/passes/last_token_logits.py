"""Compute logits only for the tokens that are asked for.

Before::

    logits = MatMul(Norm(hidden), head)                            # [B, S, V]

After::

    rows   = Gather(Reshape(hidden, [-1, H]), logits_index)        # [R, H]
    logits = MatMul(Norm(rows), head)                              # [R, V]

An export that keeps the last token alone (`logits_to_keep=1`) has a Slice or a Gather on the way,
which goes: the last token of a padded chunk is not the last of its prompt.

The head is the widest product of a model and prefill needs one row of it; `logits_index` holds flat
row numbers `b * S + i`, so that a prompt shorter than its bucket, and every row of a batch, picks
its own last token.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from omforge import ir
from omforge.ir.dims import symbol
from omforge.ir.edit import remove_dead, replace_value
from omforge.ir.infer import infer_model
from omforge.ir.values import attribute, dims, known, to_shape
from omforge.recognition.interface import Interface, find_interface, is_weight
from omforge.recognition.step_names import LOGITS_INDEX
from omforge.recognition.views import shape_of
from omforge.rewriting.base import Pass
from omforge.rewriting.builder import Builder
from omforge.rewriting.splice import insert

# Each row of the output depends on the same row of the input alone.
_ELEMENTWISE = {"Add", "Cast", "Clip", "Div", "Identity", "Mul", "Sub", "Tanh"}
_NORMS = {"LayerNormalization", "RMSNormalization"}
_QUANTIZERS = {"DequantizeLinear", "QuantizeLinear"}
_RESHAPES = {"Flatten", "Reshape", "Squeeze", "Unsqueeze"}


@dataclass(frozen=True)
class LastTokenLogits(Pass):
    """Gather the rows of `logits_index` ahead of the final norm and the head."""

    name: ClassVar[str] = "last-token-logits"
    changes_interface: ClassVar[bool] = True

    def run(self, model: ir.Model) -> int:
        """Rewrite; 1, or 0 where the logits are rows already.

        Raises:
            InputError: The graph is no causal LM, or has logits of chosen tokens only.
        """
        infer_model(model)
        graph = model.graph
        if any(value.name == LOGITS_INDEX for value in graph.inputs):
            return 0
        interface = find_interface(model)
        logits = interface.logits
        steps = _head(logits)
        bypassed = {node for node in steps if node.op_type in _RESHAPES or keeps_last(node)}
        if all(node.op_type in _RESHAPES for node in bypassed):
            if len(shape_of(logits)) != 3:
                return 0
            _check_all_tokens(interface)
        hidden, first = _moving(steps[-1]), steps[-1]
        width = (shape_of(hidden) or ("unknown",))[-1]
        if not isinstance(width, int):
            raise ir.InputError(f"the hidden size is {width}, not a number", f"at {hidden.name}")
        index = ir.Value(
            name=LOGITS_INDEX,
            shape=to_shape((symbol("rows"),)),
            type=ir.TensorType(ir.DataType.INT64),
        )
        graph.inputs.append(index)
        with Builder(model) as op:
            rows = op.Gather(op.Reshape(hidden, [-1, width]), index, axis=0)
            insert(op, first, by=self.name)
        for place, value in enumerate(first.inputs):
            if value is hidden:
                first.replace_input_with(place, rows)
        for node in steps:
            if node in bypassed and node.inputs[0] is not None:
                replace_value(node.outputs[0], node.inputs[0])
            elif node.op_type in _NORMS:
                node.attributes["axis"] = ir.AttrInt64("axis", -1)
        remove_dead(model)
        infer_model(model)
        return 1


def _head(logits: ir.Value) -> list[ir.Node]:
    """The steps that work row by row, from the logits back to the earliest."""
    steps: list[ir.Node] = []
    value = logits
    while (node := value.producer()) is not None and _is_row_wise(node):
        if len(value.uses()) + value.is_graph_output() != 1:
            break  # somebody else wants all rows of it
        steps.append(node)
        value = _moving(node)
    while steps and steps[-1].op_type in _RESHAPES:
        steps.pop()  # it would only be bypassed
    if not steps:
        producer = value.producer()
        raise ir.InputError(
            f"no head makes the output {logits.name}",
            "nothing does"
            if producer is None
            else f"{ir.describe(producer)} is no product with a "
            "weight, or others use its result too",
            "Export with a language-model head; `omforge explain` says what was not raised",
        )
    return steps


def _is_row_wise(node: ir.Node) -> bool:
    if node.domain != "" or any(extra.uses() for extra in node.outputs[1:]):
        return False
    first = node.inputs[0] if node.inputs else None
    if first is None or all(v is None or is_weight(v) for v in node.inputs):
        return False
    if keeps_last(node):
        return True
    if node.op_type in _RESHAPES:  # rows may be merged or split, and keep their order
        return shape_of(first)[-1:] == shape_of(node.outputs[0])[-1:] != ()
    weights = [v for v in node.inputs if v is not None and is_weight(v)]
    if len(weights) != sum(v is not None for v in node.inputs) - 1:
        return False
    x = shape_of(_moving(node))
    match node.op_type:
        case "MatMul":
            return node.inputs[1] in weights and len(shape_of(node.inputs[1])) == 2
        case "Gemm":
            bias = all(len(shape_of(v)) <= 1 for v in node.inputs[2:])
            return node.inputs[1] in weights and not attribute(node, "transA", 0) and bias
        case kind if kind in _NORMS:
            return attribute(node, "axis", -1) in (-1, len(x) - 1)
        case kind if kind in _ELEMENTWISE:
            # [1, V] is a bias, too; more axes would outnumber those of the rows.
            return all(len(shape_of(v)) <= 2 and shape_of(v)[:-1] in ((), (1,)) for v in weights)
        case kind if kind in _QUANTIZERS:  # with one step: one along an axis might be of the rows
            return all(v.shape is not None and len(v.shape) == 0 for v in weights)
        case _:
            return False


def keeps_last(node: ir.Node) -> bool:
    """Whether it takes the last token of [B, S, H], as [B, 1, H] or [B, H]."""
    if node.op_type not in ("Gather", "Slice") or node.domain != "" or node.inputs[0] is None:
        return False
    shape = shape_of(node.inputs[0])
    if len(shape) != 3 or shape[1] == 1 or is_weight(node.inputs[0]):
        return False
    place = known(node.inputs[1])
    if place is None or place.size != 1:
        return False
    start = place.item()
    if start not in (-1, shape[1] - 1):
        return False
    if node.op_type == "Gather":
        return attribute(node, "axis", 0) in (1, -2)
    kept = dims(node.outputs[0])
    return kept == (shape[0], 1, shape[2])


def _check_all_tokens(interface: Interface) -> None:
    """Raise InputError where one token was chosen in a way that is not undone."""
    if shape_of(interface.logits)[1] == 1 != shape_of(interface.input_ids)[1]:
        raise ir.InputError(
            f"the output {interface.logits.name} has logits of one token",
            "which one is not told by a Slice or Gather of the last",
            "Export the logits of all tokens, or of the last one",
        )


def _moving(node: ir.Node) -> ir.Value:
    """The input that is no weight."""
    return next(v for v in node.inputs if v is not None and not is_weight(v))
