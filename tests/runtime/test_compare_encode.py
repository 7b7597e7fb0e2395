"""verify of a bundle that encodes: every bucket, every output, real tokens only."""

import shutil
from pathlib import Path

import onnx
import pytest
from onnx import numpy_helper

from omforge.runtime.bundle import Bundle
from omforge.runtime.compare import verify_bundle
from omforge.runtime.compare_encode import make_encode_cases


def test_cases_fill_each_bucket_and_leave_it_open(bert: Bundle) -> None:
    lengths = {case.name: tuple(map(len, case.texts)) for case in make_encode_cases(bert)}
    assert lengths == {
        "fills 4, batch 2": (4, 4),
        "shorter than 4, batch 2": (3, 3),
        "shortest of 4, batch 2": (1, 1),
        "padded rows of 4, batch 2": (4, 3),
        "fills 12, batch 2": (12, 12),
        "shorter than 12, batch 2": (9, 9),
        "shortest of 12, batch 2": (5, 5),
        "padded rows of 12, batch 2": (12, 9),
    }
    numbers = [
        n for case in make_encode_cases(bert) for row in case.token_inputs.values() for n in row
    ]
    assert {n for row in numbers for n in row} == {0, 1}
    padding = bert.manifest.model.pad_token_id
    assert all(padding not in row for case in make_encode_cases(bert) for row in case.texts)


def test_a_right_bundle_is_verified(bert: Bundle) -> None:
    report = verify_bundle(bert)
    assert report.ok, report.failures
    assert (report.reference, report.task) == ("exported", "encode")
    pairs = {(found.level, found.reference) for found in report.comparisons}
    assert pairs == {
        ("canonical", "exported"),
        ("lowered", "exported"),
        ("lowered", "canonical"),
    }
    assert {found.output for found in report.comparisons} == {"last_hidden_state"}
    assert report.worst("canonical").max_abs < 1e-5
    assert report.worst("lowered").max_abs > 1e-5, "float16 rounds"


@pytest.mark.parametrize("level", ["canonical", "lowered"])
def test_a_wrong_graph_is_not(bert: Bundle, tmp_path: Path, level: str) -> None:
    """A norm's bias of the second layer is off: in the canonical graph, or in one bucket."""
    folder = Path(shutil.copytree(bert.folder, tmp_path / "bundle"))
    file = folder / ("canonical.onnx" if level == "canonical" else "encode_s12_b2.onnx")
    model = onnx.load(file)
    norms = [n for n in model.graph.node if n.op_type in ("LayerNormalization", "NPULayerNorm")]
    small = {t.name: t for t in model.graph.initializer if len(t.dims) == 1 and t.dims[0] == 64}
    sums = [node for node in model.graph.node if node.op_type == "Add"]
    name = norms[-1].input[2] if norms else sums[-1].input[1]
    array = numpy_helper.to_array(small[name]) + 1
    small[name].CopyFrom(numpy_helper.from_array(array, name))
    onnx.save(model, file)
    report = verify_bundle(Bundle.open(folder, verify_hashes=False))
    assert not report.ok
    assert all(level in failure.what for failure in report.failures)
    assert "last_hidden_state" in report.failures[0].what
    if level == "lowered":
        assert all("12" in failure.what for failure in report.failures)


def test_a_missing_export_leaves_the_canonical_graph(bert: Bundle, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(bert.folder, tmp_path / "bundle"))
    opened = Bundle.open(folder)
    object.__setattr__(opened.manifest.export, "path", str(tmp_path / "gone.onnx"))
    report = verify_bundle(opened)
    assert report.ok
    assert report.reference == "canonical"
    assert "is not there: the canonical graph was the reference" in report.notes[0]
