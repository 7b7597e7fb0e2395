"""Deliberately illegal models, one per rule or trap, each with its legal twin where there is one.

A model is ONNX text, or text and an edit of its protobuf. `code` is the error that atc gives, ""
where it goes wrong without a word; there `trap` is the code that the simulator gives instead.
`sim=False` marks what lies behind the parser (kernels, devices, inferences): `reason` says so.
"""

from tests.lowering.illegal_files import ILLEGAL_FILES
from tests.lowering.illegal_inference import ILLEGAL_ATTRIBUTES, ILLEGAL_INFERENCE
from tests.lowering.illegal_operators import ILLEGAL_OPERATORS
from tests.lowering.illegal_parts import IllegalModel, Source
from tests.lowering.illegal_target_ops import ILLEGAL_TARGET_OPS

__all__ = ["ILLEGAL", "IllegalModel", "Source"]

ILLEGAL: tuple[IllegalModel, ...] = (
    *ILLEGAL_FILES,
    *ILLEGAL_OPERATORS,
    *ILLEGAL_ATTRIBUTES,
    *ILLEGAL_INFERENCE,
    *ILLEGAL_TARGET_OPS,
)
