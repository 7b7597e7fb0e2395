"""Sessions: one loaded graph that takes named arrays and returns named arrays.

`Session` is what the rest of the runtime needs of a backend; `OrtSession` is the CPU one. All calls
into onnxruntime, which has no type stubs, are in this file.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Generator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from omforge import ir
from omforge.bundle.manifest import TensorSpec
from omforge.ir.bfloat16 import computed_wide, run_session
from omforge.ir.errors import InputError, OmforgeError
from omforge.ir.files import load
from omforge.ir.ops import reference_model
from omforge.ir.ort_errors import is_missing_kernel, ort_cause
from omforge.ir.segment import EXTERNAL_FOLDER

Array = npt.NDArray[Any]

_DTYPES = {"float": "float32", "double": "float64"}  # the others are spelled as numpy spells them


class Session(Protocol):
    """One loaded graph. Feeds are checked against `inputs` before the backend sees them."""

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        """The graph's inputs, in order."""
        ...

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        """The graph's outputs, in order."""
        ...

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """Run once; the outputs by name."""
        ...

    def close(self) -> None:
        """Free what the session holds; it cannot be run any more."""
        ...


class OrtSession:
    """A graph on ONNX Runtime's CPU provider.

    Weights stay mapped from their file, also under several sessions: a graph that has to be changed
    before it runs is handed over as bytes, with the folder of its external data beside it.

    Args:
        source: An .onnx file, or a model whose external tensors are all in one folder, or one that
            is serialised.
        lowered: The graph is in the ATC dialect: attach the reference bodies of its `NPU*` ops.
        threads: Of one operator; 0 lets ONNX Runtime choose.
        folder: Where the external data of a serialised model are.
        name: What to call it in messages.
        tuned: For speed: every fusion that ONNX Runtime has, and weights in its kernels' layout,
            which are a copy. Its numbers then differ from those of the graph by rounding.

    Raises:
        InputError: The graph cannot be read, or ONNX Runtime refuses it.
    """

    def __init__(
        self,
        source: str | os.PathLike[str] | ir.Model | bytes,
        *,
        lowered: bool = False,
        threads: int = 0,
        folder: str | os.PathLike[str] | None = None,
        name: str = "the model",
        tuned: bool = False,
    ) -> None:
        self.name = name if isinstance(source, ir.Model | bytes) else os.fspath(source)
        options = session_options(threads, tuned=tuned)
        content: str | bytes
        folded = True
        if isinstance(source, bytes):
            content, folded = source, False  # it may widen what it stores; nobody has looked
            if folder is not None:
                options.add_session_config_entry(EXTERNAL_FOLDER, os.path.abspath(folder))
        elif isinstance(source, ir.Model) or lowered:
            model = source if isinstance(source, ir.Model) else load(source)
            beside = _weights_folder(model)
            if beside is not None:
                options.add_session_config_entry(EXTERNAL_FOLDER, beside)
            wide = computed_wide(model)
            folded = not any(_widens(node) for node in wide.graph)
            twin = reference_model(wide) if lowered else wide
            content = ir.to_proto(twin).SerializeToString()
        else:
            content = os.fspath(source)
            if not Path(content).is_file():
                raise InputError(f"{content} does not exist", next_step="Check the path")
        self._session = _create(self.name, content, options, folded=folded)
        self._inputs = _specs(self._session.get_inputs())
        self._outputs = _specs(self._session.get_outputs())

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        """The graph's inputs, in order; a dynamic dim is its symbol's name."""
        return self._inputs

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        """The graph's outputs, in order."""
        return self._outputs

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """Run once.

        Raises:
            InputError: A feed is missing or unknown, or its dtype or shape is not the graph's.
            OmforgeError: ONNX Runtime failed.
        """
        check_feeds(self.name, self._inputs, feeds)
        names = [spec.name for spec in self._outputs]
        with failing(self.name):
            results = run_session(self.raw, names, feeds)
        return dict(zip(names, results, strict=True))

    @property
    def raw(self) -> Any:
        """The session of ONNX Runtime itself.

        Raises:
            InputError: It is closed.
        """
        if self._session is None:
            raise InputError(f"{self.name}: the session is closed", next_step="Open a new one")
        return self._session

    def close(self) -> None:
        """Free the session."""
        self._session = None


