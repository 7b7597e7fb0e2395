"""What all parts of the simulated pyACL share: handles, errors, counts, and the calls' form."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Concatenate, ParamSpec, TypeVar

from omforge.ir.errors import CheckError
from omforge.runtime.acl_sim.codes import (
    INVALID_PARAM,
    RT_CONTEXT_NULL,
    RT_FEATURE_NOT_SUPPORT,
    SUCCESS,
    UNINITIALIZE,
    Fault,
)
from omforge.runtime.acl_sim.memory import Memory
from omforge.runtime.acl_sim.streams import Stream

P = ParamSpec("P")
T = TypeVar("T")

FIRST_HANDLE = 0x5A00_0000


@dataclass
class Handle:
    """What an opaque number stands for."""

    kind: str
    value: Any
    alive: bool = True


class Process:
    """The state of a simulated process.

    Attributes:
        last_error: What was wrong with the last call that failed; empty if none did.
        errors: The same of all such calls, as "acl.rt.free: double free of 0x1200...".
        leaks: What was alive at `finalize`, as "2 x stream".
        calls: How often each function was called.
        moved: Bytes that were copied, by direction: H2D, D2H, D2D, H2H.
        copies: How many copies there were, by direction.
    """

    def __init__(self, memory: Memory, *, strict: bool, two_d: bool) -> None:
        self.memory = memory
        self.strict = strict
        self.two_d = two_d
        self.initialised = False
        self.finalised = False
        self.devices: set[int] = set()
        self.context: int | None = None
        self.last_error = ""
        self.errors: list[str] = []
        self.leaks: list[str] = []
        self.calls: Counter[str] = Counter()
        self.moved: Counter[str] = Counter()
        self.copies: Counter[str] = Counter()
        self._handles: dict[int, Handle] = {}

    def create(self, kind: str, value: Any) -> int:
        """Return a new handle."""
        number = FIRST_HANDLE + 64 * len(self._handles)
        self._handles[number] = Handle(kind, value)
        return number

    def get(self, number: int, kind: str, code: int = INVALID_PARAM) -> Any:
        """Return what a handle of that kind stands for.

        Raises:
            Fault: It is none, is of another kind, or was destroyed.
        """
        found = self._handles.get(number)
        if found is None:
            raise Fault(code, f"{number:#x} is no handle of a {kind}")
        if found.kind != kind:
            raise Fault(code, f"{number:#x} is a {found.kind}, no {kind}")
        if not found.alive:
            raise Fault(code, f"the {kind} {number:#x} was destroyed")
        return found.value

    def destroy(self, number: int, kind: str, code: int = INVALID_PARAM) -> Any:
        """End a handle, and return what it stood for."""
        value = self.get(number, kind, code)
        self._handles[number].alive = False
        return value

    def all(self, kind: str) -> list[tuple[int, Any]]:
        """Return the live handles of a kind."""
        return [
            (number, found.value)
            for number, found in self._handles.items()
            if found.alive and found.kind == kind
        ]

    def streams(self) -> list[Stream]:
        """Return the live streams."""
        return [value for _, value in self.all("stream")]

    def need_context(self) -> None:
        """Refuse what needs a device.

        Raises:
            Fault: `init` or `set_device` is missing.
        """
        if not self.initialised:
            raise Fault(UNINITIALIZE, "acl.init was not called")
        if self.context is None:
            raise Fault(RT_CONTEXT_NULL, "there is no context: call acl.rt.set_device first")

    def count_leaks(self) -> list[str]:
        """Return what is alive, by kind."""
        kinds = Counter(found.kind for found in self._handles.values() if found.alive)
        for allocation in self.memory.live():
            kinds[allocation.what] += 1
        kinds["device that was not reset"] += len(self.devices)
        left = [f"{count} x {kind}" for kind, count in sorted(kinds.items()) if count]
        size = sum(allocation.size for allocation in self.memory.live())
        return [*left, f"{size} bytes"] if size else left

    def settle(self) -> None:
        """Raise, if strict, for what went wrong since the beginning.

        Raises:
            CheckError: There were errors or leaks.
        """
        if self.strict and (self.errors or self.leaks):
            faults = [*self.errors, *(f"leaked {leak}" for leak in self.leaks)]
            raise CheckError(f"{len(faults)} faults in the use of pyACL", "; ".join(faults))

    def fail(self, name: str, fault: Fault) -> int:
        """Record a failure; return its code."""
        self.last_error = fault.reason
        # To ask a device what it can do is no mistake.
        if fault.code != RT_FEATURE_NOT_SUPPORT:
            self.errors.append(f"{name}: {fault.reason}")
        return fault.code


class Part:
    """A namespace of the module; `PREFIX` is how its functions are called."""

    PREFIX: ClassVar[str] = "acl"

    def __init__(self, process: Process) -> None:
        self.process = process


S = TypeVar("S", bound=Part)


def returns_code(
    method: Callable[Concatenate[S, P], None],
) -> Callable[Concatenate[S, P], int]:
    """Make a call of the form `ret = f(...)`."""

    @functools.wraps(method)
    def call(part: S, *args: P.args, **kwargs: P.kwargs) -> int:
        name = _count(part, method)
        try:
            method(part, *args, **kwargs)
        except Fault as fault:
            return part.process.fail(name, fault)
        return SUCCESS

    return call


def returns_pair(
    empty: T,
) -> Callable[[Callable[Concatenate[S, P], T]], Callable[Concatenate[S, P], tuple[T, int]]]:
    """Make a call of the form `value, ret = f(...)`; `empty` is the value of a failed one."""

    def decorate(
        method: Callable[Concatenate[S, P], T],
    ) -> Callable[Concatenate[S, P], tuple[T, int]]:
        @functools.wraps(method)
        def call(part: S, *args: P.args, **kwargs: P.kwargs) -> tuple[T, int]:
            name = _count(part, method)
            try:
                return method(part, *args, **kwargs), SUCCESS
            except Fault as fault:
                return empty, part.process.fail(name, fault)

        return call

    return decorate


def returns_value(
    empty: T,
) -> Callable[[Callable[Concatenate[S, P], T]], Callable[Concatenate[S, P], T]]:
    """Make a call of the form `value = f(...)`; `empty` is what a failed one returns."""

    def decorate(method: Callable[Concatenate[S, P], T]) -> Callable[Concatenate[S, P], T]:
        @functools.wraps(method)
        def call(part: S, *args: P.args, **kwargs: P.kwargs) -> T:
            name = _count(part, method)
            try:
                return method(part, *args, **kwargs)
            except Fault as fault:
                part.process.fail(name, fault)
                return empty

        return call

    return decorate


def _count(part: Part, method: Callable[..., Any]) -> str:
    name = f"{part.PREFIX}.{method.__name__.removeprefix('_')}"
    part.process.calls[name] += 1
    return name
