"""How good a quantised model still is: how far its distributions are from the exported model's.

A text is cut into pieces of S tokens, and each piece is a prompt of its own, so every token but the
first is predicted from the ones before it in its piece. Perplexities depend on S: two of them can
be compared only if text and S are the same.

Letters: S tokens of a piece, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import os
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from omforge import ir
from omforge.bundle.manifest import Bucket, TensorSpec
from omforge.ir.errors import InputError
from omforge.runtime.bundle import Bundle, Progress
from omforge.runtime.cache import cache_tensors
from omforge.runtime.export import ExportModel
from omforge.runtime.fixed import as_exported
from omforge.runtime.generate import KEY_POSITIONS, LanguageModel, Level
from omforge.runtime.quality_layers import LayerErrors, compare_layers
from omforge.runtime.sampling import Sampler, Sampling, greedy
from omforge.runtime.session import OrtSession, Session
from omforge.runtime.twin import open_twin

Array = npt.NDArray[Any]
EXPORT = "exported"
LOGITS_INDEX = "logits_index"
ANY = "any_rows"
"""How many logits are asked for: not `rows`, which a bundle binds to its batch."""


PIECE = 256
PIECES = 8
NEW_TOKENS = 32
_ROWS = 64
"""Rows of logits that are turned into float64 at a time."""
_LAYER_PIECES = 2
"""Pieces on which the layers are compared: two sets of activations are held at once."""


# --- numbers --------------------------------------------------------------------------------------


def log_softmax(logits: Array) -> npt.NDArray[np.float64]:
    """Return the natural logarithms of the probabilities, of the same shape [.., V]."""
    shifted = logits.astype(np.float64)
    shifted -= shifted.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def kl_divergence(reference: Array, other: Array) -> npt.NDArray[np.float64]:
    """Return sum p * log(p / q) of each row, in nats; p and q are given as logarithms [.., V].

    Rounding can make it a little less than 0 where both are equal; it is cut to 0.
    """
    share = np.exp(reference)
    # A token that the reference excludes counts nothing, whatever the other one makes of it.
    with np.errstate(invalid="ignore"):
        terms = np.where(share > 0, share * (reference - other), 0.0)
    return np.maximum(terms.sum(-1), 0.0)


def perplexity(losses: Array) -> float:
    """Return exp of the mean of -log p(token)."""
    return float(np.exp(np.mean(losses, dtype=np.float64)))


def cut(tokens: Sequence[int], size: int, limit: int) -> list[list[int]]:
    """Cut a text into pieces of `size` tokens, at most `limit`; a rest that is shorter is left out.

    Raises:
        InputError: The text has not even one piece of two tokens.
    """
    size = min(size, len(tokens))
    if size < 2:
        raise InputError(
            f"a text of {len(tokens)} tokens is too short",
            "each token is predicted from those before it, so it takes two",
            "Give a longer text",
        )
    starts = range(0, len(tokens) - size + 1, size)
    return [list(tokens[start : start + size]) for start in starts[:limit]]


# --- report ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LevelQuality:
    """One level on the text.

    Attributes:
        level: `exported`, `canonical` or `lowered`.
        perplexity: On the text.
        kl_mean: Divergence of its distributions from the reference's, in nats a token.
        kl_max: The same, of the worst token.
        top1: Share of the places where both like the same token best.
        diverges_at: For each prompt, the first new token that differs from the reference's greedy
            text; None where all are equal.
    """

    level: str
    perplexity: float
    kl_mean: float
    kl_max: float
    top1: float
    diverges_at: tuple[int | None, ...]


@dataclass(frozen=True)
class QualityReport:
    """What quantisation did, layer by layer and from end to end.

    Attributes:
        text: Where the text is from.
        pieces: How many pieces of it were measured.
        piece_tokens: S.
        new_tokens: Greedy tokens behind each prompt for `diverges_at`.
        reference: The level that the others are compared with.
        levels: In the order exported, canonical, lowered.
        layers: Of the canonical graph.
        notes: What was not measured, and why.
        failures: Which limits are exceeded.
    """

    text: str
    pieces: int
    piece_tokens: int
    new_tokens: int
    reference: str
    levels: tuple[LevelQuality, ...]
    layers: LayerErrors | None
    notes: tuple[str, ...]
    failures: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether no limit is exceeded."""
        return not self.failures

    def level(self, name: str) -> LevelQuality:
        """Return one level's numbers."""
        return next(level for level in self.levels if level.level == name)

    def judged(
        self, max_kl: float | None = None, max_perplexity_increase: float | None = None
    ) -> QualityReport:
        """Return the report with the limits that it exceeds.

        Args:
            max_kl: Of the mean divergence of any level, in nats a token.
            max_perplexity_increase: Share of the reference's perplexity, such as 0.05.
        """
        first = self.level(self.reference).perplexity
        found: list[str] = []
        for level in self.levels:
            if max_kl is not None and not level.kl_mean <= max_kl:
                found.append(f"{level.level}: mean KL {level.kl_mean:.3g} is above {max_kl:g}")
            rise = level.perplexity / first - 1
            if max_perplexity_increase is not None and not rise <= max_perplexity_increase:
                found.append(
                    f"{level.level}: perplexity {level.perplexity:.4g} is {rise:.1%} above "
                    f"{self.reference}, the limit is {max_perplexity_increase:.1%}"
                )
        return dataclasses.replace(self, failures=tuple(found))

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON data."""
        return {"ok": self.ok, **dataclasses.asdict(self)}


# --- measuring ------------------------------------------------------------------------------------


def measure_quality(
    bundle: Bundle,
    tokens: Sequence[int] | None = None,
    *,
    text: str = "",
    source: str | os.PathLike[str] | None = None,
    float_canonical: ir.Model | None = None,
    levels: Sequence[Level] = ("canonical", "lowered"),
    piece_tokens: int = PIECE,
    pieces: int = PIECES,
    new_tokens: int = NEW_TOKENS,
    seed: int = 0,
    progress: Progress | None = None,
) -> QualityReport:
    """Measure a bundle's levels against the exported model, on a text.

    The reference's logits of all pieces are kept in a temporary file, and one level's sessions are
    open at a time.

    Args:
        bundle: The bundle.
        tokens: The text. If None, the exported model writes one, drawn token by token.
        text: What to call it in the report.
        source: The exported model; by default where the manifest says. If it is gone, the canonical
            graph is the reference, and the report says so.
        float_canonical: The canonical graph ahead of quantisation, to compare the layers with.
        levels: What to measure.
        piece_tokens: S; less where the context is shorter.
        pieces: How many at most.
        new_tokens: Greedy tokens behind two prompts; 0 leaves that out.
        seed: Of a text that is drawn.
        progress: Told the level, pieces done and pieces in all.

    Raises:
        InputError: The text is too short, or holds a token outside the vocabulary.
    """
    notes: list[str] = []
    path = bundle.export if source is None else Path(source)
    exported = path.is_file()
    if not exported:
        notes.append(
            f"the exported model {path} is not there: the canonical graph was the reference"
        )
    order: list[str] = [EXPORT] if exported else ["canonical"]
    order += [level for level in ("canonical", "lowered") if level in levels and level not in order]
    limit = bundle.manifest.model.max_positions or bundle.manifest.kv.capacity
    size = min(piece_tokens, limit, bundle.manifest.kv.capacity)

    def opened(level: str) -> _Texts:
        if level == EXPORT:
            return _ExportTexts(bundle, path)
        return _BundleTexts(bundle, cast("Level", level))

    if tokens is None:
        text = f"drawn from the {order[0]} model, seed {seed}"
        with closing(opened(order[0])) as writer:
            tokens = _drawn(writer, bundle, size, min(pieces, 2), seed)
    parts = cut(tokens, size, pieces)
    size = len(parts[0])
    new_tokens = max(0, min(new_tokens, size // 2))
    prompts = [part[: size - new_tokens] for part in parts[: 2 if new_tokens else 0]]
    found: list[LevelQuality] = []
    shape = (len(parts), size, bundle.manifest.model.vocab_size)
    with tempfile.TemporaryFile() as file:
        kept = np.memmap(file, np.float32, "w+", shape=shape)
        leaders: list[list[int]] = []
        for index, name in enumerate(order):

            def told(done: int, name: str = name, index: int = index) -> None:
                if progress is not None:
                    progress(
                        f"quality of {name}", index * len(parts) + done, len(order) * len(parts)
                    )

            with closing(opened(name)) as model:
                scores = _Scores()
                for number, part in enumerate(parts):
                    told(number)
                    logits = model.logits(part)
                    if index == 0:
                        kept[number] = logits
                    scores.add(kept[number], logits, part)
                followed = [
                    model.follow(prompt, new_tokens, leaders[i] if index else None)
                    for i, prompt in enumerate(prompts)
                ]
            if index == 0:
                leaders = followed
            found.append(scores.level(name, followed, leaders))
    layers = None
    if float_canonical is None:
        notes.append("the layers were not compared: there is no canonical graph in floats")
    elif "canonical" in order:
        with closing(_BundleTexts(bundle, "canonical")) as model:
            feeds = [model.feeds(part) for part in parts[:_LAYER_PIECES]]
        layers = compare_layers(float_canonical, ir.load(bundle.canonical), feeds, progress)
    return QualityReport(
        text, len(parts), size, new_tokens, order[0], tuple(found), layers, tuple(notes)
    )


@dataclass
class _Scores:
    """Adds up one level's numbers, some rows at a time."""

    losses: list[Array] = field(default_factory=list[Array])
    divergences: list[Array] = field(default_factory=list[Array])
    agreed: int = 0

    def add(self, reference: Array, logits: Array, tokens: Sequence[int]) -> None:
        """Add the logits [S, V] of a piece; the last row predicts nothing that is known."""
        following = np.array([*tokens[1:], 0])
        for start in range(0, len(tokens), _ROWS):
            rows = slice(start, start + _ROWS)
            theirs, mine = log_softmax(reference[rows]), log_softmax(logits[rows])
            self.divergences.append(kl_divergence(theirs, mine))
            self.agreed += int((greedy(theirs) == greedy(mine)).sum())
            self.losses.append(-mine[np.arange(len(mine)), following[rows]])
        self.losses[-1] = self.losses[-1][:-1]

    def level(
        self, name: str, followed: Sequence[Sequence[int]], leaders: Sequence[Sequence[int]]
    ) -> LevelQuality:
        divergences = np.concatenate(self.divergences)
        return LevelQuality(
            level=name,
            perplexity=perplexity(np.concatenate(self.losses)),
            kl_mean=float(divergences.mean()),
            kl_max=float(divergences.max()),
            top1=self.agreed / len(divergences),
            diverges_at=tuple(
                first_difference(mine, theirs)
                for mine, theirs in zip(followed, leaders, strict=True)
            ),
        )


