"""The weights of experts, as exporters store them, as one stack."""

import numpy as np
import pytest

from omforge import ir
from omforge.ir.infer import infer_model
from omforge.ir.numerics import run
from omforge.recognition.experts.weights import find_stack
from omforge.rewriting.builder import Builder
from omforge.testing import parse

WHOLE = f"float[2, 3, 4] w = {{{', '.join(map(str, range(24)))}}}"
APART = ", ".join(
    f"float[{shape}] {name} = {{{', '.join(str(x + first) for x in range(12))}}}"
    for name, first in (("w0", 0), ("w1", 12))
    for shape in ["3, 4"]
)
FIRST = "int64[1] first = {0}"
NUMBERS = "int64 e0 = {0}, int64 e1 = {1}"
SPELLINGS = {
    "apart": (APART, "m0 = Identity (w0)  m1 = Identity (w1)"),
    "a Split": (
        f"{WHOLE}, {FIRST}",
        "p0, p1 = Split <axis = 0, num_outputs = 2> (w)  m0 = Squeeze (p0, first)"
        "  m1 = Squeeze (p1, first)",
    ),
    "a Gather": (f"{WHOLE}, {NUMBERS}", "m0 = Gather (w, e0)  m1 = Gather (w, e1)"),
    "turned": (APART, "m0 = Transpose <perm = [1, 0]> (w0)  m1 = Transpose <perm = [1, 0]> (w1)"),
    "turned, then split": (
        f"{WHOLE}, {FIRST}",
        "t = Transpose <perm = [0, 2, 1]> (w)  p0, p1 = Split <axis = 0, num_outputs = 2> (t)"
        "  m0 = Squeeze (p0, first)  m1 = Squeeze (p1, first)",
    ),
}


def _model(constants: str, body: str) -> ir.Model:
    model = parse(f"""<ir_version: 11, opset_import: ["" : 24]>
    g (float[n] x) => (float[a, b] m0, float[a, b] m1) <{constants}> {{ {body} }}""")
    infer_model(model)
    return model


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_they_are_one_stack(spelling: str) -> None:
    model = _model(*SPELLINGS[spelling])
    expected = run(model, {"x": np.zeros(1, np.float32)})
    found = find_stack(list(model.graph.outputs))
    assert found is not None
    assert found.shape == expected["m0"].shape
    assert (found.whole is None) == (spelling in ("apart", "turned"))
    with Builder(model) as op:
        value = found.value(op)
        stored = value if value.const_value is not None else op.nodes[0].inputs[0]
        assert stored is not None
        numbers = stored.const_value.numpy()  # pyright: ignore[reportOptionalMemberAccess]
        if found.turned:
            numbers = np.swapaxes(numbers, 1, 2)
    assert np.array_equal(numbers, np.stack([expected["m0"], expected["m1"]]))


@pytest.mark.parametrize(
    ("constants", "body"),
    [
        (f"{WHOLE}, {NUMBERS}", "m0 = Gather (w, e1)  m1 = Gather (w, e0)"),
        (APART, "m0 = Identity (w0)  m1 = Neg (w1)"),
        (
            APART.replace("w1", "v1"),
            "m0 = Transpose <perm = [1, 0]> (w0)  t = Transpose <perm = [1, 0]> (v1)"
            "  m1 = Transpose <perm = [1, 0]> (t)",
        ),
    ],
)
def test_what_is_none_in_order_is_none(constants: str, body: str) -> None:
    """Near misses: another order, a computed matrix, matrices that are stored in two ways."""
    assert find_stack(list(_model(constants, body).graph.outputs)) is None
