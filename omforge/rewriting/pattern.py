"""The pattern language: a piece of graph written as a Python expression.

A pattern is a function of an operator namespace and of named variables; what it returns looks like
the model::

    def pattern(self, op: PatternOps, x: Pat, gamma: Pat, eps: Pat) -> Pat:
        square = op.Pow(x, 2.0) | op.Mul(x, x)
        rms = op.Sqrt(op.Add(op.ReduceMean(square, axes=[-1]), eps))
        return op.Mul(op.Div(x, rms), gamma)

The rules:

1. `a | b` is either, anywhere, the root included.
2. Commutative operators match their inputs in any order, and chains of Add, Mul, And or Or in any
   association: `op.Mul(op.Mul(a, b), c)` is the product of three factors.
3. A variable or sub-pattern used twice is one value (or equal constants).
4. A number matches a constant of that value, whatever its dtype: a scalar, one element, or a splat.
   `op.Mul(x, 0.5)` matches the division of x by 2 too, alone and in a chain.
5. An attribute that the pattern mentions must be equal. **One that it does not mention must have
   its ONNX default.** The wildcard is asked for: `to=ANY`; as an input, `ANY` is any value.
6. `axes=` of a reduction, Squeeze or Unsqueeze is the attribute or the input, as the opset has it.
7. An input that the pattern does not give is absent from the node; so is one that is `None`.
8. `.named("n")` hands a part to the rewrite as `m.n`; `.shared()` lets it be used outside the
   match, which is refused otherwise.

The matcher looks through Identity, casts to the same dtype and reshapes to the same shape itself.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any, Protocol, TypeAlias, cast, overload

from omforge.rewriting import schema

Number: TypeAlias = bool | int | float
Operand: TypeAlias = "Pat | Number | Sequence[Number] | None"

BITWISE = {"BitwiseAnd", "BitwiseOr", "BitwiseXor"}
COMMUTATIVE = frozenset(
    {"Add", "Mul", "And", "Or", "Xor", "Equal", "Max", "Min", "Sum", "Mean", *BITWISE}
)
ASSOCIATIVE = frozenset({"Add", "Mul", "And", "Or"})
SPELLED_BY: Mapping[str, tuple[str, ...]] = {"Mul": ("Div",)}
"""Operators that can stand for another one: a division by a number is a product."""
_REDUCED = ("L1", "L2", "LogSum", "LogSumExp", "Max", "Mean", "Min", "Prod", "Sum", "SumSquare")
AXES_OPERATORS = frozenset({"Squeeze", "Unsqueeze", *(f"Reduce{name}" for name in _REDUCED)})
"""Operators whose axes moved from an attribute to the second input in some opset."""


class Pat:
    """A pattern for one value. Two patterns are the same only if they are one object."""

    def __or__(self, other: Operand) -> "Pat":
        # Nested, not flattened: an alternative that stands elsewhere too must stay one object.
        return Or((self, as_pattern(other)))

    def named(self, name: str) -> "Pat":
        """Make the matched value known to the rewrite as `m.<name>`."""
        return Marked(self, name, may_escape=False)

    def shared(self) -> "Pat":
        """Allow the matched value to be used outside the match; its node then stays."""
        return Marked(self, None, may_escape=True)


class Anything(Pat):
    """The wildcard `ANY`: any value as an input, any value of an attribute."""

    def __str__(self) -> str:
        return "ANY"


ANY = Anything()


@dataclass(frozen=True, eq=False)
class Var(Pat):
    """A pattern variable: any value, the same one wherever the name stands."""

    name: str

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True, eq=False)
class Const(Pat):
    """A constant of a value: a number, or the elements of a one-dimensional tensor."""

    value: Number | tuple[Number, ...]

    def __str__(self) -> str:
        return str(list(self.value)) if isinstance(self.value, tuple) else str(self.value)


@dataclass(frozen=True, eq=False)
class Or(Pat):
    """The first alternative that matches, then the others."""

    alternatives: tuple[Pat, ...]

    def __str__(self) -> str:
        return " | ".join(str(pattern) for pattern in self.alternatives)


@dataclass(frozen=True, eq=False)
class Marked(Pat):
    """A pattern whose value is named, or may be used outside the match."""

    inner: Pat
    name: str | None
    may_escape: bool

    def __str__(self) -> str:
        return self.name or str(self.inner)


@dataclass(frozen=True, eq=False)
class Call:
    """A pattern for one node."""

    op_type: str
    domain: str
    inputs: tuple[Pat | None, ...]
    attributes: Mapping[str, Any]

    def __str__(self) -> str:
        inputs = ", ".join("" if pattern is None else _brief(pattern) for pattern in self.inputs)
        return f"{self.op_type}({inputs})"


@dataclass(frozen=True, eq=False)
class Output(Pat):
    """A pattern for one output of a node."""

    call: Call
    index: int

    def __str__(self) -> str:
        return str(self.call)


def _brief(pattern: Pat) -> str:
    """One level of a pattern: enough to find the place in the source."""
    match pattern:
        case Output(call=call):
            return f"{call.op_type}(…)"
        case Or(alternatives=alternatives):
            return " | ".join(_brief(alternative) for alternative in alternatives)
        case _:
            return str(pattern)


def as_pattern(operand: Operand) -> Pat:
    """Return a pattern for what may stand in one's place: numbers match constants."""
    if isinstance(operand, Pat):
        return operand
    if isinstance(operand, bool | int | float):
        return Const(operand)
    if operand is None:
        raise TypeError("None stands for an absent input, and has no alternatives")
    return Const(tuple(operand))


