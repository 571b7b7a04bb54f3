"""Along axes of a row: sums, extremes, norms, softmax, to one number or as many as there were."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from sparsec.codegen.cpu.lanes import Kind, attr, integer, number, real, unsupported
from sparsec.codegen.cpu.rows import Row, RowCode, registry, vectors
from sparsec.ir.core import Op, Value
from sparsec.ir.types import DType

REDUCTIONS, rule = registry()


def axes_of(op: Op, row: Row) -> tuple[int, int]:
    """The first axis that a reduction runs over, and how many. Raises: CompileError unless they follow each other."""
    dims = attr(op, "dim", None)
    if isinstance(dims, int):
        dims = (dims,)
    if not isinstance(dims, Sequence) or not dims:
        dims = tuple(range(row.rank))
    axes = sorted({row.axis(op, dim) for dim in dims if isinstance(dim, int)}) if row.rank else [0]
    if axes != list(range(axes[0], axes[0] + len(axes))):
        raise unsupported(op, f"over the axes {tuple(dims)}, which do not follow each other")
    return axes[0], len(axes)


def around(op: Op, row: Row, *more: object) -> str:
    """Template arguments: the elements before the axes, along them, and behind."""
    return ", ".join(map(str, (*row.around(*axes_of(op, row)), *more)))


def along(op: Op, row: Row, default: int = -1) -> tuple[int, tuple[int, int, int]]:
    """The one axis of an op, and the elements around it."""
    axis = row.axis(op, integer(op, "dim", default))
    return axis, row.around(axis)


def shape(*sizes: object) -> str:
    return ", ".join(map(str, sizes))


@rule("sum.dim_IntList", "sum", "mean.dim", "mean", "prod.dim_int", "logsumexp")
def _sum(code: RowCode, op: Op) -> Row:
    name = op.name.split(".")[1]
    kind = Kind.number if name in ("mean", "logsumexp") else code.result(op).kind
    row = code.operand(op, 0, kind)
    code.comment(op)
    made = code.new(op)
    function = "product" if name == "prod" else name
    code.lines.append(f"{function}<{around(op, row)}>({made.name}, {row.name});")
    return code.rounded(made)


@rule("amax", "amin", "max.dim", "min.dim", "argmax", "argmin", "max", "min")
def _extreme(code: RowCode, op: Op) -> Row | tuple[Row, ...]:
    row, greatest = code.row(op, 0), "true" if "max" in op.name else "false"
    flags = row.kind is Kind.mask
    row = code.operand(op, 0, Kind.integer if flags else None)
    template = around(op, row, greatest)
    code.comment(op)
    if op.name.startswith("aten.arg"):
        made = code.new(op)
        code.lines.append(f"place_of_extreme<{template}>({made.name}, {row.name});")
        return made
    values = code.new(op, 0, DType.i64 if flags else None)
    code.lines.append(f"extreme<{template}>({values.name}, {row.name});")
    values = code.converted(values, Kind.mask) if flags else values
    if len(op.results) == 1:
        return values
    places = code.new(op, 1)
    code.lines.append(f"place_of_extreme<{template}>({places.name}, {row.name});")
    return values, places


@rule("any.dim", "all.dim", "any", "all", "any.dims", "all.dims")
def _any(code: RowCode, op: Op) -> Row:
    row = code.operand(op, 0, Kind.mask)
    code.comment(op)
    made = code.new(op)
    code.lines.append(f"{op.name.split('.')[1]}<{around(op, row)}>({made.name}, {row.name});")
    return made


@rule("count_nonzero.dim_IntList", "count_nonzero")
def _count(code: RowCode, op: Op) -> Row:
    row = code.converted(code.operand(op, 0, Kind.mask), Kind.integer)
    code.comment(op)
    made = code.new(op)
    code.lines.append(f"sum<{around(op, row)}>({made.name}, {row.name});")
    return made


@rule("softmax.int", "_softmax", "log_softmax.int", "_log_softmax")
def _softmax(code: RowCode, op: Op) -> Row:
    row = code.operand(op, 0, Kind.number)
    _, template = along(op, row)
    code.comment(op)
    made = code.new(op)
    function = "log_softmax" if "log" in op.name else "softmax"
    code.lines.append(f"{function}<{shape(*template)}>({made.name}, {row.name});")
    return code.rounded(made)


@rule("cumsum", "cumprod")
def _cumulate(code: RowCode, op: Op) -> Row:
    row = code.operand(op, 0, code.result(op).kind)
    _, template = along(op, row)
    code.comment(op)
    made = code.new(op)
    is_sum = "true" if op.name == "aten.cumsum" else "false"
    code.lines.append(f"cumulate<{shape(*template, is_sum)}>({made.name}, {row.name});")
    return code.rounded(made)


@rule("linalg_vector_norm", "norm.ScalarOpt_dim")
def _norm(code: RowCode, op: Op) -> Row:
    order = real(op, "ord" if op.name == "aten.linalg_vector_norm" else "p", 2)
    if order not in (1, 2, float("inf")):
        raise unsupported(op, f"norm of order {order!r}")
    row = code.operand(op, 0, Kind.number)
    code.comment(op)
    made = code.new(op)
    code.lines.append(
        f"norm<{around(op, row, {1: 1, 2: 2}.get(int(order) if order < 3 else 0, 0))}>({made.name}, {row.name});"
    )
    return code.rounded(made)


@rule("var.dim", "var.correction", "std.dim", "std.correction")
def _variance(code: RowCode, op: Op) -> Row:
    row = code.operand(op, 0, Kind.number)
    less = real(op, "correction", 1) if op.name.endswith("correction") else int(bool(attr(op, "unbiased", True)))
    size = row.around(*axes_of(op, row))[1]
    if size <= less:
        raise unsupported(op, f"correction {less!r} of {size}")
    code.comment(op)
    made = code.new(op)
    divisor = number(size - less, Kind.number)
    code.lines.append(f"variance<{around(op, row)}>({made.name}, {row.name}, {divisor});")
    if "std" in op.name:
        code.lines += vectors(made.volume, f"store_f32({made.name}{{at}}, sqrt(load_f32({made.name}{{at}})));")
    return code.rounded(made)


@rule("layer_norm", "rms_norm")
def _normed(code: RowCode, op: Op) -> Row:
    row, over = code.operand(op, 0, Kind.number), attr(op, "normalized_shape", ())
    if not isinstance(over, Sequence) or len(over) > len(row.sizes):
        raise unsupported(op, f"over axes of sizes {over!r}")
    axis = len(row.sizes) - len(over)
    name = op.name.removeprefix("aten.")
    least = {DType.bf16: 0.0078125, DType.f16: 0.0009765625}.get(op.operands[0].tensor.dtype, 1.1920928955078125e-07)
    eps = number(real(op, "eps", 1e-5 if name == "layer_norm" else least), Kind.number)
    code.comment(op)
    made = code.new(op)
    code.lines.append(f"{name}<{shape(*row.around(axis, len(over)))}>({made.name}, {row.name}, {eps});")
    for sign, given in zip("*+", op.arguments[1:], strict=False):
        if isinstance(given, Value):
            factor = code.array(code.spread(code.values[given], replace(made, name="")))
            text = f"load_f32({made.name}{{at}}) {sign} load_f32({factor.name}{{at}})"
            code.lines += vectors(made.volume, f"store_f32({made.name}{{at}}, {text});")
    return code.rounded(made)
