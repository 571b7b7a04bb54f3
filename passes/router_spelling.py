"""Ways to write the parts of a router that are one op in the end: lookups, masks, views. Every rule is exact."""

from __future__ import annotations

from math import prod

from sparsec.ir.core import Argument, Attr, Op, Value
from sparsec.ir.opdef import make
from sparsec.ir.rewrite import Rewriter, rule
from sparsec.ir.types import DType, TensorType, product
from sparsec.passes.rows import is_small
from sparsec.passes.rules import attr, is_pointwise, is_tensor, negative, same_shape, same_size
from sparsec.passes.splat import splat

MOST_LANES = 1 << 16  # elements per token of a contraction that is written out

_VIEWS = frozenset(
    f"aten.{name}" for name in ["reshape", "unsqueeze", "squeeze.dim", "expand", "_to_copy", "to.dtype", "clone"]
)


def _reshape(rw: Rewriter, before: Op, value: Value, shape: tuple[object, ...]) -> Value:
    """`value` in another shape, in front of an op."""
    type = TensorType(shape, value.tensor.dtype)  # type: ignore[arg-type]
    if type == value.type:
        return value
    return rw.make(before, "aten.reshape", [value], [type], {"shape": type.shape}).results[0]


def _as_reshape(op: Op, rw: Rewriter, value: Value) -> bool:
    """Let a reshape of `value` stand for an op."""
    rw.replace_op(op, "aten.reshape", [value], {"shape": op.results[0].tensor.shape})
    return True


@rule("aten.squeeze", "aten.squeeze.dims", "aten.flatten.using_ints", "aten.unflatten.int", "aten.view_as")
def name_views(op: Op, rw: Rewriter) -> bool:
    """squeeze(x), flatten(x), unflatten(x) -> reshape(x)"""
    return _as_reshape(op, rw, op.operands[0])


@rule("aten.reshape", "aten.squeeze.dim")
def merge_views(op: Op, rw: Rewriter) -> bool:
    """reshape(unsqueeze(x)) -> reshape(x)"""
    inner = op.operands[0].op
    if inner is None or inner.name not in ("aten.unsqueeze", "aten.squeeze.dim", "aten.reshape"):
        return False
    return _as_reshape(op, rw, inner.operands[0])


@rule("aten.transpose.int", "aten.t", "aten.numpy_T", "aten.permute")
def stack_on_last(op: Op, rw: Rewriter) -> bool:
    """transpose(stack(xs, 0)) -> stack(xs, 1)"""
    stack = op.operands[0].op
    if stack is None or stack.name != "aten.stack" or op.operands[0].tensor.rank != 2 or attr(stack, "dim") != 0:
        return False
    if same_shape(op.results[0].tensor.shape, op.operands[0].tensor.shape) or len(stack.results[0].users) != 1:
        return False
    rw.replace_op(op, "aten.stack", stack.arguments, {"dim": 1})
    return True


@rule("aten.slice_scatter")
def drop_whole_assignment(op: Op, rw: Rewriter) -> bool:
    """x[:] = y -> y"""
    source = op.operands[1]
    if source.type != op.results[0].type or attr(op, "start") not in (None, 0) or attr(op, "step") != 1:
        return False
    rw.replace(op, [source])
    return True


@rule("aten.repeat_interleave.self_int")
def spread_repeats(op: Op, rw: Rewriter) -> bool:
    """repeat_interleave(x, n, d) -> reshape(expand(unsqueeze(x, d + 1)))"""
    x, repeats, dim = op.operands[0], op.attrs["repeats"], attr(op, "dim")
    if not isinstance(repeats, int) or not isinstance(dim, int):
        return False
    at = negative(dim, x.tensor.rank) + x.tensor.rank + 1
    shape, dtype = x.tensor.shape, x.tensor.dtype
    thin, wide = (*shape[:at], 1, *shape[at:]), (*shape[:at], repeats, *shape[at:])
    spread = rw.make(op, "aten.unsqueeze", [x], [TensorType(thin, dtype)], {"dim": at}).results[0]
    spread = rw.make(op, "aten.expand", [spread], [TensorType(wide, dtype)], {"size": wide}).results[0]
    return _as_reshape(op, rw, spread)


