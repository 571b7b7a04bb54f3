"""Reads tensors as views: one handler per op, everything else is a leaf."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

from sparsec.ir.core import Op, Value
from sparsec.ir.types import Dim, Sym, TensorType, product
from sparsec.passes.banks.substitute import simplify, substitute
from sparsec.passes.banks.terms import (
    Atom,
    Axis,
    Chosen,
    Div,
    Flat,
    Leaf,
    Mod,
    Num,
    Sorted,
    Term,
    Unreadable,
    Var,
    View,
)
from sparsec.passes.rules import same_size
from sparsec.passes.splat import splat

MAX_SIZE = 600  #: a larger term becomes a leaf: no layer of experts is that long
MAX_GEMMS = 2  #: an expert is two products deep

Handler: TypeAlias = "Callable[[Reader, Op], View | Sequence[View | None] | None]"
HANDLERS: dict[str, Handler] = {}


def reads(*names: str) -> Callable[[Handler], Handler]:
    """Make a function the handler of ops: from reader and op to the views of its results; None where it has none."""

    def wrap(handler: Handler) -> Handler:
        HANDLERS.update(dict.fromkeys(names, handler))
        return handler

    return wrap


class Reader:
    """The views of a function's values, made when asked for."""

    def __init__(self) -> None:
        self.views: dict[Value, View] = {}
        self.atoms: dict[Any, Any] = {}  #: atoms of selections and sorts, by what they number
        self.leafs: set[Value] = set()  #: a router's logits, and the tokens that it takes: no expert begins before
        self.counted: dict[Sym, tuple[View, int]] = {}  #: sizes known at run time: which element of which counts

    def __getitem__(self, value: Value) -> View:
        known = self.views.get(value)
        if known is None:
            known = self.views[value] = self.leaf(value)
        return known

    def read_all(self, ops: Sequence[Op]) -> None:
        """Make the views of the results of all ops of a block."""
        for op in ops:
            for logits in _logits_of(op) if op.name in _SELECTIONS else ():
                self.leafs |= {logits, *_tokens_of(logits)}
        for op in ops:
            self.read(op)

    def read(self, op: Op) -> None:
        """Make the views of an op's results; its operands have theirs."""
        if op.results and op.results[0] in self.leafs:
            return
        handler = HANDLERS.get(op.name, HANDLERS[""])
        if op.dialect not in ("aten", "torch") or not all(isinstance(value.type, TensorType) for value in op.operands):
            return
        try:
            made = handler(self, op)
        except Unreadable:
            return
        found = [made] if made is None or isinstance(made, View) else made
        for result, view in zip(op.results, found, strict=False):
            if view is not None and _fits(view, result.tensor) and view.term.size <= MAX_SIZE:
                self.views[result] = view

    def leaf(self, value: Value) -> View:
        """A tensor that nothing is known of."""
        number = 0 if value.op is not None and value.op.name in _UNDEFINED else splat(value)
        axes = tuple(() if dim == 1 else (Atom(dim, f"{value.name}.{i}"),) for i, dim in enumerate(value.tensor.shape))
        if number is not None:
            return View(axes, Num(number))
        return View(axes, Leaf(value, tuple(Var(axis[0]) if axis else Num(0) for axis in axes)))

    def data(self, value: Value, gemms: int = MAX_GEMMS) -> View:
        """The view of a tensor of numbers, as a leaf where there is nothing in it that experts are made of.

        Looks through views of the same tensor, and through products with up to `gemms` matrices.
        """
        view = self[value]
        plain = isinstance(view.term, Leaf | Num | Var)  # Var: numbers of places, as of arange
        if not plain and ((not view.term.routed and not view.term.gemms) or view.term.gemms > gemms):
            view = self.views[value] = self.leaf(value)
        return view


_SELECTIONS = frozenset({"aten.topk", "aten.argmax", "aten.max.dim", "aten.sort", "aten.argsort", "aten.sort.stable"})
_MATRICES = frozenset({"aten.linear", "aten.mm", "aten.addmm", "aten.matmul", "aten.einsum", "aten.bmm"})


