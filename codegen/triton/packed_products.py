"""The family `rows` on packed banks: weights are widened in registers, exactly, and multiplied in f32."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sparsec.codegen.triton.gemm import GroupedGemm, masked
from sparsec.codegen.triton.products import Columns, Products
from sparsec.codegen.triton.tile import padded

BLOCK = 128
"""Values along K that share a scale (fp8) or lie together (mxfp4)."""

TOGETHER = 16
"""Bytes that a thread loads at a time."""


def products_of(gemm: GroupedGemm, rows: str, first: str = "0", last: str = "", live: str | None = None) -> Products:
    """The writer of products for the way that a GEMM's bank is packed."""
    kind = {"plain": Products, "fp8": Fp8Products, "mxfp4": MxFp4Products}[gemm.packing]
    return kind(gemm, rows, first, last, live)


class _Packed(Products):
    def blocks(self, size: int) -> int:
        """How many blocks of 128 there are of a size."""
        return -(-size // BLOCK)


class Fp8Products(_Packed):
    """f8E4M3FN [E, N, K]: a tile is at most 128 deep, so that one scale holds for it, which is loaded a step ahead.

    Products of 16 neighbours, which are in one thread, are added before they are scaled.
    """

    lanes = "BLOCK_K"
    sums = f"BLOCK_K // {TOGETHER}"

    def sizes(self, variant: Mapping[str, Any]) -> dict[str, int]:
        sizes = super().sizes(variant)
        return {
            **sizes,
            "BLOCK_N": min(BLOCK, sizes["BLOCK_N"]),
            "BLOCK_K": max(TOGETHER, min(BLOCK, sizes["BLOCK_K"])),
        }

    def start(self, name: str, columns: Columns) -> list[str]:
        deep = self.blocks(self.gemm.inner)
        block = columns.first if columns.alike else columns.vector
        scales = f"{self.name}_scale + expert.to(tl.int64) * {self.blocks(self.columns) * deep}"
        return [*super().start(name, columns), f"{name}_scale_at = {scales} + ({block}) // {BLOCK} * {deep}"]

    def ahead(self, sums: Mapping[str, Columns], left: str) -> list[str]:
        return [*super().ahead(sums, left), *self._scales(sums, self.first)]

    def step(self, sums: Mapping[str, Columns]) -> list[str]:
        lines = self.next_rows()
        for name, columns in sums.items():
            across = "[None, :, None]" if self.live else "" if columns.alike else "[:, None, None]"
            product = f"a * from_fp8({self.weights(name, columns)}, tl.float32, PTX)"
            shape = f"({columns.count}, {self.rows}, {self.sums}, {TOGETHER})"
            lines += [
                f"few = tl.sum(tl.reshape({product}, {shape}), axis=3)",
                f"{name} = tl.fma(few, {name}_scale{across}, {name})",
                f"{name}_at += BLOCK_K",
            ]
        return [*lines, *self._scales(sums, "k + BLOCK_K")]

    def _scales(self, sums: Mapping[str, Columns], k: str) -> list[str]:
        lines = list[str]()
        for name, columns in sums.items():
            there = [self.live] if self.live else []
            there += [f"({k} < {self.last})"] if k != "0" else []
            there += [] if columns.alike else [f"({bound})" for bound in columns.bound]
            lines.append(f"{name}_scale = tl.load({name}_scale_at + ({k}) // {BLOCK}{masked(there)})")
        return lines


class MxFp4Products(_Packed):
    """ui8 [E, K / 128, N, 64] with four scales for each 64 bytes, which are one word.

    A step takes a block of 128 of K, in two tiles of 32 bytes of each column, the lower halves of which meet 32
    elements of the rows, and the upper ones the next 32. One accumulator takes all four.
    """

    lanes = sums = "32"

    def sizes(self, variant: Mapping[str, Any]) -> dict[str, int]:
        sizes = super().sizes(variant)
        return {**sizes, "BLOCK_N": max(4, sizes["BLOCK_N"]), "BLOCK_K": BLOCK}

    def warps(self, variant: Mapping[str, Any]) -> int:
        """No more than have 16 bytes to load for each thread: four that are widened together are of one column."""
        columns = self.sizes(variant)["BLOCK_N"] * (padded(self.gemm.k) if self.live else 1)
        return min(super().warps(variant), max(1, columns * 32 // (32 * TOGETHER)))

    def fetch(self, variant: Mapping[str, Any]) -> int:
        return min(self.sizes(variant)["STAGES"], self.blocks(self.gemm.inner))

    def early(self, columns: str, first: str) -> list[str]:
        """LINES blocks of K: a line holds two columns of one."""
        blocks = self.blocks(self.gemm.inner)
        line = f"tl.minimum({first} + tl.arange(0, (BLOCK_N + 1) // 2) * 2, {self.width} - 1)"
        return [
            f"block = tl.minimum({self.first} // {BLOCK} + tl.arange(0, LINES), {blocks - 1})",
            f"line = (block{self.at['depth']} * {self.width} + {line}{self.at['columns']}) * 64",
            f"fetch({self.name} + {self.expert} * ({blocks} * {self.width} * 64) + line, PDL)",
        ]

    def start(self, name: str, columns: Columns) -> list[str]:
        blocks, at = self.blocks(self.gemm.inner), self.at
        begin = f" + {self.first} // {BLOCK} * {self.width}" if self.first != "0" else ""
        column = f"(({columns.vector}){begin})"
        expert = "expert.to(tl.int64)[None, :]" if self.live else "expert.to(tl.int64)"
        scale = f"{self.name}_scale + {expert} * ({blocks} * {self.width}) + {column}[:, None]"
        bank = f"{self.name} + {self.expert} * ({blocks} * {self.width} * 64)"
        return [
            f"{name}_at = {bank} + {column}{at['columns']} * 64 + depth{at['depth']}",
            f"{name}_scale_at = {scale}",
        ]

    def ahead(self, sums: Mapping[str, Columns], left: str) -> list[str]:
        return [self._rows(i, left, bool(left)) for i in range(4)]

    def step(self, sums: Mapping[str, Columns]) -> list[str]:
        lines = [f"a_{i} = ahead_{i}.to(tl.float32)[None, :, :]" for i in range(4)]
        lines += ["a_at += BLOCK_K", *(self._rows(i, "- k - BLOCK_K", True) for i in range(4))]
        for name, columns in sums.items():
            live = [f"{self.live}[None, :]"] if self.live else []
            mask = masked([*live, *(f"({condition})[:, None]" for condition in columns.bound)])
            lines.append(f"{name}_exponents = tl.load({name}_scale_at{mask})[:, :, None]")
            for half in range(2):
                shifted = f"{name}_exponents >> 16" if half else f"{name}_exponents"
                tile = self.weights(name, columns, " + 32" if half else "", whole=True)
                lines += [
                    f"low, high = from_mxfp4({tile}, {shifted}, tl.float32, PTX)",
                    f"{name} += a_{2 * half} * low",
                    f"{name} += a_{2 * half + 1} * high",
                ]
            lines += [f"{name}_at += {self.width} * 64", f"{name}_scale_at += {self.width}"]
        return lines

    def _rows(self, piece: int, left: str, tail: bool) -> str:
        """Ask for one of the four pieces of the rows that a step takes."""
        offset = f" + {32 * piece}" if piece else ""
        beyond = f"depth{offset} < {self.last} {left}".rstrip()
        tail = tail or self.gemm.inner % BLOCK != 0
        return f"ahead_{piece} = tl.load(a_at{offset}{self.within(beyond if tail else '')})"
