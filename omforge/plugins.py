"""What other packages add: passes, pipelines, targets and sessions, found by their entry points.

A package names them in its pyproject.toml::

    [project.entry-points."omforge.passes"]
    divide-once = "my_package.divide_once:DivideOnce"

| group | what an entry point leads to |
|---|---|
| `omforge.passes` | a subclass of `omforge.passes.Pass` whose `name` is that of the entry point |
| `omforge.pipelines` | a pipeline as text |
| `omforge.targets` | a `Target`, or a function without arguments that returns one |
| `omforge.sessions` | a function `(bundle, batch) -> Backend`, see `omforge.runtime.backends` |

Nothing is looked up before a name is asked for that omforge has not, or all are listed; nothing is
imported but what is asked for. What cannot be used is named with its package, and keeps nothing
else from being used.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Generic, TypeVar

from omforge.ir.errors import InputError

T = TypeVar("T")

GROUPS = ("omforge.passes", "omforge.pipelines", "omforge.targets", "omforge.sessions")

_NAME = re.compile(r"[A-Za-z0-9][\w.-]*")
_PLACE = re.compile(r"[\w.]+:[\w.]+")
_FAILURES = (Exception, SystemExit)  # another's code may raise anything; Ctrl-C is the user's


@dataclass(frozen=True)
class Plugin:
    """An entry point of an installed package.

    Attributes:
        group: Of which kind it is, one of `GROUPS`.
        name: What it adds.
        package: The distribution that it is from.
        value: Where it is, `module:name`.
        folder: Where the distribution is installed.
    """

    group: str
    name: str
    package: str
    value: str
    folder: str

    def load(self) -> object:
        """Import what it leads to.

        Raises:
            InputError: That fails, in whatever way.
        """
        try:
            return _imported(self.value)
        except _FAILURES as error:
            raise self.unusable(f"{type(error).__name__}: {error}") from error

    def unusable(self, why: str) -> InputError:
        """Return the error that says why it cannot be used."""
        return InputError(
            f"{self} cannot be used",
            f"{why} (entry point {self.name} = {self.value})",
            f"Mend {self.package}, or uninstall it",
        )

    def __str__(self) -> str:
        kind = self.group.removeprefix("omforge.").removesuffix("s").replace("passe", "pass")
        return f"the {kind} {self.name!r} of the package {self.package}"


def plugins() -> tuple[Plugin, ...]:
    """Return what installed packages add, by group, name and package."""
    return installed(tuple(sys.path))[0]


def unreadable() -> tuple[str, ...]:
    """Return a line for each package whose entry points cannot be read."""
    return installed(tuple(sys.path))[1]


@functools.lru_cache(maxsize=1)
def installed(path: tuple[str, ...]) -> tuple[tuple[Plugin, ...], tuple[str, ...]]:
    """Return what packages on a path add, and a line for each that is damaged.

    Of a package that is there twice, the first counts, as it does for Python.
    """
    seen: set[str] = set()
    found: list[Plugin] = []
    faults: list[str] = []
    for package in importlib.metadata.distributions(path=list(path)):
        folder, name = str(package.locate_file("")), "a package"
        try:
            text = package.read_text("entry_points.txt") or ""
            if not any(group in text for group in GROUPS):
                continue
            name = package.name
            if name.lower() in seen:
                continue
            seen.add(name.lower())
            found += [
                Plugin(entry.group, entry.name, name, entry.value, folder)
                for entry in package.entry_points
                if entry.group in GROUPS
            ]
        except Exception as error:  # a damaged installation raises what it happens to
            faults.append(f"{name} in {folder} is damaged: {type(error).__name__}: {error}")
    order = {group: number for number, group in enumerate(GROUPS)}
    found.sort(key=lambda plugin: (order[plugin.group], plugin.name, plugin.package))
    return tuple(found), tuple(faults)


class Registry(Mapping[str, T], Generic[T]):
    """Names of omforge's own, and of plugins behind them.

    `registry["my_package.my_module:MyPass"]` is what stands there, installed or not.

    Args:
        own: What omforge has.
        group: The entry points' group.
        check: Returns what an entry point of that name leads to as what it has to be, or raises;
            the name is "" where it was spelled out.
        beside: By group, what of omforge's own has its names in common with these.
        by_place: Whether they may be spelled out.
    """

    def __init__(
        self,
        own: Mapping[str, T],
        group: str,
        check: Callable[[str, object], T],
        beside: Mapping[str, Mapping[str, Any]] = MappingProxyType({}),
        *,
        by_place: bool = True,
    ) -> None:
        self._own = own
        self._group = group
        self._check = check
        self._beside = beside
        self._by_place = by_place
        self._known: dict[Plugin, T | InputError] = {}

    def __getitem__(self, name: str) -> T:
        """Return what has a name.

        Raises:
            KeyError: Nothing has.
            InputError: It is a plugin that cannot be used.
        """
        if name in self._own:
            return self._own[name]
        if ":" in name and self._by_place:
            return self._spelled_out(name)
        found = next((plugin for plugin in self.added() if plugin.name == name), None)
        if found is None or any(name in own for own in self._beside.values()):
            raise KeyError(name)
        return self._usable(found)

    def __iter__(self) -> Iterator[str]:
        """The names of ours, then those of plugins, whether these can be used or not."""
        yield from self._own
        yield from (n for n in dict.fromkeys(p.name for p in self.added()) if n not in self._own)

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def added(self) -> list[Plugin]:
        """Return what packages add, by name."""
        return [plugin for plugin in plugins() if plugin.group == self._group]

    def usable(self) -> dict[str, T]:
        """Import all plugins, and return what can be used, with ours."""
        found = dict(self._own)
        for plugin in self.added():
            made = self._loaded(plugin)
            if not isinstance(made, InputError):
                found[plugin.name] = made
        return found

    def unusable(self) -> dict[Plugin, InputError]:
        """Import all plugins, and return why some cannot be used."""
        tried = {plugin: self._loaded(plugin) for plugin in self.added()}
        return {plugin: made for plugin, made in tried.items() if isinstance(made, InputError)}

    def package(self, name: str) -> str:
        """Return the package that a name is from; "" for omforge's own."""
        if name in self._own:
            return ""
        return next((plugin.package for plugin in self.added() if plugin.name == name), "")

    def _usable(self, plugin: Plugin) -> T:
        made = self._loaded(plugin)
        if isinstance(made, InputError):  # raised anew: notes are added to an error on its way
            raise InputError(made.what, made.why, made.next_step) from made.__cause__
        return made

    def _loaded(self, plugin: Plugin) -> T | InputError:
        """What a plugin is, or why it cannot be used; found out once, as it may take its time."""
        rival = self._rival(plugin)
        if rival is not None:
            return rival
        if plugin not in self._known:
            try:
                self._known[plugin] = self._check(plugin.name, plugin.load())
            except InputError as error:
                is_ours = error.what.startswith(str(plugin))
                self._known[plugin] = error if is_ours else plugin.unusable(str(error))
            except (TypeError, ValueError) as error:  # what `check` raises of its own
                self._known[plugin] = plugin.unusable(str(error))
            except _FAILURES as error:
                self._known[plugin] = plugin.unusable(f"{type(error).__name__}: {error}")
        return self._known[plugin]

    def _rival(self, plugin: Plugin) -> InputError | None:
        """Why a name cannot be: no pipeline or command line can hold it, or another has it."""
        if not _NAME.fullmatch(plugin.name):
            return plugin.unusable("a name is of letters, digits, dots, - and _")
        groups = {self._group: self._own, **self._beside}
        if any(plugin.name in own for own in groups.values()):
            return plugin.unusable(f"the package omforge has the name {plugin.name!r} itself")
        same = [p for p in plugins() if p.name == plugin.name and p.group in groups]
        if len(same) < 2:
            return None
        return InputError(
            f"the name {plugin.name!r} is taken twice",
            " and ".join(f"{other} ({other.value})" for other in same),
            "Uninstall one, or spell out what is meant: package.module:Class",
        )

    def _spelled_out(self, place: str) -> T:
        why = "it is not package.module:Name"
        cause: BaseException | None = None
        if _PLACE.fullmatch(place):
            here = os.getcwd()
            if here not in sys.path and "" not in sys.path:
                sys.path.append(here)  # last: nothing here shall hide what is installed
            try:
                return self._check("", _imported(place))
            except _FAILURES as error:
                cause, why = error, f"{type(error).__name__}: {error}"
        raise InputError(
            f"{place!r} cannot be used",
            why,
            "Write package.module:Name of what Python can import, here or by PYTHONPATH",
        ) from cause


def _imported(place: str) -> object:
    # What a module says while it is imported is no part of a result that goes to stdout.
    with contextlib.redirect_stdout(sys.stderr):
        return importlib.metadata.EntryPoint("", place, "").load()
