"""The float dtypes that a graph may be lowered to, as options and passes spell them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from omforge.ir.errors import InputError

FloatName = Literal["fp16", "bf16", "fp32"]

FLOATS: Mapping[FloatName, str] = {"fp16": "float16", "bf16": "bfloat16", "fp32": "float32"}
"""As manifests and numpy spell them."""


def float_name(dtype: str) -> FloatName:
    """The short spelling of a manifest's dtype.

    Raises:
        InputError: No graph is lowered to it.
    """
    for name in FLOATS:
        if FLOATS[name] == dtype:
            return name
    raise InputError(f"graphs cannot be of {dtype}", f"they are of {', '.join(FLOATS.values())}")
