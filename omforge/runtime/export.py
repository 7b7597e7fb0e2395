"""The exported model, run as its exporter meant it: the reference of every comparison.

Its cache grows: what a step returns as `present` is the next step's `past`. It never pads: prompts
of different lengths run row by row. So what padding does to the bundle is compared with no padding;
and exports that count the tokens from the mask can be a reference too (the logits of
onnxruntime-genai's GroupQueryAttention were off by 5 for rows padded on the left). Nor does it
round what quantised layers read, as an export may allow ONNX Runtime to (`at_full_accuracy`).

Letters: B batch, S new tokens, K kv heads, D head size, V vocabulary.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from omforge import ir
from omforge.bundle.manifest import Counter, Export, ExportCache, FirstStep, KvCache, TensorSpec
from omforge.ir.digests import sha256
from omforge.ir.dims import evaluate, parse_dim
from omforge.ir.errors import InputError
from omforge.ir.numerics import at_full_accuracy
from omforge.runtime.embeddings import EmbeddingTable
from omforge.runtime.session import OrtSession, zeros

Array = npt.NDArray[Any]

log = logging.getLogger(__name__)


@dataclass
class _Rows:
    """Rows of equal length that run together.

    Attributes:
        past: Cache and states by input name.
        length: Of the text so far.
        row: The number of the first row.
    """

    past: dict[str, Array]
    length: int = 0
    row: int = 0


class ExportModel:
    """An exported model on ONNX Runtime, with the `prefill` and `decode` of `LanguageModel`.

    Args:
        path: The exported .onnx file.
        export: The manifest's description of its interface.
        kv: The manifest's cache: an export may state K and D as symbols only.
        fixed: What is given once for a sequence, by the export's names, a row for each row of the
            batch or one for all.
        embeddings: The rows of the tokens, where it takes these in place of ids.

    Raises:
        InputError: The file cannot be loaded, or lacks an input or output that `export` names.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        export: Export,
        kv: KvCache,
        fixed: Mapping[str, Array] | None = None,
        *,
        embeddings: EmbeddingTable | None = None,
    ) -> None:
        self.export = export
        self._given = dict(fixed or {})
        self._table = embeddings
        self._caches = export.caches or _caches_by_layer(export, kv)
        self._session = OrtSession(at_full_accuracy_of(Path(path)), name=os.fspath(path))
        self._inputs = {spec.name: spec for spec in self._session.inputs}
        self._check_interface()
        self._first = None if export.first is None else _First(Path(path), export.first, self)
        self._groups: list[_Rows] = []
        self._batch = 0

    def prefill(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        all_logits: bool = False,
        apart: bool = False,
        pieces: bool = False,
    ) -> Array:
        """Start new sequences.

        Args:
            prompts: Tokens by row.
            all_logits: Return those of every token.
            apart: Run row by row, and what follows, too: ONNX Runtime's GroupQueryAttention takes
                several tokens behind a past for a single row only.
            pieces: Run in calls of 1, 1, 2, 4 and so on tokens, instead of one.

        Returns:
            Float32 logits: those behind each prompt [B, V]; with `all_logits`, which takes prompts
            of one length, those of every token [B, S, V].

        Raises:
            InputError: No prompts, an empty one, or `all_logits` of different lengths or of an
                export that makes those of the last token alone.
        """
        if not prompts or not all(len(prompt) for prompt in prompts):
            raise InputError(
                "a prompt is empty",
                "there is no token to continue from",
                "Start it with the model's BOS token",
            )
        lengths = sorted({len(prompt) for prompt in prompts})
        if all_logits and len(lengths) > 1:
            raise InputError("cannot return all logits", f"the prompts have lengths {lengths}")
        together = len(lengths) == 1 and not apart
        batches = [prompts] if together else [[prompt] for prompt in prompts]
        self._batch = len(prompts)
        self._groups = [
            _Rows(self._empty_past(len(batch)), row=number * len(batch))
            for number, batch in enumerate(batches)
        ]
        logits = np.concatenate(
            [
                self._run(rows, np.array(batch), pieces=pieces)[:, 0 if all_logits else -1 :]
                for rows, batch in zip(self._groups, batches, strict=True)
            ]
        )
        if not all_logits:
            return logits[:, -1]
        if logits.shape[1] != lengths[0]:
            raise InputError(
                "cannot return all logits",
                f"the export makes those of {logits.shape[1]} of {lengths[0]} tokens",
                "Export the model with the logits of all tokens",
            )
        return logits

    def decode(self, tokens: Sequence[int] | Array) -> Array:
        """Append one token to each row; the float32 logits behind it [B, V].

        Raises:
            InputError: Not one token for each row of the last `prefill`.
        """
        column = np.asarray(tokens)
        if column.shape != (self._batch,) or not self._groups:
            raise InputError(
                f"decode got tokens of shape {list(column.shape)}",
                f"it takes one for each of the {self._batch} rows of the last prefill",
            )
        return self.extend(column[:, None])

    def extend(self, rows: Sequence[Sequence[int]] | Array) -> Array:
        """Append tokens [B, S] to the rows of the last `prefill`; the float32 logits behind them.

        They are [B, V].
        """
        parts = np.split(np.asarray(rows), len(self._groups))
        steps = zip(self._groups, parts, strict=True)
        return np.concatenate([self._run(group, part)[:, -1] for group, part in steps])

    def repeat_past(self, length: int) -> None:
        """As `LanguageModel.repeat_past`.

        Raises:
            InputError: The export gives back fewer keys than it has seen.
        """
        for rows in self._groups:
            chosen = np.arange(length) % rows.length
            for cache in self._caches:
                past = rows.past[cache.input]
                if "past" not in cache.shape:  # of fixed size; the slots behind are not read
                    past = past.take(range(rows.length), axis=cache.axis)
                    spare = [(0, 0)] * past.ndim
                    spare[cache.axis] = (0, rows.past[cache.input].shape[cache.axis] - length)
                    past = np.pad(past.take(chosen, axis=cache.axis), spare)
                    rows.past[cache.input] = past
                    continue
                if past.shape[cache.axis] != rows.length:
                    raise InputError(
                        f"the export's cache {cache.input} cannot be repeated",
                        f"it holds {past.shape[cache.axis]} of {rows.length} tokens",
                    )
                rows.past[cache.input] = np.take(past, chosen, axis=cache.axis)
            rows.length = length

    def close(self) -> None:
        """Free the session and the cache."""
        self._session.close()
        if self._first is not None:
            self._first.session.close()
        self._groups = []

    def __enter__(self) -> ExportModel:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def cache_outputs(self) -> list[str]:
        """The outputs that the next step's cache is made of."""
        return [cache.output for cache in self._caches]

    def _empty_past(self, batch: int) -> dict[str, Array]:
        past = {
            cache.input: zeros(
                self._inputs[cache.input],
                [evaluate(parse_dim(dim), {"batch": batch, "past": 0}) for dim in cache.shape],
            )
            for cache in self._caches
        }
        for name, _ in self.export.states:
            # What is open in a state's shape is the batch: others are not compiled.
            spec = self._inputs[name]
            past[name] = zeros(spec, [n if isinstance(n, int) else batch for n in spec.shape])
        return past

    def _run(self, rows: _Rows, tokens: Array, *, pieces: bool = False) -> Array:
        """Run tokens [B, S] in as many calls as the export needs; see `_step`."""
        count = tokens.shape[1]
        longest = self.export.longest_call or count
        ends = [1 << power for power in range(count.bit_length())] if pieces else []
        ends = sorted({*ends, *range(longest, count, longest), count} - {0})
        if self.export.one_token:  # of those behind a past; the first call takes as many as it may
            begun = ends[0] if rows.length == 0 else 1
            ends = list(range(begun, count + 1))
        starts = [0, *ends[:-1]]
        calls = [
            self._step(rows, tokens[:, a:b]) for a, b in zip(starts, ends, strict=True) if a < count
        ]
        return np.concatenate(calls, axis=1) if len(calls) > 1 else calls[0]

    def _step(self, rows: _Rows, tokens: Array) -> Array:
        """Run `tokens` [B, S] and extend the rows' cache.

        Returns:
            Float32 logits [B, S, V], or [B, 1, V] where the export makes the last token's alone.
        """
        batch, seq = len(tokens), int(tokens.shape[1])
        end = rows.length + seq
        first = self._first if rows.length == 0 else None
        export = self.export if first is None else first.export
        session = self._session if first is None else first.session
        inputs = self._inputs if first is None else first.inputs
        mask = inputs.get(export.attention_mask or "")
        known: dict[str | None, Array] = {
            export.input_ids: tokens if self._table is None else self._table[tokens],
            export.attention_mask: _mask(mask, batch, rows.length, end),
            export.position_ids: _positions(
                inputs.get(export.position_ids or ""), batch, rows.length, end
            ),
        }
        # Further numbers of each token (a segment) are what the bundle is fed: zeros.
        known |= dict.fromkeys(self.export.token_inputs, np.zeros(tokens.shape[:2], np.int64))
        flag = self.export.cache_flag
        if flag is not None and first is None:
            shape = [1] * len(inputs[flag.input].shape)
            cached = rows.length > 0 or flag.always
            known[flag.input] = np.full(shape, cached == flag.cached)
        if first is None:
            for counter in self.export.counters:
                shape = inputs[counter.input].shape
                known[counter.input] = _count(counter, shape, batch, rows.length, end)
        feeds = {
            name: array.astype(inputs[name].dtype)
            for name, array in known.items()
            if name is not None
        }
        if first is None:
            feeds |= rows.past
        given = self._fixed(rows.row, batch)
        feeds |= {name: array for name, array in given.items() if name in inputs}
        sizes = _symbols(inputs, feeds)
        for spec in export.extra:
            shape = [sizes.get(dim, 1) if isinstance(dim, str) else dim for dim in spec.shape]
            feeds[spec.name] = zeros(spec, shape)
        outputs = session.run(feeds)
        rows.past = {
            cache.input: outputs[cache.output]
            if cache.returns == "whole"
            else np.concatenate([rows.past[cache.input], outputs[cache.output]], axis=cache.axis)
            for cache in self._caches
        }
        rows.past |= {name: outputs[new] for name, new in self.export.states}
        rows.length = end
        logits = outputs[export.logits].astype(np.float32)
        # An export may keep the last token alone, and drop its axis.
        return logits[:, None] if logits.ndim == 2 else logits

    def _fixed(self, first: int, batch: int) -> dict[str, Array]:
        """What is given once, of some rows; an adapter has none, and is the same for all."""
        found: dict[str, Array] = {}
        for name in self.export.fixed:
            array = self._given[name]
            of_rows = isinstance(self._inputs[name].shape[0], str)
            rows = array[first : first + batch] if of_rows and len(array) > 1 else array
            shape = (batch, *rows.shape[1:]) if of_rows else rows.shape
            found[name] = np.broadcast_to(rows, shape).astype(self._inputs[name].dtype)
        return found

    def _check_interface(self) -> None:
        export = self.export
        if export.input_ids is None or not self._caches:
            raise InputError(
                f"{self._session.name} cannot be the reference",
                "the manifest names no token input" if self._caches else "it has no KV cache",
                "Export the model with input_ids and past key values",
            )
        names = [export.input_ids, export.attention_mask, export.position_ids]
        names += [cache.input for cache in self._caches]
        names += [*(spec.name for spec in export.extra), *export.fixed]
        names += [name for name, _ in export.states]
        names += [counter.input for counter in export.counters]
        names += [export.cache_flag.input] if export.cache_flag is not None else []
        outputs = [export.logits, *(cache.output for cache in self._caches)]
        outputs += [name for _, name in export.states]
        require(self._session.name, "inputs", names, self._session.inputs)
        require(self._session.name, "outputs", outputs, self._session.outputs)


