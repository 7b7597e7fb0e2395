"""Run the cases of a bundle through one model: prompts, what goes on at later places, and steps."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from typing import Any, Protocol

import numpy.typing as npt

from omforge.runtime.cases import Case
from omforge.runtime.export import ExportModel
from omforge.runtime.sampling import greedy

Array = npt.NDArray[Any]


class Decoder(Protocol):
    """What can be compared: `LanguageModel` at any level, and `ExportModel`."""

    def prefill(self, prompts: Sequence[Sequence[int]]) -> Array:
        """Return logits [B, V] behind the prompts."""
        ...

    def extend(self, rows: Sequence[Sequence[int]]) -> Array:
        """Return logits [B, V] behind more tokens a row."""
        ...

    def repeat_past(self, length: int) -> None:
        """Repeat the cache until it holds so many tokens."""
        ...

    def decode(self, tokens: Array) -> Array:
        """Return logits [B, V] behind one more token a row."""
        ...

    def close(self) -> None:
        """Free what it holds."""
        ...


def run_cases(
    name: str,
    cases: Sequence[Case],
    steps: int,
    reference: Mapping[str, Sequence[Array]] | None,
    opener: Callable[[str, int], Decoder],
    report: Callable[[str, int], None],
    also: Callable[[Decoder], None] | None = None,
) -> dict[str, list[Array]]:
    """Return logits by case: [B, V] behind the prompt, each part and each step.

    Args:
        name: Of the model.
        cases: What to run.
        steps: Decode steps of cases that state none.
        reference: Logits by case, whose tokens the steps are fed; its own where there is none.
        opener: Opens the model for a batch.
        report: Told the case, and how many are done.
        also: Gets the model of the smallest batch when its cases are done.
    """
    pending = also
    found: dict[str, list[Array]] = {}
    for batch in sorted({len(case.prompts) for case in cases}):
        with closing(opener(name, batch)) as model:
            for case in cases:
                if len(case.prompts) != batch:
                    continue
                report(case.name, len(found))
                rows = [_begin(model, case)]
                for part in case.parts:
                    model.repeat_past(part.start)
                    rows.append(model.extend(part.tokens))
                for _ in range(steps if case.steps is None else case.steps):
                    leader = rows if reference is None else reference[case.name]
                    rows.append(model.decode(greedy(leader[len(rows) - 1])))
                found[case.name] = rows
            if pending is not None:
                pending(model)
                pending = None
    report("done", len(cases))
    return found


def _begin(model: Decoder, case: Case) -> Array:
    if case.parts and isinstance(model, ExportModel):
        return model.prefill(case.prompts, apart=True)
    return model.prefill(case.prompts)


def chosen_for_pieces(cases: Sequence[Case], size: int) -> Case:
    """The case whose prompts are run again in pieces: the shortest beyond `size`, or the longest.

    Args:
        cases: All cases.
        size: Tokens of the largest bucket.
    """
    least = min(len(case.prompts) for case in cases)
    whole = [case for case in cases if len(case.prompts) == least and not case.parts]
    beyond = [case for case in whole if max(case.lengths) > size]
    if beyond:
        return min(beyond, key=lambda case: max(case.lengths))
    return max(whole, key=lambda case: max(case.lengths))
