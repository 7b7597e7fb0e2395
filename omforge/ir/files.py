"""Read and write models without ever holding their weights in memory.

`load` maps external data and says at once, for every tensor, whether its bytes are there. `save`
streams the weights into one file beside the graph, and replaces both files or neither.
"""

import gc
import os
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path

import onnx
import onnx_ir as ir
from google.protobuf.message import DecodeError
from onnx_ir.serde import SerdeError

from omforge.ir.errors import InputError
from omforge.ir.graph_order import settle
from omforge.ir.paths import path_fault
from omforge.ir.read_check import check_loaded, check_message
from omforge.ir.weights import (
    WeightWriter,
    all_tensors,
    external_like,
    location_of,
    replace_tensors,
    replaced_tensors,
    replacing,
    write_error,
)

PROTOBUF_LIMIT = (1 << 31) - 1  # one protobuf message must be shorter than 2 GiB
GRAPH_RESERVE = 64 << 20  # what nodes and names may take of that beside the inline weights
EXPORT_AGAIN = "Copy or export the model again"


def load(path: str | os.PathLike[str]) -> ir.Model:
    """Load an ONNX model; its external weights stay on disk and are mapped when they are read.

    Raises:
        InputError: `path` is missing, a folder, not an ONNX model, or truncated; it needs an opset
            or IR version that the installed onnx does not know; it is no valid graph (see
            `read_check` and `graph_order`); or external data is missing or too short (every such
            file and tensor is named).
    """
    file = Path(path)
    proto = read_message(file)
    _check_versions(file, proto)
    check_message(file, proto)
    try:
        with _uncollected():
            model = ir.from_proto(proto)
    except SerdeError as error:
        raise InputError(f"cannot read {file}", _root_cause(error), EXPORT_AGAIN) from error
    _check_weights(model, file)
    check_loaded(file, model)
    return model


def require_whole(file: Path, message: onnx.ModelProto) -> None:
    """Refuse a damaged file, and let pass what atc reads by rules of its own (`ReadByAtc`).

    Raises:
        InputError: As `load` says it.
    """
    check_message(file, message, as_atc=True)
    with _uncollected(), suppress(SerdeError):  # of what atc reads, not all loads
        _check_weights(ir.from_proto(message), file)


