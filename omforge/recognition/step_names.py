"""The names of what a served model reads and gives: the passes that serve it write them.

`alibi.KEY_POSITIONS` is one more.
"""

import re

PAST, PRESENT = "past_key_values", "present_key_values"
"""The cache of C slots, and the new tokens' keys and values."""

_CACHE = re.compile(rf"{PAST}(\.\d+\.(key|value))?")

INPUT_IDS, INPUTS_EMBEDS, LOGITS = "input_ids", "inputs_embeds", "logits"

MASK = "attention_mask"
"""Begins the name of what is added to the scores, or says which keys are seen."""

MASK_CAUSAL, MASK_FULL = "attention_mask_causal", "attention_mask_full"
"""The masks of a model without a cache: earlier tokens alone, and all tokens of the row."""

LOGITS_INDEX = "logits_index"
"""Which tokens' logits are asked for."""

WRITE_INDICES = "write_indices"
"""Of a cache that the graph writes: the slot [B] of the step's first token."""


def is_cache(name: str) -> bool:
    """Whether an input of this name is the cache, or a layer's part of it.

    An encoder's keys and values keep their own names, such as `past_key_values.0.encoder.key`.
    """
    return _CACHE.fullmatch(name) is not None
