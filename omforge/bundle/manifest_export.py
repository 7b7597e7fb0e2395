"""What a manifest says of the exported model: how it is run to be compared with the bundle.

Letters as in the manifest: B batch, P past, K kv heads, D head size.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from omforge.bundle.manifest_json import wrong
from omforge.ir.dims import parse_dim, symbols
from omforge.ir.paths import name_fault

_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class TensorSpec:
    """One input or output of a graph; a dim is a number, or a symbol's name where it is dynamic."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]


@dataclass(frozen=True)
class ExportCache:
    """One tensor of the exported model's own cache.

    Its shape is of numbers and of expressions of "batch" and "past". The output `returns` the
    `whole` of past and new, or the new `rows` alone, which are appended along `axis`.
    """

    input: str
    shape: tuple[int | str, ...]
    output: str
    returns: Literal["whole", "rows"]
    axis: int


@dataclass(frozen=True)
class Counter:
    """An integer input of the exported model that counts the slots of a cache of fixed size.

    `slots` are those that the new tokens go to, [S], `start` the first of them, `end` how many are
    valid with the new tokens; the latter are a number, or one for each row.
    """

    input: str
    counts: Literal["slots", "start", "end"]


@dataclass(frozen=True)
class CacheFlag:
    """A boolean input of the exported model, and its value once there is a past.

    `always`: it has that value before there is one, too.
    """

    input: str
    cached: bool
    always: bool = False


@dataclass(frozen=True)
class FirstStep:
    """The graph of an export in two files that reads a whole text, beside the one that goes on.

    Its outputs that are caches are called as those of the other.
    """

    file: str
    sha256: str
    input_ids: str
    attention_mask: str | None
    position_ids: str | None
    logits: str
    extra: tuple[TensorSpec, ...]


@dataclass(frozen=True)
class Export:
    """The exported model that the bundle was made from, so that the two can be compared.

    `past` and `present` are the (key, value) names of each layer; `extra` are inputs that the
    model does not use, and that are fed with zeros. `states` are the (input, output) names of its
    recurrent states. Where the cache is not one [B, K, P, D] for the keys and the values of each
    layer that comes back whole, `caches` says what it is, and `past` and `present` are empty.
    `fixed`, `token_inputs` and `outputs` are its names for those of the bundle, in the same order.
    `first` is what is run where there is no past, and `cache_flag` what tells one graph of it.
    `longest_call` is how many new tokens it can take at once; None for any number. If `one_token`,
    what goes on from a past takes one a call.
    """

    path: str
    sha256: str
    input_ids: str | None
    attention_mask: str | None
    position_ids: str | None
    past: tuple[tuple[str, str], ...]
    present: tuple[tuple[str, str], ...]
    logits: str
    extra: tuple[TensorSpec, ...]
    dtype: str
    states: tuple[tuple[str, str], ...] = ()
    caches: tuple[ExportCache, ...] = ()
    fixed: tuple[str, ...] = ()
    token_inputs: tuple[str, ...] = ()
    outputs: tuple[str, ...] = ()
    longest_call: int | None = None
    first: FirstStep | None = None
    cache_flag: CacheFlag | None = None
    counters: tuple[Counter, ...] = ()
    one_token: bool = False


def validate_export(export: Export) -> None:
    """Check what the types cannot say.

    Raises:
        InputError: The first field that is out of range or contradicts another one.
    """
    check_hash("export.sha256", export.sha256)
    for index, cache in enumerate(export.caches):
        where = f"export.caches[{index}]"
        for dim in cache.shape:
            names = symbols(parse_dim(dim))
            if not names <= {"batch", "past"}:
                raise wrong(f"{where}.shape", f"has {dim!r}, which is not of batch and past")
        if not 0 <= cache.axis < len(cache.shape):
            raise wrong(f"{where}.axis", f"is {cache.axis}, of {len(cache.shape)} axes")
    if export.first is not None:
        check_hash("export.first.sha256", export.first.sha256)
        fault = name_fault(export.first.file)
        if fault:
            raise wrong("export.first.file", f"{export.first.file!r} {fault}")


def check_hash(field: str, digest: str) -> None:
    """Raise InputError where a digest is none."""
    if not _SHA256.fullmatch(digest):
        raise wrong(field, f"{digest!r} is not a sha256 in hexadecimal")
