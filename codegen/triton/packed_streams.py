"""Packed weights by the copy engine, for the family `swap`: widened in the registers from which tensor cores take them.

Hopper's matrix instruction reads its first operand from registers too, so that what is widened need not go back through
shared memory. The forms of `formats.py` that are called here keep to single operations on elements, views and loads:
what else there is between a load and a product, Triton 3.6 does in a layout of its own, and stores what comes out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from sparsec.codegen.triton.gemm import GroupedGemm, masked
from sparsec.codegen.triton.launch import Argument, Parameter, tensor_map
from sparsec.codegen.triton.streamed import ENGINE_BYTES, Streamed
from sparsec.codegen.triton.tile import unsupported
from sparsec.ir.types import DType

BLOCK = 128
"""Values along K that share a scale (fp8) or lie together (mxfp4)."""


def stream_of(
    gemm: GroupedGemm, layout: str, transposed: bool, bank: str, swapped: bool = False, paired: bool = False
) -> Streamed:
    """The loop for the way that a GEMM's bank is packed, as of `Streamed`. Raises: CompileError."""
    kinds: Mapping[str, Callable[..., Streamed]] = {"plain": Streamed, "fp8": Fp8, "mxfp4": MxFp4}
    return kinds[gemm.packing](gemm, layout, transposed, bank, swapped, paired)


class _Packed(Streamed):
    def check(self) -> None:
        if not self.swapped:
            raise unsupported(self.gemm.op, f"weights packed as {self.gemm.packing} are the first operand only")
        self.element = DType.ui8
        self.bound = [] if self.whole() else [f"(columns < {'I' if self.bank == 'up' else 'H'})"]
        self.wide_columns = self.gemm.columns * self.count  # of the bank
        self.deep = -(-self.inner // BLOCK)  # blocks along the inner dimension


class Fp8(_Packed):
    """f8E4M3FN [E, N, K] with a scale for 128 x 128 values, by which the sum over a step is multiplied.

    The scale of a step is loaded in the one before.
    """

    def check(self) -> None:
        super().check()
        if self.inner % ENGINE_BYTES:
            raise unsupported(self.gemm.op, f"rows of {self.inner} bytes: the copy engine takes multiples of 16")

    def ahead(self) -> list[str]:
        blocks = -(-self.wide_columns // BLOCK) * self.deep
        lines = [f"scales = {self.bank}_scale + expert * {blocks}"]
        for name, columns in self.columns().items():
            where = columns.replace("columns", "first") if self.alike() else columns
            lines += [
                f"{name}_scale_at = scales + ({where}) // {BLOCK} * {self.deep}",
                f"{name}_scale = {self.scale(name)}",
            ]
        return lines

    def add(self, name: str) -> list[str]:
        across = "" if self.alike() else "[:, None]"
        return [
            f"{name}_next = {self.scale(name, 'k + BLOCK_K')}",
            f"w = matrix_from_fp8({name}_block, a.dtype, PTX)",
            f"{name} = tl.fma(tl.dot(w, a{self.precision}), {name}_scale{across}, {name})",
            f"{name}_scale = {name}_next",
        ]

    def scale(self, name: str, k: str = "") -> str:
        """Of the step that begins at `k`."""
        there = [f"({k} < {self.inner})"] if k else []
        there += [] if self.alike() else self.bound
        return f"tl.load({name}_scale_at{f' + ({k}) // {BLOCK}' if k else ''}{masked(there)})"

    def alike(self) -> bool:
        """Whether the columns of a tile share their scales in every variant."""
        for variant in self.gemm.variants:
            block = self.sizes(variant)["BLOCK_N"]
            if BLOCK % (2 * block if self.layout == "interleaved" else block):
                return False
            if self.layout == "concat" and self.gemm.columns % block:
                return False
        return True


class MxFp4(_Packed):
    """ui8 [E, K / 128, N, 64] with scales ui8 [E, K / 128, N, 4], of which the four of a block are one word."""

    def check(self) -> None:
        super().check()
        self.tail = self.inner % BLOCK != 0

    def parts(self) -> dict[str, str]:
        if self.count == 1:
            return {"acc": f"expert, k // {BLOCK}, first, 0"}
        return {name: f"expert, k // {BLOCK}, {i}, first, 0" for i, name in enumerate(("gate", "linear"))}

    def sizes(self, variant: Mapping[str, Any]) -> dict[str, int]:
        sizes = self.gemm.sizes(variant)
        return {**sizes, "BLOCK_N": max(64, sizes["BLOCK_N"])}

    def map(self, of: Argument, sizes: Mapping[str, int]) -> Parameter:
        """[experts, blocks, columns, 64]; for gated experts [experts, blocks, 2, columns, 64], in either order."""
        columns, row, size = self.gemm.columns, BLOCK // 2, sizes["BLOCK_N"]
        block = self.wide_columns * row
        shape, strides, box = [columns, row], [row, 1], [size, row]
        if self.count == 2:
            apart = [row, 2 * row] if self.layout == "interleaved" else [columns * row, row]
            shape, strides, box = [2, *shape], [*apart, 1], [1, *box]
        shape, strides = [self.gemm.experts, self.deep, *shape], [self.deep * block, block, *strides]
        return tensor_map(self.bank, self.element, of, shape, strides, [1, 1, *box])

    def ahead(self) -> list[str]:
        lines = [f"scales = {self.bank}_scale + expert.to(tl.int64) * {self.deep * self.wide_columns}"]
        return [*lines, *(f"{name}_scale_at = scales + {columns}" for name, columns in self.columns().items())]

    def block(self, at: str) -> str:
        return f"{self.bank}.load([{at}]).reshape(BLOCK_N, {BLOCK // 2})"

    def add(self, name: str) -> list[str]:
        return [
            f"exponents = tl.load({name}_scale_at{masked(self.bound)})",
            f"w = matrix_from_mxfp4({name}_block, exponents, a.dtype, PTX)",
            f"{name} = tl.dot(w, a, {name}{self.precision})",
            f"{name}_scale_at += {self.wide_columns}",
        ]