@contextmanager
def _uncollected() -> Generator[None]:
    """Build without garbage collections: each would visit the whole graph, and free nothing."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def read_message(path: str | os.PathLike[str]) -> onnx.ModelProto:
    """Read an ONNX file as its protobuf message: no external data, any opset and IR version.

    Nodes that are out of order are sorted.

    Raises:
        InputError: `path` is missing, a folder, not an ONNX model, or truncated; or its nodes or
            functions need each other in a circle, or an opset's version is no number of one.
    """
    file = Path(path)
    message = _parse(file, _read(file))
    for entry in (*message.opset_import, *(e for f in message.functions for e in f.opset_import)):
        if abs(entry.version) >= 1 << 31:  # of which onnx itself cannot be asked
            raise InputError(
                f"{file} imports opset {entry.version} of {entry.domain or 'ai.onnx'}",
                "there is no such version",
                EXPORT_AGAIN,
            )
    settle(file, message)
    return message


def _read(file: Path) -> bytes:
    if file.is_dir():
        models = sorted(child.name for child in file.glob("*.onnx"))
        hint = f"Pass one of its files: {', '.join(models)}" if models else "It holds no .onnx file"
        raise InputError(f"{file} is a folder", "a model is one .onnx file", hint)
    try:
        if file.stat().st_size > PROTOBUF_LIMIT:
            raise InputError(
                f"cannot read {file}",
                f"it has {file.stat().st_size} bytes and protobuf cannot parse 2 GiB or more",
                "Export with external data",
            )
        return file.read_bytes()
    except FileNotFoundError as error:
        raise InputError(f"{file} does not exist", next_step="Check the path") from error
    except OSError as error:
        raise InputError(f"cannot read {file}", error.strerror or str(error)) from error


def _parse(file: Path, content: bytes) -> onnx.ModelProto:
    if content.startswith(b"version https://git-lfs"):
        raise InputError(f"{file} is a Git LFS pointer", "it is not the model", "Run git lfs pull")
    try:
        proto = onnx.ModelProto.FromString(content)
    except DecodeError as error:
        # Field 1, ir_version, is what every writer of ONNX puts first; its tag is the byte 0x08.
        looks_onnx = content.startswith(b"\x08")
        state = "truncated or corrupt" if looks_onnx else "not an ONNX model"
        raise InputError(f"{file} is {state}", f"protobuf says: {error}", EXPORT_AGAIN) from error
    if not proto.HasField("graph") or not proto.ir_version:
        raise InputError(
            f"{file} is not an ONNX model",
            f"its {len(content)} bytes hold no graph" if content else "it is empty",
            EXPORT_AGAIN,
        )
    return proto


def _check_versions(file: Path, proto: onnx.ModelProto) -> None:
    if proto.ir_version > onnx.IR_VERSION:
        raise InputError(
            f"{file} has IR version {proto.ir_version}",
            f"onnx {onnx.__version__} knows versions up to {onnx.IR_VERSION}",
            "Upgrade onnx, or export with an older one",
        )
    if not proto.opset_import:
        raise InputError(
            f"{file} imports no opset", "operators have no meaning without one", EXPORT_AGAIN
        )
    newest = onnx.defs.onnx_opset_version()
    for entry in proto.opset_import:
        known = newest if entry.domain in ("", "ai.onnx") else entry.version
        if not 1 <= entry.version <= known:
            raise InputError(
                f"{file} imports opset {entry.version} of {entry.domain or 'ai.onnx'}",
                f"onnx {onnx.__version__} knows opsets 1 to {newest}",
                "Export with an opset in that range",
            )


def _root_cause(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {error}"


def _check_weights(model: ir.Model, file: Path) -> None:
    """Find every tensor whose bytes are not all there; set where external ones are found."""
    base = Path(os.path.abspath(file)).parent
    # A model that is a link into a store (the Hugging Face cache) has its data linked there too.
    store = file.resolve().parent
    faults: list[str] = []
    missing: dict[str, list[str]] = {}
    for label, tensor in all_tensors(model):
        if not isinstance(tensor, ir.ExternalTensor):
            continue
        location = location_of(tensor)
        # Or the graph alone is a link, and its data is where that leads.
        folder = base if (base / location).is_file() else store
        source = folder / location
        if location and path_fault(location):
            faults.append(f"tensor {label}: its file {location!r} {path_fault(location)}")
            continue
        if not location or not source.is_file():
            missing.setdefault(location, []).append(label)
            continue
        fault = _external_fault(label, tensor, source, folder, store)
        if fault:
            faults.append(fault)
        tensor.base_dir = str(folder)
    faults = [_missing_text(name, labels, base) for name, labels in missing.items()] + faults
    if not faults:
        _follow_links(model, base)
        return
    shown = "\n  ".join(faults[:20])
    more = f"\n  and {len(faults) - 20} more" if len(faults) > 20 else ""
    raise InputError(
        f"the weights of {file} are incomplete",
        f"\n  {shown}{more}\n",
        "Put the files beside the model, complete and as the exporter wrote them",
    )


def _missing_text(name: str, labels: list[str], base: Path) -> str:
    others = f" and {len(labels) - 1} other tensors" if len(labels) > 1 else ""
    if not name:
        return f"tensor {labels[0]}{others}: external data without a location"
    return f"{base / name} does not exist; it holds {labels[0]}{others}"


def _external_fault(
    label: str, tensor: ir.ExternalTensor, source: Path, base: Path, store: Path
) -> str:
    offset = tensor.offset or 0
    length = tensor.nbytes if tensor.length is None else tensor.length
    size = source.stat().st_size
    if length != tensor.nbytes:
        return (
            f"tensor {label}: its entry says {length} bytes, "
            f"{tensor.dtype.name}{tensor.shape} needs {tensor.nbytes}"
        )
    if offset < 0 or offset + length > size:
        return (
            f"tensor {label}: needs bytes {offset} to {offset + length} of {source}, "
            f"which has {size}"
        )
    target = source.resolve()
    if not (_inside(target, base.resolve()) or _inside(target, store)):
        return f"tensor {label}: {source} is a link that leads out of the model's folder"
    if target.stat().st_nlink > 1:
        return f"tensor {label}: {source} has other hard links, which onnx-ir refuses; copy it"
    return ""


def _inside(path: Path, folder: Path) -> bool:
    return path.is_relative_to(folder)


def _follow_links(model: ir.Model, base: Path) -> None:
    """Point tensors at the file behind a link that leaves `base`: onnx-ir refuses the link."""
    real_base = base.resolve()

    def follow(tensor: ir.TensorProtocol) -> ir.TensorProtocol | None:
        if not isinstance(tensor, ir.ExternalTensor):
            return None
        target = Path(tensor.path).resolve()
        if _inside(target, real_base):
            return None
        return external_like(tensor, target.parent, target.name, tensor.offset or 0)

    replace_tensors(model, follow)


def save(
    model: ir.Model,
    path: str | os.PathLike[str],
    *,
    external: str | None = None,
    threshold: int = 1024,
    writer: WeightWriter | None = None,
) -> None:
    """Write a model; what was at `path` stays until the new file is complete.

    The model itself is left as it is, also when the files that its weights are mapped from are the
    ones replaced. The same model gives the same bytes.

    Args:
        model: The model.
        path: The .onnx file to write.
        external: Name of a file beside `path` for the tensors of `threshold` bytes and more.
            Without it and without `writer` everything goes into the .onnx file.
        threshold: Smaller tensors stay in the .onnx file: shapes, scalars, small constants.
        writer: An open writer that several graphs share, instead of `external`. Its file appears
            when it is closed, so close it before the graphs are loaded.

    Raises:
        InputError: The folder does not exist, or the file would have 2 GiB or more.
        OmforgeError: The disk is full, or another write error.
    """
    file = Path(path)
    _check_destination(file, external, writer)
    if external is not None:
        with WeightWriter(file.parent / external) as own, replacing(file) as temporary:
            _write_graph(model, file, temporary, threshold, own)
            # Closed before the graph is renamed: a graph never stands without its weights.
            own.close()
        return
    with replacing(file) as temporary:
        _write_graph(model, file, temporary, threshold, writer)


def _check_destination(file: Path, external: str | None, writer: WeightWriter | None) -> None:
    if file.is_dir():
        raise InputError(f"cannot write {file}", "it is a folder", "Name a .onnx file")
    if not file.parent.is_dir():
        raise InputError(f"cannot write {file}", "its folder does not exist", "Create the folder")
    if external is not None and writer is not None:
        raise InputError(f"cannot write {file}", "external and writer exclude each other")
    if external is not None and (Path(external).name != external or external == file.name):
        raise InputError(
            f"cannot write {file} with external data {external!r}",
            "external data is another file in the model's folder",
            f"Use a plain name such as {file.stem}.weights",
        )
    if writer is not None and not _inside(writer.path.absolute(), file.parent.absolute()):
        raise InputError(
            f"cannot write {file} with weights in {writer.path}",
            "external data must be in the model's folder or below it",
        )


def _write_graph(
    model: ir.Model, file: Path, temporary: Path, threshold: int, writer: WeightWriter | None
) -> None:
    proto = _proto(model, file, threshold, writer)
    try:
        temporary.write_bytes(proto.SerializeToString(deterministic=True))
    except OSError as error:
        raise write_error(file, error) from error


def _proto(
    model: ir.Model, file: Path, threshold: int, writer: WeightWriter | None
) -> onnx.ModelProto:
    """Return the message to write; the weights that go to the writer have gone when it returns."""

    def external(tensor: ir.TensorProtocol) -> bool:
        # ONNX keeps strings inside the message whatever their size.
        large = tensor.nbytes >= max(threshold, 1) and tensor.dtype is not ir.DataType.STRING
        return large and writer is not None

    inline = sum(t.nbytes for _, t in all_tensors(model) if not external(t))
    if inline + GRAPH_RESERVE > PROTOBUF_LIMIT:
        raise InputError(
            f"cannot write {file}",
            f"{inline} bytes of weights would be inside the file, and protobuf ends at 2 GiB",
            f"Pass external='{file.stem}.weights'",
        )
    location = ""
    if writer is not None:
        location = writer.path.absolute().relative_to(file.parent.absolute()).as_posix()

    def stored(tensor: ir.TensorProtocol) -> ir.TensorProtocol | None:
        if writer is not None and external(tensor):
            offset, _ = writer.add(tensor)
            return external_like(tensor, file.parent, location, offset)
        if writer is not None and tensor.dtype.is_floating_point():
            writer.look(tensor, tensor.tobytes())  # small ones stay in the graph
        if isinstance(tensor, ir.ExternalTensor):
            return ir.Tensor(tensor.numpy(), dtype=tensor.dtype, name=tensor.name)
        return None

    if writer is not None:
        writer.keep_alive(model)
    with replaced_tensors(model, stored):
        return ir.to_proto(model)
