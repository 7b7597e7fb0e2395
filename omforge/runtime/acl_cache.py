"""The KV cache on a device: it never leaves it.

After a step its new keys and values, which are on the device as well, are copied behind the valid
ones by strided copies within the device: one for all tensors where they lie one behind the other,
as they do unless gears or alignment forbid it. Recurrent states go the same way, whole. A cache
that the graph writes in place is bound to it, and nothing is copied.

Letters: B batch, S new tokens, C capacity, K kv heads, D head size, L layers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from omforge.air.ge_types import byte_size
from omforge.bundle.manifest import KvCache as KvSpec
from omforge.bundle.manifest import TensorSpec
from omforge.ir.errors import InputError
from omforge.runtime.acl_device import ALIGNMENT, AclDevice
from omforge.runtime.cache import CacheTensor, cache_tensors, full

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Slice:
    """Where a step's new keys and values are: the address by output, and the S of the step."""

    addresses: Mapping[str, int]
    seq: int


class DeviceCache:
    """The cache buffers of one batch on a device, zero at first.

    Args:
        device: Where.
        spec: The manifest's description; its capacity is C.
        batch: B.
        states: The recurrent states: inputs, and the outputs that renew them.
    """

    def __init__(
        self,
        device: AclDevice,
        spec: KvSpec,
        batch: int,
        states: tuple[Sequence[TensorSpec], Sequence[TensorSpec]] = ((), ()),
    ) -> None:
        self.capacity = spec.capacity
        self.length = 0
        self.tensors = cache_tensors(spec, batch)
        self._device = device
        self._item = np.dtype(spec.dtype).itemsize
        self._in_place = spec.in_place
        self._new: Slice | None = None
        self._states = {
            given.name: (new.name, byte_size(given.dtype, _numbers(given)))
            for given, new in zip(*states, strict=True)
        }
        names = [*(tensor.past for tensor in self.tensors), *self._states]
        sizes = [self._bytes(tensor, spec.capacity) for tensor in self.tensors]
        sizes += [size for _, size in self._states.values()]
        self._size, offsets = place(sizes)
        base = device.malloc(self._size)
        self._base = base
        self.addresses = {name: base + offset for name, offset in zip(names, offsets, strict=True)}
        device.zero(base, self._size)

    @property
    def feeds(self) -> dict[str, Array]:
        """Nothing: the sessions know where the buffers are."""
        return {}

    @property
    def presents(self) -> frozenset[str]:
        """The outputs that the cache takes over: new keys and values, renewed states."""
        new = () if self._in_place else self.tensors
        tensors = (tensor.present for tensor in new)
        return frozenset((*tensors, *(renewed for renewed, _ in self._states.values())))

    def size(self, past: str) -> int:
        """Return the bytes of a buffer."""
        for tensor in self.tensors:
            if tensor.past == past:
                return self._bytes(tensor, self.capacity)
        raise InputError(f"the cache has no tensor {past}", "the bundle is inconsistent")

    def produced(self, new: Slice) -> None:
        """Be told, by the session that ran a step, where its new keys and values are."""
        self._new = new

    def append(self, outputs: Mapping[str, Array], count: int) -> None:
        """Copy the first `count` of the step's S new keys and values behind the valid ones.

        The copies are done in the stream, ahead of the next step; nobody waits for them.

        Args:
            outputs: What the session returned; the new keys and values are not among it.
            count: Real tokens of the step.

        Raises:
            CheckError: The context is full; nothing is copied.
            InputError: No step was run since the last call, or it had fewer tokens.
        """
        del outputs
        end = self.length + count
        if end > self.capacity:
            raise full(self.length, count, self.capacity)
        new, self._new = self._new, None
        if new is None or new.seq < count:
            held = "none" if new is None else str(new.seq)
            raise InputError("nothing to append to the cache", f"the step made {held}, not {count}")
        for first, tensors in () if self._in_place else self._runs(new):
            token = first.size * self._item
            self._device.copy_rows(
                self.addresses[first.past] + self.length * token,
                self.capacity * token,
                new.addresses[first.present],
                new.seq * token,
                count * token,
                tensors * first.rows * first.heads,
            )
        for name, (renewed, size) in self._states.items():
            # A copy, and not two buffers that take turns: no model's dataset changes in a step.
            target, source = self.addresses[name], new.addresses[renewed]
            self._device.copy_rows(target, size, source, size, size, 1)
        self.length = end

    def copies(self, new: Slice) -> int:
        """Return how many strided copies `append` makes."""
        return 0 if self._in_place else len(self._runs(new))

    def reset(self) -> None:
        """Forget all tokens, and zero the slots, which an overflow may have left infinite."""
        if self.length:
            self._device.zero(self._base, self._size)
        self.length = 0
        self._new = None

    def _bytes(self, tensor: CacheTensor, slots: int) -> int:
        return tensor.rows * tensor.heads * slots * tensor.size * self._item

    def _runs(self, new: Slice) -> list[tuple[CacheTensor, int]]:
        """Return (first, how many) of tensors that lie one behind the other on both sides."""
        runs: list[tuple[CacheTensor, int]] = []
        for tensor in self.tensors:
            if runs:
                first, count = runs[-1]
                behind = (
                    self.addresses[first.past] + count * self._bytes(first, self.capacity),
                    new.addresses[first.present] + count * self._bytes(first, new.seq),
                )
                here = (self.addresses[tensor.past], new.addresses[tensor.present])
                alike = (first.rows, first.heads, first.size)
                if here == behind and (tensor.rows, tensor.heads, tensor.size) == alike:
                    runs[-1] = (first, count + 1)
                    continue
            runs.append((tensor, 1))
        return runs


def _numbers(spec: TensorSpec) -> tuple[int, ...]:
    return tuple(dim for dim in spec.shape if isinstance(dim, int))


def place(sizes: list[int]) -> tuple[int, list[int]]:
    """Return the bytes of a block that holds parts of these sizes, and where each begins.

    Parts begin at multiples of `ALIGNMENT`; those whose sizes are multiples of it leave no gap.
    """
    offsets: list[int] = []
    end = 0
    for size in sizes:
        offsets.append(end)
        end += -(-size // ALIGNMENT) * ALIGNMENT
    return max(end, ALIGNMENT), offsets
