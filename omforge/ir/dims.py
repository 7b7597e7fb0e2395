"""Dimensions as numbers or integer polynomials over symbols.

A dimension of an exported graph is a number or an expression such as `past + seq`. Shape arithmetic
needs sums, products and exact quotients of them, and an equality that sees through spelling. SymPy
(which onnx-ir's own `SymbolicDim` arithmetic uses) answers an add, a multiply and a comparison in
180 us and says that `2*past + 2*seq` differs from `2*(past + seq)`; the polynomials here take a few
microseconds and are canonical.

Symbols stand for sizes, so they are never negative.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache, reduce
from typing import TypeAlias

from omforge.ir.errors import InputError


@dataclass(frozen=True)
class Opaque:
    """A quotient, remainder, minimum or maximum that no polynomial expresses."""

    op: str
    left: Dim
    right: Dim

    def __str__(self) -> str:
        return f"{self.op}({_written(self.left)}, {_written(self.right)})"

    def evaluate(self, bindings: Mapping[str, int]) -> int:
        """Its value with numbers in place of symbols.

        Raises:
            InputError: A symbol has no binding, or the divisor is 0.
        """
        left, right = evaluate(self.left, bindings), evaluate(self.right, bindings)
        return evaluate(_apply(self, left, right), bindings)

    @property
    def is_nonnegative(self) -> bool:
        """Whether it is at least 0 for all sizes."""
        left, right = is_nonnegative(self.left), is_nonnegative(self.right)
        match self.op:
            case "mod":  # the sign of the divisor
                return right
            case "max":
                return left or right
            case _:
                return left and right


Atom: TypeAlias = str | Opaque
Monomial: TypeAlias = tuple[Atom, ...]


class Expr:
    """An immutable polynomial with integer coefficients that is not a plain number.

    Build one with `symbol` or `parse_dim`, and combine with `+ - * // %`; a result that is a number
    comes back as `int`. Two expressions are equal when their polynomials are.
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

    def __rmod__(self, other: int) -> Dim:
        return modulo(other, self)

    def __str__(self) -> str:
        if list(self._terms.values()) == [1]:
            (monomial,) = self._terms
            if len(monomial) == 1 and isinstance(monomial[0], str) and _parse(monomial[0]) == self:
                return monomial[0]  # a lone name stays as the exporter wrote it
        return _written(self)

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
    if right == 0:
        raise ZeroDivisionError(f"{left} // 0 in shape arithmetic")
    if isinstance(left, int) and isinstance(right, int):
        return left // right
    quotient = _divide_exactly(left, right)
    return _opaque("floordiv", left, right) if quotient is None else quotient


