"""The kernels of the gradients of banks and of their biases: `moe.bank_grad`, `moe.bias_grad`.

A program computes one block of one expert's gradient and stores it, zeros where the expert has no rows: nothing is
cleared before, and nothing is added up between programs, so that results do not depend on who comes first. Experts
follow each other; within one, GROUP_M blocks of rows share a block of columns before the next one is read.

In the family `tiles` both operands come by pointers. In `tma` the copy engine brings the rows that lie in the order of
experts, block by block as long as all of it is the expert's. What is left over is masked: the next expert's rows may
hold anything, and are not to be multiplied even by zero. Either way the tokens of a step are looked up a step ahead,
since a load whose address waits for another load is otherwise not under way while products are made.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from sparsec.codegen.triton.gemm import GROUP_M, masked, narrowed
from sparsec.codegen.triton.gradient_kernels import (
    Variant,
    chosen,
    family_of,
    number,
    require_engine,
    require_floats,
    signature,
    sizes_of,
)
from sparsec.codegen.triton.launch import TOKENS, Entry, Parameter, Schedule, Sketch, Wiring, tensor_map
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
    return _Bank(func, op).sketch()


class _Bank:
    def __init__(self, func: Func, op: BankGrad) -> None:
        require_floats(op, op.rows, op.tokens)
        self.func, self.op, self.dtype = func, op, op.rows.tensor.dtype
        self.columns, of_tokens = (number(op, value.tensor.shape[-1]) for value in (op.rows, op.tokens))
        self.m, self.n = (of_tokens, self.columns) if op.transposed else (self.columns, of_tokens)
        self.variants = chosen(func, op, BANK_F32 if self.dtype is DType.f32 else BANK)
        self.tiles = [sizes_of(op, variant, self.m, self.n, 1 << 20) for variant in self.variants]
        operands = {"sorted": op.rows, "gathered": op.tokens, "order": op.order, "offsets": op.offsets}
        self.parameters = _parameters(op, operands)
        self.families = [family_of(op, variant) for variant in self.variants]
        if "tma" in self.families:
            require_engine(op, self.dtype, self.columns)

    def sketch(self) -> Sketch:
        flags = {**self.tiles[0], "PDL": 0}
        texts = [
            signature(self._name(family), self.parameters, flags) + "\n" + indent(self._lines(family))
            for family in dict.fromkeys(self.families)
        ]
        constants = {"E": self.op.num_experts, "K": self.op.k, "M": self.m, "N": self.n, "GROUP_M": GROUP_M}
        entries = [self._entry(*each) for each in zip(self.variants, self.tiles, self.families, strict=True)]
        return _sketch(self.func, self.op, "gradient of a bank.", constants, texts, self.variants, entries)

    def _name(self, family: str) -> str:
        return self.func.name + ("" if family == "tiles" else f"_{family}")

    def _entry(self, variant: Variant, tile: Mapping[str, int], family: str) -> Entry:
        given = list(self.parameters)
        if family == "tma":
            shape: list[int | str] = [f"t * {self.op.k}", self.columns]
            block = [tile["BLOCK_K"], tile["BLOCK_N" if self.op.transposed else "BLOCK_M"]]
            given[0] = tensor_map("sorted", self.dtype, given[0].argument, shape, [self.columns, 1], block)
        blocks = -(-self.m // tile["BLOCK_M"]) * -(-self.n // tile["BLOCK_N"])
        return _entry(self._name(family), given, variant, tile, self.op.num_experts * blocks)

    def _bound(self, side: str, family: str) -> list[str]:
        """Conditions of a side of the gradient, M or N."""
        size = self.m if side == "M" else self.n
        own = [tile for tile, named in zip(self.tiles, self.families, strict=True) if named == family]
        return [] if all(size % tile[f"BLOCK_{side}"] == 0 for tile in own) else [f"{side.lower()} < {side}"]

    def _lines(self, family: str) -> list[str]:
        bounds = [f"({b})[:, None]" for b in self._bound("M", family)]
        bounds += [f"({b})[None, :]" for b in self._bound("N", family)]
        mask = f", mask={' & '.join(bounds)}" if bounds else ""
        stored = narrowed("acc", self.op.grad.tensor.dtype)
        return [
            '"""A block of an expert\'s gradient: the sum over its rows, BLOCK_K at a time."""',
            "arrive(PDL)",
            "BLOCKS: tl.constexpr = (M + BLOCK_M - 1) // BLOCK_M",
            "COLUMNS: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N",
            "expert = tl.program_id(0) // (BLOCKS * COLUMNS)",
            "block = tl.program_id(0) % (BLOCKS * COLUMNS)",
            "group = block // (GROUP_M * COLUMNS) * GROUP_M",
            "rows = tl.minimum(BLOCKS - group, GROUP_M)",
            "first_m = (group + block % (GROUP_M * COLUMNS) % rows) * BLOCK_M",
            "first_n = block % (GROUP_M * COLUMNS) // rows * BLOCK_N",
            "m = first_m + tl.arange(0, BLOCK_M)",
            "n = first_n + tl.arange(0, BLOCK_N)",
            "depth = tl.arange(0, BLOCK_K)",
            "start = tl.load(offsets + expert)",
            "stop = tl.load(offsets + expert + 1)",
            "acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)",
            "pair = tl.load(order + start + depth, mask=start + depth < stop, other=0)",
            *(self._streamed() if family == "tma" else self._pointed()),
            "out = grad + expert.to(tl.int64) * (M * N) + m.to(tl.int64)[:, None] * N + n[None, :]",
            f"tl.store(out, {stored}{mask})",
        ]

    def _pointed(self) -> list[str]:
        precision = ', input_precision="ieee"' if self.dtype is DType.f32 else ""
        return [
            "for first in tl.range(start, stop, BLOCK_K):",
            "    row = first + depth",
            "    live = row < stop",
            f"    by_token = {self._load('tokens', 'tiles', True)}",
            f"    by_row = {self._load('rows', 'tiles', True)}",
            f"    acc = {self._product(precision)}",
            "    pair = tl.load(order + row + BLOCK_K, mask=row + BLOCK_K < stop, other=0)",
        ]

    def _streamed(self) -> list[str]:
        at = "[{}, first_n]" if self.op.transposed else "[{}, first_m]"
        return [
            "whole = start + (stop - start) // BLOCK_K * BLOCK_K",
            "for first in tl.range(start, whole, BLOCK_K):",
            f"    by_row = sorted.load({at.format('first')})",
            f"    by_token = {self._load('tokens', 'tma', False)}",
            f"    acc = {self._product()}",
            "    row = first + BLOCK_K + depth",
            "    pair = tl.load(order + row, mask=row < stop, other=0)",
            "if whole < stop:",
            "    live = whole + depth < stop",
            f"    by_row = tl.where(live[:, None], sorted.load({at.format('whole')}), 0.0)",
            f"    by_token = {self._load('tokens', 'tma', True)}",
            f"    acc = {self._product()}",
        ]

    def _load(self, which: str, family: str, ragged: bool) -> str:
        """A block [BLOCK_K, columns] of rows of tokens, or of rows in the order of experts."""
        side = "M" if (which == "tokens") is self.op.transposed else "N"
        name, row = ("gathered", "(pair // K)") if which == "tokens" else ("sorted", "row")
        live = ["live[:, None]"] if ragged else []
        mask = masked([*live, *(f"({b})[None, :]" for b in self._bound(side, family))])
        return f"tl.load({name} + {row}.to(tl.int64)[:, None] * {side} + {side.lower()}[None, :]{mask})"

    def _product(self, precision: str = "") -> str:
        left, right = ("by_token", "by_row") if self.op.transposed else ("by_row", "by_token")
        return f"tl.dot(tl.trans({left}), {right}, acc{precision})"


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
    text = signature(func.name, parameters, {**tiles[0], "PDL": 0}) + "\n" + indent(lines)
    entries = [
        _entry(func.name, parameters, variant, tile, op.num_experts * -(-n // tile["BLOCK_N"]))
        for variant, tile in zip(variants, tiles, strict=True)
    ]
    return _sketch(func, op, "gradient of a bank's bias.", constants, [text], variants, entries)


def _parameters(op: BankGrad | BiasGrad, operands: Mapping[str, Value]) -> list[Parameter]:
    wiring = Wiring(op)
    given = [Parameter(name, POINTERS[value.tensor.dtype], wiring.operand(value)) for name, value in operands.items()]
    return [*given, Parameter("grad", POINTERS[op.grad.tensor.dtype], wiring.result(op.grad)), TOKENS]


def _entry(name: str, given: Sequence[Parameter], variant: Variant, tile: Mapping[str, int], programs: int) -> Entry:
    warps, stages = int(variant.get("num_warps", 4)), int(variant.get("num_stages", 3))
    return Entry(name, tuple(given), {**tile, "PDL": 0}, (str(programs), "1"), warps, stages)


def _sketch(
    func: Func,
    op: BankGrad | BiasGrad,
    summary: str,
    constants: Mapping[str, int],
    texts: Sequence[str],
    variants: Sequence[Variant],
    entries: Sequence[Entry],
) -> Sketch:
    """A module with one launch for each variant."""
    schedules = [Schedule(v.get("up_to"), (entry,)) for v, entry in zip(variants, entries, strict=True)]
    return Sketch(module_text(func, op, summary, constants, texts), tuple(schedules))
