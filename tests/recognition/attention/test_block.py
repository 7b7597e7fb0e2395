"""fuse-attention of what an exporter wrote as `Attention` itself: which forms become canonical."""

import dataclasses
import logging

import pytest

from omforge import ir
from omforge.ir.infer import infer_model
from omforge.passes.fuse_attention import FuseAttention
from omforge.recognition.attention.block import is_canonical
from omforge.recognition.coverage import measure
from omforge.recognition.interface import find_interface
from omforge.rewriting.events import events
from omforge.testing import parse
from tests.passes.blocks import LOW, Block, fused, named, ops

FOUR = Block(operator="4-D")


def attention(model: ir.Model) -> ir.Node:
    """The one block of a model, which is canonical."""
    (node,) = [node for node in model.graph if node.op_type == "Attention"]
    assert is_canonical(node, caches(model))
    assert not {"Range", "ReduceMax"} & set(ops(model))  # no mask and no guard of the exporter
    return node


def caches(model: ir.Model) -> set[ir.Value]:
    return {past for past, _ in find_interface(model).caches}


def names(node: ir.Node) -> list[str]:
    return [value.name if value is not None and value.name else "" for value in node.inputs]


LATENT = """<ir_version: 11, opset_import: ["" : 24]>
g (float[b, s, 8] q, float[b, p, 4] past, float[b, s, 4] new, float[b, p, 4] turned) => (float y)
<float[4, 4] w = {1,2,3,4,5,6,7,8,9,1,2,3,4,5,6,7}> {
    latent = Concat <axis = 1> (past, new)
    product = MatMul (latent, w)
    v = Concat <axis = -1> (VALUES)
    k = Concat <axis = -1> (product, latent)
    y = Attention <q_num_heads = 2, kv_num_heads = 2> (q, k, v)
}"""


@pytest.mark.parametrize(
    ("values", "canonical"), [("product, product", True), ("latent, latent", False)]
)
def test_keys_that_are_computed_from_a_cache_have_none_inside(
    values: str, *, canonical: bool
) -> None:
    """Multi-head latent attention keeps what keys and values are made of, and turned keys."""
    model = parse(LATENT.replace("VALUES", values))
    infer_model(model)
    node = next(n for n in model.graph if n.op_type == "Attention")
    assert is_canonical(node, {v for v in model.graph.inputs if v.name == "past"}) is canonical


WRITTEN = {
    "heads repeated": FOUR,
    "heads repeated by Gather": Block(operator="4-D", repeat="gather"),
    "heads grouped by the operator": Block(operator="4-D", repeat="none"),
    "one key head for all": Block(operator="4-D", repeat="none", kv_heads=1),
    "one key head for each": Block(operator="4-D", kv_heads=4),
    "3-D": Block(operator="3-D", repeat="none"),
    "the cache inside": Block(operator="inside", repeat="none"),
    "the cache inside, all heads": Block(operator="inside", kv_heads=4),
    "rotated": Block(operator="4-D", rotary="half"),
    "wider values": Block(operator="4-D", value_size=6),
    "a boolean mask": Block(operator="4-D", applied="boolean"),
    "a window": Block(operator="4-D", visible="window"),
    "no padding": Block(operator="4-D", padding=False),
    "a guard": Block(operator="4-D", guard="rows"),
    "a guard, half of the lowest": Block(operator="4-D", guard="rows", low=LOW / 4),
    "a softcap": Block(operator="4-D", softcap=0.5),
    "a mask, and causal": Block(operator="inside", repeat="none", visible="all", causal=True),
}


@pytest.mark.parametrize("case", WRITTEN)
def test_raises_what_an_exporter_wrote(case: str) -> None:
    block = WRITTEN[case]
    # Where two masks meet, what rows of padding average is the kernel's whim.
    node = attention(fused(FuseAttention(), block, padding_rows=not block.causal))
    if not block.rotary:
        assert names(node)[:3] == ["q", "k", "v"]
    assert names(node)[4:] == ["past_key", "past_value"]
    assert [value.name for value in node.outputs[1:3]] == ["present_key", "present_value"]
    options = {name: found.value for name, found in node.attributes.items()}
    assert options["q_num_heads"] == 4
    assert options["kv_num_heads"] == block.kv_heads
    assert options["scale"] == pytest.approx(0.6)
    assert options.get("softcap", 0.0) == block.softcap
    assert "is_causal" not in options


def test_finds_nothing_in_a_second_run() -> None:
    model = named(FOUR)
    assert FuseAttention().run(model) == 1
    assert FuseAttention().run(model) == 0
    assert not events(model)


def test_what_has_no_cache_keeps_the_causality_of_the_operator() -> None:
    block = Block(operator="4-D", repeat="none", cache=False, visible="", causal=True)
    node = attention(fused(FuseAttention(), block))
    assert names(node) == ["q", "k", "v"]
    assert node.attributes["is_causal"].as_int() == 1


def test_the_mask_of_rows_without_keys_follows_onnx_runtime() -> None:
    """Its kernel gives zeros to a row of nothing but the lowest number, and a mean otherwise."""
    lowest = float(ir.DataType.FLOAT.min)
    for low, boolean in ((lowest, True), (lowest / 4, False)):
        mask = attention(fused(FuseAttention(), dataclasses.replace(FOUR, low=low))).inputs[3]
        assert mask is not None
        assert (mask.dtype == ir.DataType.BOOL) == boolean


LEFT = {
    "causal from the first key of a cache that is joined outside": (
        Block(operator="4-D", visible="", causal=True, padding=False),
        "counting from the first key",
    ),
    "its scores are read": (
        dataclasses.replace(
            FOUR,
            edits=(("mixed = Attention", "mixed, pk, pv, raw = Attention"),),
            outputs=("float[batch, 4, seq, total] raw",),
        ),
        "qk_matmul_output",
    ),
    "the mask depends on the tokens": (
        dataclasses.replace(
            FOUR,
            edits=(("bias = Where (seen, zero, low)", "xs = ReduceSum <keepdims = 0> (x)"
                    " bias_a = Where (seen, zero, low) bias = Add (bias_a, xs)"),),
        ),
        "depends on the tokens",
    ),
    "keys that are made of the cache": (
        dataclasses.replace(
            FOUR,
            edits=(("present_key_u = Unsqueeze (present_key,",
                    "turned = Tanh (present_key) present_key_u = Unsqueeze (turned,"),),
        ),
        "not the cache itself",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", LEFT)
def test_leaves_alone(case: str, caplog: pytest.LogCaptureFixture) -> None:
    block, why = LEFT[case]
    model = named(block)
    infer_model(model)
    with caplog.at_level(logging.INFO):
        assert FuseAttention().run(model) == 0
    assert [why in event.reason for event in events(model)] == [True]
    # Coverage counts what is canonical, and not what is called Attention.
    found = measure(model, None).kinds["attention"]
    if "tokens" not in why:
        assert (found.found, found.expected) == (0, 1)
    assert not is_canonical(next(n for n in model.graph if n.op_type == "Attention"), caches(model))
