"""A model without a cache made of a bundle's graphs: a whole text in, hidden states or scores out.

Letters: B batch, S tokens of a bucket.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from omforge.bundle.manifest import Bucket, Manifest
from omforge.ir.bfloat16 import is_float
from omforge.ir.errors import InputError
from omforge.runtime.bundle import Bundle
from omforge.runtime.fixed import fixed_feeds
from omforge.runtime.generate import Level
from omforge.runtime.masks import additive_mask, full_mask
from omforge.runtime.session import OrtSession, Session, check_interface
from omforge.runtime.twin import open_twin

Array = npt.NDArray[Any]
Encoded = dict[str, Array]
"""The outputs of one text by name, float32; those of each token are [length, ...]."""


class Backend(Protocol):
    """Where the lowered graphs run, if not on ONNX Runtime."""

    def open(self, bucket: Bucket) -> Session:
        """Return a bucket's session."""
        ...

    def close(self) -> None:
        """Give everything back."""
        ...


class Encoder:
    """Runs texts through a bundle's graphs, at one level.

    Args:
        bundle: The bundle; its task is `encode`.
        level: `lowered` runs the static buckets (their CPU twins), `canonical` the dynamic graph.
        batch: B; the manifest's unless given. The canonical graph takes any.
        open_session: Opens a bucket of the lowered level otherwise than on ONNX Runtime.
        fixed: Fixed inputs by name; zeros where absent.
        backend: Runs the lowered graphs; closed with the encoder.

    Raises:
        InputError: The bundle generates, or has no buckets of that batch, or a fixed input is none
            of its own.
    """

    def __init__(
        self,
        bundle: Bundle,
        level: Level = "lowered",
        *,
        batch: int | None = None,
        open_session: Callable[[Bucket], Session] | None = None,
        fixed: Mapping[str, Array] | None = None,
        backend: Backend | None = None,
    ) -> None:
        bundle.require("encode", "Open it with LanguageModel, or `omforge run` it with a prompt")
        self.bundle = bundle
        self.level = level
        self.batch = bundle.manifest.batch if batch is None else batch
        self._backend = backend if level == "lowered" else None
        if self._backend is not None:
            open_session = self._backend.open
        self._open_session = open_session or self._open_twin
        self._given = dict(fixed or {})
        self._fixed: dict[str, Array] | None = None  # all graphs of a level have the same dtypes
        self._sessions: dict[str, Session] = {}
        self._buckets = {
            seq: bucket
            for bucket in bundle.manifest.buckets
            if bucket.batch == self.batch
            for seq in bucket.gears or (bucket.seq,)
        }
        if level == "lowered" and not self._buckets:
            raise InputError(
                f"the bundle has no buckets of batch {self.batch}",
                f"it has batch {', '.join(map(str, bundle.batches))}",
                "Use one of these, or build the bundle with that batch",
            )
        fixed_feeds(bundle.manifest.fixed, self.batch, self._given)  # refused now, not at the run

    @property
    def manifest(self) -> Manifest:
        """The bundle's manifest."""
        return self.bundle.manifest

    def encode(
        self,
        texts: Sequence[Sequence[int]],
        *,
        token_inputs: Mapping[str, Sequence[Sequence[int]]] | None = None,
    ) -> list[Encoded]:
        """Run texts of token ids, as many at a time as the batch has rows; what each one gives.

        A row is padded at its end, and the padding hidden from it.

        Args:
            texts: Token ids.
            token_inputs: Further integers of each token, by name; zeros where absent.

        Raises:
            InputError: No texts, an empty one, one longer than the largest bucket, or a number
                outside its table.
        """
        further = token_inputs or {}
        self._check(texts, further)
        found: list[Encoded] = []
        for start in range(0, len(texts), self.batch):
            rows = range(start, min(start + self.batch, len(texts)))
            found += self._run(
                [texts[row] for row in rows],
                {name: [numbers[row] for row in rows] for name, numbers in further.items()},
            )
        return found

    def close(self) -> None:
        """Free the sessions."""
        for session in self._sessions.values():
            session.close()
        self._sessions = {}
        if self._backend is not None:
            self._backend.close()

    def __enter__(self) -> Encoder:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _run(
        self, texts: Sequence[Sequence[int]], further: Mapping[str, Sequence[Sequence[int]]]
    ) -> list[Encoded]:
        """Run at most B texts; rows that are left repeat the last one."""
        idle = self.batch - len(texts)
        rows = [*texts, *[texts[-1]] * idle]
        lengths = np.array([len(row) for row in rows], np.int64)
        longest = int(lengths.max())
        seq = longest
        if self.level == "lowered":
            seq = min(size for size in self._buckets if size >= longest)
        session = self._session(seq)
        numbers = {name: [*given, *[given[-1]] * idle] for name, given in further.items()}
        outputs = session.run(self._feeds(session, rows, lengths, numbers, seq))
        return [
            {
                spec.name: _own(outputs[spec.name], spec.shape, row, int(lengths[row]))
                for spec in self.manifest.outputs
            }
            for row in range(len(texts))
        ]

    def _feeds(
        self,
        session: Session,
        rows: Sequence[Sequence[int]],
        lengths: Array,
        further: Mapping[str, Sequence[Sequence[int]]],
        seq: int,
    ) -> dict[str, Array]:
        manifest = self.manifest
        dtypes = {spec.name: spec.dtype for spec in session.inputs}
        slots = np.arange(seq)
        feeds: dict[str, Array] = {
            "input_ids": _padded(rows, seq, self._pad),
            # Padding repeats the last position: one beyond the model's table is out of bounds.
            "position_ids": np.minimum(slots, lengths[:, None] - 1),
            "attention_mask": (slots < lengths[:, None]),
            # Row by row, the flat number of the last real token.
            "logits_index": np.arange(self.batch) * seq + lengths - 1,
        }
        for spec in manifest.token_inputs:
            none: list[list[int]] = [[]] * self.batch
            feeds[spec.name] = _padded(further.get(spec.name, none), seq, 0)
        feeds = {
            name: array.astype(dtypes[name]) for name, array in feeds.items() if name in dtypes
        }
        for mask in manifest.masks:
            dtype = dtypes.get(mask.name, "float32")
            if mask.causal:
                feeds[mask.name] = additive_mask(
                    mask.window,
                    np.zeros(self.batch, np.int64),
                    past=0,
                    seq=seq,
                    count=seq,
                    capacity=0,
                    dtype=dtype,
                    mask_value=manifest.mask_value,
                )
            else:
                feeds[mask.name] = full_mask(
                    mask.window, lengths, seq=seq, dtype=dtype, mask_value=manifest.mask_value
                )
        if self._fixed is None:
            self._fixed = fixed_feeds(manifest.fixed, self.batch, self._given, dtypes)
        return feeds | self._fixed

    @property
    def _pad(self) -> int:
        # Padding is hidden; but a model may find the text's end by it, so that it is its own.
        pad = self.manifest.model.pad_token_id or 0
        return pad if 0 <= pad < self.manifest.model.vocab_size else 0

    def _session(self, seq: int) -> Session:
        if self.level == "canonical":
            if "canonical" not in self._sessions:
                self._sessions["canonical"] = OrtSession(self.bundle.canonical)
            return self._sessions["canonical"]
        bucket = self._buckets[seq]
        if bucket.name not in self._sessions:
            session = self._open_session(bucket)
            check_interface(bucket.name, "inputs", session.inputs, bucket.inputs)
            check_interface(bucket.name, "outputs", session.outputs, bucket.outputs)
            self._sessions[bucket.name] = session
        return self._sessions[bucket.name]

    def _open_twin(self, bucket: Bucket) -> Session:
        return open_twin(self.bundle, bucket)

    def _check(
        self, texts: Sequence[Sequence[int]], further: Mapping[str, Sequence[Sequence[int]]]
    ) -> None:
        if not texts:
            raise InputError("there are no texts", next_step="Give one or more")
        context = self.manifest.context
        for index, text in enumerate(texts):
            if not len(text):
                which = f"text {index}" if len(texts) > 1 else "the text"
                raise InputError(
                    f"{which} is empty",
                    "there is no token to encode",
                    "Give it a word, or a token at least",
                )
            if len(text) > context:
                raise InputError(
                    f"text {index} has {len(text)} tokens",
                    f"the bundle's longest bucket takes {context}",
                    f"Shorten it by {len(text) - context}, or build the bundle with --context "
                    f"{len(text)}",
                )
            check_numbers("token", text, self.manifest.model.vocab_size)
        specs = {spec.name: spec for spec in self.manifest.token_inputs}
        for name, rows in further.items():
            if name not in specs:
                raise InputError(
                    f"{name} cannot be given",
                    f"the further inputs of a token are {', '.join(specs) or 'none'}",
                    "Leave it away",
                )
            if [len(row) for row in rows] != [len(text) for text in texts]:
                raise InputError(
                    f"{name} does not fit the texts",
                    f"it has {[len(row) for row in rows]} numbers, the texts "
                    f"{[len(text) for text in texts]} tokens",
                    "Give one for each token",
                )
            for row in rows:
                check_numbers(name, row, specs[name].rows)


def check_numbers(what: str, numbers: Sequence[int], rows: int | None) -> None:
    """Refuse numbers that choose no row of a table.

    Raises:
        InputError: Names the first of them.
    """
    for number in numbers:
        if number < 0 or (rows is not None and number >= rows):
            raise InputError(
                f"{what} {number} is outside its table",
                f"that has rows 0 to {rows - 1}" if rows is not None else "it is below 0",
                "Use the tokenizer that belongs to the model",
            )


def _padded(rows: Sequence[Sequence[int]], seq: int, pad: int) -> Array:
    """[B, S], what is missing at the end filled."""
    return np.array([[*row, *[pad] * (seq - len(row))] for row in rows], np.int64)


def _own(output: Array, shape: Sequence[int | str], row: int, length: int) -> Array:
    """One row of an output, without its padding; floats as float32."""
    whole = slice(None)
    parts = tuple(row if n == "batch" else slice(length) if n == "seq" else whole for n in shape)
    found = output[parts]
    return found.astype(np.float32) if is_float(found.dtype) else found
