"""A bundle on disk, checked against its manifest before anything is run.

A runtime that is handed a graph or a cache of other sizes than it believes gives garbage without an
error; so every number that two files state is compared here, and a difference is refused.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from omforge.air.weights import check_weights
from omforge.bundle.manifest import Bucket, Manifest, Task, TensorSpec
from omforge.ir.digests import require_digests
from omforge.ir.dims import evaluate, parse_dim, symbols
from omforge.ir.errors import InputError
from omforge.ir.files import load
from omforge.ir.folders import recover
from omforge.runtime.cache import cache_specs, state_specs
from omforge.runtime.embeddings import EmbeddingTable
from omforge.runtime.fixed import fixed_specs
from omforge.runtime.session import describe
from omforge.runtime.text_stream import Tokenizer

Progress = Callable[[str, int, int], None]
"""Called with what is being done, how much of it is done, and how much there is."""

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")
REBUILD = "Build the bundle again"
_SHA256_OF_NOTHING = hashlib.sha256().hexdigest()  # of the weights of a graph with small ones only
_SHOWN = 5


@dataclass(frozen=True)
class Bundle:
    """A folder and its manifest; make one with `Bundle.open`."""

    folder: Path
    manifest: Manifest
    embeddings: EmbeddingTable | None = field(default=None, compare=False, repr=False)
    """The rows of the tokens, for a model that is fed by embeddings; its export has none."""

    def with_embeddings(self, table: EmbeddingTable) -> Bundle:
        """Return the bundle with a row of embeddings for each token: an array, mapped or not.

        Raises:
            InputError: The model takes token ids, or embeddings of another width.
        """
        wanted = self.manifest.embeddings
        if wanted is None:
            raise InputError("the model takes token ids", "its graphs have the embeddings", "")
        if len(table.shape) != 2 or table.shape[1] != wanted.hidden_size:
            raise InputError(
                f"the embeddings are {list(table.shape)}",
                f"the model takes rows of {wanted.hidden_size} numbers",
                "Give the table of the model that was exported",
            )
        return dataclasses.replace(self, embeddings=table)

    @classmethod
    def open(
        cls,
        folder: str | os.PathLike[str],
        *,
        verify_hashes: bool = True,
        remembered: bool = True,
        progress: Progress | None = None,
    ) -> Bundle:
        """Open a bundle.

        Args:
            folder: The bundle's folder.
            verify_hashes: Compare every file's sha256 with the manifest's.
            remembered: Whether a large file that did not change since its hash was taken need not
                be read again.
            progress: Told of each file that is hashed, in bytes.

        Raises:
            InputError: No folder or manifest, or a file is missing, empty or truncated, or a bucket
                does not fit the cache, the masks or the model.
            CheckError: A file's hash is not the manifest's.
        """
        path = Path(folder)
        recover(path)
        if not path.is_dir():
            raise InputError(f"{path} is not a folder", "a bundle is one", "Check the path")
        bundle = cls(path, Manifest.load(path))
        bundle._check_files()
        for bucket in bundle.manifest.buckets:
            _check_bucket(bundle.manifest, bucket)
        if verify_hashes:
            files = bundle.manifest.files
            require_digests(path, files, remembered=remembered, progress=progress)
        return bundle

    def require(self, task: Task, next_step: str) -> None:
        """Refuse a bundle that does something else.

        Raises:
            InputError: It does; `next_step` says what to do with it.
        """
        found = self.manifest.task
        if found != task:
            does = {
                "generate": "it continues a text with a KV cache",
                "encode": "it takes a whole text in one run, and has no KV cache",
            }
            raise InputError(f"the bundle {self.folder} does not {task}", does[found], next_step)

    @property
    def batches(self) -> tuple[int, ...]:
        """The batch sizes that the bundle has buckets for, in order."""
        sizes = {bucket.batch for bucket in self.manifest.buckets}
        return tuple(sorted(sizes or {self.manifest.batch}))

    @property
    def canonical(self) -> Path:
        """The canonical graph."""
        return self.folder / self.manifest.canonical

    @property
    def export(self) -> Path:
        """Where the exported model was when the bundle was built; it may be gone."""
        return self.folder / self.manifest.export.path

    def graph(self, bucket: Bucket) -> Path:
        """Return a bucket's lowered graph."""
        return self.folder / bucket.file

    def bucket(self, kind: str, seq: int, batch: int | None = None) -> Bucket:
        """Return the bucket of these sizes; `batch` is the manifest's unless given.

        Raises:
            InputError: There is none.
        """
        wanted = (kind, seq, self.manifest.batch if batch is None else batch)
        for bucket in self.manifest.buckets:
            if (bucket.kind, bucket.seq, bucket.batch) == wanted:
                return bucket
            if seq in bucket.gears and bucket.batch == wanted[2]:
                return bucket
        known = ", ".join(
            f"{b.kind} of {b.seq} tokens at batch {b.batch}" for b in self.manifest.buckets
        )
        raise InputError(
            f"the bundle has no {kind} bucket of {seq} tokens at batch {wanted[2]}",
            f"it has {known or 'none'}",
            "Build the bundle with that bucket",
        )

    def tokenizer(self) -> Tokenizer:
        """Load the tokenizer from the bundle's folder, without the network.

        Raises:
            InputError: The folder has no tokenizer, or transformers cannot read it.
        """
        if not any((self.folder / name).is_file() for name in TOKENIZER_FILES):
            raise InputError(
                f"{self.folder} has no tokenizer",
                f"none of {', '.join(TOKENIZER_FILES)} is there",
                "Copy the model's tokenizer files into the bundle, or give token ids",
            )
        return _load_tokenizer(self.folder)

    def _check_files(self) -> None:
        manifest = self.manifest
        names = {manifest.canonical, manifest.weights, *manifest.files}
        for bucket in manifest.buckets:
            names |= {bucket.file} | ({bucket.om} if bucket.om is not None else set())
        faults: list[str] = []
        for name in sorted(names):
            file = self.folder / name
            if not file.is_file():
                faults.append(f"{name} is missing")
            elif file.stat().st_size == 0 and manifest.files.get(name) != _SHA256_OF_NOTHING:
                faults.append(f"{name} is empty")
        if faults:
            shown = ", ".join(faults[:_SHOWN])
            more = f", and {len(faults) - _SHOWN} more" if len(faults) > _SHOWN else ""
            made_by_atc = all(fault.startswith("om/") for fault in faults)
            step = "`omforge build` makes what atc made again" if made_by_atc else REBUILD
            raise InputError(f"the bundle {self.folder} is incomplete", f"{shown}{more}", step)
        # The manifest has no sizes, but a graph says which bytes of the weight file it needs.
        graphs = [bucket.file for bucket in manifest.buckets] or [manifest.canonical]
        if manifest.front == "air":
            check_weights(self.folder, graphs[0])
        else:
            load(self.folder / graphs[0])


