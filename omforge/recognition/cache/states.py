"""States of fixed size, which linear-attention, state-space and short-convolution layers carry.

Before, and after: the same nodes, under names that the runtime knows::

    conv_state.0 [B, H, 4], ssm_state.0 [B, N, D, D]   past_state.0, past_state.1
      ->  new_conv.0, new_ssm.0                          ->  present_state.0, present_state.1

A state has no slots that a mask could hide: whatever a step is fed goes into it. So a model with
states is never fed padding, neither at the end of a bucket nor on the left of a shorter row; and
where its layers multiply by the exported attention mask, to keep padding out, that mask is all
ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from omforge import ir
from omforge.ir.dims import symbols
from omforge.ir.edit import all_values, fresh_name
from omforge.recognition.interface import Interface, states
from omforge.recognition.views import shape_of
from omforge.rewriting.builder import Builder
from omforge.rewriting.events import record
from omforge.rewriting.splice import insert

PAST_STATE, PRESENT_STATE = "past_state", "present_state"


@dataclass(frozen=True)
class State:
    """One state: the input that holds it, and the output that renews it, of the same shape."""

    past: ir.Value
    present: ir.Value


def find_states(model: ir.Model, interface: Interface) -> tuple[State, ...]:
    """The states that an export carries besides keys and values, in the order of its inputs.

    Raises:
        CheckError: A state is not one row for each row of tokens and of fixed size otherwise.
    """
    found = tuple(State(*pair) for pair in states(model, interface))
    batch = symbols(shape_of(interface.input_ids)[0])
    for state in found:
        shape = shape_of(state.past)
        of_batch = [dim for dim in shape if not isinstance(dim, int) and symbols(dim) == batch]
        numbers = sum(isinstance(dim, int) for dim in shape)
        if len(of_batch) != len(batch) or numbers + len(of_batch) != len(shape):
            raise ir.CheckError(
                f"the state {state.past.name} cannot be carried from step to step",
                f"expected one axis of the batch and numbers; its shape is "
                f"[{', '.join(map(str, shape))}]",
                "Export the model with a dynamic batch and the sizes of its states as numbers",
            )
    return found


def name_states(model: ir.Model, found: Sequence[State]) -> list[ir.Value]:
    """Give the states their names, and the model its outputs; the inputs, which the caller adds.

    Args:
        model: Its outputs do not hold the states.
        found: The states.
    """
    taken = {value.name: value for value in all_values(model.graph)}
    for number, state in enumerate(found):
        for value, prefix in ((state.past, PAST_STATE), (state.present, PRESENT_STATE)):
            name = f"{prefix}.{number}"
            other = taken.get(name)
            if other is not None and other is not value:
                other.name = fresh_name(model.graph, f"{name}_exported")
                taken[other.name] = other
            value.name = name
            taken[name] = value
        model.graph.outputs.append(state.present)
    return [state.past for state in found]


def is_state(value: ir.Value) -> bool:
    """Whether an input is a state that was named."""
    return (value.name or "").startswith(f"{PAST_STATE}.")


def renewed(name: str) -> str:
    """The name of the output that renews a named state."""
    return name.replace(PAST_STATE, PRESENT_STATE)


def see_no_padding(model: ir.Model, exported: ir.Value, mask: ir.Value, by: str) -> None:
    """Put ones in place of what still reads the exported attention mask.

    Args:
        model: A model with states, whose attention has the runtime's masks already.
        exported: Its attention mask, 1 for a token, [B, P+S].
        mask: A mask of the runtime, [B, 1, S, C+S], which gives the sizes.
        by: The pass.
    """
    if not exported.uses() or len(shape_of(exported)) != 2 or exported.dtype is None:
        return
    users = ", ".join(ir.describe(node) for node in exported.consumers())
    record(
        model,
        by,
        exported,
        f"the model carries states and is never padded: {users} see all tokens",
    )
    with Builder(model) as op:
        sizes = op.Gather(op.Shape(mask), np.array([0, 3]), axis=0)
        ones = op.Expand(np.array(1, exported.dtype.numpy()), sizes)
        insert(op, next(iter(model.graph)), by=by)
    exported.replace_all_uses_with(ones)
