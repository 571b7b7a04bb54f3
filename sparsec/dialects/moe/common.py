"""What the ops of the dialect share: sizes, costs, and checks of regions and banks."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

from sparsec.ir.core import Value
from sparsec.ir.opdef import Body, Cost, OpDef, Operand, OptOperand
from sparsec.ir.types import Dim, DType, Sym, TensorType, Type, evaluate, product

Layout = Literal["concat", "interleaved", "single"]
"""How the up-projection's columns feed the activation: gate half then up half, alternating, or one undivided part."""

Packing = Literal["plain", "tiles", "int8", "int4"]
"""How a bank lies in memory: as the model has it, or in tiles (`sparsec.runtime.tiles`), which may be quantised."""

BlockPacking = Literal["plain", "fp8", "mxfp4"]
"""How a bank lies in a GPU's memory: as the model has it, or in blocks that share scales (`sparsec.runtime.blocks`)."""

Activations = Literal["model", "int8"]
"""What banks are multiplied by: rows as the model has them, or rounded to int8 as they come."""

BlockActivations = Literal["model", "fp8"]
"""The same on a GPU: rows as they are, or rounded to e4m3."""

TILE_ROWS = (16, 32, 64, 128)
"""Rows of a tile that there is a list of tiles for."""

TILE_DTYPES = (DType.bf16, DType.f32)
"""Dtypes of banks that there are tiles for."""


