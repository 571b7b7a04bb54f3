"""Within a row: top-k and sorting, gather and scatter, views and copies of parts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from sparsec.codegen.cpu.lanes import Kind, attr, integer, real, unsupported
from sparsec.codegen.cpu.reductions import along, shape
from sparsec.codegen.cpu.rows import Row, RowCode, packed, registry
from sparsec.ir.core import Op, Value
from sparsec.ir.types import DType

MOVES, rule = registry()


@rule("topk", "sort", "sort.stable", "argsort", "argsort.stable", "kthvalue")
def _ordered(code: RowCode, op: Op) -> Row | tuple[Row, ...]:
    """Values and their places in order; of equals the first ones first, as a stable sort has them."""
    flags = code.row(op, 0).kind is Kind.mask
    row = code.operand(op, 0, Kind.integer if flags else None)
    _, (o, n, i) = along(op, row)
    name = op.name.split(".")[1]
    k = integer(op, "k", 1) if name in ("topk", "kthvalue") else n
    if not 1 <= k <= n:
        raise unsupported(op, f"{k} of {n}")
    greatest = bool(attr(op, *(("largest", True) if name == "topk" else ("descending", False))))
    code.comment(op)
    places = Row(code.names.fresh(f"{row.name}_order"), (o, k, i), row.rows, DType.i64)
    code.declare(places)
    code.lines.append(f"top_k<{shape(o, n, i, k, str(greatest).lower())}>({places.name}, {row.name});")
    if name == "kthvalue":
        last = Row(code.names.fresh(f"{row.name}_place"), (o, 1, i), row.rows, DType.i64)
        code.declare(last)
        code.copy(last, places, (o, i), (k * i, 1), (k - 1) * i)
        places, k = last, 1
    places = replace(places, sizes=code.result(op, len(op.results) - 1).sizes)
    if name == "argsort":
        return places
    if not op.results[0].users:
        return row, places
    values = code.new(op, 0, DType.i64 if flags else None)
    code.lines.append(f"gather<{shape(o, n, i, k)}>({values.name}, {row.name}, {places.name});")
    return code.converted(values, Kind.mask) if flags else values, places


@rule("gather")
def _gather(code: RowCode, op: Op) -> Row:
    row, index = code.operand(op, 0), code.operand(op, 1)
    axis, template = _beside(op, row, index)
    code.comment(op)
    made = code.new(op)
    code.lines.append(f"gather<{shape(*template, index.sizes[axis])}>({made.name}, {row.name}, {index.name});")
    return made


def _beside(op: Op, row: Row, index: Row) -> tuple[int, tuple[int, int, int]]:
    """The axis along which `index` numbers the elements of `row`. Raises: CompileError if other axes differ."""
    if row.rows != index.rows:
        raise unsupported(op, "rows looked up in what has none")
    axis, template = along(op, row, 0)
    others = [each.sizes[:axis] + each.sizes[axis + 1 :] for each in (row, index)]
    if others[0] != others[1] or len(row.sizes) != len(index.sizes):
        raise unsupported(op, f"{op.operands[0].type} by {op.operands[1].type}: the other axes differ")
    return axis, template


@rule("scatter.value", "scatter.src", "scatter_add", "scatter.value_reduce", "scatter.reduce")
def _scatter(code: RowCode, op: Op) -> Row:
    row, index = code.operand(op, 0), code.operand(op, 1)
    if "reduce" in op.name and attr(op, "reduce", "") != "add":
        raise unsupported(op, f"reduced by '{attr(op, 'reduce', '')}'")
    axis, template = _beside(op, row, index)
    if len(op.arguments) > 2:
        source = code.operand(op, 2, row.kind)
        if source.sizes != index.sizes:
            raise unsupported(op, f"the source is {op.operands[2].type}, the index {op.operands[1].type}")
    else:
        source = code.array(Row("", index.sizes, index.rows, row.dtype, real(op, "value", 0)))
    code.comment(op)
    made = code.new(op)
    code.lines.append(f"memcpy({made.name}, {row.name}, sizeof {made.name});")
    adds = "true" if "add" in op.name or "reduce" in op.name else "false"
    call = f"scatter<{shape(*template, index.sizes[axis], adds)}>({made.name}, {index.name}, {source.name});"
    code.lines.append(call)
    return code.rounded(made)


@rule("one_hot")
def _one_hot(code: RowCode, op: Op) -> Row:
    index = code.operand(op, 0, Kind.integer)
    code.comment(op)
    made = code.new(op)
    code.lines.append(f"one_hot<{index.volume}, {made.sizes[-1]}>({made.name}, {index.name});")
    return made


@rule("index.Tensor", "index_select", "embedding")
def _look_up(code: RowCode, op: Op) -> Row:
    """A lookup in a vector that is no part of the row: a bias or a scale per expert."""
    indices = op.arguments[1:]
    if op.name == "aten.index.Tensor" and isinstance(op.arguments[1], tuple):
        indices = op.arguments[1]
    table = code.row(op, 0)
    given = indices[0] if len(indices) == 1 else None
    if not isinstance(given, Value) or table.rows or len(table.sizes) != 1:
        raise unsupported(op, "only a vector is looked up, by one index")
    index = code.array(code.values[given])
    if index.kind is not Kind.integer:
        raise unsupported(op, "only by integers")
    code.comment(op)
    made, size = code.new(op), table.sizes[0]
    place = f"place_in({index.name}[v], {size})"
    if table.pointer:
        load = f"load_{table.dtype.value}((const char*){table.pointer} + {place} * {table.dtype.itemsize}, 1)[0]"
    else:
        load = f"{code.array(table).name}[{place}]"
    code.lines.append(f"for (int v = 0; v < {made.volume}; ++v) {made.name}[v] = {load};")
    return made


@rule("unsqueeze", "squeeze", "squeeze.dim", "squeeze.dims", "view", "_unsafe_view", "reshape", "unflatten.int",
          "flatten.using_ints")  # fmt: skip
def _view(code: RowCode, op: Op) -> Row:
    row, result = code.row(op, 0), code.result(op)
    if row.rows != result.rows or row.volume != result.volume:
        raise unsupported(op, f"{op.operands[0].type} to {op.results[0].type} mixes tokens")
    return replace(row, sizes=result.sizes)


@rule("expand", "expand_as", "broadcast_to")
def _expand(code: RowCode, op: Op) -> Row:
    row, result = code.row(op, 0), code.result(op)
    if not row.name and not row.pointer:
        return replace(row, sizes=result.sizes, rows=result.rows)
    row = code.array(row)
    if row.rows and row.rank != result.rank:
        raise unsupported(op, "new axes before the tokens")
    if row.volume == result.volume:
        return replace(row, sizes=result.sizes, rows=result.rows)
    sizes = row.sizes
    while len(sizes) > len(result.sizes) and sizes[0] == 1:
        sizes = sizes[1:]
    sizes = (1,) * (len(result.sizes) - len(sizes)) + sizes
    steps = [0 if size == 1 else step for size, step in zip(sizes, packed(sizes), strict=True)]
    return _copied(code, op, row, result.sizes, steps)


def _copied(
    code: RowCode, op: Op, row: Row, sizes: Sequence[int], steps: Sequence[int], start: int = 0, i: int = 0
) -> Row:
    code.comment(op)
    made = code.new(op, i)
    code.copy(made, row, sizes, steps, start)
    return made


@rule("slice.Tensor", "narrow")
def _slice(code: RowCode, op: Op) -> Row:
    row, result = code.row(op, 0), code.result(op)
    if row.sizes == result.sizes:
        return row
    axis, _ = along(op, row, 0)
    row, steps = code.array(row), packed(row.sizes)
    start = _from_start(real(op, "start", 0), row.sizes[axis]) * steps[axis]
    steps[axis] *= integer(op, "step", 1)
    return _copied(code, op, row, result.sizes, steps, start)


def _from_start(index: bool | int | float, size: int) -> int:
    return min(size, max(0, int(index) + size if index < 0 else int(index)))


@rule("select.int", "unbind.int", "split.Tensor", "chunk", "split_with_sizes")
def _part(code: RowCode, op: Op) -> Row | tuple[Row, ...]:
    row = code.operand(op, 0)
    axis, _ = along(op, row, 0)
    steps, name = packed(row.sizes), op.name.split(".")[1]
    if name in ("select", "unbind"):
        sizes, rest = row.sizes[:axis] + row.sizes[axis + 1 :], steps[:axis] + steps[axis + 1 :]
        first = integer(op, "index", 0) % row.sizes[axis] if name == "select" else 0
        made = [_copied(code, op, row, sizes, rest, (first + i) * steps[axis], i) for i in range(len(op.results))]
        return tuple(made)
    parts, start = list[Row](), 0
    for i in range(len(op.results)):
        sizes = code.result(op, i).sizes
        parts.append(_copied(code, op, row, sizes, steps, start * steps[axis], i))
        start += sizes[axis]
    return tuple(parts)


@rule("select_scatter", "slice_scatter")
def _assign(code: RowCode, op: Op) -> Row:
    """x[:, i] = y, x[:, a:b] = y"""
    row, kind = code.operand(op, 0), code.row(op, 0).kind
    source = code.operand(op, 1, kind)
    axis, _ = along(op, row, 0)
    into = packed(row.sizes)
    if op.name == "aten.select_scatter":
        sizes = row.sizes[:axis] + row.sizes[axis + 1 :]
        start = integer(op, "index", 0) % row.sizes[axis] * into.pop(axis)
    else:
        sizes, start = source.sizes, _from_start(real(op, "start", 0), row.sizes[axis]) * into[axis]
        into[axis] *= integer(op, "step", 1)
    if source.rows != row.rows or source.sizes != sizes:
        raise unsupported(op, f"{op.operands[1].type} in {op.operands[0].type}")
    code.comment(op)
    made = code.new(op)
    code.lines.append(f"memcpy({made.name}, {row.name}, sizeof {made.name});")
    code.copy(made, source, sizes, packed(sizes), 0, into, start)
    return code.rounded(made)


@rule("permute", "transpose.int", "flip")
def _permute(code: RowCode, op: Op) -> Row:
    row, start = code.operand(op, 0), 0
    steps, order = packed(row.sizes), list(range(len(row.sizes)))
    dims = attr(op, "dims", ())
    named = [dim for dim in dims if isinstance(dim, int)] if isinstance(dims, Sequence) else []
    if op.name == "aten.flip":
        for axis in (row.axis(op, dim) for dim in named):
            start += (row.sizes[axis] - 1) * steps[axis]
            steps[axis] = -steps[axis]
    elif op.name == "aten.permute":
        if row.rows and named[0] % row.rank != 0:
            raise unsupported(op, "it moves the tokens")
        order = [row.axis(op, dim) for dim in named[row.rows :]]
    else:
        a, b = (row.axis(op, integer(op, name, 0)) for name in ("dim0", "dim1"))
        order[a], order[b] = b, a
    return _copied(code, op, row, [row.sizes[axis] for axis in order], [steps[axis] for axis in order], start)


@rule("arange", "arange.start", "arange.start_step")
def _arange(code: RowCode, op: Op) -> Row:
    result = code.result(op)
    if result.rows or len(result.sizes) != 1:
        raise unsupported(op, "it numbers the tokens")
    code.comment(op)
    made, start, step = code.new(op), real(op, "start", 0), real(op, "step", 1)
    code.lines.append(
        f"for (int v = 0; v < {made.volume}; ++v) {made.name}[v] = ({made.kind.element})({start} + v * {step});"
    )
    return code.rounded(made)


@rule("cat", "concat", "stack")
def _join(code: RowCode, op: Op) -> Row:
    result = code.result(op)
    values = op.arguments[0] if isinstance(op.arguments[0], tuple) else op.arguments
    rows = list[Row]()
    for value in values:
        if not isinstance(value, Value):
            raise unsupported(op, "of tensors that are not there")
        row = code.values[value]
        rows.append(code.array(row) if row.kind is result.kind else code.converted(row, result.kind))
    axis, start = result.axis(op, integer(op, "dim", 0)), 0
    code.comment(op)
    made = code.new(op)
    into = packed(made.sizes)
    for row in rows:
        sizes = row.sizes
        if op.name == "aten.stack":
            sizes = (*sizes[:axis], 1, *sizes[axis:])
        code.copy(made, row, sizes, packed(sizes), 0, into, start * into[axis])
        start += sizes[axis]
    return made
