"""The kernel of the gradients inside an expert: `moe.hidden_grad`.

One program computes a block of rows and columns of all that the backward pass needs of an expert's inside: the gradient
of the activation's value, the up-projection again, and from both, by the region, the activated rows and the gradient of
the up-projection. What the block adds to the gradient of its pairs' routing weights, the products of the activation's
value and its gradient, goes to a buffer by block of columns; a second launch adds these in their order.
"""

from __future__ import annotations

from collections.abc import Sequence

from sparsec.codegen.triton.gemm import GROUP_M, masked, narrowed
from sparsec.codegen.triton.gradient_kernels import (
    Variant,
    chosen,
    family_of,
    number,
    require_floats,
    signature,
    sizes_of,
)
from sparsec.codegen.triton.hidden_products import Engine, Pointers
from sparsec.codegen.triton.launch import TOKENS, Entry, Parameter, Schedule, Sketch, Wiring, ceil_div
from sparsec.codegen.triton.region import RegionCode
from sparsec.codegen.triton.source import indent, library, module_text
from sparsec.codegen.triton.tile import POINTERS, Names, Tile, padded
from sparsec.dialects.moe import HiddenGrad
from sparsec.ir.core import Func
from sparsec.ir.types import DType

PAIRS = 128
"""Pairs whose parts one program of the second launch adds."""

HELD = 8
"""Elements of a sum that a thread takes through the region at a time where sums take most of its registers."""


def hidden_grad(func: Func, op: HiddenGrad) -> Sketch:
    """Text and launches. Raises: CompileError for what no kernel can hold."""
    return _Hidden(func, op).sketch()


