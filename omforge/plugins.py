"""What other packages add: passes, pipelines, targets and sessions, found by their entry points.

A package names them in its pyproject.toml::

    [project.entry-points."omforge.passes"]
    divide-once = "my_package.divide_once:DivideOnce"

| group | what an entry point leads to |
|---|---|
| `omforge.passes` | a subclass of `omforge.passes.Pass` whose `name` is that of the entry point |
| `omforge.pipelines` | a pipeline as text |
| `omforge.targets` | a `Target`, or a function without arguments that returns one |
| `omforge.sessions` | a function `(bundle, batch) -> Backend`, see `omforge.runtime.generate` |

Nothing is looked up before a name is asked for that omforge has not, or all are listed. What cannot
be used is named with its package, and keeps nothing else from being used.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Generic, TypeVar

from omforge.ir.errors import InputError

T = TypeVar("T")


@dataclass(frozen=True)
class Plugin:
    """An entry point of an installed package.

    Attributes:
        name: What it adds.
        package: The distribution that it is from.
        value: Where it is, `module:name`.
    """

    name: str
    package: str
    value: str

    def load(self) -> object:
        """Import what it leads to.

        Raises:
            InputError: That fails, in whatever way.
        """
        try:
            return _imported(self.value)
        except Exception as error:  # another's code
            raise self.unusable(f"{type(error).__name__}: {error}") from error

    def unusable(self, why: str) -> InputError:
        """Return the error that says why it cannot be used."""
        return InputError(
            f"{self.name} of the package {self.package} cannot be used",
            f"{why} (entry point {self.value})",
            f"Mend {self.package}, or uninstall it",
        )


@functools.cache
def plugins(group: str) -> tuple[Plugin, ...]:
    """Return what installed packages add to a group, by name."""
    found = importlib.metadata.entry_points(group=group)
    listed = {Plugin(e.name, e.dist.name if e.dist is not None else "?", e.value) for e in found}
    return tuple(sorted(listed, key=lambda plugin: (plugin.name, plugin.package)))


class Registry(Mapping[str, T], Generic[T]):
    """Names of omforge's own, and of plugins behind them.

    Args:
        own: What omforge has.
        group: The entry points' group.
        what: One of them, in words.
        check: Returns what an entry point leads to as what it has to be, or raises ValueError.
        by_place: Whether `my_package.my_module:Name` is a name, too: what stands there, installed
            or in the working folder.
    """

    def __init__(
        self,
        own: Mapping[str, T],
        group: str,
        what: str,
        check: Callable[[str, object], T],
        *,
        by_place: bool = False,
    ) -> None:
        self._own = own
        self._group = group
        self._what = what
        self._check = check
        self._by_place = by_place

    def __getitem__(self, name: str) -> T:
        if name in self._own:
            return self._own[name]
        if self._by_place and ":" in name:
            return self._at(name)
        found = [plugin for plugin in plugins(self._group) if plugin.name == name]
        if not found:
            raise KeyError(name)
        if len(found) > 1:
            raise found[0].unusable(f"so is the {self._what} of the package {found[1].package}")
        return self._checked(found[0])

    def __iter__(self) -> Iterator[str]:
        """Names of ours, then of plugins that can be used."""
        yield from self._own
        yield from (name for name in self._added() if self._why_not(name) is None)

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def package(self, name: str) -> str:
        """Return the package that a name is from; "" for omforge's own."""
        if name in self._own:
            return ""
        return next((p.package for p in plugins(self._group) if p.name == name), "")

    def unusable(self) -> list[InputError]:
        """Return an error for each plugin that cannot be used."""
        taken = [p for p in plugins(self._group) if p.name in self._own]
        found = [plugin.unusable(f"omforge has a {self._what} of that name") for plugin in taken]
        return found + [why for name in self._added() if (why := self._why_not(name)) is not None]

    def _added(self) -> list[str]:
        names = dict.fromkeys(plugin.name for plugin in plugins(self._group))
        return [name for name in names if name not in self._own]

    def _why_not(self, name: str) -> InputError | None:
        try:
            self[name]
        except InputError as error:
            return error
        return None

    def _checked(self, plugin: Plugin) -> T:
        made = plugin.load()
        try:
            return self._check(plugin.name, made)
        except ValueError as error:
            raise plugin.unusable(str(error)) from error

    def _at(self, place: str) -> T:
        if os.getcwd() not in sys.path:
            sys.path.append(os.getcwd())  # at the end: it hides nothing that is installed
        try:
            return self._check("", _imported(place))
        except Exception as error:  # another's code, too
            raise InputError(
                f"there is no {self._what} {place}",
                f"{type(error).__name__}: {error}",
                "Write package.module:Name of what `python` can import here",
            ) from error


def _imported(value: str) -> object:
    module, _, name = value.partition(":")
    made: object = importlib.import_module(module)
    for part in name.split("."):
        made = getattr(made, part)
    return made
