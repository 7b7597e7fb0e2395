"""What atc wrote, as diagnostics on the nodes of our graph.

atc prints the code of the first error only; the others stand below "TraceBack" as texts
(hicann/metadef:error_manager/error_manager.cc). So lines are recognised by the registered texts as
well (`lowering/data/atc_errors.tsv`, from hicann/ge:base/common/error_registry/error_registry.cc).

The names in them are GE's: nodes that a plugin expands get a suffix, those of a branch or of a
model with gears a prefix or `_ascend_mbatch_...`. The longest of our names in such a name is
the node.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from omforge import ir
from omforge.air.graph import DATA_TYPES, Air
from omforge.lowering.tables import table_rows

# GE's own codes are registered; EZ9999 and the like come from operators.
_CODE = re.compile(r"\b([EW][0-9A-Z]\d{4}|SIM\d{3})\b")
_HEAD = re.compile(
    r"^(?:\w{6})?(?:\[PID: ?\d+\] \S+ )?[\w ]*\(?(?P<code>[EW][0-9A-Z]\d{4}|SIM\d{3})\)?:\s*"
)
_STAMP = re.compile(r"\[PID: ?\d+\] \d{4}-\d\d-\d\d-\S+ ")

# What GE writes ahead of a node's name in errors without registered text.
_NAMED = re.compile(
    r"(?:\bnode(?:\[| name |: ?| )|\bop(?:\[|: ?| name ?)|\bOp ?\[|\bopname ?|src op\[|dst op\[)"
    r"(?P<name>[\w./:-]+)"
)
_INDENT = re.compile(r"^ {2,}\S")

_INNER = ("9999", "8888")
_GE_INNER = "E19999"

# What the parser and the builder add once something else has failed.
_CONSEQUENCES = (
    "Model parse to graph failed",
    "GE GenerateOfflineModel execute failed",
    "Assert ((GraphUtils::ExpandNodeWithGraph",
)

_REMEDIES: Mapping[str, str] = {
    "E13010": "Lower the graph with `omforge compile`, or see what `omforge check` says of it",
    "E16002": "Lower the graph with `omforge compile`, or see what `omforge check` says of it",
    "E13009": "Rename the node; `omforge compile` gives every node a name of its own",
    "E10054": "Run the bundle's compile.sh, which states what is required",
    "E10501": "Install the operator package of this CANN for the SoC",
    "E13015": "Keep weights in a file of their own, as bundles do",
    "E13001": "Move the bundle as a whole: its weights stand beside the graphs",
    "E10041": "Run atc in the bundle's folder, where the weights are; a CANN without GE graphs "
    "needs --front onnx",
    "E16005": "Spell all operators in the default domain, or use a newer CANN",
}
_OTHERWISE = "See its log, and run `omforge check` on the graph"
_COMMAND_LINE = "Change that flag: the bundle's compile.sh has the whole command"


@dataclass(frozen=True)
class AtcError:
    """One line of atc's that tells of an error or a warning.

    Attributes:
        code: E13010, EZ9999, W11001, ...
        text: The line without code, time and process.
        arguments: What stands in a registered text, by the registry's names.
    """

    code: str
    text: str
    arguments: Mapping[str, str]

    @property
    def is_warning(self) -> bool:
        """True for W codes."""
        return self.code.startswith("W")


# Where the process says so, it adds the thread.
_END = r"\s*(?:\[(?:THREAD|FUNC):.*)?$"


def codes_of(lines: Iterable[str]) -> dict[str, str]:
    """Return every code with the first line that it stands in, in order of appearance."""
    codes: dict[str, str] = {}
    for line in lines:
        for code in _CODE.findall(line):
            codes.setdefault(code, line.strip())
    return codes


def errors_of(lines: Sequence[str]) -> list[AtcError]:
    """Return the errors and warnings among atc's lines, in their order, each once."""
    found: list[AtcError] = []
    inside = ""
    for line in lines:
        head = _HEAD.match(line)
        if head is not None:
            inside = head["code"]
        elif not _INDENT.match(line):
            inside = ""
            if not _CODE.match(line):
                continue
        error = _read(line, inside)
        if error is not None and error not in found:
            found.append(error)
    return found


def _read(line: str, inside: str) -> AtcError | None:
    """Read a line of an error block, the code of whose first line is `inside`."""
    head = _HEAD.match(line)
    text = line[head.end() :] if head is not None else _STAMP.sub("", line)
    text = text.strip()
    if not text or text.startswith(("TraceBack", "Possible Cause:", "Solution:", "Inner Error")):
        return None
    code, arguments = _recognise(text, head["code"] if head is not None else "")
    if not code:
        own = _CODE.match(text)
        # Below a registered error stand the inner ones that it led to, which have GE's own code.
        below = inside if inside.endswith(_INNER) else _GE_INNER if inside else ""
        code = own.group(1) if own is not None else (head["code"] if head else below)
        text = text[own.end() :].lstrip(":[ ") if own is not None else text
    return AtcError(code, text, arguments) if code else None


