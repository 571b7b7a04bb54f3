"""The kernels of the gradients of banks and of their biases: `moe.bank_grad`, `moe.bias_grad`.

A program computes one block of one expert's gradient and stores it, zeros where the expert has no rows: nothing is
cleared before, and nothing is added up between programs, so that results do not depend on who comes first.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from sparsec.codegen.triton.backward import Variant, chosen, number, require_floats, signature, sizes_of
from sparsec.codegen.triton.gemm import masked, narrowed
from sparsec.codegen.triton.launch import TOKENS, Entry, Parameter, Schedule, Sketch, Wiring
from sparsec.codegen.triton.source import indent, module_text
from sparsec.codegen.triton.tile import POINTERS
from sparsec.dialects.moe import BankGrad, BiasGrad
from sparsec.ir.core import Func, Value
from sparsec.ir.types import DType

BANK: Sequence[Variant] = ({"block_m": 128, "block_n": 128, "block_k": 64, "num_warps": 8, "num_stages": 3},)
BANK_F32: Sequence[Variant] = ({"block_m": 64, "block_n": 64, "block_k": 32, "num_warps": 8, "num_stages": 2},)
BIAS: Sequence[Variant] = ({"block_n": 64, "block_k": 64, "num_warps": 4, "num_stages": 3},)
"""Variants where the schedule names none; block_k counts rows."""


def bank_grad(func: Func, op: BankGrad) -> Sketch:
    """Text and launches. Raises: CompileError for what no kernel can hold."""
    require_floats(op, op.rows, op.tokens)
    of_rows, of_tokens = (number(op, value.tensor.shape[-1]) for value in (op.rows, op.tokens))
    m, n = (of_tokens, of_rows) if op.transposed else (of_rows, of_tokens)
    variants = chosen(func, op, BANK_F32 if op.rows.tensor.dtype is DType.f32 else BANK)
    tiles = [sizes_of(op, variant, m, n, 1 << 20) for variant in variants]
    parameters = _parameters(op, {"sorted": op.rows, "gathered": op.tokens, "order": op.order, "offsets": op.offsets})
    bounds = {
        side: [] if all(size % tile[f"BLOCK_{side}"] == 0 for tile in tiles) else [f"{side.lower()} < {side}"]
        for side, size in (("M", m), ("N", n))
    }
    left, right = _operand("M", bounds["M"], op.transposed), _operand("N", bounds["N"], not op.transposed)
    precision = ', input_precision="ieee"' if op.rows.tensor.dtype is DType.f32 else ""
    keep = " & ".join([*(f"({b})[:, None]" for b in bounds["M"]), *(f"({b})[None, :]" for b in bounds["N"])])
    lines = [
        '"""A block of an expert\'s gradient: the sum over its rows, BLOCK_K at a time."""',
        "arrive(PDL)",
        "BLOCKS: tl.constexpr = (M + BLOCK_M - 1) // BLOCK_M",
        "EACH: tl.constexpr = BLOCKS * ((N + BLOCK_N - 1) // BLOCK_N)",
        "expert = tl.program_id(0) // EACH",
        "block = tl.program_id(0) % EACH",
        "m = block % BLOCKS * BLOCK_M + tl.arange(0, BLOCK_M)",
        "n = block // BLOCKS * BLOCK_N + tl.arange(0, BLOCK_N)",
        "depth = tl.arange(0, BLOCK_K)",
        "start = tl.load(offsets + expert)",
        "stop = tl.load(offsets + expert + 1)",
        "acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)",
        "for first in tl.range(start, stop, BLOCK_K):",
        "    row = first + depth",
        "    live = row < stop",
        "    token = (tl.load(order + row, mask=live, other=0) // K).to(tl.int64)",
        f"    left = {left}",
        f"    right = {right}",
        f"    acc = tl.dot(tl.trans(left), right, acc{precision})",
        "out = grad + expert.to(tl.int64) * (M * N) + m.to(tl.int64)[:, None] * N + n[None, :]",
        f"tl.store(out, {narrowed('acc', op.grad.tensor.dtype)}{f', mask={keep}' if keep else ''})",
    ]
    constants = {"E": op.num_experts, "K": op.k, "M": m, "N": n}
    entries = [(tile, f"{op.num_experts * -(-m // tile['BLOCK_M']) * -(-n // tile['BLOCK_N'])}") for tile in tiles]
    return _sketch(func, op, "gradient of a bank.", constants, parameters, lines, variants, entries)


