"""From logits to the next token: greedy, or drawn from the top of the distribution."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from omforge.ir.errors import CheckError, InputError

Array = npt.NDArray[Any]
Tokens = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen; the default is greedy.

    Args:
        temperature: 0 takes the largest logit; otherwise logits are divided by it.
        top_k: Keep only the k most likely tokens; 0 keeps all.
        top_p: Then keep the smallest set whose probabilities, after top_k, add up to top_p.
        seed: The same seed, prompts and graph give the same tokens.

    Raises:
        InputError: A field is out of range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        rules = (
            ("temperature", 0 <= self.temperature < float("inf"), "must be 0 or more"),
            ("top_k", self.top_k >= 0, "must be 0 (all tokens) or more"),
            ("top_p", 0 < self.top_p <= 1, "must be above 0 and at most 1"),
            ("seed", self.seed >= 0, "must be 0 or more"),
        )
        for name, holds, rule in rules:
            if not holds:
                raise InputError(
                    f"{name} is {getattr(self, name)}",
                    f"it {rule}",
                    "Leave it away for the default",
                )


class Sampler:
    """Draws tokens by one `Sampling`; a row's random numbers do not depend on the batch."""

    def __init__(self, sampling: Sampling) -> None:
        self.sampling = sampling
        self._streams: list[np.random.Generator] = []

    def __call__(self, logits: Array) -> Tokens:
        """Return one token for each row of `logits` [B, V], as int64 [B].

        Raises:
            CheckError: A row holds NaN or +inf, or nothing above -inf.
        """
        check_finite(logits)
        if self.sampling.temperature == 0:
            return greedy(logits)
        while len(self._streams) < len(logits):
            self._streams.append(np.random.default_rng([self.sampling.seed, len(self._streams)]))
        rows = [self._draw(row, self._streams[index]) for index, row in enumerate(logits)]
        return np.array(rows, np.int64)

    def _draw(self, row: Array, stream: np.random.Generator) -> int:
        order, share = distribution(row, self.sampling)
        # Inverse of the cumulative distribution; min() because the last sum may round below 1.
        place = int(np.searchsorted(np.cumsum(share), stream.random(), side="right"))
        return int(order[min(place, len(order) - 1)])


def distribution(row: Array, sampling: Sampling) -> tuple[Tokens, npt.NDArray[np.float64]]:
    """Return the tokens that can be drawn, most likely first, and their probabilities.

    Args:
        row: Logits [V].
        sampling: Its temperature must be above 0.
    """
    # Shifted before it is divided: a tiny temperature would overflow otherwise.
    scaled = (row.astype(np.float64) - float(row.max())) / sampling.temperature
    order = np.argsort(-scaled, kind="stable")
    if sampling.top_k:
        order = order[: sampling.top_k]
    share = np.exp(scaled[order])
    share /= share.sum()
    if sampling.top_p < 1:
        # A token stays if the ones before it do not reach top_p, so the first always stays.
        kept = np.cumsum(share) - share < sampling.top_p
        order, share = order[kept], share[kept] / share[kept].sum()
    return order, share


def greedy(logits: Array) -> Tokens:
    """Return the largest logit's token of each row [B, V]; the lowest id of equals."""
    return np.argmax(logits, axis=-1).astype(np.int64)


def check_finite(logits: Array) -> None:
    """Refuse logits [B, V] that no token can be chosen from.

    Raises:
        CheckError: Names the first such row.
    """
    for index, row in enumerate(logits):
        top = float(row.max())
        if np.isnan(top) or np.isinf(top):
            raise CheckError(
                f"the logits of row {index} hold {top}",
                "a number overflowed in the graph; float16 ends at 65504",
                "Compare the levels to see where, or build the bundle with another dtype",
            )
