"""The tensors of a model, and the file that holds the large ones."""

import contextlib
import errno
import hashlib
import mmap
import os
import secrets
from collections.abc import Callable, Generator, Iterator, Sequence
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Self, cast

import onnx_ir as ir

from omforge.ir.errors import OmforgeError
from omforge.ir.nonfinite import Nonfinite, nonfinite, worse
from omforge.ir.streamed import StreamedTensor, ViewTensor

CHUNK = 8 << 20
LARGE = 1 << 20
LARGE_ALIGNMENT = 4096  # a page, so that a mapped weight starts on one
SMALL_ALIGNMENT = 64  # a cache line, and the widest vector load
SAMPLE, STRIDE = 1 << 10, 1 << 16  # a tensor is recognised by so many of every so many bytes

Replacement = Callable[[ir.TensorProtocol], ir.TensorProtocol | None]


def all_graphs(model: ir.Model) -> Iterator[ir.Graph]:
    """Yield the main graph, the functions' graphs, and every graph nested in them."""
    for graph in (model.graph, *(function.graph for function in model.functions.values())):
        yield graph
        yield from _nested(graph)


def _nested(graph: ir.Graph) -> Iterator[ir.Graph]:
    # Graph.subgraphs walks through a traversal object for every node: most have no graph in them.
    for node in graph:
        for attribute in node.attributes.values():
            if attribute.type is ir.AttributeType.GRAPH and not attribute.is_ref():
                inner = (attribute.as_graph(),)
            elif attribute.type is ir.AttributeType.GRAPHS and not attribute.is_ref():
                inner = tuple(attribute.as_graphs())
            else:
                continue
            for each in inner:
                yield each
                yield from _nested(each)


def all_tensors(model: ir.Model) -> Iterator[tuple[str, ir.TensorProtocol]]:
    """Yield (name, tensor) of every initializer and tensor attribute, in a fixed order."""
    for graph in all_graphs(model):
        for name, value in graph.initializers.items():
            if value.const_value is not None:
                yield name, value.const_value
        for node in graph:
            for attribute in node.attributes.values():
                label = f"{node.name or node.op_type}.{attribute.name}"
                yield from ((label, tensor) for tensor in _attribute_tensors(attribute))


def _attribute_tensors(attribute: ir.Attr) -> tuple[ir.TensorProtocol, ...]:
    if attribute.is_ref() or attribute.value is None:
        return ()
    # Not as_tensor: it tests the value against a protocol, which took half the time of a save.
    if attribute.type is ir.AttributeType.TENSOR:
        return (cast(ir.TensorProtocol, attribute.value),)
    if attribute.type is ir.AttributeType.TENSORS:
        return tuple(cast(Sequence[ir.TensorProtocol], attribute.value))
    return ()


def replace_tensors(model: ir.Model, replacement: Replacement) -> None:
    """Replace, in place, each tensor for which `replacement(tensor)` is not None."""
    for set_new, _ in _exchanges(model, replacement):
        set_new()


@contextlib.contextmanager
def replaced_tensors(model: ir.Model, replacement: Replacement) -> Generator[None, None, None]:
    """Replace tensors for the length of a block, as `replace_tensors` does.

    Cheaper than a copy of the model, and works on invalid models, which onnx-ir refuses to copy.
    """
    exchanges = _exchanges(model, replacement)
    try:
        for set_new, _ in exchanges:
            set_new()
        yield
    finally:
        for _, set_old in exchanges:
            set_old()


def _exchanges(
    model: ir.Model, replacement: Replacement
) -> list[tuple[Callable[[], None], Callable[[], None]]]:
    """Return the assignments that bring in each new tensor and take it out, none of them done."""
    found: list[tuple[Callable[[], None], Callable[[], None]]] = []
    for graph in all_graphs(model):
        for value in graph.initializers.values():
            old = value.const_value
            new = None if old is None else replacement(old)
            if new is not None:
                found.append((partial(_set, value, new), partial(_set, value, old)))
        for node in graph:
            for attribute in node.attributes.values():
                changed = _replaced_attribute(attribute, replacement)
                if changed is not None:
                    attributes, name = node.attributes, attribute.name
                    bring_in = partial(attributes.__setitem__, name, changed)
                    found.append((bring_in, partial(attributes.__setitem__, name, attribute)))
    return found


def _set(value: ir.Value, tensor: ir.TensorProtocol | None) -> None:
    value.const_value = tensor


def _replaced_attribute(attribute: ir.Attr, replacement: Replacement) -> ir.Attr | None:
    old = _attribute_tensors(attribute)
    new = [replacement(tensor) for tensor in old]
    if not any(tensor is not None for tensor in new):
        return None
    merged = tuple(n if n is not None else o for n, o in zip(new, old, strict=True))
    single = attribute.type is ir.AttributeType.TENSOR
    return ir.Attr(attribute.name, attribute.type, merged[0] if single else merged)


