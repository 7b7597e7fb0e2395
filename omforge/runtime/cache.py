"""The KV cache, which the runtime owns.

A graph that came to ATC as ONNX cannot update it in place: each step's graph reads the whole cache
and returns only its new keys and values, which one strided copy puts behind the valid ones (source:
the design of public Ascend LLM runners). A GE graph may write it (`in_place`): then nothing is
returned on a device, and on the CPU the cache as it is after the step.

Letters: B batch, S new tokens, C capacity, K kv heads, D head size, L layers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from omforge.bundle.manifest import KvCache as KvSpec
from omforge.bundle.manifest import StateSpec, TensorSpec
from omforge.ir.errors import CheckError, InputError

Array = npt.NDArray[Any]
States = tuple[Sequence[TensorSpec], Sequence[TensorSpec]]
"""The recurrent states: inputs, and the outputs that renew them."""


@dataclass(frozen=True)
class CacheTensor:
    """One cache tensor: the graph's input, the output that extends it, and their sizes."""

    past: str
    present: str
    rows: int
    heads: int
    size: int


def cache_tensors(spec: KvSpec, batch: int) -> tuple[CacheTensor, ...]:
    """Return the cache tensors of a layout, in the order of the graph's inputs.

    `stacked`: one, with 2*L*B rows, row (2*l + kv)*B + b. `per-layer`: key and value of each layer,
    which may have heads and sizes of its own.
    """
    if spec.layout == "stacked":
        rows = 2 * spec.layers * batch
        names = ("past_key_values", "present_key_values")
        return (CacheTensor(*names, rows, spec.kv_heads, spec.head_size),)
    return tuple(
        CacheTensor(
            f"past_key_values.{layer}.{kind}",
            f"present.{layer}.{kind}",
            batch,
            sizes.kv_heads,
            size,
        )
        for layer, sizes in enumerate(spec.each_layer)
        for kind, size in (("key", sizes.head_size), ("value", sizes.value_head_size))
    )


def cache_specs(
    spec: KvSpec, batch: int, seq: int, dtype: str
) -> tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]:
    """Return a bucket's past inputs [rows, K, C, D] and present outputs [rows, K, S, D].

    A graph that writes the cache in place has no such outputs.
    """
    tensors = cache_tensors(spec, batch)
    past = tuple(
        TensorSpec(t.past, dtype, (t.rows, t.heads, spec.capacity, t.size)) for t in tensors
    )
    new = () if spec.in_place else tensors
    present = tuple(TensorSpec(t.present, dtype, (t.rows, t.heads, seq, t.size)) for t in new)
    return past, present


def state_specs(
    states: Sequence[StateSpec], batch: int
) -> tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]:
    """Return a bucket's inputs and outputs that are recurrent states, with numbers as shapes."""
    given: list[TensorSpec] = []
    renewed: list[TensorSpec] = []
    for state in states:
        shape = tuple(batch if dim == "batch" else dim for dim in state.shape)
        given.append(TensorSpec(state.input, state.dtype, shape))
        renewed.append(TensorSpec(state.output, state.dtype, shape))
    return tuple(given), tuple(renewed)


class Cache(Protocol):
    """What generation needs of a cache: `KvCache` is the host's, a backend may have its own.

    Attributes:
        capacity: C.
        length: How many slots of every row are valid.
    """

    capacity: int
    length: int

    @property
    def feeds(self) -> dict[str, Array]:
        """What a step's session must be fed with; nothing if it knows where the cache is."""
        ...

    def append(self, outputs: Mapping[str, Array], count: int) -> None:
        """Take over the first `count` new tokens of the step whose outputs these are."""
        ...

    def reset(self) -> None:
        """Forget all tokens."""
        ...


