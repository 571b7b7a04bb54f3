"""What the two GEMMs of an expert layer share: tiles, the loop over the inner dimension, the grid.

Rows are cut into blocks expert by expert. Which block is a program's stands in the list of tiles that the sort leaves,
or is found from the offsets; nothing has to come from the host: the grid is an upper bound, and programs past the last
tile leave at once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

from sparsec.codegen.triton.launch import Entry, Parameter, Wiring
from sparsec.codegen.triton.tile import FLOATS, NARROW, POINTERS, padded, unsupported
from sparsec.dialects.moe import GatherGemm, GemmCombine
from sparsec.dialects.moe.common import TILE_ROWS
from sparsec.ir.core import Func, Value
from sparsec.ir.types import DType

GROUP_M = 8
"""Row blocks of one expert that share a block of its weights before the next one is read."""

DEFAULTS: tuple[Mapping[str, Any], ...] = (
    {"up_to": 64, "block_m": 16, "block_n": 64, "block_k": 128, "num_warps": 4, "num_stages": 4},
    {"up_to": 1024, "block_m": 64, "block_n": 64, "block_k": 64, "num_warps": 4, "num_stages": 4},
    {"up_to": None, "block_m": 128, "block_n": 64, "block_k": 64, "num_warps": 8, "num_stages": 3},
)
"""Variants where the schedule names none."""


class GroupedGemm:
    """What the kernels of a GEMM share: sizes, tiles, the loop over the inner dimension, the grid.

    Args:
        func, op: the kernel function and its fused op.
        family: if given, only the variants that name this family are kept.

    Attributes: `a` [rows, inner], `bank`, `bias` and `scale` are the op's operands, `packing` and `transposed` what it
    says of the bank; `inner` and `columns` (of the result) its sizes, `experts` and `k` its counts.
    """

    def __init__(self, func: Func, op: GatherGemm | GemmCombine, family: str | None = None) -> None:
        self.func, self.op, self.family = func, op, family
        self.a, self.bank, self.bias, self.scale, self.transposed, columns = (
            (op.x, op.up, op.up_bias, op.up_scale, op.up_transposed, op.width)
            if isinstance(op, GatherGemm)
            else (op.h, op.down, op.down_bias, op.down_scale, op.down_transposed, op.y.tensor.shape[-1])
        )
        self.packing = op.packing
        plain = [self.bank] if self.packing == "plain" else []
        for value in (self.a, *plain, *([self.bias] if self.bias is not None else [])):
            if value.tensor.dtype not in FLOATS:
                raise unsupported(op, f"%{value.name} is {value.type}: GEMMs take f32, f16 and bf16")
        if plain and self.a.tensor.dtype is not self.bank.tensor.dtype:
            dtypes = f"%{self.a.name} is {self.a.tensor.dtype}, %{self.bank.name} {self.bank.tensor.dtype}"
            raise unsupported(op, f"{dtypes}: they must agree")
        self.inner = self.known(self.a.tensor.shape[-1])
        self.columns = self.known(columns)
        self.experts, self.k = op.num_experts, op.k
        given = cast("Sequence[Mapping[str, Any]]", op.variants or func.attrs.get("variants") or DEFAULTS)
        self.variants = [variant for variant in given if family is None or family_of(variant) == family]

    @property
    def flags(self) -> dict[str, int]:
        """What entries have to know besides tiles, as of `launch.Entry`."""
        return {} if self.packing == "plain" else {"E4M3": 0} if self.family == "fp8" else {"PTX": 0}

    def constants(self) -> dict[str, int]:
        """Sizes by the names that the kernels' text uses; H and I are the layer's, whichever GEMM this is."""
        hidden, width = (self.inner, self.columns) if isinstance(self.op, GatherGemm) else (self.columns, self.inner)
        e_pad = padded(self.experts + 1)
        return {"E": self.experts, "E_PAD": e_pad, "K": self.k, "H": hidden, "I": width, "GROUP_M": GROUP_M}

    def known(self, dim: object) -> int:
        if not isinstance(dim, int):
            raise unsupported(self.op, f"the size {dim!r} must be known")
        return dim

    def sizes(self, variant: Mapping[str, Any]) -> dict[str, int]:
        """Tile sizes of a variant, no larger than the problem and no smaller than a tensor core's.

        Raises: CompileError for tiles of so many rows that they are not listed.
        """
        rows = max(16, padded(int(variant.get("block_m", 64))))
        if self.op.tiles is not None and rows not in TILE_ROWS:
            raise unsupported(self.op, f"block_m is {rows}, tiles are listed for {', '.join(map(str, TILE_ROWS))} rows")
        depth = max(16, min(padded(int(variant.get("block_k", 64))), padded(self.inner)))
        if self.packing != "plain":  # blocks of 128
            depth = 128 if self.packing == "mxfp4" or self.family == "fp8" else min(128, max(32, depth))
        return {
            "BLOCK_M": rows,
            "BLOCK_N": max(16, min(padded(int(variant.get("block_n", 64))), padded(self.columns))),
            "BLOCK_K": depth,
        }

    def even(self, size: int, block: str) -> bool:
        """Whether `block` divides `size` in every variant, so that no mask is needed."""
        return all(size % self.sizes(variant)[block] == 0 for variant in self.variants)

    def head(self, columns: str, ahead: Sequence[str] = ()) -> list[str]:
        """Find the tile, once it may be read: in the list of tiles where there is one, else by the offsets.

        For GEMM2 that is before GEMM1 has ended: where its tiles are was written before GEMM1 began; `early.py` sees to
        that. `ahead` is what it does besides until then.
        """
        function, where = "find_tile", "offsets, tokens * K, E, E_PAD"
        if self.op.tiles is not None:
            function, where = "listed_tile", "tiles, tokens * K, E"
        find = [
            f"COLUMNS: tl.constexpr = ({columns} + BLOCK_N - 1) // BLOCK_N",
            f"expert, start, stop, row_block, column_block = {function}(",
            f"    tl.program_id(0), {where}, COLUMNS, BLOCK_M, GROUP_M",
            ")",
        ]
        return ["arrive(PDL)", *find] if isinstance(self.op, GatherGemm) else [*find, *ahead, "arrive(PDL)"]

    def where(self) -> dict[str, Value]:
        """What `head` reads, by the parameter's name."""
        return {"offsets": self.op.offsets} if self.op.tiles is None else {"tiles": self.op.tiles}

    def rows(self) -> list[str]:
        return [
            "rows = start + row_block * BLOCK_M + tl.arange(0, BLOCK_M)",
            "live = rows < stop",
            "pair = tl.load(order + rows, mask=live, other=0)",
        ]

    def grid(self, sizes: Mapping[str, int]) -> tuple[str, str]:
        """At most this many tiles: every row block is full but one for each group that has rows.

        GEMM2 has the skipped pairs as one group more, whose rows it zeroes.
        """
        groups = self.experts + (not isinstance(self.op, GatherGemm))
        pairs = f"t * {self.k}" if self.k > 1 else "t"
        blocks = -(-self.columns // sizes["BLOCK_N"])
        return f"({pairs} // {sizes['BLOCK_M']} + min({groups}, {pairs})) * {blocks}", "1"

    def entry(self, name: str, parameters: Sequence[Parameter], variant: Mapping[str, Any], sizes: Mapping[str, int],
              grid: tuple[str, str]) -> Entry:  # fmt: skip
        warps, stages = int(variant.get("num_warps", 4)), int(variant.get("num_stages", 3))
        if self.packing == "mxfp4":  # a thread has four bytes of a column at least, which are widened together
            warps = min(warps, sizes["BLOCK_N"] // 4)
        return Entry(name, tuple(parameters), {**sizes, "PDL": 0, **self.flags}, grid, warps, stages)

    def signature(self, name: str, parameters: Sequence[Parameter]) -> str:
        names = ", ".join(parameter.name for parameter in parameters)
        tiles = "BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PDL: tl.constexpr"
        tiles += "".join(f", {flag}: tl.constexpr" for flag in self.flags)
        return f'@triton.jit(do_not_specialize=["tokens"])\ndef {name}({names}, {tiles}):'

    def pointer(self, name: str, value: Value, wiring: Wiring) -> Parameter:
        return Parameter(name, POINTERS[value.tensor.dtype], wiring.operand(value))


def family_of(variant: Mapping[str, Any]) -> str:
    """The family of kernels that a variant names."""
    return str(variant.get("kernel", "tiles"))


def masked(conditions: Sequence[str]) -> str:
    """The rest of a load under conditions: zeros where they do not hold."""
    return f", mask={' & '.join(conditions)}, other=0" if conditions else ""


def narrowed(text: str, dtype: DType) -> str:
    """An f32 tile in the element type of a result."""
    return f"{text}.to({NARROW[dtype]})" if dtype in NARROW else text
