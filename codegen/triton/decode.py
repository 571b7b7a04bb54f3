"""The family `rows`: a few rows, each of which reads its expert's weights with little sharing.

At decode no tensor core is needed. A weight takes a conversion and a multiply-add for each row that it meets, and the
weights are all that is moved: programs stream them through shared memory, `num_stages - 1` tiles ahead, and add
products in f32 element by element; lanes are added up once, at the end. The rows' own elements are asked for one tile
ahead.

Up-projection: a program for each place in the order (grid x) and block of columns. The first of every BLOCK_M rows of
an expert computes all of them, so that its weights are read once; the others leave. Programs of one expert's rows are
neighbours, so that where it has more rows than that, the cache serves those that follow the first.

Down-projection: a program for each token and block of columns, with the token's k experts side by side, one store, and
neither a launch nor a buffer for rows that are still to be added. Weights depend on the order alone, which is older
than the launch before this one: they are on their way to the cache before h is ready. Where columns lie together in
memory (a transposed bank) there are too few blocks of them, and I is cut into SPLIT parts, each by its own program. The
one that arrives last, as a count tells, adds what all have left, part by part: who it is makes no difference.

The sum over the inner dimension is taken in the same order whatever the batch and BLOCK_M, as long as BLOCK_N, BLOCK_K,
`num_warps` and SPLIT stay the same; the sum over slots too. Schedules choose those four from the layer's sizes alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sparsec.codegen.triton.banks import scale_parameters
from sparsec.codegen.triton.experts import ROWS_OF_H, activated, epilogue
from sparsec.codegen.triton.gemm import GroupedGemm, narrowed
from sparsec.codegen.triton.launch import I32, TOKENS, Entry, Parameter, Wiring
from sparsec.codegen.triton.packed_products import products_of
from sparsec.codegen.triton.products import CONSTANTS, Columns, launch, signature
from sparsec.codegen.triton.source import indent
from sparsec.codegen.triton.tile import POINTERS, padded, unsupported
from sparsec.dialects.moe import GatherGemm, GemmCombine
from sparsec.ir.core import Func

MOST_PAIRS = 1024
"""Most entries of the order that a program of the down-projection looks through."""

MOST_SLOTS = 32
"""Most experts of a token that it keeps side by side."""

MOST_COUNTS = 1 << 18
"""Most totals that may be waiting for parts: the counts take four bytes each, in a buffer that outlives calls."""

_SUMS = ("gate", "linear", "acc")
RESERVED = (
    "ahead",
    "few",
    *(f"{stem}_{i}" for stem in ("ahead", "a") for i in range(4)),
    *(f"{name}_{of}" for name in _SUMS for of in ("at", "scale", "scale_at", "exponents")),
)
"""Variables of the up-projection beside those of `tiles`."""

SEARCH = ("SLOTS", "PAIRS", "LINES", "SPLIT")
"""Compile-time parameters of the down-projection beside CONSTANTS."""


class Up:
    """The up-projection."""

    def __init__(self, func: Func, op: GatherGemm, gemm: GroupedGemm, wiring: Wiring) -> None:
        self.name, self.op, self.gemm = f"{func.name}_rows", op, gemm
        self.products = products_of(gemm, "BLOCK_M")
        operands = {"x": op.x, "order": op.order, "offsets": op.offsets, "up": op.up}
        operands |= {"up_bias": op.up_bias} if op.up_bias is not None else {}
        operands |= {"weights": op.weights} if op.weights is not None else {}
        h = Parameter("h", POINTERS[op.h.tensor.dtype], wiring.result(op.h))
        given = [gemm.pointer(name, value, wiring) for name, value in operands.items()]
        self.parameters = [*given, *scale_parameters(gemm, wiring), h, TOKENS]

    def functions(self) -> list[str]:
        op, gemm = self.op, self.gemm
        bound = [] if self.products.even(gemm.columns, "BLOCK_N") else ["columns < I"]
        lines = [
            f'"""{ROWS_OF_H}"""',
            "arrive(PDL)",
            "first = tl.program_id(0)",
            "expert, start, stop = owner(first, offsets, E, E_PAD)",
            "if (expert >= E) | ((first - start) % BLOCK_M != 0):",
            "    return",
            "rows = first + tl.arange(0, BLOCK_M)",
            "live = rows < stop",
            "pair = tl.load(order + rows, mask=live, other=0)",
            "columns = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)",
            *(["both = tl.program_id(1) * 2 * BLOCK_N + tl.arange(0, 2 * BLOCK_N)"] if self._alternate else []),
            f"depth = tl.arange(0, {self.products.lanes})",
            "a_at = x + (pair // K).to(tl.int64)[:, None] * H + depth[None, :]",
            *self.products.loop(self._sums(bound)),
            *epilogue(op, self._columns, bound),
        ]
        result = activated(op, lines, RESERVED)
        keep = " & ".join(["live[:, None]", *(f"({b})[None, :]" for b in bound)])
        lines.append(f"tl.store(h + rows.to(tl.int64)[:, None] * I + columns[None, :], {result}, mask={keep})")
        return [signature(self.name, self.parameters, ["BLOCK_M", *CONSTANTS, *gemm.flags]) + "\n" + indent(lines)]

    def launches(self, variant: Mapping[str, Any]) -> tuple[Entry, ...]:
        sizes = {"BLOCK_M": padded(int(variant.get("block_m", 1))), **self.products.sizes(variant), **self.gemm.flags}
        grid = f"t * {self.gemm.k}", str(-(-self.gemm.columns // sizes["BLOCK_N"]))
        return (launch(self.name, self.parameters, sizes, grid, self.products.warps(variant)),)

    @property
    def _alternate(self) -> bool:
        return self.op.layout == "interleaved"

    @property
    def _columns(self) -> dict[str, str]:
        """The expert's columns that each sum holds."""
        if self.op.layout == "concat":
            return {"gate": "columns", "linear": "columns + I"}
        return {"acc": "both" if self._alternate else "columns"}

    def _sums(self, bound: list[str]) -> dict[str, Columns]:
        first, count = "tl.program_id(1) * BLOCK_N", "BLOCK_N"
        if self._alternate:
            first, count = f"2 * {first}", "2 * BLOCK_N"
        sizes = [self.products.sizes(variant)["BLOCK_N"] for variant in self.gemm.variants]
        # 128 columns from a multiple of 128 on share their scales.
        alike = all(size * (1 + self._alternate) <= 128 for size in sizes)
        alike &= self.op.layout != "concat" or all(self.gemm.columns % size == 0 for size in sizes)
        bound = ["both < 2 * I" for _ in bound] if self._alternate else bound
        firsts = {"columns + I": f"{first} + I"}
        return {
            name: Columns(columns, firsts.get(columns, first), count, bound, alike)
            for name, columns in self._columns.items()
        }


