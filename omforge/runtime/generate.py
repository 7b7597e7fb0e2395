"""A language model made of a bundle's graphs: prefill, decode, generate.

Letters: B batch, S new tokens, C cache capacity, V vocabulary.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt

from omforge.bundle.chunks import cheapest_chunks, plan_chunks
from omforge.bundle.manifest import Bucket, Manifest
from omforge.bundle.manifest import KvCache as KvSpec
from omforge.ir.errors import InputError
from omforge.runtime.bundle import Bundle, Progress
from omforge.runtime.cache import Cache, KvCache, States, cache_tensors, full, state_specs
from omforge.runtime.embeddings import embedded
from omforge.runtime.fixed import fixed_feeds
from omforge.runtime.masks import additive_mask, key_positions, positions
from omforge.runtime.sampling import Sampler, Sampling
from omforge.runtime.session import OrtSession, Session, check_interface
from omforge.runtime.twin import open_twin

Array = npt.NDArray[Any]
Level = Literal["lowered", "canonical"]
StopReason = Literal["eos", "length", "context"]

KEY_POSITIONS = "key_positions"
"""The input of models that add a bias by the key's position to the scores (ALiBi)."""

OPEN = ("open", 0)
"""The key of a graph that takes any length."""

CANONICAL_CHUNK = 512
"""The canonical graph takes any length; its masks and scores are S * (C+S) numbers a head."""


class Backend(Protocol):
    """Where the lowered graphs run, if not on ONNX Runtime, and where their cache is."""

    def open(self, bucket: Bucket) -> Session:
        """Return a bucket's session."""
        ...

    def cache(self) -> Cache:
        """Return the cache that the sessions read and extend."""
        ...

    def close(self) -> None:
        """Give everything back."""
        ...