class PatternCall(Protocol):
    """What `op.Name` is: inputs by position, attributes by name."""

    @overload
    def __call__(
        self, *inputs: Operand, _domain: str = "", _outputs: None = None, **attributes: Any
    ) -> Pat: ...
    @overload
    def __call__(
        self, *inputs: Operand, _domain: str = "", _outputs: int, **attributes: Any
    ) -> tuple[Pat, ...]: ...
    def __call__(self, *inputs: Any, **attributes: Any) -> Any:
        """Return a pattern for the node's output, or for each with `_outputs=2`."""
        ...


class PatternOps:
    """The operator namespace of patterns: `op.Add(a, b)`, `op.Split(x, axis=0, _outputs=2)`.

    Raises:
        TypeError: What could match nothing: an operator that ONNX does not have, an attribute that
            it never had, more inputs or outputs than it takes, or fewer inputs.
    """

    def __getattr__(self, op_type: str) -> PatternCall:
        if op_type.startswith("_"):
            raise AttributeError(op_type)

        def call(
            *inputs: Operand, _domain: str = "", _outputs: int | None = None, **attributes: Any
        ) -> Any:
            _require_operator(op_type, _domain, len(inputs), _outputs or 1)
            known = schema.attribute_names(op_type, _domain)
            for name in attributes:
                if known is not None and name not in known:
                    raise TypeError(f"{op_type} has no attribute {name!r}, only {sorted(known)}")
            patterns = tuple(None if given is None else as_pattern(given) for given in inputs)
            node = Call(op_type, _domain, patterns, attributes)
            outputs = tuple(Output(node, index) for index in range(_outputs or 1))
            return outputs[0] if _outputs is None else outputs

        return call


def _require_operator(op_type: str, domain: str, inputs: int, outputs: int) -> None:
    """Refuse what no node can be; of a domain that ONNX does not know, anything may be one."""
    known = schema.operators(domain)
    if not known:
        return
    if op_type not in known:
        near = get_close_matches(op_type, known, n=1)
        hint = f"did you mean {near[0]}?" if near else "name its domain with _domain="
        raise TypeError(f"ONNX has no operator {op_type!r}: {hint}")
    takes = schema.arity(op_type, domain)
    if takes is not None:
        schema.require_arity(op_type, takes, inputs, outputs)


Returned: TypeAlias = "Pat | tuple[Pat, ...]"
PatternFunction: TypeAlias = Callable[..., Returned]