def first_difference(tokens: Sequence[int], reference: Sequence[int]) -> int | None:
    """Return the first place at which two texts of one length differ, or None."""
    pairs = enumerate(zip(tokens, reference, strict=True))
    return next((index for index, (mine, theirs) in pairs if mine != theirs), None)


class _Texts(ABC):
    """A level that is asked for the logits behind every token of a text."""

    @abstractmethod
    def logits(self, tokens: Sequence[int]) -> Array:
        """Return float32 [S, V]."""

    @abstractmethod
    def prefill(self, tokens: Sequence[int]) -> Array:
        """Return the logits behind a prompt [1, V]."""

    @abstractmethod
    def decode(self, token: int) -> Array:
        """Return the logits behind one more token [1, V]."""

    @abstractmethod
    def close(self) -> None:
        """Free the sessions."""

    def follow(self, prompt: Sequence[int], count: int, leader: Sequence[int] | None) -> list[int]:
        """Return the tokens that are chosen greedily behind a prompt.

        With a leader its tokens are fed, so that what differs differs for the first time only once.
        """
        chosen = [int(greedy(self.prefill(prompt))[0])]
        while len(chosen) < count:
            fed = chosen if leader is None else leader
            chosen.append(int(greedy(self.decode(fed[len(chosen) - 1]))[0]))
        return chosen


