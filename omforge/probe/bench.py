"""How fast a bundle is: the first token, tokens a second, and the bytes of a step where they show.

Bytes are msprof's, where CANN has it on the PATH: two runs of different length are profiled, and
what the longer moves beyond the shorter is the steps' alone, without loading and prefill.
Source of its files and columns: hiascend.com, "Profile Data File References" (op_summary_*.csv).
"""

from __future__ import annotations

import csv
import dataclasses
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omforge.ir.errors import InputError
from omforge.runtime.acl_session import AclOptions
from omforge.runtime.backends import BackendName, open_model
from omforge.runtime.bundle import Bundle
from omforge.runtime.generate import LanguageModel

Progress = Callable[[str, int, int], None]

REPEATS = 3
_DURATION = "Task Duration(us)"
_BANDWIDTHS = ("main_mem_read_bw(GB/s)", "main_mem_write_bw(GB/s)")
"""How the columns end; A2 and A3 have one for each kind of core."""

_PROFILE_SECONDS = 1800


@dataclass(frozen=True)
class BenchOptions:
    """What is measured.

    Attributes:
        backend: `acl`, or `sim`, which says nothing of a device.
        prompt: Tokens of the prompt; 0: 128, or half of the context.
        steps: Decode steps behind it; 0: 64, or what the context leaves.
        options: How a device is used.
        profile: Whether msprof is run, too, if it is there.
    """

    backend: BackendName = "acl"
    prompt: int = 0
    steps: int = 0
    options: AclOptions | None = None
    profile: bool = True


@dataclass(frozen=True)
class Measured:
    """What was measured.

    Attributes:
        backend: Where.
        batch: Rows B of a step.
        prompt: Tokens of each row's prompt.
        steps: Decode steps.
        first_token: Seconds of the prefill, the fastest of three; nothing is cold.
        step: Seconds of a step, the median of all.
        step_bytes: Bytes that a step moves; None where msprof is not there.
        remark: Why there are no bytes.
    """

    backend: str
    batch: int
    prompt: int
    steps: int
    first_token: float
    step: float
    step_bytes: float | None = None
    remark: str = ""

    @property
    def tokens_per_second(self) -> float:
        """Of all rows together."""
        return self.batch / self.step

    def to_json(self) -> dict[str, Any]:
        """As plain data."""
        return {
            "backend": self.backend,
            "simulated": self.backend != "acl",
            "batch": self.batch,
            "prompt_tokens": self.prompt,
            "steps": self.steps,
            "first_token_seconds": self.first_token,
            "step_seconds": self.step,
            "tokens_per_second": self.tokens_per_second,
            "step_bytes": self.step_bytes,
            "gigabytes_per_second": None
            if self.step_bytes is None
            else self.step_bytes / self.step / 1e9,
            "remark": self.remark,
        }

    def lines(self) -> Iterator[str]:
        """For a reader."""
        yield f"first token  {1000 * self.first_token:.2f} ms ({self.prompt} tokens)"
        yield (
            f"decode       {self.tokens_per_second:.1f} tokens a second, "
            f"{1000 * self.step:.2f} ms a step (batch {self.batch}, {self.steps} steps)"
        )
        if self.step_bytes is not None:
            rate = self.step_bytes / self.step / 1e9
            yield f"bytes        {self.step_bytes / 1e6:.1f} MB a step, {rate:.1f} GB/s (msprof)"
        if self.remark:
            yield f"bytes        {self.remark}"
        if self.backend != "acl":
            yield "measured on the simulator: this says nothing of a device"


def measure(
    folder: Path, options: BenchOptions | None = None, progress: Progress | None = None
) -> Measured:
    """Measure a bundle that generates.

    Raises:
        InputError: It does not generate, or the lengths do not fit into its context.
        OmforgeError: A call of pyACL failed.
    """
    options = options or BenchOptions()
    bundle = Bundle.open(folder)
    if bundle.manifest.task != "generate":
        raise InputError(
            f"{folder} does not generate", "there is no decode step to measure", "Time `run` on it"
        )
    found = _timed(bundle, options, progress)
    if options.backend != "acl" or not options.profile:
        return found
    msprof = shutil.which("msprof")
    if msprof is None:
        return _with_bytes(found, None, "msprof is not on the PATH")
    if progress is not None:
        progress("profile with msprof", REPEATS, REPEATS + 1)
    return _with_bytes(found, *profiled(folder, msprof, found))