def _logits_of(selection: Op) -> Iterator[Value]:
    """The products with matrices from which scores are made that something is selected by: where routers start."""
    if not selection.operands[0].tensor.dtype.is_float:
        return
    stack, seen = [selection.operands[0]], set[Value]()
    while stack and len(seen) < 64:
        value = stack.pop()
        if value in seen or value.op is None:
            continue
        seen.add(value)
        if value.op.name in _MATRICES:
            yield value
        else:
            stack += value.op.operands


def _tokens_of(logits: Value) -> Iterator[Value]:
    """What a router's product with a matrix reads, and the tensors that this is a view or a cast of."""
    assert logits.op is not None
    value = logits.op.operands[1 if logits.op.name == "aten.addmm" else 0]
    while True:
        yield value
        if value.op is None or value.op.name not in _SAME_ROWS:
            return
        value = value.op.operands[0]


_SAME_ROWS = frozenset({"aten.reshape", "aten._to_copy", "aten.to.dtype", "aten.unsqueeze", "aten.squeeze.dim"})

_UNDEFINED = ("aten.empty_like", "aten.empty.memory_format", "aten.new_empty")  #: may hold anything: so zeros


def _fits(view: View, type: TensorType) -> bool:
    """Whether a view has the sizes of its tensor; those of selections may be written in another way."""
    return len(view.axes) == len(type.shape) and all(
        any(isinstance(atom, Chosen | Sorted) for atom in axis) or same_size([atom.size for atom in axis], [dim])
        for axis, dim in zip(view.axes, type.shape, strict=True)
    )


def size_of(axis: Axis) -> Dim:
    return product(tuple(atom.size for atom in axis))


def index_of(axis: Axis) -> Term:
    """The position along an axis."""
    if not axis:
        return Num(0)
    return Var(axis[0]) if len(axis) == 1 else Flat(tuple(map(Var, axis)), tuple(atom.size for atom in axis))


def taken_apart(axis: Axis, index: Term) -> dict[Atom, Term]:
    """The atoms of an axis where its position is `index`."""
    changes = dict[Atom, Term]()
    for i, atom in enumerate(reversed(axis)):
        if i == len(axis) - 1:
            changes[atom] = index
        else:
            changes[atom] = simplify(Mod(index, atom.size))
            index = simplify(Div(index, atom.size))
    return changes


def unify(views: Sequence[View]) -> tuple[tuple[Axis, ...], list[Term]] | None:
    """Views broadcast against each other: the axes of the result, and the term of each over these axes."""
    rank = max(len(view.axes) for view in views)
    padded = [((),) * (rank - len(view.axes)) + view.axes for view in views]
    axes = list[Axis]()
    for place in range(rank):
        candidates = [axes_[place] for axes_ in padded if axes_[place]]
        sizes = [size_of(axis) for axis in candidates if axis != candidates[0]]
        if any(not same_size((size,), (size_of(candidates[0]),)) for size in sizes):
            return None
        axes.append(min(candidates, key=plainness) if candidates else ())
    terms = [matched(view.term, own, axes) for view, own in zip(views, padded, strict=True)]
    return tuple(axes), terms


def plainness(axis: Axis) -> tuple[bool, int]:
    """Which writing of an axis the others follow: that of chosen or sorted rows, else the one of fewest pieces."""
    return not any(isinstance(atom, Chosen | Sorted) for atom in axis), len(axis)


def matched(term: Term, own: Sequence[Axis], wanted: Sequence[Axis]) -> Term:
    """A term over the axes `own`, written over the axes `wanted`."""
    changes = dict[Atom, Term]()
    for mine, axis in zip(own, wanted, strict=True):
        if not mine or mine == axis:
            continue
        if len(mine) == len(axis) and all(same_size((a.size,), (b.size,)) for a, b in zip(mine, axis, strict=True)):
            changes |= {a: Var(b) for a, b in zip(mine, axis, strict=True)}
        else:
            changes |= taken_apart(mine, index_of(axis))
    return substitute(term, changes)


def renamed(view: View, names: Mapping[Atom, Atom]) -> View:
    axes = tuple(tuple(names.get(atom, atom) for atom in axis) for axis in view.axes)
    return View(axes, substitute(view.term, {old: Var(new) for old, new in names.items()}))
