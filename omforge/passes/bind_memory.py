"""Give the memory of a decoder, an encoder's states, a fixed length.

Before, and after (length 1500)::

    encoder.key.0 [B, K, E, D], encoder_mask [B, E]  ->  [B, K, 1500, D], [B, 1500]

A bucket is static, and memory is given once for a sequence: one number serves all steps.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from omforge import ir
from omforge.ir.dims import substitute
from omforge.ir.infer import infer_model
from omforge.ir.values import dims, to_shape
from omforge.recognition.attention.cross import memory_lengths
from omforge.recognition.interface import find_interface, memory_of
from omforge.recognition.views import shape_of
from omforge.rewriting.base import Pass


@dataclass(frozen=True)
class BindMemory(Pass):
    """Put a number in place of the length of an encoder's states; their rows are the tokens'.

    Attributes:
        length: Positions E of the memory.
    """

    name: ClassVar[str] = "bind-memory"
    changes_interface: ClassVar[bool] = True
    length: int = 1500

    def run(self, model: ir.Model) -> int:
        """Bind; the number of inputs whose length became a number.

        Raises:
            InputError: The length is less than 1.
        """
        if self.length < 1:
            raise ir.InputError(f"a memory of {self.length} positions makes no sense")
        interface = find_interface(model)
        bound = dict.fromkeys(memory_lengths(interface), self.length)
        rows = shape_of(interface.input_ids)[0]
        changed = 0
        for value in memory_of(interface):
            old = dims(value) or ()
            new = (rows, *(substitute(dim, bound) for dim in old[1:]))
            if new != old:
                value.shape = to_shape(new)
                changed += 1
        if changed:
            infer_model(model)
        return changed
