"""cache-in-place: the step writes its keys and values into the cache, and attends to it alone."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from omforge import ir
from omforge.ir.numerics import run, tolerance, within
from omforge.ir.values import dims
from omforge.ir.verify import check
from omforge.passes import make_pipeline
from omforge.passes.cache_in_place import CacheInPlace
from omforge.passes.fuse_kv_io import FuseKvIo
from omforge.passes.last_token_logits import LastTokenLogits
from omforge.rewriting.events import events
from omforge.runtime.masks import additive_mask, key_positions, positions

Exported = Callable[[str, str], Path]
Array = npt.NDArray[Any]

CAPACITY, PAST = 16, 5


def _served(path: Path, layout: str = "per-layer") -> ir.Model:
    model = ir.load(path)
    make_pipeline("raise").run(model)
    LastTokenLogits().run(model)
    FuseKvIo(layout).run(model)  # type: ignore[arg-type]
    return model


def _interface(model: ir.Model) -> dict[str, list[str]]:
    values = [*model.graph.inputs, *model.graph.outputs]
    return {v.name or "": [str(dim) for dim in dims(v) or ()] for v in values}


def test_the_interface(exported: Exported) -> None:
    model = _served(exported("optimum", "llama_gqa"))
    assert CacheInPlace().run(model) == 4
    check(model)
    found = _interface(model)
    assert list(found)[3:6] == ["attention_mask", "write_indices", "past_key_values.0.key"]
    assert found["attention_mask"] == ["batch", "1", "seq", "capacity"]
    assert found["write_indices"] == ["batch"]
    assert found["present.1.value"] == found["past_key_values.1.value"]
    assert [node.op_type for node in model.graph].count("TensorScatter") == 4
    assert CacheInPlace().run(model) == 0  # a second time there is nothing to do


def _feeds(
    model: ir.Model, seq: int, first: Array, caches: Mapping[str, Array], *, in_place: bool
) -> dict[str, Array]:
    batch = len(first)
    sizes = {"past": PAST, "seq": seq, "count": seq, "capacity": CAPACITY}
    rng = np.random.default_rng(seq)
    feeds: dict[str, Array] = {
        "input_ids": rng.integers(0, 300, (batch, seq)),
        "position_ids": positions(first, past=PAST, seq=seq, count=seq),
        "logits_index": np.arange(batch) * seq + seq - 1,
        "write_indices": np.full(batch, PAST),
        "key_positions": key_positions(**sizes, dtype="float32", in_place=in_place),
        **caches,
    }
    for value in model.graph.inputs:
        name = value.name or ""
        if name.startswith("attention_mask"):
            window = int(name.partition("_w")[2] or 0) or None
            feeds[name] = additive_mask(
                window, first, **sizes, dtype="float32", mask_value=-30000.0, in_place=in_place
            )
    names = {value.name for value in model.graph.inputs}
    return {name: array for name, array in feeds.items() if name in names}


@pytest.mark.parametrize("padded", [0, 3])
@pytest.mark.parametrize("seq", [1, 4])
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
    exported: Exported, route: str, family: str, seq: int, padded: int
) -> None:
    """With windows, softcaps, biases by distance and attention sinks; rows padded on the left."""
    before = _served(exported(route, family))
    after = before.clone()
    assert CacheInPlace().run(after) > 0
    rng = np.random.default_rng(7)
    caches: dict[str, Array] = {}
    for value in before.graph.inputs:
        if (value.name or "").startswith("past_key_values."):
            _, heads, _, size = dims(value) or ()
            cache = np.zeros((2, heads, CAPACITY, size), np.float32)
            cache[:, :, :PAST] = rng.standard_normal((2, heads, PAST, size))
            caches[value.name or ""] = cache
    first = np.array([0, padded])
    old = run(before, _feeds(before, seq, first, caches, in_place=False))
    new = run(after, _feeds(after, seq, first, caches, in_place=True))
    assert within(new["logits"], old["logits"], tolerance("float32"))
    for name, whole in new.items():
        if name == "logits":
            continue
        assert within(whole[:, :, PAST : PAST + seq], old[name], tolerance("float32"))
        past = caches[name.replace("present", "past_key_values")]
        assert np.array_equal(whole[:, :, :PAST], past[:, :, :PAST])


def test_stacked_layers_are_left_to_the_runtime(exported: Exported) -> None:
    model = _served(exported("optimum", "llama_gqa"), "stacked")
    before = _interface(model)
    assert CacheInPlace().run(model) == 0
    assert _interface(model) == before
    (event,) = [event for event in events(model) if event.pass_name == "cache-in-place"]
    assert "stacked" in event.reason
