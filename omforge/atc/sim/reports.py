"""What a run has to say: coded errors and warnings, and the text that atc makes of them."""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, field

from omforge.lowering.tables import table_rows


class Refused(Exception):
    """The run ends here; what is wrong has been reported."""


@dataclass(frozen=True)
class Template:
    """One record of atc's registry of errors (base/common/error_registry/error_registry.cc)."""

    code: str
    title: str
    message: str
    arguments: tuple[str, ...]


@functools.lru_cache(maxsize=1)
def templates() -> Mapping[str, Template]:
    """Return the registered errors by code."""
    return {
        row["code"]: Template(
            row["code"], row["title"], row["message"], tuple((row["arguments"] or "").split(","))
        )
        for row in table_rows("atc_errors.tsv")
    }


@dataclass(frozen=True)
class Message:
    """One reported error or warning."""

    code: str
    title: str
    text: str

    @property
    def inner(self) -> bool:
        """True for an unregistered text: GE's E19999, a plugin's EZ9999, a lost input's E18888."""
        return self.code.endswith(("9999", "8888"))


@dataclass
class Report:
    """Errors and warnings in the order in which they were found; the same one counts once."""

    errors: list[Message] = field(default_factory=list[Message])
    warnings: list[Message] = field(default_factory=list[Message])

    def error(self, code: str, **arguments: object) -> None:
        """Report a registered error, its arguments in place."""
        template = templates()[code]
        text = template.message
        for name in template.arguments:
            text = text.replace("%s", str(arguments.get(name, "")), 1)
        self._add(self.errors, Message(code, template.title, text))

    def inner(self, text: str, code: str = "E19999") -> None:
        """Report what atc reports without a registered text."""
        self._add(self.errors, Message(code, "", text))

    def trap(self, code: str, text: str) -> None:
        """Report what atc would get wrong in silence: an error when strict, else a warning."""
        where = self.errors if strict() else self.warnings
        self._add(where, Message(code, "Silent_Failure", text))

    def note(self, code: str, text: str) -> None:
        """Report what the simulator leaves undone: a warning."""
        self._add(self.warnings, Message(code, "Simulator", text))

    @staticmethod
    def _add(to: list[Message], message: Message) -> None:
        if message not in to:
            to.append(message)

    @property
    def codes(self) -> tuple[str, ...]:
        """Every code once, errors first."""
        return tuple(dict.fromkeys(m.code for m in (*self.errors, *self.warnings)))

    def error_text(self) -> str:
        """The block below "ATC run failed".

        Only the first registered error shows its code; the others stand under TraceBack as texts
        (hicann/metadef:error_manager/error_manager.cc).
        """
        if not self.errors:
            unknown = "An unknown error occurred. Please check the log."
            return f"E19999: Internal Error!\n        {unknown}\n"
        stamp = _stamp()
        first = next((m for m in self.errors if not m.inner), None)
        if first is None:
            return self._inner_text(stamp)
        lines = [f"[PID: {os.getpid()}] {stamp} {first.title}({first.code}): {first.text}"]
        others = [m for m in self.errors if m is not first]
        if others:
            lines.append("        TraceBack (most recent call last):")
        for message in others:
            # Ours keep their code: nobody could look them up by their text.
            code = f"{message.code}: " if message.code.startswith("SIM") else ""
            lines.append(f"        {code}{message.text}")
        return "\n".join(lines) + "\n"

    def _inner_text(self, stamp: str) -> str:
        code = next((m.code for m in self.errors if not m.code.endswith("8888")), None)
        code = code or self.errors[0].code
        lines = [f"{code}: Inner Error!"]
        for index, message in enumerate(self.errors):
            if index == 0:
                lines.append(
                    f"{code}[PID: {os.getpid()}] {stamp} ({message.code}):  {message.text}"
                )
                lines.append("        TraceBack (most recent call last):")
            else:
                lines.append(f"        {message.text}")
        return "\n".join(lines) + "\n"

    def warning_text(self) -> str:
        """The lines below "ATC run success"."""
        stamp = _stamp()
        return "".join(
            f"[PID: {os.getpid()}] {stamp} {m.title}({m.code}): {m.text}\n" for m in self.warnings
        )


def _stamp() -> str:
    now = time.time()
    millis = int(now * 1e3) % 1000
    micros = int(now * 1e6) % 1000
    return time.strftime("%Y-%m-%d-%H:%M:%S", time.localtime(now)) + f".{millis:03d}.{micros:03d}"


def strict() -> bool:
    """Say whether silent failures are refused (the default)."""
    return os.environ.get("OMFORGE_ATC_SIM_STRICT", "1") != "0"
