"""Put numbers in place of the symbols in a model's shapes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from omforge import ir
from omforge.ir import dims as d
from omforge.ir.dims import Dim
from omforge.ir.infer import infer_model
from omforge.ir.values import dims, to_shape
from omforge.passes.fold_constants import FoldConstants
from omforge.passes.fold_shapes import FoldShapes
from omforge.passes.remove_no_ops import RemoveNoOps
from omforge.rewriting.base import Pass


@dataclass(frozen=True)
class BindShapes(Pass):
    """Bind batch, sequence and capacity to numbers, so that every shape is static.

    Attributes:
        batch: Rows B.
        seq: New tokens S of a step; 0 leaves `seq` a symbol, for a graph with gears.
        capacity: Slots C of the cache.
        rows: Tokens whose logits are computed; the batch where it is 0.
    """

    name: ClassVar[str] = "bind-shapes"
    changes_interface: ClassVar[bool] = True
    batch: int = 1
    seq: int = 1
    capacity: int = 2048
    rows: int = 0

    def run(self, model: ir.Model) -> int:
        """Bind; the number of inputs whose shape became numbers.

        Raises:
            InputError: An input keeps a symbol that none of the options names, a size is less than
                1, or the export has fixed the tokens' rows or number at another.
        """
        bindings: dict[str, Dim] = {
            "batch": self.batch,
            "seq": self.seq,
            "capacity": self.capacity,
            "rows": self.rows or self.batch,
        }
        kept = frozenset[str]()
        if self.seq == 0:
            del bindings["seq"]
            kept = frozenset(("seq",))
        for name, size in bindings.items():
            if isinstance(size, int) and size < 1:
                raise ir.InputError(f"{name} is {size}", "a size is at least 1")
        _check_fixed(model, bindings)
        bound = {value: _bind(value, bindings, kept) for value in model.graph.inputs}
        changed = [value for value, shape in bound.items() if shape != dims(value)]
        if not changed:
            return 0
        for value in changed:
            value.shape = to_shape(bound[value])
        infer_model(model)
        FoldConstants().run(model)
        if kept:
            # What is still computed from shapes is computed from `seq` alone: say it in constants.
            FoldShapes().run(model)
        RemoveNoOps().run(model)
        infer_model(model)
        return len(changed)


def _check_fixed(model: ir.Model, bindings: Mapping[str, Dim]) -> None:
    """Raise InputError where the tokens have a number of rows or columns that is not asked for."""
    fed = ("input_ids", "inputs_embeds")
    tokens = next((v for v in model.graph.inputs if v.name in fed), None)
    fixed = (dims(tokens) or ()) if tokens is not None else ()
    for name, size in zip(("batch", "seq"), fixed, strict=False):
        wanted = bindings.get(name, size)
        if not isinstance(size, int) or size == wanted:
            continue
        if name == "batch":
            next_step = f"Choose a batch of {size}, or export the model with a dynamic batch"
        else:
            next_step = "Export the model with a dynamic sequence length"
        raise ir.InputError(
            f"a {name} of {wanted} does not fit the export",
            f"its tokens are [{', '.join(map(str, fixed))}], whatever the caller has",
            next_step,
        )


def _bind(value: ir.Value, bindings: dict[str, Dim], kept: frozenset[str]) -> tuple[Dim, ...]:
    shape = dims(value)
    if shape is None:
        raise ir.InputError(
            f"input {value.name} has no shape", "nothing can be bound", "Export it with shapes"
        )
    bound = tuple(d.substitute(dim, bindings) for dim in shape)
    left = sorted({name for dim in bound for name in d.symbols(dim) - kept})
    if left:
        raise ir.InputError(
            f"input {value.name} keeps the dimension {left[0]!r}",
            f"bind-shapes binds {', '.join(bindings)}",
            "Run fuse-kv-io before",
        )
    return bound