def external_like(
    tensor: ir.TensorProtocol, folder: Path, location: str, offset: int
) -> ir.ExternalTensor:
    """Return a tensor with the same name, type and shape whose bytes are in `folder / location`."""
    return ir.ExternalTensor(
        location,
        offset,
        tensor.nbytes,
        tensor.dtype,
        shape=ir.Shape(tensor.shape.numpy()),
        name=tensor.name or "",
        doc_string=tensor.doc_string,
        metadata_props=dict(tensor.metadata_props) or None,
        base_dir=str(folder.absolute()),
    )


def location_of(tensor: ir.ExternalTensor) -> str:
    """Return the name of the tensor's file, as the model writes it."""
    return os.fspath(tensor.location)  # pyright: ignore[reportUnknownMemberType]  bare PathLike


def chunks(tensor: ir.TensorProtocol) -> Iterator[memoryview | bytes]:
    """Yield a tensor's bytes as ONNX stores them: little endian, small types packed.

    An external tensor is read in pieces of `CHUNK`, and a streamed one computed in pieces; any
    other is in memory, and is one piece.
    """
    if isinstance(tensor, StreamedTensor):
        yield from tensor.pieces()
    elif not isinstance(tensor, ir.ExternalTensor):
        yield tensor.tobytes()
    elif tensor.raw is not None:
        yield from _mapped_chunks(tensor.raw, tensor.offset or 0, tensor.nbytes)
    elif tensor.nbytes:
        yield from _file_chunks(tensor)


def _file_chunks(tensor: ir.ExternalTensor) -> Iterator[bytes]:
    left = tensor.nbytes
    with open(tensor.path, "rb") as file:
        file.seek(tensor.offset or 0)
        while left:
            chunk = file.read(min(CHUNK, left))
            if not chunk:
                raise too_short(tensor, left)
            left -= len(chunk)
            yield chunk


def too_short(tensor: ir.ExternalTensor, missing: int) -> OmforgeError:
    """Return the error to raise for a file that ends before a tensor in it does."""
    return OmforgeError(
        f"{tensor.path} ends inside tensor {tensor.name}",
        f"{missing} of its {tensor.nbytes} bytes are missing",
        "The file changed since the model was loaded: load it again",
    )


def _mapped_chunks(mapped: mmap.mmap, offset: int, length: int) -> Iterator[memoryview]:
    # The mapping is preferred where there is one: the file under its name may be another by now.
    with memoryview(mapped) as view:
        for start in range(offset, offset + length, CHUNK):
            end = min(start + CHUNK, offset + length)
            with view[start:end] as chunk:
                yield chunk
            _give_back(mapped, start, end - start)


def release(tensor: ir.TensorProtocol, first: int, last: int) -> None:
    """Give back the memory of bytes first..last of a mapped tensor; they can be read again.

    Without it, a pass over all weights would count as memory in use. Does nothing for a tensor that
    is not mapped.
    """
    if isinstance(tensor, ir.ExternalTensor) and tensor.raw is not None:
        _give_back(tensor.raw, (tensor.offset or 0) + first, last - first)