class Pattern:
    """A pattern function, called once and analysed.

    Args:
        function: Takes the operator namespace, then one parameter per variable.

    Attributes:
        roots: What the function returned; the first is where matching starts.
        shared: The sub-patterns that stand in two places of one alternative.
        root_ops: The operators that the first root can end with, for early rejection.
    """

    def __init__(self, function: PatternFunction) -> None:
        names = list(inspect.signature(function).parameters)[1:]
        returned = function(PatternOps(), **{name: Var(name) for name in names})
        self.roots = returned if isinstance(returned, tuple) else (returned,)
        for root in cast("tuple[object, ...]", self.roots):
            if not isinstance(root, Pat):
                what = "nothing (None)" if root is None else f"a {type(root).__name__}"
                raise TypeError(f"the function returned {what}, and not a pattern")
        self.shared = frozenset(
            key for key, places in _places(self.roots).items() if len(places) > 1
        )
        self.root_ops = root_ops(self.roots[0])
        self._chains: dict[Call, list[tuple[Pat, ...]]] = {}

    def chains(self, call: Call) -> list[tuple[Pat, ...]]:
        """Return the operands of a commutative pattern, one tuple per alternative.

        Those of an associative operator are all factors of the nested chain. A nested part that
        stands in two places, or is named, is one value and so one operand.
        """
        if call not in self._chains:
            found: list[tuple[Pat, ...]] = [()]
            for pattern in call.inputs:
                assert pattern is not None, f"{call} is commutative and lacks an operand"
                found = [(*head, *tail) for head in found for tail in self._factors(pattern, call)]
            # Operators first: they fail fast, and what they bind decides for the variables.
            self._chains[call] = [tuple(sorted(operands, key=_looseness)) for operands in found]
        return self._chains[call]

    def _factors(self, pattern: Pat, call: Call) -> list[tuple[Pat, ...]]:
        if call.op_type not in ASSOCIATIVE or pattern in self.shared:
            return [(pattern,)]
        match pattern:
            case Output(call=inner) if _same_operator(inner, call) and inner not in self.shared:
                return self.chains(inner)
            case Or(alternatives=alternatives):
                factors = [f for option in alternatives for f in self._factors(option, call)]
                return factors if any(len(f) > 1 for f in factors) else [(pattern,)]
            case _:
                return [(pattern,)]


def root_ops(pattern: Pat) -> frozenset[str] | None:
    """Return the operators that can make a pattern's value, None if any can."""
    match pattern:
        case Output(call=call):
            return frozenset({call.op_type, *SPELLED_BY.get(call.op_type, ())})
        case Marked(inner=inner):
            return root_ops(inner)
        case Or(alternatives=alternatives):
            found: frozenset[str] = frozenset()
            for option in alternatives:
                ops = root_ops(option)
                if ops is None:
                    return None
                found |= ops
            return found
        case _:
            return None


def _same_operator(inner: Call, outer: Call) -> bool:
    return (inner.op_type, inner.domain) == (outer.op_type, outer.domain)


def _looseness(pattern: Pat) -> int:
    match pattern:
        case Var() | Anything():
            return 2
        case Const():
            return 1
        case _:
            return 0


Places: TypeAlias = "dict[Pat | Call, frozenset[tuple[int, int]]]"


def _places(roots: tuple[Pat, ...]) -> Places:
    """Return where each sub-pattern stands: (parent, position) pairs.

    Of two alternatives only one is ever matched, so the one with more places counts.
    """
    known: dict[Pat | Call, Places] = {}

    def below(parent: Pat | Call) -> Places:
        if parent in known:
            return known[parent]
        children = _children(parent)
        merged: Places = {}
        for position, child in enumerate(children):
            found = {**below(child)}
            found[child] = found.get(child, frozenset()) | {(id(parent), position)}
            for key, places in found.items():
                before = merged.get(key, frozenset())
                either = isinstance(parent, Or)
                merged[key] = max(before, places, key=len) if either else before | places
        known[parent] = merged
        return merged

    total: Places = {}
    for position, root in enumerate(roots):
        for key, places in below(root).items():
            total[key] = total.get(key, frozenset()) | places
        total[root] = total.get(root, frozenset()) | {(0, position)}
    return total


def _children(pattern: Pat | Call) -> Sequence[Pat | Call]:
    match pattern:
        case Call(inputs=inputs):
            return [child for child in inputs if child is not None]
        case Output(call=call):
            return [call]
        case Or(alternatives=alternatives):
            return alternatives
        case Marked(inner=inner):
            return [inner]
        case _:
            return []