def _recognise(text: str, stated: str) -> tuple[str, Mapping[str, str]]:
    """The code and arguments of a registered text; of two codes with one text the stated one."""
    fitting = ((code, pattern.match(text)) for code, pattern in _patterns())
    matches = [(code, found.groupdict()) for code, found in fitting if found is not None]
    own = next((match for match in matches if match[0] == stated), None)
    if own is not None:
        return own
    return matches[0] if matches else ("", {})


@functools.lru_cache(maxsize=1)
def _patterns() -> tuple[tuple[str, re.Pattern[str]], ...]:
    """The registered texts as patterns, those with most fixed letters first."""
    made: list[tuple[int, str, re.Pattern[str]]] = []
    for row in table_rows("atc_errors.tsv"):
        names = [name for name in (row["arguments"] or "").split(",") if name]
        parts = row["message"].split("%s")
        pattern = re.escape(parts[0])
        for index, part in enumerate(parts[1:]):
            name = names[index] if index < len(names) else f"more{index}"
            pattern += f"(?P<{name}>.*?){re.escape(part)}"
        made.append((-len("".join(parts)), row["code"], re.compile(pattern + _END)))
    return tuple((code, pattern) for _, code, pattern in sorted(made, key=lambda item: item[:2]))


class NodeNames:
    """Finds our nodes by the names that GE gives them."""

    def __init__(self, graph: ir.Model | Air) -> None:
        self._places: dict[str, str] = {}
        if isinstance(graph, ir.Model):
            self._place_nodes(graph)
            return
        for op in graph.graph.ops:
            given = op.type in DATA_TYPES
            self._places[op.name] = f"input {op.name}" if given else f"{op.type} {op.name}"

    def _place_nodes(self, model: ir.Model) -> None:
        self._places = {value.name or "": f"input {value.name}" for value in model.graph.inputs}
        unnamed = 0
        for node in model.graph.all_nodes():
            name = node.name or f"{node.op_type}_{unnamed}"  # onnx_parser.cc's automatic name
            unnamed += not node.name
            self._places[name] = ir.describe(node)

    def place(self, name: str) -> str:
        """Return where a GE name is in our graph, or "" if it is not."""
        name = name.strip("[]")
        if name in self._places:
            return self._places[name]
        name = re.sub(r"_ascend_mbatch_\w+$", "", name)
        if name in self._places:
            return self._places[name]
        # A branch's nodes are `<graph>/<node>`, an expanded node's are `<node>_<suffix>`.
        inside = [own for own in self._places if own and _contains(name, own)]
        return self._places[max(inside, key=len)] if inside else ""


def _contains(name: str, own: str) -> bool:
    at = name.find(own)
    if at < 0:
        return False
    before, after = name[:at], name[at + len(own) :]
    return (not before or before[-1] in "/_") and (not after or after[0] in "_/:")


def diagnose(lines: Sequence[str], graph: ir.Model | Air | None) -> list[ir.Diagnostic]:
    """Turn what atc wrote into diagnostics.

    Args:
        lines: All that it wrote.
        graph: What it compiled, for the places; None where it cannot be read.

    Returns:
        One per error, warnings left out; the same error at many nodes can be grouped.
    """
    names = None if graph is None else NodeNames(graph)
    errors = [error for error in errors_of(lines) if not error.is_warning]
    # Only what led to the rest is told, unless nothing else is known.
    causes = [error for error in errors if not error.text.startswith(_CONSEQUENCES)]
    return [
        ir.Diagnostic(
            where=_where(error, names),
            what=_what(error),
            why=error.text,
            remedy=_REMEDIES.get(error.code, _of_its_kind(error.code)),
            code=error.code,
        )
        for error in causes or errors
    ]


def _of_its_kind(code: str) -> str:
    # The registry keeps E10xxx for the command line (error_registry.cc).
    return _COMMAND_LINE if code.startswith("E10") else _OTHERWISE


def _what(error: AtcError) -> str:
    if "optype" in error.arguments:
        return f"atc has no {error.arguments['optype'].rstrip('.')}"
    return "atc refuses it"


def _where(error: AtcError, names: NodeNames | None) -> str:
    given = error.arguments.get("opname", "")
    candidates = [given] if given else list(_names_in(error.text))
    if error.code.startswith("SIM"):
        # The simulation's own texts begin with the place: "node (Op): ...", "input x has ...".
        candidates = error.text.replace(":", " ").split()[:3] + candidates
    if names is None:
        return candidates[0] if candidates else ""
    for name in candidates:
        place = names.place(name)
        if place:
            return place
    return given


def _names_in(text: str) -> Iterator[str]:
    """The names that a text without a registered form holds: marked ones, then any word."""
    for found in _NAMED.finditer(text):
        yield found["name"].partition(":")[0]
    for word in re.findall(r"[\w./-]{4,}", text):
        if any(mark in word for mark in "_/"):
            yield word
