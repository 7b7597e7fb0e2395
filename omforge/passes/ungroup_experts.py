"""Let every expert compute all tokens, where an export sorts the tokens by expert.

Before, with `rows` any arithmetic that works row by row, and the weights W, V of E experts::

    ids, order = TopK<largest=0>(choices [T, k], flat)      all T*k of them, sorted
    x_sorted   = Gather(x [T, D], order / k)
    up         = Concat(MatMul(x_sorted[those of e], W_e) for each expert e)
    down       = Concat(MatMul(rows(up, bias[ids])[those of e], V_e) for each expert e)
    y          = Gather(down * weight[order], inverse of order)

(or the rows are cut by Split, as many for each expert as chose it, and go back by ScatterND)

After::

    up         = MatMul(x, all W [E, D, I])         [E, T, I], and so down
    y          = Gather(down, choices * T + token) * weight

How many tokens choose an expert depends on the data, and such a size exists in no graph that ATC
compiles to fixed shapes. What is taken in the end is only what a token chose: whatever another
expert makes of it, infinite or not, does not matter. The price is that of a dense layer: every
expert's weights are read, and used for every token.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np

from omforge import ir
from omforge.ir.infer import infer_model
from omforge.ir.values import attribute
from omforge.recognition.experts.row_wise import check_row_wise
from omforge.recognition.experts.sorted_rows import (
    Array,
    End,
    Grouped,
    Sort,
    find_ends,
    find_groups,
    may_sort,
    permutation,
    reached,
    rows_taken,
    sorted_values,
)
from omforge.recognition.experts.weights import find_stack
from omforge.recognition.views import shape_of
from omforge.rewriting.base import Pass
from omforge.rewriting.builder import Builder
from omforge.rewriting.events import record
from omforge.rewriting.match import NoMatch
from omforge.rewriting.splice import Names, splice


@dataclass(frozen=True)
class UngroupExperts(Pass):
    """Replace products of the tokens sorted by expert by products of all tokens."""

    name: ClassVar[str] = "ungroup-experts"

    def run(self, model: ir.Model) -> int:
        """Rewrite; the number of grouped products gone. A sort that stays is an event."""
        sorts = [node for node in model.graph if may_sort(node)]
        if not sorts:
            return 0
        infer_model(model)
        names = Names(model)
        count = 0
        for node in sorts:
            try:
                count += _rewrite(Sort.of(model, node), names)
            except NoMatch as miss:
                record(model, self.name, node, str(miss))
        if count:
            record(
                model,
                self.name,
                f"{count} products of tokens sorted by expert",
                "every expert computes all tokens, since sizes cannot depend on the choice",
            )
            infer_model(model)
        return count


def _rewrite(sort: Sort, names: Names) -> int:
    groups = find_groups(sort)
    if not groups:
        raise NoMatch("no products of sorted rows with each expert's weights follow", sort.node)
    ends = find_ends(sort, groups)
    made = sorted_values(sort, [end.node for end in ends])
    # Rows may be sorted again further on, by the same sort, and depend on what was taken before:
    # these are other nodes, which must lie behind it.
    for together in _by_dependence(ends):
        with Builder(sort.model) as op:
            rows = _Rows(sort, groups, op, made)
            new = [
                rows.summed(end.rows) if end.summed else rows.by_token(end.rows) for end in together
            ]
            old = [end.node.outputs[0] for end in together]
            nodes = [end.node for end in together]
            splice(op, old, new, by=UngroupExperts.name, matched=nodes, names=names)
    return len(groups)


def _by_dependence(ends: Sequence[End]) -> list[list[End]]:
    """Ends that do not depend on each other, together; behind those that they depend on."""
    if len(ends) == 1:
        return [list(ends)]
    nodes = {end.node for end in ends}
    depth: dict[ir.Node, int] = {}
    for end in ends:
        behind = reached([end.node.outputs[0]])
        for node in nodes & behind.keys():
            depth[node] = depth.get(node, 0) + 1
    levels = sorted({depth.get(node, 0) for node in nodes})
    return [[end for end in ends if depth.get(end.node, 0) == level] for level in levels]


@dataclass
class _Rows:
    """The sorted rows made anew: of every expert and token, or in the order of the tokens.

    Attributes:
        sort: What they were sorted by.
        groups: Their products with the experts' weights.
        op: Records the nodes.
        rows: All values that have a row for each of the sorted choices.
    """

    sort: Sort
    groups: Mapping[ir.Value, Grouped]
    op: Builder
    rows: set[ir.Value]
    _experts: int = field(init=False)
    _length: ir.Value = field(init=False)
    _tokens: ir.Value = field(init=False)
    _made: dict[tuple[bool, ir.Value], ir.Value] = field(init=False)
    _kinds: dict[ir.Value, str] = field(init=False)

    def __post_init__(self) -> None:
        op, flat = self.op, self.sort.flat
        self._experts = len(next(iter(self.groups.values())).products)
        self._length = op.Squeeze(op.Shape(flat))
        self._tokens = op.Div(self._length, op.constant(np.array(self.sort.each, np.int64)))
        self._made = {}
        self._kinds = {}

    def by_token(self, value: ir.Value | None) -> ir.Value:
        """[T*k, ..], in the order of the tokens."""
        return self._row(value, dense=False)

    def summed(self, value: ir.Value) -> ir.Value:
        """[T, ..], the k rows of each token added up."""
        op = self.op
        rows, width = self.by_token(value), shape_of(value)[1:]
        shape = np.array(
            [-1, self.sort.each, *(dim if isinstance(dim, int) else 0 for dim in width)]
        )
        if 0 in shape.tolist():
            raise NoMatch("how wide the rows are is not known", value)
        return op.ReduceSum(op.Reshape(rows, shape), [1], keepdims=0)

    def _row(self, value: ir.Value | None, *, dense: bool) -> ir.Value:
        """[T*k, ..] in the order of the tokens, or [E*T, ..] of each expert and every token."""
        assert value is not None
        key = dense, value
        if key not in self._made:
            node = value.producer()
            assert node is not None
            index = rows_taken(node)
            if value is self.sort.ids:
                self._made[key] = self._all_ids() if dense else self.sort.flat
            elif value in self.groups:
                group = self.groups[value]
                source, kind = self._source(group)
                if dense and kind == "choice":
                    raise NoMatch(
                        "each choice has a row of its own, which others do not read", node
                    )
                if dense:
                    self._made[key] = self._product(group, source)
                elif kind == "choice":
                    self._made[key] = self._chosen(self._product(group, source), by_choice=True)
                else:
                    self._made[key] = self._chosen(self._row(value, dense=True))
            elif index is not None and node.inputs[0] not in self.rows:
                self._made[key] = self._taken(node, index, dense=dense)
            else:
                self._clone(node, dense=dense)
        return self._made[key]

    def _chosen(self, rows: ir.Value, *, by_choice: bool = False) -> ir.Value:
        """Of all experts' rows, one for each token or for each choice, those that were chosen."""
        op = self.op
        zero, one = (op.constant(np.array(number, np.int64)) for number in (0, 1))
        row, count = op.Range(zero, self._length, one), self._length
        if not by_choice:
            row = op.Div(row, op.constant(np.array(self.sort.each, np.int64)))
            count = self._tokens
        flat = self.sort.flat
        ids = flat if flat.dtype == ir.DataType.INT64 else op.Cast(flat, to=int(ir.DataType.INT64))
        return op.Gather(rows, op.Add(op.Mul(ids, count), row), axis=0)

    def _source(self, group: Grouped) -> tuple[ir.Value | None, str]:
        """What a group's rows are taken from, and what tells them; nothing where they are made."""
        node = group.rows.producer()
        index = None if node is None else rows_taken(node)
        if node is None or index is None or node.inputs[0] in self.rows:
            return None, ""
        kind = self._kind(index)
        return (node.inputs[0], kind) if kind in ("token", "choice") else (None, "")

    def _all_ids(self) -> ir.Value:
        """[E*T], each row's expert."""
        op = self.op
        ids = op.constant(np.arange(self._experts, dtype=np.int64)[:, None])
        shape = op.Concat(
            op.constant(np.array([1], np.int64)), op.Reshape(self._tokens, [1]), axis=0
        )
        return op.Reshape(op.Expand(ids, shape), [-1])

    def _product(self, group: Grouped, source: ir.Value | None) -> ir.Value:
        """Every expert's product with all rows of a source, or with its own, [E*T, ..]."""
        op, count = self.op, self._experts
        stack = None
        turns = {_transposes(product) for product in group.products}
        if len(turns) == 1 and None not in turns:
            weights = [product.inputs[1] for product in group.products]
            stack = find_stack(weights, transposed=turns == {True})
        if stack is not None:
            if source is not None:
                rows = source
            else:
                dense = self._row(group.rows, dense=True)
                rows = op.Reshape(dense, np.array([count, -1, stack.shape[0]]))
            product = op.MatMul(rows, stack.value(op))
            return op.Reshape(product, np.array([-1, stack.shape[1]]))
        if source is not None:
            each: Sequence[ir.Value | None] = [source] * count
        elif count == 1:
            each = [self._row(group.rows, dense=True)]
        else:
            dense = self._row(group.rows, dense=True)
            each = op.Split(dense, axis=0, num_outputs=count, _outputs=count)
        parts: list[ir.Value] = []
        for own, product in zip(each, group.products, strict=True):
            node = op.node(product.op_type, [own, *product.inputs[1:]], {})
            node.attributes.update(product.attributes)
            parts.append(node.outputs[0])
        return op.Concat(*parts, axis=0)

    def _taken(self, node: ir.Node, index: ir.Value, *, dense: bool) -> ir.Value:
        """Rows of a table that has one for each choice, token or expert."""
        op, source, kind = self.op, node.inputs[0], self._kind(index)
        assert source is not None
        if kind == "expert":
            return op.Gather(source, self._row(self.sort.ids, dense=dense), axis=0)
        if kind == "token" and dense:
            return op.Concat(*[source] * self._experts, axis=0)
        one_each = kind == "token" and self.sort.each == 1  # a choice is a token
        if (kind == "choice" or one_each) and not dense:
            return source
        raise NoMatch("rows are taken neither by token nor by expert", node)

    def _kind(self, index: ir.Value) -> str:
        """What tells the rows that are taken: `choice`, `token`, `expert`, or `` for another."""
        if index not in self._kinds:
            self._kinds[index] = self._find_kind(index)
        return self._kinds[index]

    def _find_kind(self, index: ir.Value) -> str:
        sort, each, experts = self.sort, self.sort.each, self._experts

        def some_experts(random: np.random.Generator, length: int) -> Array:
            return np.sort(random.integers(0, experts, length))

        if sort.runs_as([index], sort.order, permutation, lambda order, _: order // each):
            return "token"
        if sort.runs_as([index], sort.order, permutation, lambda order, _: order):
            return "choice"
        if sort.runs_as([index], sort.ids, some_experts, lambda ids, _: ids):
            return "expert"
        return ""

    def _clone(self, node: ir.Node, *, dense: bool) -> None:
        """The node again, on rows made anew."""
        long = [given in self.rows for given in node.inputs]
        if not any(long):
            raise NoMatch(f"{node.op_type} makes rows of its own", node)
        check_row_wise(node, long)
        inputs = [
            self._row(given, dense=dense) if rows else given
            for given, rows in zip(node.inputs, long, strict=True)
        ]
        made = self.op.node(node.op_type, inputs, {}, outputs=len(node.outputs))
        made.attributes.update(node.attributes)
        for before, after in zip(node.outputs, made.outputs, strict=True):
            after.type = before.type
            self._made[dense, before] = after


def _transposes(product: ir.Node) -> bool | None:
    """Whether a product turns its weight; None where it does more than multiply."""
    if product.op_type == "MatMul":
        return False
    scaled = any(attribute(product, name, 1.0) != 1.0 for name in ("alpha", "beta"))
    added = len(product.inputs) > 2 and product.inputs[2] is not None
    return None if scaled or added else bool(attribute(product, "transB", 0))
