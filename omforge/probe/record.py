"""What a probe is: a question, tiny models, steps on a device, and what each outcome means."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import onnx

from omforge.air.graph import Air

Array = npt.NDArray[Any]
Needs = Literal["atc", "device"]

ALL = frozenset(("310p", "910b", "910_93", "310b", "950"))

TAKEN, REFUSED, RIGHT, WRONG, FAILS = "taken", "refused", "right", "wrong", "fails"
MEASURED = "measured"


@dataclass(frozen=True)
class Build:
    """One model that atc compiles.

    Attributes:
        name: Of the .om.
        model: An ONNX model, or a GE graph.
        flags: Beside the ones that every build has.
        files: What lies beside the model.
        data: The folder of `files`, from the kit's folder, is the model's own.
    """

    name: str
    model: onnx.ModelProto | Air
    flags: tuple[str, ...] = ("--precision_mode_v2=origin",)
    files: Mapping[str, bytes] = field(default_factory=dict[str, bytes])


@dataclass(frozen=True)
class Step:
    """One thing that is done on the device: `portable` says what each `do` is.

    `load` a model, `fill` a buffer, `run`, `time`, `size`, `copy`, `copy2d`, or begin `again`.
    """

    do: Literal["load", "fill", "run", "time", "size", "copy", "copy2d", "again"]
    given: Mapping[str, Any] = field(default_factory=dict[str, Any])


@dataclass(frozen=True)
class Experiment:
    """What is built and done.

    Attributes:
        builds: The models. All must be built.
        steps: On the device; none where building alone answers.
        judged: By value, what each buffer then holds; the first value that fits is the answer.
        rtol: Relative part of a tolerance.
        atol: Absolute part of a tolerance.
        unit: Of the figure that a `time` or `size` step gives, which then is the answer; of two
            such steps it is the first by the second.
        over: The values where that figure is above, and not above, `more_than`.
        more_than: What it is compared with.
        count: Files among what was built, as a pattern; how many there are is the answer.
        counts: The value for each number of them.
    """

    builds: tuple[Build, ...]
    steps: tuple[Step, ...] = ()
    judged: Mapping[str, Mapping[str, Array]] = field(default_factory=dict[str, Any])
    rtol: float = 2e-2
    atol: float = 1e-2
    unit: str = ""
    over: tuple[str, str] = (MEASURED, MEASURED)
    more_than: float = 0.0
    count: str = ""
    counts: Mapping[int, str] = field(default_factory=dict[int, str])


@dataclass(frozen=True)
class Probe:
    """One question.

    Attributes:
        id: Its name, which facts files and `claims.tsv` use.
        question: In words.
        make: The experiment on a SoC family.
        means: What each value would mean.
        expected: The value that the tables suppose; "" where they suppose none.
        families: Where the question is asked.
        built: The value where atc builds all models and no step follows.
        refused: The value where atc refuses one; "" where nothing follows from that.
        codes: The value for a code of atc's error, ahead of `refused`.
        failed: The value where a step fails; "" where nothing follows from that.
        otherwise: The value where the numbers are none of `judged`; "" where nothing follows.
        after: Answers without which this one's says nothing, as claims: `runs=right`.
        settles: What it is for where no row of a table claims it: a decision, a figure.
        limit: Seconds.
    """

    id: str
    question: str
    make: Callable[[str], Experiment]
    means: Mapping[str, str]
    expected: str = ""
    families: frozenset[str] = ALL
    built: str = TAKEN
    refused: str = REFUSED
    codes: Mapping[str, str] = field(default_factory=dict[str, str])
    failed: str = FAILS
    otherwise: str = WRONG
    after: tuple[str, ...] = ()
    settles: str = ""
    limit: float = 300.0

    def needs(self, family: str) -> Needs:
        """Whether atc alone answers it."""
        return "device" if self.make(family).steps else "atc"

    def values(self, experiment: Experiment) -> frozenset[str]:
        """Every value that an answer may have."""
        found = {self.refused, *self.codes.values()}
        if experiment.unit:
            found |= {*experiment.over, self.failed}
        elif experiment.count:
            found |= set(experiment.counts.values())
        elif experiment.steps:
            found |= {self.failed, self.otherwise, *experiment.judged}
        else:
            found.add(self.built)
        return frozenset(found - {""})


def load(*models: str, how: str = "file") -> tuple[Step, ...]:
    """Load models: from `file`, with one `workspace` for all, or with `weights` that are there."""
    return tuple(Step("load", {"model": name, "how": how}) for name in models)


def fill(**buffers: Array) -> tuple[Step, ...]:
    """Fill buffers from the host."""
    return tuple(Step("fill", {"buffer": name, "array": array}) for name, array in buffers.items())


def room(name: str, size: int) -> Step:
    """Make a buffer of so many zeros, which no file of the kit holds."""
    return Step("fill", {"buffer": name, "bytes": size})


def run(model: str, inputs: tuple[str, ...], outputs: tuple[str, ...]) -> Step:
    """Run a model on named buffers."""
    return Step("run", {"model": model, "inputs": list(inputs), "outputs": list(outputs)})


def timed(model: str, inputs: tuple[str, ...], outputs: tuple[str, ...], moved: int = 0) -> Step:
    """Time a model: GB/s where it moves `moved` bytes, microseconds without."""
    given = {"model": model, "inputs": list(inputs), "outputs": list(outputs), "bytes": moved}
    return Step("time", given)


def once(
    model: onnx.ModelProto | Air,
    inputs: Mapping[str, Array],
    output: Array,
    *,
    flags: tuple[str, ...] | None = None,
    rtol: float = 2e-2,
    atol: float = 1e-2,
    values: Mapping[str, Array] | None = None,
    more_outputs: tuple[str, ...] = (),
) -> Experiment:
    """One model, run once; its first output is compared.

    Args:
        model: Its inputs are in the order of `inputs`.
        inputs: By the names of their buffers.
        output: What `right` looks like; or, with `values`, not used.
        flags: Of atc.
        rtol: Relative part of the tolerance.
        atol: Absolute part of the tolerance.
        values: What each value looks like, instead of `right` alone.
        more_outputs: Names for outputs that are not compared.
    """
    build = Build("model", model) if flags is None else Build("model", model, flags)
    wanted = {RIGHT: output} if values is None else values
    arrays = {name: np.asarray(array) for name, array in inputs.items()}
    return Experiment(
        builds=(build,),
        steps=(
            *load("model"),
            *fill(**arrays),
            run("model", tuple(inputs), ("y", *more_outputs)),
        ),
        judged={value: {"y": np.asarray(array)} for value, array in wanted.items()},
        rtol=rtol,
        atol=atol,
    )
