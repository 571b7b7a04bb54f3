"""What the cost model needs to know of the backward ops of an expert layer, and what their kernels do.

`moe.hidden_grad` makes two products with one tile: the up-projection again, and the gradient of the activation's value.
Its programs are those of two up-projections that share a tile. `moe.bank_grad` adds an expert's rows up: a program has
a block of the gradient, and its inner loop goes over the rows. Its kernels read the tokens of a step a step ahead.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil
from typing import TypeAlias

from sparsec.dialects.moe import BankGrad, HiddenGrad, experts_hit
from sparsec.dialects.moe.common import known
from sparsec.ir.types import DType
from sparsec.passes.chips import Chip
from sparsec.passes.roofline import (
    BANDWIDTH_SHARE,
    CACHED,
    GROUP_M,
    LATENCY,
    LAUNCH,
    LONG,
    PIECE,
    PORT,
    SEARCH,
    SHOWS,
    Limiter,
    Prediction,
    Work,
    feed,
    moved,
    rate,
    work,
)
from sparsec.passes.variants import ROW_REGISTERS, Gemm, Variant

HELD_REGISTERS = 64  # of a thread, where weights come by pointers or operands are in registers: as ptxas has it


@dataclass(frozen=True)
class Hidden:
    """A `moe.hidden_grad`: T * k rows of `hidden` (of x) and of `out` (of y's gradient), and `width` columns.

    Args:
        parts: columns of the up-projection for each of `width`.
        up_transposed, down_transposed: as of the op.
        alternate: whether the columns of a gated expert do.
        heavy: whether the region takes the registers that sums of 128 x 128 would leave: a tanh does.
    """

    experts: int
    k: int
    hidden: int
    out: int
    width: int
    parts: int
    dtype: DType
    up_transposed: bool = False
    down_transposed: bool = False
    alternate: bool = False
    heavy: bool = False

    @property
    def products(self) -> tuple[Gemm, Gemm]:
        """The up-projection again, and the gradient of the activation's value."""
        up = Gemm("up", self.experts, self.k, self.hidden, self.width, self.parts, self.dtype,
                  transposed=self.up_transposed)  # fmt: skip
        back = Gemm("up", self.experts, self.k, self.out, self.width, 1, self.dtype,
                    transposed=not self.down_transposed)  # fmt: skip
        return up, back

    @property
    def rows(self) -> tuple[int, ...]:
        """Elements of the rows that the copy engine would bring."""
        return self.parts * self.width if self.up_transposed else self.hidden, (
            self.out if self.down_transposed else self.width
        )

    def __str__(self) -> str:
        parts = f"{self.parts} x {self.width}" if self.parts > 1 else str(self.width)
        return f"gradients inside the experts {self.hidden} -> {parts} -> {self.out}"


@dataclass(frozen=True)
class Bank:
    """A `moe.bank_grad`: [m, n] for each expert, the sum over its rows; `rows` of one side lie in their order.

    Args:
        transposed: whether those are n, not m.
    """

    experts: int
    k: int
    m: int
    n: int
    dtype: DType
    transposed: bool = False

    @property
    def rows(self) -> tuple[int, ...]:
        return (self.n if self.transposed else self.m,)

    def __str__(self) -> str:
        return f"gradient of a bank {self.m} x {self.n}"


Gradient: TypeAlias = Hidden | Bank


def gradient_of(op: HiddenGrad | BankGrad) -> Gradient:
    """What the cost model needs to know of an op."""
    match op:
        case HiddenGrad():
            hidden, out = known(op.x.tensor.shape[-1]), known(op.y_grad.tensor.shape[-1])
            return Hidden(
                op.num_experts, op.k, hidden, out, op.width, op.parts, op.x.tensor.dtype,
                op.up_transposed, op.down_transposed, op.layout == "interleaved",
                any(inner.name == "aten.tanh" or inner.attrs.get("approximate") == "tanh" for inner in op.gradient.ops),
            )  # fmt: skip
        case BankGrad():
            m, n = (known(size) for size in op.grad.tensor.shape[1:])
            return Bank(op.num_experts, op.k, m, n, op.rows.tensor.dtype, op.transposed)


def shared(grad: Gradient, variant: Variant, on: Chip) -> int:
    """Bytes of shared memory of one program."""
    columns = variant.block_n * (grad.parts if isinstance(grad, Hidden) else 1)
    step = (variant.block_m + columns) * variant.block_k * grad.dtype.itemsize
    direct = variant.direct(_alike(grad), on)
    barriers = 256 if direct or variant.kernel == "tma" else 0
    return (variant.num_stages if direct else variant.num_stages - 1) * step + barriers


def registers(grad: Gradient, variant: Variant, on: Chip) -> float:
    """Registers of a thread: the sums, what every kernel takes, and pointers to two banks, or operands in registers."""
    parts = 1 + grad.parts if isinstance(grad, Hidden) else 1
    by_pointers = variant.kernel == "tiles" and (isinstance(grad, Hidden) or not variant.direct(_alike(grad), on))
    sums = variant.block_m * variant.block_n * parts / (variant.num_warps * on.lanes)
    return ROW_REGISTERS + sums + (HELD_REGISTERS if by_pointers else 0)


def done(grad: Gradient, variant: Variant, tokens: int) -> Work:
    """What the programs of a variant do for `tokens` tokens; of a bank's gradient those that have rows to add."""
    size = grad.dtype.itemsize
    if isinstance(grad, Hidden):
        up, back = (work(gemm, variant, tokens) for gemm in grad.products)
        stores = variant.block_m * variant.block_n * (1 + grad.parts) * size + 4 * variant.block_m
        return Work(up.programs, up.steps + back.steps, up.flops + back.flops, up.loads + back.loads, stores)
    hit, pairs, k = experts_hit(grad.experts, grad.k, tokens), tokens * grad.k, variant.block_k
    steps = max(1.0, pairs / hit / k + (1 - 1 / k) / 2)
    area, sides = variant.block_m * variant.block_n, variant.block_m + variant.block_n
    return Work(
        hit * _blocks(grad, variant), ceil(steps), int(2 * area * k * steps), int(sides * k * steps * size), area * size
    )


def passed(grad: Gradient, variant: Variant, tokens: int, on: Chip) -> float:
    """Bytes that pass between memory and the chip: what the L2 cannot hold is read again."""
    size, pairs = grad.dtype.itemsize, tokens * grad.k
    if isinstance(grad, Hidden):
        parts = 8 * pairs * -(-grad.width // variant.block_n)  # of the weights' gradients: written, and read
        besides = pairs * grad.width * (grad.parts - 1) * size
        return sum(moved(gemm, variant, tokens, on) for gemm in grad.products) + besides + parts
    hit, m_turns, n_turns = experts_hit(grad.experts, grad.k, tokens), 1, 1
    if pairs / hit * (grad.m + grad.n) * size > on.cache * CACHED:
        m_turns = -(-GROUP_M * -(-grad.n // variant.block_n) // on.sms)
        n_turns = -(-grad.m // (GROUP_M * variant.block_m))
    return pairs * (grad.m * m_turns + grad.n * n_turns) * size + grad.experts * grad.m * grad.n * size


def foresee(grad: Gradient, variant: Variant, tokens: int, on: Chip) -> Prediction | None:
    """Time of a variant for `tokens` tokens; None where it does not fit the chip, or has no whole blocks of rows."""
    streams_rows = variant.kernel == "tma" and isinstance(grad, Bank)
    held = registers(grad, variant, on)
    if shared(grad, variant, on) > on.shared or held > on.registers or (streams_rows and tokens < variant.block_k):
        return None
    threads, made = variant.num_warps * on.lanes, done(grad, variant, tokens)
    resident = max(1, min(int(65536 * (on.lanes // 32) / (held * threads)), 2048 // threads))
    resident = max(1, min(resident, on.shared // shared(grad, variant, on)))
    busiest = ceil(made.programs / on.sms - 1e-9)
    through, rounds = made.loads + made.stores, max(1.0, busiest / resident)
    # Where one program has the whole SM, nothing runs beside it while it looks for its operands, or for the last rows.
    alone = rounds * (SEARCH + LATENCY * streams_rows) if resident == 1 else 0.0
    piece = min(LONG, variant.block_k * grad.dtype.itemsize if isinstance(grad, Hidden) else LONG)
    roofs: dict[Limiter, float] = {
        "memory": passed(grad, variant, tokens, on) / (on.bandwidth * BANDWIDTH_SHARE) * (1 + PIECE / piece),
        "compute": busiest * _computing(grad, variant, made, on),
        "cache": through * max(made.programs / on.cache_bandwidth, busiest / (PORT * on.clock)) / feed(variant),
        "latency": rounds * (made.steps * LATENCY / (variant.num_stages - 1) + SEARCH),
    }
    limiter = max(roofs, key=lambda roof: roofs[roof])
    beside = LAUNCH if isinstance(grad, Hidden) else 0.0  # adds up the weights' gradients
    seconds = roofs[limiter] + SHOWS * (sum(roofs.values()) - roofs[limiter]) + alone + LAUNCH + beside
    hit, pairs = experts_hit(grad.experts, grad.k, tokens), tokens * grad.k
    waste = made.programs * made.flops / (pairs * _needed(grad)) - 1
    return Prediction(seconds * 1e6, limiter, {k: v * 1e6 for k, v in roofs.items()}, waste, hit, made, resident)


def _computing(grad: Gradient, variant: Variant, made: Work, on: Chip) -> float:
    """Seconds of one program's products."""
    if isinstance(grad, Bank):
        return made.flops / (rate(_alike(grad), variant, on) / on.sms)
    products = ((work(gemm, variant, 1).flops, gemm) for gemm in grad.products)
    return sum(flops / (rate(gemm, variant, on) / on.sms) for flops, gemm in products)


def _needed(grad: Gradient) -> int:
    """Flops of a row."""
    if isinstance(grad, Bank):
        return 2 * grad.m * grad.n
    return 2 * grad.width * (grad.parts * grad.hidden + grad.out)


def _blocks(grad: Bank, variant: Variant) -> int:
    return -(-grad.m // variant.block_m) * -(-grad.n // variant.block_n)


def _alike(grad: Gradient) -> Gemm:
    """A GEMM with the same element type and tile."""
    return grad.products[0] if isinstance(grad, Hidden) else Gemm("up", grad.experts, grad.k, 1, grad.n, 1, grad.dtype)
