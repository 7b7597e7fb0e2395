"""What a config.json or a genai_config.json promises, by whatever name a family calls it."""

import json
from pathlib import Path
from typing import Any

import pytest

from omforge import ir
from omforge.recognition.config import ModelConfig, read_config


def config(folder: Path, facts: Any, generation: Any = None) -> ModelConfig:
    (folder / "config.json").write_text(json.dumps(facts))
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation))
    found = read_config(folder)
    assert found is not None
    return found


def test_reads_a_llama(tmp_path: Path) -> None:
    facts = {
        "model_type": "llama",
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "hidden_size": 64,
        "vocab_size": 320,
        "max_position_embeddings": 256,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    assert config(tmp_path, facts) == ModelConfig(
        model_type="llama",
        layers=2,
        heads=4,
        kv_heads=2,
        hidden_size=64,
        vocab_size=320,
        max_positions=256,
        positions_source="config.json says max_position_embeddings = 256",
        rotary=True,
        gated=True,
        eos_token_ids=(2,),
        bos_token_id=1,
    )


@pytest.mark.parametrize(
    ("name", "field"),
    [
        ("n_layer", "layers"),
        ("n_head", "heads"),
        ("n_embd", "hidden_size"),
        ("n_positions", "max_positions"),
        ("d_model", "hidden_size"),
        ("num_kv_heads", "kv_heads"),
    ],
)
def test_knows_other_names(tmp_path: Path, name: str, field: str) -> None:
    assert getattr(config(tmp_path, {name: 7}), field) == 7


def test_is_silent_where_the_file_is(tmp_path: Path) -> None:
    assert config(tmp_path, {}) == ModelConfig()


def test_reads_the_text_part_of_a_multimodal_model(tmp_path: Path) -> None:
    facts = {"hidden_size": 9, "text_config": {"hidden_size": 64, "num_hidden_layers": 2}}
    found = config(tmp_path, facts)
    assert (found.hidden_size, found.layers) == (64, 2)


@pytest.mark.parametrize(
    ("facts", "window"),
    [
        ({"sliding_window": 4096}, 4096),
        ({"sliding_window": None}, None),
        ({"sliding_window": 4096, "use_sliding_window": False}, None),
        ({"sliding_window": 4096, "use_sliding_window": True}, 4096),
        ({"sliding_window": 4096, "layer_types": ["full_attention"] * 2}, None),
        ({"sliding_window": 4096, "layer_types": ["full_attention", "sliding_attention"]}, 4096),
    ],
)
def test_a_window_counts_where_it_is_used(tmp_path: Path, facts: Any, window: int | None) -> None:
    assert config(tmp_path, facts).window == window


@pytest.mark.parametrize(
    ("ids", "expected"), [(2, (2,)), ([2, 5], (2, 5)), (None, ()), ([2, None], (2,)), (True, ())]
)
def test_reads_one_or_several_ends(tmp_path: Path, ids: Any, expected: tuple[int, ...]) -> None:
    assert config(tmp_path, {"eos_token_id": ids}).eos_token_ids == expected


def test_the_generation_config_has_the_last_word_on_tokens(tmp_path: Path) -> None:
    found = config(tmp_path, {"eos_token_id": 2, "pad_token_id": 0}, {"eos_token_id": [2, 7]})
    assert found.eos_token_ids == (2, 7)
    assert found.pad_token_id == 0


@pytest.mark.parametrize(
    ("act", "gated"), [("silu", True), ("swiglu", True), ("gelu_new", False), (None, None)]
)
def test_tells_whether_the_mlp_is_gated(tmp_path: Path, act: str | None, gated: bool) -> None:
    assert config(tmp_path, {"hidden_act": act}).gated is gated


@pytest.mark.parametrize(
    "name",
    [
        "max_position_embeddings",
        "n_positions",
        "max_seq_len",
        "seq_length",
        "n_ctx",
        "max_sequence_length",
        "model_max_length",
    ],
)
def test_knows_how_families_call_the_longest_text(tmp_path: Path, name: str) -> None:
    found = config(tmp_path, {"text_config": {name: 512}})
    assert found.max_positions == 512
    assert found.positions_source == f"config.json says {name} = 512"


def test_of_several_lengths_the_smallest_counts(tmp_path: Path) -> None:
    """Qwen-1 is trained on seq_length; beyond it, it turns to other frequencies."""
    found = config(tmp_path, {"max_position_embeddings": 32768, "seq_length": 8192})
    assert (found.max_positions, "seq_length" in found.positions_source) == (8192, True)


@pytest.mark.parametrize(("said", "limit"), [(10**30, None), (2048, 2048), (0, None)])
def test_the_tokenizers_length_counts_where_it_is_one(
    tmp_path: Path, said: int, limit: int | None
) -> None:
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"model_max_length": said}))
    assert config(tmp_path, {}).max_positions == limit
    assert config(tmp_path, {"n_positions": 4096}).max_positions == 4096


GENAI = {
    "model": {
        "type": "qwen2",
        "vocab_size": 320,
        "context_length": 128,
        "eos_token_id": [2, 1],
        "bos_token_id": 0,
        "pad_token_id": 2,
        "decoder": {
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "hidden_size": 64,
        },
    },
    "search": {"max_length": 64},
}


def test_reads_a_genai_config_alone(tmp_path: Path) -> None:
    (tmp_path / "genai_config.json").write_text(json.dumps(GENAI))
    assert read_config(tmp_path) == ModelConfig(
        model_type="qwen2",
        layers=2,
        heads=4,
        kv_heads=2,
        hidden_size=64,
        vocab_size=320,
        max_positions=128,
        positions_source="genai_config.json says context_length = 128",
        eos_token_ids=(2, 1),
        bos_token_id=0,
        pad_token_id=2,
    )


def test_a_genai_config_beside_fills_what_is_missing(tmp_path: Path) -> None:
    (tmp_path / "genai_config.json").write_text(json.dumps(GENAI))
    facts = {"hidden_size": 99, "eos_token_id": 7, "bos_token_id": None, "n_positions": 256}
    found = config(tmp_path, facts)
    assert (found.hidden_size, found.eos_token_ids, found.bos_token_id) == (99, (7,), 0)
    assert (found.vocab_size, found.max_positions) == (320, 128)


def test_none_without_a_file(tmp_path: Path) -> None:
    assert read_config(tmp_path) is None


@pytest.mark.parametrize("content", ["{", "[1]", "\x00"])
def test_refuses_what_is_no_object(tmp_path: Path, content: str) -> None:
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ir.InputError, match="cannot read"):
        read_config(tmp_path)


@pytest.mark.parametrize(
    ("facts", "rotary"),
    [
        ({"rope_theta": 10000.0}, True),
        ({"rope_parameters": {"rope_type": "yarn"}}, True),
        ({"rotary_pct": 0.25}, True),
        ({"rope_theta": 10000.0, "alibi": True}, False),
        ({"rope_theta": 10000.0, "alibi": False}, True),
        ({"rope_theta": 10000.0, "position_embedding_type": None}, False),
        ({"rope_theta": 10000.0, "position_embedding_type": "rope"}, True),
        ({"rope_theta": 10000.0, "use_mem_rope": False}, None),
        ({"rope_theta": 10000.0, "use_mem_rope": True}, True),
        ({}, None),
    ],
)
def test_other_positions_rule_rotary_out(facts: Any, rotary: bool | None, tmp_path: Path) -> None:
    """Falcon and Granite write a rope_theta whether they use it or not."""
    assert config(tmp_path, facts).rotary is rotary