def _default(op: HiddenGrad) -> Sequence[Variant]:
    """Variants where the schedule names none: three sums for each element, without spilled registers on any target."""
    if op.x.tensor.dtype is DType.f32:  # no tensor cores
        return ({"block_m": 32, "block_n": 32, "block_k": 32, "num_warps": 8, "num_stages": 2},)
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
        by_family = dict[str, list[dict[str, int]]]()
        for variant, tile in zip(self.variants, self.tiles, strict=True):
            by_family.setdefault(family_of(op, variant), []).append(tile)
        self.products: dict[str, Pointers | Engine] = {
            name: (Engine if name == "tma" else Pointers)(op, self.hidden, self.out, tiles)
            for name, tiles in by_family.items()
        }
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
        op = self.op
        grad = Parameter("weights_grad", POINTERS[op.weights.tensor.dtype], self.wiring.result(op.weights_grad))
        added = [self.partial, grad, TOKENS]
        constants = {"E": op.num_experts, "E_PAD": padded(op.num_experts + 1), "K": op.k}
        constants |= {"H": self.hidden, "D": self.out, "I": self.width, "GROUP_M": GROUP_M, "PAIRS": PAIRS}
        second = f"{self.func.name}_weights"
        flags = {"BLOCK_M": 0, "BLOCK_N": 0, "BLOCK_K": 0, "WIDTH": 0, "PDL": 0}
        texts = [
            self._columns(),
            *(
                signature(self._name(family), self.parameters, flags) + "\n" + indent(self._rows(made))
                for family, made in self.products.items()
            ),
            signature(second, added, {"COLUMNS": 0, "PDL": 0}) + "\n" + indent(self._weights()),
        ]
        summary = f"gradients of the up-projection ({op.layout}) and of the routing weights, and the activated rows."
        schedules = list[Schedule]()
        for variant, tile in zip(self.variants, self.tiles, strict=True):
            columns, pairs = -(-self.width // tile["BLOCK_N"]), f"t * {op.k}"
            parts = Entry(second, tuple(added), {"COLUMNS": columns, "PDL": 0}, (ceil_div(pairs, PAIRS), "1"), 4, 1)
            entries = (self._entry(variant, tile, columns, pairs), parts)
            schedules.append(Schedule(variant.get("up_to"), entries, tuple(self.wiring.scratch)))
        return Sketch(module_text(self.func, op, summary, constants, texts), tuple(schedules))

    def _name(self, family: str) -> str:
        return f"{self.func.name}_rows" + ("" if family == "tiles" else f"_{family}")

    def _entry(self, variant: Variant, tile: dict[str, int], columns: int, pairs: str) -> Entry:
        family = family_of(self.op, variant)
        made, width = self.products[family], tile["BLOCK_N"]
        warps, stages = int(variant.get("num_warps", 4)), int(variant.get("num_stages", 3))
        if isinstance(made, Engine):
            tile, width = made.sizes(tile), max(16, min(width, HELD * warps * 32 // tile["BLOCK_M"]))
        constants = {**tile, "WIDTH": width, "PDL": 0}
        grid = f"({pairs} // {tile['BLOCK_M']} + min({self.op.num_experts + 1}, {pairs})) * {columns}"
        return Entry(self._name(family), made.given(self.parameters, tile), constants, (grid, "1"), warps, stages)

    def _rows(self, products: Pointers | Engine) -> list[str]:
        op = self.op
        find, where = ("listed_tile", "tiles, tokens * K, E") if op.tiles is not None else (
            "find_tile", "offsets, tokens * K, E, E_PAD")  # fmt: skip
        return [
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
            "first = column_block * BLOCK_N",
            "columns = first + tl.arange(0, BLOCK_N)",
            "depth = tl.arange(0, BLOCK_K)",
            *(self._bias_part() if op.down_bias is not None else []),
            *products.lines(),
            "weight = tl.load(weights + pair, mask=live, other=0).to(tl.float32)[:, None]",
            f"part {'=' if op.down_bias is None else '+='} {self._call(self._arguments())}",
            "tl.store(part_at, part, mask=live)",
        ]

    def _tiles(self) -> list[str]:
        return [*(["acc"] if self.op.layout == "single" else ["gate", "linear"]), "back"]

    def _arguments(self) -> list[str]:
        bias = ["up_bias"] if self.op.up_bias is not None else []
        return [*self._tiles(), "weight", "rows", "live", "expert", "first", *bias, "h_grad", "h"]

    def _call(self, arguments: Sequence[str]) -> str:
        return f"{self.func.name}_columns({', '.join(arguments)}, WIDTH)"

    def _columns(self) -> str:
        """The function of what follows the products, for as many columns as registers are left for."""
        op, tiles, arguments = self.op, self._tiles(), self._arguments()
        ragged = any(product.ragged for product in self.products.values())
        parts = [[f"{tile}_{i}" for tile in tiles] + arguments[len(tiles) :] for i in (0, 1)]
        place = arguments.index("first")
        parts[1][place] = "first + back.shape[1] // 2"
        lines = [
            '"""Store h and h_grad, WIDTH columns at a time; what these columns add to the weights\' gradients."""',
            "if back.shape[1] > WIDTH:",
            *(f"    {tile}_0, {tile}_1 = halves({tile})" for tile in tiles),
            f"    part = {self._call(parts[0])}",
            f"    return part + {self._call(parts[1])}",
            "columns = first + tl.arange(0, back.shape[1])",
            *self._kept(ragged),
            *self._biased(["columns < I"] if ragged else []),
            "grad = back * weight",
        ]
        value, *grads = self._region(lines)
        dtype = op.x.tensor.dtype
        activated = narrowed(f"({value} * weight)", dtype)
        lines.append(f"tl.store(h + rows.to(tl.int64)[:, None] * I + columns[None, :], {activated}, mask=keep)")
        if op.layout == "interleaved":
            lines += [
                f"both = tl.reshape(tl.join({grads[0]}, {grads[1]}), (back.shape[0], 2 * back.shape[1]))",
                "grad_at = h_grad + rows.to(tl.int64)[:, None] * (2 * I) + lane[None, :]",
                f"tl.store(grad_at, {narrowed('both', dtype)}, mask=keep_both)",
            ]
        else:
            lines.append(f"grad_at = h_grad + rows.to(tl.int64)[:, None] * ({len(grads)} * I) + columns[None, :]")
            for i, text in enumerate(grads):
                lines.append(f"tl.store(grad_at{' + I' if i else ''}, {narrowed(text, dtype)}, mask=keep)")
        if ragged:  # a whole part is left out at once, which takes fewer registers
            lines += ["if I % WIDTH == 0:", f"    return tl.where(first < I, tl.sum({value} * back, axis=1), 0.0)"]
            lines.append(f"return tl.sum(tl.where(keep, {value} * back, 0.0), axis=1)")
        else:
            lines.append(f"return tl.sum({value} * back, axis=1)")
        head = f"@triton.jit\ndef {self.func.name}_columns({', '.join(arguments)}, WIDTH: tl.constexpr):"
        return f"{head}\n{indent(lines)}"

    def _kept(self, ragged: bool) -> list[str]:
        """Which elements are there: `keep`, and `keep_both` of the columns of both kinds, `lane`, where they alternate.

        `ragged`: whether blocks of columns reach beyond the last one. Where WIDTH divides I they do so as a whole.
        """
        both = self.op.layout == "interleaved"
        lines = ["lane = 2 * first + tl.arange(0, 2 * back.shape[1])"] if both else []
        if not ragged:
            return [*lines, "keep = live[:, None]", *(["keep_both = keep"] if both else [])]
        return [
            *lines,
            "if I % WIDTH == 0:",
            "    keep = (live & (first < I))[:, None]",
            *(["    keep_both = keep"] if both else []),
            "else:",
            "    keep = live[:, None] & (columns < I)[None, :]",
            *(["    keep_both = live[:, None] & (lane < 2 * I)[None, :]"] if both else []),
        ]

    def _biased(self, bound: Sequence[str]) -> list[str]:
        """Add the up-projection's bias."""
        op = self.op
        if op.up_bias is None:
            return []
        at = {"single": {"acc": "columns"}, "concat": {"gate": "columns", "linear": "columns + I"}}.get(
            op.layout, {"gate": "2 * columns", "linear": "2 * columns + 1"}
        )
        return [
            f"bias_at = up_bias + expert.to(tl.int64) * ({op.parts} * I)",
            *(f"{t} += tl.load(bias_at + {c}{masked(bound)}).to(tl.float32)[None, :]" for t, c in at.items()),
        ]

    def _bias_part(self) -> list[str]:
        """What the down-projection's bias adds to the routing weight's gradient, in the first block of columns."""
        tail = [] if all(self.out % tile["BLOCK_K"] == 0 for tile in self.tiles) else ["depth < D - k"]
        rows = masked(["live[:, None]", *(f"({t})[None, :]" for t in tail)])
        return [
            "part = tl.zeros([BLOCK_M], tl.float32)",
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
        parts = ["grad", *self._tiles()[:-1]]
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
    "acc gate linear back acc_0 acc_1 gate_0 gate_1 linear_0 linear_1 back_0 back_1 weight rows live expert first "  # noqa: SIM905
    "up_bias h_grad h columns bias_at grad grad_at keep keep_both lane both part E E_PAD K H D I "
    "GROUP_M PAIRS WIDTH".split()
)
"""Variables of the function that holds the region, which the region's must not shadow."""
