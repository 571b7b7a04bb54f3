"""Writes terms back as ops: what a bank's operands are, and the region of its activation."""

from __future__ import annotations

from collections.abc import Sequence

from sparsec.ir.core import Argument, Attr, Block, Op, Value
from sparsec.ir.opdef import make
from sparsec.ir.types import Dim, DType, Sym, TensorType, product
from sparsec.passes.banks.match import NoBank
from sparsec.passes.banks.read import size_of
from sparsec.passes.banks.substitute import substitute
from sparsec.passes.banks.terms import (
    Affine,
    Along,
    Atom,
    Axis,
    Div,
    Exists,
    Flat,
    Leaf,
    Mod,
    Not,
    Num,
    Plus,
    Point,
    Same,
    Stacked,
    Term,
    Times,
    Var,
)
from sparsec.passes.rules import same_shape, same_size


class Writer:
    """Makes the ops that compute terms; they are collected in `ops`, for the rewriter to put in place."""

    def __init__(self) -> None:
        self.ops: list[Op] = []

    def make(
        self, name: str, operands: Sequence[Argument], type: TensorType, attrs: dict[str, Attr] | None = None
    ) -> Value:
        op = make(name, operands, [type], attrs or {})
        self.ops.append(op)
        op.results[0].name = name.split(".")[1]
        return op.results[0]

    def reshape(self, value: Value, shape: Sequence[Dim]) -> Value:
        if same_shape(value.tensor.shape, tuple(shape)):
            return value
        type = TensorType(tuple(shape), value.tensor.dtype)
        return self.make("aten.reshape", [value], type, {"shape": type.shape})

    def tensor(self, term: Term, axes: Sequence[Axis]) -> Value:
        """A tensor with these axes that holds `term`. Raises: NoBank for what cannot be written."""
        shape = tuple(size_of(axis) for axis in axes)
        atoms = tuple(atom for axis in axes for atom in axis)
        match term:
            case Leaf(value, at):
                return self.reshape(self._leaf(value, at, atoms), shape)
            case Stacked():
                return self.reshape(self._stacked(term, atoms), shape)
            case Point(name, attrs, args, dtype):
                return self._apply(name, args, dict(attrs), axes, dtype)
            case Times(left, right, dtype):
                return self._apply("aten.mul.Tensor", (left, right), {}, axes, dtype)
            case Plus(terms, dtype):
                whole = self.tensor(terms[0], axes)
                for other in terms[1:]:
                    whole = self.make("aten.add.Tensor", [whole, self.tensor(other, axes)], TensorType(shape, dtype))
                return whole
            case Same(left, Num(value)):
                return self._apply("aten.eq.Scalar", (left,), {"other": value}, axes, DType.i1)
            case Same(left, right):
                return self._apply("aten.eq.Tensor", (left, right), {}, axes, DType.i1)
            case Along(name, attrs, over, body, Var(atom), dtype) if len(over) == 1:
                inside = [(atom,) if axis == over else axis for axis in axes]
                if axes[-1] != (atom,):
                    raise NoBank("a weight is normalised along another axis than that of its slots")
                given = self.tensor(substitute(body, {over[0]: Var(atom)}), inside)
                return self.make(name, [given], TensorType(shape, dtype), dict(attrs))
            case Not(mask):
                return self._apply("aten.logical_not", (mask,), {}, axes, DType.i1)
            case Num(value):
                type = TensorType(shape, DType.f32)
                return self.make("aten.full", [], type, {"size": shape, "fill_value": value, "dtype": DType.f32})
            case Var(atom):
                line = self.make("aten.arange", [], TensorType((atom.size,), DType.i64), {"end": atom.size})
                return self.reshape(self._spread(line, [atom], atoms), shape)
            case Exists():
                raise NoBank("a mask over experts weighs it in a way that no weight per slot can")
            case _:
                raise NoBank("a weight is computed across tokens")

    def _apply(
        self, name: str, args: Sequence[Term], attrs: dict[str, Attr], axes: Sequence[Axis], dtype: DType
    ) -> Value:
        shape = tuple(size_of(axis) for axis in axes)
        return self.make(name, [self.tensor(arg, axes) for arg in args], TensorType(shape, dtype), attrs)

    def _stacked(self, term: Stacked, atoms: Axis) -> Value:
        type = term.values[0].tensor
        whole = TensorType((len(term.values), *type.shape), type.dtype)
        return self._leaf(self.make("aten.stack", [term.values], whole), term.at, atoms)

    def _leaf(self, value: Value, at: Sequence[Term], atoms: Axis) -> Value:
        """`value[at]` with one axis per atom."""
        indices = list(at)
        value = self._merged(value, indices)
        value = self._split(value, indices)
        value = self._cut(value, indices)
        if any(not isinstance(index, Var) for index in indices):
            return self._gathered(value, indices, atoms)
        return self._spread(value, [index.atom for index in indices if isinstance(index, Var)], atoms)

    def _merged(self, value: Value, indices: list[Term]) -> Value:
        """x[i // n, i % n] is x.flatten()[i]."""
        place = 0
        while place + 1 < len(indices):
            shape = value.tensor.shape
            match indices[place], indices[place + 1]:
                case Div(a, m), Mod(b, n) if (
                    a == b and m == n and same_size((n,), value.tensor.shape[place + 1 : place + 2])
                ):
                    shape = value.tensor.shape
                    merged = product(shape[place : place + 2])
                    value = self.reshape(value, (*shape[:place], merged, *shape[place + 2 :]))
                    indices[place : place + 2] = [a]
                    place = 0
                case _:
                    place += 1
        return value

    def _split(self, value: Value, indices: list[Term]) -> Value:
        """x[i * n + j] is x.view(m, n)[i, j]."""
        while (place := next((i for i, index in enumerate(indices) if isinstance(index, Flat)), None)) is not None:
            index, shape = indices[place], value.tensor.shape
            assert isinstance(index, Flat)
            value = self.reshape(value, (*shape[:place], *index.sizes, *shape[place + 1 :]))
            indices[place : place + 1] = list(index.items)
        return value

    def _cut(self, value: Value, indices: list[Term]) -> Value:
        """Constant and affine indices: selects and slices."""
        for place in reversed(range(len(indices))):
            shape = value.tensor.shape
            match indices[place]:
                case Num(number):
                    type = TensorType((*shape[:place], *shape[place + 1 :]), value.tensor.dtype)
                    value = self.make("aten.select.int", [value], type, {"dim": place, "index": int(number)})
                    del indices[place]
                case Affine(Var(atom), scale, offset):
                    end = (
                        Sym(f"{offset}+{atom.size}")
                        if isinstance(atom.size, Sym)
                        else offset + (atom.size - 1) * scale + 1
                    )
                    type = TensorType((*shape[:place], atom.size, *shape[place + 1 :]), value.tensor.dtype)
                    attrs: dict[str, Attr] = {"dim": place, "start": offset, "end": end}
                    value = self.make(
                        "aten.slice.Tensor", [value], type, attrs | ({"step": scale} if scale != 1 else {})
                    )
                    indices[place] = Var(atom)
                case _:
                    pass
        return value

    def _gathered(self, value: Value, indices: list[Term], atoms: Axis) -> Value:
        """One index that depends on data: `scores[t, ids[t, j]]` is a gather, `table[ids[t, j]]` a lookup."""
        places = [i for i, index in enumerate(indices) if not isinstance(index, Var)]
        if len(places) != 1:
            raise NoBank("a weight is looked up by more than one index")
        (place,) = places
        by = indices[place]
        axes = tuple(atom for atom in atoms if atom in by.free)
        number = self.tensor(by, [(atom,) for atom in axes])
        others = [index.atom for index in indices if isinstance(index, Var)]
        if not others:
            type = TensorType(number.tensor.shape, value.tensor.dtype)
            return self._spread(self.make("aten.index.Tensor", [value, (number,)], type), list(axes), atoms)
        order = [*(i for i in range(len(indices)) if i != place), place]
        value = self._permuted(value, order)
        shared = [atom for atom in axes if atom in others]
        own = [atom for atom in axes if atom not in others]
        if shared != others or list(axes) != shared + own:
            raise NoBank("a weight is looked up in a table of another order")
        flat = self.reshape(number, (*(atom.size for atom in shared), product(tuple(atom.size for atom in own))))
        type = TensorType(flat.tensor.shape, value.tensor.dtype)
        found = self.make("aten.gather", [value, flat], type, {"dim": len(shared)})
        return self._spread(self.reshape(found, [atom.size for atom in axes]), list(axes), atoms)

    def _permuted(self, value: Value, order: Sequence[int]) -> Value:
        if list(order) == list(range(len(order))):
            return value
        shape = tuple(value.tensor.shape[i] for i in order)
        if len(order) == 2:
            return self.make("aten.t", [value], TensorType(shape, value.tensor.dtype))
        return self.make("aten.permute", [value], TensorType(shape, value.tensor.dtype), {"dims": tuple(order)})

    def _spread(self, value: Value, own: list[Atom], atoms: Axis) -> Value:
        """A tensor with an axis per atom of `own`, with one per atom of `atoms`."""
        if len(set(own)) != len(own) or not set(own) <= set(atoms):
            raise NoBank("a tensor is read along its diagonal")
        value = self._permuted(value, sorted(range(len(own)), key=lambda i: atoms.index(own[i])))
        if len(own) == len(atoms):
            return value
        shape = tuple(atom.size if atom in own else 1 for atom in atoms)
        value = self.reshape(value, shape)
        whole = tuple(atom.size for atom in atoms)
        return self.make("aten.expand", [value], TensorType(whole, value.tensor.dtype), {"size": whole})


