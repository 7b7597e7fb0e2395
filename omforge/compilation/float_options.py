"""What `--dtype` can be: what the SoC computes in, and what flags of atc leave of it."""

from __future__ import annotations

from omforge.atc.command import AtcOptions
from omforge.atc.flags import flag_name
from omforge.ir.errors import InputError
from omforge.ir.floats import FloatName
from omforge.lowering.target import Target

_PRECISION = ("precision_mode_v2", "precision_mode")

_KEEPING = frozenset(
    (
        *("origin", "mixed_bfloat16"),
        *("must_keep_origin_dtype", "allow_mix_precision_bf16", "allow_fp32_to_bf16"),
    )
)
"""Modes that leave bfloat16 what it is (hicann/ge:docs/zh/user_guides/atc_tools/CLI_options)."""


def check_dtype(dtype: FloatName, soc: Target, atc: AtcOptions) -> None:
    """Refuse a dtype that the SoC does not compute in, or that atc would not keep.

    Raises:
        InputError: Says why, and what the SoC has.
    """
    if dtype != "bf16":
        return
    why = soc.family.no_bfloat16
    if why is not None or "bfloat16" not in soc.dtypes:
        raise InputError(
            f"--dtype bf16 on {soc.soc_version}",
            "it has no bfloat16" if why is None else f"{why.text} ({why.source})",
            "Use --dtype fp16, or a target of A2, A3 or 950",
        )
    for word in atc.words():
        name, value = flag_name(word)
        if name in _PRECISION and value not in _KEEPING:
            raise InputError(
                f"--dtype bf16 with --{name}={value}",
                "atc would compute in another dtype than the graphs that were compared, bfloat16",
                "Leave the flag out: --precision_mode_v2=origin is passed, which keeps bfloat16",
            )
