"""Give the inputs' dimensions one set of names, so that their shapes can be compared."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import ClassVar

from omforge import ir
from omforge.ir.dims import Dim, Expr, Opaque, substitute, symbol, symbols
from omforge.ir.infer import infer_model
from omforge.ir.values import attribute, dims, to_shape
from omforge.recognition.cache.joins import FLOATS, find_joins
from omforge.recognition.interface import (
    Interface,
    find_interface,
    stacked_positions,
    states,
    table_rows,
)
from omforge.recognition.views import shape_of
from omforge.rewriting.base import Pass
from omforge.rewriting.events import record

BATCH, SEQ, PAST = symbol("batch"), symbol("seq"), symbol("past")
_TAKEN = frozenset(("batch", "seq", "past"))


@dataclass(frozen=True)
class NameDims(Pass):
    """Name the dynamic dimensions `batch`, `seq` and `past`, whatever the exporter called them.

    Exporters give one size several names (the mask's length is `s53` and the cache's
    `past_sequence`). The tokens are [B, S] by their role. An axis of a cache is `past` where the
    graph appends to it, and has the name of the axis that it must agree with elsewhere. An axis of
    which neither tells anything keeps a name of its own, and never one of these three. Dimensions
    that are numbers stay numbers.
    """

    name: ClassVar[str] = "name-dims"

    def run(self, model: ir.Model) -> int:
        """Name; the number of inputs whose dimensions got new names.

        A graph that is no causal LM keeps its names, and that is an event.
        """
        before = {value: str(value.shape) for value in model.graph.inputs}
        for value in model.graph.inputs:
            _set(value, dims(value))  # numbers written as text become numbers
        infer_model(model)
        try:
            interface = find_interface(model)
        except ir.InputError as error:
            record(model, self.name, "the whole graph", str(error))
        else:
            _name(model, interface)
        return sum(str(value.shape) != text for value, text in before.items())


@dataclass
class _Names:
    """What the exporter's symbols and the open axes of caches stand for."""

    exported: dict[str, set[Dim]] = field(default_factory=dict[str, set[Dim]])
    opened: dict[str, Dim] = field(default_factory=dict[str, Dim])
    """Symbols that stand for one axis of one cache each, as far as they are known."""

    def note(self, old: Dim, new: Dim) -> None:
        """Keep what one of the exporter's symbols turned out to be."""
        if isinstance(old, Expr) and str(old) in symbols(old):
            self.exported.setdefault(str(old), set()).add(new)

    def equal(self, dim: Dim, other: Dim) -> None:
        """Two sizes agree: learn what one of them is, if it is a symbol that is open."""
        for one, two in ((dim, other), (other, dim)):
            one, two = _undivided(self.known(one), self.known(two))
            if isinstance(one, Expr) and str(one) in _open(one) and str(one) not in symbols(two):
                self.opened[str(one)] = two
                return

    def known(self, dim: Dim) -> Dim:
        """A size with what is known in place of open symbols."""
        while found := {n: self.opened[n] for n in symbols(dim) if n in self.opened}:
            dim = substitute(dim, found)
        return dim

    def meant(self, dim: Dim) -> Dim:
        """A size with the one meaning of each of the exporter's symbols that is known by now."""
        found = {n: self.exported[n] for n in symbols(dim) - _TAKEN if n in self.exported}
        return substitute(dim, {n: next(iter(m)) for n, m in found.items() if len(m) == 1})

    def own(self, dim: Dim) -> Dim:
        """A size of the exporter's: by its one meaning elsewhere, else under no name of ours."""
        new: dict[str, Dim] = {}
        for name in symbols(dim):
            meanings = self.exported.get(name, set())
            if len(meanings) == 1:
                new[name] = next(iter(meanings))
            elif name in _TAKEN:
                new[name] = symbol(f"own_{name}")
        return substitute(dim, new)


def _undivided(dim: Dim, other: Dim) -> tuple[Dim, Dim]:
    """Of B*K // K, equal to another size, B*K and K times that: an axis is split without a rest."""
    if isinstance(dim, Expr) and list(dim.terms.values()) == [1]:
        ((atom, *more),) = dim.terms
        if isinstance(atom, Opaque) and atom.op == "floordiv" and not more:
            return atom.left, other * atom.right
    return dim, other


def _open(dim: Expr) -> frozenset[str]:
    return frozenset(name for name in symbols(dim) if name.startswith(_OPEN))


_OPEN = "open_axis_"