def region(activation: Term, parts: dict[Term, int], types: Sequence[TensorType], inner: Atom, rows: Sym) -> Block:
    """An activation as a region: one argument [rows, columns] per part, one result. Raises: NoBank."""
    body = Block(types, "abcd")
    done = dict[Term, Value]({term: body.args[i] for term, i in parts.items()})

    def write(term: Term) -> Value | float:
        if term in done:
            return done[term]
        match term:
            case Num(value):
                return value
            case Times(left, right, dtype):
                return apply("aten.mul.Tensor", (left, right), {}, dtype, term)
            case Plus(terms, dtype):
                return write(added(terms, dtype))
            case Point(name, attrs, args, dtype):
                return apply(name, args, dict(attrs), dtype, term)
            case _:
                raise NoBank("the activation reads more than the products with its matrices")

    def added(terms: Sequence[Term], dtype: DType) -> Term:
        known = next(
            (Plus(tuple(terms[:n]), dtype) for n in range(len(terms), 1, -1) if Plus(tuple(terms[:n]), dtype) in done),
            None,
        )
        first, rest = (known, terms[len(known.terms) :]) if known else (terms[0], terms[1:])
        for other in rest:
            first = Point("aten.add.Tensor", (), (first, other), dtype)
        return first

    def apply(name: str, args: Sequence[Term], attrs: dict[str, Attr], dtype: DType, term: Term) -> Value:
        written = [write(arg) for arg in args]
        values = [arg for arg in written if isinstance(arg, Value)]
        if len(values) != len(written):
            # A number beside a tensor is an attribute of the op's other form.
            commutes = name in ("aten.mul.Tensor", "aten.add.Tensor")
            if len(written) != 2 or not (commutes or isinstance(written[0], Value)):
                raise NoBank(f"a number is an operand of '{name}'")
            (number,) = [arg for arg in written if not isinstance(arg, Value)]
            name, attrs = name.replace(".Tensor", ".Scalar"), {**attrs, "other": number}
        op = body.append(make(name, values, [TensorType((rows, inner.size), dtype)], attrs))
        done[term] = op.results[0]
        return op.results[0]

    result = write(activation)
    if not isinstance(result, Value):
        raise NoBank("the activation is a number")
    body.append(make("moe.yield", [result]))
    return body
