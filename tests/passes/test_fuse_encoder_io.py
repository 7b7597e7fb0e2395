"""fuse-encoder-io: the caller makes the masks of a model without a cache."""

import dataclasses

import numpy as np
import pytest

from omforge import ir
from omforge.ir import numerics
from omforge.ir.values import dims
from omforge.passes import make_pipeline
from omforge.passes.fuse_encoder_io import FuseEncoderIo
from omforge.rewriting.events import events
from omforge.runtime.masks import additive_mask, full_mask
from omforge.testing import parse
from tests.passes.blocks import VOCABULARY, WINDOW, Block, named

ENCODER = Block(visible="all", cache=False, positions=False)


def raised(block: Block, changes: dict[str, str] | None = None) -> ir.Model:
    """A model whose attention is raised."""
    model = named(dataclasses.replace(block, edits=tuple((changes or {}).items())))
    make_pipeline("fuse-attention,remove-no-ops").run(model)
    return model


def inputs(model: ir.Model) -> dict[str, list[str]]:
    return {str(v.name): [str(dim) for dim in dims(v) or ()] for v in model.graph.inputs}


def mask_of(name: str, lengths: np.ndarray, seq: int) -> np.ndarray:
    """What the runtime makes for rows of these lengths."""
    _, _, window = name.partition("_w")
    wide = int(window) if window else None
    if name.startswith("attention_mask_full"):
        return full_mask(wide, lengths, seq=seq, dtype="float32", mask_value=-30000.0)
    first = np.zeros(len(lengths), np.int64)
    whole = additive_mask(
        wide, first, past=0, seq=seq, count=seq, capacity=0, dtype="float32", mask_value=-30000.0
    )
    assert whole.shape == (len(lengths), 1, seq, seq)
    return whole


