"""The kernel of the gradients inside an expert: `moe.hidden_grad`.

One program computes a block of rows and columns of all that the backward pass needs of an expert's inside: the
up-projection again, the gradient of the activation's value, and from both, by the region, the activated rows and the
gradient of the up-projection. What the block adds to the gradient of its pairs' routing weights, the products of the
activation's value and its gradient, goes to a buffer by block of columns; a second launch adds these in their order.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

from sparsec.codegen.triton.gemm import GROUP_M, masked, narrowed
from sparsec.codegen.triton.launch import TOKENS, Entry, Parameter, Schedule, Sketch, Wiring, ceil_div
from sparsec.codegen.triton.region import RegionCode
from sparsec.codegen.triton.source import indent, library, module_text
from sparsec.codegen.triton.tile import FLOATS, POINTERS, Names, Tile, padded, unsupported
from sparsec.dialects.moe import HiddenGrad
from sparsec.ir.core import Func, Op, Value
from sparsec.ir.types import DType

PAIRS = 128
"""Pairs whose parts one program of the second launch adds."""

Variant = Mapping[str, Any]


def sizes_of(op: Op, variant: Variant, m: int, n: int, k: int) -> dict[str, int]:
    """Tile sizes of a variant, no larger than m x n x k and no smaller than a tensor core's."""
    sides = {"block_m": m, "block_n": n, "block_k": k}
    return {
        side.upper(): max(16, min(padded(int(variant.get(side, 64))), padded(most))) for side, most in sides.items()
    }


def chosen(func: Func, op: HiddenGrad | Op, default: Sequence[Variant]) -> list[Variant]:
    """The variants that the schedule or the function names, else `default`."""
    return list(cast("Sequence[Variant]", op.attrs.get("variants") or func.attrs.get("variants") or default))


def number(op: Op, dim: object) -> int:
    """A size that must be known. Raises: CompileError."""
    if not isinstance(dim, int):
        raise unsupported(op, f"the size {dim!r} must be known")
    return dim


def require_floats(op: Op, *values: Value | None) -> None:
    """Raises: CompileError unless all of them are of one type that GEMMs take."""
    given = [value for value in values if value is not None]
    for value in given:
        if value.tensor.dtype not in FLOATS or value.tensor.dtype is not given[0].tensor.dtype:
            raise unsupported(op, f"%{value.name} is {value.type}: gradients take f32, f16 or bf16, all alike")


def signature(name: str, parameters: Sequence[Parameter], constants: Mapping[str, int]) -> str:
    """The head of an entry point."""
    given = [*(parameter.name for parameter in parameters), *(f"{name}: tl.constexpr" for name in constants)]
    return f'@triton.jit(do_not_specialize=["tokens"])\ndef {name}({", ".join(given)}):'


def hidden_grad(func: Func, op: HiddenGrad) -> Sketch:
    """Text and launches. Raises: CompileError for what no kernel can hold."""
    return _Hidden(func, op).sketch()


def _default(op: HiddenGrad) -> Sequence[Variant]:
    """Variants where the schedule names none: three sums for each element, without spilled registers on any target."""
    if op.x.tensor.dtype is DType.f32:  # no tensor cores
        return ({"block_m": 32, "block_n": 32, "block_k": 32, "num_warps": 4, "num_stages": 2},)
    columns = 64 if op.layout == "single" else 32
    return ({"block_m": 64, "block_n": columns, "block_k": 64, "num_warps": 4, "num_stages": 3},)