class _ExportTexts(_Texts):
    def __init__(self, bundle: Bundle, path: Path) -> None:
        given = as_exported(bundle.manifest, {})
        self._model = ExportModel(path, bundle.manifest.export, bundle.manifest.kv, given)

    def logits(self, tokens: Sequence[int]) -> Array:
        return self._model.prefill([tokens], all_logits=True)[0]

    def prefill(self, tokens: Sequence[int]) -> Array:
        return self._model.prefill([tokens])

    def decode(self, token: int) -> Array:
        return self._model.decode([token])

    def close(self) -> None:
        self._model.close()


class _BundleTexts(_Texts):
    """A bundle's level whose graphs return the logits of every token that they are given."""

    def __init__(self, bundle: Bundle, level: Level) -> None:
        self._runs: list[tuple[Mapping[str, Array], Array]] = []

        def lowered(bucket: Bucket) -> Session:
            session = open_twin(bundle, bucket, change=with_every_row)
            return _EveryRow(session, bucket.inputs, bucket.outputs, self._runs)

        def canonical() -> Session:
            session = OrtSession(bundle.canonical)
            return _EveryRow(session, session.inputs, session.outputs, self._runs)

        self._model = LanguageModel(
            bundle,
            level,
            batch=bundle.batches[0],
            open_session=lowered,
            open_canonical=canonical,
        )

    def logits(self, tokens: Sequence[int]) -> Array:
        self.prefill(tokens)
        return np.concatenate([rows for _, rows in self._runs]).astype(np.float32)

    def prefill(self, tokens: Sequence[int]) -> Array:
        self._runs.clear()
        return self._model.prefill([tokens])

    def decode(self, token: int) -> Array:
        return self._model.decode([token])

    def close(self) -> None:
        self._model.close()

    def feeds(self, tokens: Sequence[int]) -> dict[str, Array]:
        """Return the canonical graph's inputs of a piece's first step, with as little of the cache.

        That is one slot, or those that the step itself writes.
        """
        self.prefill(tokens)
        kv, given = self._model.manifest.kv, dict(self._runs[0][0])
        ids = "input_ids" if self._model.manifest.embeddings is None else "inputs_embeds"
        kept = slice(0, given[ids].shape[1]) if kv.in_place else slice(kv.capacity - 1, None)
        for tensor in cache_tensors(kv, self._model.batch):
            given[tensor.past] = given[tensor.past][:, :, kept]
        for name in (*(mask.name for mask in self._model.manifest.masks), KEY_POSITIONS):
            if name in given:
                given[name] = given[name][..., kept]
        return given


