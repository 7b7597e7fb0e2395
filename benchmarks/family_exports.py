"""Decoder families of transformers, built tiny from their configs, exported by its own exporter.

Every field of a family's own config that is a size is made small, nested configs alike; what the
family *is* (its kinds of layers, its ratios of heads, its norms, its rotary) stays. Weights are
random, with a standard deviation of 0.15, so that errors show.

`families.py` calls `export` in a process of its own for each family.
"""

import inspect
import json
import logging
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

HIDDEN, VOCABULARY, POSITIONS, WINDOW = 64, 320, 256, 8
BATCH, NEW, PAST = 2, 3, 5
"""Sizes of the sample that is traced; all three are symbols in the export."""

_SIZES: Sequence[tuple[int, str]] = (
    (
        HIDDEN,
        """hidden_size n_embd d_model dim n_embed model_dim embed_dim embedding_size
        word_embed_proj_dim lru_width mamba_d_ssm hidden_dim base_model_hidden_size""",
    ),
    (
        2 * HIDDEN,
        """intermediate_size ffn_dim n_inner ffn_hidden_size decoder_ffn_dim encoder_ffn_dim d_ff
        d_inner dff intermediate_size_mlp prefix_dense_intermediate_size ffn_intermediate_size
        dense_intermediate_size""",
    ),
    (
        HIDDEN // 2,
        """moe_intermediate_size shared_expert_intermediate_size shared_intermediate_size
        moe_shared_expert_intermediate_size expert_ffn_hidden_size expert_dim
        moe_ffn_hidden_size""",
    ),
    (
        2,
        """num_hidden_layers n_layer n_layers num_layers decoder_layers encoder_layers
        num_decoder_layers num_encoder_layers""",
    ),
    (
        4,
        """num_attention_heads n_head n_heads num_heads decoder_attention_heads
        encoder_attention_heads num_decoder_attention_heads num_encoder_attention_heads
        linear_num_value_heads""",
    ),
    (
        16,
        """head_dim d_kv kv_channels attention_head_dim global_head_dim swa_head_dim swa_v_head_dim
        qk_nope_head_dim qk_rope_head_dim v_head_dim linear_key_head_dim linear_value_head_dim
        lightning_head_dim""",
    ),
    (2, "linear_num_key_heads"),
    (16, "mamba_d_state mamba_d_head mamba_head_dim mamba_chunk_size ssm_state_size"),
    (8, "mamba_n_heads mamba_num_heads"),  # with mamba_expand 2: 8 x 16 = 2 x 64
    (4, "num_experts n_routed_experts num_local_experts moe_num_experts n_experts"),
    (2, "num_experts_per_tok moe_topk moe_k top_k_experts num_experts_per_token moe_top_k"),
    (1, "n_group topk_group"),
    (32, "q_lora_rank kv_lora_rank"),
    (8, "rotary_dim"),
    (VOCABULARY, "vocab_size vocab_size_per_layer_input"),
    (
        POSITIONS,
        """max_position_embeddings n_positions max_seq_len n_ctx max_sequence_length
        max_target_positions original_max_position_embeddings""",
    ),
    (
        WINDOW,
        """sliding_window attention_window_size window_size local_attention
        sliding_window_size""",
    ),
    (2 * WINDOW, "attention_chunk_size"),
    (1, "first_k_dense_replace num_dense_layers moe_layer_start_index"),
    (2, "sliding_window_pattern full_attention_interval attn_layer_period"),
    (0, "pad_token_id"),
    (1, "bos_token_id"),
    (2, "eos_token_id sep_token_id decoder_start_token_id"),
)
SIZES = {name: size for size, names in _SIZES for name in names.split()}
"""What a size is made; a field that is absent, None or no number keeps what the family has."""

_HYBRID = {"layer_types": ["mamba", "attention", "mamba", "attention"], "num_hidden_layers": 4}
OWN: Mapping[str, Mapping[str, Any]] = {
    # Fields whose default is None, and without which the family's own code does not run.
    "deepseek_v2": {"num_experts_per_tok": 2, "n_routed_experts": 4},
    "nemotron": {"num_key_value_heads": 2},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "granitemoehybrid": _HYBRID,
    "falcon_h1": {"mamba_n_heads": 4},  # x 16: mamba_d_ssm is 64
    "jamba": {"attn_layer_offset": 1, "num_hidden_layers": 4},
    "mamba2": {"num_heads": 8, "head_dim": 16, "state_size": 16, "chunk_size": 16, "n_groups": 1},
    "zaya": {"num_experts_per_tok": 1},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2, "num_hidden_layers": 4},
}
"""Where one family's fields must fit together in a way of their own."""

DECODERS = {"is_decoder": True, "add_cross_attention": False}
"""What makes a decoder of the configs that are encoders otherwise."""


def families() -> list[str]:
    """Every model type with a class for causal language models, by name."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def shrunk(family: str) -> Any:
    """Return the family's config with every size small."""
    from transformers import CONFIG_MAPPING

    config = CONFIG_MAPPING[family]
    return config(**{**_small(config()), **OWN.get(family, {})})


