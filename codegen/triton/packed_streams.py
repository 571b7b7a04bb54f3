"""Packed weights by the copy engine, for the family `swap`: widened in the registers from which tensor cores take them.

Hopper's matrix instruction reads its first operand from registers too, so that what is widened need not go back through
shared memory. The forms of `formats.py` that are called here keep to single operations on elements, views and loads:
what else there is between a load and a product, Triton 3.6 does in a layout of its own, and stores what comes out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from sparsec.codegen.triton.gemm import GroupedGemm, masked
from sparsec.codegen.triton.launch import ENGINE_BYTES, Argument, Parameter, tensor_map
from sparsec.codegen.triton.packed_products import BLOCK
from sparsec.codegen.triton.streamed import Streamed
from sparsec.codegen.triton.tile import unsupported
from sparsec.ir.types import DType

EIGHT = 8
"""Rows of an instruction's first operand after which a thread has its next one."""


def stream_of(
    gemm: GroupedGemm, layout: str, transposed: bool, bank: str, swapped: bool = False, paired: bool = False
) -> Streamed:
    """The loop for the way that a GEMM's bank is packed, as of `Streamed`. Raises: CompileError."""
    kinds: Mapping[str, Callable[..., Streamed]] = {"plain": Streamed, "fp8": Fp8, "mxfp4": MxFp4}
    return kinds[gemm.packing](gemm, layout, transposed, bank, swapped, paired)


