"""The `moe.experts` of a matched bank."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from sparsec.dialects.moe import Experts, GroupedLinear
from sparsec.ir.core import Attr, Block, Value
from sparsec.ir.opdef import OpDef
from sparsec.ir.ranks import Alone
from sparsec.ir.types import Dim, DType, Sym, TensorType
from sparsec.passes.banks.match import Bank, Matrix, NoBank, columns_of, dtype_of
from sparsec.passes.banks.terms import (
    Affine,
    Atom,
    Flat,
    Leaf,
    Num,
    Point,
    Stacked,
    Term,
    Times,
    Var,
)
from sparsec.passes.banks.write import Writer, region

ROWS = Sym("r")


def build(bank: Bank, result: TensorType) -> tuple[Writer, Value]:
    """The ops of a bank that computes a value of type `result`, and that value. Raises: NoBank."""
    if bank.weights and bank.scales:
        raise NoBank("experts are weighed both in front of them and behind")
    writer = Writer()
    x = writer.tensor(bank.x, [bank.tokens, (bank.hidden,)])
    ids = writer.tensor(bank.ids, [bank.tokens, bank.slots])
    if bank.capacity is not None:
        kept = bank.capacity
        limits: dict[str, Attr] = {"num_experts": bank.experts, "capacity": kept.limit, "order": kept.order}
        if kept.groups != 1:
            limits["groups"] = kept.groups
        ids = writer.make("moe.capacity", [ids], ids.tensor, limits)
    weights = _weights(writer, bank, bank.weights or bank.scales)
    attrs: dict[str, Attr] = {}
    if not bank.ups:
        return writer, _finished(writer, _linear(writer, bank, x, ids, weights), result)
    up, up_bias = _up(writer, bank, attrs)
    down, down_bias = _down(writer, bank, attrs)
    if bank.scales:
        attrs["weight_on"] = "input"
    types = [TensorType((ROWS, bank.inner.size), x.tensor.dtype)] * len(bank.ups)
    if any(dtype_of(term) is not x.tensor.dtype for term in bank.parts):
        raise NoBank("the experts compute in another dtype than that of their input")
    activation = region(bank.activation, bank.parts, types, bank.inner, ROWS)
    if bank.needs_zero and (up_bias or down_bias or not _keeps_zero(activation)):
        raise NoBank("every expert runs on every token, and gives more than zeros for a row of zeros")
    operands = [x, ids, weights, up, down, up_bias, down_bias]
    while operands[-1] is None:
        operands.pop()
    experts = Experts(operands, None, attrs, [activation])
    writer.ops.append(experts)
    experts.y.name = "experts"
    return writer, _finished(writer, experts.y, result)


def _finished(writer: Writer, y: Value, result: TensorType) -> Value:
    """A bank's result in the shape and dtype of the value that it stands for."""
    y = writer.reshape(y, result.shape)
    return y if y.tensor.dtype is result.dtype else writer.make("aten._to_copy", [y], result, {"dtype": result.dtype})


def _linear(writer: Writer, bank: Bank, x: Value, ids: Value, weights: Value) -> Value:
    """Experts of one matrix each, weighed and added."""
    attrs: dict[str, Attr] = {}
    matrix, transposed = _matrix(writer, bank, bank.down, bank.out)
    bias = _bias(writer, bank, bank.down.bias, bank.out) if bank.down.bias is not None else None
    if transposed:
        attrs["transposed"] = True
    linear = GroupedLinear([x, ids, matrix, bias, weights], None, attrs)
    writer.ops.append(linear)
    linear.y.name = "experts"
    return linear.y


def _keeps_zero(activation: Block) -> bool:
    """Whether an activation of zeros is zero."""
    import torch

    values: dict[Value, Any] = {arg: torch.zeros(1, 1) for arg in activation.args}
    for op in activation.ops[:-1]:
        assert isinstance(op, OpDef)
        values[op.results[0]] = op.reference(_OneRow(), *[values[operand] for operand in op.operands])
    return bool((values[activation.terminator.operands[0]] == 0).all())


class _OneRow:
    """Evaluates pointwise ops, which ask for no sizes."""

    peers = Alone()

    def dim(self, dim: Dim) -> int:
        return 1

    def run(self, block: Block, args: Sequence[Any]) -> tuple[Any, ...]:
        raise TypeError("an activation has no regions")

    def call(self, name: str, args: Sequence[Any]) -> tuple[Any, ...]:
        raise TypeError("an activation calls nothing")


def _weights(writer: Writer, bank: Bank, factors: Sequence[Term]) -> Value:
    axes = [bank.tokens, bank.slots]
    if not factors:
        return writer.tensor(Num(1), axes)
    dtypes = [dtype for factor in factors if (dtype := dtype_of(factor)).is_float]
    whole = factors[0]
    for factor in factors[1:]:
        whole = Times(whole, factor, max(dtypes, key=lambda dtype: dtype.itemsize) if dtypes else DType.i1)
    if not dtypes:
        whole = Point("aten._to_copy", (("dtype", DType.f32),), (whole,), DType.f32)
    return writer.tensor(whole, axes)


