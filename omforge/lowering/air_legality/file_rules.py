"""Rules for the file as a whole."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from omforge.air import messages
from omforge.lowering.air_legality.subject import AirSubject
from omforge.lowering.legality.subject import Finding, Rule


def the_file_is_below_2_gib(subject: AirSubject) -> Iterator[Finding]:
    """The file has fewer than 2^31 bytes."""
    if subject.size > messages.LIMIT:
        yield Finding(
            "",
            f"the file has {subject.size} bytes",
            "protobuf parses no message of 2 GiB or more",
            "keep the weights in a file of their own, by FileConstant",
        )


def the_version_is_1(subject: AirSubject) -> Iterator[Finding]:
    """The version of the message is 1, or 0 as GE itself writes it."""
    if subject.size <= messages.LIMIT and subject.air.version not in (0, 1):
        yield Finding("", f"the message has version {subject.air.version}", "", "write 1")


def graphs_have_names_of_their_own(subject: AirSubject) -> Iterator[Finding]:
    """Where a file holds several graphs, each has a name of its own."""
    if len(subject.air.graphs) < 2:
        return
    for name, count in Counter(graph.name for graph in subject.air.graphs).items():
        if count > 1 or not name:
            yield Finding(
                f"graph {name}".strip(),
                f"{count} graphs have one name" if name else "the graph has no name",
                "operators with branches find their graphs by name",
                "rename it",
            )


_MODEL = "hicann/ge:graph_metadef/graph/normal_graph/model.cc"
_LOADER = "hicann/ge:graph_metadef/graph/serialization/model_serialize.cc"

RULES = (
    Rule("air-file-size", "E10041", f"{_MODEL} (LoadFromFile)", the_file_is_below_2_gib),
    Rule(
        "air-version",
        "GE knows no other version of the message",
        f"{_MODEL} (GetVersion)",
        the_version_is_1,
        level="advice",
    ),
    Rule("air-graph-names", "E10041", _LOADER, graphs_have_names_of_their_own),
)
