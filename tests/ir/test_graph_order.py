"""Nodes are sorted on reading; what no order exists for is refused, in bounded time."""

from pathlib import Path

import onnx
import pytest

from omforge import ir
from omforge.ir.graph_order import MOST_NODES, settle

HEAD = '<ir_version: 10, opset_import: ["" : 18, "f" : 1]>'


def settled(text: str) -> onnx.ModelProto:
    message = onnx.parser.parse_model(f"{HEAD} {text}")
    settle(Path("m.onnx"), message)
    return message


def made(graph: onnx.GraphProto) -> list[str]:
    return [node.output[0] for node in graph.node]


def test_nodes_are_sorted_and_otherwise_stay_where_they_are() -> None:
    message = settled("""
        g (float[2] x) => (float[2] y) {
            y = Add (c, a)  a = Neg (x)  d = Abs (x)  c = Mul (b, d)  b = Neg (a)
        }""")
    assert made(message.graph) == ["a", "d", "b", "c", "y"]


def test_a_branch_counts_as_a_reader_and_is_sorted_too() -> None:
    message = settled("""
        g (bool p, float[2] x) => (float[2] y) {
            y = If (p) <
                then_branch = t () => (float[2] u) { u = Neg (v) v = Abs (h) },
                else_branch = e () => (float[2] w) { w = Neg (h) }
            >
            h = Neg (x)
        }""")
    assert made(message.graph) == ["h", "y"]
    assert made(message.graph.node[1].attribute[0].g) == ["v", "u"]


def test_a_branch_that_makes_a_name_itself_reads_none_from_around_it() -> None:
    message = settled("""
        g (bool p, float[2] x) => (float[2] h) {
            y = If (p) <
                then_branch = t () => (float[2] u) { h = Abs (x) u = Neg (h) },
                else_branch = e () => (float[2] w) { w = Neg (x) }
            >
            h = Neg (y)
        }""")
    assert made(message.graph) == ["y", "h"]


def test_a_function_is_sorted() -> None:
    message = settled("""
        g (float[2] x) => (float[2] y) { y = f.twice (x) }
        <opset_import: ["" : 18], domain: "f">
        twice (a) => (b) { b = Neg (c) c = Abs (a) }""")
    assert [node.output[0] for node in message.functions[0].node] == ["c", "b"]


@pytest.mark.parametrize(
    ("nodes", "words"),
    [
        ("y = Add (x, y)", "Add -> y reads its own output"),
        ("a = Add (x, b) b = Neg (a) y = Abs (b)", "2 nodes read each other in a circle: Add -> a"),
        (
            """y = If (p) <
                then_branch = t () => (float[2] u) { u = Neg (y) },
                else_branch = e () => (float[2] w) { w = Neg (x) }
            >""",
            "If -> y reads its own output",
        ),
        (
            """y = If (p) <
                then_branch = t () => (float[2] u) { v = Neg (u) u = Neg (v) },
                else_branch = e () => (float[2] w) { w = Neg (x) }
            >""",
            "2 nodes read each other",
        ),
    ],
)
def test_a_circle_is_refused_by_every_reader(tmp_path: Path, nodes: str, words: str) -> None:
    message = onnx.parser.parse_model(
        f"{HEAD} g (bool p, float[2] x) => (float[2] y) {{ {nodes} }}"
    )
    file = tmp_path / "m.onnx"
    file.write_bytes(message.SerializeToString())
    for read in (ir.load, ir.read_message):
        with pytest.raises(
            ir.InputError, match=r"m\.onnx has nodes that need each other"
        ) as caught:
            read(file)
        assert words in caught.value.why


def bomb(depth: int, calls: int) -> str:
    """Functions of which each calls the next one so many times."""
    text = "g (float[2] x) => (float[2] y) { y = f.f0 (x) }"
    for level in range(depth):
        callee = f"f.f{level + 1}" if level + 1 < depth else "Neg"
        body = " ".join(f"v{i + 1} = {callee} (v{i})" for i in range(calls))
        text += f"""
            <opset_import: ["" : 18, "f" : 1], domain: "f">
            f{level} (v0) => (v{calls}) {{ {body} }}"""
    return text


def test_functions_that_would_become_too_many_nodes_are_refused() -> None:
    with pytest.raises(ir.InputError, match=f"would become .* at most {MOST_NODES}"):
        settled(bomb(18, 2))
    with pytest.raises(ir.InputError, match=r"more than 10\^2[89] nodes"):
        settled(bomb(60, 3))
    settled(bomb(14, 2))


def test_a_long_chain_of_functions_is_refused() -> None:
    with pytest.raises(ir.InputError, match="call each other 2000 deep"):
        settled(bomb(2000, 1))
    settled(bomb(100, 1))


@pytest.mark.parametrize(
    ("first", "second", "chain"), [("one", "one", "one -> one"), ("two", "one", "one -> two")]
)
def test_a_function_that_calls_itself_is_refused(first: str, second: str, chain: str) -> None:
    with pytest.raises(ir.InputError, match=f"a function that calls itself: {chain}"):
        settled(f"""
            g (float[2] x) => (float[2] y) {{ y = Neg (x) }}
            <opset_import: ["f" : 1], domain: "f"> one (a) => (b) {{ b = f.{first} (a) }}
            <opset_import: ["f" : 1], domain: "f"> two (a) => (b) {{ b = f.{second} (a) }}""")
