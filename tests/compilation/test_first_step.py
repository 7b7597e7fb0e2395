"""Exports whose first step is a graph of its own: two files, or two branches of one."""

from pathlib import Path

import numpy as np
import onnx
import pytest

from omforge import ir
from omforge.bundle.manifest import CacheFlag, Export, KvCache
from omforge.bundle.source import find_source
from omforge.compilation.first_step import Chosen, choose_graph, described
from omforge.ir.errors import InputError
from omforge.ir.infer import infer_model
from omforge.passes import make_pipeline
from omforge.runtime.export import ExportModel
from omforge.testing import parse
from tests.passes.blocks import Block, ops

TEXT = [3, 5, 7, 9, 11, 2, 4]
KV = KvCache("per-layer", 1, 2, 4, 4, 32, "float32")

# What was traced with one token masks nothing but padding, and numbers that token alone.
ONE_TOKEN = Block(seq="1", rotary="half", visible="all")
ANY_TOKENS = Block(rotary="half")


def first_text() -> str:
    """What reads whole texts, and gives its keys and values."""
    text = Block(cache=False, rotary="half").text()
    outputs = ", ".join(f"float[batch, 2, seq, 4] present_{role}" for role in ("key", "value"))
    text = text.replace("] logits)", f"] logits, {outputs})", 1)
    return text.rstrip().rstrip("}") + (
        "present_key = Identity (k4_r) present_value = Identity (v4)\n}"
    )


def two_files(folder: Path, goes_on: Block, names: tuple[str, str]) -> Path:
    for name, text in zip(names, (first_text(), goes_on.text()), strict=True):
        ir.save(parse(text), folder / name)
    return folder


def merged(folder: Path, goes_on: Block) -> Path:
    """Both in one file, under an If."""
    first, later = (ir.to_proto(parse(text)) for text in (first_text(), goes_on.text()))
    outputs = [output.name for output in first.graph.output]
    branches = []
    for name, graph in (("with_past", later.graph), ("without", first.graph)):
        branch = onnx.GraphProto()
        branch.CopyFrom(graph)
        branch.name = name
        del branch.input[:]
        branches.append(branch)
    flag = onnx.helper.make_tensor_value_info("use_cache", onnx.TensorProto.BOOL, [1])
    node = onnx.helper.make_node(
        "If", ["use_cache"], outputs, then_branch=branches[0], else_branch=branches[1]
    )
    inputs = list(parse(Block(rotary="half").text()).graph.inputs)
    graph = onnx.helper.make_graph(
        [node], "merged", [*map(ir.to_proto, inputs), flag], list(later.graph.output)
    )
    for output in graph.output:  # of any length, in either branch
        for dim in output.type.tensor_type.shape.dim:
            if dim.dim_param or dim.dim_value == 1:
                dim.Clear()
    model = onnx.helper.make_model(graph, opset_imports=later.opset_import, ir_version=11)
    onnx.save(model, folder / "decoder_model_merged.onnx")
    return folder


def taken(folder: Path) -> tuple[Chosen, Export]:
    """What is chosen, raised as compile does it, and the export's interface."""
    source = find_source(folder)
    chosen = choose_graph(source, None)
    pipeline = "raise,add-past" if chosen.past_is_missing else "raise"
    make_pipeline(pipeline).run(chosen.model)
    assert ops(chosen.model).count("Attention") == 1
    return chosen, described(chosen.model, chosen, source)


def assert_is_the_reference(export: Export) -> None:
    """Prompt by the one graph, token by token by the other: as one graph that does both."""
    whole = parse(Block(rotary="half").text())
    infer_model(whole)
    path = Path(export.path).parent / "whole" / "model.onnx"
    path.parent.mkdir()
    ir.save(whole, path)
    plain = Export(
        path=str(path), sha256="", input_ids="input_ids", attention_mask="attention_mask",
        position_ids="position_ids", past=(("past_key", "past_value"),),
        present=(("present_key", "present_value"),), logits="logits", extra=(), dtype="float32",
    )  # fmt: skip
    runs: list[np.ndarray] = []
    for each in (export, plain):
        with ExportModel(each.path, each, KV) as model:
            # In pieces, too, as verify gives them: behind a past it may be one token a call.
            found = [model.prefill([TEXT[:4]], pieces=True)]
            found += [model.prefill([TEXT[:4], TEXT[1:4]])]
            found += [model.decode([token, token]) for token in TEXT[4:]]
            runs.append(np.concatenate(found))
    np.testing.assert_allclose(runs[0], runs[1], rtol=1e-4, atol=1e-5)


NAMES = ("decoder_model.onnx", "decoder_with_past_model.onnx")


@pytest.mark.parametrize("names", [NAMES, ("a.onnx", "b.onnx"), ("z.onnx", "b.onnx")])
def test_a_decoder_of_one_token_gets_its_graph_from_the_first_file(
    names: tuple[str, str], tmp_path: Path
) -> None:
    chosen, export = taken(two_files(tmp_path, ONE_TOKEN, names))
    assert chosen.decoder is not None
    assert {v.name for v in chosen.model.graph.inputs} >= {"past_key_values.0.key", "input_ids"}
    # The interface is the export's.
    assert Path(export.path).name == names[1]
    assert export.first is not None
    assert (export.first.file, export.first.position_ids) == (names[0], "position_ids")
    assert export.past == (("past_key", "past_value"),)
    assert_is_the_reference(export)


def test_a_decoder_of_any_number_of_tokens_is_taken_alone(tmp_path: Path) -> None:
    chosen, export = taken(two_files(tmp_path, ANY_TOKENS, NAMES))
    assert chosen.decoder is None
    assert export.first is not None
    assert_is_the_reference(export)


@pytest.mark.parametrize(("goes_on", "alone"), [(ONE_TOKEN, False), (ANY_TOKENS, True)])
def test_a_merged_file_is_run_by_its_flag(goes_on: Block, alone: bool, tmp_path: Path) -> None:
    chosen, export = taken(merged(tmp_path, goes_on))
    assert (chosen.decoder is None) is alone
    assert (export.first, export.cache_flag) == (None, CacheFlag("use_cache", cached=True))
    assert export.extra == ()
    assert_is_the_reference(export)


def test_files_of_two_exports_are_refused(tmp_path: Path) -> None:
    folder = two_files(tmp_path, ONE_TOKEN, NAMES)
    ir.save(parse(first_text().replace("present_key", "k_out")), folder / NAMES[0])
    source = find_source(folder)
    chosen = choose_graph(source, None)
    with pytest.raises(ir.CheckError, match=r"no two parts of one export: .* present_key"):
        described(chosen.model, chosen, source)


def test_the_first_file_must_be_there_and_be_the_same(tmp_path: Path) -> None:
    _, export = taken(two_files(tmp_path, ONE_TOKEN, NAMES))
    ir.save(parse(first_text().replace("0.", "1.", 1)), tmp_path / NAMES[0])
    with pytest.raises(InputError, match=r"decoder_model\.onnx is not the model that"):
        ExportModel(export.path, export, KV)
    (tmp_path / NAMES[0]).unlink()
    with pytest.raises(InputError, match=r"decoder_model\.onnx does not exist"):
        ExportModel(export.path, export, KV)