class _EveryRow:
    """A graph that is asked for every row of logits, and still returns those that were wanted.

    Args:
        session: Its `logits_index` takes any number of rows.
        inputs: What it says its inputs are.
        outputs: The same of its outputs.
        runs: Where each run's inputs and logits [tokens of the first sequence, V] are added.
    """

    def __init__(
        self,
        session: Session,
        inputs: tuple[TensorSpec, ...],
        outputs: tuple[TensorSpec, ...],
        runs: list[tuple[Mapping[str, Array], Array]],
    ) -> None:
        self._session = session
        self._runs = runs
        self.inputs = inputs
        self.outputs = outputs

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        wanted = feeds[LOGITS_INDEX]
        # The last real token of the first sequence; behind it is padding.
        count = int(wanted[0]) + 1
        rows = np.concatenate([np.arange(count), wanted[1:]]).astype(wanted.dtype)
        outputs = self._session.run({**feeds, LOGITS_INDEX: rows})
        logits = outputs["logits"]
        self._runs.append((feeds, logits[:count]))
        return {**outputs, "logits": logits[count - 1 :]}

    def close(self) -> None:
        self._session.close()


def with_every_row(model: ir.Model) -> ir.Model:
    """Let a graph take any number of rows in `logits_index`; changes it, and returns it.

    Raises:
        InputError: It has no such input.
    """
    index = next((value for value in model.graph.inputs if value.name == LOGITS_INDEX), None)
    if index is None:
        raise InputError(
            f"the graph has no input {LOGITS_INDEX}",
            "only the logits behind the last token can be asked of it",
            "Build the bundle again",
        )
    index.shape = ir.Shape([ANY])
    behind = {index}
    for node in model.graph:
        if behind.intersection(value for value in node.inputs if value is not None):
            behind.update(node.outputs)
            for output in node.outputs:
                output.shape = None
    for output in model.graph.outputs:
        if output in behind:
            output.shape = ir.Shape([ANY, None])
    return model


def _drawn(writer: _Texts, bundle: Bundle, size: int, pieces: int, seed: int) -> list[int]:
    """Return a text of some pieces that the model writes, each from its first token on."""
    facts = bundle.manifest.model
    sampler = Sampler(Sampling(temperature=1.0, seed=seed))
    first = facts.bos_token_id if facts.bos_token_id is not None else facts.eos_token_ids[0]
    text: list[int] = []
    for _ in range(pieces):
        piece = [first]
        logits = writer.prefill(piece)
        while len(piece) < size:
            piece.append(int(sampler(logits)[0]))
            if len(piece) < size:
                logits = writer.decode(piece[-1])
        text += piece
    return text
