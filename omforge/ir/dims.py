"""Dimensions as numbers or integer polynomials over symbols.

A dimension of an exported graph is a number or an expression such as `past + seq`. Shape arithmetic needs
sums, products and exact quotients of them, and an equality that sees through spelling. SymPy (which onnx-ir's
own `SymbolicDim` arithmetic uses) answers an add, a multiply and a comparison in 180 us and says that
`2*past + 2*seq` differs from `2*(past + seq)`; the polynomials here take a few microseconds and are canonical.

Symbols stand for sizes, so they are never negative.
"""

from __future__ import annotations

import ast
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import TypeAlias

from omforge.ir.errors import InputError


@dataclass(frozen=True)
class Opaque:
    """A quotient, remainder, minimum or maximum that no polynomial expresses."""

    op: str
    left: Dim
    right: Dim

    def __str__(self) -> str:
        return f"{self.op}({self.left}, {self.right})"

    def evaluate(self, bindings: Mapping[str, int]) -> int:
        """Its value with numbers in place of symbols."""
        left, right = evaluate(self.left, bindings), evaluate(self.right, bindings)
        match self.op:
            case "floordiv":
                return left // right
            case "mod":
                return left % right
            case "max":
                return max(left, right)
            case _:
                return min(left, right)


Atom: TypeAlias = str | Opaque
Monomial: TypeAlias = tuple[Atom, ...]


class Expr:
    """An immutable polynomial with integer coefficients that is not a plain number.

    Build one with `symbol` or `parse_dim`, and combine with `+ - * // %`; a result that is a number comes back as
    `int`. Two expressions are equal when their polynomials are.
    """

    __slots__ = ("_hash", "_terms")

    def __init__(self, terms: Mapping[Monomial, int]) -> None:
        self._terms = dict(terms)
        self._hash = hash(frozenset(self._terms.items()))

    @property
    def terms(self) -> Mapping[Monomial, int]:
        """Coefficient by monomial; the empty monomial is the constant term."""
        return self._terms

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Expr) and self._terms == other._terms

    def __hash__(self) -> int:
        return self._hash

    def __add__(self, other: Dim) -> Dim:
        terms = dict(self._terms)
        for monomial, coefficient in _terms(other).items():
            terms[monomial] = terms.get(monomial, 0) + coefficient
        return _from_terms(terms)

    __radd__ = __add__

    def __neg__(self) -> Dim:
        return self * -1

    def __sub__(self, other: Dim) -> Dim:
        return self + other * -1

    def __rsub__(self, other: int) -> Dim:
        return self * -1 + other

    def __mul__(self, other: Dim) -> Dim:
        terms: dict[Monomial, int] = {}
        for left, a in self._terms.items():
            for right, b in _terms(other).items():
                monomial = tuple(sorted(left + right, key=str))
                terms[monomial] = terms.get(monomial, 0) + a * b
        return _from_terms(terms)

    __rmul__ = __mul__

    def __floordiv__(self, other: Dim) -> Dim:
        return divide(self, other)

    def __rfloordiv__(self, other: int) -> Dim:
        return divide(other, self)

    def __mod__(self, other: Dim) -> Dim:
        return modulo(self, other)

    def __str__(self) -> str:
        parts: list[str] = []
        for monomial, coefficient in sorted(
            self._terms.items(), key=lambda item: (not item[0], [str(atom) for atom in item[0]])
        ):
            factors = [str(atom) for atom in monomial]
            if abs(coefficient) != 1 or not factors:
                factors.insert(0, str(abs(coefficient)))
            sign = "-" if coefficient < 0 else "+"
            parts.append(f"{sign} {'*'.join(factors)}")
        text = " ".join(parts)
        return text[2:] if text.startswith("+ ") else "-" + text[2:]

    def __repr__(self) -> str:
        return f"Expr({self})"


Dim: TypeAlias = int | Expr


def symbol(name: str) -> Expr:
    """The expression that is one symbol."""
    return Expr({(name,): 1})


def _terms(dim: Dim) -> Mapping[Monomial, int]:
    return dim.terms if isinstance(dim, Expr) else {(): dim}


def _from_terms(terms: Mapping[Monomial, int]) -> Dim:
    kept = {monomial: c for monomial, c in terms.items() if c}
    if not kept:
        return 0
    if len(kept) == 1 and () in kept:
        return kept[()]
    return Expr(kept)


def _opaque(op: str, left: Dim, right: Dim) -> Dim:
    return Expr({(Opaque(op, left, right),): 1})


