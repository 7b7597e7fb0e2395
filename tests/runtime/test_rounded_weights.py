"""rounded_weights: what rounding the weights alone does is told as that, and stays a failure."""

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from omforge import ir
from omforge.compilation.compile import compile_bundle
from omforge.compilation.options import CompileOptions
from omforge.ir import numerics
from omforge.ir.infer import infer_model
from omforge.passes import make_pipeline
from omforge.rewriting.builder import Builder
from omforge.rewriting.splice import insert
from omforge.runtime.bundle import Bundle
from omforge.runtime.compare import verify_bundle
from omforge.runtime.rounded_weights import WeightRounding, with_rounded_weights
from omforge.testing import outline, parse
from tests.runtime.tiny import Tiny

Exported = Callable[[str, str], Path]
BLAMED = "float16 does not hold this model closer"


def test_weights_are_rounded_and_nothing_else() -> None:
    """Angles, one number, and the scale of a layer norm are float32 in a lowered graph, too."""
    model = parse("""<ir_version: 11, opset_import: ["" : 24]>
    g (float[N, 2] x) => (float[N, 2] y)
    <float[2, 2] w = {0.1, 2, 3, 4}, float[2] step = {0.3, 0.7}, float half = {0.1},
     float[2] scale = {1.1, 2.2}> {
        angle = Mul (x, step) turn = Cos (angle) n = LayerNormalization (turn, scale)
        z = MatMul (n, w) y = Mul (z, half) }""")
    infer_model(model)
    before = outline(model)
    rounded = with_rounded_weights(model, "float16")
    assert outline(model) == before
    down, up = [node for node in rounded.graph if node.op_type == "Cast"]
    assert [value.name for value in down.inputs if value is not None] == ["w"]
    assert [n.attributes["to"].as_int() for n in (down, up)] == [
        ir.DataType.FLOAT16,
        ir.DataType.FLOAT,
    ]
    feeds = {"x": np.array([[0.5, 2.0]], np.float32)}
    model.graph.initializers["w"].const_value = ir.tensor(
        np.array([[0.1, 2], [3, 4]], np.float16).astype(np.float32), name="w"
    )
    assert np.array_equal(numerics.run(rounded, feeds)["y"], numerics.run(model, feeds)["y"])


@pytest.mark.parametrize(
    ("weights", "lowered", "expected"),
    [(1.5, 2.9, True), (1.5, 3.1, False), (0.9, 1.2, False), (np.inf, np.inf, False)],
)
def test_what_the_weights_explain(weights: float, lowered: float, *, expected: bool) -> None:
    assert WeightRounding(weights, "one token", "float16").explains(lowered) is expected


def _with_badly_held_embeddings(path: Path, folder: Path) -> Path:
    """Embeddings are stored with 64 added, where half precision has steps of 1/16."""
    model = ir.load(path)
    make_pipeline("canonicalize").run(model)
    infer_model(model)
    (embedding,) = [n for n in model.graph if n.op_type == "Gather" and _table(n) is not None]
    table = _table(embedding)
    assert table is not None
    users = embedding.outputs[0].consumers()
    with Builder(model) as op:
        far = op.Gather(table + np.float32(64), embedding.inputs[1])
        near = op.Sub(far, np.full(table.shape[-1:], 64, np.float32))
        insert(op, users[0], by="test")
    for user in users:
        user.replace_input_with(list(user.inputs).index(embedding.outputs[0]), near)
    folder.mkdir()
    ir.save(model, folder / "model.onnx")
    return folder


def _table(node: ir.Node) -> np.ndarray | None:
    tensor = None if node.inputs[0] is None else node.inputs[0].const_value
    return tensor.numpy() if tensor is not None and len(tensor.shape) == 2 else None


def test_weights_that_half_precision_does_not_hold_are_named(
    exported: Exported, tmp_path: Path
) -> None:
    source = _with_badly_held_embeddings(exported("optimum", "llama_gqa"), tmp_path / "export")
    options = CompileOptions("Ascend310P3", context=32, prefill=(4,))
    compile_bundle(source, tmp_path / "half", options)
    report = verify_bundle(Bundle.open(tmp_path / "half"), steps=2)
    assert not report.ok
    assert {c.level for c in report.comparisons if not c.ok} == {"lowered"}
    assert all(BLAMED in failure.why for failure in report.failures)
    assert all("times the tolerance" in failure.why for failure in report.failures)
    assert all("--dtype fp32" in failure.next_step for failure in report.failures)


def test_a_wrong_weight_is_not_excused(
    tiny_bundle: Callable[[Tiny], Bundle], tmp_path: Path
) -> None:
    bundle = tiny_bundle(Tiny(dtype="float16"))
    shutil.copyfile(bundle.export, tmp_path / bundle.export.name)
    folder = Path(shutil.copytree(bundle.folder, tmp_path / "bundle"))
    data = np.frombuffer((folder / "weights.bin").read_bytes(), np.float16)
    (folder / "weights.bin").write_bytes((data * np.float16(1.05)).tobytes())
    report = verify_bundle(Bundle.open(folder, verify_hashes=False), steps=1)
    assert not report.ok
    assert not any(BLAMED in failure.why for failure in report.failures)