def _small(config: Any) -> dict[str, Any]:
    """The fields to give a config's class, from what it has without any."""
    given = config.to_dict()
    small: dict[str, Any] = {}
    if "head_dim" in given and given["head_dim"] is None:
        small["head_dim"] = SIZES["head_dim"]
    for name, value in given.items():
        if name in SIZES and isinstance(value, int) and not isinstance(value, bool):
            small[name] = SIZES[name]
    for name in ("num_key_value_heads", "num_kv_heads", "multi_query_group_num", "n_head_kv"):
        heads = given.get("num_attention_heads") or given.get("n_head") or given.get("n_heads") or 1
        if isinstance(value := given.get(name), int):
            small[name] = 4 if value == heads else 1 if value == 1 else 2
    layers = _layer_kinds(given)
    small |= layers
    if layers or any(n in given for n in ("sliding_window_pattern", "full_attention_interval")):
        for name in ("num_hidden_layers", "n_layer", "num_layers"):
            if name in small:
                small[name] = 4
    for name, value in DECODERS.items():
        if name in given:
            small[name] = value
    for name in config.sub_configs:
        if (nested := getattr(config, name, None)) is not None:
            small[name] = _small(nested)
    return small


def _layer_kinds(given: Mapping[str, Any]) -> dict[str, list[Any]]:
    """Lists with an entry for each layer: four layers, with every kind that the family has."""
    depth = given.get("num_hidden_layers") or given.get("n_layer") or given.get("num_layers")
    found: dict[str, list[Any]] = {}
    for name, value in given.items():
        if isinstance(value, list) and len(value) == depth and value:
            kinds = list(dict.fromkeys(value))
            found[name] = [kinds[i % len(kinds)] for i in range(4)]
    return found


def build(family: str) -> Any:
    """Return the model, with weights from a seed."""
    import torch
    from transformers import AutoModelForCausalLM

    config = shrunk(family)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            noise = torch.randn(weight.shape, generator=generator)
            if weight.ndim > 1:
                weight.copy_(0.15 * noise)
            else:
                weight.add_(0.1 * noise)
    return model


def export(
    family: str, folder: Path, *, opset: int | None = None, experts: str = ""
) -> dict[str, Any]:
    """Export a family into a folder; return its sizes and how far the export is from PyTorch."""
    import onnx_ir
    import torch
    from transformers.exporters import OnnxConfig, OnnxExporter

    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    model = build(family)
    if experts:
        model.set_experts_implementation(experts)
    sample = inputs(model, BATCH, NEW, PAST)
    check = inputs(model, 1, 2, 9)
    with torch.no_grad():
        expected = model(**check).logits
    check = inputs(model, 1, 2, 9)
    config = OnnxConfig(dynamic=True, opset_version=opset)
    exported = OnnxExporter().export(model, sample, config=config)
    folder.mkdir(parents=True, exist_ok=True)
    model.config.save_pretrained(folder)
    onnx_ir.save(exported.program, folder / "model.onnx", external_data="model.onnx.data")
    facts: dict[str, Any] = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "inputs": [f"{v.name} {v.shape}" for v in exported.program.graph.inputs],
        "opset": exported.program.opset_imports.get(""),
    }
    try:
        check.pop("use_cache")
        got = exported(**check)
        logits = got.logits if hasattr(got, "logits") else got["logits"]
        facts["max_abs"] = float((torch.as_tensor(logits) - expected).abs().max())
    except Exception as error:
        facts["unlike"] = f"{type(error).__name__}: {str(error).splitlines()[0]}"[:300]
    (folder / "export.json").write_text(json.dumps(facts, indent=1) + "\n")
    return facts


CACHES = ("cache", "past_key_values", "cache_params", "past_buckets_states", "state", "mems")
"""What models call what they keep between steps."""


def inputs(model: Any, batch: int, new: int, past: int) -> dict[str, Any]:
    """What the model is called with behind a past that it made itself."""
    import torch

    def behind(*optional: str) -> dict[str, Any]:
        before = model(input_ids=ids[:, :past], use_cache=True)
        caches = {n: before[n] for n in CACHES if n in taken and before.get(n) is not None}
        given = {
            "attention_mask": torch.ones(batch, past + new, dtype=torch.int64),
            "position_ids": torch.arange(past, past + new).repeat(batch, 1),
        }
        sample = {"input_ids": ids[:, past:], **caches, "use_cache": True}
        return sample | {n: given[n] for n in optional if n in taken}

    generator = torch.Generator().manual_seed(batch * 1000 + new)
    ids = torch.randint(3, VOCABULARY, (batch, past + new), generator=generator)
    taken = inspect.signature(model.forward).parameters
    with torch.no_grad():
        try:
            model(**behind("attention_mask", "position_ids"))
        except (RuntimeError, ValueError, TypeError, AttributeError):
            # A model of states alone takes no mask that is longer than what is new.
            return behind()
        return behind("attention_mask", "position_ids")