def divide(left: Dim, right: Dim) -> Dim:
    """`left // right`; exact wherever the polynomial division is."""
    if isinstance(left, int) and isinstance(right, int):
        if right == 0:
            raise ZeroDivisionError(f"{left} // 0 in shape arithmetic")
        return left // right
    if left == right:
        return 1
    if left == 0:
        return 0
    divisor = _terms(right)
    if len(divisor) == 1:
        quotient = _divide_by_monomial(_terms(left), *next(iter(divisor.items())))
        if quotient is not None:
            return quotient
    elif len(_terms(left)) == len(divisor):
        monomial, coefficient = next(iter(divisor.items()))
        first = _terms(left).get(monomial, 0)
        if first % coefficient == 0 and right * (first // coefficient) == left:
            return first // coefficient
    return _opaque("floordiv", left, right)


def _divide_by_monomial(
    terms: Mapping[Monomial, int], divisor: Monomial, coefficient: int
) -> Dim | None:
    quotient: dict[Monomial, int] = {}
    for monomial, c in terms.items():
        rest = list(monomial)
        for atom in divisor:
            if atom not in rest:
                return None
            rest.remove(atom)
        if c % coefficient:
            return None
        quotient[tuple(rest)] = c // coefficient
    return _from_terms(quotient)


def modulo(left: Dim, right: Dim) -> Dim:
    """`left % right`, 0 where the division is exact."""
    if isinstance(left, int) and isinstance(right, int):
        return left % right
    quotient = divide(left, right)
    if right * quotient == left:
        return 0
    return _opaque("mod", left, right)


def is_nonnegative(dim: Dim) -> bool:
    """Whether it is at least 0 for all sizes (symbols are sizes); False also when it cannot be told."""
    return all(c >= 0 for c in _terms(dim).values())


def maximum(left: Dim, right: Dim) -> Dim:
    """The larger of the two."""
    if is_nonnegative(left - right):
        return left
    return right if is_nonnegative(right - left) else _opaque("max", left, right)


def minimum(left: Dim, right: Dim) -> Dim:
    """The smaller of the two."""
    if is_nonnegative(left - right):
        return right
    return left if is_nonnegative(right - left) else _opaque("min", left, right)


def compare(left: Dim, right: Dim) -> int | None:
    """-1, 0 or 1 as `left` is below, equal to or above `right` for all sizes; None if that depends on them."""
    difference = left - right
    if difference == 0:
        return 0
    if is_nonnegative(difference - 1):
        return 1
    return -1 if is_nonnegative(difference * -1 - 1) else None


def evaluate(dim: Dim, bindings: Mapping[str, int]) -> int:
    """The number that `dim` is under `bindings`.

    Raises:
        InputError: A symbol has no binding.
    """
    if isinstance(dim, int):
        return dim
    total = 0
    for monomial, coefficient in dim.terms.items():
        product = coefficient
        for atom in monomial:
            if isinstance(atom, Opaque):
                product *= atom.evaluate(bindings)
            elif atom in bindings:
                product *= bindings[atom]
            else:
                raise InputError(
                    f"dimension {dim} has no number",
                    f"symbol {atom!r} is not among the bound ones ({', '.join(sorted(bindings)) or 'none'})",
                    "Bind it too",
                )
        total += product
    return total


def substitute(dim: Dim, bindings: Mapping[str, Dim]) -> Dim:
    """`dim` with expressions or numbers in place of the symbols that `bindings` names."""
    if isinstance(dim, int):
        return dim
    total: Dim = 0
    for monomial, coefficient in dim.terms.items():
        product: Dim = coefficient
        for atom in monomial:
            if isinstance(atom, Opaque):
                left, right = substitute(atom.left, bindings), substitute(atom.right, bindings)
                product = product * _OPERATIONS[atom.op](left, right)
            else:
                product = product * bindings.get(atom, symbol(atom))
        total = total + product
    return total


def symbols(dim: Dim) -> frozenset[str]:
    """The names of the symbols in it."""
    found: set[str] = set()
    for monomial in _terms(dim):
        for atom in monomial:
            if isinstance(atom, Opaque):
                found |= symbols(atom.left) | symbols(atom.right)
            else:
                found.add(atom)
    return frozenset(found)


_OPERATIONS = {"floordiv": divide, "mod": modulo, "max": maximum, "min": minimum}
_BINARY = {
    ast.Add: lambda a, b: a + b,
    ast.Sub: lambda a, b: a - b,
    ast.Mult: lambda a, b: a * b,
    ast.FloorDiv: divide,
    ast.Div: divide,
    ast.Mod: modulo,
}


def parse_dim(text: str | int) -> Dim:
    """Read a dimension as exporters write it: a number, a number as text, a name or an expression.

    Text that is no arithmetic (`batch.1`, `unk 0`) is one symbol of that name.
    """
    return text if isinstance(text, int) else _parse(text)


@lru_cache(maxsize=65536)
def _parse(text: str) -> Dim:
    try:
        return _from_ast(ast.parse(text.strip(), mode="eval").body)
    except (SyntaxError, ValueError):
        return symbol(text)


def _from_ast(tree: ast.expr) -> Dim:
    match tree:
        case ast.Constant(value=int() as number):
            return number
        case ast.Name(id=name):
            return symbol(name)
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return _from_ast(operand) * -1
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _BINARY:
            return _BINARY[type(op)](_from_ast(left), _from_ast(right))
        case ast.Call(func=ast.Name(id=name), args=[left, right]) if name.lower() in _OPERATIONS:
            return _OPERATIONS[name.lower()](_from_ast(left), _from_ast(right))
        case _:
            raise ValueError(f"no dimension arithmetic: {ast.dump(tree)}")