def _divide_exactly(left: Dim, right: Dim) -> Dim | None:
    """Polynomial long division; None where it leaves a remainder."""
    atoms = sorted({a for dim in (left, right) for m in _terms(dim) for a in m}, key=str)

    def order(monomial: Monomial) -> tuple[int, ...]:
        return (len(monomial), *(monomial.count(atom) for atom in atoms))

    divisor = _terms(right)
    leading = max(divisor, key=order)
    quotient: Dim = 0
    while left != 0:
        terms = _terms(left)
        first = max(terms, key=order)
        rest = _without(first, leading)
        if rest is None or terms[first] % divisor[leading]:
            return None
        part = _from_terms({rest: terms[first] // divisor[leading]})
        quotient, left = quotient + part, left - part * right
    return quotient


def _without(monomial: Monomial, divisor: Monomial) -> Monomial | None:
    rest = list(monomial)
    for atom in divisor:
        if atom not in rest:
            return None
        rest.remove(atom)
    return tuple(rest)


def ceil_divide(left: Dim, right: Dim) -> Dim:
    """`left / right` rounded up, for a divisor above 0."""
    return divide(left + right - 1, right) if modulo(left, right) != 0 else divide(left, right)


def modulo(left: Dim, right: Dim) -> Dim:
    """`left % right`, 0 where the division is exact."""
    if right == 0:
        raise ZeroDivisionError(f"{left} % 0 in shape arithmetic")
    if isinstance(left, int) and isinstance(right, int):
        return left % right
    return 0 if _divide_exactly(left, right) is not None else _opaque("mod", left, right)


def is_nonnegative(dim: Dim) -> bool:
    """Whether it is at least 0 for all sizes; False also when that cannot be told."""
    return all(
        c >= 0 and all(isinstance(atom, str) or atom.is_nonnegative for atom in monomial)
        for monomial, c in _terms(dim).items()
    )


def maximum(left: Dim, right: Dim) -> Dim:
    """The larger of the two."""
    if is_nonnegative(left - right):
        return left
    return right if is_nonnegative(right - left) else _opaque("max", *_sorted(left, right))


def minimum(left: Dim, right: Dim) -> Dim:
    """The smaller of the two."""
    if is_nonnegative(left - right):
        return right
    return left if is_nonnegative(right - left) else _opaque("min", *_sorted(left, right))


def _sorted(left: Dim, right: Dim) -> tuple[Dim, Dim]:
    """In one order, so that `min(a, b)` equals `min(b, a)`."""
    return (left, right) if str(left) <= str(right) else (right, left)


def compare(left: Dim, right: Dim) -> int | None:
    """-1, 0 or 1 as `left` is below, equal to or above `right` for all sizes, else None."""
    difference = left - right
    if difference == 0:
        return 0
    if is_nonnegative(difference - 1):
        return 1
    return -1 if is_nonnegative(difference * -1 - 1) else None


def evaluate(dim: Dim, bindings: Mapping[str, int]) -> int:
    """The number that `dim` is under `bindings`.

    Raises:
        InputError: A symbol has no binding, or a divisor is 0.
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
                bound = ", ".join(sorted(bindings)) or "none"
                raise InputError(
                    f"dimension {dim} has no number",
                    f"symbol {atom!r} is not among the bound ones ({bound})",
                    "Bind it too",
                )
        total += product
    return total


def substitute(dim: Dim, bindings: Mapping[str, Dim]) -> Dim:
    """`dim` with expressions or numbers in place of the symbols that `bindings` names.

    Raises:
        InputError: A divisor becomes 0.
    """
    if isinstance(dim, int):
        return dim
    total: Dim = 0
    for monomial, coefficient in dim.terms.items():
        product: Dim = coefficient
        for atom in monomial:
            if isinstance(atom, Opaque):
                left, right = substitute(atom.left, bindings), substitute(atom.right, bindings)
                product = product * _apply(atom, left, right)
            else:
                product = product * bindings.get(atom, symbol(atom))
        total = total + product
    return total


def _apply(atom: Opaque, left: Dim, right: Dim) -> Dim:
    try:
        return _OPERATIONS[atom.op](left, right)
    except ZeroDivisionError:
        raise InputError(
            f"dimension {atom} has no number", f"its divisor {atom.right} is 0", "Bind it otherwise"
        ) from None


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


_OPERATIONS: Mapping[str, Callable[[Dim, Dim], Dim]] = {
    "floordiv": divide,
    "mod": modulo,
    "max": maximum,
    "min": minimum,
}

# A hyphen between letters is part of a name, since exporters (and `str` here) write spaces around
# the minus of a difference.
_NAME = re.compile(r"[^\W\d]\w*(?:(?:\.|::|-(?=[^\W\d]))\w+)*")
_TOKEN = re.compile(rf"\s*(\d+(?!\w)|{_NAME.pattern}|`(?:[^`]|``)*`|//|\*\*|[-+*/%(),])\s*")


def _written(dim: Dim) -> str:
    """The text of a dimension as a part of a larger one."""
    parts: list[str] = []
    for monomial, coefficient in sorted(
        _terms(dim).items(), key=lambda item: (not item[0], [str(atom) for atom in item[0]])
    ):
        factors = [_spelled(atom) for atom in monomial]
        if abs(coefficient) != 1 or not factors:
            factors.insert(0, str(abs(coefficient)))
        parts.append(f"{'-' if coefficient < 0 else '+'} {'*'.join(factors)}")
    text = " ".join(parts)
    return text[2:] if text.startswith("+ ") else "-" + text[2:]


def _spelled(atom: Atom) -> str:
    """An atom inside an expression: names that would not read back as one are put in backquotes."""
    if isinstance(atom, Opaque) or _NAME.fullmatch(atom):
        return str(atom)
    return "`" + atom.replace("`", "``") + "`"


def parse_dim(text: str | int) -> Dim:
    """Read a dimension as exporters write it: a number, a number as text, a name or an expression.

    Text that is no arithmetic (`unk 0`, `model/Gather_dim_1`) is one symbol of that name.
    """
    return text if isinstance(text, int) else _parse(text)


@lru_cache(maxsize=65536)
def _parse(text: str) -> Dim:
    try:
        return _Parser(text).parse()
    except (ValueError, ArithmeticError, RecursionError):
        return symbol(text)


class _Parser:
    """Recursive descent over the arithmetic that SymPy, torch and `str` above write."""

    def __init__(self, text: str) -> None:
        self._tokens: list[str] = []
        at = 0
        while at < len(text):
            found = _TOKEN.match(text, at)
            if found is None:
                raise ValueError(f"no dimension arithmetic at {text[at:]!r}")
            self._tokens.append(found[1])
            at = found.end()
        self._tokens.append("")

    def parse(self) -> Dim:
        result = self._sum()
        self._expect("")
        return result

    def _next(self) -> str:
        return self._tokens.pop(0)

    def _expect(self, token: str) -> None:
        if (found := self._tokens[0]) != token:
            raise ValueError(f"{found!r} where {token!r} is due")
        if token:
            self._next()

    def _sum(self) -> Dim:
        total = self._product()
        while self._tokens[0] in ("+", "-"):
            sign = 1 if self._next() == "+" else -1
            total = total + self._product() * sign
        return total

    def _product(self) -> Dim:
        total = self._factor()
        while (token := self._tokens[0]) in ("*", "//", "%", "/"):
            self._next()
            factor = self._factor()
            match token:
                case "*":
                    total = total * factor
                case "//":
                    total = divide(total, factor)
                case "%":
                    total = modulo(total, factor)
                case _:
                    total = _ratio(total, factor)
        return total

    def _factor(self) -> Dim:
        if self._tokens[0] == "-":
            self._next()
            return self._factor() * -1
        base = self._atom()
        if self._tokens[0] != "**":
            return base
        self._next()
        exponent = int(self._next())
        if exponent > _HIGHEST_POWER:
            raise ValueError(f"to the power of {exponent}")
        return reduce(lambda total, _: total * base, range(exponent), 1)

    def _atom(self) -> Dim:
        token = self._next()
        if token == "(":
            inner = self._sum()
            self._expect(")")
            return inner
        if token.isdecimal():
            return int(token)
        if token.startswith("`"):
            return symbol(token[1:-1].replace("``", "`"))
        if not _NAME.fullmatch(token):
            raise ValueError(f"{token!r} where a name or a number is due")
        if self._tokens[0] != "(":
            return symbol(token)
        return self._call(token.lower())

    def _call(self, name: str) -> Dim:
        self._expect("(")
        arguments = [self._sum()]
        while self._tokens[0] == ",":
            self._next()
            arguments.append(self._sum())
        self._expect(")")
        operation = _OPERATIONS.get(name)
        if operation is None or len(arguments) < 2:
            raise ValueError(f"no dimension arithmetic: {name}")
        if len(arguments) > 2 and name not in ("max", "min"):
            raise ValueError(f"{name} of {len(arguments)} arguments")
        return reduce(operation, arguments)


_HIGHEST_POWER = 8


def _ratio(left: Dim, right: Dim) -> Dim:
    """`left / right` where that is exact; `a/b` otherwise is a name, as TorchScript writes them."""
    quotient = divide(left, right)
    if quotient * right != left:
        raise ValueError(f"{left} / {right} is not exact")
    return quotient
