"""Write a Gemm on flattened activations as a MatMul on the activations themselves.

Before::

    y = Reshape(Gemm(Reshape(x, [-1, H]), w, b), [B, S, V])

After::

    y = Add(MatMul(x, w), b)

PyTorch's `addmm` takes two dimensions, so exporters flatten batch and sequence around it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from omforge import ir
from omforge.ir.infer import infer_model
from omforge.ir.values import attribute, dims
from omforge.recognition.views import trace
from omforge.rewriting.base import Pass
from omforge.rewriting.builder import Builder
from omforge.rewriting.splice import Names, splice


@dataclass(frozen=True)
class UnflattenGemm(Pass):
    """Replace Gemm by MatMul and Add where its rows are a flattened batch and sequence."""

    name: ClassVar[str] = "unflatten-gemm"

    def run(self, model: ir.Model) -> int:
        """Replace; the number of Gemms gone."""
        infer_model(model)
        names = Names(model)
        count = 0
        for node in list(model.graph):
            width = _width(node)
            source = _unflattened(node) if node.op_type == "Gemm" else None
            if source is None or width is None:
                continue
            with Builder(model) as op:
                weight = node.inputs[1]
                if attribute(node, "transB", 0):
                    weight = op.Transpose(weight, perm=[1, 0])
                y = op.MatMul(source, weight)
                if len(node.inputs) > 2 and node.inputs[2] is not None:
                    y = op.Add(y, node.inputs[2])
                flat = op.Reshape(y, [-1, width])
                splice(op, [node.outputs[0]], [flat], by=self.name, names=names)
            count += 1
        return count


def _width(node: ir.Node) -> int | None:
    shape = dims(node.outputs[0])
    return shape[-1] if shape and isinstance(shape[-1], int) else None


def _unflattened(node: ir.Node) -> ir.Value | None:
    """The activations [..., H] behind the rows, None where the Gemm stands for itself."""
    rows = node.inputs[0]
    if rows is None or attribute(node, "transA", 0):
        return None
    if attribute(node, "alpha", 1.0) != 1.0 or attribute(node, "beta", 1.0) != 1.0:
        return None
    chain = trace(rows)
    if not chain.links or chain.links[0].node.op_type != "Reshape":
        return None
    source = chain.links[0].before
    shape, flat = dims(source), dims(rows)
    if shape is None or flat is None or len(shape) < 3 or shape[-1] != flat[-1]:
        return None
    return source