class _First:
    """What reads a whole text, of an export in two files.

    Args:
        beside: The other file; both lie in one folder.
        export: Its interface.
        model: The other, which says what the caches are called.
    """

    def __init__(self, beside: Path, export: FirstStep, model: ExportModel) -> None:
        path = beside.with_name(Path(export.file).name)
        self.export = export
        if not path.is_file():
            raise InputError(
                f"{path} does not exist",
                f"the export is two files, and {beside.name} goes on from what it gives",
                "Put both into one folder",
            )
        digest = sha256(path)
        if digest != export.sha256:
            raise InputError(
                f"{path} is not the model that the bundle was made from",
                f"its sha256 is {digest}, the manifest says {export.sha256}",
                "Give that model, or build the bundle again",
            )
        self.session = OrtSession(at_full_accuracy_of(path), name=os.fspath(path))
        self.inputs = {spec.name: spec for spec in self.session.inputs}
        names = [export.input_ids, export.attention_mask, export.position_ids]
        names += [spec.name for spec in export.extra]
        require(self.session.name, "inputs", names, self.session.inputs)
        outputs = [export.logits, *model.cache_outputs]
        require(self.session.name, "outputs", outputs, self.session.outputs)


def _mask(spec: TensorSpec | None, batch: int, start: int, end: int) -> Array:
    """Ones [B, end], or where the export takes a whole mask that, [B, 1, end - start, end]."""
    if spec is None or len(spec.shape) != 4:
        return np.ones((batch, end), np.int64)
    seen = np.tri(end - start, end, start, dtype=np.bool_)
    dtype = np.dtype(spec.dtype)
    whole = np.where(seen, 0, np.finfo(dtype).min) if dtype.kind == "f" else seen
    return np.broadcast_to(whole, (batch, 1, *seen.shape))