@contextlib.contextmanager
def failing(name: str) -> Generator[None]:
    """Say what was run where ONNX Runtime fails.

    Raises:
        OmforgeError: It did.
    """
    try:
        yield
    except OmforgeError:
        raise
    # onnxruntime's exceptions have no common base below Exception.
    except Exception as error:
        raise OmforgeError(
            f"{name}: ONNX Runtime failed",
            ort_cause(error),
            "Where the export runs on the same text, omforge built this graph wrong: report "
            "the command and the export",
        ) from error


def check_feeds(name: str, inputs: Sequence[TensorSpec], feeds: Mapping[str, Array]) -> None:
    """Refuse feeds that are not exactly the inputs; a symbolic dim takes any size.

    Raises:
        InputError: Names the input, what the graph wants and what was fed.
    """
    wanted = {spec.name for spec in inputs}
    missing = [spec.name for spec in inputs if spec.name not in feeds]
    unknown = [key for key in feeds if key not in wanted]
    if missing or unknown:
        parts = [f"missing: {', '.join(missing)}"] * bool(missing)
        parts += [f"not inputs of the graph: {', '.join(unknown)}"] * bool(unknown)
        raise InputError(
            f"{name}: the feeds do not match the inputs",
            "; ".join(parts),
            f"The inputs are {', '.join(spec.name for spec in inputs)}",
        )
    for spec in inputs:
        array = feeds[spec.name]
        fits = len(array.shape) == len(spec.shape) and all(
            isinstance(dim, str) or dim == size
            for dim, size in zip(spec.shape, array.shape, strict=True)
        )
        if array.dtype.name != spec.dtype or not fits:
            raise InputError(
                f"{name}: input {spec.name} does not match",
                f"the graph takes {describe(spec.dtype, spec.shape)}, "
                f"the feed is {describe(array.dtype.name, array.shape)}",
                "Feed what the graph was built for, or build the bundle again",
            )


def check_interface(
    name: str, kind: str, actual: Sequence[TensorSpec], promised: Sequence[TensorSpec]
) -> None:
    """Refuse a graph whose inputs or outputs are not what the manifest says.

    Raises:
        InputError: Names the first tensor that differs, with both sides.
    """
    found = {spec.name: spec for spec in actual}
    names, wanted = sorted(found), sorted(spec.name for spec in promised)
    if names != wanted:
        raise _mismatch(name, f"the graph has {kind} {names}, the manifest says {wanted}")
    for spec in promised:
        other = found[spec.name]
        if (other.dtype, other.shape) != (spec.dtype, spec.shape):
            raise _mismatch(
                name,
                f"{spec.name} is {describe(other.dtype, other.shape)} in the graph and "
                f"{describe(spec.dtype, spec.shape)} in the manifest",
            )


def describe(dtype: str, shape: Sequence[int | str]) -> str:
    """Return dtype and shape as text: `float16[2, 1, seq]`."""
    return f"{dtype}[{', '.join(map(str, shape))}]"


def _mismatch(name: str, why: str) -> InputError:
    return InputError(f"{name} is not the graph of this manifest", why, "Build the bundle again")


def _onnxruntime() -> Any:
    """Return the untyped module; it is slow to import, and reading a bundle does not need it."""
    import onnxruntime

    return onnxruntime


_LARGE = 1 << 12
"""Bytes of a constant that is not kept in two dtypes."""


def _widens(node: ir.Node) -> bool:
    """Whether a node, or its reference body, makes wider numbers of a weight that is stored."""
    if node.op_type == "Cast":
        given = node.inputs[0]
        tensor = None if given is None else given.const_value
        return tensor is not None and tensor.nbytes >= _LARGE
    return node.op_type == "NPUWeightQuantBatchMatmulV2"


