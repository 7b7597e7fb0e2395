"""Rules for what is written in place: a cache is a RefData, and is read behind its writers.

A ref operator has an output of the name of an input: it writes that input. GE adds no order between
a writer and other readers of the same RefData.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from omforge.air.graph import NET_OUTPUT, Op
from omforge.lowering.air_legality.subject import AirSubject, Body, Call, Operand, describe
from omforge.lowering.legality.subject import Finding, Rule

_VIEWS = ("Reshape", "Identity", "Squeeze", "Unsqueeze", "ExpandDims", "TensorMove", "TransData")
_REMEDY = "write a RefData, directly or through another writer of it"


def nothing_writes_a_constant(subject: AirSubject) -> Iterator[Finding]:
    """What an operator writes is no constant."""
    for body in subject.bodies:
        for call, operand in _written(body):
            producer = body.by_name.get(operand.edge.producer)
            if producer is not None and producer.type in ("Const", "Constant", "FileConstant"):
                yield Finding(call.where, f"it writes {operand.name}, a constant", "", _REMEDY)


def caches_are_references(subject: AirSubject) -> Iterator[Finding]:
    """What an operator writes of the model's inputs is a RefData."""
    for call, operand in _written(subject.root):
        producer = subject.root.by_name.get(operand.edge.producer)
        if producer is not None and producer.type == "Data":
            yield Finding(
                call.where,
                f"it writes {operand.name}, a Data",
                "the runtime may copy a Data, and the copy is written",
                _REMEDY,
            )


def writers_get_the_cache_itself(subject: AirSubject) -> Iterator[Finding]:
    """A writer reads its RefData itself, not what another operator made of it."""
    body = subject.root
    made = _made_of_references(body)
    for call, operand in _written(body):
        if operand.edge.producer in made:
            yield Finding(
                call.where,
                f"it writes {operand.name}, which an operator made of a RefData",
                "only a copy may be written",
                _REMEDY,
            )


def _made_of_references(body: Body) -> set[str]:
    """The operators that only reshape a RefData, or such a shape of it."""
    left = [call.op.name for call in body.typed("RefData")]
    made: set[str] = set()
    while left:
        for op in body.readers.get(left.pop(), ()):
            first = next(iter(op.edges), None)
            if op.type in _VIEWS and first is not None and op.name not in made:
                made.add(op.name)
                left.append(op.name)
    return made


_MOST_STEPS = 20_000_000
"""What is spent on ordering; a model of 7B takes about a million."""


def caches_are_read_behind_their_writers(subject: AirSubject) -> Iterator[Finding]:
    """All that reads or writes one RefData is ordered with each of its writers."""
    body, spent = subject.root, 0
    for name, users in _users(body).items():
        writers = [op for op, writes in users if writes]
        settled: set[str] = set()
        for writer in writers:
            ordered = _ordered_with(body, writer.name)
            spent += len(ordered) + len(users)
            if spent > _MOST_STEPS:
                yield Finding("", "the caches have too many users to be put in order", "", _REMEDY)
                return
            settled.add(writer.name)
            for op, writes in users:
                if op.name in ordered or op.name in settled:
                    continue  # two writers are one finding
                yield Finding(
                    describe(op),
                    f"it {'writes' if writes else 'reads'} {name}, and {writer.name} writes it",
                    "nothing says which comes first",
                    "read the writer's output, or add a control edge",
                )


def _ordered_with(body: Body, name: str) -> set[str]:
    """The operators that come behind one, or before it, by data or by control."""
    found: set[str] = set()
    left = [name]
    while left:
        for op in body.readers.get(left.pop(), ()):
            if op.name not in found:
                found.add(op.name)
                left.append(op.name)
    left = [name]
    while left:
        op = body.by_name.get(left.pop())
        for producer in () if op is None else (*body.producers[op.name],):
            if producer not in found:
                found.add(producer)
                left.append(producer)
    return found


def caches_are_no_outputs(subject: AirSubject) -> Iterator[Finding]:
    """No RefData, and nothing that was written into one, is an output of the model."""
    caches = _caches(subject.root)
    for call in subject.root.typed(NET_OUTPUT):
        for at, edge in enumerate(call.op.edges):
            cache = None if edge is None else caches.get((edge.producer, edge.output))
            if cache is not None:
                yield Finding(
                    call.where,
                    f"the output {at} is the cache {cache}",
                    "zero copy of it cannot be turned off",
                    "leave it out: the caller has the cache already, as an input",
                )


