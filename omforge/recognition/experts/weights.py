"""The weights of E experts, of one tensor each or of parts of one, as one stacked tensor.

Exporters store an expert's matrix on its own, or all of them as one [E, D, I] that a Split or a
Gather takes apart; and either turned. What is found here is the stack that they came from, or that
they make: no weight is read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from omforge import ir
from omforge.ir.stacked import StackedTensor
from omforge.ir.values import attribute, constant_tensor, known_ints, tensor_shape
from omforge.recognition.views import shape_of
from omforge.rewriting.builder import Builder


@dataclass(frozen=True)
class Stack:
    """E matrices.

    Attributes:
        whole: The constant that has them all, if there is one: [E, ..].
        parts: Else the constants of each, of one dtype and shape.
        turned: Whether each is stored the other way round: [I, D] for a product with [D, I].
    """

    whole: ir.Value | None
    parts: tuple[ir.Value, ...]
    turned: bool

    @property
    def shape(self) -> tuple[int, int]:
        """D and I: what a product with one of them reads and makes."""
        tensor = constant_tensor(self.whole or self.parts[0])
        assert tensor is not None
        rows, columns = tensor_shape(tensor)[-2:]
        return (columns, rows) if self.turned else (rows, columns)

    def value(self, op: Builder) -> ir.Value:
        """[E, D, I], as a product reads it."""
        stored = self.whole
        if stored is None:
            tensors = [tensor for part in self.parts if (tensor := constant_tensor(part))]
            stored = op.constant(StackedTensor(tensors), f"{self.parts[0].name}_stacked")
        return op.Transpose(stored, perm=[0, 2, 1]) if self.turned else stored


def find_stack(weights: Sequence[ir.Value | None], *, transposed: bool = False) -> Stack | None:
    """What the matrices of E experts are stored as; None where they are no alike constants.

    Args:
        weights: As products read them.
        transposed: Whether the products turn what they read.
    """
    found = [_source(value) for value in weights if value is not None]
    if not found or len(found) != len(weights) or any(each is None for each in found):
        return None
    sources = [each for each in found if each is not None]
    first, _, turned = sources[0]
    if any(each[2] != turned for each in sources):
        return None
    tensor = constant_tensor(first)
    assert tensor is not None
    if all(source is first and row == at for at, (source, row, _) in enumerate(sources)):
        return (
            Stack(first, (), turned != transposed)
            if tensor_shape(tensor)[0] == len(sources)
            else None
        )
    kinds = {(t.dtype, tensor_shape(t)) for s, _, _ in sources if (t := constant_tensor(s))}
    if any(row is not None for _, row, _ in sources) or len(kinds) != 1:
        return None
    return Stack(None, tuple(source for source, _, _ in sources), turned != transposed)


def _source(value: ir.Value) -> tuple[ir.Value, int | None, bool] | None:
    """(constant, which of its rows if it is one, whether it is turned) behind a matrix."""
    row: int | None = None
    turned = False
    while (tensor := constant_tensor(value)) is None:
        node = value.producer()
        if node is None or node.domain != "" or not node.inputs or node.inputs[0] is None:
            return None
        before, shape = node.inputs[0], shape_of(value)
        match node.op_type:
            case "Identity":
                pass
            case "Transpose":
                rank = len(shape)
                usual = [*range(rank - 2), rank - 1, rank - 2]
                if rank < 2 or list(attribute(node, "perm", ())) != usual:
                    return None
                turned = not turned
            case "Squeeze" | "Reshape":
                if shape_of(before) != (1, *shape):
                    return None
            case "Split" if row is None:
                if attribute(node, "axis", 0) != 0 or shape[:1] != (1,):
                    return None
                if any(shape_of(output) != shape for output in node.outputs):
                    return None
                row = list(node.outputs).index(value)
            case "Gather" if row is None:
                number = known_ints(node.inputs[1])
                if attribute(node, "axis", 0) != 0 or number is None or len(number) != 1:
                    return None
                row = number[0]
            case "Slice" if row is None:
                axes = known_ints(node.inputs[3]) if len(node.inputs) > 3 else None
                starts = known_ints(node.inputs[1])
                if axes != [0] or starts is None or shape[:1] != (1,):
                    return None
                row = starts[0]
            case _:
                return None
        value = before
    return (value, row, turned) if len(tensor_shape(tensor)) == (2 if row is None else 3) else None
