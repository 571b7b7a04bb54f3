"""The kernel of the up-projection: `moe.gather_gemm`."""

from __future__ import annotations

from sparsec.codegen.triton.gemm import GROUP_M, GroupedGemm, masked, narrowed, step
from sparsec.codegen.triton.launch import TOKENS, Parameter, Schedule, Sketch, Wiring
from sparsec.codegen.triton.region import RegionCode
from sparsec.codegen.triton.source import indent, library, module_text
from sparsec.codegen.triton.tile import POINTERS, Names, Tile, padded, unsupported
from sparsec.dialects.moe import GatherGemm
from sparsec.ir.core import Func, Op


def gather_gemm(func: Func, op: GatherGemm) -> Sketch:
    """Text and launches of the up-projection. Raises: CompileError for what no kernel can hold."""
    gemm = GroupedGemm(func, op, op.x, op.up, op.up_bias)
    width, wide = op.width, op.layout == "interleaved"
    wiring = Wiring(op)
    parameters = [
        *(gemm.pointer(name, value, wiring) for name, value in (("x", op.x), ("order", op.order))),
        *(gemm.pointer(name, value, wiring) for name, value in (("offsets", op.offsets), ("up", op.up))),
        *([gemm.pointer("up_bias", op.up_bias, wiring)] if op.up_bias is not None else []),
        *([gemm.pointer("weights", op.weights, wiring)] if op.weights is not None else []),
        Parameter("h", POINTERS[op.h.tensor.dtype], wiring.result(op.h)),
        TOKENS,
    ]
    bound = [] if gemm.even(width, "BLOCK_N", width) else ["columns < I"]
    lines = [
        '"""Row i of h is the activated up-projection of the token of pair order[i], by the expert that owns row i."""',
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
    ]  # fmt: skip
    lines += _up_epilogue(op, bound)
    keep = " & ".join(["live[:, None]", *(f"({b})[None, :]" for b in bound)])
    lines.append(f"tl.store(h + rows.to(tl.int64)[:, None] * I + columns[None, :], {_result(op, lines)}, mask={keep})")
    text = gemm.signature(func.name, parameters) + "\n" + indent(lines)
    constants = {"E": gemm.experts, "E_PAD": padded(gemm.experts + 1), "K": op.k, "H": gemm.inner, "I": width}
    summary = f"rows of x gathered by expert, times the expert's up-projection ({op.layout}), activated."
    source = module_text(func, op, summary, {**constants, "GROUP_M": GROUP_M}, [text])
    schedules = list[Schedule]()
    for variant in gemm.variants:
        sizes = gemm.sizes(variant, width)
        entry = gemm.entry(func.name, parameters, variant, sizes, gemm.grid(sizes, width, gemm.experts))
        schedules.append(Schedule(variant.get("up_to"), (entry,), tuple(wiring.scratch)))
    return Sketch(source, tuple(schedules))


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


def _wide(bound: list[str], wide: bool) -> list[str]:
    return ["both < 2 * I" for _ in bound] if wide else bound


def _up_epilogue(op: GatherGemm, bound: list[str]) -> list[str]:
    """Weigh the rows, add the bias and split the columns into the activation's arguments."""
    lines = list[str]()
    if op.weights is not None:
        lines.append("weight = tl.load(weights + pair, mask=live, other=0).to(tl.float32)[:, None]")
        lines += [f"{accumulator} *= weight" for accumulator in _accumulators(op).values()]
    parts = "I" if op.layout == "single" else "2 * I"

    def bias(accumulator: str, column: str, condition: list[str]) -> str:
        mask = masked(condition)
        load = f"tl.load(up_bias + expert.to(tl.int64) * ({parts}) + {column}{mask}).to(tl.float32)"
        return f"{accumulator} += {load}[None, :]"

    if op.up_bias is not None:
        if op.layout == "concat":
            lines += [bias("gate", "columns", bound), bias("linear", "columns + I", bound)]
        elif op.layout == "interleaved":
            lines.append(bias("acc", "both", _wide(bound, True)))
        else:
            lines.append(bias("acc", "columns", bound))
    if op.layout == "interleaved":
        lines.append("gate, linear = tl.split(tl.reshape(acc, (BLOCK_M, BLOCK_N, 2)))")
    return lines


RESERVED = tuple(
    "x order offsets up up_bias weights h tokens expert start stop row_block column_block rows live pair columns "  # noqa: SIM905
    "depth a a_at weight bank up_at gate_at both acc gate linear k E E_PAD K H I GROUP_M BLOCK_M BLOCK_N BLOCK_K "
    "COLUMNS".split()
)
"""Variables of the kernel itself, which the activation's must not shadow."""


def _result(op: GatherGemm, lines: list[str]) -> str:
    """Write the activation; the text of what it yields, in h's element type."""
    code = RegionCode(Names((*RESERVED, *library())), rounds=False)
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