@pytest.mark.parametrize(
    ("visible", "name"),
    [
        ("all", "attention_mask_full"),
        ("near", f"attention_mask_full_w{WINDOW}"),
        ("causal", "attention_mask_causal"),
        ("window", f"attention_mask_causal_w{WINDOW}"),
    ],
)
@pytest.mark.parametrize("lengths", [[1], [9], [9, 4], [3, 9, 1]], ids=str)
def test_the_mask_is_an_input_and_hides_what_is_behind_a_row(
    visible: str, name: str, lengths: list[int]
) -> None:
    before = raised(dataclasses.replace(ENCODER, visible=visible))
    after = before.clone()
    assert FuseEncoderIo().run(after) == 1
    assert inputs(after) == {"input_ids": ["batch", "seq"], name: ["batch", "1", "seq", "seq"]}
    seq, rows = max(lengths), np.array(lengths)
    tokens = np.random.default_rng(0).integers(0, VOCABULARY, (len(rows), seq))
    mask = (np.arange(seq) < rows[:, None]).astype(np.int64)
    expected = numerics.run(before, {"input_ids": tokens, "attention_mask": mask})["logits"]
    actual = numerics.run(after, {"input_ids": tokens, name: mask_of(name, rows, seq)})["logits"]
    alone = [
        numerics.run(before, {"input_ids": row[None, :n], "attention_mask": np.ones((1, n), int)})
        for row, n in zip(tokens, rows, strict=True)
    ]
    for row, n in enumerate(lengths):
        np.testing.assert_allclose(actual[row, :n], expected[row, :n], rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(actual[row, :n], alone[row]["logits"][0], rtol=1e-4, atol=1e-5)


def test_attention_without_any_mask_gets_one() -> None:
    """An export of one text without padding serves a bucket that is not full."""
    model = raised(dataclasses.replace(ENCODER, visible="", padding=False))
    assert FuseEncoderIo().run(model) == 1
    assert list(inputs(model)) == ["input_ids", "attention_mask_full"]


def test_what_else_reads_the_attention_mask_still_does() -> None:
    model = raised(
        ENCODER,
        {
            "logits = MatMul (hidden, head)": """
        weight = Cast <to = 1> (attention_mask)
        weights = Unsqueeze (weight, i_2)
        kept = Mul (hidden, weights)
        logits = MatMul (kept, head)""",
            "int64[1] i_0 ": "int64[1] i_2 = {2}, int64[1] i_0 ",
        },
    )
    assert FuseEncoderIo().run(model) == 1
    assert list(inputs(model)) == ["input_ids", "attention_mask", "attention_mask_full"]


def test_a_mask_of_another_kind_is_made_in_the_graph() -> None:
    model = raised(dataclasses.replace(ENCODER, visible="chunk"))
    assert FuseEncoderIo().run(model) == 0
    assert list(inputs(model)) == ["input_ids", "attention_mask"]
    told = [event.reason for event in events(model) if event.pass_name == FuseEncoderIo.name]
    assert len(told) == 1
    assert told[0].startswith("it is made in the graph, of attention_mask: it is no causal mask")


POOLED = """<ir_version: 11, opset_import: ["" : 24]>
g (int64[batch, seq] input_ids) => (float[batch, 2] logits)
<float[5, 2] table = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9}, int64 last = {-1}, int64[1] i1 = {1},
 int64[1] im1 = {-1}, int64[1] far = {9223372036854775807}>
{
    x = Gather (table, input_ids)
    BODY
}"""


@pytest.mark.parametrize(
    "body",
    [
        "logits = Gather <axis = 1> (x, last)",
        "y = Slice (x, im1, far, i1) logits = Squeeze (y, i1)",
    ],
    ids=["gather", "slice"],
)
def test_the_last_slot_is_the_rows_last_token(body: str) -> None:
    """A pooled export takes slot -1, which is padding in a row that does not fill its bucket."""
    text = POOLED.replace("BODY", body)
    for unused in ("last", "im1", "far", "i1"):
        if f"{unused})" not in body and f"{unused}," not in body:
            text = text.replace(f", int64 {unused} = {{-1}}", "").replace(
                f", int64[1] {unused} = {{-1}}", ""
            )
    model = parse(text)
    assert FuseEncoderIo().run(model) == 1
    assert inputs(model) == {"input_ids": ["batch", "seq"], "logits_index": ["batch"]}
    feeds = {"input_ids": np.array([[0, 3, 4], [2, 1, 4]]), "logits_index": np.array([1, 5])}
    assert numerics.run(model, feeds)["logits"].tolist() == [[6, 7], [8, 9]]


def test_refuses_a_model_with_a_cache() -> None:
    with pytest.raises(ir.InputError, match="past_key carries earlier tokens from step to step"):
        FuseEncoderIo().run(raised(Block()))


def test_refuses_whole_masks() -> None:
    """Nobody but the caller knows what such a mask means."""
    model = raised(
        ENCODER,
        {
            "int64[batch, total] attention_mask": "float[batch, 1, seq, seq] attention_mask",
            "bias = Where (seen, zero, low)": "bias = Identity (attention_mask)",
            "real = Cast <to = 9> (attention_mask)": "real = Cast <to = 9> (input_ids)",
        },
    )
    with pytest.raises(ir.InputError, match=r"attention_mask is a whole mask, \[B, 1, S, S\]"):
        FuseEncoderIo().run(model)


def test_refuses_an_input_that_the_runtime_cannot_feed() -> None:
    model = raised(
        ENCODER,
        {
            "int64[batch, seq] input_ids": "int64[batch, seq] input_ids, float[batch, seq] gates",
            "logits = MatMul (hidden, head)": (
                "gate = Unsqueeze (gates, i_2) kept = Mul (hidden, gate)"
                " logits = MatMul (kept, head)"
            ),
            "int64[1] i_0 ": "int64[1] i_2 = {2}, int64[1] i_0 ",
        },
    )
    with pytest.raises(ir.CheckError, match="gates is used, and the runtime has nothing for it"):
        FuseEncoderIo().run(model)
