"""The manifest: the one description of a bundle that the compiler writes and the runtime reads.

It is plain JSON with sorted keys, so the same bundle gives the same bytes. The fields of the
dataclasses below *are* the format: a field is added by adding it here, and `Manifest.load` checks
every value against its annotation and names the field that is wrong.

`files` has the sha256 of every file that the manifest names, and the field `sha256` that of the
manifest itself without this field: a change of any of them is noticed. (Nobody is kept from making
both anew: paths and names are checked for what a bundle of somebody else may have in them.)

Letters: B batch, S new tokens, C cache capacity, N query heads, K kv heads, D head size, L layers,
V vocabulary.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import pathlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, cast

from omforge.bundle.manifest_export import CacheFlag as CacheFlag
from omforge.bundle.manifest_export import Counter as Counter
from omforge.bundle.manifest_export import Export, TensorSpec, check_hash, validate_export
from omforge.bundle.manifest_export import ExportCache as ExportCache
from omforge.bundle.manifest_export import FirstStep as FirstStep
from omforge.bundle.manifest_json import (
    as_map,
    decode,
    is_map,
    positive,
    refuse_constant,
    unique,
    wrong,
)
from omforge.ir.dims import parse_dim, symbols
from omforge.ir.errors import InputError
from omforge.ir.fronts import Front
from omforge.ir.json_text import parse_json
from omforge.ir.paths import name_fault, path_fault
from omforge.ir.weights import replacing, write_error

SCHEMA_VERSION = 2
FILE_NAME = "manifest.json"
SEAL = "sha256"

_UNTRUSTED = "Build the bundle again, and do not use one that you do not trust"


Task = Literal["generate", "encode"]
"""What a bundle does: continue a text step by step, or take a whole text in one run."""


@dataclass(frozen=True)
class MaskSpec:
    """One additive mask input [B, 1, S, C+S], of a cache in place [B, 1, S, C].

    `window` is None for a plain causal mask.

    Where it is not `causal`, later tokens are seen too, and a window reaches as far ahead as back.
    """

    name: str
    window: int | None
    causal: bool = True


@dataclass(frozen=True)
class TokenInput:
    """Integers [B, S] beside the tokens, one for each: a segment, a language.

    They are zeros unless the caller gives others; `rows` is how many rows the table has that they
    choose from, None where they choose from none.
    """

    name: str
    dtype: str
    rows: int | None


@dataclass(frozen=True)
class Embeddings:
    """What a model is fed with in place of token ids: the input inputs_embeds [B, S, H].

    `scale` is about the deviation of real ones, as far as the model's head tells.
    """

    hidden_size: int
    scale: float


@dataclass(frozen=True)
class FixedInput:
    """What the caller gives once for a sequence, and every step reads; "batch" stands for B.

    `adapter`: the same for all rows, as the matrices of a LoRA. `memory`: something for each row,
    as the keys and values that an encoder made. Zeros unless the caller gives something.
    """

    name: str
    dtype: str
    shape: tuple[int | str, ...]
    kind: Literal["adapter", "memory"]


@dataclass(frozen=True)
class LayerSizes:
    """Heads K of one layer's cache, and the sizes of a key and of a value."""

    kv_heads: int
    head_size: int
    value_head_size: int


@dataclass(frozen=True)
class KvCache:
    """The cache that the runtime owns, and the graph writes where it is `in_place`.

    `stacked`: one buffer [2*L*B, K, C, D], row (2*l + kv)*B + b. `per-layer`: 2*L buffers
    [B, K, C, D]. L counts the layers that have a cache of their own. Where these differ in K or D,
    `layer_sizes` are those of each, and the numbers beside are the first layer's; else it is empty,
    and is not written.

    A cache that is not in place is written by the runtime, from outputs of the new slots alone. One
    that is has no such outputs; the graph is told by `write_indices` where the slots are.
    """

    layout: Literal["stacked", "per-layer"]
    layers: int
    kv_heads: int
    head_size: int
    value_head_size: int
    capacity: int
    dtype: str
    layer_sizes: tuple[LayerSizes, ...] = ()
    in_place: bool = False

    @property
    def each_layer(self) -> tuple[LayerSizes, ...]:
        """The sizes of every layer, alike or not."""
        alike = LayerSizes(self.kv_heads, self.head_size, self.value_head_size)
        return self.layer_sizes or (alike,) * self.layers