def _up(writer: Writer, bank: Bank, attrs: dict[str, Attr]) -> tuple[Value, Value | None]:
    """The bank of the products in front of the activation: one tensor of all columns where they have one."""
    ups, inner = bank.ups, bank.inner
    whole = _layout(ups, inner)
    if whole is not None:
        if whole != "concat":
            attrs["layout"] = whole
        columns = inner if whole == "single" else Atom(2 * _known(inner), "columns")
        up, transposed = _matrix(writer, bank, ups[0], columns)
        bias = _bias(writer, bank, ups[0].bias, columns) if ups[0].bias is not None else None
        if transposed:
            attrs["up_transposed"] = True
        return up, bias
    if len(ups) != 2:
        raise NoBank(f"{len(ups)} products with matrices go into the activation; a bank has one or two")
    parts = [_matrix(writer, bank, up, inner, False)[0] for up in ups]
    up = _stacked(writer, parts)
    biases = [_bias(writer, bank, up.bias, inner) for up in ups if up.bias is not None]
    if biases and len(biases) != len(ups):
        raise NoBank("one of the products in front of the activation has a bias, the other has none")
    return up, _stacked(writer, biases) if biases else None


def _stacked(writer: Writer, parts: Sequence[Value]) -> Value:
    """Gate and up columns behind each other."""
    first = parts[0].tensor
    shape = (first.shape[0], sum(_size(part.tensor.shape[1]) for part in parts), *first.shape[2:])
    return writer.make("aten.cat", [tuple(parts)], TensorType(shape, first.dtype), {"dim": 1})


def _layout(ups: Sequence[Matrix], inner: Atom) -> str | None:
    """How the columns of one tensor feed the activation; None where there are several, or some are left out."""
    places = [columns_of(up.weight, inner) for up in ups]
    biases = [columns_of(up.bias, inner) for up in ups if isinstance(up.bias, Leaf | Stacked)]
    if (biases and biases != places) or any(_tensors(up) != _tensors(ups[0]) for up in ups):
        return None
    total, width = _columns(ups[0].weight, inner), _known(inner)
    if total == width and places == [(1, 0)]:
        return "single"
    if total != 2 * width:
        return None
    if places == [(1, 0), (1, width)]:
        return "concat"
    return "interleaved" if places == [(2, 0), (2, 1)] else None


def _tensors(up: Matrix) -> tuple[object, ...]:
    terms = (up.weight, up.bias)
    return tuple(t.value if isinstance(t, Leaf) else t.values if isinstance(t, Stacked) else None for t in terms)


def _columns(weight: Leaf | Stacked, inner: Atom) -> int:
    """How many columns a weight has."""
    shape = weight.value.tensor.shape if isinstance(weight, Leaf) else (0, *weight.values[0].tensor.shape)
    for index, size in zip(weight.at, shape, strict=True):
        if inner in index.free:
            return _size(index.sizes[-1] if isinstance(index, Flat) else size)
    raise NoBank("a matrix has no columns")


def _down(writer: Writer, bank: Bank, attrs: dict[str, Attr]) -> tuple[Value, Value | None]:
    down, transposed = _matrix(writer, bank, bank.down, bank.out)
    if transposed:
        attrs["down_transposed"] = True
    return down, _bias(writer, bank, bank.down.bias, bank.out) if bank.down.bias is not None else None


def _matrix(writer: Writer, bank: Bank, matrix: Matrix, columns: Atom, keep: bool = True) -> tuple[Value, bool]:
    """[E, columns, inner] as it lies, or [E, inner, columns] and True if `keep`."""
    expert, term = _of_expert(bank, matrix.weight, columns)
    at = term.at
    order = [next(i for i, index in enumerate(at) if atom in index.free) for atom in (columns, matrix.inner)]
    transposed = keep and order[0] > order[1]
    axes = [(expert,), (matrix.inner,), (columns,)] if transposed else [(expert,), (columns,), (matrix.inner,)]
    return writer.tensor(term, axes), transposed


def _bias(writer: Writer, bank: Bank, bias: Term | None, columns: Atom) -> Value:
    """[E, columns]."""
    if not isinstance(bias, Leaf | Stacked):
        raise NoBank("a bias is computed")
    expert, term = _of_expert(bank, bias, columns)
    return writer.tensor(term, [(expert,), (columns,)])


def _of_expert(bank: Bank, term: Leaf | Stacked, columns: Atom) -> tuple[Atom, Leaf | Stacked]:
    """A weight over an expert's number in the place of the ids, with all its columns."""
    expert = Atom(bank.experts, "expert")

    def index(old: Term) -> Term:
        if old == bank.number:
            return Var(expert)
        if isinstance(old, Flat):
            return replace(old, items=tuple(index(item) for item in old.items))
        if isinstance(old, Affine) and old.index == Var(bank.inner):
            return Var(columns) if columns is not bank.inner else old
        return Var(columns) if old == Var(bank.inner) and columns is not bank.out else old

    return expert, replace(term, at=tuple(index(item) for item in term.at))


def _known(atom: Atom) -> int:
    return _size(atom.size)


def _size(size: object) -> int:
    if not isinstance(size, int):
        raise NoBank("the width of an expert is not known")
    return size
