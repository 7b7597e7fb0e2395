"""Take one position for each token, where an export takes several that are equal for text.

Before, as multimodal models do, whose rotary embeddings turn by time, height and width (M-RoPE)::

    position_ids [3, B, S], or [4, B, S] with the text's own first

After::

    position_ids [B, S] -> Unsqueeze -> Expand to [3, B, S]

For text the rows are equal. In an image they are not: what this pass leaves cannot be given one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from omforge import ir
from omforge.ir.infer import infer_model
from omforge.ir.values import to_shape
from omforge.recognition.interface import find_interface, stacked_positions
from omforge.recognition.views import shape_of
from omforge.rewriting.base import Pass
from omforge.rewriting.builder import Builder
from omforge.rewriting.events import record
from omforge.rewriting.splice import insert


@dataclass(frozen=True)
class TextPositions(Pass):
    """Replace position_ids [3, B, S] by [B, S], given to all three."""

    name: ClassVar[str] = "text-positions"
    changes_interface: ClassVar[bool] = True

    def run(self, model: ir.Model) -> int:
        """Rewrite; 1 if the input is there. What that costs is an event."""
        infer_model(model)
        try:
            interface = find_interface(model)
        except ir.InputError:
            return 0  # no causal LM: what is to be said of it is said elsewhere
        stacked = stacked_positions(interface)
        if stacked is None:
            return 0
        count = shape_of(stacked)[0]
        count = count if isinstance(count, int) else 3
        name, users = stacked.name, tuple(stacked.uses())
        stacked.name = f"{name}/stacked"
        single = ir.Value(
            name=name,
            shape=to_shape(interface.tokens),
            type=ir.TensorType(stacked.dtype or ir.DataType.INT64),
        )
        model.graph.inputs[model.graph.inputs.index(stacked)] = single
        first = next(node for node in model.graph if stacked in node.inputs)
        with Builder(model) as op:
            wanted = op.constant(np.array([count, 1, 1], np.int64))
            each = op.Expand(op.Unsqueeze(single, [0]), wanted)
            insert(op, first, by=self.name)
        for node, index in users:
            node.replace_input_with(index, each)
        record(
            model,
            self.name,
            f"position_ids [{count}, B, S]",
            f"its {count} rows are fed as one, since they are equal for text; an image's are not, "
            "and this cannot be given any",
        )
        infer_model(model)
        return 1