@rule("aten.new_zeros", "aten.new_ones", "aten.new_full")
def name_new(op: Op, rw: Rewriter) -> bool:
    """x.new_zeros(shape) -> zeros(shape), which needs no x"""
    type = op.results[0].tensor
    attrs: dict[str, Attr] = {"size": type.shape, "dtype": type.dtype}
    if op.name == "aten.new_full":
        attrs["fill_value"] = op.attrs["fill_value"]
    rw.replace_op(op, op.name.replace("new_", ""), [], attrs)
    return True


@rule("aten.index.Tensor")
def gather_of_index(op: Op, rw: Rewriter) -> bool:
    """x[arange(T)[:, None], ids] -> gather(x, ids)"""
    found = _last_index(op)
    if found is None:
        return False
    x, result = op.operands[0], op.results[0].tensor
    index, shape = found, (*result.shape, 1) if found.tensor.rank < x.tensor.rank else result.shape
    if index.tensor.dtype is not DType.i64:
        wide = TensorType(index.tensor.shape, DType.i64)
        index = rw.make(op, "aten._to_copy", [index], [wide], {"dtype": DType.i64}).results[0]
    index = _reshape(rw, op, index, shape)
    picked = rw.make(op, "aten.gather", [x, index], [TensorType(shape, result.dtype)], {"dim": -1}).results[0]
    if picked.type == op.results[0].type:
        rw.replace(op, [picked])
        return True
    return _as_reshape(op, rw, picked)


@rule("aten.index_put")
def scatter_of_index_put(op: Op, rw: Rewriter) -> bool:
    """x[arange(T)[:, None], ids] = v -> scatter(x, ids, v)"""
    index = _last_index(op)
    if index is None or index.tensor.dtype is not DType.i64:
        return False
    x, value, add = op.operands[0], op.operands[-1], attr(op, "accumulate")
    shape = (*index.tensor.shape, 1) if index.tensor.rank < x.tensor.rank else index.tensor.shape
    given, number = value.tensor.shape, splat(value)
    if number is not None and not add:
        wide = _reshape(rw, op, index, shape)
        rw.replace_op(op, "aten.scatter.value", [x, wide], {"dim": -1, "value": number})
        return True
    if value.tensor.dtype != x.tensor.dtype or len(given) > index.tensor.rank:
        return False
    if not same_shape(given, index.tensor.shape):
        size = index.tensor.shape
        value = rw.make(op, "aten.expand", [value], [TensorType(size, x.tensor.dtype)], {"size": size}).results[0]
    operands = [x, _reshape(rw, op, index, shape), _reshape(rw, op, value, shape)]
    rw.replace_op(op, "aten.scatter_add" if add else "aten.scatter.src", operands, {"dim": -1})
    return True


def _last_index(op: Op) -> Value | None:
    """The index of the last axis where those before are counted through: x[arange(T)[:, None], ids]."""
    x = op.operands[0]
    given = op.arguments[1]
    indices = given if isinstance(given, tuple) else op.arguments[1:]
    rank = x.tensor.rank if is_tensor(x) else 0
    if rank < 2 or len(indices) != rank or not all(isinstance(index, Value) for index in indices):
        return None
    *counted, last = [index for index in indices if isinstance(index, Value)]
    if last.tensor.rank not in (rank - 1, rank) or last.tensor.dtype is DType.i1 or not is_index(last):
        return None
    if not same_shape(last.tensor.shape[: rank - 1], x.tensor.shape[: rank - 1]):
        return None
    if not all(_counts(index, axis, last.tensor.rank, x.tensor.shape[axis]) for axis, index in enumerate(counted)):
        return None
    return last


def _counts(value: Value, axis: int, rank: int, size: object) -> bool:
    """Whether an index, in a result of `rank` axes, is 0, 1, 2 ... along `axis` and the same along all others."""
    while value.op is not None and value.op.name in ("aten.expand", "aten._to_copy", "aten.to.dtype", "aten.clone"):
        value = value.op.operands[0]
    shape = (*[1] * (rank - value.tensor.rank), *value.tensor.shape)
    if len(shape) != rank or any(dim != 1 for i, dim in enumerate(shape) if i != axis):
        return False
    while value.op is not None and value.op.name in _VIEWS - {"aten.expand"}:
        value = value.op.operands[0]
    op = value.op
    if op is None or not op.name.startswith("aten.arange") or attr(op, "start") not in (None, 0):
        return False
    return attr(op, "step") in (None, 1) and same_shape(value.tensor.shape, (size,))  # type: ignore[arg-type]