def _give_back(mapped: mmap.mmap, offset: int, length: int) -> None:
    page = mmap.ALLOCATIONGRANULARITY
    first, last = -(-offset // page) * page, (offset + length) // page * page
    if last > first:
        mapped.madvise(mmap.MADV_DONTNEED, first, last - first)


def write_error(file: Path, error: OSError) -> OmforgeError:
    """Return the error to raise for a write that the operating system refused."""
    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    return OmforgeError(
        f"cannot write {file}",
        error.strerror or str(error),
        "Free space on that disk or write to another; nothing was replaced" if full else "",
    )


@contextlib.contextmanager
def writing(file: Path) -> Generator[None, None, None]:
    """Say of a write that the operating system refuses which file it was for."""
    try:
        yield
    except OSError as error:
        raise write_error(file, error) from error


@contextlib.contextmanager
def replacing(file: Path) -> Generator[Path, None, None]:
    """Yield a temporary name beside `file`; at the end it becomes `file`, on any error it goes."""
    temporary = temporary_sibling(file)
    try:
        yield temporary
        os.replace(temporary, file)
    except BaseException:  # Ctrl-C too must leave nothing behind
        temporary.unlink(missing_ok=True)
        raise


def temporary_sibling(file: Path) -> Path:
    """Return an unused hidden name in the same folder, from which a rename is atomic."""
    return file.with_name(f".{file.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")


def _write_at(file: int, chunk: memoryview | bytes, offset: int) -> None:
    """Write all of a chunk: the system may take a part of it."""
    done = os.pwrite(file, chunk, offset)
    while done < len(chunk):
        done += os.pwrite(file, chunk[done:], offset + done)


def _samples(chunk: memoryview | bytes, start: int) -> Iterator[memoryview | bytes]:
    """Yield the samples in a chunk whose first byte is byte `start` of a tensor.

    A digest of all bytes would take longer than writing them; where samples are equal, all bytes
    are compared.
    """
    for at in range(start // STRIDE * STRIDE - start, len(chunk), STRIDE):
        if at + SAMPLE > 0:
            yield chunk[max(at, 0) : at + SAMPLE]


class WeightWriter:
    """Writes tensors into one file, equal ones once; several graphs may share it.

    As a context manager it closes at the end of the block, and removes what it wrote on an error.

    Args:
        path: The file, which appears (or is replaced) when the writer is closed.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._temporary = temporary_sibling(self.path)
        self._end = 0
        self._closed = False
        self.nonfinite: dict[str, Nonfinite] = {}
        """Tensors that hold NaN or infinity, by name."""
        self._places: dict[tuple[int, bytes], list[int]] = {}
        # Keyed by identity, so the tensor is kept: a new one could take over a dead one's id.
        self._seen: dict[int, tuple[ir.TensorProtocol, tuple[int, int]]] = {}
        try:
            self._file = os.open(self._temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
        except OSError as error:
            raise write_error(self.path, error) from error

    def add(self, tensor: ir.TensorProtocol) -> tuple[int, int]:
        """Write a tensor unless the same bytes are there, whatever their type and shape.

        Returns:
            (offset, length) in bytes.

        Raises:
            OmforgeError: The disk is full, or the tensor's own file has become shorter.
        """
        if isinstance(tensor, ViewTensor):
            offset, _ = self.add(tensor.source)
            return offset + tensor.start, tensor.nbytes
        # Only these are known not to change between two graphs that share the writer.
        if id(tensor) in self._seen:
            return self._seen[id(tensor)][1]
        place = self._add(tensor)
        if isinstance(tensor, ir.ExternalTensor | StreamedTensor):
            self._seen[id(tensor)] = (tensor, place)
        return place

    def _add(self, tensor: ir.TensorProtocol) -> tuple[int, int]:
        alignment = LARGE_ALIGNMENT if tensor.nbytes >= LARGE else SMALL_ALIGNMENT
        offset = -(-self._end // alignment) * alignment
        written: dict[int, tuple[int, bytes]] = {}

        def write(start: int, chunk: memoryview | bytes) -> None:
            """Write a piece, from any thread and in any order."""
            _write_at(self._file, chunk, offset + start)
            written[start] = len(chunk), b"".join(_samples(chunk, start))
            self.look(tensor, chunk)

        try:
            if isinstance(tensor, StreamedTensor):
                tensor.store(write)
            else:
                done = 0
                for chunk in chunks(tensor):
                    write(done, chunk)
                    done += len(chunk)
            done = sum(length for length, _ in written.values())
            digest = hashlib.sha256()
            for start in sorted(written):
                digest.update(written[start][1])
            places = self._places.setdefault((done, digest.digest()), [])
            same = next((place for place in places if self._equal(place, offset, done)), None)
        except OSError as error:
            raise write_error(self.path, error) from error
        if same is not None:
            # A duplicate's bytes are overwritten by the next tensor, or cut off by close.
            return same, done
        places.append(offset)
        self._end = offset + done
        return offset, done

    def look(self, tensor: ir.TensorProtocol, content: bytes | memoryview) -> None:
        """Note what a tensor holds that is no number, wherever its bytes go."""
        found = nonfinite(tensor.dtype, content)
        if found:
            name = tensor.name or "without a name"
            self.nonfinite[name] = worse(self.nonfinite.get(name, ""), found)

    def _equal(self, first: int, second: int, length: int) -> bool:
        """Whether two parts of the file have the same bytes."""
        for start in range(0, length, LARGE):
            count = min(LARGE, length - start)
            parts = [os.pread(self._file, count, at + start) for at in (first, second)]
            if parts[0] != parts[1]:
                return False
        return True

    def keep_alive(self, model: ir.Model) -> None:
        """Map the tensors that come from the file that this writer will replace.

        A mapping outlives its file's name, so they keep their values. Costs address space only,
        except for 2-, 4- and 6-bit types, which onnx-ir unpacks to a byte per element.
        """
        if not self.path.exists():
            return
        left = [tensor for _, tensor in all_tensors(model)]
        while left:
            tensor = left.pop()
            if isinstance(tensor, StreamedTensor):
                left.extend(tensor.sources)
            external = isinstance(tensor, ir.ExternalTensor)
            if external and tensor.raw is None and tensor.nbytes and self._replaces(tensor.path):
                tensor.numpy()

    def _replaces(self, source: str) -> bool:
        return os.path.exists(source) and os.path.samefile(source, self.path)

    def close(self) -> None:
        """Finish the file and put it in place. Closing twice is allowed."""
        if self._closed:
            return
        try:
            os.ftruncate(self._file, self._end)
            self._close_file()
            os.replace(self._temporary, self.path)
        except BaseException as error:
            self.discard()
            if isinstance(error, OSError):
                raise write_error(self.path, error) from error
            raise

    def discard(self) -> None:
        """Remove what was written, unless it is already in place."""
        with contextlib.suppress(OSError):
            self._close_file()
        self._temporary.unlink(missing_ok=True)

    def _close_file(self) -> None:
        if not self._closed:
            self._closed = True
            os.close(self._file)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is None:
            self.close()
        else:
            self.discard()
