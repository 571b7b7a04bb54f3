"""The family `gathered` of the up-projection: rows are copied into the order of experts first, for many rows.

The copy costs a row's bytes twice, and lets the copy engine (TMA) fetch both operands, so that as many programs as
multiprocessors go over the tiles as in `persistent`: with four warps to a tile of 128 rows Triton divides the work
(warp specialisation) between those that fetch and those that multiply, activate and store; not where the columns of a
gated expert alternate in a transposed bank, since Triton 3.6 cannot divide what parts them.

With eight warps both kinds of columns make one sum of twice the width, since of a loop over the steps of all tiles with
two sums ptxas has every product waited for; where two it must be (the columns of a transposed bank that follow each
other), the loop over tiles stays apart from that over steps.

A row's sum over H is taken in steps of BLOCK_K, each in the order of the matrix instruction's own steps, whatever the
batch.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sparsec.codegen.triton.experts import ROWS_OF_H, activated, epilogue, up_parameters
from sparsec.codegen.triton.gemm import GroupedGemm
from sparsec.codegen.triton.launch import TOKENS, Entry, Parameter, Wiring, ceil_div, tensor_map
from sparsec.codegen.triton.persistent import DIVIDED, demand
from sparsec.codegen.triton.source import indent
from sparsec.codegen.triton.streamed import Streamed
from sparsec.codegen.triton.tile import POINTERS, padded
from sparsec.dialects.moe import GatherGemm
from sparsec.ir.core import Func

COPIED = 8, 1024
"""Rows and columns that a program of the copy takes."""


class Gathered:
    """The family for one op. Raises: CompileError for f32, packed banks, sizes that the copy engine does not take, and
    an op that no tile list comes with."""

    def __init__(self, func: Func, op: GatherGemm, gemm: GroupedGemm, wiring: Wiring) -> None:
        self.op, self.gemm, self.name = op, gemm, func.name
        demand(op, gemm)
        self.dtype = dtype = gemm.a.tensor.dtype
        self.streamed = Streamed(gemm, op.layout, op.up_transposed, "up", paired=not any(map(_divided, gemm.variants)))
        self.rows = Parameter("gathered", POINTERS[dtype], wiring.buffer(f"t * {gemm.k * gemm.inner * dtype.itemsize}"))
        self.parameters = [self.rows if p.name == "x" else p for p in up_parameters(gemm, op, wiring)]
        self.order, self.up = (next(p for p in self.parameters if p.name == name) for name in ("order", "up"))
        self.x = gemm.pointer("x", op.x, wiring)

    def functions(self) -> list[str]:
        return [self._copy(), self._gemm()]

    def launches(self, variant: Mapping[str, Any]) -> tuple[Entry, ...]:
        sizes, gemm = self.streamed.sizes(variant), self.gemm
        rows, columns = COPIED[0], min(COPIED[1], padded(gemm.inner))
        pairs = f"t * {gemm.k}"
        grid = ceil_div(pairs, rows), str(-(-gemm.inner // columns))
        copied = {"ROWS": rows, "BLOCK_H": columns, "PDL": 0}
        copy = Entry(f"{self.name}_copy", (self.x, self.order, self.rows, TOKENS), copied, grid, 4, 1)
        shape = tensor_map("gathered", self.dtype, self.rows.argument, [pairs, gemm.inner], [gemm.inner, 1],
                           [sizes["BLOCK_M"], sizes["BLOCK_K"]])  # fmt: skip
        maps = {"gathered": shape, "up": self.streamed.map(self.up.argument, sizes)}
        given = tuple(maps.get(parameter.name, parameter) for parameter in self.parameters)
        most, _ = gemm.grid(sizes)
        warps, stages = int(variant.get("num_warps", 4)), int(variant.get("num_stages", 3))
        warps = max(8, warps) if self.streamed.alternate else warps
        constants = {**sizes, "DIVIDED": int((sizes["BLOCK_M"], warps) == DIVIDED), "PDL": 0}
        return copy, Entry(f"{self.name}_gathered", given, constants, (f"min(sms, {most})", "1"), warps, stages)

    def _copy(self) -> str:
        mask = "(rows < tokens * K)[:, None]"
        whole = self.gemm.inner % min(COPIED[1], padded(self.gemm.inner)) == 0
        mask += "" if whole else " & (columns < H)[None, :]"
        lines = [
            '"""Row i of gathered is the row of x of the token of pair order[i]."""',
            "arrive(PDL)",
            "rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)",
            "columns = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)",
            "token = tl.load(order + rows, mask=rows < tokens * K, other=0) // K",
            f"row = tl.load(x + token.to(tl.int64)[:, None] * H + columns[None, :], mask={mask})",
            f"tl.store(gathered + rows.to(tl.int64)[:, None] * H + columns[None, :], row, mask={mask})",
        ]
        arguments = "x, order, gathered, tokens, ROWS: tl.constexpr, BLOCK_H: tl.constexpr, PDL: tl.constexpr"
        return f'@triton.jit(do_not_specialize=["tokens"])\ndef {self.name}_copy({arguments}):\n{indent(lines)}'

    def _gemm(self) -> str:
        bound = [] if self.streamed.whole() else ["columns < I"]
        pair = ["pair = tl.load(order + rows, mask=live, other=0)"] if self.op.weights is not None else []
        loop = [
            "expert, start, stop, row_block, column_block = listed_tile(",
            "    tile, tiles, tokens * K, E, COLUMNS, BLOCK_M, GROUP_M",
            ")",
            "first = column_block * BLOCK_N",
            "# Dividing the work, Triton 3.6 moves `first_row` on for the lower half of the rows, which are not to",
            "# depend on it.",
            "first_row = start + row_block * BLOCK_M",
            *self.streamed.products("H", "gathered.load([first_row, k])"),
            "rows = row_block * BLOCK_M + tl.arange(0, BLOCK_M) + start",
            "live = rows < stop",
            *pair,
            "columns = first + tl.arange(0, BLOCK_N)",
            *epilogue(self.op, self.streamed.columns(), bound),
        ]
        result = activated(self.op, loop, ("tile", "tiles", "counts", "count", "gathered", "first_row"))
        keep = " & ".join(["live[:, None]", *(f"({b})[None, :]" for b in bound)])
        loop.append(f"tl.store(h + rows.to(tl.int64)[:, None] * I + columns[None, :], {result}, mask={keep})")
        flatten = "not DIVIDED" if len(self.streamed.parts()) == 1 else "False"
        lines = [
            f'"""{ROWS_OF_H}"""',
            "COLUMNS: tl.constexpr = (I + BLOCK_N - 1) // BLOCK_N",
            "count = tl.load(tile_list(tiles, tokens * K, E, BLOCK_M)) * COLUMNS",
            "arrive(PDL)",
            "# Rows past an expert's own are the next one's: they are multiplied, and not stored.",
            "for tile in tl.range(",
            f"    tl.program_id(0), count, tl.num_programs(0), warp_specialize=DIVIDED, flatten={flatten}",
            "):",
            *(f"    {line}" for line in loop),
        ]
        names = [parameter.name for parameter in self.parameters]
        constants = [f"{name}: tl.constexpr" for name in ("BLOCK_M", "BLOCK_N", "BLOCK_K", "DIVIDED", "PDL")]
        head = f"def {self.name}_gathered({', '.join([*names, *constants])}):"
        return f'@triton.jit(do_not_specialize=["tokens"])\n{head}\n{indent(lines)}'


def _divided(variant: Mapping[str, Any]) -> bool:
    """Whether Triton divides the work of a variant's programs."""
    return (int(variant.get("block_m", 64)), int(variant.get("num_warps", 4))) == DIVIDED
