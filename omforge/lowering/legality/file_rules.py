"""Rules for the files: the path and size of the model, and its external data."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import onnx

from omforge.ir.paths import path_fault
from omforge.lowering.legality.file_subject import FileSubject, StoredTensor
from omforge.lowering.legality.subject import Finding, Rule

FILE_LIMIT = (1 << 31) - 1
"""The bytes that a model file may have (hicann/ge:api/atc, E13015)."""

# The characters of a real path, with CJK ideographs (hicann/ge:base/common/util.cc).
_SAFE_PATH = re.compile(r"[A-Za-z0-9_./\u4e00-\u9fa5-]+")

_KEYS = ("location", "offset", "length")


def file_size(subject: FileSubject) -> Iterator[Finding]:
    """The file has at least one byte, and at most 2^31 - 1."""
    if subject.size == 0:
        yield Finding(
            "", "the file is empty", "a model has at least one byte", "export the model again"
        )
    if subject.size > FILE_LIMIT:
        yield Finding(
            "",
            f"the file has {subject.size} bytes",
            f"a model file has at most {FILE_LIMIT}; external data does not count",
            "save the weights as external data",
        )


def path_characters(subject: FileSubject) -> Iterator[Finding]:
    """The real path, links followed, holds only what atc takes."""
    real = os.path.realpath(subject.path)
    strange = sorted(set(_SAFE_PATH.sub("", real)))
    if strange:
        yield Finding(
            "",
            f"the real path {real} has {', '.join(map(repr, strange))} in it",
            "a path has A-Z a-z 0-9 _ - . / and CJK ideographs only; links are followed first",
            "move the model, or give atc a copy in another folder",
        )


def external_keys(subject: FileSubject) -> Iterator[Finding]:
    """External data is described by location, offset and length, as whole numbers."""
    for where, tensor, _ in _external(subject):
        for entry in tensor.external_data:
            number = entry.value.strip()
            if entry.key == "location" or (entry.key in _KEYS and number.isdecimal()):
                continue
            if entry.key in _KEYS:
                what = f"external data with {entry.key} {entry.value!r}"
                why = "it is read as a number"
            else:
                what = f"external data with the key {entry.key!r}"
                why = "any key but location and offset is read as the length"
            yield Finding(
                where,
                what,
                why + (", and would be a wrong one" if number.isdecimal() else ""),
                "save the model again: omforge writes location, offset and length",
                "" if number.isdecimal() else None,
            )


def external_location(subject: FileSubject) -> Iterator[Finding]:
    """External data is beside the model or below it."""
    for where, tensor, _ in _external(subject):
        location = _entries(tensor).get("location", "")
        fault = path_fault(location)
        code = ""
        if not location:
            what, code = "external data without a location", "E19999"
        elif fault:
            what = f"external data at {location!r}, which {fault}"
        else:
            continue
        yield Finding(
            where,
            what,
            "the location is joined to the model's folder",
            "put the weights beside the model, and save it again",
            code,
        )


def external_files(subject: FileSubject) -> Iterator[Finding]:
    """The files with the weights are there, and long enough."""
    folder = Path(os.path.abspath(subject.path)).parent
    sizes: dict[str, int | None] = {}
    for where, tensor, _ in _external(subject):
        entries = _entries(tensor)
        location = entries.get("location", "")
        if path_fault(location):
            continue  # reported by external_location
        if location not in sizes:
            file = folder / location
            sizes[location] = file.stat().st_size if file.is_file() else None
        size = sizes[location]
        offset, length = entries.get("offset", "0"), entries.get("length", "0")
        if size is None:
            what, why = f"{location} is missing", "the parser does not look, what follows it does"
        elif offset.isdecimal() and length.isdecimal() and int(offset) + int(length) > size:
            what = f"{location} is too short"
            why = f"it has {size} bytes, and bytes {offset} to {int(offset) + int(length)} are read"
        else:
            continue
        yield Finding(where, what, why, "copy the weights beside the model, complete")


def external_in_root_only(subject: FileSubject) -> Iterator[Finding]:
    """Constants inside subgraphs are inline."""
    for stored in subject.tensors:
        if stored.external and not stored.in_root:
            yield Finding(
                stored.where,
                "an external tensor inside a subgraph",
                "only tensors of the root graph have their path made relative to the model",
                "move it to the root graph, or store it inline",
            )


def _external(subject: FileSubject) -> Iterator[StoredTensor]:
    return (stored for stored in subject.tensors if stored.external)


def _entries(tensor: onnx.TensorProto) -> Mapping[str, str]:
    return {entry.key: entry.value for entry in tensor.external_data}


_FILE_CONSTANTS = "hicann/ge:parser/parser/onnx/onnx_file_constant_parser.cc"
_PATHS = "hicann/ge:base/common/util.cc"

RULES: tuple[Rule[FileSubject], ...] = (
    Rule("file-size", "E13015", "hicann/ge:api/atc/main_impl.cc", file_size),
    Rule("path-characters", "E10001", _PATHS, path_characters),
    Rule("external-keys", "E10001", _FILE_CONSTANTS, external_keys, "seen"),
    Rule(
        "external-location",
        "E19999, or a file that is not found",
        _FILE_CONSTANTS,
        external_location,
    ),
    Rule("external-files", "E13001 behind the parser", _FILE_CONSTANTS, external_files, "inferred"),
    Rule("external-in-root", "the file is not found", _FILE_CONSTANTS, external_in_root_only),
)
