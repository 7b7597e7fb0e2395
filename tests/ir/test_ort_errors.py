"""Of ONNX Runtime's errors the cause is told first."""

from typing import Any

import numpy as np
import pytest

from omforge import ir
from omforge.ir import numerics
from omforge.ir.ort_errors import ort_cause

HEAD = '<ir_version: 9, opset_import: ["" : 16]>'


def failure(text: str, **feeds: np.ndarray[Any, Any]) -> Exception:
    with pytest.raises(Exception, match="ONNXRuntimeError") as caught:
        numerics.run(ir.from_onnx_text(f"{HEAD} {text}"), feeds)
    return caught.value


def test_a_kernel_that_is_not_there_is_named() -> None:
    error = failure(
        """g (float16[4] x, int64[2] i, float16[2] u) => (float16[4] y) {
            [node] y = ScatterElements <reduction = "add"> (x, i, u) }""",
        x=np.ones(4, np.float16),
        i=np.array([0, 1]),
        u=np.ones(2, np.float16),
    )
    assert "ScatterElements" in ort_cause(error)
    assert "[ONNXRuntimeError]" not in ort_cause(error)


def test_the_node_and_the_cause_come_first() -> None:
    error = failure(
        "g (float[4] x, int64[1] i) => (float[1] y) { [lookup] y = Gather (x, i) }",
        x=np.ones(4, np.float32),
        i=np.array([9]),
    )
    assert ort_cause(error).startswith("Gather lookup: indices element out of data bounds")


def test_the_place_in_its_sources_is_left_out() -> None:
    error = failure(
        "g (float[A, B] x, float[C, D] w) => (float[A, D] y) { [product] y = MatMul (x, w) }",
        x=np.ones((2, 3), np.float32),
        w=np.ones((4, 5), np.float32),
    )
    said = ort_cause(error)
    assert said.startswith("MatMul product: ")
    assert ".h:" not in said
    assert "mismatch" in said


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            "[ONNXRuntimeError] : 9 : NOT_IMPLEMENTED : Could not find an implementation for "
            "CumSum(14) node with name '/mask/CumSum'",
            "its CPU has no CumSum for these dtypes (node /mask/CumSum)",
        ),
        (
            "[ONNXRuntimeError] : 6 : RUNTIME_EXCEPTION : Non-zero status code returned while "
            "running Slice node. Name:'' Status Message: /src/onnxruntime/core/slice.cc:40 "
            "Status Compute(const Context&, int) axis < rank was false. bad axis 7",
            "Slice: bad axis 7",
        ),
        ("something\n  else", "something else"),
    ],
)
def test_messages_of_other_versions(text: str, said: str) -> None:
    assert ort_cause(RuntimeError(text)) == said
