"""What the kernels of the family `rows` share: sums of products of a few rows with weights that stream past."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sparsec.codegen.triton.gemm import GroupedGemm, masked
from sparsec.codegen.triton.launch import Entry, Parameter
from sparsec.codegen.triton.tile import padded
from sparsec.dialects.moe import GatherGemm

CONSTANTS = ("BLOCK_N", "BLOCK_K", "STAGES", "PDL")
"""Compile-time parameters of both GEMMs."""


@dataclass(frozen=True)
class Columns:
    """Columns of the bank whose products one sum takes.

    Args:
        vector: their numbers, as text; `first` is the least of them, `count` how many they are.
        bound: conditions of them, as vectors.
        alike: whether they have one scale for each block of K, where the bank has scales of blocks.
    """

    vector: str
    first: str
    count: str
    bound: Sequence[str] = ()
    alike: bool = True


class Products:
    """Tiles of products [columns, rows, BLOCK_K] or, where the bank is transposed, [rows, BLOCK_K, columns]: what lies
    together in memory comes last, and every axis has the lanes of the loads. This class reads plain weights.

    Args:
        rows: how many rows a tile has, as text.
        expert: the rows' experts, as text: a number, or a vector of them.
        first: the inner index that a program begins with, and `last` that it ends before.
        live: which rows to read; all if None.

    Attributes: as text, the `lanes` of the inner dimension that a tile of weights has, and how many `sums` they make.
    """

    lanes = sums = "BLOCK_K"

    def __init__(self, gemm: GroupedGemm, rows: str, first: str = "0", last: str = "", live: str | None = None) -> None:
        self.gemm, self.rows, self.first, self.live = gemm, rows, first, live
        self.transposed = gemm.transposed
        up = isinstance(gemm.op, GatherGemm)
        self.name, self.inner = ("up", "H") if up else ("down", "I")
        self.last = last or self.inner
        parts = 2 if isinstance(gemm.op, GatherGemm) and gemm.op.layout != "single" else 1
        self.width = "H" if not up else "I" if parts == 1 else "(2 * I)"
        self.columns = parts * gemm.columns
        axes = ("rows", "depth", "columns") if self.transposed else ("columns", "rows", "depth")
        at = ("[:, None, None]", "[None, :, None]", "[None, None, :]")
        self.at = dict(zip(axes, at, strict=True))
        self.expert = f"expert.to(tl.int64){self.at['rows']}" if live else "expert.to(tl.int64)"

    def sizes(self, variant: Mapping[str, Any]) -> dict[str, int]:
        """Tile sizes of a variant, no larger than the problem."""
        columns, inner = padded(self.gemm.columns), padded(self.gemm.inner)
        return {
            "BLOCK_N": min(padded(int(variant.get("block_n", 8))), columns),
            "BLOCK_K": min(padded(int(variant.get("block_k", 256))), inner),
            "STAGES": max(1, int(variant.get("num_stages", 4))),
        }

    def warps(self, variant: Mapping[str, Any]) -> int:
        """Of a program."""
        return int(variant.get("num_warps", 4))

    def even(self, size: int, block: str) -> bool:
        """Whether `block` divides `size` in every variant, so that no mask is needed."""
        return all(size % self.sizes(variant)[block] == 0 for variant in self.gemm.variants)

    def fetch(self, variant: Mapping[str, Any]) -> int:
        """Lines, as of `early`, that hold the tiles of the first STAGES steps."""
        sizes = self.sizes(variant)
        reach = min(sizes["STAGES"] * sizes["BLOCK_K"], self.gemm.inner)
        return reach if self.transposed else -(-reach * self.gemm.bank.tensor.dtype.itemsize // LINE)

    def early(self, columns: str, first: str) -> list[str]:
        """Ask for the first tiles of weights, by LINES cache lines of each column (of a transposed bank, by rows)."""
        experts = f"{self.name} + {self.expert} * ({self.width} * {self.inner})"
        begin, last = f"{self.first} + tl.arange(0, LINES)", f"{self.inner} - 1"
        if self.transposed:
            line = f"line = tl.minimum({begin}, {last})"
            return [line, f"fetch({experts} + line{self.at['depth']} * {self.width} + {first}, PDL)"]
        line = f"line = tl.minimum({begin} * {LINE // self.gemm.bank.tensor.dtype.itemsize}, {last})"
        column = f"tl.minimum({columns}, {self.width} - 1){self.at['columns']} * {self.inner}"
        return [line, f"fetch({experts} + {column} + line{self.at['depth']}, PDL)"]

    def loop(self, sums: Mapping[str, Columns]) -> list[str]:
        """Sums [rows, columns] by name, of the rows at `a_at` [rows, lanes]."""
        lines = list[str]()
        for name, columns in sums.items():
            shape = [self.rows, self.sums, columns.count] if self.transposed else [columns.count, self.rows, self.sums]
            lines += [*self.start(name, columns), f"{name} = tl.zeros([{', '.join(shape)}], tl.float32)"]
        lines += [
            *self.ahead(sums, f"- {self.first}" if self.first != "0" else ""),
            f"for k in tl.range({self.first}, {self.last}, BLOCK_K, num_stages=STAGES):",
            *(f"    {line}" for line in self.step(sums)),
        ]
        total = "tl.sum({}, axis=1)" if self.transposed else "tl.trans(tl.sum({}, axis=2))"
        return [*lines, *(f"{name} = {total.format(name)}" for name in sums)]

    def start(self, name: str, columns: Columns) -> list[str]:
        """Pointers to a sum's first tile of weights, and to its scales where there are any."""
        depth = f"({self.first} + depth)" if self.first != "0" else "depth"
        experts = f"{self.name} + {self.expert} * ({self.width} * {self.inner})"
        across = (
            columns.vector + self.at["columns"]
            if columns.vector.isidentifier()
            else f"({columns.vector}){self.at['columns']}"
        )
        if self.transposed:
            return [f"{name}_at = {experts} + {depth}{self.at['depth']} * {self.width} + {across}"]
        return [f"{name}_at = {experts} + {across} * {self.inner} + {depth}{self.at['depth']}"]

    def ahead(self, sums: Mapping[str, Columns], left: str) -> list[str]:
        """Load what the first step takes besides weights: `ahead`, the rows.

        `left`: what of the inner dimension lies before the first step, as text to put behind `last`; "" for nothing.
        """
        tail = left or not self.even(self.gemm.inner, "BLOCK_K")  # a part that begins elsewhere may be empty
        return [f"ahead = tl.load(a_at{self.within(f'depth < {self.last} {left}'.rstrip() if tail else '')})"]

    def step(self, sums: Mapping[str, Columns]) -> list[str]:
        """One turn of the loop."""
        lines = self.next_rows()
        for name, columns in sums.items():
            lines += [
                f"{name} += a * {self.weights(name, columns)}.to(tl.float32)",
                f"{name}_at += {f'BLOCK_K * {self.width}' if self.transposed else 'BLOCK_K'}",
            ]
        return lines

    def next_rows(self) -> list[str]:
        """The rows as they are multiplied, `a`; those of the next step are asked for."""
        return [
            f"a = ahead.to(tl.float32){'[:, :, None]' if self.transposed else '[None, :, :]'}",
            "a_at += BLOCK_K",
            f"ahead = tl.load(a_at{self.within(f'depth < {self.last} - k - BLOCK_K')})",
        ]

    def weights(self, name: str, columns: Columns, offset: str = "", whole: bool = False) -> str:
        """A tile of a sum's weights; `whole`: whether memory holds all of it even where the inner dimension ends."""
        whole = whole or self.even(self.gemm.inner, "BLOCK_K")
        conditions = [f"{self.live}{self.at['rows']}"] if self.live else []
        conditions += [] if whole else [f"(depth < {self.last} - k){self.at['depth']}"]
        conditions += [f"({condition}){self.at['columns']}" for condition in columns.bound]
        return f"tl.load({name}_at{offset}{masked(conditions)})"

    def within(self, depth: str) -> str:
        """The mask of a load of rows, with a condition of the inner dimension."""
        live = [f"{self.live}[:, None]"] if self.live else []
        return masked([*live, *([f"({depth})[None, :]"] if depth else [])])


LINE = 128
"""Bytes of a cache line."""


def signature(name: str, parameters: Sequence[Parameter], constants: Sequence[str]) -> str:
    given = [*(parameter.name for parameter in parameters), *(f"{constant}: tl.constexpr" for constant in constants)]
    return f'@triton.jit(do_not_specialize=["tokens"])\ndef {name}({", ".join(given)}):'


def launch(
    name: str, parameters: Sequence[Parameter], sizes: Mapping[str, int], grid: tuple[str, str], warps: int
) -> Entry:
    """A launch of a GEMM; its loads under way are counted by its own STAGES."""
    return Entry(name, tuple(parameters), {**sizes, "PDL": 0}, grid, warps, sizes["STAGES"])
