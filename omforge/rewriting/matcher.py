"""Matching a pattern against a graph, by backtracking generators.

Every `_match_*` method takes a state and yields each state in which the pattern matches, so that
alternatives and operand orders are tried one after the other. States are never changed. What failed
deepest is kept, because a near miss is only useful with the place and the reason.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from omforge import ir
from omforge.ir.values import constant, constant_tensor, dims
from omforge.rewriting import schema
from omforge.rewriting.equality import (
    SMALL,
    attribute_of,
    divisor_of,
    equal_attributes,
    equals,
    is_inverse,
    keeps_shape,
)
from omforge.rewriting.pattern import (
    ANY,
    ASSOCIATIVE,
    AXES_OPERATORS,
    COMMUTATIVE,
    SPELLED_BY,
    Anything,
    Call,
    Const,
    Marked,
    Number,
    Or,
    Output,
    Pat,
    Pattern,
    Var,
    root_ops,
)

Bound = Mapping[str | Pat | Call, ir.Value | ir.Node]


@dataclass(frozen=True)
class Closest:
    """How far an attempt came.

    Attributes:
        matched: The nodes that matched until then, root first.
        at: The value where it ended.
        part: The part of the pattern that did not match.
        expected: What the part asks for.
        got: What the graph has.
    """

    matched: tuple[ir.Node, ...]
    at: ir.Value | None
    part: str
    expected: str
    got: str

    def __str__(self) -> str:
        where = f" at {self.at.name}" if self.at is not None else ""
        return f"expected {self.expected}{where}, got {self.got}"


@dataclass(frozen=True)
class Found:
    """One way in which a pattern matches.

    Attributes:
        values: The value of every variable and named sub-pattern.
        outputs: The values of the pattern's roots.
        nodes: The matched nodes, root first, with those looked through between them.
        may_escape: The values that the pattern allows to be used outside.
    """

    values: Mapping[str, ir.Value]
    outputs: tuple[ir.Value, ...]
    nodes: tuple[ir.Node, ...]
    may_escape: frozenset[ir.Value]


@dataclass(frozen=True)
class _State:
    bound: Bound = field(default_factory=dict[str | Pat | Call, "ir.Value | ir.Node"])
    nodes: tuple[ir.Node, ...] = ()
    may_escape: frozenset[ir.Value] = frozenset()

    def bind(self, key: str | Pat | Call, what: ir.Value | ir.Node) -> "_State":
        return replace(self, bound={**self.bound, key: what})

    def add(self, nodes: Sequence[ir.Node]) -> "_State":
        new = tuple(node for node in nodes if node not in self.nodes)
        return replace(self, nodes=self.nodes + new) if new else self


class Matcher:
    """Matches one pattern in one graph.

    Args:
        pattern: The pattern.
        opsets: The opset of each domain, which decides the defaults of attributes.

    Attributes:
        closest: The attempt of the last `match` that came deepest, None if the root did not match.
    """

    def __init__(self, pattern: Pattern, opsets: Mapping[str, int]) -> None:
        self.pattern = pattern
        self.opsets = opsets
        self.closest: Closest | None = None
        self._graph: ir.Graph | None = None
        self._inverses: dict[ir.Node, ir.Value] = {}
        self._divisors: dict[ir.Value, npt.NDArray[Any]] = {}

    def match(self, node: ir.Node) -> Iterator[Found]:
        """Yield every way in which the pattern's first root is an output of `node`."""
        self.closest = None
        self._graph = node.graph
        first = self.pattern.root_ops
        if first is not None and node.op_type not in first:
            return
        seen: set[tuple[object, ...]] = set()
        root, *others = self.pattern.roots
        for output in node.outputs:
            for state in self._match(root, output, _State(), None):
                for outputs, last in self._match_others(others, (output,), state):
                    found = _found(outputs, last)
                    key = (*found.values.items(), *outputs, frozenset(found.nodes))
                    if key not in seen:  # Mul(x, x) matches in both orders
                        seen.add(key)
                        yield found

    # --- roots after the first -----------------------------------------------------------------

    def _match_others(
        self, roots: Sequence[Pat], outputs: tuple[ir.Value, ...], state: _State
    ) -> Iterator[tuple[tuple[ir.Value, ...], _State]]:
        if not roots:
            yield outputs, state
            return
        for value in self._candidates(roots[0], state):
            for after in self._match(roots[0], value, state, None):
                yield from self._match_others(roots[1:], (*outputs, value), after)

    def _candidates(self, root: Pat, state: _State) -> Iterator[ir.Value]:
        """Values that a further root can be: matched already, or made from a matched value."""
        if isinstance(root, Output) and root.call in state.bound:
            node = state.bound[root.call]
            assert isinstance(node, ir.Node)
            yield node.outputs[root.index]
            return
        known = state.bound.get(root)
        if isinstance(known, ir.Value):
            yield known
            return
        ops = root_ops(root)
        reached = [value for value in state.bound.values() if isinstance(value, ir.Value)]
        reached += [value for node in state.nodes for value in node.outputs]
        users = dict.fromkeys(user for value in reached for user, _ in value.uses())
        for user in users:
            if user.graph is self._graph and (ops is None or user.op_type in ops):
                yield from user.outputs

    # --- values --------------------------------------------------------------------------------

    def _match(
        self, pattern: Pat | None, value: ir.Value | None, state: _State, user: ir.Node | None
    ) -> Iterator[_State]:
        if pattern is None or value is None:
            if pattern is None and value is None:
                yield state
            else:
                self._fail(
                    state,
                    value,
                    pattern,
                    _words(pattern),
                    "no input" if value is None else "an input",
                )
            return
        match pattern:
            case Anything():
                yield state
            case Var(name=name):
                yield from self._match_variable(name, value, state)
            case Const(value=number):
                yield from self._match_constant(number, value, state, user)
            case Output():
                yield from self._match_output(pattern, value, state)
            case Marked():
                yield from self._match_marked(pattern, value, state, user)
            case Or():
                yield from self._match_or(pattern, value, state, user)
            case _:
                raise TypeError(f"{pattern} is no pattern")

    def _match_variable(self, name: str, value: ir.Value, state: _State) -> Iterator[_State]:
        *_, (source, _) = views(value)
        before = state.bound.get(name)
        if before is None:
            yield state.bind(name, source)
        elif _same(before, source):
            yield state
        else:
            assert isinstance(before, ir.Value)
            self._fail(state, value, name, f"{name}, which is {before.name}", str(source.name))

    def _match_constant(
        self,
        expected: Number | tuple[Number, ...],
        value: ir.Value,
        state: _State,
        user: ir.Node | None,
    ) -> Iterator[_State]:
        *_, (source, _) = views(value)
        array = constant(source, SMALL)
        if array is None:
            self._fail(state, value, None, f"the constant {expected}", _maker(source))
        elif source in self._divisors:
            if not is_inverse(self._divisors[source], expected):
                self._fail(state, value, None, f"the constant {expected}", f"{_few(array)}")
            else:
                yield state
        elif not equals(array, expected):
            self._fail(state, value, None, f"the constant {expected}", f"{_few(array)}")
        elif not isinstance(expected, tuple) and not keeps_shape(array, source, user):
            self._fail(state, value, None, f"the scalar {expected}", f"shape {list(array.shape)}")
        else:
            yield state

    def _match_marked(
        self, pattern: Marked, value: ir.Value, state: _State, user: ir.Node | None
    ) -> Iterator[_State]:
        for after in self._match(pattern.inner, value, state, user):
            marked = after.bind(pattern.name, value) if pattern.name else after
            if pattern.may_escape:
                same = frozenset(source for source, _ in views(value))
                marked = replace(marked, may_escape=marked.may_escape | same)
            yield marked

    def _match_or(
        self, pattern: Or, value: ir.Value, state: _State, user: ir.Node | None
    ) -> Iterator[_State]:
        before = state.bound.get(pattern)
        if before is not None:
            *_, (source, _) = views(value)
            if _same(before, source):
                yield state
            else:
                assert isinstance(before, ir.Value)
                self._fail(state, value, pattern, f"{before.name} again", str(value.name))
            return
        for alternative in pattern.alternatives:
            for after in self._match(alternative, value, state, user):
                if pattern in self.pattern.shared:
                    *_, (source, _) = views(value)
                    yield after.bind(pattern, source)
                else:
                    yield after

    def _match_output(self, pattern: Output, value: ir.Value, state: _State) -> Iterator[_State]:
        call = pattern.call
        for source, noise in views(value):
            node = source.producer()
            if node is None or node.graph is not self._graph or source.index() != pattern.index:
                continue
            if node.domain != call.domain or self._operands(node, call.op_type) is None:
                continue
            before = state.bound.get(call)
            if before is node:
                yield state.add(noise)
            elif before is None:
                shared = call in self.pattern.shared
                for after in self._match_call(call, node, state.add(noise)):
                    yield after.bind(call, node) if shared else after
            return
        *_, (source, _) = views(value)
        self._fail(state, value, pattern, call.op_type, _maker(source))

    # --- nodes ---------------------------------------------------------------------------------

    def _match_call(self, call: Call, node: ir.Node, state: _State) -> Iterator[_State]:
        fault = self._attribute_fault(call, node)
        if fault is not None:
            self._fail(state, node.outputs[0], str(call), *fault)
            return
        state = state.add([node])
        inputs = list(self._operands(node, call.op_type) or ())
        if "axes" in call.attributes and call.op_type in AXES_OPERATORS:
            inputs = inputs[:1]  # the axes were compared as an attribute
        while inputs and inputs[-1] is None:
            inputs.pop()
        if call.op_type in COMMUTATIVE and call.domain == "":
            yield from self._match_operands(call, node, inputs, state)
        elif len(inputs) != len(call.inputs):
            expected = f"{call.op_type} of {len(call.inputs)} inputs"
            self._fail(state, node.outputs[0], str(call), expected, str(len(inputs)))
        else:
            yield from self._match_in_order(call.inputs, inputs, state, node)

    def _match_in_order(
        self,
        patterns: Sequence[Pat | None],
        values: Sequence[ir.Value | None],
        state: _State,
        user: ir.Node,
    ) -> Iterator[_State]:
        if not patterns:
            yield state
            return
        for after in self._match(patterns[0], values[0], state, user):
            yield from self._match_in_order(patterns[1:], values[1:], after, user)

    def _match_operands(
        self, call: Call, node: ir.Node, inputs: Sequence[ir.Value | None], state: _State
    ) -> Iterator[_State]:
        operands = [value for value in inputs if value is not None]
        for patterns in self.pattern.chains(call):
            matched = False
            for values, inner in self._operand_lists(call.op_type, operands, len(patterns)):
                matched = True
                yield from self._assign(patterns, values, state.add(inner), node)
            if not matched:
                expected = f"{len(patterns)} operands of {call.op_type}"
                self._fail(state, node.outputs[0], str(call), expected, str(len(operands)))

    def _operand_lists(
        self, op_type: str, operands: Sequence[ir.Value], count: int
    ) -> Iterator[tuple[Sequence[ir.Value], Sequence[ir.Node]]]:
        """Yield the operands of a node, and of the chains below it that have `count` of them."""
        if op_type not in ASSOCIATIVE:
            if len(operands) == count:
                yield operands, ()
            return
        if len(operands) != 2:
            return  # a node that is none of its operator
        left, right = operands
        for share in range(1, count):
            for some, nodes in self._chain(left, op_type, share):
                for others, more in self._chain(right, op_type, count - share):
                    yield (*some, *others), (*nodes, *more)

    def _chain(
        self, value: ir.Value, op_type: str, count: int
    ) -> Iterator[tuple[Sequence[ir.Value], Sequence[ir.Node]]]:
        """Yield the ways to see a value as `count` operands of the same operator."""
        if count == 1:
            yield (value,), ()
            return
        *_, (source, noise) = views(value)
        node = source.producer()
        if node is None or node.graph is not self._graph or node.domain != "":
            return
        inputs = self._operands(node, op_type) or ()
        operands = [value for value in inputs if value is not None]
        if operands and len(operands) == len(inputs):
            for values, inner in self._operand_lists(op_type, operands, count):
                yield values, (*noise, node, *inner)

    def _operands(self, node: ir.Node, op_type: str) -> Sequence[ir.Value | None] | None:
        """The inputs of a node seen as another operator; None if it does not compute that."""
        if node.op_type == op_type:
            return node.inputs
        if node.domain != "" or node.op_type not in SPELLED_BY.get(op_type, ()):
            return None
        if node not in self._inverses:
            divisor = node.inputs[1]
            array = divisor_of(node)
            if array is None or divisor is None:
                return None
            with np.errstate(all="ignore"):
                inverse = np.reciprocal(array)
            if not np.isfinite(inverse.astype(np.float64)).all() or not inverse.all():
                return None
            made = ir.Value(name=f"1/{divisor.name}", const_value=ir.tensor(inverse))
            made.type, made.shape = divisor.type, divisor.shape
            self._inverses[node], self._divisors[made] = made, array
        return node.inputs[0], self._inverses[node]

    def _assign(
        self, patterns: Sequence[Pat], values: Sequence[ir.Value], state: _State, user: ir.Node
    ) -> Iterator[_State]:
        """Match patterns with values in every order."""
        if not patterns:
            yield state
            return
        for index, value in enumerate(values):
            if value in values[:index]:
                continue
            rest = (*values[:index], *values[index + 1 :])
            for after in self._match(patterns[0], value, state, user):
                yield from self._assign(patterns[1:], rest, after, user)

    # --- attributes ----------------------------------------------------------------------------

    def _attribute_fault(self, call: Call, node: ir.Node) -> tuple[str, str] | None:
        """Return (expected, got) of the first attribute that differs."""
        opset = self.opsets.get(call.domain, schema.LATEST)
        defaults = schema.defaults(call.op_type, call.domain, opset)
        for name in dict.fromkeys((*call.attributes, *node.attributes)):
            expected = call.attributes.get(name, defaults.get(name))
            if expected is ANY:
                continue
            got = attribute_of(node, name, defaults.get(name))
            if not equal_attributes(name, got, expected, node):
                hint = "" if name in call.attributes else " (the default)"
                shown = "nothing" if got is None else f"{name}={got}"
                wanted = "nothing" if expected is None else f"{name}={expected}"
                return f"{call.op_type} with {wanted}{hint}", shown
        return None

    def _fail(
        self,
        state: _State,
        at: ir.Value | None,
        part: Pat | str | None,
        expected: str,
        got: str,
    ) -> None:
        if self.closest is None or len(state.nodes) > len(self.closest.matched):
            self.closest = Closest(state.nodes, at, str(part or expected), expected, got)


