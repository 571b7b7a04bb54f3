"""The family `persistent` of the down-projection: as many programs as multiprocessors, each going over many tiles.

Rows of h lie one behind the other for each expert, so that the copy engine (TMA) of Hopper fetches both operands. With
four warps to a tile of 128 rows, Triton adds eight more and divides the work (warp specialisation): some only fetch,
into the next tile, while the others multiply and store. With eight warps all do everything, in one loop over the steps
of all tiles, so that the next one's first blocks are on their way while a tile is stored. The loop over tiles carries
nothing from one to the next: Triton 3.6 would mix them where it makes one loop of two.

A row's sum over I is taken in steps of BLOCK_K, each in the order of the matrix instruction's own steps, and a token's
in the order of its slots, whatever the batch.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sparsec.codegen.triton.combine import Down
from sparsec.codegen.triton.gemm import GroupedGemm, masked
from sparsec.codegen.triton.launch import Entry, Parameter, Wiring, tensor_map
from sparsec.codegen.triton.source import indent
from sparsec.codegen.triton.streamed import Streamed
from sparsec.codegen.triton.tile import unsupported
from sparsec.dialects.moe import GatherGemm, GemmCombine
from sparsec.ir.core import Func
from sparsec.ir.types import DType

DIVIDED = 128, 4
"""Rows of a tile and warps of a program whose work Triton 3.6 divides."""


def demand(op: GatherGemm | GemmCombine, gemm: GroupedGemm) -> None:
    """What going over tiles takes: narrow floats and a list of the tiles. Raises: CompileError."""
    dtype = gemm.a.tensor.dtype
    if dtype not in (DType.bf16, DType.f16):
        raise unsupported(op, f"%{gemm.a.name} is {dtype}: persistent kernels take bf16 and f16")
    if op.tiles is None:
        raise unsupported(op, "persistent kernels read their tiles from a list, which the op does not take")


class Persistent:
    """The family for one op. Raises: CompileError for f32, packed banks, sizes that the copy engine does not take, and
    an op that no tile list comes with."""

    def __init__(self, func: Func, op: GemmCombine, gemm: GroupedGemm, wiring: Wiring) -> None:
        self.op, self.gemm, self.name = op, gemm, f"{func.name}_persistent"
        demand(op, gemm)
        self.streamed = Streamed(gemm, "single", op.down_transposed, "down")
        self.down = Down(func, op, gemm, wiring)

    def functions(self) -> list[str]:
        bound = [] if self.streamed.whole() else ["H"]
        text = self._signature() + "\n" + indent(self._lines(bound))
        return [text, *self.down.functions()]

    def launches(self, variant: Mapping[str, Any]) -> tuple[Entry, ...]:
        sizes, gemm = self.sizes(variant), self.gemm
        most, _ = gemm.grid(sizes)
        warps = int(variant.get("num_warps", 4))
        constants = {**sizes, "DIVIDED": int((sizes["BLOCK_M"], warps) == DIVIDED), "PDL": 0}
        stages = int(variant.get("num_stages", 3))
        entry = Entry(self.name, tuple(self._parameters(sizes)), constants, (f"min(sms, {most})", "1"), warps, stages)
        return (entry, *self.down.launches())

    def sizes(self, variant: Mapping[str, Any]) -> dict[str, int]:
        """Tile sizes of a variant. BLOCK_K divides I: no sum has a part that comes from beyond it."""
        sizes = self.streamed.sizes(variant)
        if sizes["BLOCK_N"] > 256:
            raise unsupported(self.op, f"persistent kernels have tiles of up to 256 columns, not {sizes['BLOCK_N']}")
        return sizes

    def _parameters(self, sizes: Mapping[str, int]) -> list[Parameter]:
        """The down-projection's, with `h` and `down` as descriptors."""
        gemm, dtype = self.gemm, self.gemm.a.tensor.dtype
        block = [sizes["BLOCK_M"], sizes["BLOCK_K"]]
        given = list[Parameter]()
        for parameter in self.down.parameters:
            match parameter.name:
                case "h":
                    shape: list[int | str] = [f"t * {gemm.k}", gemm.inner]
                    given.append(tensor_map("h", dtype, parameter.argument, shape, [gemm.inner, 1], block))
                case "down":
                    given.append(self.streamed.map(parameter.argument, sizes))
                case _:
                    given.append(parameter)
        return given

    def _signature(self) -> str:
        names = [parameter.name for parameter in self.down.parameters]
        constants = ("BLOCK_M", "BLOCK_N", "BLOCK_K", "DIVIDED", "PDL")
        listed = ", ".join([*names, *(f"{name}: tl.constexpr" for name in constants)])
        return f'@triton.jit(do_not_specialize=["tokens"])\ndef {self.name}({listed}):'

    def _lines(self, bound: list[str]) -> list[str]:
        """The body; `bound` is the number of columns where the last block of them is not whole."""
        down, transposed = self.down, self.op.down_transposed
        out = f"{down.out.name} + pair.to(tl.int64)[:, None] * H + columns[None, :]"
        mask = " & ".join(["live[:, None]", *(f"(columns < {size})[None, :]" for size in bound)])
        kept = "tl.store(kept + pair, tl.full([BLOCK_M], {}, tl.int32), mask=live & (column_block == 0))"
        zeros = down.rounded("tl.zeros([BLOCK_M, BLOCK_N], tl.float32)")
        bias = f"tl.load(down_bias + expert.to(tl.int64) * H + columns{masked([f'columns < {s}' for s in bound])})"
        find = [
            "expert, start, stop, row_block, column_block = listed_tile(",
            "    tile, tiles, tokens * K, E, COLUMNS, BLOCK_M, GROUP_M",
            ")",
        ]
        rows = [
            "rows = row_block * BLOCK_M + tl.arange(0, BLOCK_M) + start",
            "live = rows < stop",
            "pair = tl.load(order + rows, mask=live, other=0)",
        ]

        at = "expert, k, column" if transposed else "expert, column, k"
        block = f"down.load([{at}]).reshape({'BLOCK_K, BLOCK_N' if transposed else 'BLOCK_N, BLOCK_K'})"
        skipped = [
            *find,
            *rows,
            *([kept.format(0)] if down.kept is not None else []),
            "columns = column_block * BLOCK_N + tl.arange(0, BLOCK_N)",
            f"tl.store({out}, {zeros}, mask={mask})",
        ]
        loop = [
            *find,
            "column = column_block * BLOCK_N",
            "acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)",
            "# Dividing the work, Triton 3.6 moves `first` on for the lower half of the rows: they are not to depend",
            "# on it.",
            "first = start + row_block * BLOCK_M",
            "for k in tl.range(0, I, BLOCK_K):",
            f"    acc = tl.dot(h.load([first, k]), {block if transposed else f'tl.trans({block})'}, acc)",
            *rows,
            *([kept.format(1)] if down.kept is not None else []),
            "columns = column + tl.arange(0, BLOCK_N)",
            *([f"acc += {bias}.to(tl.float32)[None, :]"] if self.op.down_bias is not None else []),
            *(["acc *= tl.load(weights + pair, mask=live, other=0).to(tl.float32)[:, None]"] if down.weighs else []),
            f"tl.store({out}, {down.rounded('acc')}, mask={mask})",
        ]
        times = ", times its weight" if down.weighs else ""
        return [
            f'"""Row p of {down.out.name} is the down-projection of pair p by its expert{times}; 0 if skipped."""',
            "COLUMNS: tl.constexpr = (H + BLOCK_N - 1) // BLOCK_N",
            "counts = tile_list(tiles, tokens * K, E, BLOCK_M)",
            "count, every = tl.load(counts) * COLUMNS, tl.load(counts + 1) * COLUMNS",
            "arrive(PDL)",
            "for tile in tl.range(count + tl.program_id(0), every, tl.num_programs(0)):",
            *(f"    {line}" for line in skipped),
            "# Rows of h past an expert's own are the next one's: they are multiplied, and not stored.",
            "for tile in tl.range(",
            "    tl.program_id(0), count, tl.num_programs(0), warp_specialize=DIVIDED, flatten=not DIVIDED",
            "):",
            *(f"    {line}" for line in loop),
        ]
