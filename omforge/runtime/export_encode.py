"""The exported model of a bundle that encodes, run as its exporter meant it.

It never pads: texts of different lengths run one by one, so that what padding does to the bundle is
compared with no padding.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from omforge.bundle.manifest import Manifest
from omforge.ir.bfloat16 import is_float
from omforge.runtime.encode import Encoded
from omforge.runtime.export import at_full_accuracy_of, require
from omforge.runtime.fixed import fixed_feeds
from omforge.runtime.session import OrtSession, zeros

Array = npt.NDArray[Any]


class ExportEncoder:
    """An exported model without a cache on ONNX Runtime, with the `encode` of `Encoder`.

    Args:
        path: The exported .onnx file.
        manifest: The bundle's, which describes its interface.
        fixed: Fixed inputs, by the bundle's names; zeros where absent.

    Raises:
        InputError: The file cannot be loaded, or lacks an input or output that the manifest names.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        manifest: Manifest,
        fixed: Mapping[str, Array] | None = None,
    ) -> None:
        self._manifest = manifest
        self._given = dict(fixed or {})
        export = manifest.export
        self._session = OrtSession(at_full_accuracy_of(Path(path)), name=os.fspath(path))
        self._inputs = {spec.name: spec for spec in self._session.inputs}
        names = [export.input_ids, export.attention_mask, export.position_ids]
        names += [*export.token_inputs, *export.fixed, *(spec.name for spec in export.extra)]
        require(self._session.name, "inputs", names, self._session.inputs)
        require(self._session.name, "outputs", list(export.outputs), self._session.outputs)

    def encode(
        self,
        texts: Sequence[Sequence[int]],
        *,
        token_inputs: Mapping[str, Sequence[Sequence[int]]] | None = None,
    ) -> list[Encoded]:
        """Run texts one by one; the outputs of each, by the bundle's names.

        Raises:
            InputError: The export takes rows or tokens in fixed numbers, and these are others.
        """
        further = token_inputs or {}
        return [
            self._run(text, {name: numbers[row] for name, numbers in further.items()})
            for row, text in enumerate(texts)
        ]

    def close(self) -> None:
        """Free the session."""
        self._session.close()

    def __enter__(self) -> ExportEncoder:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _run(self, text: Sequence[int], further: Mapping[str, Sequence[int]]) -> Encoded:
        manifest, export = self._manifest, self._manifest.export
        count = len(text)
        known: dict[str | None, Array] = {
            export.input_ids: np.array([text]),
            export.attention_mask: np.ones((1, count), np.int64),
            export.position_ids: np.arange(count)[None],
        }
        for spec, name in zip(manifest.token_inputs, export.token_inputs, strict=True):
            known[name] = np.array([further.get(spec.name, [0] * count)])
        feeds = {
            name: array.astype(self._inputs[name].dtype)
            for name, array in known.items()
            if name is not None
        }
        dtypes = {
            spec.name: self._inputs[name].dtype
            for spec, name in zip(manifest.fixed, export.fixed, strict=True)
        }
        given = fixed_feeds(manifest.fixed, 1, self._given, dtypes)
        for spec, name in zip(manifest.fixed, export.fixed, strict=True):
            feeds[name] = given[spec.name]
        sizes = {
            dim: size
            for name, array in feeds.items()
            for dim, size in zip(self._inputs[name].shape, array.shape, strict=True)
            if isinstance(dim, str)
        }
        for spec in export.extra:
            shape = [sizes.get(dim, 1) if isinstance(dim, str) else dim for dim in spec.shape]
            feeds[spec.name] = zeros(spec, shape)
        outputs = self._session.run(feeds)
        found: Encoded = {}
        for spec, name in zip(manifest.outputs, export.outputs, strict=True):
            array = outputs[name]
            if spec.shape[:1] == ("batch",):
                array = array[0]
            found[spec.name] = array.astype(np.float32) if is_float(array.dtype) else array
        return found