class KvCache:
    """The cache buffers of one batch, zero at first; `length` slots of every row are valid.

    Recurrent states lie beside them: each step's are the next one's.

    Args:
        spec: The manifest's description; its capacity is C.
        batch: B.
        dtype: numpy name; the manifest's unless given (the canonical level has the export's).
        states: The recurrent states.
    """

    def __init__(
        self,
        spec: KvSpec,
        batch: int,
        dtype: str | None = None,
        states: States = ((), ()),
    ) -> None:
        self.capacity = spec.capacity
        self.length = 0
        self._in_place = spec.in_place
        self._tensors = cache_tensors(spec, batch)
        # Zeros, and never garbage: a masked slot's value is multiplied by 0, and 0 * NaN is NaN.
        self._buffers = {
            t.past: np.zeros((t.rows, t.heads, spec.capacity, t.size), dtype or spec.dtype)
            for t in self._tensors
        }
        self._renewed = {given.name: new.name for given, new in zip(*states, strict=True)}
        self._states = {
            given.name: np.zeros([n for n in given.shape if isinstance(n, int)], given.dtype)
            for given in states[0]
        }

    @property
    def feeds(self) -> dict[str, Array]:
        """The buffers by input name, not copied: they change with the next `append`."""
        return self._buffers | self._states

    def append(self, outputs: Mapping[str, Array], count: int) -> None:
        """Copy the first `count` of a step's S new keys and values behind the valid ones.

        Args:
            outputs: The step's outputs; the present tensors [.., K, S, D] are taken from it, of a
                cache in place [.., K, C, D], and the states, which know of all S tokens.
            count: Real tokens of the step; what follows them pads the bucket.

        Raises:
            CheckError: The context is full; nothing is copied.
            InputError: A present tensor is missing or has another shape or dtype.
        """
        end = self.length + count
        if end > self.capacity:
            raise full(self.length, count, self.capacity)
        for t in self._tensors:
            buffer = self._buffers[t.past]
            new = outputs.get(t.present)
            expected = (t.rows, t.heads, t.size)
            if new is None or new.dtype != buffer.dtype or _without_slots(new) != expected:
                found = "missing" if new is None else f"{new.dtype.name}{list(new.shape)}"
                raise InputError(
                    f"the step's output {t.present} does not fit the cache",
                    f"it is {found}, the cache takes {buffer.dtype.name}"
                    f"[{t.rows}, {t.heads}, new tokens, {t.size}]",
                    "Build the bundle again",
                )
            if self._in_place and new.shape != buffer.shape:
                raise InputError(
                    f"the step's output {t.present} does not fit the cache",
                    f"it holds {new.shape[2]} slots of {self.capacity}",
                    "Build the bundle again",
                )
            if new.shape[2] < count:
                raise InputError(
                    f"the step's output {t.present} does not fit the cache",
                    f"it holds {new.shape[2]} tokens, the step has {count}",
                )
        for past, present in self._renewed.items():
            state, new = self._states[past], outputs.get(present)
            if new is None or (new.shape, new.dtype) != (state.shape, state.dtype):
                found = "missing" if new is None else f"{new.dtype.name}{list(new.shape)}"
                raise InputError(
                    f"the step's output {present} does not fit the state {past}",
                    f"it is {found}, the state is {state.dtype.name}{list(state.shape)}",
                    "Build the bundle again",
                )
        for t in self._tensors:
            if self._in_place:
                self._buffers[t.past] = outputs[t.present]
            else:
                self._buffers[t.past][:, :, self.length : end] = outputs[t.present][:, :, :count]
        for past, present in self._renewed.items():
            self._states[past] = outputs[present]
        self.length = end

    def newest(self, count: int) -> dict[str, Array]:
        """Return the last `count` slots of the buffers by input name, not copied."""
        begin = self.length - count
        return {name: array[:, :, begin : self.length] for name, array in self._buffers.items()}

    def repeat(self, length: int) -> None:
        """Repeat the tokens that are held until there are `length` of them; states stay.

        Raises:
            CheckError: The context is full.
            InputError: Nothing is held, or more already.
        """
        held = self.length
        if length > self.capacity:
            raise full(held, length - held, self.capacity)
        if not 0 < held <= length:
            raise InputError(f"{held} tokens cannot be repeated to {length}")
        rows = np.arange(held, length) % held
        for buffer in self._buffers.values():
            buffer[:, :, held:length] = buffer[:, :, rows]
        self.length = length

    def reset(self) -> None:
        """Forget all tokens, and zero their slots, which an overflow may have left infinite."""
        for buffer in self._buffers.values():
            # In place, the padding of a step was written, too.
            buffer[:, :, : None if self._in_place else self.length] = 0
        for past, state in self._states.items():
            self._states[past] = np.zeros_like(state)
        self.length = 0


def full(length: int, count: int, capacity: int) -> CheckError:
    """The error of a context that has no room for `count` more tokens."""
    return CheckError(
        "the context is full",
        f"{length} tokens are in the cache and {count} more would exceed its capacity {capacity}",
        "Start a new sequence, or build the bundle with a larger context",
    )


def _without_slots(array: Array) -> tuple[int, ...]:
    return (*array.shape[:2], *array.shape[3:])
