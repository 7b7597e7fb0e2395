"""The names of what a served model reads and gives: the passes that serve it write them.

`alibi.KEY_POSITIONS` is one more.
"""

PAST, PRESENT = "past_key_values", "present_key_values"
"""The cache of C slots, and the new tokens' keys and values."""

INPUT_IDS, INPUTS_EMBEDS, LOGITS = "input_ids", "inputs_embeds", "logits"

MASK = "attention_mask"
"""Begins the name of what is added to the scores, or says which keys are seen."""

MASK_CAUSAL, MASK_FULL = "attention_mask_causal", "attention_mask_full"
"""The masks of a model without a cache: earlier tokens alone, and all tokens of the row."""

LOGITS_INDEX = "logits_index"
"""Which tokens' logits are asked for."""

WRITE_INDICES = "write_indices"
"""Of a cache that the graph writes: the slot [B] of the step's first token."""
