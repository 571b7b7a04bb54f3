"""Families whose weights come by the copy engine of Hopper (TMA): `swap` and `tma`, for both GEMMs.

In `swap` the operands of the tensor cores change places: the weights are the side of 64 or 128, the tokens the one that
may be as narrow as 16. With a few rows per expert this is the way to Hopper's own matrix instruction (wgmma), whose
first side has at least 64. It is also the side that may come from registers, in which packed weights are widened.
`tma` leaves them in place, for many rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from sparsec.codegen.triton.combine import Down
from sparsec.codegen.triton.experts import ROWS_OF_H, activated, epilogue, up_parameters
from sparsec.codegen.triton.gemm import GroupedGemm
from sparsec.codegen.triton.launch import Entry, Wiring
from sparsec.codegen.triton.packed_streams import stream_of
from sparsec.codegen.triton.source import indent
from sparsec.dialects.moe import GatherGemm, GemmCombine
from sparsec.ir.core import Func


class Up:
    """The up-projection by these families. Raises: CompileError for rows that the copy engine does not take."""

    def __init__(self, family: str, func: Func, op: GatherGemm, gemm: GroupedGemm, wiring: Wiring) -> None:
        self.name, self.op, self.gemm = f"{func.name}_{family}", op, gemm
        self.streamed = stream_of(gemm, op.layout, op.up_transposed, "up", family == "swap", family == "tma")
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
        self.streamed = stream_of(gemm, "single", op.down_transposed, "down", family == "swap")
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
