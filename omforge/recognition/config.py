"""What a config.json or a genai_config.json promises about the model beside it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from omforge import ir
from omforge.ir.json_text import parse_json

# Hugging Face families name one fact in several ways.
_NAMES: Mapping[str, tuple[str, ...]] = {
    "layers": ("num_hidden_layers", "n_layer", "n_layers", "num_layers"),
    "heads": ("num_attention_heads", "n_head", "n_heads", "num_heads"),
    "kv_heads": ("num_key_value_heads", "n_head_kv", "num_kv_heads"),
    "hidden_size": ("hidden_size", "n_embd", "d_model"),
    "vocab_size": ("vocab_size",),
    "memory_length": ("max_source_positions",),
    "experts": ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts"),
}
_GATED = {"silu", "swish", "swiglu"}

# Some families write several, for what they were trained on and for what their tables hold.
_POSITIONS = (
    "max_position_embeddings",
    "n_positions",
    "max_seq_len",
    "max_seq_length",
    "max_sequence_length",
    "seq_length",
    "seq_len",
    "n_ctx",
    "context_length",
    "model_max_length",
    "max_target_positions",
)
_MOST_POSITIONS = 1 << 30
"""Tokenizers write 10**30 where they know of no limit."""


@dataclass(frozen=True)
class ModelConfig:
    """The facts of a model's configuration, None where it is silent.

    Attributes:
        max_positions: Tokens that a text may have.
        positions_source: Which file and key says so.
        model_type: The family's name, for display only: nothing depends on it.
        window: Keys that a query of a sliding-window layer sees.
        rotary: Whether positions are rotary.
        gated: Whether the MLPs are gated by SiLU.
        experts: Experts of a layer that routes tokens to some of them.
        attention_layers: Layers that attend, where others do something else (a linear attention).
        eos_token_ids: Tokens that end a text.
        labels: What a classifier's outputs mean, in their order.
        encoder_decoder: Whether it is an encoder with a decoder, whose layers may differ in number.
        memory_length: Positions of the encoder's states, where they have always the same number.
    """

    model_type: str = "unknown"
    layers: int | None = None
    heads: int | None = None
    kv_heads: int | None = None
    hidden_size: int | None = None
    vocab_size: int | None = None
    max_positions: int | None = None
    positions_source: str = ""
    window: int | None = None
    rotary: bool | None = None
    gated: bool | None = None
    experts: int | None = None
    attention_layers: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    bos_token_id: int | None = None
    pad_token_id: int | None = None
    labels: tuple[str, ...] = ()
    encoder_decoder: bool = False
    memory_length: int | None = None


def read_config(folder: Path) -> ModelConfig | None:
    """Read config.json, and the token numbers of generation_config.json, in `folder`.

    Where a genai_config.json is beside it, or instead of it, that fills what is missing; of several
    lengths of a text the smallest counts.

    Returns:
        The facts; None if there is neither.

    Raises:
        InputError: A file is not JSON.
    """
    file, genai = folder / "config.json", folder / "genai_config.json"
    if not file.is_file() and not genai.is_file():
        return None
    given = _read(file) if file.is_file() else {}
    # Multimodal families keep the language model's facts one level down.
    facts = {**given, **_mapping(given.get("text_config"))}
    generation = folder / "generation_config.json"
    tokens = {**facts, **(_read(generation) if generation.is_file() else {})}
    limits = list(_limits(facts, "config.json"))
    if genai.is_file():
        told = _genai_facts(_read(genai))
        limits += _limits(told, "genai_config.json")
        facts, tokens = ({**told, **_said(own)} for own in (facts, tokens))
    # The tokenizer's is often a round number of its own: it counts where nothing else does.
    tokenizer = folder / "tokenizer_config.json"
    if not limits and tokenizer.is_file():
        limits += _limits(_read(tokenizer), "tokenizer_config.json")
    positions, source = min(limits, default=(None, ""))
    numbers = {name: _first(facts, names) for name, names in _NAMES.items()}
    return ModelConfig(
        model_type=str(facts.get("model_type", "unknown")),
        **numbers,
        max_positions=positions,
        positions_source=source,
        window=_window(facts),
        rotary=_is_rotary(facts),
        gated=_is_gated(facts),
        attention_layers=_attention_layers(facts),
        eos_token_ids=_token_ids(tokens.get("eos_token_id")),
        bos_token_id=_token_id(tokens.get("bos_token_id")),
        pad_token_id=_token_id(tokens.get("pad_token_id")),
        labels=_labels(facts.get("id2label")),
        encoder_decoder=facts.get("is_encoder_decoder") is True,
    )


def _limits(facts: Mapping[str, Any], file: str) -> Iterator[tuple[int, str]]:
    """Every length of a text that a file states, and where."""
    for name in _POSITIONS:
        found = _first(facts, (name,))
        if found is not None and 0 < found < _MOST_POSITIONS:
            yield found, f"{file} says {name} = {found}"


def _genai_facts(given: Mapping[str, Any]) -> dict[str, Any]:
    """The facts of a genai_config.json under the names of a config.json.

    Source: microsoft/onnxruntime-genai:src/config.h. The decoder's `sliding_window` is about the
    caller's buffers; the graph says itself what its layers see.
    """
    model = _mapping(given.get("model"))
    decoder = _mapping(model.get("decoder"))
    names = ("num_hidden_layers", "num_attention_heads", "num_key_value_heads", "hidden_size")
    facts = {name: decoder[name] for name in names if name in decoder}
    names = ("vocab_size", "context_length", "eos_token_id", "bos_token_id", "pad_token_id")
    facts |= {name: model[name] for name in names if name in model}
    return facts | ({"model_type": model["type"]} if "type" in model else {})


def _said(facts: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in facts.items() if value is not None}


def _read(file: Path) -> dict[str, Any]:
    try:
        found = parse_json(file.read_bytes())
    except (OSError, ValueError) as error:
        raise ir.InputError(
            f"cannot read {file}", str(error), "Restore the file or remove it"
        ) from error
    if not isinstance(found, dict):
        raise ir.InputError(f"cannot read {file}", "it is no JSON object", "Restore the file")
    return _mapping(cast("object", found))


def _mapping(value: object) -> dict[str, Any]:
    """A JSON object, empty if the value is none."""
    return cast("dict[str, Any]", value) if isinstance(value, dict) else {}


def _first(facts: Mapping[str, Any], names: tuple[str, ...]) -> int | None:
    found = (facts.get(name) for name in names)
    return next((n for n in found if isinstance(n, int) and not isinstance(n, bool)), None)


def _window(facts: Mapping[str, Any]) -> int | None:
    window = facts.get("sliding_window")
    # Qwen2 writes a window that it does not use.
    if not isinstance(window, int) or facts.get("use_sliding_window") is False:
        return None
    # Families that share their defaults write one too, and list which layers slide: none, maybe.
    kinds = _layer_kinds(facts)
    if kinds and not any("sliding" in kind for kind in kinds):
        return None
    return window


def _attention_layers(facts: Mapping[str, Any]) -> int | None:
    """Layers whose kind is an attention over all pairs of tokens, where config.json lists kinds."""
    kinds = _layer_kinds(facts)
    return sum("attention" in k and "linear" not in k for k in kinds) if kinds else None


def _layer_kinds(facts: Mapping[str, Any]) -> list[str]:
    """The kind of each layer, where config.json lists them."""
    kinds = facts.get("layer_types")
    return [str(kind) for kind in cast("list[Any]", kinds)] if isinstance(kinds, list) else []


def _is_rotary(facts: Mapping[str, Any]) -> bool | None:
    words = (
        "rope_theta",
        "rope_scaling",
        "rope_parameters",
        "rotary_pct",
        "rotary_dim",
        "rotary_emb_base",
    )
    if facts.get("alibi"):
        return False  # Falcon writes rope_theta beside it
    if facts.get("position_embedding_type", "rope") not in ("rope", "rotary"):
        return False  # Granite's hybrids write rope_parameters beside null
    if any(facts[word] is False for word in facts if word.startswith("use_") and "rop" in word):
        return None  # Zamba's use_mem_rope: no layer, or not all of them
    return True if any(word in facts for word in words) else None


def _is_gated(facts: Mapping[str, Any]) -> bool | None:
    act = facts.get("hidden_act", facts.get("hidden_activation", facts.get("activation_function")))
    return act in _GATED if isinstance(act, str) else None


def _labels(value: object) -> tuple[str, ...]:
    """The names of `{"0": name, ...}`, if there is one for each number."""
    named = _mapping(value)
    numbers = [str(number) for number in range(len(named))]
    return tuple(str(named[n]) for n in numbers) if set(named) == set(numbers) else ()


def _token_ids(value: Any) -> tuple[int, ...]:
    listed = cast("list[Any]", value) if isinstance(value, list) else [value]
    return tuple(n for n in listed if isinstance(n, int) and not isinstance(n, bool))


def _token_id(value: Any) -> int | None:
    return next(iter(_token_ids(value)), None)