def _operand(side: str, bound: Sequence[str], gathered: bool) -> str:
    """Load a block [BLOCK_K, columns] of sorted rows, or of rows of tokens."""
    name, row = ("gathered", "token") if gathered else ("sorted", "row.to(tl.int64)")
    mask = masked(["live[:, None]", *(f"({b})[None, :]" for b in bound)])
    return f"tl.load({name} + {row}[:, None] * {side} + {side.lower()}[None, :]{mask})"


def bias_grad(func: Func, op: BiasGrad) -> Sketch:
    """Text and launches. Raises: CompileError for what no kernel can hold."""
    require_floats(op, op.rows)
    n, variants = number(op, op.rows.tensor.shape[-1]), chosen(func, op, BIAS)
    tiles = [sizes_of(op, variant, 16, n, 1 << 20) for variant in variants]
    tiles = [{name: size for name, size in tile.items() if name != "BLOCK_M"} for tile in tiles]
    operands = {"rows": op.rows, "order": op.order, "offsets": op.offsets}
    parameters = _parameters(op, operands | ({"weights": op.weights} if op.weights is not None else {}))
    bound = [] if all(n % tile["BLOCK_N"] == 0 for tile in tiles) else ["n < N"]
    mask = masked(["live[:, None]", *(f"({b})[None, :]" for b in bound)])
    values, find = f"tl.load(rows + row.to(tl.int64)[:, None] * N + n[None, :]{mask}).to(tl.float32)", list[str]()
    if op.weights is not None:
        values = values.replace("row.to(tl.int64)", "(pair // K).to(tl.int64)") + " * weight[:, None]"
        find = [
            "    pair = tl.load(order + row, mask=live, other=0)",
            "    weight = tl.load(weights + pair, mask=live, other=0).to(tl.float32)",
        ]
    lines = [
        '"""A block of columns of an expert\'s gradient: the sum of its rows, BLOCK_K at a time."""',
        "arrive(PDL)",
        "BLOCKS: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N",
        "expert = tl.program_id(0) // BLOCKS",
        "n = tl.program_id(0) % BLOCKS * BLOCK_N + tl.arange(0, BLOCK_N)",
        "depth = tl.arange(0, BLOCK_K)",
        "start = tl.load(offsets + expert)",
        "stop = tl.load(offsets + expert + 1)",
        "total = tl.zeros([BLOCK_N], tl.float32)",
        "for first in tl.range(start, stop, BLOCK_K):",
        "    row = first + depth",
        "    live = row < stop",
        *find,
        f"    total += tl.sum({values}, axis=0)",
        f"out = {narrowed('total', op.grad.tensor.dtype)}",
        f"tl.store(grad + expert.to(tl.int64) * N + n, out{f', mask={bound[0]}' if bound else ''})",
    ]
    constants = {"E": op.num_experts, "K": op.k, "N": n}
    entries = [(tile, f"{op.num_experts * -(-n // tile['BLOCK_N'])}") for tile in tiles]
    return _sketch(func, op, "gradient of a bank's bias.", constants, parameters, lines, variants, entries)


def _parameters(op: BankGrad | BiasGrad, operands: Mapping[str, Value]) -> list[Parameter]:
    wiring = Wiring(op)
    given = [Parameter(name, POINTERS[value.tensor.dtype], wiring.operand(value)) for name, value in operands.items()]
    return [*given, Parameter("grad", POINTERS[op.grad.tensor.dtype], wiring.result(op.grad)), TOKENS]


def _sketch(
    func: Func,
    op: BankGrad | BiasGrad,
    summary: str,
    constants: Mapping[str, int],
    parameters: Sequence[Parameter],
    lines: Sequence[str],
    variants: Sequence[Variant],
    entries: Sequence[tuple[Mapping[str, int], str]],
) -> Sketch:
    """A module of one entry point, with a launch for each variant: its constants and its grid."""
    text = signature(func.name, parameters, {**entries[0][0], "PDL": 0}) + "\n" + indent(lines)
    schedules = list[Schedule]()
    for variant, (tile, grid) in zip(variants, entries, strict=True):
        warps, stages = int(variant.get("num_warps", 4)), int(variant.get("num_stages", 3))
        entry = Entry(func.name, tuple(parameters), {**tile, "PDL": 0}, (grid, "1"), warps, stages)
        schedules.append(Schedule(variant.get("up_to"), (entry,)))
    return Sketch(module_text(func, op, summary, constants, [text]), tuple(schedules))
