"""Rules for the inputs and outputs of the model."""

from __future__ import annotations

from collections.abc import Iterator

from omforge.air.graph import NET_OUTPUT, Attr
from omforge.air.names import input_names
from omforge.air.show import typed
from omforge.lowering.air_legality.subject import AirSubject, Call, describe
from omforge.lowering.legality.subject import Finding, Rule


def indices_are_dense(subject: AirSubject) -> Iterator[Finding]:
    """The indices of Data and RefData are 0, 1, 2 and so on, each once."""
    calls = [call for call in subject.root.data() if _index(call) is not None]
    wanted = set(range(len(calls)))
    seen: set[int] = set()
    for call in calls:
        index = _index(call)
        assert index is not None
        if index in seen:
            what = f"the index {index} is another's too"
        elif index not in wanted:
            what = f"the index is {index}, of {len(calls)} inputs"
        else:
            what = ""
        if what:
            yield Finding(call.where, what, "", "number the inputs from 0 without gaps")
        seen.add(index)


def references_come_last(subject: AirSubject) -> Iterator[Finding]:
    """Every RefData has a higher index than every Data."""
    indexed = [(call, _index(call)) for call in subject.root.data()]
    last = max((i for call, i in indexed if call.op.type == "Data" and i is not None), default=-1)
    for call, index in indexed:
        if call.op.type == "RefData" and index is not None and index < last:
            yield Finding(
                call.where,
                f"a RefData has the index {index}, a Data {last}",
                "",
                "give all Data their indices first",
            )


def _index(call: Call) -> int | None:
    attribute: Attr | None = call.op.attributes.get("index")
    value = 0 if attribute is None else attribute.value
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def inputs_are_described_once(subject: AirSubject) -> Iterator[Finding]:
    """A Data has no edges, and its one input is described as its one output."""
    for call in subject.root.data():
        op = call.op
        remedy = "describe x and y alike"
        if any(op.inputs):
            yield Finding(
                call.where, f"it reads {next(filter(None, op.inputs))}", "", "connect nothing to it"
            )
        elif len(op.input_desc) != 1 or len(op.output_desc) != 1:
            counts = f"{len(op.input_desc)} inputs and {len(op.output_desc)} outputs"
            yield Finding(call.where, f"it describes {counts}", "it has one of each", remedy)
        elif _said(call, 0) != _said(call, 1):
            x, y = typed(op.input_desc[0]), typed(op.output_desc[0])
            yield Finding(call.where, f"x is {x}, y is {y}", "", remedy)
        elif op.output_desc[0].dtype == "undefined" or op.output_desc[0].shape is None:
            yield Finding(
                call.where, "it states no dtype and shape", "nothing infers an input's", remedy
            )


def _said(call: Call, side: int) -> tuple[object, ...]:
    desc = (call.op.output_desc if side else call.op.input_desc)[0]
    return desc.dtype, desc.shape, desc.layout


def dims_of_inputs_are_known(subject: AirSubject) -> Iterator[Finding]:
    """Dims of inputs are above 0; those of a RefData in any case, of a Data unless for gears."""
    for call in subject.root.data():
        shape = call.op.output_desc[0].shape if call.op.output_desc else None
        unknown = [dim for dim in shape or () if dim < 0]
        if 0 in (shape or ()):
            yield Finding(call.where, "a dim of the input is 0", "", "give every dim a size")
        elif unknown and call.op.type == "RefData":
            yield Finding(
                call.where,
                "a dim of a RefData is not known",
                "its memory is one for all gears",
                "give every dim a size",
            )
        elif unknown and not subject.gears:
            yield Finding(
                call.where,
                "a dim of the input is not known",
                "atc needs --input_shape for it",
                "give it a size, or check with --gears where --dynamic_dims is meant",
                level="advice",
            )


def outputs_are_gathered(subject: AirSubject) -> Iterator[Finding]:
    """A graph has one NetOutput, whose inputs are all connected and named input0, input1 ..."""
    for body in subject.bodies:
        gathered = [op for op in body.graph.ops if op.type == NET_OUTPUT]
        where = f"graph {body.graph.name}"
        if len(gathered) != 1:
            what = f"the graph has {len(gathered)} NetOutput operators"
            yield Finding(where, what, "", "gather all outputs in one")
            continue
        op = gathered[0]
        names = [input_names(op).get(at, "") for at in range(len(op.input_desc))]
        if not op.edges or None in op.edges:
            yield Finding(
                describe(op),
                "an input is not connected" if op.edges else "it has no inputs",
                "",
                "connect each output of the model, without gaps",
            )
        elif len(names) >= len(op.edges) and names != [f"input{at}" for at in range(len(names))]:
            yield Finding(
                describe(op),
                f"its inputs are named {', '.join(names) or 'nothing'}",
                "",
                "name them input0, input1 and so on",
            )


def something_is_fed(subject: AirSubject) -> Iterator[Finding]:
    """The model has an input."""
    if subject.root.graph.ops and not any(subject.root.data()):
        yield Finding("", "the model has no Data", "", "give it one")


_PREPARE = "hicann/ge:compiler/graph/preprocess/graph_prepare.cc"
_MAIN = "hicann/ge:api/atc/main_impl.cc"
_ARRAYS = "CANN 8.1.RC1:opp/built-in/op_proto/inc/array_ops.h"

RULES = (
    Rule(
        "air-indices",
        "it numbers the inputs again by the order of the operators, without a word; E13025 where "
        "an index is out of range",
        f"{_PREPARE} (CheckAndUpdateInput)",
        indices_are_dense,
    ),
    Rule(
        "air-refdata-last",
        "inputs in another order than the caller's",
        f"{_ARRAYS} (RefData)",
        references_come_last,
    ),
    Rule(
        "air-data-desc",
        "E10041, or E13025",
        f"{_MAIN} (ConstructAndUpdateInputTensors)",
        inputs_are_described_once,
    ),
    Rule(
        "air-input-dims",
        "E13025, or a cache that moves between gears",
        _PREPARE,
        dims_of_inputs_are_known,
    ),
    Rule(
        "air-net-output",
        "outputs that are missing or in another order",
        "hicann/ge:compiler/graph/passes/feature/net_output_pass.cc",
        outputs_are_gathered,
        certainty="inferred",
    ),
    Rule(
        "air-has-inputs",
        "E10003",
        f"{_MAIN} (CreateInputsForInference)",
        something_is_fed,
        certainty="inferred",
    ),
)
