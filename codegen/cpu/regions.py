"""From regions of the IR to C++ functions: activations on registers, routers and tails on a row in the stack."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

from sparsec.codegen.cpu.lanes import KINDS, Kind, Lanes, Names, unsupported
from sparsec.codegen.cpu.moves import MOVES
from sparsec.codegen.cpu.reductions import REDUCTIONS
from sparsec.codegen.cpu.rows import Row, RowCode, known_sizes, read
from sparsec.codegen.cpu.straight import Comments, alias, pointwise
from sparsec.ir.core import Block, Value
from sparsec.ir.types import DType, Sym

INCLUDE = Path(__file__).parent / "include"
RULES = {**MOVES, **REDUCTIONS}


@cache
def reserved() -> tuple[str, ...]:
    """Names that generated code uses, which no variable may take."""
    headers = "".join((INCLUDE / name).read_text() for name in ("vec.h", "vecmath.h", "rows.h"))
    return (*re.findall(r"SPARSEC_INLINE [\w ]+?(\w+)\(", headers), "memcpy", "in", "out", "row", "params", "i", "v")


def activation(block: Block) -> str:
    """`static inline F32 activation(F32 p0, ...)`: sixteen elements of an activation, computed in f32 throughout.

    Raises: CompileError naming an op that is not computed element by element, or that has no rule.
    """
    names = Names(*reserved(), "activation")
    parameters = [names.fresh(f"p{i}") for i in range(len(block.args))]
    values = {arg: Lanes(name, arg.tensor.dtype) for arg, name in zip(block.args, parameters, strict=True)}
    lines, comments = list[str](), Comments()
    for op in block.ops[:-1]:
        operands = [values.get(a) if isinstance(a, Value) else None for a in op.arguments]
        same = alias(op, operands)
        if same is not None:
            values[op.results[0]] = same
            continue
        text = pointwise(op, operands, rounds=False)
        name, result = names.of(op.results[0]), op.results[0]
        values[result] = Lanes(name, result.tensor.dtype)
        lines += [*comments.of(op.loc), f"const {values[result].kind.vector} {name} = {text};"]
    (result,) = block.terminator.operands
    lines.append(f"return {values[result].vector(Kind.number)};")
    head = f"static inline F32 activation({', '.join(f'F32 {name}' for name in parameters)}) {{"
    return "\n".join([head, *(f"  {line}" for line in lines), "}"]) + "\n"


def router(block: Block) -> str:
    """`static void route_row(const void* const* in, int64_t row, void* const* out)`: one token's router.

    `in` points to the region's arguments, the logits first, `out` to room for what it yields: ids, weights and what
    else. Floats are rounded where the graph rounds, so that equal scores are equal as in eager; of equals the one with
    the lowest number is chosen. What an argument's memory holds is read before anything is written.

    Raises: CompileError naming an op that has no rule, or what the stack cannot hold.
    """
    code = RowCode(Names(*reserved(), "route_row"), RULES, rounds=True)
    args = [_argument(block, i, f"in[{i}]") for i in range(len(block.args))]
    code.labels = {arg.pointer: value.name or "parameter" for arg, value in zip(args, block.args, strict=True)}
    rows = [_loaded(code, arg, value) if arg.rows else arg for arg, value in zip(args, block.args, strict=True)]
    results = code.run(block, rows)
    for i, (result, value) in enumerate(zip(results, block.terminator.operands, strict=True)):
        code.lines += _write(result, value.tensor.dtype, f"out[{i}]", "row * ")
    parameters = "const void* const* in, int64_t row, void* const* out"
    return _function("SPARSEC_UNFUSED static void route_row", parameters, code)


def tail(block: Block) -> str:
    """`static void tail_row(const float* y, float* out, const void* const* params)`: one row of an expert's result.

    The row is f32 and stays so throughout; `params` points to the region's arguments after the first; `out` may be `y`.

    Raises: CompileError naming an op that has no rule, or what the stack cannot hold.
    """
    code = RowCode(Names(*reserved(), "tail_row", "y"), RULES, rounds=False)
    args = [_argument(block, i, f"params[{i - 1}]") for i in range(len(block.args))]
    code.labels = {arg.pointer: value.name or "parameter" for arg, value in zip(args, block.args, strict=True)}
    first = _loaded(code, Row("", args[0].sizes, True, DType.f32, pointer="y"), block.args[0])
    (result,) = code.run(block, [first, *args[1:]])
    code.lines += _write(result, DType.f32, "out", "")
    return _function("static void tail_row", "const float* y, float* out, const void* const* params", code)


def _argument(block: Block, i: int, pointer: str) -> Row:
    """An argument in memory; its address is that of this row if it has rows."""
    type, lead = block.args[i].tensor, block.args[0].tensor.shape[0]
    if type.dtype not in KINDS:
        raise unsupported(None, f"%{block.args[i].name} is {type}: that element type is not computed in a kernel")
    # As long as there are tokens is what has rows; a bias may be as long by chance where their number is fixed.
    same = bool(type.shape) and type.shape[0] == lead
    rows = i == 0 or (same and (isinstance(lead, Sym) or len(type.shape) > 1))
    sizes = known_sizes(None, type.shape[1:] if rows else type.shape)
    row = Row("", sizes, rows, type.dtype)
    if rows:
        pointer = f"{pointer} + row * {row.volume * type.dtype.itemsize}"
    return Row("", sizes, rows, type.dtype, pointer=pointer)


def _loaded(code: RowCode, row: Row, value: Value) -> Row:
    made = Row(code.names.of(value), row.sizes, row.rows, row.dtype)
    code.declare(made)
    code.lines += read(made, row.pointer)
    return made


def _write(row: Row, dtype: DType, pointer: str, rows: str) -> list[str]:
    """Lines that write a row's elements."""
    at = f"(char*){pointer} + {rows}{row.volume * dtype.itemsize}" if rows else f"(char*){pointer}"
    if row.volume <= 16:
        return [f"store_{dtype.value}({at}, load_row({row.name}), {row.volume});"]
    at, rest = f"{at} + i * {dtype.itemsize}", f"load_row({row.name} + i), {row.volume} - i"
    return [f"for (int i = 0; i < {row.volume}; i += LANES)", f"  store_{dtype.value}({at}, {rest});"]


def _function(head: str, parameters: str, code: RowCode) -> str:
    unused = [f"(void){name};" for name in ("row", "params") if f"{name}" in parameters]
    lines = ["SPARSEC_UNFUSED_BODY", *unused, *code.lines] if "UNFUSED" in head else [*unused[:1], *code.lines]
    return "\n".join([f"{head}({parameters}) {{", *(f"  {line}" for line in lines), "}"]) + "\n"
