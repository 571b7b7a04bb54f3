"""Which ops are row-local: whether row t of the result depends on row t of the operands alone (one token is one row).

The rows of a value are its leading axes: none for a parameter, one for `[T, E]`, two for `[B, S, E]`. For each op
`operand_rows` says how many each operand has, given how many the results have, or why the op is not row-local;
`localise` rebuilds the op for rows that are folded into one axis.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias, TypeVar

from sparsec.ir.core import Attr, Op, Value
from sparsec.ir.equal import ValueMap, clone_op
from sparsec.ir.opdef import make
from sparsec.ir.types import Dim, TensorType, Type
from sparsec.passes.rules import attr, is_pointwise, negative, same_shape, same_size, with_attrs

TypeT = TypeVar("TypeT", bound=Type)
Verdict: TypeAlias = list[int] | str
"""Rows of each operand, or the reason why the op is not row-local."""

LINEAR = frozenset(
    f"aten.{name}"
    for name in [
        "linear",
        "mm",
        "addmm",
        "matmul",
        "bmm",
        "baddbmm",
        "addbmm",
        "einsum",
        "conv1d",
        "conv2d",
        "embedding",
    ]
)
"""Ops that mix the hidden dimension: a router starts at the result of one."""


def operand_rows(op: Op, rows: int) -> Verdict:
    """Rows of each operand of `op` where its results have `rows`, or a reason."""
    if not all(isinstance(value.type, TensorType) for value in (*op.operands, *op.results)):
        return "computes with sizes"
    if (handler := _HANDLERS.get(op.name)) is not None:
        return handler(op, rows)
    if is_pointwise(op.name):
        return _broadcast(op, rows)
    return "is not known to keep tokens apart"


def _broadcast(op: Op, rows: int) -> Verdict:
    """Operands align with the result from the right: each has all rows, or none."""
    shape, found = op.results[0].tensor.shape, list[int]()
    for operand in op.operands:
        given = operand.tensor.shape
        if rows and len(given) == len(shape) and same_shape(given[:rows], shape[:rows]):
            found.append(rows)
        elif all(dim == 1 for dim in given[: max(0, len(given) - (len(shape) - rows))]):
            found.append(0)
        else:
            return f"combines rows of shape {_shape(given)} with {_shape(shape)}"
    return found


def _along(op: Op, rows: int) -> Verdict:
    """Ops along the axes that `dim` names, which must not count tokens; all operands have the same rows."""
    dim = attr(op, "dims" if op.name == "aten.flip" else "dim")
    dims = dim if isinstance(dim, tuple) else (dim,)
    rank = op.results[0].tensor.rank if op.name in ("aten.unsqueeze", "aten.stack") else op.operands[0].tensor.rank
    if rows and (not dims or any(item is None for item in dims)):
        return "reduces over all axes, those of tokens included"
    if any(negative(item, rank) + rank < rows for item in dims if item is not None):
        return "works along an axis that counts tokens"
    shape = op.operands[0].tensor.shape
    if not all(same_shape(value.tensor.shape[:rows], shape[:rows]) for value in op.operands):
        return "combines operands with different rows"
    return [rows] * len(op.operands)


def _swap(op: Op, rows: int) -> Verdict:
    rank = op.operands[0].tensor.rank
    dims = [attr(op, "dim0"), attr(op, "dim1")] if op.name == "aten.transpose.int" else attr(op, "dims")
    places = [negative(dim, rank) + rank for dim in dims]
    kept = min(places) >= rows if op.name == "aten.transpose.int" else places[:rows] == list(range(rows))
    return [rows] if kept else "moves an axis that counts tokens"


def _reshape(op: Op, rows: int) -> Verdict:
    if not rows:
        return [0]
    given, wanted = op.operands[0].tensor.shape, op.results[0].tensor.shape
    if same_shape(given[:rows], wanted[:rows]):
        return [rows]
    for count in range(1, len(given) + 1):
        if same_size(given[:count], wanted[:rows]) and same_size(given[count:], wanted[rows:]):
            return [count]
    return f"reshapes {_shape(given)} to {_shape(wanted)} across tokens"


def _normed(op: Op, rows: int) -> Verdict:
    """Normalised over the last axes, with a weight and a bias of their shape."""
    shape = attr(op, "normalized_shape")
    if op.operands[0].tensor.rank - len(shape) < rows:
        return "normalises over tokens"
    return [rows, *[0] * (len(op.operands) - 1)]


def _same(op: Op, rows: int) -> Verdict:
    return [rows] * len(op.operands)


def _index(op: Op, rows: int) -> Verdict:
    """A small table looked up by ids: table[ids]."""
    if len(op.operands) != 2 or op.operands[0].tensor.rank != 1:
        return "looks up more than one number per id"
    return [0, rows]


def _counted(op: Op, rows: int) -> Verdict:
    return "numbers the tokens" if rows else []


_HANDLERS: dict[str, Callable[[Op, int], Verdict]] = {
    **dict.fromkeys(
        (
            f"aten.{name}"
            for name in [
                "softmax.int",
                "log_softmax.int",
                "topk",
                "sort",
                "argsort",
                "sum.dim_IntList",
                "mean.dim",
                "amax",
                "amin",
                "max.dim",
                "min.dim",
                "argmax",
                "argmin",
                "logsumexp",
                "linalg_vector_norm",
                "kthvalue",
                "std.dim",
                "std.correction",
                "var.dim",
                "var.correction",
                "count_nonzero.dim_IntList",
                "cumprod",
                "flip",
                "narrow",
                "chunk",
                "sort.stable",
                "argsort.stable",
                "scatter_reduce.two",
                "select_scatter",
                "slice_scatter",
                "median.dim",
                "logcumsumexp",
                "cummax",
                "cummin",
                "norm.ScalarOpt_dim",
                "cumsum",
                "prod.dim_int",
                "any.dim",
                "all.dim",
                "gather",
                "scatter.value",
                "scatter.src",
                "scatter_add",
                "cat",
                "concat",
                "stack",
                "unsqueeze",
                "squeeze.dim",
                "slice.Tensor",
                "select.int",
                "split.Tensor",
                "split_with_sizes",
                "unbind.int",
            ]
        ),
        _along,
    ),
    **dict.fromkeys(("aten.zeros_like", "aten.ones_like", "aten.full_like", "aten.one_hot"), _same),
    **dict.fromkeys(("aten.full", "aten.zeros", "aten.ones", "aten.scalar_tensor"), _same),
    **dict.fromkeys(("aten.arange", "aten.arange.start", "aten.arange.start_step", "aten.eye"), _counted),
    **dict.fromkeys(("aten.reshape", "aten.view", "aten._unsafe_view"), _reshape),
    **dict.fromkeys(("aten.transpose.int", "aten.permute"), _swap),
    "aten.expand": _broadcast,
    "aten.layer_norm": _normed,
    "aten.rms_norm": _normed,
    "aten.index.Tensor": _index,
}


ROW_OPS = frozenset(_HANDLERS)
"""Ops that are row-local, or that mix tokens in a way that is known."""

LOOKUPS = frozenset({"aten.index.Tensor", "aten.index_select", "aten.embedding"})
"""Ops that read a table by numbers: what they find is given to the router, not computed by it."""


def folded(type: TypeT, rows: int, tokens: Dim) -> TypeT | TensorType:
    """A type with its leading `rows` axes as one of `tokens`."""
    if not rows or not isinstance(type, TensorType):
        return type
    return TensorType((tokens, *type.shape[rows:]), type.dtype)


def localise(op: Op, rows: int, tokens: Dim, values: ValueMap) -> list[Op]:
    """A copy of a row-local op whose results have `rows`, for rows folded into one axis of `tokens`.

    Operands come from `values`, which learns the results. Nothing where nothing is left to do; a reshape in front where
    an operand without rows has more axes than the folded result, all of size 1.
    """
    if not rows:
        return [clone_op(op, values)]
    result = folded(op.results[0].type, rows, tokens)
    assert isinstance(result, TensorType)
    if op.name in ("aten.reshape", "aten.view", "aten._unsafe_view") and values[op.operands[0]].type == result:
        values[op.results[0]] = values[op.operands[0]]
        return []
    flat = list[Op]()
    if op.name == "aten.expand" or is_pointwise(op.name):
        for operand in dict.fromkeys(op.operands):
            inside = values[operand]
            extra = inside.tensor.rank - result.rank
            if extra > 0:
                type = TensorType(inside.tensor.shape[extra:], inside.tensor.dtype)
                flat.append(make("aten.reshape", [inside], [type], {"shape": type.shape}, loc=op.loc))
                values[operand] = flat[-1].results[0]
    new = clone_op(op, values, lambda type: folded(type, rows, tokens))
    new.attrs = _folded_attrs(op, rows, result)
    return [*flat, new]


def _folded_attrs(op: Op, rows: int, result: TensorType) -> dict[str, Attr]:
    changes: dict[str, Attr] = {}
    for name in ("shape", "size"):
        if name in op.attrs and op.name != "aten.arange":
            changes[name] = result.shape
    if op.operands:
        by_result = op.name in ("aten.unsqueeze", "aten.stack")
        rank = (op.results[0] if by_result else op.operands[0]).tensor.rank
        for name in ("dim", "dim0", "dim1", *(("dims",) if op.name == "aten.flip" else ())):
            dim = attr(op, name) if op.name in _HANDLERS and not is_like(op) else None
            if isinstance(dim, tuple):
                changes[name] = tuple(negative(item, rank) for item in dim)
            elif isinstance(dim, int):
                changes[name] = negative(dim, rank)
    if op.name == "aten.permute":
        rank = op.operands[0].tensor.rank
        places = [negative(dim, rank) + rank for dim in attr(op, "dims")]
        changes["dims"] = (0, *(place - rows + 1 for place in places[rows:]))
    return with_attrs(op, **changes) if changes else dict(op.attrs)


def is_like(op: Op) -> bool:
    """Whether an op takes only the shape of its operand."""
    return op.name in ("aten.zeros_like", "aten.ones_like", "aten.full_like")


def _shape(dims: Sequence[Dim]) -> str:
    return "x".join(map(str, dims)) or "scalar"


def is_small(value: Value) -> bool:
    """Whether a value is a parameter that a router may read: a scalar, or a vector up to axes of size 1."""
    return isinstance(value.type, TensorType) and sum(dim != 1 for dim in value.type.shape) <= 1
