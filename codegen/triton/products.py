"""What the kernels of the family `rows` share: sums of products of a few rows with weights that stream past."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sparsec.codegen.triton.gemm import GroupedGemm, masked
from sparsec.codegen.triton.launch import Entry, Parameter
from sparsec.codegen.triton.tile import padded, unsupported

CONSTANTS = ("BLOCK_N", "BLOCK_K", "STAGES", "PDL")
"""Compile-time parameters of both GEMMs."""


class Products:
    """What both GEMMs share: tiles of products [columns, rows, BLOCK_K] or, where the bank is transposed,
    [rows, BLOCK_K, columns]: what lies together in memory comes last, and every axis has the lanes of the loads.

    Args:
        rows: how many rows a tile has, as text.
        first: the inner index that a program begins with, and `last` that it ends before.
        live: which rows to read; all if None.
    """

    def __init__(self, gemm: GroupedGemm, transposed: bool, rows: str, first: str, last: str, live: str | None) -> None:
        if gemm.packing != "plain":
            longer = f"'rows' would spend longer on widening {gemm.packing} weights than on reading them"
            raise unsupported(gemm.op, longer)
        self.gemm, self.transposed, self.rows = gemm, transposed, rows
        self.first, self.last, self.live = first, last, live
        axes = ("rows", "depth", "columns") if transposed else ("columns", "rows", "depth")
        at = ("[:, None, None]", "[None, :, None]", "[None, None, :]")
        self.at = dict(zip(axes, at, strict=True))

    def sizes(self, variant: Mapping[str, Any]) -> dict[str, int]:
        """Tile sizes of a variant, no larger than the problem."""
        columns, inner = padded(self.gemm.columns), padded(self.gemm.inner)
        return {
            "BLOCK_N": min(padded(int(variant.get("block_n", 8))), columns),
            "BLOCK_K": min(padded(int(variant.get("block_k", 256))), inner),
            "STAGES": max(1, int(variant.get("num_stages", 4))),
        }

    def even(self, size: int, block: str) -> bool:
        """Whether `block` divides `size` in every variant, so that no mask is needed."""
        return all(size % self.sizes(variant)[block] == 0 for variant in self.gemm.variants)

    def bank(self, columns: str, row: str, wide: str) -> str:
        """Offsets of a tile in an expert's weights.

        Args:
            columns: the vector of the expert's columns.
            row: how many columns the expert has: elements of a row of a transposed bank.
            wide: elements of a row of a bank that is not.
        """
        depth = f"({self.first} + depth)" if self.first != "0" else "depth"
        if self.transposed:
            return f"{depth}{self.at['depth']} * {row} + {columns}{self.at['columns']}"
        return f"{columns}{self.at['columns']} * {wide} + {depth}{self.at['depth']}"

    def loop(self, tiles: Mapping[str, tuple[str, str, Sequence[str]]], step: str) -> list[str]:
        """Sums [rows, columns] by name, of the rows at `a_at` [rows, BLOCK_K].

        Args:
            tiles: for each sum the pointers to its weights, its number of columns, and conditions of the columns.
            step: what the pointers advance by.
        """
        tail = not self.even(self.gemm.inner, "BLOCK_K")
        live = [f"{self.live}[:, None]"] if self.live else []
        here = f"(depth < {self.last} - k)"
        short = tail or self.first != "0"  # a part that begins elsewhere may be empty
        now = [*live, *([f"(depth < {self.last} - {self.first})[None, :]"] if short else [])]
        then = [*live, f"(depth < {self.last} - k - BLOCK_K)[None, :]"]
        lines = list[str]()
        for name, (pointers, columns, _) in tiles.items():
            shape = f"{self.rows}, BLOCK_K, {columns}" if self.transposed else f"{columns}, {self.rows}, BLOCK_K"
            lines += [f"{name}_at = {pointers}", f"{name} = tl.zeros([{shape}], tl.float32)"]
        lines += [
            f"ahead = tl.load(a_at{masked(now)})",
            f"for k in tl.range({self.first}, {self.last}, BLOCK_K, num_stages=STAGES):",
            f"    a = ahead.to(tl.float32){'[:, :, None]' if self.transposed else '[None, :, :]'}",
            "    a_at += BLOCK_K",
            f"    ahead = tl.load(a_at{masked(then)})",
        ]
        for name, (_, _, bound) in tiles.items():
            conditions = [f"{self.live}{self.at['rows']}"] if self.live else []
            conditions += [f"{here}{self.at['depth']}"] if tail else []
            conditions += [f"({condition}){self.at['columns']}" for condition in bound]
            lines += [
                f"    {name} += a * tl.load({name}_at{masked(conditions)}).to(tl.float32)",
                f"    {name}_at += {step}",
            ]
        total = "tl.sum({}, axis=1)" if self.transposed else "tl.trans(tl.sum({}, axis=2))"
        return [*lines, *(f"{name} = {total.format(name)}" for name in tiles)]


def signature(name: str, parameters: Sequence[Parameter], constants: Sequence[str]) -> str:
    given = [*(parameter.name for parameter in parameters), *(f"{constant}: tl.constexpr" for constant in constants)]
    return f'@triton.jit(do_not_specialize=["tokens"])\ndef {name}({", ".join(given)}):'


def launch(name: str, parameters: Sequence[Parameter], sizes: Mapping[str, int], grid: tuple[str, str],
           variant: Mapping[str, Any]) -> Entry:  # fmt: skip
    """A launch of a GEMM; its loads under way are counted by its own STAGES."""
    return Entry(name, tuple(parameters), {**sizes, "PDL": 0}, grid, int(variant.get("num_warps", 4)), sizes["STAGES"])