def is_index(value: Value, depth: int = 16) -> bool:
    """Whether integers are certainly not negative: they come from a selection, or count something."""
    op = value.op
    if op is None or depth == 0:
        return False
    name = op.name.removeprefix("aten.")
    if name in ("argmax", "argmin", "argsort", "argsort.stable", "one_hot"):
        return True
    if name in ("topk", "sort", "sort.stable", "max.dim", "min.dim"):
        return value is op.results[1]
    if name.startswith("arange"):
        return attr(op, "start") is None or (isinstance(op.attrs["start"], int) and op.attrs["start"] >= 0)
    if (number := splat(value)) is not None:
        return number >= 0
    through = {"gather", "slice.Tensor", "select.int", "cat", "stack", "add.Tensor", "mul.Tensor", "permute"}
    if op.name in _VIEWS or name in through or name in ("add.Scalar", "mul.Scalar", "remainder.Scalar"):
        reads = op.operands[:1] if name == "gather" else op.operands
        positive = all(isinstance(attr(op, key), int) and attr(op, key) >= 0 for key in ("other",) if key in op.attrs)
        return positive and all(is_index(operand, depth - 1) for operand in reads)
    return False


@rule("aten.gather", "aten.index_select", "aten.embedding")
def name_lookup(op: Op, rw: Rewriter) -> bool:
    """gather(v, 0, i), index_select(v, 0, i), embedding(v[:, None], i) -> v[i] for a vector v"""
    table, index = op.operands[:2]
    shape = table.tensor.shape
    vector = len(shape) == 1 or (op.name == "aten.embedding" and len(shape) == 2 and shape[1] == 1)
    if not vector or not is_small(table) or not isinstance(shape[0], int) or index.tensor.rank == 0:
        return False
    type = TensorType(index.tensor.shape, table.tensor.dtype)
    found = rw.make(op, "aten.index.Tensor", [_reshape(rw, op, table, shape[:1]), (index,)], [type]).results[0]
    if found.type == op.results[0].type:
        rw.replace(op, [found])
        return True
    return _as_reshape(op, rw, found)


@rule("aten.index.Tensor", "aten.embedding")
def one_hot_of_eye(op: Op, rw: Rewriter) -> bool:
    """eye(n)[i] -> one_hot(i, n)"""
    table, index = op.operands[0], op.operands[-1]
    if table.op is None or table.op.name != "aten.eye" or len(op.operands) != 2 or not is_index(index):
        return False
    result = op.results[0].tensor
    if result.rank != index.tensor.rank + 1 or index.tensor.dtype is not DType.i64:
        return False
    hot = rw.make(
        op, "aten.one_hot", [index], [TensorType(result.shape, DType.i64)], {"num_classes": table.tensor.shape[1]}
    )
    rw.replace_op(op, "aten._to_copy", hot.results, {"dtype": result.dtype})
    return True


@rule("aten.einsum", "aten.bmm", "aten.matmul")
def write_out_selection(op: Op, rw: Rewriter) -> bool:
    """einsum("te,tke->tk", x, one_hot(i)) -> sum(x * one_hot(i)): all but one of the terms are zeros"""
    spelled = _letters(op)
    if spelled is None or not any(map(_is_mask, op.operands)):
        return False
    inputs, output = spelled
    letters = [*output, *dict.fromkeys(letter for word in inputs for letter in word if letter not in output)]
    sizes = {
        letter: dim
        for word, operand in zip(inputs, op.operands, strict=True)
        for letter, dim in zip(word, operand.tensor.shape, strict=True)
    }
    first = inputs[0][:1]
    summed = len(letters) - len(output)
    row = [sizes[letter] for letter in letters if letter != first]
    if not output.startswith(first) or not all(word[:1] == first and len(set(word)) == len(word) for word in inputs):
        return False
    if not summed or not all(isinstance(size, int) for size in row) or prod(map(int, row)) > MOST_LANES:
        return False
    aligned = [_aligned(rw, op, operand, word, letters) for operand, word in zip(op.operands, inputs, strict=True)]
    dtype = op.results[0].tensor.dtype
    type = TensorType(tuple(sizes[letter] for letter in letters), dtype)
    terms = rw.make(op, "aten.mul.Tensor", aligned, [type]).results[0]
    rw.replace_op(op, "aten.sum.dim_IntList", [terms], {"dim": tuple(range(-summed, 0))})
    return True


