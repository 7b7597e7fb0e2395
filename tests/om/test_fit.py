"""An .om that is another bucket's is told by what it takes and gives."""

import re
from pathlib import Path

import pytest

from omforge.bundle.manifest import Bucket, TensorSpec
from omforge.ir.errors import InputError
from omforge.om import GEAR_INPUT, OmTensor, read_om, write_om
from omforge.om.fit import require_fit

BUCKET = Bucket(
    name="b",
    kind="decode",
    batch=1,
    seq=4,
    capacity=8,
    file="b.onnx",
    inputs=(TensorSpec("x", "float16", (1, 4)), TensorSpec("n", "int32", (1,))),
    outputs=(TensorSpec("y", "float16", (1, 2)),),
    om=None,
    command=(),
)
X, N = OmTensor("x", "float16", (1, 4), 8), OmTensor("n", "int32", (1,), 4)
Y = OmTensor("MatMul_3:0:y", "float16", (1, 2), 4)


def check(file: Path, inputs: list[OmTensor], outputs: list[OmTensor], bucket=BUCKET) -> None:
    write_om(file, name="b", inputs=inputs, outputs=outputs, partitions={2: b"t"})
    require_fit(read_om(file), bucket)


def test_the_buckets_own_om_fits(tmp_path: Path) -> None:
    check(tmp_path / "b.om", [X, N], [Y])


def test_gears_leave_dims_open(tmp_path: Path) -> None:
    specs = (TensorSpec("x", "float16", (1, "seq")),)
    bucket = Bucket(**{**vars(BUCKET), "inputs": specs, "gears": (1, 4), "kind": "gears"})
    geared = OmTensor("x", "float16", (1, -1), 8)
    check(tmp_path / "b.om", [geared, OmTensor(GEAR_INPUT, "int32", (1,), 4)], [Y], bucket)
    with pytest.raises(InputError, match="its inputs are x, not x, ascend_mbatch_shape_data"):
        check(tmp_path / "b.om", [geared], [Y], bucket)


@pytest.mark.parametrize(
    ("inputs", "outputs", "message"),
    [
        ([N, X], [Y], "its inputs are n, x, not x, n"),
        ([X, N], [], "its outputs are , not y"),
        ([X, OmTensor("n", "int64", (1,), 8)], [Y], r"n is int64\[1\], the manifest says int32"),
        (
            [OmTensor("x", "float16", (1, 5), 8), N],
            [Y],
            r"x is float16\[1, 5\], .* float16\[1, 4\]",
        ),
        ([X, N], [OmTensor("a:0:y", "float16", (2,), 4)], r"y is float16\[2\]"),
    ],
)
def test_another_one_does_not(
    tmp_path: Path, inputs: list[OmTensor], outputs: list[OmTensor], message: str
) -> None:
    with pytest.raises(InputError, match=r"is not the \.om of bucket b") as caught:
        check(tmp_path / "b.om", inputs, outputs)
    assert re.search(message, str(caught.value))


def test_one_without_an_interface_is_not_believed(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="it does not say what it takes and gives"):
        check(tmp_path / "b.om", [], [])


def test_outputs_of_a_ge_graph_have_no_names_and_go_by_their_order(tmp_path: Path) -> None:
    """What atc calls them is `output_<number>_<node>_<number>`."""
    made = OmTensor("output_0_MatMul_3_0", "float16", (1, 2), 4)
    write_om(tmp_path / "b.om", name="b", inputs=[X, N], outputs=[made], partitions={2: b"t"})
    om = read_om(tmp_path / "b.om")
    require_fit(om, BUCKET, "air")
    with pytest.raises(InputError, match="its outputs are output_0_MatMul_3_0, not y"):
        require_fit(om, BUCKET, "onnx")
    longer = Bucket(**{**vars(BUCKET), "outputs": (*BUCKET.outputs, *BUCKET.outputs)})
    with pytest.raises(InputError, match="its outputs are output_0_MatMul_3_0, not y, y"):
        require_fit(om, longer, "air")
