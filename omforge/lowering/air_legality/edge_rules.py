"""Rules for edges: that they lead somewhere, in no circle, and that both ends say the same."""

from __future__ import annotations

from collections.abc import Iterator

from omforge.air.graph import Edge, Op, parse_edge
from omforge.air.show import typed
from omforge.lowering.air_legality.subject import (
    AirSubject,
    Body,
    Call,
    describe,
    is_left_out,
    known,
)
from omforge.lowering.legality.subject import Finding, Rule


def edges_lead_somewhere(subject: AirSubject) -> Iterator[Finding]:
    """Every edge names an operator of the graph and one of its outputs."""
    for body in subject.bodies:
        for op in body.graph.ops:
            for item in op.inputs:
                why = _astray(body, item)
                if why:
                    yield Finding(describe(op), f"it reads {item}", why, 'write "producer:output"')
        for kind, items in (("input", body.graph.inputs), ("output", body.graph.outputs)):
            for item in items:
                edge = parse_edge(item)
                if edge is not None and edge.producer not in body.by_name:
                    yield Finding(
                        f"graph {body.graph.name}",
                        f"it names {item} as an {kind}",
                        "there is no such operator",
                        "leave it out: Data and NetOutput say the same",
                    )


def _astray(body: Body, item: str) -> str:
    edge = parse_edge(item)
    if edge is None:
        return 'that is no "producer:output"' if item else ""
    producer = body.by_name.get(edge.producer)
    if producer is None:
        return "there is no such operator"
    if edge.output >= len(producer.output_desc) or edge.output < -1:
        return f"{describe(producer)} describes {len(producer.output_desc)} output(s)"
    return ""


def edges_make_no_circle(subject: AirSubject) -> Iterator[Finding]:
    """No operator waits for itself, by data or by control."""
    for body in subject.bodies:
        left = _unordered(body)
        if left:
            yield Finding(
                ", ".join(describe(op) for op in left[:3]),
                f"{len(left)} operators need each other in a circle",
                "",
                "take one of the edges out",
            )


def _unordered(body: Body) -> list[Op]:
    """The operators that lie on circles."""
    names = body.by_name.keys()
    needs: dict[str, set[str]] = {
        name: {producer for producer in producers if producer in names}
        for name, producers in body.producers.items()
    }
    # From both ends: what is only behind a circle, or only before one, is none of it.
    for _ in range(2):
        needed: dict[str, set[str]] = {name: set() for name in needs}
        for name, producers in needs.items():
            for producer in producers:
                needed[producer].add(name)
        ready = [name for name, producers in needs.items() if not producers]
        counts = {name: len(producers) for name, producers in needs.items()}
        while ready:
            done = ready.pop()
            for reader in needed[done]:
                counts[reader] -= 1
                if not counts[reader]:
                    ready.append(reader)
        left = {name for name, count in counts.items() if count}
        needs = {name: needed[name] & left for name in left}
    return [body.by_name[name] for name in needs]


def every_input_has_a_description(subject: AirSubject) -> Iterator[Finding]:
    """There is a description for each input, connected or not."""
    for call in subject.calls:
        slots, described = len(call.op.edges), len(call.op.input_desc)
        if slots > described:
            yield Finding(
                call.where,
                f"{slots} inputs, {described} descriptions",
                "GE makes as many slots as there are descriptions",
                "describe each input, also one that is not connected",
            )


def both_ends_of_an_edge_agree(subject: AirSubject) -> Iterator[Finding]:
    """An input is described as its producer describes the output."""
    for body in subject.bodies:
        for call in body.calls:
            for at, edge in enumerate(call.op.edges):
                if edge is not None and at < len(call.op.input_desc):
                    yield from _disagreement(body, call, at, edge)


def _disagreement(body: Body, call: Call, at: int, edge: Edge) -> Iterator[Finding]:
    desc, there = call.op.input_desc[at], body.produced(edge)
    here = known(desc)
    if is_left_out(desc):
        yield Finding(
            call.where,
            f"input {at} is connected, and described as one that is not",
            "dtype undefined and no layout mark an optional input that is left out",
            "describe it as its producer does",
        )
    elif (None not in (here.dtype, there.dtype) and here.dtype != there.dtype) or (
        None not in (here.shape, there.shape) and here.shape != there.shape
    ):
        yield Finding(
            call.where,
            f"input {at} is {typed(desc)}, and comes as {there}",
            "GE takes the producer's, what was written for the other is lost",
            "describe it as its producer does",
        )


_LOADER = "hicann/ge:graph_metadef/graph/serialization/model_serialize.cc"

RULES = (
    Rule(
        "air-edges", "E10041", f"{_LOADER} (HandleNodeNameRef)", edges_lead_somewhere,
        certainty="seen",
    ),
    Rule(
        "air-no-cycles",
        "E19999: the graph cannot be sorted",
        "hicann/ge:compiler/graph/preprocess/graph_prepare.cc (Init)",
        edges_make_no_circle,
    ),
    Rule(
        "air-input-descs", "E10041", f"{_LOADER} (HandleNodeNameRef)",
        every_input_has_a_description, certainty="seen",
    ),
    Rule(
        "air-desc-agrees",
        "it is loaded; inference replaces the description",
        "hicann/ge:compiler/graph/preprocess/graph_prepare.cc (InferShapeForPreprocess)",
        both_ends_of_an_edge_agree,
        certainty="inferred",
    ),
)  # fmt: skip
