"""Let every expert compute all tokens, where an export sorts the tokens by expert.

Before, with `rows` any arithmetic that works row by row, and the weights W, V of E experts::

    ids, order = TopK<largest=0>(choices [T, k], flat)      all T*k of them, sorted
    x_sorted   = Gather(x [T, D], order / k)
    up         = Concat(MatMul(x_sorted[those of e], W_e) for each expert e)
    down       = Concat(MatMul(rows(up, bias[ids])[those of e], V_e) for each expert e)
    y          = Gather(down * weight[order], inverse of order)

After::

    up, down   = the same for each expert and every token, [E*T, ..]
    y          = Gather(down, choices * T + token) * weight

How many tokens choose an expert depends on the data, and such a size exists in no graph that ATC
compiles to fixed shapes. What is taken in the end is only what a token chose: whatever another
expert makes of it, infinite or not, does not matter. The price is that of a dense layer: every
expert's weights are read, and used for every token.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeAlias

import numpy as np
import numpy.typing as npt

from omforge import ir
from omforge.ir import dims as d
from omforge.ir.dims import Dim
from omforge.ir.evaluate import Cutout, EvaluationError
from omforge.ir.infer import attribute, infer_model, known
from omforge.passes.builder import Builder
from omforge.passes.events import record
from omforge.passes.interface import is_weight
from omforge.passes.match import NoMatch
from omforge.passes.pipeline import Pass
from omforge.passes.row_wise import check_row_wise
from omforge.passes.splice import Names, splice
from omforge.passes.views import shape_of

Array: TypeAlias = npt.NDArray[Any]

_INTEGERS = (ir.DataType.INT64, ir.DataType.INT32)


@dataclass(frozen=True)
class UngroupExperts(Pass):
    """Replace products of the tokens sorted by expert by products of all tokens."""

    name: ClassVar[str] = "ungroup-experts"

    def run(self, model: ir.Model) -> int:
        """Rewrite; the number of grouped products gone. A sort that stays is an event."""
        sorts = [node for node in model.graph if _may_sort(node)]
        if not sorts:
            return 0
        infer_model(model)
        names = Names(model)
        count = 0
        for node in sorts:
            try:
                count += _rewrite(_Sort.of(model, node), names)
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


def _may_sort(node: ir.Node) -> bool:
    """Whether it takes the lowest integers of a vector."""
    if node.op_type != "TopK" or node.domain != "" or attribute(node, "largest", 1):
        return False
    flat = node.inputs[0]
    return flat is not None and flat.dtype in _INTEGERS


@dataclass(frozen=True)
class _Sort:
    """The choices of all tokens, sorted by expert.

    Attributes:
        model: The model that they are in.
        node: The TopK that sorts.
        flat: Integer [T*k], the choices in the order of the tokens.
        each: k.
    """

    model: ir.Model
    node: ir.Node
    flat: ir.Value
    each: int

    @classmethod
    def of(cls, model: ir.Model, node: ir.Node) -> _Sort:
        """Raises NoMatch unless the node sorts all choices of all tokens."""
        flat, count = node.inputs
        assert flat is not None
        length, taken = shape_of(flat), known(count)
        if len(length) != 1 or taken is None or list(taken.ravel()) != [length[0]]:
            raise NoMatch("it takes some of the lowest integers, and does not sort all", node)
        maker = flat.producer()
        each = () if maker is None or maker.op_type != "Reshape" else shape_of(maker.inputs[0])
        if len(each) < 2 or not isinstance(each[-1], int):
            raise NoMatch("what it sorts is not each token's k choices, flat", node)
        return cls(model, node, flat, each[-1])

    @property
    def ids(self) -> ir.Value:
        """Integer [T*k], the choices sorted."""
        return self.node.outputs[0]

    @property
    def order(self) -> ir.Value:
        """Integer [T*k], where each of the sorted choices was: a permutation."""
        return self.node.outputs[1]

    def runs_as(
        self,
        values: Sequence[ir.Value],
        given: ir.Value,
        make: Callable[[np.random.Generator, int], Array],
        expected: Callable[[Array, int], Array],
    ) -> bool:
        """Whether values are a function of one of the sort's, by running them.

        Args:
            values: What is computed; all at once.
            given: `flat`, `ids` or `order`.
            make: Numbers of a given length for it.
            expected: From these numbers and the index of a value to what it should be.
        """
        random = np.random.default_rng(0)
        length: Dim = shape_of(self.flat)[0]
        symbols = sorted(d.symbols(length))
        try:
            part = Cutout(values, [given], self.model.opset_imports[""])
            for base in (2, 3) if symbols else (0,):
                bindings = {name: base + index for index, name in enumerate(symbols)}
                numbers = make(random, d.evaluate(length, bindings))
                assert given.name is not None
                assert given.dtype is not None
                got = part.run({given.name: numbers.astype(given.dtype.numpy())}, bindings)
                for index, array in enumerate(got):
                    if not np.array_equal(array.ravel(), expected(numbers, index)):
                        return False
        except EvaluationError:
            return False
        return True


@dataclass(frozen=True)
class _Grouped:
    """One product of the sorted rows, each with the weights of its expert.

    Attributes:
        rows: [T*k, D], sorted.
        which: Of each expert, the integers that say which rows chose it.
        products: Of each expert, the MatMul or Gemm.
    """

    rows: ir.Value
    which: tuple[ir.Value, ...]
    products: tuple[ir.Node, ...]


def _rewrite(sort: _Sort, names: Names) -> int:
    groups = _groups(sort)
    if not groups:
        raise NoMatch("no products of sorted rows with each expert's weights follow", sort.node)
    ends = _ends(sort, groups)
    with Builder(sort.model) as op:
        rows = _Rows(sort, groups, op, _sorted_values(sort, ends))
        new = [rows.by_token(end.inputs[0]) for end in ends]
        old = [end.outputs[0] for end in ends]
        splice(op, old, new, by=UngroupExperts.name, matched=ends, names=names)
    return len(groups)


# --- what is there --------------------------------------------------------------------------------


def _groups(sort: _Sort) -> dict[ir.Value, _Grouped]:
    """The grouped products behind a sort, by what they make."""
    found: dict[ir.Value, _Grouped] = {}
    indices = {output for node in _behind([sort.ids], _is_product) for output in node.outputs}
    taking = [node for index in indices for node in index.consumers() if _rows_taken(node) is index]
    products = {user for node in taking for user in node.outputs[0].consumers()}
    for node in {user: None for product in products for user in product.outputs[0].consumers()}:
        if node.op_type == "Concat" and attribute(node, "axis", 0) == 0:
            pieces = [piece for value in node.inputs if (piece := _piece(value)) is not None]
            if len(pieces) == len(node.inputs) and len({rows for rows, _, _ in pieces}) == 1:
                which = tuple(which for _, which, _ in pieces)
                found[node.outputs[0]] = _Grouped(pieces[0][0], which, tuple(p[2] for p in pieces))
    for which in {group.which: None for group in found.values()}:
        count = len(which)
        if not sort.runs_as(
            which,
            sort.flat,
            lambda random, length, count=count: random.integers(0, count, length),
            lambda ids, expert: np.flatnonzero(np.sort(ids) == expert),
        ):
            raise NoMatch("an expert's product does not take the rows that chose it", which[0])
    if len({len(group.which) for group in found.values()}) > 1:
        raise NoMatch("its products are those of different numbers of experts", sort.node)
    return found


def _piece(value: ir.Value | None) -> tuple[ir.Value, ir.Value, ir.Node] | None:
    """(rows, which of them, the product) of one expert."""
    product = None if value is None else value.producer()
    if product is None or product.op_type not in ("MatMul", "Gemm"):
        return None
    taken, *weights = product.inputs
    gather = None if taken is None else taken.producer()
    if gather is None or not all(weight is None or is_weight(weight) for weight in weights):
        return None
    if len(shape_of(product.inputs[1])) != 2 or attribute(product, "transA", 0):
        return None
    rows, which = gather.inputs[0], _rows_taken(gather)
    return None if rows is None or which is None else (rows, which, product)


def _rows_taken(node: ir.Node) -> ir.Value | None:
    """The index of a node that takes rows of its first input by [N] or [N, 1] integers."""
    if node.op_type == "Gather" and attribute(node, "axis", 0) == 0:
        index = node.inputs[1]
        return index if len(shape_of(index)) == 1 else None
    if node.op_type == "GatherND" and attribute(node, "batch_dims", 0) == 0:
        index = node.inputs[1]
        shape = shape_of(index)
        return index if len(shape) == 2 and shape[1] == 1 else None
    return None


def _behind(values: Iterable[ir.Value], stops: Callable[[ir.Node], bool]) -> dict[ir.Node, None]:
    """Every node that some values reach, up to those that stop it."""
    found: dict[ir.Node, None] = {}
    pending = list(values)
    while pending:
        for node in pending.pop().consumers():
            if node not in found and not stops(node):
                found[node] = None
                pending += node.outputs
    return found


def _is_product(node: ir.Node) -> bool:
    return node.op_type in ("MatMul", "Gemm")


def _ends(sort: _Sort, groups: Mapping[ir.Value, _Grouped]) -> list[ir.Node]:
    """What takes the rows in the order of the tokens again."""
    inside = {which for group in groups.values() for which in group.which}
    ends: dict[ir.Node, None] = {}

    def stops(node: ir.Node) -> bool:
        index = _rows_taken(node)
        if index is not None and sort.runs_as([index], sort.order, _permutation, _inverse):
            ends[node] = None
        return index in inside or node in ends

    between = _behind(groups, stops)
    if not ends:
        raise NoMatch("nothing takes the sorted rows in the order of the tokens", sort.node)
    rows = _sorted_values(sort, ends) | {output for node in between for output in node.outputs}
    for node in between:
        check_row_wise(node, [given in rows for given in node.inputs])
    return list(ends)


def _sorted_values(sort: _Sort, ends: Collection[ir.Node]) -> set[ir.Value]:
    """What has a row for each of the sorted choices."""
    behind = _behind((sort.ids, sort.order), lambda node: node in ends)
    made = {output for node in behind for output in node.outputs if known(output) is None}
    return {sort.ids, sort.order, *made}


def _permutation(random: np.random.Generator, length: int) -> Array:
    return random.permutation(length)


def _inverse(order: Array, _: int) -> Array:
    return np.argsort(order)


# --- what becomes of it ---------------------------------------------------------------------------


@dataclass
class _Rows:
    """The sorted rows made anew: of every expert and token, or in the order of the tokens.

    Attributes:
        sort: What they were sorted by.
        groups: Their products with the experts' weights.
        op: Records the nodes.
        rows: All values that have a row for each of the sorted choices.
    """

    sort: _Sort
    groups: Mapping[ir.Value, _Grouped]
    op: Builder
    rows: set[ir.Value]
    _experts: int = field(init=False)
    _length: ir.Value = field(init=False)
    _tokens: ir.Value = field(init=False)
    _made: dict[tuple[bool, ir.Value], ir.Value] = field(init=False)
    _kinds: dict[ir.Value, str] = field(init=False)

    def __post_init__(self) -> None:
        op, flat = self.op, self.sort.flat
        self._experts = len(next(iter(self.groups.values())).which)
        self._length = op.Squeeze(op.Shape(flat))
        self._tokens = op.Div(self._length, op.constant(np.array(self.sort.each, np.int64)))
        self._made = {}
        self._kinds = {}

    def by_token(self, value: ir.Value | None) -> ir.Value:
        """[T*k, ..], in the order of the tokens."""
        return self._row(value, dense=False)

    def _row(self, value: ir.Value | None, *, dense: bool) -> ir.Value:
        """[T*k, ..] in the order of the tokens, or [E*T, ..] of each expert and every token."""
        assert value is not None
        key = dense, value
        if key not in self._made:
            node = value.producer()
            assert node is not None
            index = _rows_taken(node)
            if value is self.sort.ids:
                self._made[key] = self._all_ids() if dense else self.sort.flat
            elif value in self.groups:
                product = self._product(self.groups[value]) if dense else None
                self._made[key] = self._chosen(value) if product is None else product
            elif index is not None and node.inputs[0] not in self.rows:
                self._made[key] = self._taken(node, index, dense=dense)
            else:
                self._clone(node, dense=dense)
        return self._made[key]

    def _chosen(self, value: ir.Value) -> ir.Value:
        """Of all experts' rows, those that each token chose."""
        op = self.op
        zero, one = (op.constant(np.array(number, np.int64)) for number in (0, 1))
        choice = op.Range(zero, self._length, one)
        token = op.Div(choice, op.constant(np.array(self.sort.each, np.int64)))
        flat = self.sort.flat
        ids = flat if flat.dtype == ir.DataType.INT64 else op.Cast(flat, to=int(ir.DataType.INT64))
        return op.Gather(
            self._row(value, dense=True), op.Add(op.Mul(ids, self._tokens), token), axis=0
        )

    def _all_ids(self) -> ir.Value:
        """[E*T], each row's expert."""
        op = self.op
        ids = op.constant(np.arange(self._experts, dtype=np.int64)[:, None])
        shape = op.Concat(
            op.constant(np.array([1], np.int64)), op.Reshape(self._tokens, [1]), axis=0
        )
        return op.Reshape(op.Expand(ids, shape), [-1])

    def _product(self, group: _Grouped) -> ir.Value:
        """Every expert's product with all tokens."""
        op, count = self.op, self._experts
        node = group.rows.producer()
        index = None if node is None else _rows_taken(node)
        if node is not None and index is not None and self._kind(index) == "token":
            rows: Sequence[ir.Value | None] = [node.inputs[0]] * count
        elif count == 1:
            rows = [self._row(group.rows, dense=True)]
        else:
            dense = self._row(group.rows, dense=True)
            rows = op.Split(dense, axis=0, num_outputs=count, _outputs=count)
        parts: list[ir.Value] = []
        for own, product in zip(rows, group.products, strict=True):
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
        if kind == "choice" and not dense:
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

        if sort.runs_as([index], sort.order, _permutation, lambda order, _: order):
            return "choice"
        if sort.runs_as([index], sort.order, _permutation, lambda order, _: order // each):
            return "token"
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