def views(value: ir.Value) -> Iterator[tuple[ir.Value, tuple[ir.Node, ...]]]:
    """Yield a value, then the same value before each node that does not change it."""
    noise: tuple[ir.Node, ...] = ()
    yield value, noise
    while (node := value.producer()) is not None and _is_noise(node):
        source = node.inputs[0]
        assert source is not None
        value, noise = source, (*noise, node)
        yield value, noise


def _is_noise(node: ir.Node) -> bool:
    if node.domain or not node.inputs or node.inputs[0] is None:
        return False
    match node.op_type:
        case "Identity":
            return True
        case "Cast":
            source = node.inputs[0].dtype
            return source is not None and source == attribute_of(node, "to", None)
        case "Reshape":
            shape = dims(node.outputs[0])
            return shape is not None and shape == dims(node.inputs[0])
        case _:
            return False


def _found(outputs: tuple[ir.Value, ...], state: _State) -> Found:
    values = {
        key: value
        for key, value in state.bound.items()
        if isinstance(key, str) and isinstance(value, ir.Value)
    }
    return Found(values, outputs, state.nodes, state.may_escape)


def _same(before: ir.Value | ir.Node, value: ir.Value) -> bool:
    """Whether two values are one, or equal small constants."""
    if before is value:
        return True
    assert isinstance(before, ir.Value)
    first, second = constant(before, SMALL), constant(value, SMALL)
    if first is None or second is None:
        return False
    return first.dtype == second.dtype and np.array_equal(first, second)


def _words(pattern: Pat | None) -> str:
    return "no input" if pattern is None else str(pattern)


def _maker(value: ir.Value) -> str:
    node = value.producer()
    if node is not None:
        return node.op_type
    if value.is_graph_input():
        return f"the input {value.name}"
    return f"the constant {value.name}" if constant_tensor(value) is not None else str(value.name)


def _few(array: npt.NDArray[Any]) -> str:
    flat = array.ravel()
    shown = ", ".join(f"{element}" for element in flat[:4])
    return shown if flat.size == 1 else f"[{shown}{', …' if flat.size > 4 else ''}]"