@dataclass(frozen=True)
class StateSpec:
    """A recurrent state: the graph's input, and the output that is the next step's input.

    It is of fixed size, zeros before the first token; its shape has "batch" for B. Padding would go
    into it, so a model with states is never fed any.
    """

    input: str
    output: str
    dtype: str
    shape: tuple[int | str, ...]


@dataclass(frozen=True)
class Bucket:
    """One graph: its sizes, its files, its interface in order, and its atc command, if atc has one.

    A bucket of kind `encode` takes S tokens and has no cache: its capacity is 0.

    A graph with `gears` leaves `seq` open in its shapes ("seq", "C + seq"); the gears are the
    numbers that it may be, in ascending order, and the field `seq` is the largest of them. One of
    kind `open`, for ONNX Runtime, takes any number up to `seq`.
    """

    name: str
    kind: Literal["prefill", "decode", "gears", "encode", "open"]
    batch: int
    seq: int
    capacity: int
    file: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    om: str | None
    command: tuple[str, ...]
    gears: tuple[int, ...] = ()


@dataclass(frozen=True)
class ModelFacts:
    """What config.json says of the model, as far as the runtime needs it."""

    model_type: str
    layers: int
    heads: int
    kv_heads: int
    head_size: int
    hidden_size: int
    vocab_size: int
    eos_token_ids: tuple[int, ...]
    bos_token_id: int | None
    pad_token_id: int | None
    max_positions: int | None
    labels: tuple[str, ...] = ()


@dataclass(frozen=True)
class Quantization:
    """What is stored as integers.

    Attributes:
        weights: How, as `--quantize` spells it; "" for floats.
        matrices: Weights of linear layers that are integers.
        all_matrices: Weights of linear layers.
        bytes_before: Of the former in the export.
        bytes_after: Of their integers, scales and zero points.
        kv: "int8", or "" where the cache holds floats.
        graph_bytes: All constants of one lowered graph.
        cache_bytes: The cache of all rows.
        budget: Bytes that `graph_bytes` may have; 0 for any.
        kinds: Linear layers by how a budget had them stored: `int4:g64`, `int8`, `fp16`.
    """

    weights: str = ""
    matrices: int = 0
    all_matrices: int = 0
    bytes_before: int = 0
    bytes_after: int = 0
    kv: str = ""
    graph_bytes: int = 0
    cache_bytes: int = 0
    budget: int = 0
    kinds: tuple[tuple[str, int], ...] = ()

    @property
    def int8_inputs(self) -> bool:
        """Whether linear layers read int8, too."""
        return self.weights.startswith("w8a8")


