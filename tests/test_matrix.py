"""Every export there is: all of its blocks are raised, and its numbers stay."""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from omforge import ir
from omforge.ir import numerics
from omforge.ir.values import dims
from omforge.passes import make_pipeline
from omforge.recognition.interface import Interface, find_interface
from omforge.rewriting.events import events
from tests.exports import EXPORTS, FAMILIES, ROUTES

Feeds = dict[str, np.ndarray]

LAYERS = 2
NORMS = {"bloom": 6, "gemma2": 4 * LAYERS + 1, "qwen3": 4 * LAYERS + 1}
"""Two a layer and the last; gemma2 has some behind attention and MLP too, qwen3 on q and k."""
NO_ROTARY = ("bloom", "gpt2", "opt")  # a bias by position, and learned positions
GATES = {"bloom": "Gelu", "gpt2": "Gelu", "gpt_neox": "Gelu", "gemma2": "Gelu", "opt": "Relu"}

NODES = 60
"""A raised model has at most so many; an export has 170 to 700."""

STRICT = numerics.Tolerance(rtol=1e-4, atol=1e-4)


@dataclass(frozen=True)
class Rows:
    """The sizes of a step; its last row is padded on the left, its first on the right."""

    batch: int
    seq: int
    past: int
    left: int = 0
    right: int = 0


# Windows are of 8 tokens, and one family's frequencies were trained on 64.
STEPS = (
    Rows(1, 1, 0),
    Rows(2, 7, 0, left=3),
    Rows(2, 21, 0, left=2, right=4),
    Rows(2, 1, 30, left=9),
    Rows(2, 5, 4, left=9),  # nothing but padding in one row's first tokens
    Rows(1, 3, 90),
)


def feeds(interface: Interface, rows: Rows) -> Feeds:
    """Inputs of one step."""
    random = np.random.default_rng(rows.past)
    total = rows.past + rows.seq
    mask = np.ones((rows.batch, total), dtype=np.int64)
    mask[-1, : rows.left] = 0
    if rows.right:
        mask[0, -rows.right :] = 0
    positions = np.maximum(np.cumsum(mask, axis=1) - 1, 0)[:, rows.past :]
    made: Feeds = {}
    for value, array in (
        (interface.input_ids, random.integers(0, 320, (rows.batch, rows.seq))),
        (interface.attention_mask, mask),
        (interface.position_ids, positions),
    ):
        if value is not None:
            made[str(value.name)] = array
    for past, _ in interface.caches:
        _, heads, _, size = dims(past) or ()
        shape = (rows.batch, heads, rows.past, size)
        made[str(past.name)] = random.standard_normal(shape).astype(np.float32)
    for value in interface.extra:
        made[str(value.name)] = np.zeros([int(n) for n in dims(value) or ()], np.int64)
    return made


def admitted(route: str) -> Iterator[Rows]:
    """The steps that the exported model can run."""
    for rows in STEPS:
        # GroupQueryAttention takes rows of one length, and one row behind a past.
        if route != "genai" or (rows.batch == 1 and not rows.left):
            yield rows


@pytest.mark.parametrize(("route", "family"), EXPORTS)
def test_raises_every_block_and_keeps_the_numbers(
    route: str, family: str, exported: Callable[[str, str], Path]
) -> None:
    path = exported(route, family)
    original, model = ir.load(path), ir.load(path)
    make_pipeline("raise").run(model)
    ops = Counter(node.op_type for node in model.graph)
    assert ops["Attention"] == LAYERS
    assert ops["RotaryEmbedding"] == (0 if family in NO_ROTARY else 2 * LAYERS)
    norms = ops["RMSNormalization"] + ops["LayerNormalization"]
    assert norms == NORMS.get(family, 2 * LAYERS + 1)
    assert ops[GATES.get(family, "Swish")] == LAYERS
    assert not {"Softmax", "Pow", "ReduceMean", "Sigmoid", "Erf"} & set(ops)
    assert not events(model)
    assert model.graph.num_nodes() <= NODES + 8 * (family in NORMS or family == "gpt_neox")
    interface = find_interface(model)
    for rows in admitted(route):
        given = feeds(interface, rows)
        expected, actual = numerics.run(original, given), numerics.run(model, given)
        assert list(actual) == list(expected)
        for name, reference in expected.items():
            difference = numerics.max_abs_diff(actual[name], reference)
            assert numerics.within(actual[name], reference, STRICT), (
                f"{name} differs by {difference:g} for {rows}"
            )


def test_a_raised_llama_is_small(exported: Callable[[str, str], Path]) -> None:
    model = ir.load(exported("optimum", "llama_gqa"))
    before = model.graph.num_nodes()
    make_pipeline("raise").run(model)
    assert before > 300
    assert model.graph.num_nodes() <= 50


@pytest.mark.parametrize("family", FAMILIES)
def test_every_route_raises_to_the_same_blocks(
    family: str, exported: Callable[[str, str], Path]
) -> None:
    blocks: list[list[tuple[str, tuple[tuple[str, str], ...]]]] = []
    for route in ROUTES:
        model = ir.load(exported(route, family))
        make_pipeline("raise").run(model)
        blocks.append(
            [
                (node.op_type, tuple(sorted((k, str(a.value)) for k, a in node.attributes.items())))
                for node in model.graph
                if node.op_type in ("Attention", "RotaryEmbedding", "RMSNormalization", "Swish")
            ]
        )
    assert all(sorted(found) == sorted(blocks[0]) for found in blocks)
