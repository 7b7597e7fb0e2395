"""What `--quantize`, `--budget`, `--kv-dtype` and `--calibration` say, and what a SoC can do.

`int8` is one scale per channel, `int4` groups of 128. More words follow behind colons, in any
order: `g64` for groups (`g0` for none), `sym` or `asym`, a method, `keep=NAMES` with `+` between
the names: `int4:g32:gptq:asym:keep=*down_proj*+lm_head`. `w8a8` is in `activation_options`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import numpy.typing as npt

from omforge import ir
from omforge.bundle import manifest as m
from omforge.compilation.activation_options import (
    KIND,
    ActivationOptions,
    activation_pass,
    check_activations,
    parse_activations,
)
from omforge.compilation.footprint import spec_bytes
from omforge.ir.errors import InputError
from omforge.lowering.legalize.choices import choices
from omforge.lowering.legalize.quantized import LARGEST, OP, QUANTIZED_MATMUL
from omforge.lowering.target import CPU, Target
from omforge.passes.quantize_kv import QuantizeKv
from omforge.passes.quantize_weights import Method, QuantizeWeights
from omforge.passes.turn_weights import TurnWeights
from omforge.quantization.budget import parse_size
from omforge.quantization.report import budget_plan, quantized_layers
from omforge.quantization.token_file import leading_tokens, read_tokens
from omforge.recognition.step_names import is_cache
from omforge.rewriting.base import Pass

Array = npt.NDArray[Any]
KvDtype = Literal["fp16", "int8", "int8:channel", "int8:head"]
"""Of the cache; what follows a colon shares a scale, a channel if nothing does."""

METHODS: tuple[Method, ...] = ("rtn", "hqq", "gptq", "awq")
CALIBRATED = ("gptq", "awq")

_BITS: dict[str, Literal[4, 8]] = {"int8": 8, "int4": 4}
_GROUPS = {8: 0, 4: 128}
_EXAMPLE = "int8, int4:g128, int4:g32:gptq:asym"

_PIECE, _PIECES = 256, 32
"""Tokens of a piece of a calibration text, and how many pieces are taken."""


@dataclass(frozen=True)
class QuantizeOptions:
    """How weights are stored; the fields are those of `QuantizeWeights`."""

    bits: Literal[4, 8]
    group: int = 0
    symmetric: bool = True
    method: Method = "rtn"
    keep: tuple[str, ...] = ()
    activations: ActivationOptions | None = None
    """How what layers read becomes int8 too; None leaves it in floats."""

    def __str__(self) -> str:
        if self.activations is not None:
            keep = [f"keep={'+'.join(self.keep)}"] * bool(self.keep)
            return ":".join([KIND, *self.activations.words(), *keep])
        words = [f"int{self.bits}", *[f"g{self.group}"] * bool(self.group)]
        words += ["asym"] * (not self.symmetric) + ["sym"] * (
            self.symmetric and self.method == "hqq"
        )
        words += [self.method]
        words += [f"keep={'+'.join(self.keep)}"] * bool(self.keep)
        return ":".join(words)


_HALVES = f"{OP} takes float16 beside its weights, and bfloat16 on A2, A3 and 950"


def parse_quantize(text: str) -> QuantizeOptions | None:
    """Return what `--quantize` says; None where it is empty.

    Without `sym` or `asym`, hqq has zero points: they are what it chooses. (SmolLM2-135M, int4,
    groups of 128, all layers: perplexity 15.9 with them; without, 19.5, where rtn has 17.4.)

    Raises:
        InputError: A word is not known.
    """
    if not text:
        return None
    kind, *words = text.strip().split(":")
    if kind == KIND:
        return QuantizeOptions(8, **parse_activations(text, words))
    if kind not in _BITS:
        raise InputError(
            f"--quantize {text}: {kind!r} is no kind of weight",
            f"kinds are {', '.join((*_BITS, KIND))}",
            f"For example {_EXAMPLE}",
        )
    bits = _BITS[kind]
    found: dict[str, Any] = {"group": _GROUPS[bits], "symmetric": "hqq" not in words}
    for word in words:
        if word[:1] == "g" and word[1:].isdigit():
            name, value = "group", int(word[1:])
        elif word in ("sym", "asym"):
            name, value = "symmetric", word == "sym"
        elif word in METHODS:
            name, value = "method", word
        elif word.startswith("keep="):
            name, value = "keep", tuple(word.removeprefix("keep=").split("+"))
        else:
            raise InputError(
                f"--quantize {text}: {word!r} is not known",
                f"words are g32, g64, g128, sym, asym, {', '.join(METHODS)} and keep=NAMES",
                f"For example {_EXAMPLE}",
            )
        found[name] = value
    options = QuantizeOptions(bits, **found)
    if options.group < 0 or options.group % 32:
        raise InputError(
            f"--quantize {text}: groups of {options.group} weights make no sense",
            "they are multiples of 32, or 0 for one scale per channel",
            "g32, g64 and g128 are usual",
        )
    return options


def check_quantize(
    weights: QuantizeOptions | None,
    kv: KvDtype,
    soc: Target,
    *,
    dtype: str,
    calibration: bool,
    gears: bool,
    budget: str = "",
) -> None:
    """Refuse what the SoC's kernels cannot do, and what lacks a calibration text.

    Raises:
        InputError: Names what the SoC has.
    """
    if weights is not None and weights.activations is not None:
        check_activations(
            f"--quantize {weights}",
            soc,
            dtype=dtype,
            calibration=calibration,
            gears=gears,
            budget=budget,
        )
    elif weights is not None:
        _check_weights(weights, soc, dtype)
        if weights.method in CALIBRATED and not calibration:
            raise _no_text(f"--quantize {weights}", "it keeps the layers' outputs on a text")
    if budget:
        parse_size(budget)
        if weights is None:
            raise InputError(
                f"--budget {budget} without --quantize",
                "a budget gives some layers more bits than the others have",
                "Say with --quantize what the others have: int4:g64, or int8 on 310P",
            )
    if kv != "fp16":
        if dtype == "bf16":
            raise InputError(
                f"--kv-dtype {kv} with --dtype bf16",
                "AscendQuant, which writes an int8 cache, takes float16 and float32, and what "
                "reads it gives float16",
                "Use --dtype fp16, or leave the cache in bfloat16",
            )
        if not calibration:
            raise _no_text(f"--kv-dtype {kv}", "its scales are the largest keys and values of one")
        if gears:
            # hicann/ge:docs/zh/user_guides/atc_tools (general_restrictions.md)
            raise InputError(
                "an int8 cache cannot have gears",
                "atc refuses dynamic shapes for a graph with quantised inputs",
                "Compile without --gears: one static graph a bucket",
            )


def check_stored(stored: Sequence[ir.Value], soc: Target, dtype: str) -> None:
    """Refuse an export's own int4 weights where nothing multiplies by them.

    (What may be done with int8 ones depends on what they are multiplied by; legality tells.)

    Args:
        stored: The weights of products that are integers.
        soc: The SoC.
        dtype: Of the lowered graphs, as `--dtype` says it.

    Raises:
        InputError: Names what the SoC has.
    """
    if soc.family is CPU.family:
        return
    count = sum(value.dtype == ir.DataType.INT4 for value in stored)
    what = f"the export has {count} int4 weights"
    if count and (soc.family.name == "310p" or not choices(QUANTIZED_MATMUL, soc.family.name)):
        raise InputError(
            f"{what}, and {soc.soc_version} has no kernel for them",
            f"{OP} is on 310P (int8 per channel) and on A2, A3 and 950 (int8, int4, groups)",
            "Start from an export with float weights, with --quantize int8 or w8a8",
        )
    if count and dtype == "fp32":
        raise InputError(f"{what}, with --dtype {dtype}", _HALVES, "Use --dtype fp16")


def _check_weights(weights: QuantizeOptions, soc: Target, dtype: str) -> None:
    if soc.family is CPU.family:
        return
    what = f"--quantize {weights} on {soc.soc_version}"
    if not choices(QUANTIZED_MATMUL, soc.family.name):
        raise InputError(
            f"{what}: it has no kernel for products with quantised weights",
            f"{OP} is on 310P (int8 per channel) and on A2, A3 and 950 (int8, int4, groups); "
            f"{soc.soc_version} multiplies float16 by float16, or int8 by int8",
            "Use --quantize w8a8, or compile without --quantize",
        )
    if soc.family.name == "310p" and (weights.bits != 8 or weights.group):
        raise InputError(
            f"{what}: it has no kernel for that",
            f"310P has {OP} for int8 weights with one scale per channel, and nothing else",
            "Use --quantize int8",
        )
    if dtype == "fp32":
        raise InputError(f"{what} with --dtype {dtype}", _HALVES, "Use --dtype fp16")


def _no_text(what: str, why: str) -> InputError:
    return InputError(
        f"{what} needs a calibration text",
        why,
        "Give --calibration FILE: a text, or token numbers as .npy",
    )


def weight_passes(
    options: QuantizeOptions | None,
    soc: Target,
    tokens: tuple[Array, ...],
    progress: Callable[[int, int], None] | None = None,
    *,
    budget: str = "",
    footprint: Callable[[ir.Model], int] | None = None,
    stored: bool = False,
) -> tuple[Pass, ...]:
    """Return the passes that quantise weights, and store them as the SoC's kernel wants them.

    Args:
        options: How to quantise; None leaves the weights as they are.
        soc: The SoC.
        tokens: The calibration text.
        progress: Told the bytes of weights done and in all.
        budget: As `QuantizeWeights` takes it.
        footprint: As `QuantizeWeights` takes it.
        stored: Whether the export has integers in place of weights already.
    """
    if options is None:
        return (turn_weights(soc),) if stored else ()
    if options.activations is not None:
        told = activation_pass(options.activations, options.keep, soc, tokens, progress)
        return told, turn_weights(soc)
    step = QuantizeWeights(
        options.bits,
        options.group,
        options.symmetric,
        options.method,
        keep=options.keep,
        budget=budget,
        unsigned=soc.family is CPU.family,
        tokens=tokens or None,
        progress=progress,
        footprint=footprint,
    )
    return step, turn_weights(soc)


def turn_weights(soc: Target) -> TurnWeights:
    """Return the pass that stores weights as the SoC's kernel wants them."""
    return TurnWeights(0 if soc.family.name in ("310p", "cpu") else LARGEST)