@dataclass(frozen=True)
class Manifest:
    """All that a runtime must know of a bundle; paths are relative to the manifest's directory.

    A bundle that encodes has no cache: the sizes of `kv` are 0, `context` is its longest bucket,
    and `outputs` are what a run gives, "batch" and "seq" standing for B and S. One that generates
    gives logits, and names no outputs. `facts` is the sha256 of the facts file that it was compiled
    by; "" for none. `costs` are what chunks of a prompt take, by their tokens: seconds that a plan
    reckoned, by which prompts are cut; none where nobody planned.
    """

    schema_version: int
    omforge: str
    target: str
    dtype: str
    batch: int
    context: int
    model: ModelFacts
    kv: KvCache
    masks: tuple[MaskSpec, ...]
    mask_value: float
    buckets: tuple[Bucket, ...]
    canonical: str
    weights: str
    export: Export
    files: dict[str, str]
    coverage: dict[str, Any]
    quantization: Quantization = Quantization()
    states: tuple[StateSpec, ...] = ()
    task: Task = "generate"
    token_inputs: tuple[TokenInput, ...] = ()
    fixed: tuple[FixedInput, ...] = ()
    outputs: tuple[TensorSpec, ...] = ()
    embeddings: Embeddings | None = None
    front: Front = "onnx"
    facts: str = ""
    costs: dict[str, float] = dataclasses.field(default_factory=dict[str, float])

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Manifest:
        """Read and check a manifest; `path` is the file, or the bundle's directory.

        Raises:
            InputError: The file is missing or not JSON, or a field is missing, unknown, of the
                wrong type, or contradicts another field.
        """
        file = pathlib.Path(path)
        if file.is_dir():
            file = file / FILE_NAME
        try:
            text = file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(
                f"cannot read the manifest {file}", str(error), "Give the directory of a bundle"
            ) from error
        try:
            data: object = parse_json(text, constant=refuse_constant)
        except ValueError as error:
            raise InputError(f"{file} is not JSON", str(error), "Build the bundle again") from error
        try:
            return cls.from_json(data)
        except InputError as error:
            raise InputError(f"{file}: {error.what}", error.why, error.next_step) from error

    @classmethod
    def from_json(cls, data: object) -> Manifest:
        """Decode and check parsed JSON.

        Raises:
            InputError: As `load`; `what` starts with the path of the field, as `buckets[0].seq`.
        """
        version = cast("dict[str, object]", data).get("schema_version") if is_map(data) else None
        if version is not None and version != SCHEMA_VERSION:
            # Said before anything else: another version's fields would all look wrong.
            raise wrong(
                "schema_version",
                f"is {version!r}, this omforge reads version {SCHEMA_VERSION}",
                "Build the bundle again with this omforge",
            )
        entries = dict(as_map(data, "manifest"))
        stated = entries.pop(SEAL, None)
        manifest = cast("Manifest", decode(cls, entries, ""))
        manifest.validate()
        if stated != _seal_of(entries):
            raise wrong(
                SEAL,
                f"is {stated!r}, its text makes it {_seal_of(entries)!r}: it was changed by hand",
                "Copy the bundle again, or build it again",
            )
        return manifest

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the manifest whole or not at all; `path` is the file, or the bundle's directory.

        Raises:
            InputError: The manifest is inconsistent; nothing is written.
            OmforgeError: It cannot be written.
        """
        file = pathlib.Path(path)
        if file.is_dir():
            file = file / FILE_NAME
        text = self.to_json()
        try:
            with replacing(file) as temporary:
                temporary.write_text(text, encoding="utf-8")
        except OSError as error:
            raise write_error(file, error) from error

    def to_json(self) -> str:
        """Return the JSON text: sorted keys, two spaces, a final newline.

        Raises:
            InputError: The manifest would not load again.
        """
        try:
            data = dataclasses.asdict(self)
            # Newer fields are left out where they say what bundles without them mean.
            if not self.kv.layer_sizes:
                del data["kv"]["layer_sizes"]
            if not self.kv.in_place:
                del data["kv"]["in_place"]
            for name in ("facts", "costs", *["front"] * (self.front == "onnx")):
                if name == "front" or not data[name]:
                    del data[name]
            plain = sealed(data)
            text = json.dumps(plain, sort_keys=True, indent=2, ensure_ascii=False, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise wrong("manifest", f"does not fit in JSON: {error}") from error
        Manifest.from_json(json.loads(text))
        return text + "\n"

    def bucket(self, name: str) -> Bucket:
        """Return the bucket of that name.

        Raises:
            InputError: There is none.
        """
        for bucket in self.buckets:
            if bucket.name == name:
                return bucket
        known = ", ".join(bucket.name for bucket in self.buckets) or "none"
        raise InputError(f"the bundle has no bucket {name!r}", f"it has {known}")

    def validate(self) -> None:
        """Check what the types cannot say.

        Raises:
            InputError: The first field that is out of range or contradicts another one.
        """
        if self.schema_version != SCHEMA_VERSION:
            raise wrong("schema_version", f"is {self.schema_version}, not {SCHEMA_VERSION}")
        if not math.isfinite(self.mask_value) or self.mask_value >= 0:
            raise wrong("mask_value", f"is {self.mask_value}, must be finite and below 0")
        for field in ("batch", "context"):
            positive(field, getattr(self, field))
        _validate_model(self.model, self.task)
        if self.task == "encode":
            _validate_no_cache(self)
        else:
            _validate_cache(self.kv, self.model)
        _validate_states(self.states)
        _validate_given(self.token_inputs, self.fixed)
        if self.embeddings is not None:
            positive("embeddings.hidden_size", self.embeddings.hidden_size)
            if not (math.isfinite(self.embeddings.scale) and self.embeddings.scale > 0):
                raise wrong("embeddings.scale", f"is {self.embeddings.scale}, must be above 0")
        unique("masks", [mask.name for mask in self.masks])
        for index, mask in enumerate(self.masks):
            if mask.window is not None:
                positive(f"masks[{index}].window", mask.window)
        unique("buckets", [bucket.name for bucket in self.buckets])
        for index, bucket in enumerate(self.buckets):
            _validate_bucket(f"buckets[{index}]", bucket, self.masks)
            if (bucket.kind == "encode") != (self.task == "encode"):
                raise wrong(f"buckets[{index}].kind", f"is {bucket.kind!r}, task is {self.task!r}")
        for name, digest in self.files.items():
            _inside("files", name)
            check_hash(f"files[{name!r}]", digest)
        if self.facts:
            check_hash("facts", self.facts)
        for size, cost in self.costs.items():
            if not size.isdecimal() or not 0 < cost < math.inf:
                raise wrong(f"costs[{size!r}]", f"is {cost}, of so many tokens: both are above 0")
        self._validate_files()
        if len(self.export.states) != len(self.states):
            raise wrong(
                "export.states", f"are {len(self.export.states)}, the bundle's {len(self.states)}"
            )
        validate_export(self.export)
        for field in ("fixed", "token_inputs", "outputs"):
            ours, theirs = len(getattr(self, field)), len(getattr(self.export, field))
            if ours != theirs:
                raise wrong(f"export.{field}", f"are {theirs}, the bundle's {ours}")
        for field in ("past", "present"):
            pairs: tuple[tuple[str, str], ...] = getattr(self.export, field)
            if len(pairs) not in (0, self.model.layers):
                raise wrong(
                    f"export.{field}",
                    f"has {len(pairs)} layers, model.layers is {self.model.layers}",
                )

    def _validate_files(self) -> None:
        """Every file that a field names is inside the bundle, its own, and has a hash."""
        named = [("canonical", self.canonical), ("weights", self.weights)]
        for index, bucket in enumerate(self.buckets):
            named.append((f"buckets[{index}].file", bucket.file))
            if bucket.om is not None:
                named.append((f"buckets[{index}].om", bucket.om))
        seen: dict[str, str] = {FILE_NAME: "the manifest"}
        for field, name in named:
            _inside(field, name)
            if name in seen:
                raise wrong(field, f"{name!r} is {seen[name]} already")
            if name not in self.files:
                raise wrong("files", f"have no sha256 of {name!r}, which {field} names")
            seen[name] = field


def sealed(data: Mapping[str, object]) -> dict[str, object]:
    """Return a manifest's JSON data with the hash of itself."""
    plain = {name: item for name, item in data.items() if name != SEAL}
    return {**plain, SEAL: _seal_of(plain)}


