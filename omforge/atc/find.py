"""Finding CANN: the atc program, the environment that it needs, and its version.

Where installers put things: hicann/ge:docs/zh/build.md and hiascend.com, "CANN Software
Installation", File Paths.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from omforge import __version__
from omforge.ir.errors import InputError

HOME_VARIABLES = ("ASCEND_HOME_PATH", "ASCEND_TOOLKIT_HOME")

# Up to CANN 8.3, then since; for root, then for a user.
DEFAULT_HOMES: tuple[str, ...] = (
    "/usr/local/Ascend/ascend-toolkit/latest",
    "/usr/local/Ascend/cann",
    "~/Ascend/ascend-toolkit/latest",
    "~/Ascend/cann",
)

# The toolkit links atc into bin/.
_BELOW_HOME = ("bin/atc", "compiler/bin/atc")
_SCRIPTS = ("set_env.sh", "../set_env.sh", "bin/setenv.bash")

# Looked for below the folders that hold the program; the first that says something counts.
_VERSION_FILES = (
    "*-linux/ascend_toolkit_install.info",
    "ascend_toolkit_install.info",
    "version.cfg",
    "compiler/version.info",
    "version.info",
    "opp/version.info",
)
_VERSION = re.compile(
    r"^\s*(?:version|\w*running_version)\s*=\s*\[?(?P<version>[^\s\]:]+)", re.IGNORECASE | re.M
)
_LEVELS = 5


@dataclass(frozen=True)
class Atc:
    """A program that compiles, as atc does.

    Attributes:
        words: What starts it.
        version: Of its CANN; "" if no file says so.
        environment: What it is started with; None: this process's.
        simulated: True for omforge's own simulation, which makes files for no device.
    """

    words: tuple[str, ...]
    version: str = ""
    environment: Mapping[str, str] | None = None
    simulated: bool = False

    @property
    def identity(self) -> str:
        """What stands for it in a cache's keys: its version, or else the program file itself."""
        if self.version:
            return self.version
        try:
            state = Path(self.words[0]).stat()
        except OSError:
            return ""  # it cannot be started either
        return f"{self.words[0]} {state.st_size} {state.st_mtime_ns}"

    def __str__(self) -> str:
        if self.simulated:
            return "the simulated atc"
        return f"{self.words[0]} ({self.version or 'unknown version'})"


def find_atc(environment: Mapping[str, str] | None = None) -> Path | None:
    """Return the atc program, or None: on the PATH, then below the CANN directories.

    Args:
        environment: Instead of os.environ.
    """
    environment = os.environ if environment is None else environment
    found = shutil.which("atc", path=environment.get("PATH", ""))
    if found is not None:
        return Path(found)
    for home in _homes(environment):
        for below in _BELOW_HOME:
            candidate = home / below
            if candidate.is_file() and os.access(candidate, os.X_OK):
                return candidate
    return None


def _homes(environment: Mapping[str, str]) -> Iterator[Path]:
    for name in HOME_VARIABLES:
        if environment.get(name):
            yield Path(environment[name])
    for home in DEFAULT_HOMES:
        yield Path(home).expanduser()


def choose_atc(choice: str = "auto", environment: Mapping[str, str] | None = None) -> Atc | None:
    """Return what compiles, or None for nothing.

    Args:
        choice: "auto" takes an atc that is installed, "none" nothing, "sim" the simulation;
            anything else is the path of a program.
        environment: Instead of os.environ.

    Raises:
        InputError: The path is no program.
    """
    if choice == "none":
        return None
    if choice == "sim":
        return simulated_atc()
    if choice == "auto":
        path = find_atc(environment)
        return None if path is None else at_path(path, environment)
    path = Path(choice)
    if not path.is_file() or not os.access(path, os.X_OK):
        raise InputError(
            f"--atc {choice} is no program that can be run",
            "it is a path, or one of auto, sim and none",
            "Name CANN's bin/atc",
        )
    return at_path(path.absolute(), environment)


def simulated_atc() -> Atc:
    """Return the simulation, run by this Python."""
    words = (sys.executable, "-m", "omforge.atc.sim")
    return Atc(words, f"sim-{__version__}", simulated=True)


def at_path(path: Path, environment: Mapping[str, str] | None = None) -> Atc:
    """Return the atc at a path, with its version and the environment that its set_env.sh makes."""
    environment = os.environ if environment is None else environment
    return Atc((str(path),), read_version(path), _environment(path, environment))


def read_version(program: Path) -> str:
    """Return the version of the CANN that a program belongs to, "" if none is found."""
    for folder in _around(program):
        for pattern in _VERSION_FILES:
            for file in sorted(folder.glob(pattern)):
                found = _VERSION.search(file.read_text(encoding="utf-8", errors="replace"))
                if found is not None:
                    return found["version"]
    return ""


def _around(program: Path) -> list[Path]:
    """The folders above a program, as it is written and as its links lead."""
    folders = (*program.parents[1:_LEVELS], *program.resolve().parents[1:_LEVELS])
    # Nothing of CANN is that near to the root, and globs there are slow.
    return [folder for folder in dict.fromkeys(folders) if len(folder.parts) > 2]


def _environment(program: Path, environment: Mapping[str, str]) -> Mapping[str, str] | None:
    """What `source set_env.sh` makes of an environment; None where it was sourced already."""
    if any(environment.get(name) for name in HOME_VARIABLES):
        return None
    for folder in _around(program):
        for script in _SCRIPTS:
            if (folder / script).is_file():
                return _source(folder / script, environment)
    return None


def _source(script: Path, environment: Mapping[str, str]) -> Mapping[str, str] | None:
    """Run the script in bash and take its variables; it is of no use to anybody if that fails."""
    words = ["bash", "-c", 'source "$1" >/dev/null 2>&1; env -0', "bash", str(script)]
    try:
        done = subprocess.run(
            words, env=dict(environment), capture_output=True, check=True, timeout=60
        )
    except (OSError, subprocess.SubprocessError):
        return None  # no bash, or a broken script: atc says itself what it misses
    pairs = (item.partition("=") for item in done.stdout.decode(errors="replace").split("\0"))
    return {name: value for name, _, value in pairs if name}