def _timed(bundle: Bundle, options: BenchOptions, progress: Progress | None) -> Measured:
    rows = bundle.batches[0]
    with open_model(bundle, batch=rows, backend=options.backend, options=options.options) as model:
        prompt, steps = _lengths(model, options)
        tokens = _tokens(model, rows, prompt + steps)
        _once(model, [row[:prompt] for row in tokens], [row[prompt:] for row in tokens], 1)
        firsts: list[float] = []
        each: list[float] = []
        for done in range(REPEATS):
            if progress is not None:
                progress("measure", done, REPEATS)
            first, later = _once(
                model, [row[:prompt] for row in tokens], [row[prompt:] for row in tokens], steps
            )
            firsts.append(first)
            each += later
    name = options.backend
    return Measured(name, rows, prompt, steps, min(firsts), statistics.median(each))


def _lengths(model: LanguageModel, options: BenchOptions) -> tuple[int, int]:
    context = model.context
    prompt = options.prompt or min(128, max(1, context // 2))
    steps = options.steps or min(64, context - prompt)
    if prompt + steps > context or steps < 1:
        raise InputError(
            f"{prompt} tokens and {steps} steps do not fit",
            f"the bundle's context has {context}",
            "Give fewer of them with --prompt-tokens and --steps",
        )
    return prompt, steps


def _tokens(model: LanguageModel, rows: int, count: int) -> list[list[int]]:
    """Numbers that are the same every time, and another for each place."""
    vocabulary = model.manifest.model.vocab_size
    return [[(37 * at + 11 * row + 1) % vocabulary for at in range(count)] for row in range(rows)]


def _once(
    model: LanguageModel, prompts: list[list[int]], later: list[list[int]], steps: int
) -> tuple[float, list[float]]:
    """Seconds of the prefill, and of each step."""
    started = time.perf_counter()
    model.prefill(prompts)
    first = time.perf_counter() - started
    each: list[float] = []
    for at in range(steps):
        started = time.perf_counter()
        model.decode([row[at] for row in later])
        each.append(time.perf_counter() - started)
    return first, each


def _with_bytes(found: Measured, step_bytes: float | None, remark: str) -> Measured:
    return dataclasses.replace(found, step_bytes=step_bytes, remark=remark)


def profiled(folder: Path, msprof: str, found: Measured) -> tuple[float | None, str]:
    """Return the bytes of a step by msprof, or None and why not."""
    few, many = max(1, found.steps // 4), found.steps
    if few == many:
        return None, "one step is too few to tell it from the prefill"
    totals: list[float] = []
    for steps in (few, many):
        with tempfile.TemporaryDirectory(prefix="omforge-msprof-") as scratch:
            words = [sys.executable, "-m", "omforge", "probe", "--bench", str(folder.absolute())]
            words += ["--unprofiled", "--prompt-tokens", str(found.prompt), "--steps", str(steps)]
            command = [msprof, f"--output={scratch}", "--ai-core=on", "--aic-metrics=Memory"]
            command.append(f"--application={shlex.join(words)}")
            try:
                done = subprocess.run(
                    command, capture_output=True, check=False, timeout=_PROFILE_SECONDS
                )
            except (OSError, subprocess.TimeoutExpired) as error:
                return None, f"msprof gave nothing: {error}"
            total = total_bytes(Path(scratch))
        if total is None:
            return None, f"msprof ended with {done.returncode} and wrote no bandwidths"
        totals.append(total)
    # Each run has a warm-up, with one step, and the repeats.
    return (totals[1] - totals[0]) / (REPEATS * (many - few)), ""


def total_bytes(folder: Path) -> float | None:
    """Return the bytes that all op_summary files below a folder add up to; None for none."""
    total, seen = 0.0, False
    for file in sorted(folder.rglob("op_summary_*.csv")):
        with file.open(encoding="utf-8-sig", newline="") as stream:
            for row in csv.DictReader(stream):
                seconds = _number(row.get(_DURATION)) / 1e6
                for name, cell in row.items():
                    if isinstance(name, str) and name.endswith(_BANDWIDTHS):
                        seen = True
                        total += seconds * _number(cell) * 1e9
    return total if seen else None


def _number(cell: str | None) -> float:
    """A cell; what is not there is N/A, and moves nothing."""
    try:
        return float(cell or 0)
    except ValueError:
        return 0.0
