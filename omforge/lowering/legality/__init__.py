"""Full-conversion legality: everything that ATC would refuse or get wrong, listed at once.

ATC reports what it finds piecemeal, some of it as a crash, some not at all. Each rule is one small
function with what atc does, where that was read, and how sure it is. `RULES` look at a model,
`FILE_RULES` at the protobuf message and the files, for what a loaded model no longer shows.

`check_legal` holds a graph that omforge lowered against its own dialect, which is stricter than
atc; `check_file` holds any ONNX file against atc.
"""

from omforge.lowering.legality.check_file import ALL_RULES, FILE_RULES, FileCheck, check_file
from omforge.lowering.legality.rules import RULES, check_legal
from omforge.lowering.legality.subject import Finding, Offence, Rule, Subject

__all__ = [
    "ALL_RULES",
    "FILE_RULES",
    "RULES",
    "FileCheck",
    "Finding",
    "Offence",
    "Rule",
    "Subject",
    "check_file",
    "check_legal",
]