class LanguageModel:
    """Runs prompts through a bundle's graphs, at one level, with a KV cache of its own.

    Args:
        bundle: The bundle.
        level: `lowered` runs the static buckets (their CPU twins), `canonical` the dynamic graph.
        batch: B; the manifest's unless given. The canonical graph takes any.
        open_session: Opens a bucket of the lowered level on another backend.
        open_canonical: Opens the canonical graph otherwise than on ONNX Runtime as it is.
        make_cache: Makes the cache of batch B, where no backend has its own.
        fixed: What is given once for a sequence, by name; zeros where absent.
        chunks: In which numbers of tokens the canonical graph takes a prompt of a length.
        backend: Runs the lowered graphs with a cache of its own; closed with the model.

    Raises:
        InputError: The bundle has no buckets of that batch, or is one that encodes, or a fixed
            input is none of its own.
    """

    def __init__(
        self,
        bundle: Bundle,
        level: Level = "lowered",
        *,
        batch: int | None = None,
        open_session: Callable[[Bucket], Session] | None = None,
        open_canonical: Callable[[], Session] | None = None,
        make_cache: Callable[[KvSpec, int, str | None, States], Cache] = KvCache,
        chunks: Callable[[int], Sequence[int]] | None = None,
        fixed: Mapping[str, Array] | None = None,
        backend: Backend | None = None,
    ) -> None:
        bundle.require("generate", "Open it with Encoder, or `omforge run` it with a text")
        self.bundle = bundle
        self._given = dict(fixed or {})
        self._fixed: dict[str, Array] | None = None
        self._backend = backend if level == "lowered" else None
        self.level = level
        self.batch = bundle.manifest.batch if batch is None else batch
        if self._backend is not None:
            open_session = self._backend.open
        self._open_session = open_session or self._open_twin
        self._open_canonical = open_canonical or (lambda: OrtSession(bundle.canonical))
        self._make_cache = make_cache
        self._chunks = chunks or self._canonical_chunks
        self._sessions: dict[str, Session] = {}
        self._buckets = _buckets(bundle, self.batch) if level == "lowered" else {}
        self._cache: Cache | None = None
        self._first = np.zeros(self.batch, np.int64)
        self._rows = self.batch
        self.give(self._given)

    @property
    def manifest(self) -> Manifest:
        """The bundle's manifest."""
        return self.bundle.manifest

    @property
    def context(self) -> int:
        """How many tokens a sequence can have: the capacity, or the model's positions if fewer."""
        limit = self.manifest.model.max_positions
        capacity = self.manifest.kv.capacity
        return capacity if limit is None else min(capacity, limit)

    @property
    def room(self) -> int:
        """How many slots the cache has, C."""
        return self.manifest.kv.capacity

    @property
    def length(self) -> int:
        """How many tokens of the longest row are in the cache."""
        return 0 if self._cache is None else self._cache.length

    def give(self, fixed: Mapping[str, Array]) -> None:
        """Take other fixed inputs, for the sequences that start from here on.

        Args:
            fixed: By name; zeros where absent.

        Raises:
            InputError: One is no fixed input of the bundle, or does not fit.
        """
        fixed_feeds(self.manifest.fixed, self.batch, fixed)
        self._given, self._fixed = dict(fixed), None

    def chunk_sizes(self, length: int) -> list[int]:
        """Return how many of `length` tokens each step of a prefill takes."""
        return [count for _, count in self._plan(length)]

    def prefill(
        self, prompts: Sequence[Sequence[int] | Array], *, progress: Progress | None = None
    ) -> Array:
        """Start new sequences; return the logits behind each prompt, float32 [rows, V].

        Shorter prompts are padded on the left; the padding is masked, and positions count from each
        row's first real token. Fewer prompts than the batch are allowed: the rest of the rows idle.
        A model that is fed by embeddings takes prompts of these, float [tokens, H], too.

        Raises:
            InputError: No prompts or too many, an empty one, one longer than the context, a token
                outside the vocabulary, or different lengths for a model with recurrent states.
        """
        prompts = [self._fed(prompt) for prompt in prompts]
        self._check_prompts(prompts)
        self.reset()
        rows = [*prompts, *[prompts[-1]] * (self.batch - len(prompts))]
        self._rows = len(prompts)
        longest = max(map(len, rows))
        self._first = np.array([longest - len(row) for row in rows], np.int64)
        tokens = np.stack([np.concatenate([self._padding(longest - len(r)), r]) for r in rows])
        return self._chunked(tokens, progress)

    def extend(self, rows: Sequence[Sequence[int] | Array]) -> Array:
        """Append as many tokens to each row, in chunks; return the logits behind the last.

        Raises:
            InputError: No prompt before, another number of rows than it had, or tokens outside the
                vocabulary or of different numbers.
            CheckError: The context has no room for them.
        """
        if self.length == 0:
            raise InputError("tokens without a prompt", next_step="Call prefill first")
        fed = [self._fed(row) for row in rows]
        counts = {len(row) for row in rows}
        if len(rows) != self._rows or len(counts) != 1 or counts == {0}:
            raise InputError(
                f"{len(rows)} rows of {', '.join(map(str, sorted(counts))) or 'no'} tokens",
                f"each of the {self._rows} rows goes on by as many",
            )
        for row in fed:
            self._check_tokens(row)
        (count,) = counts
        if self.length + count > self.context:
            raise full(self.length, count, self.context)
        return self._chunked(np.stack([*fed, *[fed[-1]] * (self.batch - self._rows)]), None)

    def repeat_past(self, length: int) -> None:
        """Repeat the cache until it holds `length` tokens: a text of that length, for comparisons.

        Raises:
            InputError: There is no prompt, or the cache is not the host's.
            CheckError: The context is full.
        """
        if not isinstance(self._cache, KvCache):
            raise InputError("there is no cache to repeat", next_step="Call prefill first")
        self._cache.repeat(length)

    def decode(self, tokens: Sequence[int] | Array) -> Array:
        """Append one token to each row; return the logits behind it, float32 [rows, V].

        Raises:
            InputError: Not one token for each row of the last `prefill`, or outside the vocabulary.
            CheckError: The context is full.
        """
        column = self._fed(tokens)
        if self.length == 0:
            raise InputError("decode without a prompt", next_step="Call prefill first")
        if len(column) != self._rows or column.ndim != self._padding(0).ndim:
            raise InputError(
                f"decode got tokens of shape {list(column.shape)}",
                f"it takes one for each of the {self._rows} rows",
            )
        self._check_tokens(column)
        if self.length >= self.context:
            raise full(self.length, 1, self.context)
        idle = np.repeat(column[-1:], self.batch - self._rows, axis=0)
        return self._step(np.concatenate([column, idle])[:, None], self._plan(1)[0][0])

    def generate(
        self,
        prompt: Sequence[int] | Array,
        *,
        max_new_tokens: int = 128,
        sampling: Sampling | None = None,
        progress: Progress | None = None,
    ) -> Generation:
        """Start generating from one prompt; iterate over the result to get its tokens.

        Raises:
            InputError: As `prefill`; or max_new_tokens is below 1.
        """
        return Generation(self, prompt, max_new_tokens, sampling or Sampling(), progress)

    def generate_batch(
        self,
        prompts: Sequence[Sequence[int] | Array],
        *,
        max_new_tokens: int = 128,
        sampling: Sampling | None = None,
        progress: Progress | None = None,
    ) -> list[tuple[list[int], StopReason]]:
        """Generate from several prompts at once; each one's new tokens, and why it stopped.

        Raises:
            InputError: As `prefill`; or max_new_tokens is below 1.
        """
        _check_limit(max_new_tokens)
        sampler = Sampler(sampling or Sampling())
        found: list[list[int]] = [[] for _ in prompts]
        reasons: list[StopReason | None] = [None] * len(prompts)
        logits = self.prefill(prompts, progress=progress)
        for step in range(max_new_tokens):
            tokens = sampler(logits)
            for row, token in enumerate(tokens.tolist()):
                if reasons[row] is None and token in self.manifest.model.eos_token_ids:
                    reasons[row] = "eos"
                if reasons[row] is None:
                    found[row].append(token)
            if progress is not None:
                progress("generate", step + 1, max_new_tokens)
            if None not in reasons or step + 1 == max_new_tokens:
                break
            if self.length >= self.context:
                reasons = [reason or "context" for reason in reasons]
                break
            logits = self.decode(tokens)
        return [(row, reason or "length") for row, reason in zip(found, reasons, strict=True)]

    def reset(self) -> None:
        """Forget the sequences."""
        if self._cache is not None:
            self._cache.reset()

    def close(self) -> None:
        """Free the sessions and the cache."""
        for session in self._sessions.values():
            session.close()
        self._sessions = {}
        self._cache = None
        if self._backend is not None:
            self._backend.close()

    def __enter__(self) -> LanguageModel:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def _pad(self) -> int:
        # Any token does, since padding is masked; but some models name one that does not exist.
        pad = self.manifest.model.pad_token_id or 0
        return pad if 0 <= pad < self.manifest.model.vocab_size else 0

    def _plan(self, length: int) -> list[tuple[int, int]]:
        if self.level == "canonical" or OPEN in self._buckets:
            return [(count, count) for count in self._chunks(length)]
        if self.manifest.states:
            return self._exact(length)
        prefill = [seq for kind, seq in self._buckets if kind == "prefill"]
        known = self.manifest.costs
        costs = {seq: known[str(seq)] for seq in prefill if str(seq) in known}
        sizes = prefill or [seq for _, seq in self._buckets]
        planned = len(costs) == len(prefill) > 0
        chunks = cheapest_chunks(length, costs) if planned else plan_chunks(length, sizes)
        if chunks[-1][1] == 1 and ("decode", 1) in self._buckets:
            chunks[-1] = (1, 1)
        if self.manifest.kv.in_place:
            chunks = fit_chunks(chunks, {seq for _, seq in self._buckets}, self.length, self.room)
        return chunks

    def _canonical_chunks(self, length: int) -> list[int]:
        most = min(CANONICAL_CHUNK, self.manifest.export.longest_call or CANONICAL_CHUNK)
        whole, rest = divmod(length, most)
        return [most] * whole + [rest] * bool(rest)

    def _chunked(self, tokens: Array, progress: Progress | None) -> Array:
        """Run tokens [B, n] in chunks; the logits behind the last."""
        total, done = tokens.shape[1], 0
        logits = np.empty((0, 0), np.float32)
        for seq, count in self._plan(total):
            logits = self._step(tokens[:, done : done + count], seq)
            done += count
            if progress is not None:
                progress("prefill", done, total)
        return logits

    def _exact(self, length: int) -> list[tuple[int, int]]:
        """Cut into chunks without padding, which would go into the states."""
        plan: list[tuple[int, int]] = []
        for seq in sorted((seq for _, seq in self._buckets), reverse=True):
            whole, length = divmod(length, seq)
            plan += [(seq, seq)] * whole
        if length:
            raise InputError(
                f"the last {length} tokens fit no bucket of the bundle",
                "a model with recurrent states is never padded",
                "Build the bundle with a decode bucket",
            )
        return plan

    def _step(self, tokens: Array, seq: int) -> Array:
        """Run `tokens` [B, count] through the graph of `seq` >= count tokens; extend the cache."""
        session = self._session(seq)
        cache = self._cache
        if cache is None:
            cache = self._cache = self._open_cache(session)
        feeds = self._feeds(session, cache, tokens, seq)
        outputs = session.run(feeds)
        cache.append(outputs, tokens.shape[1])
        return outputs["logits"][: self._rows].astype(np.float32)

    def _open_cache(self, session: Session) -> Cache:
        if self._backend is not None:
            return self._backend.cache()
        dtypes = {spec.name: spec.dtype for spec in session.inputs}
        name = cache_tensors(self.manifest.kv, self.batch)[0].past
        states = [
            dataclasses.replace(state, dtype=dtypes.get(state.input, state.dtype))
            for state in self.manifest.states
        ]
        kv, batch = self.manifest.kv, self.batch
        return self._make_cache(kv, batch, dtypes.get(name), state_specs(states, batch))

    def _feeds(self, session: Session, cache: Cache, tokens: Array, seq: int) -> dict[str, Array]:
        count = tokens.shape[1]
        dtypes = {spec.name: spec.dtype for spec in session.inputs}
        padding = np.stack([self._padding(seq - count)] * self.batch)
        feeds: dict[str, Array] = {
            "input_ids" if self.manifest.embeddings is None else "inputs_embeds": np.concatenate(
                [tokens, padding], axis=1
            ),
            "position_ids": positions(self._first, past=cache.length, seq=seq, count=count),
            # Row by row, the flat number of the last real token.
            "logits_index": np.arange(self.batch) * seq + count - 1,
        }
        for spec in self.manifest.token_inputs:
            feeds[spec.name] = np.zeros((self.batch, seq), np.int64)
        feeds["write_indices"] = np.full(self.batch, cache.length)
        feeds = {
            name: array.astype(dtypes[name]) for name, array in feeds.items() if name in dtypes
        }
        in_place = self.manifest.kv.in_place
        for mask in self.manifest.masks:
            feeds[mask.name] = additive_mask(
                mask.window,
                self._first,
                past=cache.length,
                seq=seq,
                count=count,
                capacity=cache.capacity,
                dtype=dtypes.get(mask.name, "float32"),
                mask_value=self.manifest.mask_value,
                in_place=in_place,
            )
        if KEY_POSITIONS in dtypes:
            feeds[KEY_POSITIONS] = key_positions(
                past=cache.length,
                seq=seq,
                count=count,
                capacity=cache.capacity,
                dtype=dtypes[KEY_POSITIONS],
                in_place=in_place,
            )
        if self.manifest.fixed:
            if self._fixed is None:  # all graphs of a level have the same dtypes
                self._fixed = fixed_feeds(self.manifest.fixed, self.batch, self._given, dtypes)
            feeds |= self._fixed
        return feeds | cache.feeds

    def _session(self, seq: int) -> Session:
        if self.level == "canonical":
            if "canonical" not in self._sessions:
                self._sessions["canonical"] = self._open_canonical()
            return self._sessions["canonical"]
        bucket = self._buckets.get(OPEN) or self._buckets.get(("decode", seq))
        bucket = bucket or self._buckets["prefill", seq]
        if bucket.name not in self._sessions:
            session = self._open_session(bucket)
            check_interface(bucket.name, "inputs", session.inputs, bucket.inputs)
            check_interface(bucket.name, "outputs", session.outputs, bucket.outputs)
            self._sessions[bucket.name] = session
        return self._sessions[bucket.name]

    def _open_twin(self, bucket: Bucket) -> Session:
        return open_twin(self.bundle, bucket)

    def _fed(self, tokens: Sequence[int] | Array) -> Array:
        """Tokens as they are fed: ids [n], or embeddings [n, H]."""
        wanted = self.manifest.embeddings
        if wanted is None:
            return np.asarray(tokens)
        return embedded(tokens, self.bundle.embeddings, wanted.hidden_size)

    def _padding(self, count: int) -> Array:
        """What stands for `count` tokens that are none; it is masked."""
        wanted = self.manifest.embeddings
        if wanted is None:
            return np.full(count, self._pad, np.int64)
        return np.zeros((count, wanted.hidden_size), np.float32)

    def _check_prompts(self, prompts: Sequence[Array]) -> None:
        if not 0 < len(prompts) <= self.batch:
            raise InputError(
                f"{len(prompts)} prompts",
                f"the model was opened for 1 to {self.batch}",
                "Split them, or build the bundle with a larger batch",
            )
        for index, prompt in enumerate(prompts):
            which = f"prompt {index}" if len(prompts) > 1 else "the prompt"
            if not len(prompt):
                raise InputError(
                    f"{which} is empty",
                    "there is no token to continue from",
                    "Start it with the model's BOS token",
                )
            if len(prompt) > self.context:
                raise InputError(
                    f"{which} has {len(prompt)} tokens",
                    f"the bundle's context is {self.context}",
                    f"Shorten it by {len(prompt) - self.context}, or build the bundle with a "
                    "larger context",
                )
            self._check_tokens(prompt)
        lengths = sorted(set(map(len, prompts)))
        if self.manifest.states and len(lengths) > 1:
            raise InputError(
                f"the prompts have {', '.join(map(str, lengths))} tokens",
                "the model carries recurrent states, and padding would go into those of shorter "
                "prompts",
                "Run prompts of one length together, or one at a time",
            )

    def _check_tokens(self, tokens: Array) -> None:
        if self.manifest.embeddings is not None:
            return  # looked up, or none
        vocabulary = self.manifest.model.vocab_size
        for token in tokens.tolist():
            if not 0 <= token < vocabulary:
                raise InputError(
                    f"token {token} is outside the vocabulary",
                    f"it has ids 0 to {vocabulary - 1}",
                    "Use the tokenizer that belongs to the model",
                )


