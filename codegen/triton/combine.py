"""The kernels of the down-projection and the sum over a token's experts: `moe.gemm_combine`.

The GEMM leaves one row for each pair, rounded to the element type of the result, and a second kernel adds those of a
token in f32 in the order of its slots, so that the result does not depend on who comes first. The GEMM weighs the rows,
but where a tail has to see whole ones. With one choice per token there is nothing to add, and the GEMM writes the
result itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sparsec.codegen.triton.banks import bank_of, scale_parameters
from sparsec.codegen.triton.gemm import GroupedGemm, masked, narrowed
from sparsec.codegen.triton.launch import I32, TOKENS, Entry, Parameter, Wiring
from sparsec.codegen.triton.region import RegionCode
from sparsec.codegen.triton.source import indent, library
from sparsec.codegen.triton.tile import FLOATS, INTEGERS, POINTERS, Names, Tile, known_sizes, padded, unsupported
from sparsec.dialects.moe import GemmCombine
from sparsec.ir.core import Func, Value
from sparsec.ir.types import DType

MAX_ROW = 16384
"""Most lanes of a row that a tail can hold in registers."""

LINE, FETCHED, FIRST = 128, 8, 512
"""Bytes of a cache line; lines of each column of weights to ask for early, so that those of all programs that run at
once fit into the L2; how many programs that are at most."""


class Tiles:
    """The family `tiles`: a program for each block of an expert's rows and of columns. Any element type.

    A row's sum over I is taken in steps of BLOCK_K, and a token's in the order of its slots, whatever the batch.
    """

    def __init__(self, func: Func, op: GemmCombine, gemm: GroupedGemm, wiring: Wiring) -> None:
        self.name, self.gemm = f"{func.name}_gemm", gemm
        self.down = Down(func, op, gemm, wiring)
        self.parameters = self.down.parameters

    def functions(self) -> list[str]:
        bound = [] if self.gemm.even(self.gemm.columns, "BLOCK_N") else ["columns < H"]
        body = indent(self.down.lines(_loop(self.gemm, bound), bound))
        signature = self.gemm.signature(self.name, self.parameters)
        return [f"{signature}\n{body}", *self.down.functions()]

    def launches(self, variant: Mapping[str, Any]) -> tuple[Entry, ...]:
        sizes = self.gemm.sizes(variant)
        first = self.gemm.entry(self.name, self.parameters, variant, sizes, self.gemm.grid(sizes))
        return (first, *self.down.launches())


class Down:
    """What every down-projection that leaves a row for each pair shares: its parameters, and the launch that adds rows.

    Attributes:
        parameters: `h, order, tiles (or offsets), (weights), down, (down_bias), (down_scale), out, (kept), tokens`.
        out: `partial` [pairs, H] in the element type of `y`, or `y` itself where there is nothing to add.
        weighs: whether the GEMM weighs its rows.
        kept: `kept` [pairs], which the GEMM sets to 0 for a skipped pair and to 1 else, where a tail has to know.
    """

    def __init__(self, func: Func, op: GemmCombine, gemm: GroupedGemm, wiring: Wiring) -> None:
        self.op, self.gemm, self.dtype = op, gemm, op.y.tensor.dtype
        y = Parameter("y", POINTERS[self.dtype], wiring.result(op.y))
        alone = op.k == 1 and op.tail is None
        size = op.k * gemm.columns * self.dtype.itemsize
        self.out = out = y if alone else Parameter("partial", y.type, wiring.buffer(f"t * {size}"))
        self.kept = Parameter("kept", I32, wiring.buffer(f"t * {op.k * 4}")) if op.tail is not None else None
        self.weighs = op.weighted and op.tail is None
        kept = [self.kept] if self.kept is not None else []
        weights = [gemm.pointer("weights", op.weights, wiring)] if op.weighted else []
        self.parameters = [
            *(
                gemm.pointer(name, value, wiring)
                for name, value in {"h": op.h, "order": op.order, **gemm.where()}.items()
            ),
            *(weights if self.weighs else []),
            gemm.pointer("down", op.down, wiring),
            *([gemm.pointer("down_bias", op.down_bias, wiring)] if op.down_bias is not None else []),
            *scale_parameters(gemm, wiring),
            out,
            *kept,
            TOKENS,
        ]
        self._sum: tuple[str, Entry] | None = None
        if not alone:
            rest = [gemm.pointer(f"param_{i}", value, wiring) for i, value in enumerate(op.tail_params)]
            given = (out, y) if self.kept is None else (out, *kept, *weights, *rest, y)
            self._sum = (_combine if self.kept is None else _finish)(func, op, gemm.columns, given)

    def functions(self) -> list[str]:
        return [] if self._sum is None else [self._sum[0]]

    def launches(self) -> list[Entry]:
        return [] if self._sum is None else [self._sum[1]]

    def lines(self, loop: list[str], bound: list[str], bank: str = "down") -> list[str]:
        """The body of a GEMM whose programs make one tile each.

        Args:
            loop: makes `acc` [BLOCK_M, BLOCK_N], the sums of the tile's `rows` of h and `columns` (from `first` on).
            bound: conditions of `columns`.
            bank: the parameter that points to the weights.
        """
        mask = " & ".join(["live[:, None]", *(f"({b})[None, :]" for b in bound)])
        ahead = [
            *self.gemm.rows(),
            "first = column_block * BLOCK_N",
            "columns = first + tl.arange(0, BLOCK_N)",
            *self._fetch(bank),
        ]
        kept = "tl.full([BLOCK_M], 0, tl.int32) + (expert < E).to(tl.int32)"
        bias = f"tl.load(down_bias + expert.to(tl.int64) * H + columns{masked(bound)}).to(tl.float32)[None, :]"
        does = f"Row p of {self.out.name} is the down-projection of pair p by its expert"
        return [
            f'"""{does}{", times its weight" if self.weighs else ""}; 0 if skipped."""',
            *self.gemm.head("H", ahead),
            "if expert > E:",
            "    return",
            f"out = {self.out.name} + pair.to(tl.int64)[:, None] * H + columns[None, :]",
            *([f"tl.store(kept + pair, {kept}, mask=live & (column_block == 0))"] if self.kept is not None else []),
            "if expert == E:",
            f"    tl.store(out, {self.rounded('tl.zeros([BLOCK_M, BLOCK_N], tl.float32)')}, mask={mask})",
            "    return",
            *loop,
            *([f"acc += {bias}"] if self.op.down_bias is not None else []),
            *(["acc *= tl.load(weights + pair, mask=live, other=0).to(tl.float32)[:, None]"] if self.weighs else []),
            f"tl.store(out, {self.rounded('acc')}, mask={mask})",
        ]

    def _fetch(self, bank: str) -> list[str]:
        """Ask for FETCHED lines of each column of the weights while GEMM1 still runs, which does not write them."""
        if self.op.packing == "mxfp4":  # [E, KB, H, 64]: a line holds a block of two columns
            blocks = -(-self.gemm.inner // 128)
            ahead = f"tl.arange(0, {below(min(2 * FETCHED, blocks))})[None, :] * (H * 64)"
            expert = f"{bank} + tl.minimum(expert, E - 1).to(tl.int64) * ({blocks} * H * 64)"
            columns = "tl.minimum(first + tl.arange(0, BLOCK_N // 2) * 2, H - 1)[:, None] * 64"
            return [f"if tl.program_id(0) < {FIRST}:", f"    fetch({expert} + {columns} + {ahead}, PDL)"]
        line, inner = LINE // self.gemm.bank.tensor.dtype.itemsize, self.gemm.inner
        expert = f"{bank} + tl.minimum(expert, E - 1).to(tl.int64) * (H * I)"
        if self.op.down_transposed:
            depth = f"tl.arange(0, {below(min(FETCHED * line, inner))})[:, None] * H"
            columns = f"tl.minimum(first + tl.arange(0, (BLOCK_N + {line - 1}) // {line}) * {line}, H - 1)[None, :]"
        else:
            depth = f"tl.arange(0, {below(max(1, min(FETCHED, inner // line)))})[None, :] * {line}"
            columns = "tl.minimum(columns, H - 1)[:, None] * I"
        return [f"if tl.program_id(0) < {FIRST}:", f"    fetch({expert} + {columns} + {depth}, PDL)"]

    def rounded(self, text: str) -> str:
        """An f32 tile in the element type of `out`."""
        return narrowed(text, self.dtype)


def below(size: int) -> int:
    """The greatest power of two that is no more than `size`."""
    return 1 << (size.bit_length() - 1)


def down_summary(op: GemmCombine) -> str:
    """What the kernels of a down-projection compute."""
    does = ["rows of h times their expert's down-projection"]
    does += ["finished"] if op.tail is not None else []
    does += ["weighed"] if op.weighted else []
    does += [] if op.k == 1 and op.tail is None else ["and added per token in the order of slots"]
    return f"{', '.join(does)}."


def _loop(gemm: GroupedGemm, bound: list[str]) -> list[str]:
    """The sums over I, by addresses."""
    bank = bank_of(gemm)
    return [
        f"depth = tl.arange(0, {bank.depth})",
        *bank.rows("h", "rows"),
        *bank.start(),
        *bank.at("down", "columns", "first"),
        "acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)",
        *bank.loop(bound, {"down": "acc"}),
    ]


def _combine(func: Func, op: GemmCombine, hidden: int, parameters: tuple[Parameter, ...]) -> tuple[str, Entry]:
    """The kernel that adds rows as they are, a block of columns in a program."""
    block, name = min(1024, padded(hidden)), f"{func.name}_combine"
    tail = hidden % block != 0
    mask = ", mask=columns < H, other=0" if tail else ""
    lines = [
        '"""One token: the sum of its K rows of partial, slot by slot, rounded once."""',
        "arrive(PDL)",
        "token = tl.program_id(0).to(tl.int64)",
        "columns = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)",
        "total = tl.zeros([BLOCK_H], tl.float32)",
        "for slot in tl.static_range(K):",
        f"    total += tl.load(partial + (token * K + slot) * H + columns{mask}).to(tl.float32)",
        f"tl.store(y + token * H + columns, {narrowed('total', op.y.tensor.dtype)}"
        f"{', mask=columns < H' if tail else ''})",
    ]
    text = f"@triton.jit\ndef {name}(partial, y, BLOCK_H: tl.constexpr, PDL: tl.constexpr):\n{indent(lines)}"
    return text, Entry(name, parameters, {"BLOCK_H": block, "PDL": 0}, ("t", str(-(-hidden // block))), 4, 1)


RESERVED = ("partial", "kept", "weights", "y", "token", "columns", "total", "slot", "pair", "row", "weight", "PDL")


def _finish(func: Func, op: GemmCombine, hidden: int, parameters: tuple[Parameter, ...]) -> tuple[str, Entry]:
    """The kernel that takes whole rows through the tail, one token in a program. Raises: CompileError."""
    assert op.tail is not None
    lanes, name = padded(hidden), f"{func.name}_finish"
    if lanes > MAX_ROW:
        raise unsupported(op, f"a tail over rows of {hidden} columns does not fit into registers")
    given = [parameter.name for parameter in parameters]
    code = RegionCode(Names((*RESERVED, *given, *library())), rounds=False)
    within = "(columns < H)[None, :]" if lanes != hidden else ""
    loads = [_vector(code, op, value, f"param_{i}") for i, value in enumerate(op.tail_params)]
    (row,) = code.run(op.tail, [Tile("row", (hidden,), True, op.tail.args[0].tensor.dtype), *loads])
    head, steps = code.lines[: len(loads)], code.lines[len(loads) :]
    weight = ["weight = tl.load(weights + pair).to(tl.float32)"] if op.weighted else []
    body = [
        "pair = token * K + slot",
        f"row = tl.load(partial + pair * H + columns[None, :]{masked([within] if within else [])}).to(tl.float32)",
        *steps,
        *weight,
        "# A pair that is skipped adds nothing, whatever the tail makes of zeros.",
        f"total += tl.where(tl.load(kept + pair) != 0, {row.text}{' * weight' if weight else ''}, 0.0)",
    ]
    store_mask = f", mask={within}" if within else ""
    lines = [
        '"""One token: its K rows of partial through the tail, weighed and added slot by slot, rounded once."""',
        "arrive(PDL)",
        "token = tl.program_id(0).to(tl.int64)",
        f"columns = tl.arange(0, {lanes})",
        *head,
        f"total = tl.zeros([1, {lanes}], tl.float32)",
        "for slot in range(K):",
        *(f"    {line}" for line in body),
        f"tl.store(y + token * H + columns[None, :], {narrowed('total', op.y.tensor.dtype)}{store_mask})",
    ]
    text = f"@triton.jit\ndef {name}({', '.join(given)}, PDL: tl.constexpr):\n{indent(lines)}"
    return text, Entry(name, parameters, {"PDL": 0}, ("t", "1"), 4 if lanes <= 2048 else 8, 1)


def _vector(code: RegionCode, op: GemmCombine, value: Value, pointer: str) -> Tile:
    """Load a vector or a scalar that the tail reads. Raises: CompileError for anything larger."""
    type = value.tensor
    sizes = known_sizes(type, False, op)
    if len(sizes) > 1 or type.dtype not in FLOATS | INTEGERS:
        raise unsupported(op, f"%{value.name} is {type}: a tail reads vectors of numbers")
    name = code.names.fresh(f"{pointer}_tile")
    lane = f"tl.arange(0, {padded(sizes[0])})" if sizes else ""
    bound = f", mask={lane} < {sizes[0]}, other=0" if sizes and padded(sizes[0]) != sizes[0] else ""
    wide = ".to(tl.float32)" if type.dtype in FLOATS else ".to(tl.int32)"
    load = f"tl.load({pointer}{f' + {lane}' if lane else ''}{bound})"
    code.lines.append(f"{name} = {load}{'' if type.dtype is DType.f32 else wide}")
    return Tile(name, sizes, False, type.dtype, pointer)
