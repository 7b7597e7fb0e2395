"""Fixed inputs: what the caller gives once for a sequence stays in the interface."""

import dataclasses

import numpy as np
import pytest

from omforge import ir
from omforge.ir import numerics
from omforge.ir.values import dims
from omforge.passes import make_pipeline
from omforge.recognition.fixed_inputs import find_fixed
from omforge.recognition.interface import find_interface
from omforge.testing import parse
from tests.passes.blocks import HIDDEN, Block

LORA = {
    "x = Gather (table, input_ids)": (
        "x_a = Gather (table, input_ids) x_b = MatMul (x_a, lora_a) x_c = MatMul (x_b, lora_b)"
        " x = Add (x_a, x_c)"
    ),
    "int64[batch, seq] input_ids": (
        f"int64[batch, seq] input_ids, float[{HIDDEN}, 2] lora_a, float[2, {HIDDEN}] lora_b"
    ),
}
MEMORY = {
    "x = Gather (table, input_ids)": "x_a = Gather (table, input_ids) x = Add (x_a, memory)",
    "int64[batch, seq] input_ids": f"int64[batch, seq] input_ids, float[batch, 1, {HIDDEN}] memory",
}


def edited(block: Block, changes: dict[str, str]) -> ir.Model:
    model = parse(dataclasses.replace(block, edits=tuple(changes.items())).text())
    make_pipeline("raise").run(model)
    return model


@pytest.mark.parametrize(
    ("changes", "names"),
    [({}, []), (LORA, ["lora_a", "lora_b"]), (MEMORY, ["memory"])],
    ids=["none", "matrices", "a row each"],
)
def test_finds_what_is_of_fixed_size(changes: dict[str, str], names: list[str]) -> None:
    model = edited(Block(), changes)
    assert [v.name for v in find_fixed(model, find_interface(model))] == names


def test_a_number_for_each_token_or_a_state_is_none() -> None:
    changes = {
        "x = Gather (table, input_ids)": "x_a = Gather (table, input_ids) x = Add (x_a, gates)",
        "int64[batch, seq] input_ids": f"int64[batch, seq] input_ids, float[batch, seq, {HIDDEN}] g",
    }
    model = edited(Block(), {k: v.replace("gates", "g") for k, v in changes.items()})
    assert find_fixed(model, find_interface(model)) == ()


@pytest.mark.parametrize("changes", [LORA, MEMORY], ids=["matrices", "a row each"])
def test_a_model_with_a_cache_keeps_them(changes: dict[str, str]) -> None:
    """What reads them reads the same numbers behind the cache's new interface."""
    model = edited(Block(), changes)
    before = model.clone()
    make_pipeline("last-token-logits,fuse-kv-io").run(model)
    kept = {str(v.name): v for v in model.graph.inputs}
    fixed = [v for v in before.graph.inputs if v.name in ("lora_a", "lora_b", "memory")]
    for value in fixed:
        assert dims(kept[str(value.name)]) == dims(value)
    random = np.random.default_rng(0)
    given = {
        str(v.name): random.standard_normal(
            [n if isinstance(n, int) else 1 for n in dims(v) or ()]
        ).astype(np.float32)
        for v in fixed
    }
    tokens = np.array([[3, 1, 4]])
    empty = np.zeros((1, 2, 0, 4), np.float32)
    old = given | {"input_ids": tokens, "past_key": empty, "past_value": empty}
    old |= {"attention_mask": np.ones((1, 3), np.int64), "position_ids": np.arange(3)[None]}
    seen = np.where(np.tri(3, dtype=np.bool_), 0, -30000.0).astype(np.float32)[None, None]
    new = given | {"input_ids": tokens, "logits_index": np.array([2]), "attention_mask": seen}
    new |= {"past_key_values": np.zeros((2, 2, 0, 4), np.float32)}
    new = {name: array for name, array in new.items() if name in kept}
    assert set(new) == set(kept)
    expected = numerics.run(before, {v.name: old[str(v.name)] for v in before.graph.inputs})
    actual = numerics.run(model, new)
    np.testing.assert_allclose(
        actual["logits"].ravel(), expected["logits"][0, -1], rtol=1e-4, atol=1e-5
    )