def kv_passes(
    kv: KvDtype,
    tokens: tuple[Array, ...] | Literal["blank"],
    context: int,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[Pass, ...]:
    """Return the pass that makes the cache int8, if it shall be."""
    if kv == "fp16":
        return ()
    granularity = "head" if kv == "int8:head" else "channel"
    return (QuantizeKv(granularity, positions=context, tokens=tokens, progress=progress),)


def measure_quantization(
    model: ir.Model,
    options: QuantizeOptions | None,
    matrices: int,
    bucket: m.Bucket,
    graph_bytes: int,
) -> m.Quantization:
    """Return what the manifest says of integers.

    Args:
        model: The canonical graph.
        options: How weights are stored.
        matrices: Weights of linear layers, whatever they are stored as.
        bucket: One of the lowered graphs.
        graph_bytes: Its constants.
    """
    layers, plan = quantized_layers(model), budget_plan(model)
    caches = [spec for spec in bucket.inputs if is_cache(spec.name)]
    integers = any(spec.dtype == "int8" for spec in caches)
    return m.Quantization(
        weights="" if options is None else str(options),
        matrices=len(layers),
        all_matrices=matrices,
        bytes_before=sum(layer.bytes_before for layer in layers),
        bytes_after=sum(layer.bytes_after for layer in layers),
        kv="int8" if integers else "",
        graph_bytes=graph_bytes,
        cache_bytes=sum(map(spec_bytes, caches)),
        budget=0 if plan is None else plan.budget,
        kinds=() if plan is None else tuple(plan.counts.items()),
    )


def quantization_json(model: ir.Model) -> dict[str, Any]:
    """Return each quantised layer, and how the layers came to share a budget, as plain data."""
    plan = budget_plan(model)
    return {
        "layers": [dataclasses.asdict(layer) for layer in quantized_layers(model)],
        "budget": None if plan is None else dataclasses.asdict(plan),
    }


def quantization_text(made: m.Manifest) -> str:
    """Return one line for a report: how weights and cache are stored, matrices, bytes."""
    found = made.quantization
    parts = [
        f"{found.weights}: {found.matrices} of {found.all_matrices} matrices, "
        f"{found.bytes_before:,} bytes -> {found.bytes_after:,}"
    ] * bool(found.weights)
    parts += ["int8 cache"] * bool(found.kv)
    return "; ".join(parts)


def read_calibration(path: str | Path | None, folder: Path) -> tuple[Array, ...]:
    """Return pieces of token numbers [S] of a .npy file, or of a text.

    Args:
        path: The file; None gives nothing.
        folder: Of the export, whose tokenizer reads a text.

    Raises:
        InputError: The file cannot be read, or there is no tokenizer.
    """
    if path is None:
        return ()
    path = Path(path)
    if path.suffix == ".npy":
        return tuple(read_tokens(str(path)))
    try:
        with path.open("rb"):  # a wrong path is told ahead of a tokenizer that is missing, too
            encode = _encoder(folder)
        ids = np.asarray(leading_tokens(path, encode, _PIECE * _PIECES), np.int64)
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"cannot read the calibration text {path}",
            str(error),
            "Give a text in UTF-8, or token numbers [pieces, tokens] as .npy",
        ) from error
    if len(ids) < 2:
        raise InputError(
            f"the calibration text {path} has {len(ids)} tokens",
            "what is measured on it are the numbers behind each token",
            "Give a longer text",
        )
    pieces = [ids[at : at + _PIECE] for at in range(0, len(ids), _PIECE)][:_PIECES]
    return tuple(piece for piece in pieces if len(piece) > 1)


def _encoder(folder: Path) -> Callable[[str], list[int]]:
    file = folder / "tokenizer.json"
    if not file.is_file():
        raise InputError(
            f"{folder} has no tokenizer.json",
            "a calibration text is read by the model's own tokenizer",
            "Copy it beside the export, or give token numbers [pieces, tokens] as .npy",
        )
    import tokenizers  # slow to import, and most bundles need none

    reader: Any = tokenizers.Tokenizer
    try:
        loaded = reader.from_file(str(file))
    # tokenizers raises bare Exception for a damaged tokenizer.json.
    except Exception as error:
        raise InputError(
            f"tokenizers cannot load {file}", str(error), "Copy the model's tokenizer again"
        ) from error
    return lambda text: cast("list[int]", loaded.encode(text).ids)
