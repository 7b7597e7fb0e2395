"""What a rewrite receives, and how it declines."""

from collections.abc import Mapping
from typing import Any

import numpy.typing as npt

from omforge import ir
from omforge.ir.dims import Dim
from omforge.ir.values import constant, dims
from omforge.rewriting.matcher import Found


class NoMatch(Exception):
    """A match that must not be rewritten; the next alternative is tried.

    Args:
        why: The constraint that failed, with both sides: "x is FLOAT but the norm returns FLOAT16".
        where: The values or nodes that it is about.
    """

    def __init__(self, why: str, *where: ir.Value | ir.Node) -> None:
        super().__init__(why)
        self.why = why
        self.where = where


class Match:
    """A match: variables and named sub-patterns as attributes (`m.x`) or items (`m["x"]`).

    A variable with the name of a member of this class is reached as an item only.

    Attributes:
        outputs: The values that the rewrite replaces, one per root of the pattern.
        nodes: The matched nodes, root first.
        may_escape: The values that the pattern allows to be used outside the match.
    """

    def __init__(self, found: Found) -> None:
        self._values = found.values
        self.outputs = found.outputs
        self.nodes = found.nodes
        self.may_escape = found.may_escape
        self._letters: dict[str, Dim] = {}

    @property
    def output(self) -> ir.Value:
        """The value of the pattern's first root."""
        return self.outputs[0]

    @property
    def root(self) -> ir.Node:
        """The node that makes the first root."""
        node = self.output.producer()
        assert node is not None
        return node

    @property
    def values(self) -> Mapping[str, ir.Value]:
        """All variables and named sub-patterns."""
        return self._values

    def __getattr__(self, name: str) -> ir.Value:
        try:
            return self._values[name]
        except KeyError:
            known = ", ".join(self._values)
            raise AttributeError(f"the match has no {name!r}, only {known}") from None

    def __getitem__(self, name: str) -> ir.Value:
        return self._values[name]

    def __contains__(self, name: str) -> bool:
        return name in self._values

    def get(self, name: str) -> ir.Value | None:
        """Return a variable, None if the alternative that matched does not have it."""
        return self._values.get(name)

    def constant_tensor(self, name: str) -> npt.NDArray[Any]:
        """Return the numbers of a variable.

        Raises:
            NoMatch: It is no constant, or has over 65,536 elements.
        """
        value = self[name]
        array = constant(value)
        if array is None:
            raise NoMatch(f"{name} ({value.name}) is not a constant", value)
        return array

    def const(self, name: str) -> float:
        """Return the one number of a variable; an `int` for integers.

        Raises:
            NoMatch: It is no constant of one element.
        """
        array = self.constant_tensor(name)
        if array.size != 1:
            raise NoMatch(
                f"{name} ({self[name].name}) has shape {list(array.shape)}, not one number",
                self[name],
            )
        number = array.reshape(()).item()
        return number if isinstance(number, int) else float(number)

    def shape(self, name: str, letters: str) -> tuple[Dim, ...]:
        """Return the dimensions of a variable, and hold them against letters.

        `m.shape("q", "B N S D")` gives each letter its dimension the first time, and demands the
        same one later; a number among the letters demands itself, `_` takes anything, and a leading
        `...` any number of dimensions.

        Raises:
            NoMatch: The rank is unknown or another, or a letter stands for two dimensions.
        """
        value = self[name]
        found, wanted = dims(value), letters.split()
        if found is None:
            raise NoMatch(f"the rank of {name} ({value.name}) is not known", value)
        compared = found
        if wanted[:1] == ["..."]:
            wanted = wanted[1:]
            compared = found[len(found) - len(wanted) :] if len(found) >= len(wanted) else found
        if len(compared) != len(wanted):
            raise NoMatch(f"{name} ({value.name}) is {_text(found)}, not [{letters}]", value)
        for letter, dim in zip(wanted, compared, strict=True):
            if letter == "_":
                continue
            expected = int(letter) if letter.isdigit() else self._letters.setdefault(letter, dim)
            if expected != dim:
                is_not = f"is {_text(found)}, not [{letters}] with {letter} = {expected}"
                raise NoMatch(f"{name} ({value.name}) {is_not}", value)
        return found


def _text(shape: tuple[Dim, ...]) -> str:
    return f"[{', '.join(map(str, shape))}]"