def session_options(threads: int, *, tuned: bool = False) -> Any:
    """Return ONNX Runtime's options as every session has them; tuned ones are for speed."""
    ort = _onnxruntime()
    options = ort.SessionOptions()
    options.log_severity_level = 4  # what it would print is in the exceptions
    options.intra_op_num_threads = threads
    options.use_deterministic_compute = True
    if tuned:
        # It fuses DequantizeLinear and MatMul itself, and rounds what is multiplied to int8 unless
        # told not to (level 4).
        options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
        return options
    # The comparison is with what the graph says, so no lossy or layout-changing fusions.
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
    # Measured with ONNX Runtime 1.32 on 20 MatMuls of 2048x2048: prepacking copies every fp32
    # weight (352 MB anonymous instead of 30, for each session), and buys 1.4x at 128 rows, nothing
    # at one. fp16 weights are cast at every run; in the default order all casts come first (703 MB
    # anonymous), in priority order each is next to its MatMul (47 MB), and no slower.
    options.add_session_config_entry("session.disable_prepacking", "1")
    options.execution_order = ort.ExecutionOrder.PRIORITY_BASED
    options.enable_mem_pattern = False
    # With it a buffer is kept for the next value of its shape, layers later: a prefill of 128
    # tokens of the example's model held 16.1 MB at once instead of 5.8, and was no sooner done.
    options.enable_mem_reuse = False
    return options


_AGAIN = "Check the file, or export or build it again"
_NO_KERNEL = "The NPU may have it all the same; with --dtype fp32 the CPU has more of them"


def _create(name: str, content: str | bytes, options: Any, *, folded: bool) -> Any:
    ort = _onnxruntime()
    # Folding would make floats of all quantised weights ahead of the first run, and keep them:
    # 6 GB for 135M weights of int4 instead of 0.2.
    disabled = [] if folded else ["ConstantFolding"]
    try:
        return ort.InferenceSession(
            content, options, providers=["CPUExecutionProvider"], disabled_optimizers=disabled
        )
    # onnxruntime's exceptions have no common base below Exception.
    except Exception as error:
        raise InputError(
            f"ONNX Runtime cannot load {name}",
            ort_cause(error),
            _NO_KERNEL if is_missing_kernel(error) else _AGAIN,
        ) from error


def _weights_folder(model: ir.Model) -> str | None:
    folders: set[str] = {
        os.path.abspath(value.const_value.base_dir)  # pyright: ignore[reportUnknownMemberType, reportUnknownArgumentType]
        for value in model.graph.initializers.values()
        if isinstance(value.const_value, ir.ExternalTensor)
    }
    if len(folders) > 1:
        raise InputError(
            "the model's weights are in several folders",
            ", ".join(sorted(folders)),
            "Save the model first, so that they are in one",
        )
    return folders.pop() if folders else None


def _specs(nodes: Sequence[Any]) -> tuple[TensorSpec, ...]:
    return tuple(
        TensorSpec(node.name, _dtype(str(node.type)), tuple(_dim(dim) for dim in node.shape))
        for node in nodes
    )


def _dim(dim: int | str | None) -> int | str:
    if isinstance(dim, str) and dim.isdecimal():
        return int(dim)  # exporters write some numbers as names
    return "?" if dim is None else dim


def _dtype(text: str) -> str:
    """Turn `tensor(float16)` into `float16`."""
    inner = text.removeprefix("tensor(").removesuffix(")")
    return _DTYPES.get(inner, inner)


def zeros(spec: TensorSpec, shape: Sequence[int]) -> Array:
    """Return zeros of the spec's dtype.

    Raises:
        InputError: numpy has no such dtype.
    """
    try:
        return np.zeros(shape, np.dtype(spec.dtype))
    except TypeError as error:
        raise InputError(
            f"input {spec.name} has dtype {spec.dtype}", "numpy has no such"
        ) from error
