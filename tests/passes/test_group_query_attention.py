"""group-query-attention: attention to a cache where it lies, and the same numbers."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from omforge import ir
from omforge.ir.numerics import run, tolerance, within
from omforge.ir.values import dims
from omforge.passes import make_pipeline
from omforge.passes.cache_in_place import CacheInPlace
from omforge.passes.fuse_attention import FuseAttention
from omforge.passes.fuse_kv_io import FuseKvIo
from omforge.passes.group_query_attention import GroupQueryAttention
from omforge.passes.last_token_logits import LastTokenLogits
from omforge.rewriting.events import events
from omforge.runtime.masks import additive_mask, key_positions, positions
from tests.passes.blocks import fused
from tests.recognition.attention.test_sinks import sinking

Exported = Callable[[str, str], Path]
Array = npt.NDArray[Any]

CAPACITY = 16


def served(path: Path) -> ir.Model:
    model = ir.load(path)
    make_pipeline("raise").run(model)
    for step in (LastTokenLogits(), FuseKvIo("per-layer"), CacheInPlace()):
        step.run(model)
    return model


def fed(model: ir.Model, batch: int, seq: int, past: int, padded: int) -> dict[str, Array]:
    rng = np.random.default_rng(seq)
    first = np.arange(batch) % 2 * padded
    sizes = {"past": past, "seq": seq, "count": seq, "capacity": CAPACITY}
    feeds: dict[str, Array] = {
        "input_ids": rng.integers(0, 16, (batch, seq)),
        "position_ids": positions(first, past=past, seq=seq, count=seq),
        "logits_index": np.arange(batch) * seq + seq - 1,
        "write_indices": np.full(batch, past),
        "key_positions": key_positions(**sizes, dtype="float32", in_place=True),
    }
    for value in model.graph.inputs:
        name, shape = value.name or "", dims(value) or ()
        if name.startswith("attention_mask"):
            window = int(name.partition("_w")[2] or 0) or None
            feeds[name] = additive_mask(
                window, first, **sizes, dtype="float32", mask_value=-30000.0, in_place=True
            )
        if name.startswith("past_key_values."):
            cache = np.zeros((batch, shape[1], CAPACITY, shape[3]), np.float32)
            cache[:, :, :past] = rng.standard_normal(cache[:, :, :past].shape)
            feeds[name] = cache
    names = {value.name for value in model.graph.inputs}
    return {name: array for name, array in feeds.items() if name in names}


@pytest.mark.parametrize(
    ("batch", "seq", "past", "padded"),
    [(1, 1, 0, 0), (1, 4, 5, 0), (1, 4, 5, 2), (2, 1, 5, 3), (2, 4, 0, 2), (2, 1, 15, 0)],
)
@pytest.mark.parametrize(
    ("route", "family"),
    [
        ("optimum", "llama_gqa"),
        ("dynamo", "mistral"),
        ("hfexporter", "gemma2"),
        ("optimum", "bloom"),
    ],
)
def test_a_step_gives_the_same(
    exported: Exported, route: str, family: str, batch: int, seq: int, past: int, padded: int
) -> None:
    """With windows, softcaps and biases by distance; rows padded on the left."""
    same_step(served(exported(route, family)), batch, seq, past, padded)


@pytest.mark.parametrize(
    ("batch", "seq", "past", "padded"), [(1, 4, 5, 2), (2, 1, 5, 3), (2, 4, 0, 2)]
)
def test_sinks_are_given_as_numbers(batch: int, seq: int, past: int, padded: int) -> None:
    model = fused(FuseAttention(), sinking(size=8))
    for step in (FuseKvIo("per-layer"), CacheInPlace()):
        step.run(model)
    same_step(model, batch, seq, past, padded)


def same_step(before: ir.Model, batch: int, seq: int, past: int, padded: int) -> None:
    after = before.clone()
    assert GroupQueryAttention().run(after) > 0
    ir.check(after)
    assert not [n for n in after.graph if n.op_type in ("Attention", "TensorScatter")]
    feeds = fed(before, batch, seq, past, padded)
    old, new = run(before, feeds), run(after, feeds)
    assert list(new) == list(old)
    for name, array in old.items():
        assert within(new[name], array, tolerance("float32")), name


def test_heads_are_not_taken_apart(exported: Exported) -> None:
    model = served(exported("optimum", "llama_gqa"))
    GroupQueryAttention().run(model)
    nodes = [node for node in model.graph if node.op_type == "GroupQueryAttention"]
    assert len(nodes) == 2
    for node in nodes:
        makers = [value.producer() for value in node.inputs[:3] if value is not None]
        assert [maker and maker.op_type for maker in makers] == [
            "RotaryEmbedding", "RotaryEmbedding", "MatMul"]  # fmt: skip
        assert [user.op_type for user in node.outputs[0].consumers()] == ["MatMul"]
    assert GroupQueryAttention().run(model) == 0


def test_a_model_whose_cache_is_not_in_place_is_left_alone(exported: Exported) -> None:
    model = ir.load(exported("optimum", "llama_gqa"))
    make_pipeline("raise").run(model)
    FuseKvIo("per-layer").run(model)
    assert GroupQueryAttention().run(model) == 0


def _scaled(model: ir.Model, attention: ir.Node) -> None:
    key = attention.inputs[1]
    node = ir.Node("", "Cast", [key], [ir.AttrInt64("to", 1)])
    node.outputs[0].name, node.outputs[0].type = "wide", key.type  # type: ignore[union-attr]
    node.outputs[0].shape = key.shape  # type: ignore[union-attr]
    model.graph.insert_before(attention, node)
    attention.replace_input_with(1, node.outputs[0])


def _causal(model: ir.Model, attention: ir.Node) -> None:
    attention.attributes.add(ir.AttrInt64("is_causal", 1))


def _shared(model: ir.Model, attention: ir.Node) -> None:
    other = next(n for n in model.graph if n.op_type == "Attention" and n is not attention)
    other.replace_input_with(1, attention.inputs[1])


MISSES: Mapping[str, tuple[Callable[[ir.Model, ir.Node], None], str]] = {
    "a cache that is cast": (_scaled, "not read as it lies"),
    "a mask that does not say all": (_causal, "no mask that says all"),
    "a cache that two layers read": (_shared, "others read its cache"),
}


@pytest.mark.parametrize("miss", MISSES)
def test_all_layers_or_none(exported: Exported, miss: str) -> None:
    model = served(exported("optimum", "llama_gqa"))
    change, reason = MISSES[miss]
    change(model, next(n for n in model.graph if n.op_type == "Attention"))
    before = [node.op_type for node in model.graph]
    assert GroupQueryAttention().run(model) == 0
    assert [node.op_type for node in model.graph] == before
    told = [e.reason for e in events(model) if e.pass_name == GroupQueryAttention.name]
    assert any(reason in text for text in told), told
