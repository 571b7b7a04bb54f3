"""Families whose weights come by the copy engine of Hopper (TMA): `swap` and `tma`, for both GEMMs.

One thread asks for a block of weights, which the engine writes to shared memory as the tensor cores read it; rows of
tokens are gathered by addresses as in `tiles`. In `swap` the operands of the tensor cores change places: the weights
are the side of 64 or 128, the tokens the one that may be as narrow as 16. With a few rows per expert this is the way to
Hopper's own matrix instruction (wgmma), whose first side has at least 64. `tma` leaves them in place, for many rows.

A row's sum runs over the inner dimension in steps of BLOCK_K, each in the order of the matrix instruction's own steps,
whatever the other rows of the tile and their number are.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from sparsec.codegen.triton.combine import Down
from sparsec.codegen.triton.experts import ROWS_OF_H, activated, epilogue, up_parameters
from sparsec.codegen.triton.gemm import GroupedGemm
from sparsec.codegen.triton.launch import Argument, Entry, Parameter, Wiring, tensor_map
from sparsec.codegen.triton.source import indent
from sparsec.codegen.triton.tile import unsupported
from sparsec.dialects.moe import GatherGemm, GemmCombine
from sparsec.ir.core import Func
from sparsec.ir.types import DType

ENGINE_BYTES = 16
"""The copy engine takes rows that are a multiple of this long."""


class Streamed:
    """What these families share: the weights' descriptor, tile sizes, and the loop.

    Args:
        layout, transposed: of the bank.
        bank: the descriptor's name.
        swapped: whether the weights are the tensor cores' first operand.
        paired: whether both kinds of columns of a gated expert are to come as one block, where they can.
    """

    def __init__(
        self, gemm: GroupedGemm, layout: str, transposed: bool, bank: str, swapped: bool = False, paired: bool = False
    ) -> None:
        self.gemm, self.layout, self.transposed, self.swapped, self.bank = gemm, layout, transposed, swapped, bank
        op, self.inner = gemm.op, gemm.inner
        if op.packing != "plain":
            raise unsupported(op, f"weights packed as {op.packing} do not come by the copy engine")
        self.count = 1 if layout == "single" else 2
        row, item = (gemm.columns * self.count if transposed else self.inner), gemm.bank.tensor.dtype.itemsize
        if self.inner % 16 or row * item % ENGINE_BYTES:
            rows = f"rows of {row * item} bytes with {self.inner} terms to a sum"
            raise unsupported(op, f"{rows}: the copy engine takes multiples of {ENGINE_BYTES} bytes and of 16 terms")
        # The engine steps over rows, not within them: of a transposed bank it brings columns that alternate only
        # together, and those that follow each other only apart.
        self.pair = self.count == 2 and not transposed and paired
        self.alternate = layout == "interleaved" and transposed
        self.wide = "2 * BLOCK_N" if self.pair or self.alternate else "BLOCK_N"

    def parts(self) -> dict[str, str]:
        """The accumulators, and where in the descriptor the block of weights of each begins."""
        if self.pair:
            return {"acc": "expert, 0, first, k"}
        if not self.transposed:
            both = {"gate": "expert, 0, first, k", "linear": "expert, 1, first, k"}
            return both if self.count == 2 else {"acc": "expert, first, k"}
        if self.layout == "concat":
            return {"gate": "expert, k, first", "linear": f"expert, k, {self.gemm.columns} + first"}
        return {"acc": "expert, k, 2 * first" if self.alternate else "expert, k, first"}

    def columns(self) -> dict[str, str]:
        """The tiles that the loop leaves, and which of the expert's columns they hold."""
        if self.layout == "concat":
            return {"gate": "columns", "linear": "columns + I"}
        if self.layout == "single" or self.alternate:
            return {"acc": "both" if self.alternate else "columns"}
        return {"gate": "2 * columns", "linear": "2 * columns + 1"}

    def sizes(self, variant: Mapping[str, Any]) -> dict[str, int]:
        """Tile sizes of a variant: BLOCK_M rows of tokens and BLOCK_N columns, as everywhere.

        BLOCK_K divides the inner dimension, so that no sum has a part that comes from beyond it.
        """
        sizes = self.gemm.sizes(variant)
        sizes["BLOCK_N"] = max(64, sizes["BLOCK_N"]) if self.swapped else sizes["BLOCK_N"]
        while self.inner % sizes["BLOCK_K"]:
            sizes["BLOCK_K"] //= 2
        return sizes

    def whole(self) -> bool:
        """Whether every block of columns is whole, so that no mask is needed."""
        return all(self.gemm.columns % self.sizes(variant)["BLOCK_N"] == 0 for variant in self.gemm.variants)

    def map(self, of: Argument, sizes: Mapping[str, int]) -> Parameter:
        """The descriptor of the weights for tiles of `sizes`.

        [experts, columns, inner], for gated experts [experts, 2, columns, inner] whether the columns of the two kinds
        follow each other or alternate; of transposed banks [experts, inner, columns of both].
        """
        experts, columns, inner = self.gemm.experts, self.gemm.columns, self.inner
        n, k, row = sizes["BLOCK_N"], sizes["BLOCK_K"], self.count * columns
        if self.transposed:
            shape, strides, block = [experts, inner, row], [inner * row, row, 1], [1, k, 2 * n if self.alternate else n]
        elif self.count == 2:
            apart = [inner, 2 * inner] if self.layout == "interleaved" else [columns * inner, inner]
            shape, strides, block = [experts, 2, columns, inner], [row * inner, *apart, 1], [1, 1 + self.pair, n, k]
        else:
            shape, strides, block = [experts, columns, inner], [columns * inner, inner, 1], [1, n, k]
        return tensor_map(self.bank, self.gemm.bank.tensor.dtype, of, shape, strides, block)

    def loop(self, inner: str, row: str) -> list[str]:
        """`products` of rows that are gathered by addresses; `row` are pointers to their first elements."""
        rows, depth = ("[None, :]", "[:, None]") if self.swapped else ("[:, None]", "[None, :]")
        lines = ["depth = tl.arange(0, BLOCK_K)", f"a_at = {row.format(rows)} + depth{depth}"]
        return [*lines, *self.products(inner, f"tl.load(a_at, mask=live{rows}, other=0)", "a_at += BLOCK_K")]

    def products(self, inner: str, a: str, *step: str) -> list[str]:
        """Tiles [BLOCK_M, columns] of sums over `inner`.

        Args:
            a: the block of rows at `k`.
            step: what else each step does.
        """
        shape = f"[{self.wide}, BLOCK_M]" if self.swapped else f"[BLOCK_M, {self.wide}]"
        precision = ', input_precision="ieee"' if self.gemm.bank.tensor.dtype is DType.f32 else ""
        parts = self.parts()
        lines = [
            *(["both = 2 * first + tl.arange(0, 2 * BLOCK_N)"] if self.alternate else []),
            *(f"{name} = tl.zeros({shape}, tl.float32)" for name in parts),
            f"for k in tl.range(0, {inner}, BLOCK_K):",
        ]
        sides = f"BLOCK_K, {self.wide}" if self.transposed else f"{self.wide}, BLOCK_K"
        for name, at in parts.items():  # first, since they do not wait for the rows' numbers
            block = f"{self.bank}.load([{at}]).reshape({sides})"
            block = f"tl.trans({block})" if self.transposed is self.swapped else block
            lines.append(f"    {name}_block = {block}")
        lines.append(f"    a = {a}")
        for name in parts:
            operands = f"{name}_block, a" if self.swapped else f"a, {name}_block"
            lines.append(f"    {name} = tl.dot({operands}, {name}{precision})")
        lines += [*(f"    {line}" for line in step), *(f"{name} = tl.trans({name})" for name in parts if self.swapped)]
        if self.pair:  # in registers: the two kinds lie in the same thread
            lines.append("gate, linear = tl.split(tl.permute(tl.reshape(acc, (BLOCK_M, 2, BLOCK_N)), (0, 2, 1)))")
        return lines

    def launch(self, name: str, parameters: list[Parameter], variant: Mapping[str, Any]) -> Entry:
        """The GEMM's launch; no more warps than there are rows of 16 of the first operand for."""
        sizes = self.sizes(variant)
        given = [self.map(p.argument, sizes) if p.name == self.bank else p for p in parameters]
        if self.swapped:
            variant = {**variant, "num_warps": min(int(variant.get("num_warps", 4)), sizes["BLOCK_N"] // 16)}
        return self.gemm.entry(name, given, variant, sizes, self.gemm.grid(sizes))


class Up:
    """The up-projection by these families. Raises: CompileError for rows that the copy engine does not take."""

    def __init__(self, family: str, func: Func, op: GatherGemm, gemm: GroupedGemm, wiring: Wiring) -> None:
        self.name, self.op, self.gemm = f"{func.name}_{family}", op, gemm
        self.streamed = Streamed(gemm, op.layout, op.up_transposed, "up", family == "swap", family == "tma")
        self.parameters = up_parameters(gemm, op, wiring)

    def functions(self) -> list[str]:
        bound = [] if self.streamed.whole() else ["columns < I"]
        lines = [
            f'"""{ROWS_OF_H}"""',
            *self.gemm.head("I"),
            "if expert >= E:",
            "    return",
            *self.gemm.rows(),
            "first = column_block * BLOCK_N",
            "columns = first + tl.arange(0, BLOCK_N)",
            *self.streamed.loop("H", "x + (pair // K).to(tl.int64){} * H"),
            *epilogue(self.op, self.streamed.columns(), bound),
        ]
        result = activated(self.op, lines)
        keep = " & ".join(["live[:, None]", *(f"({b})[None, :]" for b in bound)])
        lines.append(f"tl.store(h + rows.to(tl.int64)[:, None] * I + columns[None, :], {result}, mask={keep})")
        return [self.gemm.signature(self.name, self.parameters) + "\n" + indent(lines)]

    def launches(self, variant: Mapping[str, Any]) -> tuple[Entry, ...]:
        return (self.streamed.launch(self.name, self.parameters, variant),)


class DownProjection:
    """The down-projection by these families. Raises: CompileError for rows that the copy engine does not take."""

    def __init__(self, family: str, func: Func, op: GemmCombine, gemm: GroupedGemm, wiring: Wiring) -> None:
        self.name, self.op, self.gemm = f"{func.name}_{family}", op, gemm
        self.streamed = Streamed(gemm, "single", op.down_transposed, "down", family == "swap")
        self.down = Down(func, op, gemm, wiring)
        self.parameters = [*self.down.parameters, gemm.pointer("bank", op.down, wiring)]

    def functions(self) -> list[str]:
        bound = [] if self.streamed.whole() else ["columns < H"]
        lines = self.down.lines(self.streamed.loop("I", "h + rows.to(tl.int64){} * I"), bound, "bank")
        text = self.gemm.signature(self.name, self.parameters) + "\n" + indent(lines)
        return [text, *self.down.functions()]

    def launches(self, variant: Mapping[str, Any]) -> tuple[Entry, ...]:
        return (self.streamed.launch(self.name, self.parameters, variant), *self.down.launches())


UP = {name: partial(Up, name) for name in ("swap", "tma")}
DOWN = {name: partial(DownProjection, name) for name in ("swap", "tma")}
