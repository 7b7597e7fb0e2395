"""What `--quantize w8a8` says: int8 weights, and int8 for what layers read.

More words follow behind colons, in any order: `plain` leaves smoothing out, `limit=0.03` has layers
read floats whose outputs would be off by more, `keep=NAMES` with `+` between the names.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy.typing as npt

from omforge.atc.command import AtcOptions, MixedPrecision, PrecisionModeV2
from omforge.ir.errors import InputError
from omforge.lowering.legalize.choices import choices
from omforge.lowering.legalize.int8_products import INT8_MATMUL
from omforge.lowering.legalize.quantized import QUANTIZED_MATMUL
from omforge.lowering.target import Target
from omforge.passes.quantize_activations import LIMIT, QuantizeActivations

Array = npt.NDArray[Any]

KIND = "w8a8"


@dataclass(frozen=True)
class ActivationOptions:
    """How layers' inputs become int8; the fields are those of `QuantizeActivations`."""

    smooth: bool = True
    limit: float = LIMIT

    def words(self) -> list[str]:
        """What is said of it behind the kind."""
        limit = [f"limit={self.limit:g}"] * (self.limit != LIMIT)
        return [*["plain"] * (not self.smooth), *limit]


def parse_activations(text: str, words: Sequence[str]) -> dict[str, Any]:
    """Return fields of `QuantizeOptions` for the words behind `w8a8`.

    Raises:
        InputError: A word is not known.
    """
    found: dict[str, Any] = {}
    settings: dict[str, Any] = {}
    for word in words:
        if word == "plain":
            settings["smooth"] = False
        elif word.startswith("keep="):
            found["keep"] = tuple(word.removeprefix("keep=").split("+"))
        elif word.startswith("limit="):
            settings["limit"] = _share(text, word.removeprefix("limit="))
        else:
            raise InputError(
                f"--quantize {text}: {word!r} is not known",
                "words behind w8a8 are plain, limit=SHARE and keep=NAMES",
                "For example w8a8:limit=0.03",
            )
    return {**found, "activations": ActivationOptions(**settings)}


def _share(text: str, word: str) -> float:
    try:
        share = float(word)
    except ValueError:
        share = -1.0
    if not 0 <= share < float("inf"):
        raise InputError(
            f"--quantize {text}: a limit of {word!r} makes no sense",
            "it is the relative error of a layer's outputs above which the layer reads floats",
            "0.03 and 0.1 are usual",
        )
    return share


def check_activations(
    what: str, soc: Target, *, dtype: str, calibration: bool, gears: bool, budget: str
) -> None:
    """Refuse what the SoC's kernels, atc or a missing text do not allow.

    Args:
        what: Was asked for.
        soc: On what.
        dtype: Of the lowered graphs.
        calibration: Whether there is a text.
        gears: Whether there are gears.
        budget: What `--budget` says.

    Raises:
        InputError: Names what the SoC has.
    """
    if not choices(INT8_MATMUL, soc.family.name):
        raise InputError(
            f"{what} on {soc.soc_version}: it has no kernel for products of int8",
            "AscendQuant and AscendDequant are on 310P, 310B, A2, A3 and 950",
            "Compile without --quantize",
        )
    if dtype != "fp16":
        raise InputError(
            f"{what} with --dtype {dtype}",
            "kernels for products of int8 give float16",
            "Use --dtype fp16",
        )
    if not calibration:
        raise InputError(
            f"{what} needs a calibration text",
            "the scales of activations are what the layers read on one",
            "Give --calibration FILE: a text, or token numbers as .npy",
        )
    if gears:
        # hicann/ge:docs/zh/user_guides/atc_tools/CLI_options/general_restrictions.md
        raise InputError(
            f"{what} cannot have gears",
            "atc refuses dynamic shapes for a graph that computes on int8",
            "Compile without --gears: one static graph a bucket",
        )
    if budget:
        raise InputError(
            f"{what} with --budget {budget}",
            "a budget shares bits among weights that are read alone; here all have eight",
            "Use --quantize int8 or int4 with a budget",
        )


def activation_pass(
    options: ActivationOptions,
    keep: tuple[str, ...],
    soc: Target,
    tokens: tuple[Array, ...],
    progress: Callable[[int, int], None] | None,
) -> QuantizeActivations:
    """Return the pass; layers that read floats have int8 weights where the SoC has a kernel."""
    return QuantizeActivations(
        options.smooth,
        options.limit,
        "int8" if choices(QUANTIZED_MATMUL, soc.family.name) else "float",
        keep=keep,
        tokens=tokens or None,
        progress=progress,
    )


def atc_for_int8(options: AtcOptions) -> AtcOptions:
    """Return atc's options for a graph that computes on int8.

    atc's documents exclude `origin` for models with quantised activations; `mixed_float16` keeps
    what is float32 wherever float16 would be too coarse.

    Source: hicann/ge:docs/zh/user_guides/atc_tools/CLI_options/general_restrictions.md.
    """
    if options.precision != PrecisionModeV2():
        return options
    return dataclasses.replace(options, precision=MixedPrecision("mixed_float16"))
