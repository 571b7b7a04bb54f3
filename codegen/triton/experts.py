"""The kernel of the up-projection: `moe.gather_gemm`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sparsec.codegen.triton.gemm import GroupedGemm, masked, narrowed, step
from sparsec.codegen.triton.launch import TOKENS, Entry, Parameter, Wiring
from sparsec.codegen.triton.region import RegionCode
from sparsec.codegen.triton.source import indent, library
from sparsec.codegen.triton.tile import POINTERS, Names, Tile, unsupported
from sparsec.dialects.moe import GatherGemm
from sparsec.ir.core import Func, Op


class Tiles:
    """The family `tiles`: a program for each block of an expert's rows and of columns. Any element type and layout.

    A row's sum over H is taken in steps of BLOCK_K, whatever the batch it comes in.
    """

    def __init__(self, func: Func, op: GatherGemm, gemm: GroupedGemm, wiring: Wiring) -> None:
        self.func, self.op, self.gemm = func, op, gemm
        self.parameters = up_parameters(gemm, op, wiring)

    def functions(self) -> list[str]:
        op, gemm, wide = self.op, self.gemm, self.op.layout == "interleaved"
        bound = [] if gemm.even(op.width, "BLOCK_N") else ["columns < I"]
        lines = [
            f'"""{ROWS_OF_H}"""',
            *gemm.head("I"),
            "if expert >= E:",
            "    return",
            *gemm.rows(),
            "columns = column_block * BLOCK_N + tl.arange(0, BLOCK_N)",
            "depth = tl.arange(0, BLOCK_K)",
            "a_at = x + (pair // K).to(tl.int64)[:, None] * H + depth[None, :]",
            *_up_pointers(op),
            *gemm.loop("H", {"a": ["live[:, None]"], "bank": [f"({b})[None, :]" for b in _wide(bound, wide)]},
                       _accumulators(op), step(op.up_transposed, "I" if op.layout == "single" else "2 * I")),
            *epilogue(op, _columns(op), bound),
        ]  # fmt: skip
        keep = " & ".join(["live[:, None]", *(f"({b})[None, :]" for b in bound)])
        result = activated(op, lines)
        lines.append(f"tl.store(h + rows.to(tl.int64)[:, None] * I + columns[None, :], {result}, mask={keep})")
        return [gemm.signature(self.func.name, self.parameters) + "\n" + indent(lines)]

    def launches(self, variant: Mapping[str, Any]) -> tuple[Entry, ...]:
        sizes = self.gemm.sizes(variant)
        return (self.gemm.entry(self.func.name, self.parameters, variant, sizes, self.gemm.grid(sizes)),)


ROWS_OF_H = "Row i of h is the activated up-projection of the token of pair order[i], by the expert that owns row i."


def up_parameters(gemm: GroupedGemm, op: GatherGemm, wiring: Wiring) -> list[Parameter]:
    """What an up-projection reads and writes: `x, order, offsets, up, (up_bias), (weights), h, tokens`."""
    operands = {"x": op.x, "order": op.order, "offsets": op.offsets, "up": op.up}
    operands |= {"up_bias": op.up_bias} if op.up_bias is not None else {}
    operands |= {"weights": op.weights} if op.weights is not None else {}
    h = Parameter("h", POINTERS[op.h.tensor.dtype], wiring.result(op.h))
    return [*(gemm.pointer(name, value, wiring) for name, value in operands.items()), h, TOKENS]


def up_summary(op: GatherGemm) -> str:
    """What the kernels of an up-projection compute."""
    return f"rows of x gathered by expert, times the expert's up-projection ({op.layout}), activated."


def _up_pointers(op: GatherGemm) -> list[str]:
    """Pointers into the expert's weights, [BLOCK_K, columns], and zero accumulators."""
    parts = "I" if op.layout == "single" else "2 * I"
    lines = [f"bank = up + expert.to(tl.int64) * ({parts} * H)"]

    def at(column: str) -> str:
        if op.up_transposed:
            return f"bank + depth[:, None] * ({parts}) + {column}[None, :]"
        return f"bank + {column}[None, :] * H + depth[:, None]"

    zeros = "tl.zeros([BLOCK_M, BLOCK_N], tl.float32)"
    match op.layout:
        case "single":
            return [*lines, f"up_at = {at('columns')}", f"acc = {zeros}"]
        case "concat":
            pointers = [f"gate_at = {at('columns')}", f"up_at = {at('(columns + I)')}"]
            return [*lines, *pointers, f"gate = {zeros}", f"linear = {zeros}"]
        case _:
            both = "both = column_block * 2 * BLOCK_N + tl.arange(0, 2 * BLOCK_N)"
            return [*lines, both, f"up_at = {at('both')}", f"acc = {zeros.replace('BLOCK_N', '2 * BLOCK_N')}"]


