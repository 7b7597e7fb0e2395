"""What `omforge passes` lists: passes with their options, pipelines, and what packages add."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from omforge.cli.console import say, show, show_table
from omforge.ir.errors import InputError
from omforge.passes import ALL_PASSES, ALL_PIPELINES, make_pipeline
from omforge.plugins import Plugin, Registry, plugins, unreadable
from omforge.rewriting.base import Pass, options


def pass_rows(passes: Mapping[str, type[Pass]]) -> list[tuple[str, str, str]]:
    """Return (name, options, what it does) of each pass, by name."""
    rows: list[tuple[str, str, str]] = []
    for name, step in sorted(passes.items()):
        given = (
            f"{option.name}={option.words}"
            if option.required or option.default in ((), None)
            else f"{option.name}={_default(option.default)}"
            for option in options(step).values()
        )
        rows.append((name, " ".join(given), step.summary()))
    return rows


def _default(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def show_registry() -> None:
    """Show every pass and every pipeline, what else packages add, and what of it is broken."""
    rows = [(*row, ALL_PASSES.package(row[0])) for row in pass_rows(ALL_PASSES.usable())]
    _show(("pass", "options", "what it does"), rows)
    show()
    texts = [
        (name, text.replace(",", ", "), ALL_PIPELINES.package(name))
        for name, text in _pipelines().items()
    ]
    _show(("pipeline", "passes"), texts)
    for word, registry in _others():
        show()
        usable = registry.usable()
        listed = [(p.name, p.value, p.package) for p in registry.added() if p.name in usable]
        _show((word, "place"), listed)
    for fault in dict.fromkeys(map(str, _faults().values())):
        say(f"warning: {fault}")
    for line in unreadable():
        say(f"warning: {line}")


def _show(columns: tuple[str, ...], rows: list[tuple[str, ...]]) -> None:
    """A table whose last column says which package a row is from, if any is from elsewhere."""
    width = len(columns) + any(row[-1] for row in rows)
    show_table((*columns, "from")[:width], [row[:width] for row in rows])


def registry_json() -> dict[str, Any]:
    """Return what `show_registry` shows."""
    return {
        "passes": [
            {
                "name": name,
                "summary": step.summary(),
                "changes_interface": step.changes_interface,
                "package": ALL_PASSES.package(name),
                "options": [
                    {
                        "name": option.name,
                        "values": option.words,
                        "required": option.required,
                        "default": None if option.required else option.default,
                    }
                    for option in options(step).values()
                ],
            }
            for name, step in sorted(ALL_PASSES.usable().items())
        ],
        "pipelines": _pipelines(),
        "plugins": [
            {
                "group": plugin.group,
                "name": plugin.name,
                "package": plugin.package,
                "place": plugin.value,
                "unusable": "" if plugin not in faults else str(faults[plugin]),
            }
            for faults in (_faults(),)
            for plugin in plugins()
        ],
        "damaged": list(unreadable()),
    }


def _others() -> Iterator[tuple[str, Registry[Any]]]:
    """Targets and sessions, of which packages may add some: imported where they do."""
    groups = {plugin.group for plugin in plugins()}
    if "omforge.targets" in groups:
        from omforge.lowering.target import ALL_TARGETS

        yield "target", ALL_TARGETS
    if "omforge.sessions" in groups:
        from omforge.runtime.backends import SESSIONS

        yield "session", SESSIONS


def _pipelines() -> dict[str, str]:
    faults = _unparsed()
    names = {plugin.name for plugin in faults}
    return {name: text for name, text in ALL_PIPELINES.usable().items() if name not in names}


def _unparsed() -> dict[Plugin, InputError]:
    """The pipelines of packages whose text is none."""
    found: dict[Plugin, InputError] = {}
    usable = ALL_PIPELINES.usable()
    for plugin in ALL_PIPELINES.added():
        if plugin.name in usable and plugin not in ALL_PIPELINES.unusable():
            try:
                make_pipeline(plugin.name)
            except InputError as error:
                found[plugin] = plugin.unusable(str(error))
    return found


def _faults() -> dict[Plugin, InputError]:
    """Why plugins cannot be used; those with one name have one reason, which is told once."""
    registries = (ALL_PASSES, ALL_PIPELINES, *(registry for _, registry in _others()))
    found: dict[Plugin, InputError] = {}
    for registry in registries:
        found |= registry.unusable()
    return found | _unparsed()
