"""Kernels of the two GEMMs of an expert layer: `moe.gather_gemm` and `moe.gemm_combine`.

Rows are cut into blocks expert by expert, and each program finds its block from the offsets, so no list of tiles has
to come from the host: the grid is an upper bound, and programs past the last tile leave at once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

from sparsec.codegen.triton.launch import TOKENS, Entry, Parameter, Schedule, Sketch, Wiring
from sparsec.codegen.triton.region import RegionCode
from sparsec.codegen.triton.source import indent, library, module_text
from sparsec.codegen.triton.tile import FLOATS, NARROW, POINTERS, Names, Tile, padded, unsupported
from sparsec.dialects.moe import GatherGemm, GemmCombine
from sparsec.ir.core import Func, Op, Value
from sparsec.ir.types import DType

GROUP_M = 8
"""Row blocks of one expert that share a block of its weights before the next one is read."""

DEFAULTS: tuple[Mapping[str, Any], ...] = (
    {"up_to": 64, "block_m": 16, "block_n": 64, "block_k": 128, "num_warps": 4, "num_stages": 4},
    {"up_to": 1024, "block_m": 64, "block_n": 64, "block_k": 64, "num_warps": 4, "num_stages": 4},
    {"up_to": None, "block_m": 128, "block_n": 64, "block_k": 64, "num_warps": 8, "num_stages": 3},
)
"""Variants where the schedule names none."""


class _Gemm:
    """What both kernels share: tile sizes, the loop over the inner dimension, the grid."""

    def __init__(self, func: Func, op: GatherGemm | GemmCombine, a: Value, bank: Value, bias: Value | None) -> None:
        self.func, self.op, self.bank, self.bias = func, op, bank, bias
        for value in (a, bank, *([bias] if bias is not None else [])):
            if value.tensor.dtype not in FLOATS:
                raise unsupported(op, f"%{value.name} is {value.type}: GEMMs take f32, f16 and bf16")
        if a.tensor.dtype is not bank.tensor.dtype:
            raise unsupported(op, f"%{a.name} is {a.tensor.dtype}, %{bank.name} {bank.tensor.dtype}: they must agree")
        self.inner = self.known(a.tensor.shape[-1])
        self.experts, self.k = op.num_experts, op.k
        given = op.variants or func.attrs.get("variants") or DEFAULTS
        self.variants = list(cast("Sequence[Mapping[str, Any]]", given))

    def known(self, dim: object) -> int:
        if not isinstance(dim, int):
            raise unsupported(self.op, f"the size {dim!r} must be known")
        return dim

    def sizes(self, variant: Mapping[str, Any], columns: int) -> dict[str, int]:
        """Tile sizes of a variant, no larger than the problem and no smaller than a tensor core's."""
        return {
            "BLOCK_M": max(16, padded(int(variant.get("block_m", 64)))),
            "BLOCK_N": max(16, min(padded(int(variant.get("block_n", 64))), padded(columns))),
            "BLOCK_K": max(16, min(padded(int(variant.get("block_k", 64))), padded(self.inner))),
        }

    def even(self, size: int, block: str, columns: int) -> bool:
        """Whether `block` divides `size` in every variant, so that no mask is needed."""
        return all(size % self.sizes(variant, columns)[block] == 0 for variant in self.variants)

    def head(self, columns: str) -> list[str]:
        """Find the tile; leave if there is none."""
        return [
            f"COLUMNS: tl.constexpr = ({columns} + BLOCK_N - 1) // BLOCK_N",
            "expert, start, stop, row_block, column_block = find_tile(",
            "    tl.program_id(0), offsets, tokens * K, E, E_PAD, COLUMNS, BLOCK_M, GROUP_M",
            ")",
        ]

    def rows(self) -> list[str]:
        return [
            "rows = start + row_block * BLOCK_M + tl.arange(0, BLOCK_M)",
            "live = rows < stop",
            "pair = tl.load(order + rows, mask=live, other=0)",
        ]

    def loop(self, inner: str, masks: Mapping[str, Sequence[str]], banks: Mapping[str, str], step: str) -> list[str]:
        """`acc += a @ bank` over the inner dimension for each (bank pointer, accumulator).

        Args:
            inner: name of the inner size.
            masks: conditions of the loads from `a_at` and from the banks, besides the inner dimension's.
            banks: accumulator by pointer.
            step: what the banks' pointers advance by.
        """
        tail = self.inner % max(self.sizes(v, 1 << 30)["BLOCK_K"] for v in self.variants) != 0
        a = [*masks["a"], *(["(depth < " + inner + " - k)[None, :]"] if tail else [])]
        b = [*masks["bank"], *(["(depth < " + inner + " - k)[:, None]"] if tail else [])]
        precision = ', input_precision="ieee"' if self.bank.tensor.dtype is DType.f32 else ""
        lines = [f"for k in tl.range(0, {inner}, BLOCK_K):", f"    a = tl.load(a_at{_mask(a)})"]
        for pointer, accumulator in banks.items():
            lines.append(f"    {accumulator} = tl.dot(a, tl.load({pointer}{_mask(b)}), {accumulator}{precision})")
        lines.append("    a_at += BLOCK_K")
        return [*lines, *(f"    {pointer} += {step}" for pointer in banks)]

    def grid(self, sizes: Mapping[str, int], columns: int, groups: int) -> tuple[str, str]:
        """At most this many tiles: every row block is full but one for each group that has rows."""
        pairs = f"t * {self.k}" if self.k > 1 else "t"
        blocks = -(-columns // sizes["BLOCK_N"])
        return f"({pairs} // {sizes['BLOCK_M']} + min({groups}, {pairs})) * {blocks}", "1"

    def entry(self, name: str, parameters: Sequence[Parameter], variant: Mapping[str, Any], sizes: Mapping[str, int],
              grid: tuple[str, str]) -> Entry:  # fmt: skip
        warps, stages = int(variant.get("num_warps", 4)), int(variant.get("num_stages", 3))
        return Entry(name, tuple(parameters), sizes, grid, warps, stages)

    def signature(self, name: str, parameters: Sequence[Parameter]) -> str:
        names = ", ".join(parameter.name for parameter in parameters)
        tiles = "BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr"
        return f'@triton.jit(do_not_specialize=["tokens"])\ndef {name}({names}, {tiles}):'

    def pointer(self, name: str, value: Value, wiring: Wiring) -> Parameter:
        return Parameter(name, POINTERS[value.tensor.dtype], wiring.operand(value))


def gather_gemm(func: Func, op: GatherGemm) -> Sketch:
    """Text and launches of the up-projection. Raises: CompileError for what no kernel can hold."""
    gemm = _Gemm(func, op, op.x, op.up, op.up_bias)
    width, wide = op.width, op.layout == "interleaved"
    wiring = Wiring(op)
    parameters = [
        *(gemm.pointer(name, value, wiring) for name, value in (("x", op.x), ("order", op.order))),
        *(gemm.pointer(name, value, wiring) for name, value in (("offsets", op.offsets), ("up", op.up))),
        *([gemm.pointer("up_bias", op.up_bias, wiring)] if op.up_bias is not None else []),
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
                   _accumulators(op), _step(op.up_transposed, "I" if op.layout == "single" else "2 * I")),
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


def _step(transposed: bool, columns: str) -> str:
    return f"BLOCK_K * ({columns})" if transposed else "BLOCK_K"


def _up_epilogue(op: GatherGemm, bound: list[str]) -> list[str]:
    """Add the bias and split the columns into the activation's arguments."""
    lines = list[str]()
    parts = "I" if op.layout == "single" else "2 * I"

    def bias(accumulator: str, column: str, condition: list[str]) -> str:
        mask = _mask(condition)
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
    "x order offsets up up_bias h tokens expert start stop row_block column_block rows live pair columns depth a a_at "  # noqa: SIM905
    "bank up_at gate_at both acc gate linear k E E_PAD K H I GROUP_M BLOCK_M BLOCK_N BLOCK_K COLUMNS".split()
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
    return _narrowed(result.text, op.h.tensor.dtype)


def _narrowed(text: str, dtype: DType) -> str:
    return f"{text}.to({NARROW[dtype]})" if dtype in NARROW else text


def gemm_combine(func: Func, op: GemmCombine) -> Sketch:
    """Text and launches of the down-projection and the weighted sum. Raises: CompileError."""
    gemm = _Gemm(func, op, op.h, op.down, op.down_bias)
    hidden = gemm.known(op.y.tensor.shape[-1])
    wiring = Wiring(op)
    partial = Parameter("partial", "*fp32", wiring.buffer(f"t * {op.k * hidden * 4}"))
    parameters = [
        *(gemm.pointer(name, value, wiring) for name, value in (("h", op.h), ("order", op.order))),
        *(gemm.pointer(name, value, wiring) for name, value in (("offsets", op.offsets), ("weights", op.weights))),
        gemm.pointer("down", op.down, wiring),
        *([gemm.pointer("down_bias", op.down_bias, wiring)] if op.down_bias is not None else []),
        partial,
        TOKENS,
    ]
    bound = [] if gemm.even(hidden, "BLOCK_N", hidden) else ["columns < H"]
    at = "depth[:, None] * H + columns[None, :]" if op.down_transposed else "columns[None, :] * I + depth[:, None]"
    bias = "tl.load(down_bias + expert.to(tl.int64) * H + columns" + _mask(bound) + ").to(tl.float32)"
    out_mask = " & ".join(["live[:, None]", *(f"({b})[None, :]" for b in bound)])
    lines = [
        '"""Row p of partial is the down-projection of pair p by its expert, times its weight; 0 if skipped."""',
        *gemm.head("H"),
        "if expert > E:",
        "    return",
        *gemm.rows(),
        "columns = column_block * BLOCK_N + tl.arange(0, BLOCK_N)",
        "out = partial + pair.to(tl.int64)[:, None] * H + columns[None, :]",
        "if expert == E:",
        f"    tl.store(out, tl.zeros([BLOCK_M, BLOCK_N], tl.float32), mask={out_mask})",
        "    return",
        "depth = tl.arange(0, BLOCK_K)",
        "a_at = h + rows.to(tl.int64)[:, None] * I + depth[None, :]",
        f"down_at = down + expert.to(tl.int64) * (H * I) + {at}",
        "acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)",
        *gemm.loop("I", {"a": ["live[:, None]"], "bank": [f"({b})[None, :]" for b in bound]}, {"down_at": "acc"},
                   _step(op.down_transposed, "H")),
        *([f"acc += {bias}[None, :]"] if op.down_bias is not None else []),
        "weight = tl.load(weights + pair, mask=live, other=0).to(tl.float32)",
        f"tl.store(out, acc * weight[:, None], mask={out_mask})",
    ]  # fmt: skip
    text = gemm.signature(f"{func.name}_gemm", parameters) + "\n" + indent(lines)
    block_h = min(1024, padded(hidden))
    combine_parameters = [
        partial,
        Parameter("y", POINTERS[op.y.tensor.dtype], wiring.result(op.y)),
    ]
    constants = {"E": gemm.experts, "E_PAD": padded(gemm.experts + 1), "K": op.k, "H": hidden, "I": gemm.inner}
    summary = "rows of h times their expert's down-projection, weighed, and added per token in the order of slots."
    functions = [text, _combine_text(func, op.y.tensor.dtype, hidden % block_h != 0)]
    source = module_text(func, op, summary, {**constants, "GROUP_M": GROUP_M}, functions)
    combine = Entry(
        f"{func.name}_combine", tuple(combine_parameters), {"BLOCK_H": block_h}, ("t", str(-(-hidden // block_h))), 4, 1
    )
    schedules = list[Schedule]()
    for variant in gemm.variants:
        sizes = gemm.sizes(variant, hidden)
        grid = gemm.grid(sizes, hidden, gemm.experts + 1)
        entry = gemm.entry(f"{func.name}_gemm", parameters, variant, sizes, grid)
        schedules.append(Schedule(variant.get("up_to"), (entry, combine), tuple(wiring.scratch)))
    return Sketch(source, tuple(schedules))


def _combine_text(func: Func, dtype: DType, tail: bool) -> str:
    mask = ", mask=columns < H" + ", other=0" if tail else ""
    lines = [
        '"""One token: the sum of its K rows of partial, slot by slot, rounded once."""',
        "token = tl.program_id(0).to(tl.int64)",
        "columns = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)",
        "total = tl.zeros([BLOCK_H], tl.float32)",
        "for slot in tl.static_range(K):",
        f"    total += tl.load(partial + (token * K + slot) * H + columns{mask})",
        f"tl.store(y + token * H + columns, {_narrowed('total', dtype)}{', mask=columns < H' if tail else ''})",
    ]
    return f"@triton.jit\ndef {func.name}_combine(partial, y, BLOCK_H: tl.constexpr):\n" + indent(lines)


def _mask(conditions: Sequence[str]) -> str:
    return f", mask={' & '.join(conditions)}, other=0" if conditions else ""


def fused_op(func: Func) -> Op:
    """The one op of a kernel function besides its return. Raises: CompileError."""
    ops = func.body.ops[:-1]
    if len(ops) != 1:
        raise unsupported(None, f"kernel '{func.name}' holds {len(ops)} ops, must hold one")
    return ops[0]
