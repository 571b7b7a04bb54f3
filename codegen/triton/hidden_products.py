"""The products of `moe.hidden_grad`: rows of tokens that are gathered, times blocks of an expert's two banks.

Both families leave the tiles `back` (the gradient of the activation's value, before the routing weight) and `gate` and
`linear`, or `acc` where the expert is not gated. In `tiles` weights come by pointers; in `tma` the copy engine brings
them, which leaves registers for three sums of 128 x 128.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from sparsec.codegen.triton.gemm import masked
from sparsec.codegen.triton.gradient_kernels import require_engine
from sparsec.codegen.triton.launch import Parameter, tensor_map
from sparsec.codegen.triton.streamed import bank_view
from sparsec.codegen.triton.tile import unsupported
from sparsec.dialects.moe import HiddenGrad
from sparsec.ir.types import DType

Tile = Mapping[str, int]

ALTERNATE = "gate, linear = tl.split(tl.reshape(acc, (BLOCK_M, BLOCK_N, 2)))"
HALVES = "gate, linear = halves(acc)"
"""How a product of twice the columns is parted: where they alternate, and where they follow each other."""


class Pointers:
    """The products by pointers, of any sizes and layouts.

    Args:
        hidden, out: columns of x and of y_grad.
        tiles: of the variants of this family.

    Attributes: `ragged` says whether a block of columns reaches beyond the last one.
    """

    def __init__(self, op: HiddenGrad, hidden: int, out: int, tiles: Sequence[Tile]) -> None:
        self.op, self.hidden, self.out, self.tiles = op, hidden, out, tiles
        self.ragged = not self._even(op.width, "BLOCK_N")
        self.bound = ["columns < I"] if self.ragged else []

    def given(self, parameters: Sequence[Parameter], tile: Tile) -> tuple[Parameter, ...]:
        """The parameters as this family takes them."""
        return tuple(parameters)

    def lines(self) -> list[str]:
        return [*self._down(), *self._up()]

    def _even(self, size: int, block: str) -> bool:
        return all(size % tile[block] == 0 for tile in self.tiles)

    def _up(self) -> list[str]:
        """The up-projection again: `gate` and `linear` by one product of twice the columns, or `acc`."""
        op, both, width, total, parted = self.op, "both", "2 * BLOCK_N", "(2 * I)", HALVES
        bound = ["first + lane % BLOCK_N < I" for _ in self.bound]
        lines = ["lane = tl.arange(0, 2 * BLOCK_N)"]
        if op.layout == "single":
            width, both, total, lines, bound, parted = "BLOCK_N", "columns", "I", [], self.bound, ""
        elif op.layout == "concat":
            lines.append("both = lane // BLOCK_N * I + first + lane % BLOCK_N")
        elif not op.up_transposed:
            lines.append("both = lane // BLOCK_N + 2 * (first + lane % BLOCK_N)")
        else:  # columns that alternate in memory are read as they lie there
            lines.append("both = 2 * first + lane")
            bound, parted = ["both < 2 * I" for _ in bound], ALTERNATE
        at = f"depth[:, None] * {total} + {both}[None, :]" if op.up_transposed else (
            f"{both}[None, :] * H + depth[:, None]")  # fmt: skip
        step = f" * {total}" if op.up_transposed else ""
        pointers = f"up + expert.to(tl.int64) * (H * {total}) + {at}"
        lines += self._loop("acc", "x", "H", self.hidden, pointers, step, bound, width)
        return [*lines, *([parted] if parted else [])]

    def _down(self) -> list[str]:
        at, step = ("columns[None, :] * D + depth[:, None]", "") if self.op.down_transposed else (
            "depth[:, None] * I + columns[None, :]", " * I")  # fmt: skip
        pointers = f"down + expert.to(tl.int64) * (D * I) + {at}"
        return self._loop("back", "y_grad", "D", self.out, pointers, step, self.bound, "BLOCK_N")

    def _loop(self, sum: str, rows: str, inner: str, size: int, pointers: str, step: str, bound: Sequence[str],
              columns: str) -> list[str]:  # fmt: skip
        """`sum` of the products of rows of tokens with a part of a bank, at `pointers`."""
        tail = not self._even(size, "BLOCK_K")
        a = masked(["live[:, None]", *([f"(depth < {inner} - k)[None, :]"] if tail else [])])
        b = masked([*(f"({b})[None, :]" for b in bound), *([f"(depth < {inner} - k)[:, None]"] if tail else [])])
        precision = ', input_precision="ieee"' if self.op.x.tensor.dtype is DType.f32 else ""
        return [
            f"a_at = {rows} + token[:, None] * {inner} + depth[None, :]",
            f"{sum}_at = {pointers}",
            f"{sum} = tl.zeros([BLOCK_M, {columns}], tl.float32)",
            f"for k in tl.range(0, {inner}, BLOCK_K):",
            f"    {sum} = tl.dot(tl.load(a_at{a}), tl.load({sum}_at{b}), {sum}{precision})",
            f"    {sum}_at += BLOCK_K{step}",
            "    a_at += BLOCK_K",
        ]


class Engine:
    """The products with weights by the copy engine.

    BLOCK_K divides both sums, so that no sum has a part that comes from beyond it. The engine steps over rows of a
    bank, not within them: of a transposed bank it brings columns that follow each other apart.

    Raises: CompileError for f32, and for rows that the engine does not take.
    """

    def __init__(self, op: HiddenGrad, hidden: int, out: int, tiles: Sequence[Tile]) -> None:
        self.op, self.hidden, self.out = op, hidden, out
        dtype = op.x.tensor.dtype
        up_row = op.parts * op.width if op.up_transposed else hidden
        require_engine(op, dtype, up_row, out if op.down_transposed else op.width)
        if hidden % 16 or out % 16:
            raise unsupported(op, f"sums of {hidden} and {out} terms: with the copy engine they have multiples of 16")
        self.alternate = op.layout == "interleaved" and op.up_transposed
        self.ragged = any(op.width % tile["BLOCK_N"] for tile in tiles)

    def sizes(self, tile: Tile) -> dict[str, int]:
        """The sizes with which these products are made."""
        depth = tile["BLOCK_K"]
        while self.hidden % depth or self.out % depth:
            depth //= 2
        return {**tile, "BLOCK_K": depth}

    def given(self, parameters: Sequence[Parameter], tile: Tile) -> tuple[Parameter, ...]:
        """The parameters with both banks as descriptors: `up` [E, 2, I, H] and `down` [E, H, I], or transposed."""
        op, experts, width = self.op, self.op.num_experts, self.op.width
        maps = {
            "up": bank_view((experts, width, self.hidden), op.layout, op.up_transposed, tile),
            "down": bank_view((experts, width, self.out), "single", not op.down_transposed, tile),
        }
        dtype = op.x.tensor.dtype
        return tuple(tensor_map(p.name, dtype, p.argument, *maps[p.name]) if p.name in maps else p for p in parameters)

    def lines(self) -> list[str]:
        down = ("down.load([expert, first, k]).reshape(BLOCK_N, BLOCK_K)" if self.op.down_transposed else
                "down.load([expert, k, first]).reshape(BLOCK_K, BLOCK_N)")  # fmt: skip
        lines = self._loop("y_grad", "D", {"back": down}, not self.op.down_transposed, "BLOCK_N")
        if self.op.layout == "single":
            at = "expert, k, first" if self.op.up_transposed else "expert, first, k"
            return lines + self._loop("x", "H", self._blocks({"acc": at}, "BLOCK_N"), self.op.up_transposed, "BLOCK_N")
        if not self.op.up_transposed:
            blocks = self._blocks({"acc": "expert, 0, first, k"}, "2 * BLOCK_N")
            return [*lines, *self._loop("x", "H", blocks, False, "2 * BLOCK_N"), HALVES]
        if self.alternate:
            blocks = self._blocks({"acc": "expert, k, 2 * first"}, "2 * BLOCK_N")
            return [*lines, *self._loop("x", "H", blocks, True, "2 * BLOCK_N"), ALTERNATE]
        blocks = self._blocks({"gate": "expert, k, first", "linear": "expert, k, I + first"}, "BLOCK_N")
        return lines + self._loop("x", "H", blocks, True, "BLOCK_N")

    def _blocks(self, at: Mapping[str, str], columns: str) -> dict[str, str]:
        """Blocks of `up` by the sum that they are for."""
        sides = f"BLOCK_K, {columns}" if self.op.up_transposed else f"{columns}, BLOCK_K"
        return {sum: f"up.load([{place}]).reshape({sides})" for sum, place in at.items()}

    def _loop(self, rows: str, inner: str, blocks: Mapping[str, str], inner_first: bool, columns: str) -> list[str]:
        """Sums of the products of rows of tokens with blocks of a bank, [BLOCK_K, columns] where `inner_first`."""
        return [
            f"a_at = {rows} + token[:, None] * {inner} + depth[None, :]",
            *(f"{sum} = tl.zeros([BLOCK_M, {columns}], tl.float32)" for sum in blocks),
            f"for k in tl.range(0, {inner}, BLOCK_K):",
            *(f"    {sum}_block = {block}" for sum, block in blocks.items()),
            "    a = tl.load(a_at, mask=live[:, None], other=0)",
            *(
                f"    {sum} = tl.dot(a, {f'{sum}_block' if inner_first else f'tl.trans({sum}_block)'}, {sum})"
                for sum in blocks
            ),
            "    a_at += BLOCK_K",
        ]