def _name(model: ir.Model, interface: Interface) -> None:
    names = _Names()
    exported = {value: shape_of(value) for value in model.graph.inputs}
    width = shape_of(interface.input_ids)[2:]  # of embeddings
    tokens = _named(interface.input_ids, (BATCH, SEQ, *width))[:2]
    roles = {interface.input_ids: (*tokens, *width)}
    if interface.position_ids is not None and len(shape_of(interface.position_ids)) == 2:
        roles[interface.position_ids] = tokens
    stacked = stacked_positions(interface)
    if stacked is not None:
        roles[stacked] = (shape_of(stacked)[0], *tokens)
    for value in interface.extra:
        # A segment or a language of each token: what looks up rows as the tokens do.
        looked_up = len(shape_of(value)) == 2 and table_rows(value) is not None
        if looked_up and not _may_be_cached(interface):
            roles[value] = _named(value, (BATCH, SEQ))
    for value, new in roles.items():
        _assign(value, new, names, exported)
    caches = _open_caches(model)
    infer_model(model)
    pasts = list(_equations(model, names))
    for value in caches:
        shape = tuple(
            old if isinstance(old, int) else _closed(names.meant(names.known(new)), names.own(old))
            for old, new in zip(exported[value], shape_of(value), strict=True)
        )
        _assign(value, shape, names, exported)
        roles[value] = shape
    lengths = [found for dim in pasts if _is_length(found := names.known(dim))]
    # A convolution's state of fixed size is joined with the tokens, too, beside a cache that grows.
    lengths.sort(key=lambda length: length != PAST)
    mask = interface.attention_mask
    if mask is not None and (lengths or not _may_be_cached(interface)):
        total = (lengths[0] if lengths else 0) + tokens[1]
        rows = (tokens[0], total) if len(shape_of(mask)) == 2 else (tokens[0], 1, tokens[1], total)
        roles[mask] = _named(mask, rows)
        _assign(mask, roles[mask], names, exported)
    infer_model(model)
    for state, _ in states(model, interface):
        if state not in roles and (rows := _rows(shape_of(state), tokens[0])) is not None:
            roles[state] = rows
            _assign(state, rows, names, exported)
    for value in model.graph.inputs:
        if value not in roles:
            _set(value, tuple(map(names.own, exported[value])))
    infer_model(model)


def _may_be_cached(interface: Interface) -> bool:
    """Whether keys may come from elsewhere than from the tokens of the step."""
    given = (*(past for past, _ in interface.caches), *interface.extra)
    return any(v.dtype in FLOATS and len(shape_of(v)) > 2 for v in given)


def _is_length(dim: Dim) -> bool:
    return isinstance(dim, int) or dim == PAST


def _closed(found: Dim, own: Dim) -> Dim:
    """What was found for an axis, its own name where that is nothing."""
    return own if isinstance(found, Expr) and _open(found) else found


def _rows(shape: tuple[Dim, ...], batch: Dim) -> tuple[Dim, ...] | None:
    """A recurrent state has a row for each row of tokens, and is of fixed size otherwise."""
    if sum(isinstance(dim, Expr) for dim in shape) != 1:
        return None
    return tuple(batch if isinstance(dim, Expr) else dim for dim in shape)


def _open_caches(model: ir.Model) -> list[ir.Value]:
    """Inputs that are joined with something new, each open axis under a symbol of its own."""
    caches = [join.cache for join in find_joins(model)]
    caches += [value for node in model.graph for value in _attended(node)]
    found = list(dict.fromkeys(caches))
    for number, value in enumerate(found):
        shape = [
            symbol(f"{_OPEN}{number}_{axis}") if isinstance(dim, Expr) else dim
            for axis, dim in enumerate(shape_of(value))
        ]
        _set(value, tuple(shape))
    return found


def _attended(node: ir.Node) -> tuple[ir.Value, ...]:
    """The past keys and values of an `Attention`."""
    if node.op_type != "Attention" or node.domain != "":
        return ()
    return tuple(v for v in node.inputs[4:6] if v is not None and v.is_graph_input())


def _equations(model: ir.Model, names: _Names) -> Iterator[Dim]:
    """Learn from each join what it must agree with; the lengths of the pasts."""
    for join in find_joins(model):
        past, new = shape_of(join.past), shape_of(join.new)
        if len(past) != len(new) or not past:
            continue
        for axis, (dim, other) in enumerate(zip(past, new, strict=True)):
            if axis != join.axis:
                names.equal(dim, other)
        for link in join.path.links:
            if link.node.op_type == "Reshape":
                _as_many(shape_of(link.before), shape_of(link.after), names)
        # An axis that is moved as a part of another is no length by itself.
        names.equal(past[join.axis], PAST)
        yield past[join.axis]
    for node in model.graph:
        for past, new in zip(_attended(node), node.inputs[1:3], strict=False):
            shape, other = shape_of(past), shape_of(new)
            if len(shape) != 4 or len(other) not in (3, 4):
                continue
            names.equal(shape[0], other[0])
            names.equal(shape[2], PAST)
            if len(other) == 4:
                names.equal(shape[1], other[1])
                names.equal(shape[3], other[3])
            elif heads := attribute(node, "kv_num_heads", 0):
                names.equal(shape[1], heads)
                names.equal(shape[3], other[2] // heads)
            yield shape[2]


def _as_many(before: tuple[Dim, ...], after: tuple[Dim, ...], names: _Names) -> None:
    """Two shapes of one number of elements: learn the one size of the first that is open."""
    total = math.prod(map(names.known, after))
    for axis, dim in enumerate(before):
        rest = math.prod(map(names.known, before[:axis] + before[axis + 1 :]))
        if isinstance(dim, Expr) and rest != 0 and (size := total // rest) * rest == total:
            names.equal(dim, size)


def _named(value: ir.Value, names: tuple[Dim, ...]) -> tuple[Dim, ...]:
    """Names for the unknowns of a shape: a number is a promise of the exporter's, and stays."""
    shape = shape_of(value)
    if len(shape) != len(names):
        return shape
    return tuple(
        name if isinstance(old, Expr) else old for old, name in zip(shape, names, strict=True)
    )


def _assign(
    value: ir.Value,
    new: tuple[Dim, ...],
    names: _Names,
    exported: Mapping[ir.Value, tuple[Dim, ...]],
) -> None:
    for old, dim in zip(exported[value], new, strict=True):
        names.note(old, dim)
    _set(value, new)


def _set(value: ir.Value, shape: tuple[Dim, ...] | None) -> None:
    if shape is not None:
        value.shape = to_shape(shape)
