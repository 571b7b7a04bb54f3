"""How the loop over the inner dimension reads an expert's weights, by the way they are packed.

A kernel names its products by a stem: with `gate` go the pointers `gate_at` and, where the bank is packed,
`gate_scale_at`. Packed values are widened in registers to the element type of the rows, exactly for bf16 and f32.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from sparsec.codegen.triton.gemm import GroupedGemm, masked
from sparsec.codegen.triton.launch import Parameter, Wiring
from sparsec.dialects.moe import GatherGemm
from sparsec.ir.types import DType


class Bank(Protocol):
    """Writes the products `acc += a @ bank` of a kernel that has `expert`, `depth` and `a_at` [rows, depth].

    Attributes:
        depth: how many columns of the rows are loaded at a time, which `depth` numbers.
    """

    depth: str

    def rows(self, rows: str, row: str) -> list[str]:
        """Pointers to the first elements of the rows `row` (a vector of numbers) of the parameter `rows`."""
        ...

    def start(self) -> list[str]:
        """Where the expert's weights begin."""
        ...

    def at(self, stem: str, columns: str, first: str) -> list[str]:
        """Pointers to columns of the bank, a vector of numbers; `first` is the least of them."""
        ...

    def loop(self, bound: Sequence[str], accumulators: Mapping[str, str]) -> list[str]:
        """The loop.

        Args:
            bound: conditions on the columns, as vectors.
            accumulators: by stem.
        """
        ...


def bank_of(gemm: GroupedGemm) -> Bank:
    """The writer for a GEMM's bank."""
    kinds: Mapping[str, Callable[[GroupedGemm], Bank]] = {"plain": Plain, "fp8": Fp8, "mxfp4": MxFp4}
    return ByFp8(gemm) if gemm.family == "fp8" else kinds[gemm.packing](gemm)


def scale_parameters(gemm: GroupedGemm, wiring: Wiring) -> list[Parameter]:
    """The kernel's parameter for the scales of a packed bank; those of mxfp4 are read four at a time."""
    if gemm.scale is None:
        return []
    type = {"fp8": "*fp32", "mxfp4": "*i32"}[gemm.packing]
    return [Parameter(f"{_name(gemm)}_scale", type, wiring.operand(gemm.scale))]


def _name(gemm: GroupedGemm) -> str:
    return "up" if isinstance(gemm.op, GatherGemm) else "down"


