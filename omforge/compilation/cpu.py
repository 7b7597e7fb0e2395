"""What is chosen where the target is the CPU: a graph of any length for ONNX Runtime, no atc."""

from __future__ import annotations

import dataclasses

from omforge.compilation.options import CompileOptions
from omforge.ir.errors import InputError
from omforge.lowering.target import CPU, Target
from omforge.passes.group_query_attention import GroupQueryAttention
from omforge.passes.matmul_nbits import MatmulNbits
from omforge.passes.remove_no_ops import RemoveNoOps
from omforge.rewriting.base import Pass

_WITHOUT = "Leave it away, or compile for an Ascend SoC"


def is_cpu(soc: Target) -> bool:
    """Whether a target is the CPU."""
    return soc.family is CPU.family


def cpu_options(options: CompileOptions, soc: Target) -> CompileOptions:
    """Return the options with what the CPU leaves no choice of; those of a SoC as they are.

    Raises:
        InputError: One is for atc and NPUs alone, or ONNX Runtime's for the CPU alone.
    """
    if not is_cpu(soc):
        if options.front == "ort":
            raise InputError(
                f"--front ort for {soc.soc_version}",
                "ONNX Runtime's own operators are for the CPU: atc knows none of them",
                "Compile with --target cpu",
            )
        return options
    refused = (
        ("--front air", options.front == "air", "atc takes GE graphs, and runs on no CPU graph"),
        ("--gears", options.gears, "its one graph takes any length as it is"),
        ("--prefill", bool(options.prefill), "its one graph takes any length as it is"),
        (f"--dtype {options.dtype}", options.dtype != "fp32", "ONNX Runtime computes in float32"),
        ("--form", bool(options.forms), "forms are those of NPU operators"),
        ("--budget", bool(options.budget), "nothing is counted for it: memory is the machine's"),
        (f"--kv-dtype {options.kv_dtype}", options.kv_dtype != "fp16", "its cache holds floats"),
        ("--quantize w8a8", options.quantize.startswith("w8a8"), "its products read floats"),
        ("--layout stacked", options.layout == "stacked", "its graph writes the cache in place"),
        (
            f"--atc {options.build.atc}",
            options.build.atc not in ("auto", "none"),
            "atc has no part",
        ),
    )
    for what, given, why in refused:
        if given:
            raise InputError(f"{what} for --target cpu", why, _WITHOUT)
    return dataclasses.replace(options, front="ort", layout="per-layer")


def require_device(
    soc: Target, what: str, why: str = "what is planned is the memory of an NPU"
) -> None:
    """Refuse what is of devices alone; `what` and `why` are the error's.

    Raises:
        InputError: The target is the CPU.
    """
    if is_cpu(soc):
        raise InputError(f"{what} for --target cpu", why, "Name an Ascend SoC")


def cpu_passes() -> tuple[Pass, ...]:
    """What makes a canonical graph one for ONNX Runtime's CPU kernels."""
    return (MatmulNbits(), GroupQueryAttention(), RemoveNoOps())