class Down:
    """The down-projection with the sum over slots.

    Raises: CompileError for tails (they need whole rows), more slots than registers hold, and variants that may see
        more pairs than a program looks through, or make too many totals of parts.
    """

    def __init__(self, func: Func, op: GemmCombine, gemm: GroupedGemm, wiring: Wiring) -> None:
        self.name, self.op, self.gemm = f"{func.name}_rows", op, gemm
        if op.tail is not None:
            raise unsupported(op, "'rows' adds up columns, and the tail takes whole rows")
        if op.k > MOST_SLOTS:
            raise unsupported(op, f"'rows' holds {MOST_SLOTS} experts of a token side by side, this has {op.k}")
        self.products = products_of(gemm, "SLOTS", "begin", "end", "live")
        self.split = max(map(_split, gemm.variants))
        operands = {"h": op.h, "order": op.order, "offsets": op.offsets}
        operands |= {"weights": op.weights} if op.weighted else {}
        operands |= {"down": op.down}
        operands |= {"down_bias": op.down_bias} if op.down_bias is not None else {}
        self.parameters = [gemm.pointer(name, value, wiring) for name, value in operands.items()]
        self.parameters += scale_parameters(gemm, wiring)
        self.parameters += [Parameter("y", POINTERS[op.y.tensor.dtype], wiring.result(op.y))]
        if self.split > 1:
            counts = max(map(self._counts, gemm.variants))
            buffer = wiring.buffer(f"t * {self.split * gemm.columns * 4}")
            self.parameters += [
                Parameter("partial", "*fp32", buffer),
                Parameter("counts", I32, wiring.kept(4 * counts)),
            ]
        self.parameters += [TOKENS]

    def functions(self) -> list[str]:
        op, products = self.op, self.products
        bound = [] if products.even(self.gemm.columns, "BLOCK_N") else ["columns < H"]
        weighed = ", weighed," if op.weighted else ","
        lines = [
            f'"""A token: what its experts make of its rows of h{weighed} added; of part `part` of I."""',
            "token = tl.program_id(0)",
            "part = tl.program_id(1) % SPLIT",
            "first = tl.program_id(1) // SPLIT * BLOCK_N",
            "columns = first + tl.arange(0, BLOCK_N)",
            "PART: tl.constexpr = (I + SPLIT * BLOCK_K - 1) // (SPLIT * BLOCK_K) * BLOCK_K",
            "begin = part * PART",
            "end = tl.minimum(begin + PART, I)",
            f"depth = tl.arange(0, {products.lanes})",
            "slot = tl.arange(0, SLOTS)",
            "pair = token * K + slot",
            "row = places(pair, order, tokens * K, PAIRS)",
            "expert = owners(row, offsets, E, E_PAD)",
            "live = (slot < K) & (expert < E)",
            "# A slot without an expert points to another's weights, which are not read for it.",
            "expert = tl.where(live, expert, tl.max(tl.where(live, expert, 0), axis=0))",
            *products.early("columns", "first"),
            "arrive(PDL)",
            "a_at = h + row.to(tl.int64)[:, None] * I + (begin + depth)[None, :]",
            *products.loop({"acc": Columns("columns", "first", "BLOCK_N", bound)}),
        ]
        if op.down_bias is not None:
            at = "down_bias + expert.to(tl.int64)[:, None] * H + columns[None, :]"
            mask = " & ".join(["(live & (part == 0))[:, None]", *(f"({b})[None, :]" for b in bound)])
            lines.append(f"acc += tl.load({at}, mask={mask}, other=0).to(tl.float32)")
        if op.weighted:
            lines.append("acc *= tl.load(weights + pair, mask=live, other=0).to(tl.float32)[:, None]")
        lines += ["total = tl.sum(acc, axis=0)", *self._store(bound)]
        constants = [*CONSTANTS, *SEARCH, *self.gemm.flags]
        return [signature(self.name, self.parameters, constants) + "\n" + indent(lines)]

    def launches(self, variant: Mapping[str, Any]) -> tuple[Entry, ...]:
        sizes = self.products.sizes(variant)
        pairs, split, lines = padded(self._pairs(variant)), _split(variant), padded(self.products.fetch(variant))
        sizes |= {"SLOTS": padded(self.op.k), "PAIRS": pairs, "LINES": lines, "SPLIT": split, **self.gemm.flags}
        grid = "t", str(self._blocks(variant) * split)
        return (launch(self.name, self.parameters, sizes, grid, self.products.warps(variant)),)

    def _store(self, bound: list[str]) -> list[str]:
        """Store `total` [BLOCK_N], or leave it as a part, and where that is the last one, add all of them."""
        mask, other = (", mask=columns < H", ", other=0") if bound else ("", "")
        store = f"tl.store(y + token.to(tl.int64) * H + columns, {narrowed('total', self.op.y.tensor.dtype)}{mask})"
        if self.split == 1:
            return [store]
        return [
            "if SPLIT > 1:",
            "    parts = partial + token.to(tl.int64) * SPLIT * H + columns",
            f"    tl.store(parts + part * H, total{mask})",
            "    tl.debug_barrier()  # all threads have stored",
            "    count = counts + token * (tl.num_programs(1) // SPLIT) + tl.program_id(1) // SPLIT",
            "    if tl.atomic_add(count, 1) != SPLIT - 1:",
            "        return",
            "    tl.store(count, 0)",
            "    total = tl.zeros([BLOCK_N], tl.float32)",
            "    for i in tl.static_range(SPLIT):",
            f'        total += tl.load(parts + i * H{mask}{other}, cache_modifier=".cg")',
            store,
        ]

    def _blocks(self, variant: Mapping[str, Any]) -> int:
        """Blocks of columns."""
        return -(-self.gemm.columns // self.products.sizes(variant)["BLOCK_N"])

    def _counts(self, variant: Mapping[str, Any]) -> int:
        """The most totals that are made of parts at a time. Raises: CompileError if that is too many."""
        counts = self._pairs(variant) // self.op.k * self._blocks(variant)
        if counts > MOST_COUNTS:
            raise unsupported(self.op, f"'rows' counts the parts of {MOST_COUNTS} totals at a time, not of {counts}")
        return counts

    def _pairs(self, variant: Mapping[str, Any]) -> int:
        """The most pairs that a variant may see. Raises: CompileError if that is too many, or not known."""
        known, up_to = self.op.order.tensor.shape[0], variant.get("up_to")
        pairs = known if isinstance(known, int) else None if up_to is None else int(up_to) * self.op.k
        if pairs is None or pairs > MOST_PAIRS:
            number = "any number of" if pairs is None else pairs
            raise unsupported(self.op, f"'rows' adds up at most {MOST_PAIRS} pairs, a variant is for {number}")
        return max(1, pairs)


def _split(variant: Mapping[str, Any]) -> int:
    """Parts of I that are summed apart."""
    return max(1, int(variant.get("split", 1)))
