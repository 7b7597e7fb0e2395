"""Inputs that the caller gives once for a sequence: an adapter's matrices, an encoder's states.

No output renews them, and no axis of theirs is the text's length: every step reads the same
numbers.
"""

from __future__ import annotations

from omforge import ir
from omforge.ir.dims import symbols
from omforge.recognition.cache.states import is_state
from omforge.recognition.interface import Interface, kept_by_an_output, memory_of, states
from omforge.recognition.views import shape_of


def find_fixed(model: ir.Model, interface: Interface) -> tuple[ir.Value, ...]:
    """The fixed inputs, in the order of the model's.

    Each is a float whose sizes are numbers, or the batch on the first axis; or the mask of an
    encoder's states, integer or boolean [B, E].
    """
    carried = {past for past, _ in states(model, interface)}
    return tuple(
        value
        for value in interface.extra
        if value.uses() and value not in carried and _is_fixed(value, interface)
    )


def _is_fixed(value: ir.Value, interface: Interface) -> bool:
    batch = shape_of(interface.input_ids)[0]
    shape = shape_of(value)
    if not shape or value.dtype is None:
        return False
    if not value.dtype.is_floating_point() and value not in memory_of(interface):
        return False
    if is_state(value) or kept_by_an_output(value, interface):
        return False
    if shape[0] == batch and not isinstance(batch, int):
        shape = shape[1:]
    return not any(symbols(dim) for dim in shape if not isinstance(dim, int))
