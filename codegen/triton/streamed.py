"""Weights that come by the copy engine of Hopper (TMA), in the loop over the inner dimension of a GEMM.

One thread asks for a block of weights, which the engine writes to shared memory as the tensor cores read it; rows of
tokens are gathered by addresses as in `tiles`, or come by the engine too where they lie in order.

A row's sum runs over the inner dimension in steps of BLOCK_K, each in the order of the matrix instruction's own steps,
whatever the other rows of the tile and their number are.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sparsec.codegen.triton.gemm import GroupedGemm
from sparsec.codegen.triton.launch import ENGINE_BYTES, Argument, Entry, Parameter, tensor_map
from sparsec.codegen.triton.tile import unsupported
from sparsec.ir.types import DType


def bank_view(
    bank: tuple[int, int, int], layout: str, transposed: bool, sizes: Mapping[str, int], together: bool = True
) -> tuple[list[int], list[int], list[int]]:
    """Shape, strides and block with which the copy engine sees a bank of (experts, columns of a kind, inner).

    [experts, columns, inner], for gated experts [experts, 2, columns, inner] whether the columns of the two kinds
    follow each other or alternate; of transposed banks [experts, inner, columns of both].

    Args:
        together: whether a block of a bank that is not transposed has columns of both kinds.
    """
    experts, columns, inner = bank
    n, k, row = sizes["BLOCK_N"], sizes["BLOCK_K"], columns if layout == "single" else 2 * columns
    if transposed:
        wide = 2 * n if layout == "interleaved" else n
        return [experts, inner, row], [inner * row, row, 1], [1, k, wide]
    if layout == "single":
        return [experts, columns, inner], [row * inner, inner, 1], [1, n, k]
    apart = [inner, 2 * inner] if layout == "interleaved" else [columns * inner, inner]
    return [experts, 2, columns, inner], [row * inner, *apart, 1], [1, 1 + together, n, k]


class Streamed:
    """The weights' descriptor, tile sizes, and the loop, for weights as the model has them.

    Args:
        layout, transposed: of the bank.
        bank: the descriptor's name.
        swapped: whether the weights are the tensor cores' first operand.
        paired: whether both kinds of columns of a gated expert are to come as one block, where they can.
    """

    tail = False
    """Whether the last step has terms beyond the inner dimension."""

    def __init__(
        self, gemm: GroupedGemm, layout: str, transposed: bool, bank: str, swapped: bool = False, paired: bool = False
    ) -> None:
        self.gemm, self.layout, self.transposed, self.swapped, self.bank = gemm, layout, transposed, swapped, bank
        self.inner, self.count = gemm.inner, 1 if layout == "single" else 2
        self.element = gemm.bank.tensor.dtype
        self.check()
        # The engine steps over rows, not within them: of a transposed bank it brings columns that alternate only
        # together, and those that follow each other only apart.
        self.pair = self.count == 2 and not transposed and paired
        self.alternate = layout == "interleaved" and transposed
        self.precision = ', input_precision="ieee"' if gemm.a.tensor.dtype is DType.f32 else ""

    @property
    def wide(self) -> str:
        """How many columns a block has."""
        return "2 * BLOCK_N" if self.pair or self.alternate else "BLOCK_N"

    def check(self) -> None:
        """Raises: CompileError for rows that the copy engine does not take."""
        columns = self.gemm.columns * self.count
        row = (columns if self.transposed else self.inner) * self.gemm.bank.tensor.dtype.itemsize
        if self.inner % 16 or row % ENGINE_BYTES:
            rows = f"rows of {row} bytes with {self.inner} terms to a sum"
            says = f"{rows}: the copy engine takes multiples of {ENGINE_BYTES} bytes and of 16 terms"
            raise unsupported(self.gemm.op, says)

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
        """The descriptor of the weights for tiles of `sizes`."""
        view = bank_view(
            (self.gemm.experts, self.gemm.columns, self.inner), self.layout, self.transposed, sizes, self.pair
        )
        return tensor_map(self.bank, self.element, of, *view)

    def loop(self, inner: str, row: str) -> list[str]:
        """`products` of rows that are gathered by addresses; `row` are pointers to their first elements."""
        rows, depth = ("[None, :]", "[:, None]") if self.swapped else ("[:, None]", "[None, :]")
        lines = ["depth = tl.arange(0, BLOCK_K)", f"a_at = {row.format(rows)} + depth{depth}"]
        there = f"live{rows}" + (f" & (depth < {inner} - k){depth}" if self.tail else "")
        return [*lines, *self.products(inner, f"tl.load(a_at, mask={there}, other=0)", "a_at += BLOCK_K")]

    def products(self, inner: str, a: str, *step: str) -> list[str]:
        """Tiles [BLOCK_M, columns] of sums over `inner`.

        Args:
            a: the block of rows at `k`.
            step: what else each step does.
        """
        shape = f"[{self.wide}, BLOCK_M]" if self.swapped else f"[BLOCK_M, {self.wide}]"
        parts = self.parts()
        lines = [
            *(["both = 2 * first + tl.arange(0, 2 * BLOCK_N)"] if self.alternate else []),
            *self.ahead(),
            *(f"{name} = tl.zeros({shape}, tl.float32)" for name in parts),
            f"for k in tl.range(0, {inner}, BLOCK_K):",
        ]
        # The weights first, since they do not wait for the rows' numbers.
        body = [f"{name}_block = {self.block(at)}" for name, at in parts.items()]
        body += [f"a = {a}", *(line for name in parts for line in self.add(name)), *step]
        return [*lines, *(f"    {line}" for line in body), *self.leave()]

    def leave(self) -> list[str]:
        """What makes the tiles of `columns` of the sums."""
        lines = [f"{name} = tl.trans({name})" for name in self.parts() if self.swapped]
        if self.pair:  # in registers: the two kinds lie in the same thread
            lines.append("gate, linear = halves(acc)")
        return lines

    def ahead(self) -> list[str]:
        """What is needed before the loop."""
        return []

    def block(self, at: str) -> str:
        """A step's block of weights that begins there, as the tensor cores take it."""
        sides = f"BLOCK_K, {self.wide}" if self.transposed else f"{self.wide}, BLOCK_K"
        block = f"{self.bank}.load([{at}]).reshape({sides})"
        return f"tl.trans({block})" if self.transposed is self.swapped else block

    def add(self, name: str) -> list[str]:
        """Add the products of a step to a part's sums."""
        operands = f"{name}_block, a" if self.swapped else f"a, {name}_block"
        return [f"{name} = tl.dot({operands}, {name}{self.precision})"]

    def launch(self, name: str, parameters: list[Parameter], variant: Mapping[str, Any]) -> Entry:
        """The GEMM's launch; no more warps than there are rows of 16 of the first operand for."""
        sizes = self.sizes(variant)
        given = [self.map(p.argument, sizes) if p.name == self.bank else p for p in parameters]
        if self.swapped:
            most = sizes["BLOCK_N"] * (1 if self.wide == "BLOCK_N" else 2) // 16
            variant = {**variant, "num_warps": min(int(variant.get("num_warps", 4)), most)}
        return self.gemm.entry(name, given, variant, sizes, self.gemm.grid(sizes))
