"""A graph for ONNX Runtime's own kernels (`--target cpu`), over a cache that never moves.

The graph writes the cache in place where past and present are one buffer, so the buffers are bound
once, and a step moves tokens, positions and a mask in and logits out. GroupQueryAttention takes
several tokens behind a past for one row only: such a step of B rows is B runs over the rows' own
parts of the buffers.

Letters: B batch, S new tokens, C capacity, K kv heads, D head size.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from omforge import ir
from omforge.bundle.manifest import Bucket, TensorSpec
from omforge.ir.dims import parse_dim, substitute
from omforge.runtime.bundle import Bundle
from omforge.runtime.cache import cache_tensors, full
from omforge.runtime.session import OrtSession, check_feeds, failing

Array = npt.NDArray[Any]

LOGITS, LOGITS_INDEX = "logits", "logits_index"


class CpuSession:
    """The graph of kind `open`; without buffers, its cache is fed and returned like the rest.

    Args:
        bundle: The bundle.
        bucket: Its bucket.
        buffers: The cache [B, K, C, D] by input name, written in place; none to be fed with it.
        change: What to make of the graph before it is opened; it may be changed, and is returned.

    Raises:
        InputError: The graph cannot be read, or ONNX Runtime refuses it.
    """

    def __init__(
        self,
        bundle: Bundle,
        bucket: Bucket,
        buffers: Mapping[str, Array] | None = None,
        *,
        change: Callable[[ir.Model], ir.Model] | None = None,
    ) -> None:
        file = bundle.graph(bucket)
        self._name = str(file)
        source = file if change is None else change(ir.load(file))
        self._session = OrtSession(source, name=self._name, tuned=True)
        sizes = {"batch": bucket.batch, "rows": bucket.batch, "capacity": bucket.capacity}
        told = {spec.name: spec for spec in (*bucket.inputs, *bucket.outputs)}
        self.inputs = tuple(_bound(spec, sizes, told) for spec in self._session.inputs)
        self.outputs = tuple(_bound(spec, sizes, told) for spec in self._session.outputs)
        self._batch = bucket.batch
        names = {spec.name for spec in self.inputs}
        self._tokens = next(name for name in ("input_ids", "inputs_embeds") if name in names)
        self._buffers = dict(buffers or {})
        tensors = cache_tensors(bundle.manifest.kv, bucket.batch)
        self._present = {tensor.past: tensor.present for tensor in tensors}
        self._fed = tuple(spec for spec in self.inputs if spec.name not in self._buffers)
        given = frozenset(self._present[name] for name in self._buffers)
        self._given = [spec.name for spec in self._session.outputs if spec.name not in given]
        self._bindings: dict[int | None, Any] = {}

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """Run once; the outputs by name, without the caches that were written in place.

        Raises:
            InputError: A feed is missing or unknown, or its dtype or shape is not the graph's.
            OmforgeError: ONNX Runtime failed.
        """
        check_feeds(self._name, self._fed, feeds)
        behind = feeds.get("write_indices")  # none where the cache is not written in place
        seq = feeds[self._tokens].shape[1]
        if self._batch == 1 or seq == 1 or behind is None or not behind.any():
            return self._run(feeds, None)
        rows = [self._run_row(feeds, row, seq) for row in range(self._batch)]
        return {name: np.concatenate([row[name] for row in rows]) for name in rows[0]}

    def close(self) -> None:
        """Free the session."""
        self._bindings.clear()
        self._session.close()

    def _run_row(self, feeds: Mapping[str, Array], row: int, seq: int) -> dict[str, Array]:
        cut = {
            name: array[row : row + 1] if array.shape[0] == self._batch else array
            for name, array in feeds.items()
            if name != LOGITS_INDEX
        }
        # Flat numbers of tokens: they count from the row's first. Who wants none has the cache
        # written all the same.
        index = feeds[LOGITS_INDEX]
        wanted = index[index // seq == row] - row * seq
        cut[LOGITS_INDEX] = wanted if len(wanted) else np.zeros(1, index.dtype)
        found = self._run(cut, row)
        return found | {LOGITS: found[LOGITS][: len(wanted)]}

    def _run(self, feeds: Mapping[str, Array], row: int | None) -> dict[str, Array]:
        if not self._buffers:
            with failing(self._name):
                results = self._session.raw.run(self._given, dict(feeds))
            return dict(zip(self._given, results, strict=True))
        with failing(self._name):
            binding = self._binding(row)
            for name, array in feeds.items():
                binding.bind_cpu_input(name, np.ascontiguousarray(array))
            self._session.raw.run_with_iobinding(binding)
            results = binding.get_outputs()
        return dict(zip(self._given, (value.numpy() for value in results), strict=False))

    def _binding(self, row: int | None) -> Any:
        """The buffers, or one row of them, bound as past and as present."""
        if row not in self._bindings:
            from onnxruntime import OrtValue

            binding = self._session.raw.io_binding()
            for name in self._given:
                binding.bind_output(name)
            for name, whole in self._buffers.items():
                part = whole if row is None else whole[row : row + 1]
                value = OrtValue.ortvalue_from_numpy(part)
                binding.bind_ortvalue_input(name, value)
                binding.bind_ortvalue_output(self._present[name], value)
            self._bindings[row] = binding
        return self._bindings[row]


class CpuCache:
    """The buffers of one batch: zero at first, written by the graph.

    Args:
        bundle: The bundle.
        batch: B.
    """

    def __init__(self, bundle: Bundle, batch: int) -> None:
        kv = bundle.manifest.kv
        self.capacity = kv.capacity
        self.length = 0
        self.buffers: dict[str, Array] = {
            t.past: np.zeros((t.rows, t.heads, kv.capacity, t.size), kv.dtype)
            for t in cache_tensors(kv, batch)
        }

    @property
    def feeds(self) -> dict[str, Array]:
        """Nothing: the session is bound to the buffers."""
        return {}

    def append(self, outputs: Mapping[str, Array], count: int) -> None:
        """Count what the step has written.

        Raises:
            CheckError: The context is full.
        """
        del outputs
        if self.length + count > self.capacity:
            raise full(self.length, count, self.capacity)
        self.length += count

    def reset(self) -> None:
        """Forget all tokens; a slot is written before it is read again."""
        self.length = 0


def runs_in_place(bundle: Bundle) -> bool:
    """Whether a bundle is one for the CPU whose graph writes the cache where it lies."""
    manifest = bundle.manifest
    if manifest.front != "ort" or not manifest.kv.in_place or manifest.states:
        return False
    graphs = (ir.load(bundle.graph(bucket)) for bucket in manifest.buckets)
    return all(node.op_type != "TensorScatter" for graph in graphs for node in graph.graph)


class CpuBackend:
    """A bundle for the CPU, its graph bound to a cache; close it, or use it as a context manager.

    Args:
        bundle: The bundle.
        batch: B; the manifest's unless given.

    Raises:
        InputError: The bundle has no bucket of that batch, or ONNX Runtime refuses the graph.
    """

    def __init__(self, bundle: Bundle, batch: int | None = None) -> None:
        self._bundle = bundle
        self._cache = CpuCache(bundle, bundle.manifest.batch if batch is None else batch)
        self._sessions: list[CpuSession] = []

    def open(self, bucket: Bucket) -> CpuSession:
        """Return the bucket's session."""
        session = CpuSession(self._bundle, bucket, self._cache.buffers)
        self._sessions.append(session)
        return session

    def cache(self) -> CpuCache:
        """Return the cache."""
        return self._cache

    def close(self) -> None:
        """Free the sessions."""
        for session in self._sessions:
            session.close()
        self._sessions.clear()


def _bound(
    spec: TensorSpec, sizes: Mapping[str, int], told: Mapping[str, TensorSpec]
) -> TensorSpec:
    """A tensor with the bundle's sizes; what ONNX Runtime does not know is as the manifest says."""
    shape = [_numbered(dim, sizes) for dim in spec.shape]
    other = told.get(spec.name)
    if other is not None and len(other.shape) == len(shape):
        known = {"seq", *(dim for dim in other.shape if isinstance(dim, str))}
        shape = [
            theirs if isinstance(ours, str) and ours not in known else ours
            for ours, theirs in zip(shape, other.shape, strict=True)
        ]
    return dataclasses.replace(spec, shape=tuple(shape))


def _numbered(dim: int | str, sizes: Mapping[str, int]) -> int | str:
    bound = dim if dim == "?" else substitute(parse_dim(dim), sizes)
    return bound if isinstance(bound, int) else str(bound)
