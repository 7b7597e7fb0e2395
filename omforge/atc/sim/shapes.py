"""--input_shape, --input_shape_range and the gears of --dynamic_*.

Sources: hicann/ge:compiler/api/aclgrph/option_utils.cc and
compiler/graph/preprocess/multi_batch_options.cc; `file:function` beside each check.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from omforge.atc.sim.command_line import Arguments
from omforge.atc.sim.reports import Refused, Report

Dims = tuple[int, ...]

_TWO_PARTS = "The shape must contain two parts: name and value"
_SAMPLE = '"input_name1:n1,c1,h1,w1"'
_SAMPLE_DIGITS = '"input_name1:1,3,224,224"'
_SAMPLE_RANGE = '"input_name1:n1~n2,c1,h1,w1"'
_LONG_MAX = 2**63 - 1
_LEAST_GEARS = 2


@dataclass(frozen=True)
class Gears:
    """The chosen profiles: one number for each -1 of --input_shape, in its order."""

    kind: str  # dynamic_batch_size, dynamic_image_size or dynamic_dims
    profiles: tuple[Dims, ...]


@dataclass(frozen=True)
class Shapes:
    """What the command line says of the inputs' shapes.

    Attributes:
        dims: By input; a range that is not one number is -1.
        ranges: By input with a range, (low, high) per dim.
        gears: Profiles, if any.
    """

    dims: Mapping[str, Dims]
    ranges: Mapping[str, tuple[Dims, ...]]
    gears: Gears | None


def read_shapes(arguments: Arguments, report: Report) -> Shapes:
    """Read and check every flag about shapes, in atc's order.

    Raises:
        Refused: One is wrong.
    """
    text, ranges_text = _as_ranges(arguments, report)
    kinds = [
        k for k in ("dynamic_batch_size", "dynamic_image_size", "dynamic_dims") if arguments[k]
    ]
    if arguments["input_hint_shape"] and kinds:
        # option_utils.cc:CheckHintShapeConflictWithDynamicParam
        report.error(
            "E10001",
            parameter="--input_hint_shape",
            value=arguments["input_hint_shape"],
            reason="input_hint_shape cannot be used with dynamic_batch_size, "
            "dynamic_image_size or dynamic_dims.",
        )
        raise Refused
    if len(kinds) + bool(ranges_text) > 1:  # option_utils.cc:CheckDynamicInputParamValid
        report.error("E10009")
        raise Refused
    ranges = _parse_ranges(ranges_text, report) if ":" in ranges_text else {}
    if not kinds:
        dims = dict(_parse(text, report, dynamic=False)) if text else {}
        dims |= {name: tuple(a if a == b else -1 for a, b in each) for name, each in ranges.items()}
        return Shapes(dims, ranges, None)
    if not text:
        report.error("E10004", parameter="input_shape")
        raise Refused
    pairs = _parse(text, report, dynamic=True)
    dims = dict(pairs)
    return Shapes(dims, {}, _gears(kinds[0], arguments[kinds[0]], pairs, arguments, report))


def _as_ranges(arguments: Arguments, report: Report) -> tuple[str, str]:
    """option_utils.cc:CheckAndTransferInputShapeToRange."""
    shape, ranges = arguments["input_shape"], arguments["input_shape_range"]
    if ranges:
        return "", ranges
    if any(arguments[k] for k in ("dynamic_batch_size", "dynamic_image_size", "dynamic_dims")):
        if "~" in shape:
            report.error("E10040")
            raise Refused
        return shape, ""
    if "~" not in shape and "-1" not in shape:
        return shape, ""
    if ":" not in shape:
        for part in shape.split(";"):
            _check_range_characters(part, report)
        return "", ",".join(f"[{part}]" for part in shape.split(";"))
    parts: list[str] = []
    for part in shape.split(";"):
        name, colon, value = part.rpartition(":")
        if not colon or not name:
            reason = _TWO_PARTS if not colon else "The input name is empty"
            report.error("E10002", shape=part, reason=reason, sample=_SAMPLE_RANGE)
            raise Refused
        if not value:
            continue  # a scalar
        _check_range_characters(value, report)
        parts.append(f"{name}:[{value}]")
    return "", ";".join(parts)


def _check_range_characters(value: str, report: Report) -> None:
    if re.search(r"[^0-9 ,~-]", value):
        report.error("E10002", shape=value, reason=_TWO_PARTS, sample=_SAMPLE_RANGE)
        raise Refused


def _parse(text: str, report: Report, *, dynamic: bool) -> list[tuple[str, Dims]]:
    """option_utils.cc:ParseInputShape."""
    pairs: list[tuple[str, Dims]] = []
    for part in text.split(";"):
        name, colon, value = part.rpartition(":")
        if not colon:
            report.error("E10002", shape=part, reason=_TWO_PARTS, sample=_SAMPLE)
            raise Refused
        dims = [_dim(word, part, report) for word in value.split(",")] if value else []
        for dim in dims:
            if dim <= 0 and not dynamic:
                report.error("E10011", shape=part, result=dim)
                raise Refused
        pairs.append((name.strip(), tuple(dims)))
    return pairs


def _dim(word: str, part: str, report: Report) -> int:
    if "." in word:
        reason = "The float number is unsupported"
        report.error("E10002", shape=part, reason=reason, sample=_SAMPLE_DIGITS)
        raise Refused
    number = re.match(r"\s*([+-]?[0-9]+)", word)  # stol reads a prefix
    if number is None:
        report.error("E10014", parameter="input_shape", value=word)
        raise Refused
    value = int(number.group(1))
    if not -_LONG_MAX - 1 <= value <= _LONG_MAX:
        report.error("E10013", parameter="input_shape", value=word)
        raise Refused
    if not re.fullmatch(r"-?[0-9]+", word.strip()):
        report.error("E10002", shape=part, reason="It is not a digit", sample=_SAMPLE_DIGITS)
        raise Refused
    return value


def _parse_ranges(text: str, report: Report) -> dict[str, tuple[Dims, ...]]:
    """option_utils.cc:ParseInputShapeRange."""
    found: dict[str, tuple[Dims, ...]] = {}
    for part in text.split(";"):
        name, colon, value = part.rpartition(":")
        if not colon or not value:
            reason = "The shape has a parameter name, whose value cannot be empty"
            reason = reason if colon else _TWO_PARTS
            sample = '"input_name1:[n1~n2,c1,h1,w1]"'
            report.error("E10048", shape_range=text, reason=reason, sample=sample)
            raise Refused
        if [c for c in value if c in "[]"] != ["[", "]"]:
            reason = "The value can only contains a pair of '[]'"
            sample = '"input_name1:[n1~n2,c1,h1,w1]"'
            report.error("E10048", shape_range=value, reason=reason, sample=sample)
            raise Refused
        inner = value.removeprefix("[").removesuffix("]")
        found[name.strip()] = tuple(_range(word, inner, report) for word in inner.split(","))
    return found


def _range(word: str, text: str, report: Report) -> Dims:
    ends = word.split("~")
    for end in ends:
        if not re.fullmatch(r"\s*[+-]?[0-9]+\s*", end):
            reason = "The current string cannot be converted to a number"
            report.error("E10048", shape_range=end, reason=reason, sample='"16"')
            raise Refused
    numbers = [int(end) for end in ends]
    if len(numbers) == 1:
        return (numbers[0], numbers[0]) if numbers[0] >= 0 else (1, -1)
    if len(numbers) != 2 or min(numbers) < 0:
        reason, sample = "The format of the shape range is invalid", '"[1~20,3,3~6,-1]"'
        report.error("E10048", shape_range=text, reason=reason, sample=sample)
        raise Refused
    return numbers[0], numbers[1]


def _gears(
    kind: str,
    text: str,
    pairs: Sequence[tuple[str, Dims]],
    arguments: Arguments,
    report: Report,
) -> Gears:
    if kind == "dynamic_batch_size":
        _check_batch(text, pairs, report)
        return Gears(kind, tuple((int(word),) for word in text.split(",") if word))
    if kind == "dynamic_image_size":
        _check_image(text, pairs, arguments["input_format"], report)
    else:
        _check_dims(text, sum(dims.count(-1) for _, dims in pairs), report)
    groups = (group.split(",") for group in text.split(";") if group)
    return Gears(kind, tuple(tuple(int(word) for word in group if word) for group in groups))


def _check_batch(text: str, pairs: Sequence[tuple[str, Dims]], report: Report) -> None:
    """option_utils.cc:CheckDynamicBatchSizeInputShapeValid."""
    batches = 0
    for _, dims in sorted(pairs):
        if not dims:
            report.error("E10012")
            raise Refused
        if dims[0] != -1:
            continue
        bad = next((i for i, dim in enumerate(dims) if i and dim < 0), None)
        if bad is None:
            batches += 1
        else:
            # The registry's arguments stand in this order.
            report.error("E10018", shape=dims[bad], index=bad)
    if not batches:
        report.error("E10031")
        raise Refused
    if re.search(r"[^0-9,]", text):
        reason = 'It can only contain digits and ",".'
        report.error("E10003", parameter="dynamic_batch_size", value=text, reason=reason)
        raise Refused


def _check_image(text: str, pairs: Sequence[tuple[str, Dims]], layout: str, report: Report) -> None:
    """option_utils.cc:CheckDynamicImagesizeInputShapeValid."""
    axes = {"NCHW": (2, 3), "": (2, 3), "NHWC": (1, 2)}.get(layout)
    images = 0
    for _, dims in sorted(pairs):
        if -1 not in dims:
            continue
        if axes is None:
            reason = (
                "When --dynamic_image_size is set, the input format only supports NCHW or NHWC."
            )
            report.error("E10003", parameter="input_format", value=layout, reason=reason)
        if axes is None or len(dims) != 4 or [i for i, d in enumerate(dims) if d == -1] != [*axes]:
            report.error("E10019")
            raise Refused
        images += 1
    if not images:
        report.error("E10019")
        raise Refused
    if re.search(r"[^0-9, ;]", text):
        reason = 'It can only contain digits, ",", " " and ";".'
        report.error("E10003", parameter="dynamic_image_size", value=text, reason=reason)
        raise Refused
    if any(len(group.split(",")) != 2 for group in text.removesuffix(";").split(";")):
        report.error("E10020", dynamic_image_size=text)
        raise Refused


def _check_dims(text: str, unknown: int, report: Report) -> None:
    """option_utils.cc:CheckDynamicDimsInputShapeValid and CheckAndParseDynamicDims."""
    if not unknown:
        report.error(
            "E10001",
            parameter="--input_shape's dynamic dim num",
            value="0",
            reason="At least one dim should be -1 when dynamic_dims is set.",
        )
        raise Refused
    text = text.removesuffix(";")
    if not text:
        report.error("E10058", parameter="--dynamic_dims")
        raise Refused
    for group in text.split(";"):
        words = group.split(",")
        if len(words) != unknown:
            reason = "Each setting needs to be consistent with the number of -1 in the input shape."
            report.error("E10003", parameter="dynamic_dims", value=text, reason=reason)
            raise Refused
        for word in words:
            if re.search(r"[^0-9]", word):
                reason = "Dynamic dims must be a positive integer."
                report.error("E10001", parameter="--dynamic_dims", value=word, reason=reason)
                raise Refused


def check_gears(shapes: Shapes, report: Report) -> None:
    """Check the profiles against each other and the inputs, as atc does once the model is parsed.

    Source: multi_batch_options.cc:CheckDynamicParams, ParserDataToDynamicInfo.

    Raises:
        Refused: They do not fit.
    """
    gears = shapes.gears
    if gears is None:
        return
    if len(gears.profiles) < _LEAST_GEARS:
        report.error("E10035", shapesize=len(gears.profiles), minshapesize=_LEAST_GEARS)
        raise Refused
    for profile in gears.profiles:
        if len(profile) != len(gears.profiles[0]):
            first, other = len(gears.profiles[0]), len(profile)
            report.error("E10037", shapesize1=first, shapesize2=other)
            raise Refused
    if len(set(gears.profiles)) != len(gears.profiles):
        report.error("E10039")
        raise Refused
    if gears.kind != "dynamic_dims":
        return
    used, size = 0, len(gears.profiles[0])
    for name, dims in shapes.dims.items():
        unknown = sum(dim < 0 for dim in dims)
        if unknown > size:
            report.error("E10046", name=name, shape=list(dims))
            raise Refused
        if unknown != size and used + unknown > size:
            report.error("E10045", name=name, shape=list(dims))
            raise Refused
        used += unknown
