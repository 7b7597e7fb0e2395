"""Inputs that the caller gives once for a sequence, and that every step reads.

The matrices of an adapter (LoRA) are such, and what an encoder made for a decoder to look at. The
sessions of a bundle get them with each step's other feeds; a backend with buffers of its own keeps
them there.
"""

from __future__ import annotations

import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from omforge.bundle.manifest import FixedInput, Manifest, TensorSpec
from omforge.ir.bfloat16 import is_float
from omforge.ir.errors import InputError
from omforge.runtime.session import describe

Array = npt.NDArray[Any]


def fixed_specs(fixed: Sequence[FixedInput], batch: int) -> tuple[TensorSpec, ...]:
    """Return a bucket's fixed inputs, with numbers as shapes."""
    return tuple(
        TensorSpec(
            spec.name, spec.dtype, tuple(batch if dim == "batch" else dim for dim in spec.shape)
        )
        for spec in fixed
    )


def read_fixed(fixed: Sequence[FixedInput], file: Path | None) -> dict[str, Array]:
    """Read what is given once for a sequence from an .npz file.

    Raises:
        InputError: The file cannot be read; or an encoder's states, without which a decoder says
            nothing that means anything, are not in it. (A mask may be absent, and hides nothing.)
    """
    given: dict[str, Array] = {}
    if file is not None:
        try:
            with np.load(file, allow_pickle=False) as found:
                given = {name: found[name] for name in found.files}
        except (OSError, ValueError, AttributeError, zipfile.BadZipFile) as error:
            raise InputError(
                f"cannot read {file}", str(error), "Write it with numpy.savez, by name"
            ) from error
    lacking = [name for name in required(fixed) if name not in given]
    if lacking:
        raise InputError(
            f"the bundle needs what an encoder made: {', '.join(lacking)}",
            "the model attends to it beside its own text",
            "Give it with --give FILE.npz, by these names (from Python: LanguageModel(fixed=...))",
        )
    return given


def required(fixed: Sequence[FixedInput]) -> list[str]:
    """The names of an encoder's states: a mask may be absent, and so may an adapter."""
    return [s.name for s in fixed if s.kind == "memory" and is_float(s.dtype)]


def as_exported(manifest: Manifest, given: Mapping[str, Array]) -> dict[str, Array]:
    """Fixed inputs by the export's names; what is absent is as `fixed_feeds` makes it."""
    full = fixed_feeds(manifest.fixed, 1, {}) | dict(given)
    names = zip(manifest.fixed, manifest.export.fixed, strict=True)
    return {name: full[spec.name] for spec, name in names}


def random_fixed(fixed: Sequence[FixedInput], batch: int, seed: int) -> dict[str, Array]:
    """Numbers to compare with: zeros would prove nothing of an adapter, nor equal rows of a memory.

    The last row of a memory's mask hides the last quarter.
    """
    stream = np.random.default_rng([seed, 1])
    found: dict[str, Array] = {}
    for spec in fixed_specs(fixed, batch):
        shape = tuple(dim for dim in spec.shape if isinstance(dim, int))
        if is_float(spec.dtype):
            found[spec.name] = 0.1 * stream.standard_normal(shape)
        else:
            found[spec.name] = np.ones(shape, spec.dtype)
            found[spec.name][-1:, shape[-1] - shape[-1] // 4 :] = 0
    return found


def fixed_feeds(
    fixed: Sequence[FixedInput],
    batch: int,
    given: Mapping[str, Array],
    dtypes: Mapping[str, str] | None = None,
) -> dict[str, Array]:
    """Return the feeds of all fixed inputs: what is given, and zeros for the rest.

    Args:
        fixed: The manifest's.
        batch: B.
        given: By name; floats of any width become the graph's. Of a `memory` one row does for all.
        dtypes: By name, where a graph has other ones (the canonical level has the export's).

    Raises:
        InputError: One is no fixed input, or does not fit its shape.
    """
    specs = {spec.name: spec for spec in fixed_specs(fixed, batch)}
    spec_of = {spec.name: spec for spec in fixed}
    unknown = sorted(set(given) - set(specs))
    if unknown:
        raise InputError(
            f"{', '.join(unknown)} cannot be given",
            f"the fixed inputs of the bundle are {', '.join(specs) or 'none'}",
            "Leave it away, or build the bundle from an export that has it",
        )
    feeds: dict[str, Array] = {}
    for name, spec in specs.items():
        shape = tuple(dim for dim in spec.shape if isinstance(dim, int))
        dtype = (dtypes or {}).get(name, spec.dtype)
        if name not in given:
            # Of a mask, all is real.
            feeds[name] = np.full(shape, np.dtype(dtype).kind in "iub", dtype)
            continue
        array = np.asarray(given[name])
        rows = {1, batch} if spec_of[name].shape[:1] == ("batch",) else {shape[0] if shape else 0}
        if (
            is_float(array.dtype) != is_float(dtype)
            or array.shape[1:] != shape[1:]
            or array.ndim != len(shape)
            or (shape and array.shape[0] not in rows)
        ):
            raise InputError(
                f"the fixed input {name} does not fit",
                f"the graph takes {describe(dtype, shape)}, "
                f"given is {describe(array.dtype.name, array.shape)}",
                "Give what the model was exported for",
            )
        feeds[name] = np.ascontiguousarray(np.broadcast_to(array.astype(dtype), shape))
    return feeds