def packed_type(packing: str, parts: int, experts: int, n: int, k: int, dtype: DType) -> TensorType:
    """The type of a packed bank [experts, n, k] whose n columns are those of `parts` parts (1 or 2)."""
    if packing == "fp8":
        return TensorType((experts, n, k), DType.f8E4M3FN)
    if packing == "mxfp4":
        return TensorType((experts, -(-k // 128), n, 64), DType.ui8)
    blocks = _blocks(parts, n)
    if packing == "int4":
        return TensorType((experts, blocks, -(-k // 128), 2, 16, 16, 4), DType.ui8)
    dtype = DType.i8 if packing == "int8" else dtype
    lanes = 4 // dtype.itemsize
    return TensorType((experts, blocks, -(-k // (16 * lanes)), 2, 16, 16, lanes), dtype)


def scale_type(packing: str, parts: int, experts: int, n: int, k: int) -> TensorType | None:
    """The type of the scales of such a bank; None where it is not quantised."""
    if packing == "fp8":
        return TensorType((experts, -(-n // 128), -(-k // 128)), DType.f32)
    if packing == "mxfp4":
        return TensorType((experts, -(-k // 128), n, 4), DType.ui8)
    if packing not in ("int8", "int4"):
        return None
    groups = 1 if packing == "int8" else -(-k // 128)
    return TensorType((experts, _blocks(parts, n), groups, 2, 16), DType.f32)


def packed_bias_type(parts: int, experts: int, n: int) -> TensorType:
    """The type of the bias of a packed bank, in the order of its columns."""
    return TensorType((experts, _blocks(parts, n), 2, 16), DType.f32)


def _blocks(parts: int, n: int) -> int:
    return -(-n // 32) if parts == 1 else -(-(n // 2) // 16)


def bytes_of(type: Type, env: Mapping[str, int]) -> int:
    """Bytes of a tensor for the symbol values in `env`."""
    if not isinstance(type, TensorType):
        return 8
    return evaluate(product(type.shape), env) * type.dtype.itemsize


def experts_hit(experts: int, k: int, tokens: int) -> float:
    """Expected number of distinct experts for `tokens` tokens under uniform routing: E (1 - (1 - k/E)^T)."""
    return experts * (1 - (1 - k / experts) ** tokens)


def known(dim: Dim) -> int:
    if not isinstance(dim, int):
        raise TypeError(f"the size {dim!r} of an expert bank must be known")
    return dim


def padded(op: OpDef, args: tuple[Any, ...], count: int) -> list[Any]:
    """Run-time values in the places of the op's arguments, None where one is left out."""
    values = iter(args)
    full = [next(values) if argument is not None else None for argument in op.arguments]
    return full + [None] * (count - len(full))


def region_takes(body: Body, types: list[Type]) -> Iterator[str]:
    given = [arg.type for arg in body.args]
    if given != types:
        yield f"region takes ({', '.join(map(str, given))}), the operands are ({', '.join(map(str, types))})"


def region_yields(body: Body, types: list[Type]) -> Iterator[str]:
    given = [value.type for value in body.terminator.operands]
    if given != types:
        yield f"region yields ({', '.join(map(str, given))}), the results are ({', '.join(map(str, types))})"


def results_are(op: OpDef, types: tuple[Type, ...]) -> Iterator[str]:
    for name, result, type in zip(op.fields().results, op.results, types, strict=False):
        if result.type != type:
            yield f"result '{name}' is {result.type}, must be {type}"


def bank_columns(bank: Operand, transposed: bool, packing: str) -> Dim:
    """N of a bank [E, N, K] as it lies in memory."""
    return bank.tensor.shape[2 if transposed or packing == "mxfp4" else 1]


def block_problems(
    name: str, bank: Operand, scale: OptOperand, inner: Dim, transposed: bool, packing: str
) -> Iterator[str]:
    """Problems of a bank's packing; `name` is the bank's operand, `inner` what it takes."""
    if packing == "plain":
        if scale is not None:
            yield f"has '{name}_scale', but its bank is not packed"
        return
    if transposed:
        yield f"packing '{packing}': '{name}' cannot be transposed"
    if bank.tensor.rank != (3 if packing == "fp8" else 4):
        yield f"packing '{packing}': '{name}' is {bank.type}"
        return
    sizes = known(bank.tensor.shape[0]), known(bank_columns(bank, False, packing)), known(inner)
    wanted = (packed_type(packing, 1, *sizes, DType.f32), scale_type(packing, 1, *sizes))
    given = (bank.type, None if scale is None else scale.type)
    for field, has, must in zip((name, f"{name}_scale"), given, wanted, strict=True):
        if has != must:
            yield f"packing '{packing}': '{field}' is {has or 'left out'}, must be {must}"


def rounding_problems(activations: str, packing: str) -> Iterator[str]:
    """Problems of rows that are rounded for a bank of `packing`."""
    if activations not in ("model", packing):
        yield f"activations are {activations}, but packing is '{packing}': fp8 is multiplied by fp8"


def bank_problems(hidden: Dim, up: Operand, transposed: bool, layout: str, width: int) -> Iterator[str]:
    if up.tensor.rank != 3:
        yield f"up is {up.type}: an expert bank has three dimensions"
        return
    columns, inner = up.tensor.shape[1:][::-1] if transposed else up.tensor.shape[1:]
    if inner != hidden:
        yield f"x has {hidden!r} columns, up takes {inner!r}"
    expected = width if layout == "single" else 2 * width
    if columns != expected:
        yield f"up yields {columns!r} columns, layout '{layout}' of width {width} needs {expected}"


def activation_problems(body: Body, layout: str, width: int) -> Iterator[str]:
    parts = 1 if layout == "single" else 2
    if len(body.args) != parts:
        yield f"activation takes {len(body.args)} arguments, layout '{layout}' gives {parts}"
    for arg in body.args:
        if arg.tensor.shape[-1] != width:
            yield f"activation argument %{arg.name} is {arg.type}, the expert width is {width}"


def offsets_problems(offsets: Operand, num_experts: int) -> Iterator[str]:
    if offsets.tensor.shape != (num_experts + 1,):
        yield f"offsets are {offsets.type}, {num_experts} experts need tensor<{num_experts + 1}xi32>"


def tiles_type(pairs: Dim, num_experts: int) -> TensorType:
    """The type of the tile lists of so many pairs: one list for each of TILE_ROWS."""
    if isinstance(pairs, int):
        length: Dim = pairs // TILE_ROWS[0] + num_experts + 2
    else:
        length = Sym(ast.unparse(ast.parse(f"({pairs})//{TILE_ROWS[0]}+{num_experts + 2}")).replace(" ", ""))
    return TensorType((len(TILE_ROWS), length, 4), DType.i32)


def tiles_problems(tiles: OptOperand, order: Operand, num_experts: int) -> Iterator[str]:
    if tiles is not None and tiles.type != (wanted := tiles_type(order.tensor.shape[0], num_experts)):
        yield f"tiles are {tiles.type}, must be {wanted}"


def tail_problems(tail: Body | None, params: Sequence[Value], row: TensorType) -> Iterator[str]:
    """Problems of a region over whole rows of what an expert yields; `row` has their width and dtype."""
    if tail is None:
        if params:
            yield f"has {len(params)} tail_params but no tail"
        return
    types = [arg.type for arg in tail.args]
    if not types or [tail.args[0].tensor.shape[1:], tail.args[0].tensor.dtype] != [row.shape[1:], row.dtype]:
        yield f"tail must take rows of {row}, takes ({', '.join(map(str, types))})"
        return
    if types[1:] != [value.type for value in params]:
        given = ", ".join(str(value.type) for value in params)
        yield f"tail takes ({', '.join(map(str, types[1:]))}) after the rows, the tail_params are ({given})"
    yield from region_yields(tail, [types[0]])


def bank_cost(
    banks: Sequence[Value | None],
    rest: Sequence[Value],
    tokens: int,
    k: int,
    env: Mapping[str, int],
    matmul: int | None = None,
) -> Cost:
    """Cost of multiplying by banks [E, ...] (biases among them) for `tokens` tokens that go to k experts each.

    Args:
        matmul: elements of one expert's matrices, where the banks' shapes do not tell.
    """
    given = [bank for bank in banks if bank is not None]
    experts = known(given[0].tensor.shape[0])
    share = experts_hit(experts, k, tokens) / experts
    moved = sum(bytes_of(bank.type, env) for bank in given) * share + sum(bytes_of(value.type, env) for value in rest)
    if matmul is None:
        matmul = sum(evaluate(product(bank.tensor.shape), env) for bank in given if bank.tensor.rank == 3) // experts
    return Cost(int(moved), 2 * tokens * k * matmul)