def _check_bucket(manifest: Manifest, bucket: Bucket) -> None:
    """Compare a bucket's interface with what the cache, the masks and the model make of it."""
    kv, batch, seq = manifest.kv, bucket.batch, bucket.seq
    if bucket.capacity != kv.capacity:
        raise InputError(
            f"bucket {bucket.name} does not fit the cache",
            f"its capacity is {bucket.capacity}, the cache's is {kv.capacity}",
            REBUILD,
        )
    past, present = cache_specs(kv, batch, seq, kv.dtype)
    states, renewed = state_specs(manifest.states, batch)
    masks = tuple(
        TensorSpec(mask.name, "", (batch, 1, seq, kv.capacity + (0 if kv.in_place else seq)))
        for mask in manifest.masks
    )
    tokens = TensorSpec("input_ids", "", (batch, seq))
    if manifest.embeddings is not None:
        width = manifest.embeddings.hidden_size
        tokens = TensorSpec("inputs_embeds", manifest.dtype, (batch, seq, width))
    given = tuple(TensorSpec(spec.name, "", (batch, seq)) for spec in manifest.token_inputs)
    given += fixed_specs(manifest.fixed, batch)
    given += (TensorSpec("write_indices", "", (batch,)),) if kv.in_place else ()
    if manifest.task == "encode":
        sizes = {"batch": batch, "seq": seq}
        results = tuple(
            TensorSpec(
                spec.name,
                spec.dtype if spec.dtype.startswith("float") else "",  # lowering narrows integers
                tuple(sizes.get(str(n), n) for n in spec.shape),
            )
            for spec in manifest.outputs
        )
    else:
        results = (TensorSpec("logits", "", (batch, manifest.model.vocab_size)),)
    sides = (
        ("input", bucket.inputs, (tokens, *given, *masks, *past, *states)),
        ("output", bucket.outputs, (*results, *present, *renewed)),
    )
    for kind, specs, expected in sides:
        found = {spec.name: spec for spec in specs}
        for spec in expected:
            other = found.get(spec.name)
            if other is None:
                raise InputError(
                    f"bucket {bucket.name} has no {kind} {spec.name}",
                    f"its {kind}s are {', '.join(found)}",
                    REBUILD,
                )
            # The dtype is stated once only, except for the cache's.
            dtype = spec.dtype or other.dtype
            if (other.dtype, _bound(other.shape, seq)) != (dtype, spec.shape):
                raise InputError(
                    f"bucket {bucket.name}: {kind} {spec.name} does not fit the manifest",
                    f"it is {describe(other.dtype, other.shape)}, the cache and the model "
                    f"make it {describe(dtype, spec.shape)}",
                    REBUILD,
                )


def _bound(shape: tuple[int | str, ...], seq: int) -> tuple[int | str, ...]:
    """Put the largest gear into the shapes of a graph with gears; a foreign symbol stays."""
    bound: list[int | str] = []
    for size in shape:
        dim = parse_dim(size)
        bound.append(evaluate(dim, {"seq": seq}) if symbols(dim) <= {"seq"} else str(size))
    return tuple(bound)


def _load_tokenizer(folder: Path) -> Tokenizer:
    # It would tell of a missing PyTorch, which no tokenizer needs.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    import transformers  # takes seconds to import

    auto: Any = transformers.AutoTokenizer
    fast: Any = transformers.PreTrainedTokenizerFast
    try:
        return cast("Tokenizer", auto.from_pretrained(str(folder), local_files_only=True))
    # Whatever the tokenizer's own code raises; a family that this transformers does not know still
    # has a tokenizer.json that reads by itself.
    except Exception as error:
        if not (folder / "tokenizer.json").is_file():
            raise InputError(
                f"transformers cannot load the tokenizer in {folder}",
                str(error),
                "Copy the model's tokenizer files into the bundle again",
            ) from error
    try:
        return cast("Tokenizer", fast.from_pretrained(str(folder), local_files_only=True))
    # tokenizers raises bare Exception for a damaged tokenizer.json.
    except Exception as error:
        raise InputError(
            f"transformers cannot load {folder / 'tokenizer.json'}",
            str(error),
            "Copy the model's tokenizer files into the bundle again",
        ) from error
