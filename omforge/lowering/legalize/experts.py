"""Mixtures of experts: all experts for all tokens, or the chosen experts' weights and no others.

Before, as it is canonical (`omforge.recognition.experts.block`)::

    up = MatMul(x [T, D], W [E, D, I])                          every weight is read
    y  = Gather(Reshape(MatMul(rows(up), V)), choices * T + token)       [T*k, D]

After, where it moves fewer bytes: at decode, and for few tokens::

    up = MatMul(x of each choice [T*k, 1, D], Gather(W, choices) [T*k, D, I])
    y  = MatMul(rows(up), Gather(V, choices))                   [T*k, 1, D]

A gathered weight is read, written and read again, so that this pays where T*k is less than a third
of E. Integers are gathered as integers, with their scales, and multiplied as such, each choice in a
kernel of its own, where the target has one that takes integers which are no constants; else int8 is
dequantised behind the Gather, and int4, which no Gather takes, is not gathered at all.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

from omforge import ir
from omforge.lowering.legalize.builder import Builder, NotLegal
from omforge.lowering.legalize.choice import Choice
from omforge.lowering.legalize.chosen_experts import gathered
from omforge.lowering.legalize.decision import Decision, Refusal
from omforge.lowering.legalize.traffic import Traffic, bytes_moved, size
from omforge.recognition.experts.block import Block, block_of

EXPERTS = "Experts"
"""What `choices` calls a mixture of experts."""

DENSE, GATHERED = "dense", "gathered"


def legalize_experts(
    op: Builder, model: ir.Model, wanted: str | None, rows: Sequence[Choice]
) -> Iterator[Decision]:
    """Decide for each mixture of experts how its weights are read, and rewrite it so.

    Args:
        op: Records the nodes.
        model: Canonical.
        wanted: The form that was asked for, if one was.
        rows: The table's rows of this front.

    Yields:
        What was decided, block by block.
    """
    by_form = {row.form: row for row in rows}
    opset = model.opset_imports[""]
    for node in list(model.graph):
        block = block_of(node, opset)
        if block is None:
            continue
        yield _decide(op, block, wanted, by_form)


def _decide(op: Builder, block: Block, wanted: str | None, rows: Mapping[str, Choice]) -> Decision:
    name = block.taken.name or block.taken.outputs[0].name or ""
    op.begin(block.taken)
    try:
        result, dense = gathered(op, block)
        now = _moved(dense, op)
        new = tuple(bytes_moved(op.pending, gear) for gear in op.bindings())
    except NotLegal as reason:
        op.abandon()
        refused = (Refusal(GATHERED, str(reason)),)
        return Decision(EXPERTS, name, DENSE, rows[DENSE].reason, (), refused)
    total_now, total_new = (sum(moved.total for moved in each) for each in (now, new))
    chosen = wanted or (GATHERED if total_new < total_now else DENSE)
    other, traffic = (DENSE, now) if chosen == GATHERED else (GATHERED, new)
    why = "another form was asked for" if wanted else "it moves more bytes"
    refused = (Refusal(other, why, traffic),)
    if chosen == DENSE:
        op.abandon()
        return Decision(EXPERTS, name, DENSE, rows[DENSE].reason, now, refused)
    op.commit(result)
    _remove_dead(list(dense))
    return Decision(EXPERTS, name, GATHERED, rows[GATHERED].reason, new, refused)


def _remove_dead(nodes: list[ir.Node]) -> None:
    """Remove those that nothing reads any more: what was decided for them is of no use."""
    left = [node for node in nodes if node.graph is not None]
    while dead := [node for node in left if not any(value.uses() for value in node.outputs)]:
        for node in dead:
            assert node.graph is not None
            node.graph.remove(node, safe=True)
        left = [node for node in left if node not in dead]


def _moved(nodes: Iterable[ir.Node], op: Builder) -> tuple[Traffic, ...]:
    """What every expert moves; weights that are integers count as these."""
    spared = 0
    for node in nodes:
        if node.op_type == "DequantizeLinear":
            stored = sum(size(value, {}) for value in node.inputs if value is not None)
            spared += size(node.outputs[0], {}) - stored
    return tuple(bytes_moved(nodes, gear) - Traffic(weights=spared) for gear in op.bindings())