def caches_are_written(subject: AirSubject) -> Iterator[Finding]:
    """Something writes each RefData."""
    caches = set(_caches(subject.root).values())
    written = {
        name for name, users in _users(subject.root).items() if any(writes for _, writes in users)
    }
    for call in subject.root.typed("RefData"):
        readers = subject.root.readers.get(call.op.name, ())
        if call.op.name in caches - written and not any(op.type in _VIEWS for op in readers):
            yield Finding(
                call.where,
                "nothing writes this RefData",
                "a Data can be copied where its memory does not fit, this one fails",
                "make it a Data",
            )


def _written(body: Body) -> Iterator[tuple[Call, Operand]]:
    """Every operator that writes an input, with what is connected to that input."""
    for call in body.calls:
        if call.prototype is None or call.op.type in ("Data", "RefData"):
            continue
        for name in sorted(call.prototype.refs):
            for operand in call.inputs.get(name, ()):
                yield call, operand


def _caches(body: Body) -> Mapping[tuple[str, int], str]:
    """The RefData behind each output that is one: its own, and those of its writers."""
    found = {(call.op.name, 0): call.op.name for call in body.typed("RefData")}
    writers: dict[tuple[str, int], list[tuple[Call, Operand]]] = {}
    for call, operand in _written(body):
        source = (operand.edge.producer, operand.edge.output)
        writers.setdefault(source, []).append((call, operand))
    left = [*found]
    while left:
        source = left.pop()
        for call, operand in writers.get(source, ()):
            places = [one.slot for one in call.inputs[operand.name]]
            results = dict(zip(places, call.outputs.get(operand.name, ()), strict=False))
            result = results.get(operand.slot)
            if result is not None and (call.op.name, result.slot) not in found:
                found[call.op.name, result.slot] = found[source]
                left.append((call.op.name, result.slot))
    return found


def _users(body: Body) -> Mapping[str, list[tuple[Op, bool]]]:
    """By RefData, the operators that read it or a written form of it, and whether they write."""
    caches = _caches(body)
    writing = {(call.op.name, operand.slot) for call, operand in _written(body)}
    users: dict[str, list[tuple[Op, bool]]] = {}
    for op in body.graph.ops:
        found: dict[str, bool] = {}
        for slot, edge in enumerate(op.edges):
            cache = None if edge is None else caches.get((edge.producer, edge.output))
            if cache is not None and op.type != NET_OUTPUT:
                found[cache] = found.get(cache, False) or (op.name, slot) in writing
        for cache, writes in found.items():
            users.setdefault(cache, []).append((op, writes))
    return users


_CONFLICT = "hicann/ge:compiler/graph/optimize/mem_rw_conflict_optimize.cc"
_PREPARE = "hicann/ge:compiler/graph/preprocess/graph_prepare.cc"
_LOAD = "hicann/ge:runtime/v1/graph/load/model_manager/davinci_model.cc"

RULES = (
    Rule("air-ref-const", "E19999", f"{_PREPARE} (CheckRefOp)", nothing_writes_a_constant),
    Rule(
        "air-ref-data",
        "it compiles, and what was written may be lost to the caller",
        _CONFLICT,
        caches_are_references,
        certainty="inferred",
    ),
    Rule(
        "air-ref-view",
        "it compiles, and what was written may be lost to the caller",
        _CONFLICT,
        writers_get_the_cache_itself,
        certainty="inferred",
    ),
    Rule(
        "air-ref-order",
        "it compiles, and the cache is read before it is written, or after",
        _CONFLICT,
        caches_are_read_behind_their_writers,
    ),
    Rule(
        "air-ref-output",
        'a warning, "cannot disable zero copy, may cause precision problem"',
        _LOAD,
        caches_are_no_outputs,
    ),
    Rule(
        "air-ref-written",
        "the run fails where that input cannot be zero-copied",
        _LOAD,
        caches_are_written,
        level="advice",
    ),
)
