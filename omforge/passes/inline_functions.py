"""Inline model-local functions.

ATC's parser ignores function bodies, and no pattern looks into them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from omforge import ir
from omforge.rewriting.base import Pass


@dataclass(frozen=True)
class InlineFunctions(Pass):
    """Replace every call of a model-local function by its body.

    The work is onnx-ir's own inliner; hicann/ge:parser/parser/onnx/onnx_parser.cc reads no
    FunctionProto.
    """

    name: ClassVar[str] = "inline-functions"

    def run(self, model: ir.Model) -> int:
        """Inline; the number of functions that are gone."""
        count = len(model.functions)
        if count:
            ir.common_passes.InlinePass()(model)
        return count
