"""Streams and events: work is done when somebody waits for it, and not before.

That is as late as a device may be. A result that is read without waiting is the old one; a host
buffer that is refilled too early is copied with its new content.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from omforge.runtime.acl_sim.codes import RT_PARAM_INVALID, Fault


@dataclass
class Event:
    """Something that happens in a stream; `at` is when it last did."""

    recorded: Stream | None = None
    pending: int = 0
    at: float | None = None


@dataclass
class Task:
    """One piece of work; `model_id` is set where a model is run."""

    what: str
    run: Callable[[], None]
    model_id: int | None = None
    event: Event | None = None
    waits: bool = False


@dataclass
class Stream:
    """A queue of tasks; a task that fails ends it, as on a device."""

    tasks: deque[Task] = field(default_factory=deque[Task])
    fault: Fault | None = None

    def add(self, task: Task) -> None:
        """Append a task."""
        self.tasks.append(task)
        if task.event is not None and not task.waits:
            task.event.recorded = self
            task.event.pending += 1

    def models(self) -> set[int]:
        """Return the models that are still to be run."""
        return {task.model_id for task in self.tasks if task.model_id is not None}

    def synchronize(self) -> None:
        """Do all work.

        Raises:
            Fault: A task failed; the rest of the queue is dropped.
        """
        while self.tasks and self.fault is None:
            self.step()
        self.tasks.clear()
        if self.fault is not None:
            fault, self.fault = self.fault, None
            raise fault

    def step(self) -> None:
        """Do the next task; a failure is kept for whoever synchronizes."""
        task = self.tasks.popleft()
        try:
            if task.waits and task.event is not None:
                happen(task.event)
            else:
                task.run()
        except Fault as fault:
            self.fault = Fault(fault.code, f"in a stream, {task.what}: {fault.reason}")
        if task.event is not None and not task.waits:
            task.event.pending -= 1
            task.event.at = time.perf_counter()


def happen(event: Event) -> None:
    """Do the work ahead of an event.

    Raises:
        Fault: It was never recorded, or its stream failed.
    """
    stream = event.recorded
    if stream is None:
        raise Fault(RT_PARAM_INVALID, "the event was never recorded: the wait would not end")
    while event.pending and stream.tasks and stream.fault is None:
        stream.step()
    if stream.fault is not None:
        raise stream.fault
