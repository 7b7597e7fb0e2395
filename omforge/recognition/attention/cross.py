"""Attention to an encoder's states: keys and values that no token of the text goes into.

A decoder of Whisper, T5 or BART looks at its own text through a cache, and at what an encoder made
of something else through *memory*: inputs that are given once for a sequence, with a length of
their own. Raised, both are standard `Attention`; what tells them apart is what their keys are made
of, not their name.
"""

from __future__ import annotations

from collections.abc import Iterable

from omforge import ir
from omforge.ir.dims import Dim, Expr, symbols
from omforge.ir.values import known
from omforge.recognition.interface import Interface, find_interface, memory_length, memory_of


def made_of_text(model: ir.Model, interface: Interface) -> set[ir.Value]:
    """The values that depend on tokens or on the cache, otherwise than through their shapes."""
    found: set[ir.Value] = {interface.input_ids, *(past for past, _ in interface.caches)}
    for node in model.graph:
        if any(value in found for value in node.inputs if value is not None):
            found.update(output for output in node.outputs if known(output) is None)
    return found


def cross_attention(model: ir.Model) -> list[ir.Node]:
    """The raised attention blocks that read memory, in the graph's order."""
    blocks = [node for node in model.graph if node.op_type == "Attention" and node.domain == ""]
    if not blocks:
        return []
    try:
        interface = find_interface(model)
    except ir.InputError:  # no language model: nothing in it is text
        return []
    if not memory_of(interface):
        return []
    text = made_of_text(model, interface)
    return [node for node in blocks if _reads_memory(node, text)]


def _reads_memory(node: ir.Node, text: set[ir.Value]) -> bool:
    keys, values = node.inputs[1:3]
    past = node.inputs[4] if len(node.inputs) > 4 else None
    return past is None and keys not in text and values not in text


def memory_lengths(interface: Interface) -> frozenset[str]:
    """The symbols that memory's length has: a number must be put in their place."""
    lengths: Iterable[Dim] = (memory_length(value) for value in memory_of(interface))
    return frozenset(name for dim in lengths if isinstance(dim, Expr) for name in symbols(dim))