def _count(
    counter: Counter, shape: tuple[int | str, ...], batch: int, start: int, end: int
) -> Array:
    if counter.counts == "slots":
        return np.arange(start, end)
    return np.full([batch] * len(shape), start if counter.counts == "start" else end)


def _positions(spec: TensorSpec | None, batch: int, start: int, end: int) -> Array:
    """Positions [B, S], as often as the export takes them: M-RoPE's are equal for text."""
    rows = np.tile(np.arange(start, end), (batch, 1))
    if spec is None or len(spec.shape) != 3:
        return rows
    count = spec.shape[0]
    return np.stack([rows] * (count if isinstance(count, int) else 3))


def _symbols(inputs: Mapping[str, TensorSpec], feeds: Mapping[str, Array]) -> dict[str, int]:
    """What the symbols in the inputs' shapes stand for in this step."""
    return {
        dim: size
        for name, array in feeds.items()
        for dim, size in zip(inputs[name].shape, array.shape, strict=True)
        if isinstance(dim, str)
    }


def _caches_by_layer(export: Export, kv: KvCache) -> tuple[ExportCache, ...]:
    """The cache of an export that has a past and a present for each layer's keys and values."""
    return tuple(
        ExportCache(past, ("batch", of.kv_heads, "past", size), present, "whole", 2)
        for of, pasts, presents in zip(kv.each_layer, export.past, export.present, strict=False)
        for past, present, size in zip(
            pasts, presents, (of.head_size, of.value_head_size), strict=True
        )
    )


def at_full_accuracy_of(path: Path) -> Path | ir.Model:
    """The file, or its model where it would let ONNX Runtime round what layers read.

    A file is best handed over as it is: ONNX Runtime then maps its weights by itself.
    """
    model = ir.load(path)
    whole = at_full_accuracy(model)
    if whole is model:
        return path
    log.info("%s lets its runtime round what layers read; here it does not", path)
    return whole


def require(file: str, kind: str, names: Sequence[str | None], specs: Sequence[TensorSpec]) -> None:
    """Refuse an export that lacks inputs or outputs; a name that is None is none.

    Raises:
        InputError: Names what is missing.
    """
    found = [spec.name for spec in specs]
    missing = [name for name in names if name is not None and name not in found]
    if missing:
        raise InputError(
            f"{file} is not the exported model of this manifest",
            f"its {kind} lack {', '.join(missing)}; they are {', '.join(found)}",
            "Give the model that the bundle was built from",
        )
