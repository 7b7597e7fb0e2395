"""Sessions on ONNX Runtime: specs, refusals, reference bodies, weights that stay on disk."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from omforge import ir
from omforge.bundle.manifest import TensorSpec
from omforge.ir.errors import InputError, OmforgeError
from omforge.ir.files import load
from omforge.runtime.bundle import Bundle
from omforge.runtime.session import OrtSession, check_interface
from tests.runtime.tiny import Tiny

ADD = """<ir_version: 9, opset_import: ["" : 16]>
g (float[2, N] x, int32[1] i) => (float[2, N] y, int32[1] j) { y = Add (x, x)  j = Add (i, i) }"""
NORM = """<ir_version: 9, opset_import: ["" : 16]>
g (float16[1, 4] x, float16[4] gamma) => (float16[1, 4] y) { y = NPURmsNorm (x, gamma) }"""
FEEDS = {"x": np.ones((2, 3), np.float32), "i": np.ones(1, np.int32)}


def add() -> OrtSession:
    return OrtSession(ir.from_onnx_text(ADD))


def test_specs_and_outputs_by_name():
    session = add()
    assert session.inputs == (
        TensorSpec("x", "float32", (2, "N")),
        TensorSpec("i", "int32", (1,)),
    )
    assert [spec.name for spec in session.outputs] == ["y", "j"]
    outputs = session.run(FEEDS)
    assert outputs["y"].tolist() == [[2, 2, 2], [2, 2, 2]]
    assert outputs["j"].tolist() == [2]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": np.ones((3, 3), np.float32)}, r"input x .*takes float32\[2, N\].*float32\[3, 3\]"),
        ({"x": np.ones(2, np.float32)}, r"takes float32\[2, N\], the feed is float32\[2\]"),
        ({"x": np.ones((2, 3))}, r"takes float32\[2, N\], the feed is float64\[2, 3\]"),
        ({"z": np.ones(1)}, "not inputs of the graph: z. The inputs are x, i"),
    ],
)
def test_feeds_that_do_not_match_are_refused(change: dict[str, np.ndarray], message: str):
    with pytest.raises(InputError, match=message):
        add().run(FEEDS | change)


def test_a_missing_feed_is_refused():
    with pytest.raises(InputError, match="the feeds do not match the inputs: missing: i"):
        add().run({"x": FEEDS["x"]})


def test_a_failure_inside_onnxruntime_is_told_as_ours():
    gather = """<ir_version: 9, opset_import: ["" : 16]>
    g (float[4] x, int64[1] i) => (float[1] y) { y = Gather (x, i) }"""
    with pytest.raises(OmforgeError, match=r"ONNX Runtime failed: .*out of"):
        OrtSession(ir.from_onnx_text(gather)).run({"x": np.ones(4, np.float32), "i": np.array([9])})


def test_a_lowered_graph_runs_with_the_reference_bodies():
    x = np.array([[1, 2, 3, 4]], np.float16)
    session = OrtSession(ir.from_onnx_text(NORM), lowered=True)
    y = session.run({"x": x, "gamma": np.full(4, 2, np.float16)})["y"]
    assert y == pytest.approx(2 * x / np.sqrt(7.5), rel=2e-3)


def test_a_closed_session_says_so():
    session = add()
    session.close()
    with pytest.raises(InputError, match="the session is closed"):
        session.run(FEEDS)


def test_a_missing_file_and_a_file_that_is_no_model(tmp_path: Path):
    with pytest.raises(InputError, match=r"gone\.onnx does not exist"):
        OrtSession(tmp_path / "gone.onnx")
    (tmp_path / "bad.onnx").write_bytes(b"not a model")
    with pytest.raises(InputError, match=r"ONNX Runtime cannot load .*bad.onnx"):
        OrtSession(tmp_path / "bad.onnx")


def test_a_lowered_file_is_run_from_its_mapped_weights(
    tiny_bundle: Callable[[Tiny], Bundle], monkeypatch: pytest.MonkeyPatch
):
    """The twin is handed over as bytes; its weights must come from the file, not through us."""
    bundle = tiny_bundle(Tiny())
    graph = bundle.graph(bundle.manifest.buckets[0])
    before = sorted(path.name for path in bundle.folder.iterdir())

    def refuse(self: object) -> None:
        raise AssertionError("a weight was read")

    monkeypatch.setattr(ir.ExternalTensor, "numpy", refuse)
    monkeypatch.setattr(ir.ExternalTensor, "tobytes", refuse)
    session = OrtSession(graph, lowered=True)
    assert session.inputs[0] == TensorSpec("input_ids", "int32", (1, 1))
    assert sorted(path.name for path in bundle.folder.iterdir()) == before


def test_weights_in_two_folders_are_refused(tiny_bundle: Callable[[Tiny], Bundle]):
    bundle = tiny_bundle(Tiny())
    model = load(bundle.graph(bundle.manifest.buckets[0]))
    external = [
        value.const_value
        for value in model.graph.initializers.values()
        if isinstance(value.const_value, ir.ExternalTensor)
    ]
    external[0].base_dir = "/elsewhere"
    with pytest.raises(InputError, match=r"weights are in several folders: .*/elsewhere"):
        OrtSession(model, lowered=True)


def test_an_interface_that_is_not_the_promised_one_is_refused():
    found = (TensorSpec("x", "float16", (1, 4)),)
    check_interface("g", "inputs", found, found)
    with pytest.raises(InputError, match=r"inputs \['x'\], the manifest says \['y'\]"):
        check_interface("g", "inputs", found, (TensorSpec("y", "float16", (1, 4)),))
    with pytest.raises(InputError, match=r"x is float16\[1, 4\] in the graph and float16\[1, 8\]"):
        check_interface("g", "inputs", found, (TensorSpec("x", "float16", (1, 8)),))
