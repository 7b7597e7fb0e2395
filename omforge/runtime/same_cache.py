"""The canonical graph behind the integers that a lowered run wrote into its cache.

Where the cache is int8, a number near the middle of two integers goes either way, and every later
step sees a whole step of difference. So what the lowered run writes is kept, chunk by chunk, and
the canonical graph reads it instead of its own: both see the same integers, rounding included, and
what is left between their logits is what one chunk computes otherwise. What the canonical graph
itself would have written is compared with the integers that it was given.

Letters: B batch, S new tokens, K kv heads, D head size.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from omforge import ir
from omforge.bundle.manifest import KvCache as KvSpec
from omforge.ir.errors import CheckError
from omforge.runtime.bundle import Bundle
from omforge.runtime.cache import KvCache, States
from omforge.runtime.generate import LanguageModel
from omforge.runtime.session import OrtSession

Array = npt.NDArray[Any]
Prompts = tuple[tuple[int, ...], ...]
Chunk = dict[str, Array]
"""New keys and values of one step, [rows, K, S, D], by the graph's inputs that they extend."""


@dataclass(frozen=True)
class Tips:
    """How far the integers are apart that two graphs write into the cache.

    Attributes:
        share: Of the integers, how many differ.
        most: By how many steps at most.
        mean: By how many on average, in the cache tensor where that is most.
        where: That tensor, and its row.
    """

    share: float
    most: int
    mean: float
    where: str


@dataclass
class Written:
    """What `Recorder` wrote into its cache, and what `Follower` found beside it.

    Attributes:
        runs: The runs that nobody followed yet, and their chunks.
        tips: By prompts, what differed.
    """

    runs: deque[tuple[Prompts, list[Chunk]]] = field(
        default_factory=deque[tuple[Prompts, list[Chunk]]]
    )
    tips: dict[Prompts, Tips] = field(default_factory=dict[Prompts, Tips])


class Recorder:
    """The lowered graphs, whose writes to the cache are kept.

    Args:
        bundle: The bundle; its cache is int8.
        batch: B.
        written: Where they are kept.
    """

    def __init__(self, bundle: Bundle, batch: int, written: Written) -> None:
        self._written = written
        self._chunks: list[Chunk] = []
        self._model = LanguageModel(bundle, "lowered", batch=batch, make_cache=self._make_cache)

    def prefill(self, prompts: Sequence[Sequence[int]]) -> Array:
        """As `LanguageModel.prefill`."""
        self._chunks = []
        self._written.runs.append((_key(prompts), self._chunks))
        return self._model.prefill(prompts)

    def extend(self, rows: Sequence[Sequence[int]]) -> Array:
        """As `LanguageModel.extend`."""
        return self._model.extend(rows)

    def repeat_past(self, length: int) -> None:
        """As `LanguageModel.repeat_past`; both models repeat the same integers."""
        self._model.repeat_past(length)

    def give(self, fixed: Mapping[str, Array]) -> None:
        """As `LanguageModel.give`."""
        self._model.give(fixed)

    def decode(self, tokens: Array) -> Array:
        """As `LanguageModel.decode`."""
        return self._model.decode(tokens)

    def close(self) -> None:
        """Free the sessions; what was written stays."""
        self._model.close()

    def _make_cache(self, spec: KvSpec, batch: int, dtype: str | None, states: States) -> KvCache:
        def keep(chunk: Chunk) -> None:
            self._chunks.append({name: array.copy() for name, array in chunk.items()})

        return _TappedCache(spec, batch, dtype, states, tap=keep)


class Follower:
    """The canonical graph, in the chunks of the lowered ones and reading their integers.

    Args:
        bundle: As the recorder had it.
        batch: B.
        written: What the recorder kept of the same prompts and tokens, in the same order; what was
            followed is dropped, and its `Tips` are added.
    """

    def __init__(self, bundle: Bundle, batch: int, written: Written) -> None:
        self._written = written
        self._key: Prompts = ()
        self._given: deque[Chunk] = deque()
        self._counts = _Counts(())
        self._model = LanguageModel(
            bundle,
            "canonical",
            batch=batch,
            open_canonical=lambda: _reading_the_input(bundle),
            make_cache=self._make_cache,
            chunks=LanguageModel(bundle, "lowered", batch=batch).chunk_sizes,
        )

    def prefill(self, prompts: Sequence[Sequence[int]]) -> Array:
        """As `LanguageModel.prefill`.

        Raises:
            CheckError: These are not the prompts that the recorder had next.
        """
        self._key, chunks = self._written.runs.popleft() if self._written.runs else ((), [])
        if self._key != _key(prompts):
            raise CheckError("the canonical graph has other prompts than the lowered ones had")
        self._given = deque(chunks)
        self._counts = _Counts(prompts)
        return self._model.prefill(prompts)

    def extend(self, rows: Sequence[Sequence[int]]) -> Array:
        """As `LanguageModel.extend`."""
        return self._model.extend(rows)

    def repeat_past(self, length: int) -> None:
        """As `LanguageModel.repeat_past`."""
        self._model.repeat_past(length)

    def give(self, fixed: Mapping[str, Array]) -> None:
        """As `LanguageModel.give`."""
        self._model.give(fixed)

    def decode(self, tokens: Array) -> Array:
        """As `LanguageModel.decode`, with the tokens that the recorder had."""
        return self._model.decode(tokens)

    def close(self) -> None:
        """Free the sessions."""
        self._model.close()

    def _make_cache(self, spec: KvSpec, batch: int, dtype: str | None, states: States) -> KvCache:
        def replace(chunk: Chunk) -> None:
            given = self._given.popleft() if self._given else {}
            for name, array in chunk.items():
                if name not in given or given[name].shape != array.shape:
                    raise CheckError(
                        f"the canonical graph extends {name} in other chunks than the lowered ones",
                        f"it writes {list(array.shape)}, they wrote "
                        f"{list(given[name].shape) if name in given else 'nothing'}",
                    )
            self._written.tips[self._key] = self._counts.add(chunk, given)
            for name, array in chunk.items():
                array[:] = given[name]

        def given() -> Chunk:
            return self._given[0] if self._given else {}

        ahead = given if spec.in_place else None
        return _TappedCache(spec, batch, dtype, states, tap=replace, ahead=ahead)


