"""Give the inputs' dimensions one set of names, so that their shapes can be compared."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from omforge import ir
from omforge.ir.dims import Dim, Expr, symbol
from omforge.ir.infer import dims, infer_model, to_shape
from omforge.passes.events import record
from omforge.passes.interface import Interface, find_interface
from omforge.passes.pipeline import Pass
from omforge.passes.views import shape_of

BATCH, SEQ, PAST = symbol("batch"), symbol("seq"), symbol("past")


@dataclass(frozen=True)
class NameDims(Pass):
    """Name the dynamic dimensions `batch`, `seq` and `past`, whatever the exporter called them.

    Exporters give one size several names (the mask's length is `s53` and the cache's
    `past_sequence`); the role of an input says which size each axis is. Dimensions that are numbers
    stay numbers.
    """

    name: ClassVar[str] = "name-dims"

    def run(self, model: ir.Model) -> int:
        """Name; the number of inputs whose dimensions got new names.

        A graph that is no causal LM keeps its names, and that is an event.
        """
        changed = {value for value in model.graph.inputs if _rename(value, dims(value))}
        infer_model(model)
        try:
            roles = _roles(find_interface(model))
        except ir.InputError as error:
            record(model, self.name, "the whole graph", str(error))
            return len(changed)
        for value, names in roles:
            if _rename(value, names):
                changed.add(value)
        infer_model(model)
        return len(changed)


def _roles(interface: Interface) -> list[tuple[ir.Value, tuple[Dim, ...]]]:
    """Inputs with the sizes of their axes."""
    ids, mask = interface.input_ids, interface.attention_mask
    batch, seq = _named(ids, (BATCH, SEQ))
    roles: list[tuple[ir.Value, tuple[Dim, ...]]] = [(ids, (batch, seq))]
    if interface.position_ids is not None:
        roles.append((interface.position_ids, (batch, seq)))
    for value in interface.extra:
        shape = shape_of(value)
        # A recurrent state has a row for each row of tokens, and is of fixed size otherwise.
        if value.dtype is None or not value.dtype.is_floating_point():
            continue
        if len(shape) > 1 and sum(isinstance(dim, Expr) for dim in shape) == 1:
            roles.append((value, tuple(batch if isinstance(dim, Expr) else dim for dim in shape)))
    past: Dim = 0
    for cache, _ in interface.caches:
        shape = shape_of(cache)
        if len(shape) == 4:
            _, _, past, _ = _named(cache, (batch, shape[1], PAST, shape[3]))
            roles.append((cache, (batch, shape[1], past, shape[3])))
        else:
            past = PAST
    if mask is not None:
        total = past + seq
        rank = len(shape_of(mask))
        roles.append((mask, (batch, total) if rank == 2 else (batch, 1, seq, total)))
    return roles


def _named(value: ir.Value, names: tuple[Dim, ...]) -> tuple[Dim, ...]:
    """Names for the unknowns of a shape: a number is a promise of the exporter's, and stays."""
    shape = shape_of(value)
    if len(shape) != len(names):
        return names
    return tuple(
        name if isinstance(old, Expr) else old for old, name in zip(shape, names, strict=True)
    )


def _rename(value: ir.Value, names: tuple[Dim, ...] | None) -> bool:
    if names is None or len(shape_of(value)) != len(names):
        return False
    new, old = to_shape(_named(value, names)), value.shape
    value.shape = new
    return str(new) != str(old)
