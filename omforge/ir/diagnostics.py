"""What a check has to say about one place in a graph, and how many of them are printed.

A diagnostic keeps the place (`where`) apart from the fault (`what`, `why`, `remedy`), so that the
same fault at twenty-four layers is one entry with twenty-four places.
"""

import ast
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache

from onnx_ir import Node

NAME_SCOPES = "pkg.torch.onnx.name_scopes"  # written by torch.onnx.export(dynamo=True)


@dataclass(frozen=True)
class Diagnostic:
    """One fault at one place.

    Attributes:
        where: The place, as `describe` writes it for a node.
        what: What is wrong, without the place: diagnostics that differ only there are grouped.
        why: The rule that is broken, with both sides where there are two.
        remedy: What to do about it.
        code: A stable kebab-case name of the rule ("undefined-value"), for filters and tests.
    """

    where: str
    what: str
    why: str
    remedy: str
    code: str = ""

    def __str__(self) -> str:
        place = f"{self.where}: " if self.where else ""
        return f"{place}{self.what}: {self.why}. {self.remedy}"


def layer_path(node: Node) -> str:
    """Return the module that the exporter made this node from, or "" where it left no trace.

    TorchScript exporters write the path into the node's name
    (`/model/layers.0/self_attn/Softmax` gives `model.layers.0.self_attn`), dynamo ones into the
    metadata as a list of ever longer paths that ends with the traced operation.
    """
    scopes = node.metadata_props.get(NAME_SCOPES)
    if scopes:
        return _innermost_module(scopes)
    name = node.name or ""
    if not name.startswith("/"):
        return ""
    return ".".join(part for part in name.split("/")[:-1] if part)


@lru_cache(maxsize=1 << 14)  # the verifier asks for every node after every pass
def _innermost_module(scopes: str) -> str:
    try:
        paths = ast.literal_eval(scopes)
    except (ValueError, SyntaxError):
        return ""  # metadata is free text: another tool may have put anything there
    if not isinstance(paths, list) or len(paths) < 2:  # pyright: ignore[reportUnknownArgumentType]
        return ""
    return str(paths[-2])  # pyright: ignore[reportUnknownArgumentType]


def describe(node: Node) -> str:
    """Return the words that name a node in a message: operator, name, layer path."""
    op = f"{node.domain}.{node.op_type}" if node.domain else node.op_type
    name = node.name or next((f"-> {v.name}" for v in node.outputs if v.name), "")
    path = layer_path(node)
    place = f" in {path}" if path and not (node.name or "").startswith("/") else ""
    return f"{op} {name}{place}".strip()


def group(diagnostics: Iterable[Diagnostic]) -> list[tuple[Diagnostic, tuple[str, ...]]]:
    """Gather the places of each fault.

    Returns:
        One (first diagnostic, all its places) per distinct fault, in order of first appearance.
    """
    places: dict[tuple[str, str, str, str], list[Diagnostic]] = {}
    for diagnostic in diagnostics:
        key = (diagnostic.code, diagnostic.what, diagnostic.why, diagnostic.remedy)
        places.setdefault(key, []).append(diagnostic)
    return [(same[0], tuple(d.where for d in same if d.where)) for same in places.values()]


def format_diagnostics(diagnostics: Sequence[Diagnostic], places: int = 5) -> str:
    """Return the text of a list of diagnostics, the same fault at many places written once.

    Args:
        diagnostics: What a check found.
        places: How many places of one fault are named before "and 19 more".
    """
    return "\n".join(_format_group(*entry, places) for entry in group(diagnostics))


def _format_group(fault: Diagnostic, where: tuple[str, ...], limit: int) -> str:
    count = f"{len(where)} x " if len(where) > 1 else ""
    code = f" [{fault.code}]" if fault.code else ""
    lines = [f"{count}{fault.what}{code}"]
    lines += [f"    at {place}" for place in where[:limit]]
    if len(where) > limit:
        lines.append(f"    and {len(where) - limit} more")
    lines += [f"    why: {fault.why}"] if fault.why else []
    lines += [f"    do: {fault.remedy}"] if fault.remedy else []
    return "\n".join(lines)