def _seal_of(data: Mapping[str, object]) -> str:
    text = json.dumps(data, sort_keys=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def _validate_model(model: ModelFacts, task: Task) -> None:
    if task == "encode":  # the rest is told, and nothing depends on it
        positive("model.vocab_size", model.vocab_size)
        return
    for field in ("layers", "heads", "kv_heads", "head_size", "hidden_size", "vocab_size"):
        positive(f"model.{field}", getattr(model, field))
    if model.heads % model.kv_heads:
        raise wrong("model.kv_heads", f"{model.kv_heads} does not divide {model.heads} heads")


def _validate_no_cache(manifest: Manifest) -> None:
    for field in ("layers", "kv_heads", "head_size", "value_head_size", "capacity"):
        found = getattr(manifest.kv, field)
        if found:
            raise wrong(f"kv.{field}", f"is {found}, and what encodes has no cache")
    if manifest.states:
        raise wrong("states", f"are {len(manifest.states)}, and what encodes has none")
    if not manifest.outputs:
        raise wrong("outputs", "are none, and a run must give something")
    unique("outputs", [spec.name for spec in manifest.outputs])
    for index, spec in enumerate(manifest.outputs):
        _validate_shape(f"outputs[{index}].shape", spec.shape, ("batch", "seq"))


def _validate_given(tokens: tuple[TokenInput, ...], fixed: tuple[FixedInput, ...]) -> None:
    unique("fixed", [spec.name for spec in (*tokens, *fixed)])
    for index, spec in enumerate(tokens):
        if spec.rows is not None:
            positive(f"token_inputs[{index}].rows", spec.rows)
    for index, spec in enumerate(fixed):
        _validate_shape(f"fixed[{index}].shape", spec.shape, ("batch",))


def _validate_shape(field: str, shape: tuple[int | str, ...], named: tuple[str, ...]) -> None:
    """Numbers of 1 or more; a name may only be one of `named`."""
    for axis, dim in enumerate(shape):
        if isinstance(dim, int):
            positive(f"{field}[{axis}]", dim)
        elif dim not in named:
            raise wrong(f"{field}[{axis}]", f"is {dim!r}, only {' and '.join(named)} is open")


def _validate_cache(kv: KvCache, model: ModelFacts) -> None:
    for field in ("layers", "kv_heads", "head_size", "value_head_size", "capacity"):
        positive(f"kv.{field}", getattr(kv, field))
    for field in ("layers", "kv_heads", "head_size"):
        ours, theirs = getattr(kv, field), getattr(model, field)
        if ours != theirs:
            raise wrong(f"kv.{field}", f"is {ours}, model.{field} is {theirs}")
    if kv.in_place and kv.layout == "stacked":
        raise wrong("kv.in_place", "is true, a graph writes the caches of single layers only")
    if kv.layout == "stacked" and kv.value_head_size != kv.head_size:
        raise wrong(
            "kv.value_head_size",
            f"is {kv.value_head_size}, the stacked layout needs head_size = {kv.head_size}",
        )
    if kv.layer_sizes:
        _validate_layer_sizes(kv)


def _validate_layer_sizes(kv: KvCache) -> None:
    if kv.layout == "stacked":
        raise wrong("kv.layer_sizes", "are given, the stacked layout needs layers that are alike")
    if len(kv.layer_sizes) != kv.layers:
        raise wrong("kv.layer_sizes", f"are {len(kv.layer_sizes)}, kv.layers is {kv.layers}")
    for index, sizes in enumerate(kv.layer_sizes):
        for field in ("kv_heads", "head_size", "value_head_size"):
            positive(f"kv.layer_sizes[{index}].{field}", getattr(sizes, field))
    for field in ("kv_heads", "head_size", "value_head_size"):
        first, told = getattr(kv.layer_sizes[0], field), getattr(kv, field)
        if first != told:
            raise wrong(f"kv.layer_sizes[0].{field}", f"is {first}, kv.{field} is {told}")
    if len(set(kv.layer_sizes)) == 1:
        raise wrong("kv.layer_sizes", "are all the same, and are given only where layers differ")


def _validate_states(states: tuple[StateSpec, ...]) -> None:
    unique("states", [name for state in states for name in (state.input, state.output)])
    for index, state in enumerate(states):
        _validate_shape(f"states[{index}].shape", state.shape, ("batch",))


def _validate_bucket(where: str, bucket: Bucket, masks: tuple[MaskSpec, ...]) -> None:
    sizes = ("batch", "seq") if bucket.kind == "encode" else ("batch", "seq", "capacity")
    for field in sizes:
        positive(f"{where}.{field}", getattr(bucket, field))
    if bucket.kind == "encode" and bucket.capacity:
        raise wrong(f"{where}.capacity", f"is {bucket.capacity}, and what encodes has no cache")
    fault = name_fault(bucket.name)
    if fault:
        # Folders and files of the bundle are named after it.
        raise wrong(f"{where}.name", f"{bucket.name!r} {fault}", _UNTRUSTED)
    for word in bucket.command:
        if not word.isprintable():
            raise wrong(f"{where}.command", f"{word!r} cannot be printed", _UNTRUSTED)
    for kind, specs in (("inputs", bucket.inputs), ("outputs", bucket.outputs)):
        unique(f"{where}.{kind}", [spec.name for spec in specs])
        for index, spec in enumerate(specs):
            for axis, dim in enumerate(spec.shape):
                if isinstance(dim, int):
                    positive(f"{where}.{kind}[{index}].shape[{axis}]", dim)
                elif not bucket.gears and bucket.kind != "open":
                    # A bucket is static: a symbol here is a bucket that was never bound.
                    raise wrong(f"{where}.{kind}[{index}].shape[{axis}]", f"is {dim!r}, no number")
                elif not symbols(parse_dim(dim)) <= {"seq"}:
                    raise wrong(
                        f"{where}.{kind}[{index}].shape[{axis}]", f"is {dim!r}, gears bind only seq"
                    )
    if bucket.gears and (
        len(set(bucket.gears)) < 2
        or list(bucket.gears) != sorted(set(bucket.gears))
        or bucket.gears[-1] != bucket.seq
    ):
        raise wrong(
            f"{where}.gears",
            f"are {list(bucket.gears)}, must be two or more in ascending order, the last "
            f"one seq = {bucket.seq}",
        )
    if bucket.kind != "encode" and bool(bucket.gears) != (bucket.kind == "gears"):
        raise wrong(f"{where}.kind", f"is {bucket.kind!r} with {len(bucket.gears)} gears")
    inputs = {spec.name for spec in bucket.inputs}
    for index, mask in enumerate(masks):
        if mask.name not in inputs:
            raise wrong(f"{where}.inputs", f"lack {mask.name!r}, which masks[{index}] names")


def _inside(field: str, name: str) -> None:
    """A bundle's file must lie inside the bundle: manifests are handed around."""
    fault = path_fault(name)
    if fault:
        raise wrong(field, f"{name!r} {fault}: it is no file inside the bundle", _UNTRUSTED)
