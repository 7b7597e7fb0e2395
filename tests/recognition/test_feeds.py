"""Feeds: every interface that exporters and our own passes make, and sizes that find mistakes."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest

from omforge import ir
from omforge.compilation.compare_feeds import make_feeds
from omforge.ir import numerics
from omforge.ir.errors import CheckError, InputError
from omforge.ir.values import dims
from omforge.passes import Pass, Pipeline, make_pipeline
from omforge.recognition.feeds import HIDDEN, STEPS, token_feeds, weight_bytes
from omforge.rewriting.instruments import CompareEach
from omforge.testing import parse

Exports = Callable[[str, str], Path]
SERVE = "raise,last-token-logits,fuse-kv-io,tabulate-rotary{positions=64}"


@pytest.mark.parametrize("family", ["llama_gqa", "mistral"])
@pytest.mark.parametrize("route", ["optimum", "dynamo", "hfexporter", "torchscript-op17"])
def test_every_exporters_interface_is_fed(exported: Exports, route: str, family: str) -> None:
    model = ir.load(exported(route, family))
    for feeds, step in zip(make_feeds(model), STEPS, strict=True):
        assert set(feeds) == {value.name for value in model.graph.inputs}
        assert feeds["input_ids"].shape == (step.batch, step.seq)
        assert feeds["attention_mask"].shape == (step.batch, step.past + step.seq)
        logits = numerics.run(model, feeds)["logits"]
        assert logits.shape == (step.batch, step.seq, 320)
        assert np.isfinite(logits).all()


def test_the_steps_differ_where_rewrites_go_wrong() -> None:
    assert {step.batch for step in STEPS} == {1, 2}
    assert {step.seq == 1 for step in STEPS} == {True, False}
    assert {step.past == 0 for step in STEPS} == {True, False}
    assert {(step.past > 0) for step in STEPS if step.padding} == {True, False}


def test_padding_is_on_the_left_of_the_last_row(exported: Exports) -> None:
    feeds = make_feeds(ir.load(exported("optimum", "llama_gqa")))[2]
    assert feeds["attention_mask"].tolist() == [[1] * 17, [0] * 5 + [1] * 12]
    assert feeds["position_ids"][0].tolist() == list(range(17))
    assert feeds["position_ids"][1].tolist() == [0] * 5 + list(range(12))


@pytest.mark.parametrize(("token", "said"), [(320, 320), (-1, -1)])
def test_a_calibration_token_beyond_the_vocabulary_is_refused(
    exported: Exports, token: int, said: int
) -> None:
    """ONNX Runtime would end in Gather, or take a row from the end."""
    model = ir.load(exported("optimum", "llama_gqa"))
    assert token_feeds(model, np.array([[0, 319]]))["input_ids"].tolist() == [[0, 319]]
    with pytest.raises(InputError, match=f"token {said} is not .* the model's tokens are 0 to 319"):
        token_feeds(model, np.array([[0, token]]))


def test_the_same_arguments_give_the_same_numbers(exported: Exports) -> None:
    model = ir.load(exported("dynamo", "qwen2"))
    first, second, other = make_feeds(model), make_feeds(model), make_feeds(model, seed=1)
    for a, b, c in zip(first, second, other, strict=True):
        assert all(np.array_equal(a[name], b[name]) for name in a)
        assert not np.array_equal(a["past_key_values.0.key"], c["past_key_values.0.key"]) or (
            a["past_key_values.0.key"].size == 0
        )


@pytest.mark.parametrize("layout", ["stacked", "per-layer"])
def test_the_bucket_interface_is_fed(exported: Exports, layout: str) -> None:
    model = ir.load(exported("optimum", "mistral"))
    make_pipeline(SERVE.replace("fuse-kv-io", f"fuse-kv-io{{layout={layout}}}")).run(model)
    for feeds, step in zip(make_feeds(model), STEPS, strict=True):
        assert set(feeds) == {value.name for value in model.graph.inputs}
        outputs = numerics.run(model, feeds)
        assert outputs["logits"].shape == (step.batch, 320)
        assert np.isfinite(outputs["logits"]).all()


def test_masks_hide_padding_free_slots_the_future_and_what_is_behind_the_window(
    exported: Exports,
) -> None:
    model = ir.load(exported("optimum", "mistral"))
    make_pipeline(SERVE).run(model)
    feeds = make_feeds(model)

    def visible(step: int, row: int, query: int) -> list[int]:
        return np.flatnonzero(feeds[step]["attention_mask_w8"][row, 0, query] == 0).tolist()

    assert set(np.unique(feeds[4]["attention_mask_w8"])) == {HIDDEN, 0.0}
    assert feeds[4]["attention_mask_w8"].shape == (2, 1, 4, 13 + 3 + 4)
    # 13 tokens past. Query 14 sees keys 7 to 14; 13 and 14 are new, and stand behind 3 free slots.
    assert visible(4, row=0, query=1) == [7, 8, 9, 10, 11, 12, 16, 17]
    # No past, 5 tokens of padding in the last row: keys stand behind 3 free slots.
    assert visible(2, row=0, query=6) == [3, 4, 5, 6, 7, 8, 9]
    assert visible(2, row=1, query=6) == [3 + 5, 3 + 6]


def test_numbers_in_the_shapes_are_kept(exported: Exports) -> None:
    model = ir.load(exported("optimum", "llama_gqa"))
    make_pipeline(f"{SERVE},bind-shapes{{batch=2 seq=4 capacity=16}}").run(model)
    made = make_feeds(model, longest=16)
    assert made
    for feeds in made:
        assert feeds["input_ids"].shape == (2, 4)
        assert feeds["attention_mask"].shape == (2, 1, 4, 20)
        assert feeds["position_ids"].max() < 16
        numerics.run(model, feeds)


def test_no_position_is_beyond_the_longest(exported: Exports) -> None:
    model = ir.load(exported("optimum", "llama_gqa"))
    for feeds in make_feeds(model, longest=6):
        assert feeds["attention_mask"].shape[1] <= 6


def test_a_graph_that_is_no_causal_lm_gets_its_shapes() -> None:
    model = parse("""<ir_version: 11, opset_import: ["" : 24]>
        g (float[N, 4] x, bool[M] c, int64[N, M] i) => (float[N, 4] y) { y = Neg (x) }""")
    shapes = [{name: array.shape for name, array in feeds.items()} for feeds in make_feeds(model)]
    assert shapes == [
        {"x": (2, 4), "c": (3,), "i": (2, 3)},
        {"x": (3, 4), "c": (4,), "i": (3, 4)},
    ]


def test_an_input_without_a_shape_is_named() -> None:
    model = parse("""<ir_version: 11, opset_import: ["" : 24]>
        g (float[N] x) => (float[N] y) { y = Neg (x) }""")
    model.graph.inputs[0].shape = None
    with pytest.raises(InputError, match="x cannot be fed"):
        make_feeds(model)


def test_weight_bytes_counts_every_tensor() -> None:
    model = parse("""<ir_version: 11, opset_import: ["" : 24]>
        g (float[N] x) => (float[N] y) <float[3] w = {1.0, 2.0, 3.0}> {
            c = Constant <value = int64[2] {1, 2}> () y = Neg (x) }""")
    assert weight_bytes(model) == 3 * 4 + 2 * 8


@dataclass(frozen=True)
class DropWindow(Pass):
    """Let every query see every key: right while a text is shorter than the window."""

    name: ClassVar[str] = "drop-window"

    def run(self, model: ir.Model) -> int:
        blocks = [node for node in model.graph if node.op_type == "Attention"]
        for block in blocks:
            block.replace_input_with(3, None)
            block.attributes["is_causal"] = ir.AttrInt64("is_causal", 1)
        return len(blocks)


def test_they_find_a_mask_that_is_right_for_short_texts_only(exported: Exports) -> None:
    model = ir.load(exported("optimum", "mistral"))
    make_pipeline("raise").run(model)
    with pytest.raises(CheckError, match="drop-window moves the numbers"):
        Pipeline((DropWindow(),)).run(model, [CompareEach(make_feeds)])


def test_a_graph_of_contrib_ops_is_fed_what_their_kernels_take(
    exported: Exports,
) -> None:
    """GroupQueryAttention hides the cache's head size, and takes no rows of different lengths."""
    model = ir.load(exported("genai", "llama_gqa"))
    before = [(v.name, dims(v)) for v in model.graph.inputs]
    feeds = make_feeds(model)
    assert [(v.name, dims(v)) for v in model.graph.inputs] == before
    raised = model.clone()
    make_pipeline("convert-opset,raise-contrib-ops").run(raised)
    sizes: set[tuple[int, ...]] = set()
    for feed in feeds:
        assert feed["attention_mask"].all()
        past = feed["past_key_values.0.key"].shape
        sizes.add((*feed["input_ids"].shape, past[2]))
        expected, actual = numerics.run(model, feed), numerics.run(raised, feed)
        for name, wanted in expected.items():
            assert numerics.within(actual[name], wanted, numerics.tolerance("float32")), name
    assert sizes == {(1, 1, 0), (1, 9, 0), (2, 17, 0), (1, 1, 11), (1, 4, 13)}


def test_numbers_of_tokens_are_rows_of_their_table(encoder: Exports) -> None:
    """BERT's token_type_ids index a table of two rows, its tokens one of 320."""
    model = ir.load(encoder("optimum", "bert"))
    made = make_feeds(model)
    assert {n for feeds in made for n in feeds["token_type_ids"].ravel().tolist()} == {0, 1}
    assert max(feeds["input_ids"].max() for feeds in made) > 64, "not the width of its output"
    result = make_pipeline("raise,fuse-encoder-io").run(model, [CompareEach(make_feeds)])
    assert max(run.max_abs_diff or 0 for run in result.passes) < 1e-5
    for feeds in make_feeds(model):
        batch, seq = feeds["input_ids"].shape
        assert feeds["attention_mask_full"].shape == (batch, 1, seq, seq)
