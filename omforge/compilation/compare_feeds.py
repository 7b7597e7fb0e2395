"""Inputs to compare a model with itself ahead of a pass and behind it, at any level."""

from __future__ import annotations

from omforge import ir
from omforge.passes import make_pipeline
from omforge.recognition.feeds import Feeds, step_feeds
from omforge.rewriting.schema import CONTRIB_DOMAIN


def make_feeds(model: ir.Model, longest: int = 2048, seed: int = 0) -> list[Feeds]:
    """Return several sets of inputs for a model; the same arguments give the same numbers.

    As `recognition.feeds.step_feeds`, and for models with operators of com.microsoft as well, whose
    GroupQueryAttention hides the caches: they are found in a canonical copy with the same inputs.

    Args:
        model: Exported, canonical or bound; it is left as it was.
        longest: No step has a token behind this position: rotary tables end at the context.
        seed: Of tokens and of the numbers in the cache.

    Raises:
        InputError: An input has no shape, or a cache has heads of unknown size.
    """
    if all(node.domain != CONTRIB_DOMAIN for node in model.graph):
        return step_feeds(model, longest, seed)
    copy = model.clone()
    make_pipeline("canonicalize").run(copy, ())
    return step_feeds(copy, longest, seed, equal_rows=True)
