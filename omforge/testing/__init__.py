"""For authors of passes: assertions on ONNX text and numbers, near misses, example inputs."""

from omforge.testing.assertions import (
    assert_leaves_alone,
    assert_rewrites,
    assert_same_numbers,
    parse,
)
from omforge.testing.feeds import example_feeds, several_feeds
from omforge.testing.metamorphic import TRANSFORMATIONS, transform
from omforge.testing.mutations import Mutant, assert_near_misses_are_safe, mutants
from omforge.testing.outline import outline

__all__ = [
    "TRANSFORMATIONS",
    "Mutant",
    "assert_leaves_alone",
    "assert_near_misses_are_safe",
    "assert_rewrites",
    "assert_same_numbers",
    "example_feeds",
    "mutants",
    "outline",
    "parse",
    "several_feeds",
    "transform",
]
