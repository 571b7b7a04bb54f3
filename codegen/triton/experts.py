"""The kernel of the up-projection: `moe.gather_gemm`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sparsec.codegen.triton.banks import Bank, bank_of, scale_parameters
from sparsec.codegen.triton.gemm import GroupedGemm, masked, narrowed
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
        self.name, self.op, self.gemm = func.name, op, gemm
        self.parameters = up_parameters(gemm, op, wiring)

    def functions(self) -> list[str]:
        op, gemm, bank = self.op, self.gemm, bank_of(self.gemm)
        bound = [] if gemm.even(op.width, "BLOCK_N") else ["columns < I"]
        lines = [
            f'"""{ROWS_OF_H}"""',
            *gemm.head("I"),
            "if expert >= E:",
            "    return",
            *gemm.rows(),
            "columns = column_block * BLOCK_N + tl.arange(0, BLOCK_N)",
            f"depth = tl.arange(0, {bank.depth})",
            *bank.rows("x", "(pair // K)"),
            *_pointers(op, bank),
            *bank.loop(_wide(bound, op.layout == "interleaved"), _accumulators(op)),
            *epilogue(op, _columns(op), bound),
        ]
        keep = " & ".join(["live[:, None]", *(f"({b})[None, :]" for b in bound)])
        result = activated(op, lines)
        lines.append(f"tl.store(h + rows.to(tl.int64)[:, None] * I + columns[None, :], {result}, mask={keep})")
        return [gemm.signature(self.name, self.parameters) + "\n" + indent(lines)]

    def launches(self, variant: Mapping[str, Any]) -> tuple[Entry, ...]:
        sizes = self.gemm.sizes(variant)
        return (self.gemm.entry(self.name, self.parameters, variant, sizes, self.gemm.grid(sizes)),)


ROWS_OF_H = "Row i of h is the activated up-projection of the token of pair order[i], by the expert that owns row i."


def up_parameters(gemm: GroupedGemm, op: GatherGemm, wiring: Wiring) -> list[Parameter]:
    """What an up-projection reads and writes.

    `x, order, tiles (or offsets), up, (up_bias), (weights), (up_scale), h, tokens`
    """
    operands = {"x": op.x, "order": op.order, **gemm.where(), "up": op.up}
    operands |= {"up_bias": op.up_bias} if op.up_bias is not None else {}
    operands |= {"weights": op.weights} if op.weights is not None else {}
    h = Parameter("h", POINTERS[op.h.tensor.dtype], wiring.result(op.h))
    given = [gemm.pointer(name, value, wiring) for name, value in operands.items()]
    return [*given, *scale_parameters(gemm, wiring), h, TOKENS]


def up_summary(op: GatherGemm) -> str:
    """What the kernels of an up-projection compute."""
    return f"rows of x gathered by expert, times the expert's up-projection ({op.layout}), activated."


def _pointers(op: GatherGemm, bank: Bank) -> list[str]:
    """Pointers into the expert's weights, and zero accumulators."""
    first, zeros = "column_block * BLOCK_N", "tl.zeros([BLOCK_M, BLOCK_N], tl.float32)"
    match op.layout:
        case "single":
            return [*bank.start(), *bank.at("up", "columns", first), f"acc = {zeros}"]
        case "concat":
            pointers = [*bank.at("gate", "columns", first), *bank.at("up", "(columns + I)", f"{first} + I")]
            return [*bank.start(), *pointers, f"gate = {zeros}", f"linear = {zeros}"]
        case _:
            first = "column_block * 2 * BLOCK_N"
            both = [f"both = {first} + tl.arange(0, 2 * BLOCK_N)", *bank.at("up", "both", first)]
            return [*bank.start(), *both, f"acc = {zeros.replace('BLOCK_N', '2 * BLOCK_N')}"]


def _accumulators(op: GatherGemm) -> dict[str, str]:
    return {"gate": "gate", "up": "linear"} if op.layout == "concat" else {"up": "acc"}


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
    "x order offsets tiles up up_bias weights h tokens expert start stop row_block column_block rows live pair columns "  # noqa: SIM905
    "depth a a_at weight bank up_at gate_at bias_at first both acc gate linear k E E_PAD K H I GROUP_M BLOCK_M BLOCK_N "
    "BLOCK_K COLUMNS PDL PTX up_scale scales scale gate_exponents up_exponents gate_scale_at up_scale_at half low high "
    "w w_low w_high few ahead a_scale a_scale_at x_scale E4M3".split()
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