def _reading_the_input(bundle: Bundle) -> OrtSession:
    """The canonical graph; one that writes its cache reads it as it was given, and still writes.

    So a step whose integers are in the cache already reads those, and not what it rounds itself.
    """
    if not bundle.manifest.kv.in_place:
        return OrtSession(bundle.canonical)
    model = ir.load(bundle.canonical)
    for node in model.graph:
        past = node.inputs[0] if node.op_type == "TensorScatter" else None
        if past is not None and past.is_graph_input():
            for reader, at in list(node.outputs[0].uses()):  # being an output is no use
                reader.replace_input_with(at, past)
    return OrtSession(model, name=str(bundle.canonical))


class _TappedCache(KvCache):
    """A cache that shows each chunk, as a view of its buffers, when it has been written.

    With `ahead` the chunk that comes next is in its slots already when a step reads them.
    """

    def __init__(
        self,
        spec: KvSpec,
        batch: int,
        dtype: str | None,
        states: States,
        *,
        tap: Callable[[Chunk], None],
        ahead: Callable[[], Chunk] | None = None,
    ) -> None:
        super().__init__(spec, batch, dtype, states)
        self._tap = tap
        self._ahead = ahead

    @property
    def feeds(self) -> dict[str, Array]:
        """As `KvCache.feeds`."""
        found = super().feeds
        chunk_ahead = {} if self._ahead is None else self._ahead()
        for name, chunk in chunk_ahead.items():
            end = self.length + chunk.shape[2]
            if name in found and end <= self.capacity:
                found[name][:, :, self.length : end] = chunk
        return found

    def append(self, outputs: Mapping[str, Array], count: int) -> None:
        """As `KvCache.append`."""
        super().append(outputs, count)
        self._tap(self.newest(count))


class _Counts:
    """Adds up how integers differ, chunk by chunk; padding on the left of a row does not count.

    As many prompts as the batch has rows.
    """

    def __init__(self, prompts: Sequence[Sequence[int]]) -> None:
        longest = max(map(len, prompts), default=0)
        self._first = np.array([longest - len(row) for row in prompts])
        self._past = self._differing = self._all = self._most = 0
        self._sums: dict[str, Array] = {}
        self._numbers: dict[str, Array] = {}

    def add(self, found: Chunk, given: Chunk) -> Tips:
        """Add a chunk; return what all have been so far."""
        mean, where = 0.0, ""
        for name, array in found.items():
            rows, heads, count, size = map(int, array.shape)
            batch = np.arange(rows) % len(self._first)  # the innermost of the rows
            real = self._past + np.arange(count) >= self._first[batch][:, None]
            apart: Array = np.abs(array.astype(np.int16) - given[name]) * real[:, None, :, None]
            self._differing += int(np.count_nonzero(apart))
            self._all += int(np.count_nonzero(real)) * heads * size
            self._most = max(self._most, int(apart.max()))
            sums = self._sums.setdefault(name, np.zeros(rows))
            sums += apart.sum(axis=(1, 2, 3))
            numbers = self._numbers.setdefault(name, np.zeros(rows))
            numbers += real.sum(axis=1) * heads * size
            worst = max((sums[row] / max(1, numbers[row]), row) for row in range(rows))
            if worst[0] > mean:
                mean, where = float(worst[0]), f"{name}, row {worst[1]}"
        self._past += next(iter(found.values())).shape[2]
        return Tips(self._differing / max(1, self._all), self._most, mean, where)


def _key(prompts: Sequence[Sequence[int]]) -> Prompts:
    return tuple(tuple(row) for row in prompts)