def _letters(op: Op) -> tuple[list[str], str] | None:
    """A contraction of two tensors as letters: the axes of each, and of the result."""
    if op.name != "aten.einsum":
        ranks = [operand.tensor.rank for operand in op.operands]
        return (["abc", "acd"], "abd") if ranks == [3, 3] else None
    equation = str(op.attrs["equation"]).replace(" ", "")
    left, arrow, output = equation.partition("->")
    inputs = left.split(",")
    plain = arrow and len(inputs) == len(op.operands) == 2 and "." not in equation
    return (inputs, output) if plain else None


def _is_mask(value: Value) -> bool:
    """Whether a value holds a one for each thing chosen, and zeros."""
    while value.op is not None and value.op.name in (*_VIEWS, "aten.permute", "aten.transpose.int"):
        value = value.op.operands[0]
    return value.op is not None and value.op.name in ("aten.one_hot", "aten.eq.Tensor", "aten.eq.Scalar")


def _aligned(rw: Rewriter, op: Op, value: Value, word: str, letters: list[str]) -> Value:
    """`value` with its axes in the order of `letters`, and an axis of size 1 for each that it lacks."""
    order = tuple(word.index(letter) for letter in letters if letter in word)
    if order != tuple(range(len(word))):
        type = TensorType(tuple(value.tensor.shape[i] for i in order), value.tensor.dtype)
        value = rw.make(op, "aten.permute", [value], [type], {"dims": order}).results[0]
    for i, letter in enumerate(letters):
        if letter not in word:
            shape = value.tensor.shape
            type = TensorType((*shape[:i], 1, *shape[i:]), value.tensor.dtype)
            value = rw.make(op, "aten.unsqueeze", [value], [type], {"dim": i}).results[0]
    return value


@rule()
def sink_flattening(op: Op, rw: Rewriter) -> bool:
    """f(flatten(x), flatten(y)) -> flatten(f(x, y)): tokens stay apart"""
    lookup = op.name == "aten.index.Tensor" and len(op.operands) == 2 and op.operands[0].tensor.rank == 1
    if not lookup and not (op.name.startswith("aten.") and len(op.results) == 1 and is_pointwise(op.name)):
        return False
    if not all(map(is_tensor, (*op.operands, *op.results))) or op.results[0].tensor.rank != 1:
        return False
    reads = op.operands[1:] if lookup else [v for v in op.operands if v.tensor.rank]
    inner = [_flattened(value) for value in reads]
    shape = inner[0].tensor.shape if inner and inner[0] is not None else ()
    if len(shape) < 2 or not all(value is not None and same_shape(value.tensor.shape, shape) for value in inner):
        return False
    if not same_size(shape, op.results[0].tensor.shape):
        return False
    of = dict(zip(reads, inner, strict=True))
    operands = [of.get(value) or value for value in op.operands]
    arguments: list[Argument] = [operands[0], (operands[1],)] if lookup else [*operands]
    type = TensorType(shape, op.results[0].tensor.dtype)
    new = make(op.name, arguments, [type], op.attrs)
    rw.insert(new, op)
    return _as_reshape(op, rw, new.results[0])


def _flattened(value: Value) -> Value | None:
    """What a vector is the flattening of."""
    op = value.op
    if op is None or op.name != "aten.reshape" or value.tensor.rank != 1:
        return None
    inner = op.operands[0]
    return inner if inner.tensor.rank > 1 and product(inner.tensor.shape) != inner.tensor.shape[0] else None


RULES = (
    name_views,
    merge_views,
    stack_on_last,
    drop_whole_assignment,
    spread_repeats,
    name_new,
    gather_of_index,
    scatter_of_index_put,
    name_lookup,
    one_hot_of_eye,
    write_out_selection,
    sink_flattening,
)
