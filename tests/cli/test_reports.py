"""What commands tell: here what comes next."""

import dataclasses
from pathlib import Path

import pytest

from omforge.bundle.manifest import FixedInput
from omforge.cli.reports import next_commands
from omforge.runtime.bundle import Bundle

ADAPTER = FixedInput("lora", "float16", (4, 8), "adapter")
MASK = FixedInput("encoder_attention_mask", "int64", ("batch", 16), "memory")
STATES = FixedInput("encoder_hidden_states", "float16", ("batch", 16, 64), "memory")


@pytest.mark.parametrize(
    ("fixed", "give"),
    [((), ""), ((ADAPTER, MASK), ""), ((ADAPTER, MASK, STATES), " --give FILE.npz")],
    ids=["nothing", "what may be absent", "states"],
)
def test_the_next_command_has_what_run_needs(
    bert: Bundle, fixed: tuple[FixedInput, ...], give: str
) -> None:
    made = dataclasses.replace(bert.manifest, fixed=fixed)
    told = next_commands(made, Path("my bundle"))
    assert told == f"omforge verify 'my bundle'; omforge run 'my bundle' --prompt \"...\"{give}"