class _Packed(Streamed):
    """Both kinds of columns of a gated expert come as one block, eight of one, eight of the other.

    So every thread has both of what it keeps of the sums: an instruction's rows i and i + 8.
    """

    def check(self) -> None:
        if not self.swapped:
            raise unsupported(self.gemm.op, f"weights packed as {self.gemm.packing} are the first operand only")
        if self.count == 2 and self.gemm.columns % EIGHT:
            says = f"{self.gemm.columns} columns of each kind: the copy engine brings eight at a time"
            raise unsupported(self.gemm.op, says)
        self.element = DType.ui8
        self.deep = -(-self.inner // BLOCK)  # blocks along the inner dimension
        self.all = self.gemm.columns * self.count
        self.tail = self.inner % BLOCK != 0

    @property
    def wide(self) -> str:
        return "2 * BLOCK_N" if self.count == 2 else "BLOCK_N"

    def sizes(self, variant: Mapping[str, Any]) -> dict[str, int]:
        """BLOCK_M rows, BLOCK_N columns, of both kinds 64 at least, and steps of a block."""
        sizes = self.gemm.sizes(variant)
        return {**sizes, "BLOCK_N": max(64 // self.count, sizes["BLOCK_N"]), "BLOCK_K": BLOCK}

    def rows(self, row: int, block: int) -> tuple[list[int], list[int], list[int]]:
        """Shape, strides and block of columns that are `row` apart, of which a block has `block` of each kind."""
        columns = self.gemm.columns
        if self.count == 1:
            return [columns], [row], [block]
        eight, kind, one = (2 * EIGHT, 1, 2) if self.layout == "interleaved" else (EIGHT, columns, 1)
        shape = [columns // EIGHT, 2, EIGHT]
        return shape, [eight * row, kind * row, one * row], [block // EIGHT, 2, EIGHT]

    def at(self, leading: str, inner: str) -> dict[str, str]:
        """`parts`, by the indices before and after those of the columns."""
        columns = f"first // {EIGHT}, 0, 0" if self.count == 2 else "first"
        return {"acc": f"{leading}, {columns}, {inner}"}

    def ahead(self) -> list[str]:
        if self.count == 1:
            return ["wide = columns"]
        kinds = "2 * column + kind" if self.layout == "interleaved" else "column + kind * I"
        lane = f"tl.arange(0, {self.wide})"
        return [
            f"column = first + {lane} // {2 * EIGHT} * {EIGHT} + {lane} % {EIGHT}",
            f"kind = {lane} // {EIGHT} % 2",
            f"wide = {kinds}",
        ]

    def bound(self) -> list[str]:
        """Conditions of the columns `wide` of a block."""
        return [] if self.whole() else ["(column < I)" if self.count == 2 else f"(columns < {self.gemm.columns})"]

    def leave(self) -> list[str]:
        if self.count == 1:
            return super().leave()
        lanes = f"tl.reshape(acc, (BLOCK_N // {EIGHT}, 2, {EIGHT}, BLOCK_M))"
        kinds = f"tl.reshape(tl.permute({lanes}, (3, 0, 2, 1)), (BLOCK_M, BLOCK_N, 2))"
        return [f"gate, linear = tl.split({kinds})"]


class Fp8(_Packed):
    """f8E4M3FN [E, N, K] with a scale for 128 x 128 values, by which the sum over a step is multiplied.

    The scale of a step is loaded in the one before.
    """

    def check(self) -> None:
        super().check()
        if self.inner % ENGINE_BYTES:
            raise unsupported(self.gemm.op, f"rows of {self.inner} bytes: the copy engine takes multiples of 16")

    def parts(self) -> dict[str, str]:
        return self.at("expert", "k")

    def map(self, of: Argument, sizes: Mapping[str, int]) -> Parameter:
        """[experts, columns, inner]; for gated experts [experts, columns / 8, 2, 8, inner]."""
        shape, strides, block = self.rows(self.inner, sizes["BLOCK_N"])
        shape, strides = [self.gemm.experts, *shape, self.inner], [self.all * self.inner, *strides, 1]
        return tensor_map(self.bank, self.element, of, shape, strides, [1, *block, BLOCK])

    def ahead(self) -> list[str]:
        scales = f"{self.bank}_scale + expert * {-(-self.all // BLOCK) * self.deep}"
        places = self.places()
        lines = [f"{at} = {scales} + ({column}) // {BLOCK} * {self.deep}" for at, column in places.items()]
        return [*super().ahead(), *lines, *(f"{at[:-3]} = {self.scale(at)}" for at in places)]

    def places(self) -> dict[str, str]:
        """Pointers to scales, and the columns whose scales they are: the first of those that share one, or all."""
        sizes = [self.sizes(variant)["BLOCK_N"] for variant in self.gemm.variants]
        alternate = self.layout == "interleaved"
        if any(BLOCK % (2 * size if alternate else size) for size in sizes):
            return {"scale_at": "wide"}
        if self.layout != "concat":
            return {"scale_at": "2 * first" if alternate else "first"}
        if any(self.gemm.columns % size for size in sizes):
            return {"scale_at": "wide"}
        return {"gate_scale_at": "first", "linear_scale_at": "first + I"}

    def scale(self, at: str, k: str = "") -> str:
        """Of the step that begins at `k`."""
        there = [f"({k} < {self.inner})"] if k else []
        there += self.bound() if self.places()[at] == "wide" else []
        return f"tl.load({at}{f' + ({k}) // {BLOCK}' if k else ''}{masked(there)})"

    def add(self, name: str) -> list[str]:
        places = self.places()
        by = "scale[:, None]" if places.get("scale_at") == "wide" else "scale"
        if len(places) == 2:
            by = "tl.where(kind == 0, gate_scale, linear_scale)[:, None]"
        return [
            *(f"{at[:-3]}_next = {self.scale(at, 'k + BLOCK_K')}" for at in places),
            f"w = matrix_from_fp8({name}_block, a.dtype, PTX)",
            f"{name} = tl.fma(tl.dot(w, a{self.precision}), {by}, {name})",
            *(f"{at[:-3]} = {at[:-3]}_next" for at in places),
        ]


class MxFp4(_Packed):
    """ui8 [E, K / 128, N, 64] with scales ui8 [E, K / 128, N, 4], of which the four of a block are one word."""

    def parts(self) -> dict[str, str]:
        return self.at(f"expert * {self.deep} + k // {BLOCK}", "0")

    def map(self, of: Argument, sizes: Mapping[str, int]) -> Parameter:
        """[experts * blocks, columns, 64]; for gated experts [experts * blocks, columns / 8, 2, 8, 64]."""
        row = BLOCK // 2
        shape, strides, block = self.rows(row, sizes["BLOCK_N"])
        shape, strides = [self.gemm.experts * self.deep, *shape, row], [self.all * row, *strides, 1]
        return tensor_map(self.bank, self.element, of, shape, strides, [1, *block, row])

    def ahead(self) -> list[str]:
        scales = f"{self.bank}_scale + expert.to(tl.int64) * {self.deep * self.all}"
        return [*super().ahead(), f"scale_at = {scales} + wide"]

    def block(self, at: str) -> str:
        return f"{self.bank}.load([{at}]).reshape({self.wide}, {BLOCK // 2})"

    def add(self, name: str) -> list[str]:
        return [
            f"exponents = tl.load(scale_at{masked(self.bound())})",
            f"w = matrix_from_mxfp4({name}_block, exponents, a.dtype, PTX)",
            f"{name} = tl.dot(w, a, {name}{self.precision})",
            f"scale_at += {self.all}",
        ]