class Generation(Iterator[int]):
    """The new tokens of one prompt, computed as they are asked for.

    The end-of-sequence token is not among them. `reason` is None while there may be more, then
    `eos`, `length` (max_new_tokens reached) or `context` (the cache is full).
    """

    def __init__(
        self,
        model: LanguageModel,
        prompt: Sequence[int] | Array,
        max_new_tokens: int,
        sampling: Sampling,
        progress: Progress | None,
    ) -> None:
        _check_limit(max_new_tokens)
        self.tokens: list[int] = []
        self.reason: StopReason | None = None
        self._model = model
        self._limit = max_new_tokens
        self._sampler = Sampler(sampling)
        self._logits = model.prefill([prompt], progress=progress)

    def __next__(self) -> int:
        model = self._model
        if self.reason is None and len(self.tokens) == self._limit:
            self.reason = "length"
        if self.reason is None and self.tokens:
            if model.length >= model.context:
                self.reason = "context"
            else:
                self._logits = model.decode(self.tokens[-1:])
        if self.reason is None:
            token = int(self._sampler(self._logits)[0])
            if token not in model.manifest.model.eos_token_ids:
                self.tokens.append(token)
                return token
            self.reason = "eos"
        raise StopIteration


def fit_chunks(
    chunks: Sequence[tuple[int, int]], sizes: Collection[int], past: int, capacity: int
) -> list[tuple[int, int]]:
    """Cut chunks smaller where their padding would be written behind the end of the cache.

    Args:
        chunks: (the bucket's tokens, how many of them are real).
        sizes: The buckets that there are.
        past: Slots that are taken.
        capacity: C.

    Raises:
        CheckError: No bucket is small enough.
    """
    fitted: list[tuple[int, int]] = []
    for seq, count in chunks:
        left = count
        while left:
            room = capacity - past
            if seq > room:
                fitting = [size for size in sizes if size <= min(left, room)]
                if not fitting:
                    raise full(past, left, capacity)
                seq = max(fitting)
            done = min(seq, left)
            fitted.append((seq, done))
            past, left = past + done, left - done
    return fitted


def _buckets(bundle: Bundle, batch: int) -> dict[tuple[str, int], Bucket]:
    buckets: dict[tuple[str, int], Bucket] = {}
    for bucket in bundle.manifest.buckets:
        if bucket.batch != batch:
            continue
        # One graph with gears stands for a bucket of each of its lengths.
        for seq in bucket.gears or (bucket.seq,):
            kind = bucket.kind if not bucket.gears else "decode" if seq == 1 else "prefill"
            buckets.setdefault(OPEN if kind == "open" else (kind, seq), bucket)
    if not buckets:
        raise InputError(
            f"the bundle has no buckets of batch {batch}",
            f"it has batch {', '.join(map(str, bundle.batches))}",
            "Use one of these, or build the bundle with that batch",
        )
    return dict(sorted(buckets.items()))


def _check_limit(max_new_tokens: int) -> None:
    if max_new_tokens < 1:
        raise InputError(f"max_new_tokens is {max_new_tokens}", "it must be 1 or more")