class _Base:
    depth = "BLOCK_K"

    def __init__(self, gemm: GroupedGemm) -> None:
        self.gemm, self.name = gemm, _name(gemm)
        self.inner = "H" if self.name == "up" else "I"
        self.columns, self.parts = "H", 1
        if isinstance(gemm.op, GatherGemm):
            self.parts = 1 if gemm.op.layout == "single" else 2
            self.columns = "I" if self.parts == 1 else "2 * I"
        self.precision = ', input_precision="ieee"' if gemm.a.tensor.dtype is DType.f32 else ""

    def rows(self, rows: str, row: str) -> list[str]:
        return [f"a_at = {rows} + {row}.to(tl.int64)[:, None] * {self.inner} + depth[None, :]"]

    def blocks(self, size: int) -> int:
        """How many blocks of 128 there are of a size."""
        return -(-size // 128)


class Plain(_Base):
    """[E, N, K] or [E, K, N], as the model has it."""

    def start(self) -> list[str]:
        return [f"bank = {self.name} + expert.to(tl.int64) * ({self.columns} * {self.inner})"]

    def at(self, stem: str, columns: str, first: str) -> list[str]:
        if self.gemm.transposed:
            return [f"{stem}_at = bank + depth[:, None] * ({self.columns}) + {columns}[None, :]"]
        return [f"{stem}_at = bank + {columns}[None, :] * {self.inner} + depth[:, None]"]

    def loop(self, bound: Sequence[str], accumulators: Mapping[str, str]) -> list[str]:
        tail = [f"depth < {self.inner} - k"] if not self.gemm.even(self.gemm.inner, "BLOCK_K") else []
        a = ["live[:, None]", *(f"({d})[None, :]" for d in tail)]
        b = [*(f"({c})[None, :]" for c in bound), *(f"({d})[:, None]" for d in tail)]
        step = f"BLOCK_K * ({self.columns})" if self.gemm.transposed else "BLOCK_K"
        lines = [f"a = tl.load(a_at{masked(a)})"]
        for stem, acc in accumulators.items():
            lines.append(f"{acc} = tl.dot(a, tl.load({stem}_at{masked(b)}), {acc}{self.precision})")
        lines += ["a_at += BLOCK_K", *(f"{stem}_at += {step}" for stem in accumulators)]
        return [f"for k in tl.range(0, {self.inner}, BLOCK_K):", *(f"    {line}" for line in lines)]


class Fp8(_Base):
    """f8E4M3FN [E, N, K] with a scale for 128 x 128 values, by which the sum over so many of K is multiplied."""

    def start(self) -> list[str]:
        scales = self.blocks(self.parts * self.gemm.columns) * self.blocks(self.gemm.inner)
        return [
            f"bank = {self.name} + expert.to(tl.int64) * ({self.columns} * {self.inner})",
            f"scales = {self.name}_scale + expert * {scales}",
        ]

    def at(self, stem: str, columns: str, first: str) -> list[str]:
        row = self.blocks(self.gemm.inner)
        where = f"({first}) // 128" if self._alike() else f"{columns} // 128"
        return [
            f"{stem}_at = bank + {columns}[None, :] * {self.inner} + depth[:, None]",
            f"{stem}_scale_at = scales + {where} * {row}",
        ]

    def loop(self, bound: Sequence[str], accumulators: Mapping[str, str]) -> list[str]:
        tail = [f"depth < {self.inner} - k"] if not self.gemm.even(self.gemm.inner, "BLOCK_K") else []
        a = ["live[:, None]", *(f"({d})[None, :]" for d in tail)]
        b = [*(f"({c})[None, :]" for c in bound), *(f"({d})[:, None]" for d in tail)]
        lines = [f"a = tl.load(a_at{masked(a)})"]
        for stem, acc in accumulators.items():
            mask, across = ("", "") if self._alike() else (masked([f"({c})" for c in bound]), "[None, :]")
            lines += [
                f"scale = tl.load({stem}_scale_at + k // 128{mask}){across}",
                f"w = from_fp8(tl.load({stem}_at{masked(b)}), a.dtype, PTX)",
                f"{acc} += tl.dot(a, w{self.precision}) * scale",
            ]
        lines += ["a_at += BLOCK_K", *(f"{stem}_at += BLOCK_K" for stem in accumulators)]
        return [f"for k in tl.range(0, {self.inner}, BLOCK_K):", *(f"    {line}" for line in lines)]

    def _alike(self) -> bool:
        """Whether the columns of a tile share their scales in every variant."""
        op, found = self.gemm.op, True
        for variant in self.gemm.variants:
            block = self.gemm.sizes(variant)["BLOCK_N"]
            layout = op.layout if isinstance(op, GatherGemm) else "single"
            found &= 128 % (2 * block if layout == "interleaved" else block) == 0
            found &= layout != "concat" or self.gemm.columns % block == 0
        return found


class ByFp8(Fp8):
    """The same multiplied by rows of bytes [rows, K up to whole blocks of 128], which have a scale for each block.

    Sums of a block, of products of e4m3, are multiplied by both scales. Those of the rows are loaded a step ahead.
    """

    def rows(self, rows: str, row: str) -> list[str]:
        blocks = self.blocks(self.gemm.inner)
        return [
            f"a_at = as_e4m3({rows}, E4M3) + {row}.to(tl.int64)[:, None] * {128 * blocks} + depth[None, :]",
            f"a_scale_at = {rows}_scale + {row}.to(tl.int64) * {blocks}",
        ]

    def start(self) -> list[str]:
        first, *rest = super().start()
        return [first.replace(self.name, f"as_e4m3({self.name}, E4M3)", 1), *rest]

    def loop(self, bound: Sequence[str], accumulators: Mapping[str, str]) -> list[str]:
        tail = [] if self.gemm.inner % 128 == 0 else [f"(depth < {self.inner} - k)[:, None]"]
        weights = masked([*(f"({c})[None, :]" for c in bound), *tail]).replace("=0", "=0.0")
        lines = [
            "a = tl.load(a_at, mask=live[:, None], other=0.0)",
            "a_scale = ahead",
            f"ahead = tl.load(a_scale_at + k // 128 + 1, mask=live & (k + 128 < {self.inner}), other=0)",
        ]
        for stem, acc in accumulators.items():
            alike = self._alike()
            mask = "" if alike else masked([f"({c})" for c in bound])
            scaled = (
                f"few, (a_scale * scale)[:, None], {acc}" if alike else f"few * a_scale[:, None], scale[None, :], {acc}"
            )
            lines += [
                f"scale = tl.load({stem}_scale_at + k // 128{mask})",
                f"few = dot_e4m3(a, tl.load({stem}_at{weights}), E4M3)",
                f"{acc} = tl.fma({scaled})",
            ]
        lines += ["a_at += 128", *(f"{stem}_at += 128" for stem in accumulators)]
        return [
            "ahead = tl.load(a_scale_at, mask=live, other=0)",
            f"for k in tl.range(0, {self.inner}, 128):",
            *(f"    {line}" for line in lines),
        ]


class MxFp4(_Base):
    """ui8 [E, K / 128, N, 64] with scales ui8 [E, K / 128, N, 4] (`sparsec.runtime.blocks` says in which order).

    Each load of 32 bytes of a column meets twice 32 columns of the rows.
    """

    depth = "32"

    def start(self) -> list[str]:
        blocks = self.blocks(self.gemm.inner)
        return [
            f"bank = {self.name} + expert.to(tl.int64) * ({blocks} * {self.columns} * 64)",
            f"scales = {self.name}_scale + expert.to(tl.int64) * ({blocks} * {self.columns})",
        ]

    def at(self, stem: str, columns: str, first: str) -> list[str]:
        return [
            f"{stem}_at = bank + {columns}[None, :] * 64 + depth[:, None]",
            f"{stem}_scale_at = scales + {columns}",
        ]

    def loop(self, bound: Sequence[str], accumulators: Mapping[str, str]) -> list[str]:
        tail = self.gemm.inner % 128 != 0
        column = masked([f"({c})" for c in bound])
        b = masked([f"({c})[None, :]" for c in bound])

        def rows(offset: str) -> str:
            beyond = [f"(depth < {self.inner} - k - {offset})[None, :]"] if tail else []
            return f"tl.load(a_at + {offset}{masked(['live[:, None]', *beyond])})"

        lines = [f"{stem}_exponents = tl.load({stem}_scale_at{column})" for stem in accumulators]
        lines += [
            "for half in tl.static_range(2):",
            f"    low = {rows('64 * half')}",
            f"    high = {rows('(64 * half + 32)')}",
        ]
        for stem, acc in accumulators.items():
            lines += [
                f"    w = tl.load({stem}_at + 32 * half{b})",
                f"    w_low, w_high = from_mxfp4(w, ({stem}_exponents >> 16 * half)[None, :], low.dtype, PTX)",
                f"    {acc} = tl.dot(low, w_low, {acc}{self.precision})",
                f"    {acc} = tl.dot(high, w_high, {acc}{self.precision})",
            ]
        lines.append("a_at += 128")
        for stem in accumulators:
            lines += [f"{stem}_at += {self.columns} * 64", f"{stem}_scale_at += {self.columns}"]
        return [f"for k in tl.range(0, {self.inner}, 128):", *(f"    {line}" for line in lines)]
