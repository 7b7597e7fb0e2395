"""Tokens sorted by expert: the sort, the products of each expert's rows, and the way back.

What an index says of the rows is shown by running it: exporters spell the histogram of experts, the
ranges of its sums and the inverse of a permutation in ways of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from omforge import ir
from omforge.ir import dims as d
from omforge.ir.dims import Dim
from omforge.ir.evaluate import Cutout, EvaluationError
from omforge.ir.values import attribute, known
from omforge.recognition.experts.row_wise import check_row_wise, is_zero
from omforge.recognition.interface import is_weight
from omforge.recognition.views import shape_of
from omforge.rewriting.match import NoMatch

Array: TypeAlias = npt.NDArray[Any]

_INTEGERS = (ir.DataType.INT64, ir.DataType.INT32)


def may_sort(node: ir.Node) -> bool:
    """Whether it takes the lowest integers of a vector."""
    if node.op_type != "TopK" or node.domain != "" or attribute(node, "largest", 1):
        return False
    flat = node.inputs[0]
    return flat is not None and flat.dtype in _INTEGERS


@dataclass(frozen=True)
class Sort:
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
    def of(cls, model: ir.Model, node: ir.Node) -> Sort:
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
            given: `flat` or what it is made of, `ids` or `order`.
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
                shape = [d.evaluate(dim, bindings) for dim in shape_of(given)]
                fed = numbers.astype(given.dtype.numpy()).reshape(shape)
                got = part.run({given.name: fed}, bindings)
                for index, array in enumerate(got):
                    if not np.array_equal(array.ravel(), expected(numbers, index)):
                        return False
        except EvaluationError:
            return False
        return True


@dataclass(frozen=True)
class Grouped:
    """One product of the sorted rows, each with the weights of its expert.

    Attributes:
        rows: [T*k, D], sorted.
        which: Of each expert, the integers that say which rows chose it; none where the rows are
            split by how many chose each.
        products: Of each expert, the MatMul or Gemm.
        split: What splits them.
    """

    rows: ir.Value
    which: tuple[ir.Value, ...]
    products: tuple[ir.Node, ...]
    split: ir.Node | None = None


def find_groups(sort: Sort) -> dict[ir.Value, Grouped]:
    """The grouped products behind a sort, by what they make."""
    found: dict[ir.Value, Grouped] = {}
    indices = {output for node in _behind([sort.ids], _is_product) for output in node.outputs}
    taking = [node for index in indices for node in index.consumers() if rows_taken(node) is index]
    products = {user for node in taking for user in node.outputs[0].consumers()}
    for node in {user: None for product in products for user in product.outputs[0].consumers()}:
        if node.op_type == "Concat" and attribute(node, "axis", 0) == 0:
            pieces = [piece for value in node.inputs if (piece := _piece(value)) is not None]
            if len(pieces) == len(node.inputs) and len({rows for rows, _, _ in pieces}) == 1:
                which = tuple(which for _, which, _ in pieces)
                found[node.outputs[0]] = Grouped(pieces[0][0], which, tuple(p[2] for p in pieces))
    for which in {group.which: None for group in found.values()}:
        count = len(which)
        if not sort.runs_as(
            which,
            sort.flat,
            lambda random, length, count=count: random.integers(0, count, length),
            lambda ids, expert: np.flatnonzero(np.sort(ids) == expert),
        ):
            raise NoMatch("an expert's product does not take the rows that chose it", which[0])
    found |= _split_groups(sort)
    if len({len(group.products) for group in found.values()}) > 1:
        raise NoMatch("its products are those of different numbers of experts", sort.node)
    return found


def _split_groups(sort: Sort) -> dict[ir.Value, Grouped]:
    """The grouped products whose rows are cut by a Split, as many for each expert as chose it."""
    found: dict[ir.Value, Grouped] = {}
    splits = _splits_behind([sort.ids, sort.order])
    while splits:
        split = splits.pop(0)
        sizes = split.inputs[1] if len(split.inputs) > 1 else None
        if attribute(split, "axis", 0) != 0 or sizes is None:
            continue
        products = [_product_of(piece) for piece in split.outputs]
        ends = {user for node in products if node for user in node.outputs[0].consumers()}
        if known(sizes) is not None or None in products or len(ends) != 1:
            continue
        (join,) = ends
        made = [node.outputs[0] for node in products if node]
        if join.op_type != "Concat" or attribute(join, "axis", 0) != 0:
            continue
        if list(join.inputs) != made or not _counts_choices(sort, sizes, len(made)):
            continue  # those of another sort further on, or none
        assert split.inputs[0] is not None
        each = tuple(node for node in products if node)
        found[join.outputs[0]] = Grouped(split.inputs[0], (), each, split)
        splits += _splits_behind(join.outputs)
    return found


def _splits_behind(values: Sequence[ir.Value]) -> list[ir.Node]:
    """Splits that some values reach without a product."""
    return [node for node in _behind(values, _is_product) if node.op_type == "Split"]


def _product_of(piece: ir.Value) -> ir.Node | None:
    """The product with a weight that alone reads some rows."""
    users = list(piece.consumers())
    if len(users) != 1 or not _is_product(users[0]) or users[0].inputs[0] is not piece:
        return None
    (product,) = users
    weights = product.inputs[1:]
    if not all(weight is None or is_weight(weight) for weight in weights):
        return None
    plain = len(shape_of(weights[0])) == 2 and not attribute(product, "transA", 0)
    return product if plain else None


def _counts_choices(sort: Sort, sizes: ir.Value, experts: int) -> bool:
    """Whether sizes [E] are how many of all choices are each expert; a token's are distinct."""
    maker = sort.flat.producer()
    choices = None if maker is None else maker.inputs[0]
    if choices is None or experts < sort.each:
        return False

    def drawn(random: np.random.Generator, length: int) -> Array:
        rows = [random.permutation(experts)[: sort.each] for _ in range(length // sort.each)]
        return np.concatenate(rows)

    return sort.runs_as([sizes], choices, drawn, lambda ids, _: np.bincount(ids, minlength=experts))


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
    rows, which = gather.inputs[0], rows_taken(gather)
    return None if rows is None or which is None else (rows, which, product)


def rows_taken(node: ir.Node) -> ir.Value | None:
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


def reached(values: Iterable[ir.Value]) -> dict[ir.Node, None]:
    """Every node that some values reach."""
    return _behind(values, lambda node: False)


def _is_product(node: ir.Node) -> bool:
    return node.op_type in ("MatMul", "Gemm")


@dataclass(frozen=True)
class End:
    """What takes sorted rows in the order of the tokens again.

    Attributes:
        node: A Gather by the inverse of the order, or a ScatterND of zeros by the order itself, or
            by each choice's token.
        rows: The sorted rows that it reads.
        summed: Whether the rows of a token are added up.
    """

    node: ir.Node
    rows: ir.Value
    summed: bool = False


def find_ends(sort: Sort, groups: Mapping[ir.Value, Grouped]) -> list[End]:
    """What takes the rows in the order of the tokens again."""
    inside = {which for group in groups.values() for which in group.which}
    splits = {group.split for group in groups.values()}
    ends: dict[ir.Node, End] = {}

    def stops(node: ir.Node) -> bool:
        index = rows_taken(node)
        if node not in ends and (end := _end(sort, node, index)) is not None:
            ends[node] = end
        return (index is not None and index in inside) or node in ends or node in splits

    between = _behind(groups, stops)
    if not ends:
        raise NoMatch("nothing takes the sorted rows in the order of the tokens", sort.node)
    rows = sorted_values(sort, ends) | {output for node in between for output in node.outputs}
    for node in between:
        check_row_wise(node, [given in rows for given in node.inputs])
    return list(ends.values())


def _end(sort: Sort, node: ir.Node, index: ir.Value | None) -> End | None:
    """What a node is, if it takes rows in the order of the tokens; `index` as `rows_taken` says."""
    if index is not None and sort.runs_as([index], sort.order, permutation, _inverse):
        rows = node.inputs[0]
        return None if rows is None else End(node, rows)
    if node.op_type != "ScatterND" or node.domain or not is_zero(node.inputs[0]):
        return None
    _, index, rows = node.inputs
    if index is None or rows is None or shape_of(index)[1:] != (1,):
        return None
    each, adds = sort.each, attribute(node, "reduction", "none") == "add"
    if sort.runs_as([index], sort.order, permutation, lambda order, _: order):
        return End(node, rows)  # no row is written twice
    tokens = sort.runs_as([index], sort.order, permutation, lambda order, _: order // each)
    return End(node, rows, summed=True) if tokens and adds else None


def sorted_values(sort: Sort, ends: Collection[ir.Node]) -> set[ir.Value]:
    """What has a row for each of the sorted choices."""
    behind = _behind((sort.ids, sort.order), lambda node: node in ends)
    made = {output for node in behind for output in node.outputs if known(output) is None}
    return {sort.ids, sort.order, *made}


def permutation(random: np.random.Generator, length: int) -> Array:
    """Numbers for `Sort.order`."""
    return random.permutation(length)


def _inverse(order: Array, _: int) -> Array:
    return np.argsort(order)
