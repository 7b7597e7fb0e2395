"""Why a mixture of experts differs after rounding: the first token that goes to another expert.

A router sends each token to the k experts with the highest scores. Where two scores are nearer than
the rounding of a half-precision graph, another expert may come first, and everything behind it is
another number, however exact each operator is. So it is where experts below a limit are left out.
Such a difference stays a failure; what is found here says whether a tie is behind it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import numpy as np
import numpy.typing as npt

from omforge import ir
from omforge.bundle.manifest import Bucket, TensorSpec
from omforge.ir.bfloat16 import is_float
from omforge.ir.files import load
from omforge.ir.values import constant
from omforge.runtime.bundle import Bundle
from omforge.runtime.generate import LanguageModel, Level
from omforge.runtime.sampling import greedy
from omforge.runtime.session import OrtSession, Session
from omforge.runtime.twin import Change, open_twin

Array = npt.NDArray[Any]


@dataclass
class _Router:
    """One TopK or ArgMax: its scores [B, tokens, E] and choices [B, tokens, k], step by step.

    With a `limit`, a comparison of the scores with that number: choices are truths [B, tokens, E].
    """

    name: str
    limit: float | None = None
    scores: list[Array] = field(default_factory=list[Array])
    choices: list[Array] = field(default_factory=list[Array])


_CHOICES = ("TopK", "ArgMax")
_COMPARISONS = ("Greater", "GreaterOrEqual", "Less", "LessOrEqual")


def _limit(node: ir.Node) -> float | None:
    """The number that a node compares floats with that the graph computed."""
    if node.op_type not in _COMPARISONS:
        return None
    scores, limit = node.inputs
    if scores is None or scores.is_graph_input():  # a mask
        return None
    array = constant(limit, limit=1)
    if array is None or array.size != 1 or not is_float(array.dtype):
        return None
    return float(array.ravel()[0]) if constant(scores) is None else None


class _Watched:
    """A session that keeps what its routers saw and chose."""

    def __init__(self, open_: Callable[[Change], Session], routers: list[_Router]) -> None:
        self._extra: set[str] = set()
        self._pairs: list[tuple[str, str]] = []
        self._routers = routers
        self._session = open_(self._show)

    def _show(self, model: ir.Model) -> ir.Model:
        """Let a graph hand out what its routers see and choose."""
        nodes = [n for n in model.graph if n.op_type in _CHOICES or _limit(n) is not None]
        values = [(node.inputs[0], node.outputs[-1]) for node in nodes]
        pairs = [(a, b) for a, b in values if a is not None]
        self._pairs = [(str(a.name), str(b.name)) for a, b in pairs]
        if not self._routers:
            self._routers += [_Router(str(node.name), _limit(node)) for node in nodes]
        extra = [x for x in dict.fromkeys(chain(*pairs)) if not x.is_graph_output()]
        model.graph.outputs.extend(extra)
        self._extra = {str(value.name) for value in extra}
        return model

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        return self._session.inputs

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        return tuple(spec for spec in self._session.outputs if spec.name not in self._extra)

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        found = self._session.run(feeds)
        batch, seq = feeds[self._session.inputs[0].name].shape[:2]  # ids, or embeddings
        count = int(feeds["logits_index"][0]) + 1  # the rest of the step pads its bucket
        for router, (scores, choices) in zip(self._routers, self._pairs, strict=False):
            for kept, name in ((router.scores, scores), (router.choices, choices)):
                if found[name].size % (batch * seq) == 0:
                    kept.append(found[name].reshape(batch, seq, -1)[:, :count])
        return {name: array for name, array in found.items() if name not in self._extra}

    def close(self) -> None:
        self._session.close()


def first_other_choice(
    bundle: Bundle, prompts: Sequence[Sequence[int]], leader: Sequence[Array]
) -> str | None:
    """Run canonical and lowered once more, and compare what their routers choose.

    Args:
        bundle: The bundle.
        prompts: One for each row of a batch.
        leader: The reference's logits, whose best tokens are fed: as in the comparison.

    Returns:
        Where the first token goes to another expert, and by how little; None if no router is there
        or all choose alike.
    """
    runs = [_run(bundle, level, prompts, leader) for level in ("lowered", "canonical")]
    pairs: list[tuple[_Router, _Router]] = []
    for limited in (False, True):  # a comparison that only one of them has tells nothing
        kinds = [[r for r in run if (r.limit is not None) is limited] for run in runs]
        pairs += zip(*kinds, strict=True) if len(kinds[0]) == len(kinds[1]) else ()
    longest = max(map(len, prompts))
    firsts = [longest - len(prompt) for prompt in prompts]
    found: list[tuple[int, int, int]] = []
    for layer, (mine, other) in enumerate(pairs):
        if not mine.choices or not other.choices:
            continue
        chosen, wanted = (np.concatenate(r.choices, axis=1) for r in (mine, other))
        if other.limit is None:
            chosen, wanted = np.sort(chosen), np.sort(wanted)
        if chosen.shape != wanted.shape:
            continue
        differs = (chosen != wanted).any(axis=-1)
        for row, first in enumerate(firsts):
            differs[row, :first] = False
        found += [(int(token), layer, int(row)) for row, token in np.argwhere(differs)]
    if not found:
        return None
    token, layer, row = min(found)
    tell = _told if pairs[layer][1].limit is None else _told_of_limit
    return tell(*pairs[layer], row, token, bundle.manifest.dtype)


def _told_of_limit(mine: _Router, other: _Router, row: int, token: int, dtype: str) -> str:
    limit = other.limit
    assert limit is not None
    scores = [np.concatenate(r.scores, axis=1)[row, token].astype(float) for r in (mine, other)]
    truths = [np.concatenate(r.choices, axis=1)[row, token] for r in (mine, other)]
    expert = int(np.flatnonzero(truths[0] != truths[1])[0])
    margin = abs(scores[1][expert] - limit)
    error = abs(scores[0][expert] - scores[1][expert])
    verdict = (
        "a limit that rounding crosses"
        if margin <= 2 * error
        else "more than their rounding: look at what is before the router"
    )
    return (
        f"token {token} of row {row} is on the other side of {limit:.2g} at {other.name}: the "
        f"canonical score {expert} is {margin:.2g} from it, and the scores differ by {error:.2g} "
        f"in {dtype}: {verdict}"
    )


def _told(mine: _Router, other: _Router, row: int, token: int, dtype: str) -> str:
    scores = [np.concatenate(r.scores, axis=1)[row, token].astype(float) for r in (mine, other)]
    chosen, wanted = (
        set(np.concatenate(r.choices, axis=1)[row, token].tolist()) for r in (mine, other)
    )
    gained, lost = sorted(chosen - wanted)[0], sorted(wanted - chosen)[0]
    margin = scores[1][lost] - scores[1][gained]
    error = float(np.abs(scores[0] - scores[1]).max())
    verdict = (
        "a tie that rounding decides"
        if margin <= 2 * error
        else "more than their rounding: look at what is before the router"
    )
    return (
        f"token {token} of row {row} goes to another expert at {other.name}: canonical prefers "
        f"expert {lost} to {gained} by {margin:.2g}, and the scores differ by {error:.2g} in "
        f"{dtype}: {verdict}"
    )


def _run(
    bundle: Bundle, level: Level, prompts: Sequence[Sequence[int]], leader: Sequence[Array]
) -> list[_Router]:
    routers: list[_Router] = []

    def lowered(bucket: Bucket) -> Session:
        return _Watched(lambda show: open_twin(bundle, bucket, change=show), routers)

    def canonical() -> Session:
        file = bundle.canonical
        return _Watched(lambda show: OrtSession(show(load(file)), name=str(file)), routers)

    opened_model = LanguageModel(
        bundle,
        level,
        batch=len(prompts),
        open_session=lowered,
        open_canonical=canonical,
    )
    with closing(opened_model) as model:
        model.prefill(prompts)
        for logits in leader[:-1]:
            model.decode(greedy(logits))
    return routers