def _accumulators(op: GatherGemm) -> dict[str, str]:
    return {"gate_at": "gate", "up_at": "linear"} if op.layout == "concat" else {"up_at": "acc"}


def _columns(op: GatherGemm) -> dict[str, str]:
    if op.layout == "concat":
        return {"gate": "columns", "linear": "columns + I"}
    return {"acc": "columns" if op.layout == "single" else "both"}


def _wide(bound: list[str], wide: bool) -> list[str]:
    return ["both < 2 * I" for _ in bound] if wide else bound


def epilogue(op: GatherGemm, accumulators: Mapping[str, str], bound: list[str]) -> list[str]:
    """Weigh the rows, add the bias and split the columns into the activation's arguments.

    Args:
        accumulators: the expert's columns that each tile [BLOCK_M, columns] holds; `both` where they are of two kinds
            that alternate.
        bound: conditions of `columns`.
    """
    lines = list[str]()
    if op.weights is not None:
        lines.append("weight = tl.load(weights + pair, mask=live, other=0).to(tl.float32)[:, None]")
        lines += [f"{accumulator} *= weight" for accumulator in accumulators]
    if op.up_bias is not None:
        lines.append(f"bias_at = up_bias + expert.to(tl.int64) * {'I' if op.layout == 'single' else '(2 * I)'}")
        for accumulator, columns in accumulators.items():
            mask = masked(_wide(bound, columns == "both"))
            lines.append(f"{accumulator} += tl.load(bias_at + {columns}{mask}).to(tl.float32)[None, :]")
    if "both" in accumulators.values():
        lines.append("gate, linear = tl.split(tl.reshape(acc, (BLOCK_M, BLOCK_N, 2)))")
    return lines


RESERVED = tuple(
    "x order offsets up up_bias weights h tokens expert start stop row_block column_block rows live pair columns "  # noqa: SIM905
    "depth a a_at weight bank up_at gate_at bias_at first both acc gate linear k E E_PAD K H I GROUP_M BLOCK_M BLOCK_N "
    "BLOCK_K COLUMNS".split()
)
"""Variables of the kernel itself, which the activation's must not shadow."""


def activated(op: GatherGemm, lines: list[str], reserved: tuple[str, ...] = ()) -> str:
    """Write the activation of `gate` and `linear`, or of `acc`, to `lines`; its result's text, in h's element type.

    `reserved`: variables of the kernel beside those of `tiles`.
    """
    code = RegionCode(Names((*RESERVED, *reserved, *library())), rounds=False)
    parts = ["acc"] if op.layout == "single" else ["gate", "linear"]
    tiles = [
        Tile(part, (op.width,), True, arg.tensor.dtype) for part, arg in zip(parts, op.activation.args, strict=True)
    ]
    (result,) = code.run(op.activation, tiles)
    lines += code.lines
    return narrowed(result.text, op.h.tensor.dtype)


def fused_op(func: Func) -> Op:
    """The one op of a kernel function besides its return. Raises: CompileError."""
    ops = func.body.ops[:-1]
    if len(ops) != 1:
        raise unsupported(None, f"kernel '{func.name}' holds {len(ops)} ops, must hold one")
    return ops[0]