class _Hidden:
    def __init__(self, func: Func, op: HiddenGrad) -> None:
        require_floats(op, op.y_grad, op.x, op.up, op.down, op.up_bias, op.down_bias)
        self.func, self.op, self.wiring = func, op, Wiring(op)
        self.hidden, self.out = number(op, op.x.tensor.shape[-1]), number(op, op.y_grad.tensor.shape[-1])
        self.width = op.width
        self.variants = chosen(func, op, _default(op))
        depth = max(self.hidden, self.out)
        self.tiles = [sizes_of(op, variant, 1 << 20, self.width, depth) for variant in self.variants]
        blocks = max(-(-self.width // tile["BLOCK_N"]) for tile in self.tiles)
        self.partial = Parameter("partial", "*fp32", self.wiring.buffer(f"t * {4 * op.k * blocks}"))
        operands = {"y_grad": op.y_grad, "x": op.x, "order": op.order}
        operands |= {"tiles": op.tiles} if op.tiles is not None else {"offsets": op.offsets}
        operands |= {"weights": op.weights, "up": op.up, "down": op.down}
        operands |= {"up_bias": op.up_bias} if op.up_bias is not None else {}
        operands |= {"down_bias": op.down_bias} if op.down_bias is not None else {}
        results = {"h_grad": op.h_grad, "h": op.h}
        self.parameters = [
            *(Parameter(n, POINTERS[v.tensor.dtype], self.wiring.operand(v)) for n, v in operands.items()),
            *(Parameter(n, POINTERS[v.tensor.dtype], self.wiring.result(v)) for n, v in results.items()),
            self.partial,
            TOKENS,
        ]

    def sketch(self) -> Sketch:
        op, pairs = self.op, f"t * {self.op.k}"
        grad = Parameter("weights_grad", POINTERS[op.weights.tensor.dtype], self.wiring.result(op.weights_grad))
        added = [self.partial, grad, TOKENS]
        constants = {"E": op.num_experts, "E_PAD": padded(op.num_experts + 1), "K": op.k}
        constants |= {"H": self.hidden, "D": self.out, "I": self.width, "GROUP_M": GROUP_M, "PAIRS": PAIRS}
        first, second = f"{self.func.name}_rows", f"{self.func.name}_weights"
        flags = {"BLOCK_M": 0, "BLOCK_N": 0, "BLOCK_K": 0, "PDL": 0}
        texts = [
            signature(first, self.parameters, flags) + "\n" + indent(self._rows()),
            signature(second, added, {"COLUMNS": 0, "PDL": 0}) + "\n" + indent(self._weights()),
        ]
        summary = f"gradients of the up-projection ({op.layout}) and of the routing weights, and the activated rows."
        schedules = list[Schedule]()
        for variant, tile in zip(self.variants, self.tiles, strict=True):
            columns = -(-self.width // tile["BLOCK_N"])
            grid = f"({pairs} // {tile['BLOCK_M']} + min({op.num_experts + 1}, {pairs})) * {columns}"
            warps, stages = int(variant.get("num_warps", 4)), int(variant.get("num_stages", 3))
            entries = (
                Entry(first, tuple(self.parameters), {**tile, "PDL": 0}, (grid, "1"), warps, stages),
                Entry(second, tuple(added), {"COLUMNS": columns, "PDL": 0}, (ceil_div(pairs, PAIRS), "1"), 4, 1),
            )
            schedules.append(Schedule(variant.get("up_to"), entries, tuple(self.wiring.scratch)))
        return Sketch(module_text(self.func, op, summary, constants, texts), tuple(schedules))

    @property
    def bound(self) -> list[str]:
        """Conditions of the columns."""
        return [] if self._even(self.width, "BLOCK_N") else ["columns < I"]

    def _even(self, size: int, block: str) -> bool:
        return all(size % tile[block] == 0 for tile in self.tiles)

    def _rows(self) -> list[str]:
        op = self.op
        bound = self.bound
        find, where = ("listed_tile", "tiles, tokens * K, E") if op.tiles is not None else (
            "find_tile", "offsets, tokens * K, E, E_PAD")  # fmt: skip
        lines = [
            '"""Rows i of h and h_grad belong to pair order[i], whose weight\'s gradient partial[pair] adds up to."""',
            "arrive(PDL)",
            "COLUMNS: tl.constexpr = (I + BLOCK_N - 1) // BLOCK_N",
            f"expert, start, stop, row_block, column_block = {find}(",
            f"    tl.program_id(0), {where}, COLUMNS, BLOCK_M, GROUP_M",
            ")",
            "if expert > E:",
            "    return",
            "rows = start + row_block * BLOCK_M + tl.arange(0, BLOCK_M)",
            "live = rows < stop",
            "pair = tl.load(order + rows, mask=live, other=0)",
            "part_at = partial + pair.to(tl.int64) * COLUMNS + column_block",
            "if expert == E:",
            "    tl.store(part_at, tl.zeros([BLOCK_M], tl.float32), mask=live)",
            "    return",
            "token = (pair // K).to(tl.int64)",
            "columns = column_block * BLOCK_N + tl.arange(0, BLOCK_N)",
            "depth = tl.arange(0, BLOCK_K)",
            *self._up(bound),
            *self._down(bound),
            "weight = tl.load(weights + pair, mask=live, other=0).to(tl.float32)[:, None]",
            "grad = back * weight",
        ]
        value, *grads = self._region(lines)
        within = f"tl.where(({bound[0]})[None, :], {value} * back, 0.0)" if bound else f"{value} * back"
        lines.append(f"part = tl.sum({within}, axis=1)")
        if op.down_bias is not None:
            lines += self._bias_part()
        lines.append("tl.store(part_at, part, mask=live)")
        keep = " & ".join(["live[:, None]", *(f"({b})[None, :]" for b in bound)])
        dtype = op.x.tensor.dtype
        activated = narrowed(f"({value} * weight)", dtype)
        lines.append(f"tl.store(h + rows.to(tl.int64)[:, None] * I + columns[None, :], {activated}, mask={keep})")
        if op.layout == "interleaved":
            both = f"tl.reshape(tl.join({grads[0]}, {grads[1]}), (BLOCK_M, 2 * BLOCK_N))"
            keep = " & ".join(["live[:, None]", *("(2 * first + lane < 2 * I)[None, :]" for _ in bound)])
            at = "h_grad + rows.to(tl.int64)[:, None] * (2 * I) + (2 * first + lane)[None, :]"
            return [*lines, f"tl.store({at}, {narrowed(both, dtype)}, mask={keep})"]
        lines.append(f"grad_at = h_grad + rows.to(tl.int64)[:, None] * ({len(grads)} * I) + columns[None, :]")
        for i, text in enumerate(grads):
            lines.append(f"tl.store(grad_at{' + I' if i else ''}, {narrowed(text, dtype)}, mask={keep})")
        return lines

    def _up(self, bound: Sequence[str]) -> list[str]:
        """The up-projection again: `gate` and `linear` by one product of twice the columns, or `acc`."""
        op, width, both = self.op, "2 * BLOCK_N", "both"
        total, lines = "(2 * I)", ["lane = tl.arange(0, 2 * BLOCK_N)", "first = column_block * BLOCK_N"]
        bound = ["first + lane % BLOCK_N < I" for _ in bound]
        # Halves of a product are parted without a move between threads.
        part = "tl.permute(tl.reshape(acc, (BLOCK_M, 2, BLOCK_N)), (0, 2, 1))"
        if op.layout == "single":
            width, both, total, lines, bound = "BLOCK_N", "columns", "I", [], self.bound
        elif op.layout == "concat":
            lines.append("both = lane // BLOCK_N * I + first + lane % BLOCK_N")
        elif not op.up_transposed:
            lines.append("both = lane // BLOCK_N + 2 * (first + lane % BLOCK_N)")
        else:  # columns that alternate in memory are read as they lie there
            lines.append("both = 2 * first + lane")
            bound, part = ["both < 2 * I" for _ in bound], "tl.reshape(acc, (BLOCK_M, BLOCK_N, 2))"
        at = f"depth[:, None] * {total} + {both}[None, :]" if op.up_transposed else (
            f"{both}[None, :] * H + depth[:, None]")  # fmt: skip
        banks = {"acc": (f"up + expert.to(tl.int64) * (H * {total}) + {at}", total if op.up_transposed else "1")}
        lines += self._loop("x", "H", self.hidden, banks, bound, width)
        if op.up_bias is not None:
            load = f"tl.load(up_bias + expert.to(tl.int64) * {total} + {both}{masked(bound)})"
            lines.append(f"acc += {load}.to(tl.float32)[None, :]")
        return lines if op.layout == "single" else [*lines, f"gate, linear = tl.split({part})"]

    def _down(self, bound: Sequence[str]) -> list[str]:
        """`back`: the gradient of the activation's value, before the routing weight."""
        at, step = ("columns[None, :] * D + depth[:, None]", "1") if self.op.down_transposed else (
            "depth[:, None] * I + columns[None, :]", "I")  # fmt: skip
        banks = {"back": (f"down + expert.to(tl.int64) * (D * I) + {at}", step)}
        return self._loop("y_grad", "D", self.out, banks, bound, "BLOCK_N")

    def _loop(self, rows: str, inner: str, size: int, banks: Mapping[str, tuple[str, str]], bound: Sequence[str],
              columns: str) -> list[str]:  # fmt: skip
        """Products of rows of tokens with parts of a bank, whose pointers and step are given by accumulator."""
        tail = not self._even(size, "BLOCK_K")
        a = masked(["live[:, None]", *([f"(depth < {inner} - k)[None, :]"] if tail else [])])
        b = masked([*(f"({b})[None, :]" for b in bound), *([f"(depth < {inner} - k)[:, None]"] if tail else [])])
        precision = ', input_precision="ieee"' if self.op.x.tensor.dtype is DType.f32 else ""
        lines = [f"a_at = {rows} + token[:, None] * {inner} + depth[None, :]"]
        for name, (pointers, _) in banks.items():
            lines += [f"{name}_at = {pointers}", f"{name} = tl.zeros([BLOCK_M, {columns}], tl.float32)"]
        lines += [f"for k in tl.range(0, {inner}, BLOCK_K):", f"    a = tl.load(a_at{a})"]
        for name, (_, step) in banks.items():
            lines.append(f"    {name} = tl.dot(a, tl.load({name}_at{b}), {name}{precision})")
            lines.append(f"    {name}_at += BLOCK_K{'' if step == '1' else f' * {step}'}")
        return [*lines, "    a_at += BLOCK_K"]

    def _bias_part(self) -> list[str]:
        """What the down-projection's bias adds to the routing weight's gradient, in the first block of columns."""
        tail = [] if self._even(self.out, "BLOCK_K") else ["depth < D - k"]
        rows = masked(["live[:, None]", *(f"({t})[None, :]" for t in tail)])
        return [
            "if column_block == 0:",
            "    rows_at = y_grad + token[:, None] * D + depth[None, :]",
            "    shift_at = down_bias + expert.to(tl.int64) * D + depth",
            "    for k in tl.range(0, D, BLOCK_K):",
            f"        shift = tl.load(shift_at + k{masked(tail)}).to(tl.float32)[None, :]",
            f"        part += tl.sum(tl.load(rows_at + k{rows}).to(tl.float32) * shift, axis=1)",
        ]

    def _region(self, lines: list[str]) -> list[str]:
        """Write the region: texts of the activation's value and of its arguments' gradients."""
        code = RegionCode(Names((*RESERVED, *library())), rounds=False)
        parts = ["grad", *(["acc"] if self.op.layout == "single" else ["gate", "linear"])]
        found = code.run(self.op.gradient, [Tile(part, (self.width,), True, DType.f32) for part in parts])
        lines += code.lines
        return [tile.text for tile in found]

    def _weights(self) -> list[str]:
        dtype = self.op.weights.tensor.dtype
        return [
            '"""The gradient of each pair\'s routing weight: its parts, block by block."""',
            "arrive(PDL)",
            "pair = tl.program_id(0) * PAIRS + tl.arange(0, PAIRS)",
            "live = pair < tokens * K",
            "total = tl.zeros([PAIRS], tl.float32)",
            "for block in tl.range(0, COLUMNS):",
            "    total += tl.load(partial + pair.to(tl.int64) * COLUMNS + block, mask=live, other=0)",
            f"tl.store(weights_grad + pair, {narrowed('total', dtype)}, mask=live)",
        ]


RESERVED = tuple(
    "y_grad x order offsets tiles weights up down up_bias down_bias h_grad h partial tokens expert start stop "  # noqa: SIM905
    "row_block column_block rows live pair part_at token columns depth first lane both a a_at shift shift_at rows_at "
    "gate linear acc back acc_at back_at weight grad grad_at part k E E_PAD K H D I GROUP_M PAIRS BLOCK_M BLOCK_N "
    "BLOCK_K COLUMNS PDL".split()
)
"""Variables of the kernel itself, which the region's must not shadow."""
