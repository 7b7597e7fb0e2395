"""What ONNX Runtime's errors say, with the cause first.

Its messages begin with a code and the place in its own sources; the node and the cause come last,
behind a C++ signature.
"""

from __future__ import annotations

import re

_NODE = re.compile(r"while running (?P<op>\S+) node\. Name:'(?P<name>[^']*)'")
_KERNEL = re.compile(
    r"Could not find an implementation for (?P<op>\w+)\(\d+\) node with name '(?P<name>[^']*)'"
)
_CODE = re.compile(r"^\[ONNXRuntimeError\] : \d+ : \w+ : ")
_SOURCE = re.compile(r"^\S*\.(?:cc|h|cpp):\d+ (?:.*was false\. |[^)]*\) (?=[A-Z])|\w+ )")


def is_missing_kernel(error: BaseException) -> bool:
    """Whether the graph is right, and this device cannot run it."""
    return _KERNEL.search(str(error)) is not None


def ort_cause(error: BaseException) -> str:
    """Return what went wrong, in one line: the node and the cause."""
    text = " ".join(str(error).split())
    kernel = _KERNEL.search(text)
    if kernel is not None:
        place = f" (node {kernel['name']})" if kernel["name"] else ""
        return f"its CPU has no {kernel['op']} for these dtypes{place}"
    node = _NODE.search(text)
    cause = _CODE.sub("", text)
    _, status, message = cause.partition("Status Message: ")
    if status:
        cause = message
    cause = _SOURCE.sub("", cause)
    if node is None:
        return cause
    return f"{' '.join(part for part in (node['op'], node['name']) if part)}: {cause}"
