"""How long one way of computing an expert GEMM takes on one chip: a roofline with four roofs. The highest one counts.

- memory: weights of the experts hit, activations, results, over the memory's bandwidth;
- compute: padded flops over the tensor cores' rate, by the SM with most programs;
- cache: what all programs load and store, over the bandwidth of the L2;
- latency: a program has `num_stages - 1` steps under way, each of which takes a load's latency.

Rows per expert follow from uniform routing: E (1 - (1 - k/E)^T) experts are hit. Skewed routing hits fewer, so that
memory is an upper bound and padding a lower one. The constants are fitted to what is published of H100s, see
`tests/passes/published.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import ceil
from typing import Literal, TypeAlias

from sparsec.dialects.moe import experts_hit
from sparsec.ir.types import DType
from sparsec.passes.chips import Chip
from sparsec.passes.variants import Gemm, Variant

Limiter: TypeAlias = Literal["memory", "compute", "cache", "latency"]

BANDWIDTH_SHARE = 0.90  # H100: a copy reaches 3.0 of 3.35 TB/s
FLOPS_SHARE = 0.80  # H100: cuBLAS reaches 798 of 989 TFLOP/s (bf16, 8192 cubed)
MMA_SYNC_SHARE = 0.62  # what mma.sync reaches of wgmma's rate: Luo et al., arXiv 2402.13499
POINTERS = 0.87  # of what TMA reaches for both operands: SGLang PR 36543, 625.6 and 316.5 to 530.6 and 283.4 us
GATHERED = 0.94  # rows by pointers, weights by TMA: Liger-Kernel PR 1294, 1.06 times
LATENCY = 600e-9  # seconds from a load's issue to its data under load, between L2's and memory's
LAUNCH = 3e-6  # seconds
SHOWS = 0.02  # of what the roofs below the highest take: they overlap with it, not wholly
SEARCH = 3 * LATENCY  # a program finds its tile: offsets, then rows, then the first operands
PIECE = 16  # bytes that starting a piece of a row costs; fitted to the tiles that vLLM's tuning prefers on H100
LONG = 256  # bytes of a piece from which longer ones are not faster
PORT = 64  # bytes that an SM takes from the L2 in a clock
SHARED_READS = 128  # bytes of shared memory that an SM reads in a clock
# Instructions by which a packed weight becomes one that is multiplied, read off sm_90's code: in loops of mma.sync with
# those that move registers, and in loops of wgmma. In those of `swap` two of fp8 take LDS, PRMT, SHF, 2 LOP3 and HMUL2,
# four of mxfp4 LDS, PRMT, 3 shifts, 4 LOP3, 2 HMUL2 and a share of their scales'; `tiles` store instead of loading.
WIDENING, WIDENING_FOR_WGMMA = 4.5, 3.0
SCALING = 1  # instructions by which a sum over a step of fp8 is scaled and added to the others: read off sm_90's code
ISSUED = 128  # instructions of threads that an SM issues in a clock
CACHED = 0.5  # the share of the L2 that data stays in until its next reader
MOST_PAIRS = 1024  # that a program of `rows` looks through


@dataclass(frozen=True)
class Work:
    """What a GEMM's programs do.

    Args:
        programs: how many have a tile; expected, under uniform routing.
        steps: turns of one program's inner loop.
        flops, loads, stores: of one program: padding included; bytes of operands and of results.
    """

    programs: float
    steps: int
    flops: int
    loads: int
    stores: int


@dataclass(frozen=True)
class Prediction:
    """What a variant is expected to do for a number of tokens.

    Args:
        us: time in microseconds, launches included.
        limiter: the roof that it hits.
        roofs: microseconds by roof, without launches.
        waste: rows computed for nothing, as a share of those needed.
        hit: experts expected to have rows.
        resident: programs that one SM holds at a time.
    """

    us: float
    limiter: Limiter
    roofs: Mapping[Limiter, float] = field(hash=False)
    waste: float
    hit: float
    work: Work
    resident: int


def work(gemm: Gemm, variant: Variant, tokens: int) -> Work:
    """What the programs of a variant do for `tokens` tokens."""
    hit, pairs = experts_hit(gemm.experts, gemm.k, tokens), tokens * gemm.k
    steps, columns = -(-gemm.inner // (variant.block_k * variant.split)), -(-gemm.columns // variant.block_n)
    if variant.kernel == "rows":
        return _decode(gemm, variant, tokens, steps, columns)
    blocks = max(1.0, pairs / hit / variant.block_m + (1 - 1 / variant.block_m) / 2)
    area = variant.block_m * variant.block_n
    return Work(
        hit * blocks * columns * variant.split,
        steps,
        2 * area * gemm.parts * steps * variant.block_k,
        steps * variant.step(gemm),
        area * gemm.dtype.itemsize,
    )


def _decode(gemm: Gemm, variant: Variant, tokens: int, steps: int, columns: int) -> Work:
    """Programs of `rows`: going up, one for block_m rows of an expert; going down, for a token with its k experts."""
    hit, pairs, size = experts_hit(gemm.experts, gemm.k, tokens), tokens * gemm.k, gemm.dtype.itemsize
    m, slots = variant.block_m, 1 if gemm.half == "up" else gemm.slots
    groups = tokens if gemm.half == "down" else hit * max(1.0, pairs / hit / m + (1 - 1 / m) / 2)
    products = variant.products(gemm)
    return Work(
        groups * columns * variant.split,
        steps,
        2 * m * products * steps,
        int(steps * (products * gemm.weight_size + m * slots * variant.block_k * size)),
        m * variant.block_n * (4 if variant.split > 1 else size),
    )


def moved(gemm: Gemm, variant: Variant, tokens: int, on: Chip) -> float:
    """Bytes that pass between memory and the chip in the GEMM itself: what the L2 cannot hold is read again."""
    hit, pairs, size = experts_hit(gemm.experts, gemm.k, tokens), tokens * gemm.k, variant.row_size(gemm)
    rows = _gathered(gemm, tokens, on, size) if gemm.half == "up" and variant.kernel != "gathered" else pairs
    results = (tokens if variant.kernel == "rows" and gemm.half == "down" else pairs) * gemm.columns
    turns = 1.0
    if variant.kernel != "rows" and gemm.weights > on.cache * CACHED:
        turns = max(1.0, pairs / hit / (variant.block_m * GROUP_M))
    return hit * gemm.weights * turns + rows * gemm.inner * size + results * gemm.dtype.itemsize


def _gathered(gemm: Gemm, tokens: int, on: Chip, size: float) -> int:
    """Rows of x, of values of `size` bytes, that memory is read for: each once where the L2 holds all of them."""
    held = tokens * gemm.inner * size < on.cache * CACHED
    return min(tokens, tokens * gemm.k) if held else tokens * gemm.k


GROUP_M = 8
"""Row blocks of an expert that share a block of its weights: as of the kernels."""


def predict(gemm: Gemm, variant: Variant, tokens: int, on: Chip) -> Prediction | None:
    """Time of a variant for `tokens` tokens; None where it does not fit the chip, or cannot see so many."""
    if variant.kernel == "rows" and tokens * gemm.k > MOST_PAIRS:
        return None
    shared, threads = variant.shared(gemm, on), variant.num_warps * on.lanes
    registers = variant.registers(gemm, on)
    if shared > on.shared or registers > on.registers:
        return None
    resident = max(1, min(int(65536 * (on.lanes // 32) / (registers * threads)), 2048 // threads))
    resident = max(1, min(resident, on.shared // shared)) if shared else resident
    hit, pairs, done = experts_hit(gemm.experts, gemm.k, tokens), tokens * gemm.k, work(gemm, variant, tokens)
    busiest = ceil(done.programs / on.sms - 1e-9)
    through = done.loads + done.stores
    piece = min(LONG, variant.piece(gemm))
    waiting = done.steps * LATENCY / (variant.num_stages - 1)
    rounds = max(1.0, busiest / resident)
    searches = 1.0 if variant.stays or variant.kernel == "rows" else rounds
    roofs: dict[Limiter, float] = {
        "memory": moved(gemm, variant, tokens, on) / (on.bandwidth * BANDWIDTH_SHARE) * (1 + PIECE / piece),
        "compute": busiest * (done.flops / (rate(gemm, variant, on) / on.sms) + widening(gemm, variant, on)),
        "cache": through * max(done.programs / on.cache_bandwidth, busiest / (PORT * on.clock)) / feed(variant),
        "latency": rounds * waiting + searches * SEARCH,
    }
    limiter = max(roofs, key=lambda roof: roofs[roof])
    hidden = sum(roofs.values()) - roofs[limiter]
    seconds = roofs[limiter] + SHOWS * hidden + LAUNCH + beside(gemm, variant, tokens, on)
    rows = done.programs * variant.block_m / (-(-gemm.columns // variant.block_n) * variant.split)
    waste = 0.0 if variant.kernel == "rows" and gemm.half == "down" else rows / pairs - 1
    return Prediction(seconds * 1e6, limiter, {k: v * 1e6 for k, v in roofs.items()}, waste, hit, done, resident)


def beside(gemm: Gemm, variant: Variant, tokens: int, on: Chip) -> float:
    """Seconds of what goes before the GEMM, rows rounded and brought into order, or follows it: the k rows of each
    token added."""
    size, seconds = gemm.dtype.itemsize, 0.0
    if gemm.activations != "model":
        values = tokens * gemm.inner * (1 if gemm.half == "up" else gemm.k)
        seconds += LAUNCH + _streamed(values * size, values * variant.row_size(gemm), on)
    if variant.kernel == "gathered":
        copied = _gathered(gemm, tokens, on, size) + tokens * gemm.k
        return seconds + LAUNCH + copied * gemm.inner * size / (on.bandwidth * BANDWIDTH_SHARE)
    if not gemm.launches or (variant.kernel == "rows" and variant.split == 1):
        return seconds
    added = _streamed(tokens * gemm.k * gemm.columns * size, tokens * gemm.columns * size, on)
    return seconds + gemm.launches * LAUNCH + added


def _streamed(read: float, written: float, on: Chip) -> float:
    """Seconds in which bytes are read and written again, by the cache where it still holds what is read."""
    return (read + written) / ((on.cache_bandwidth if read < on.cache * CACHED else on.bandwidth) * BANDWIDTH_SHARE)


def rate(gemm: Gemm, variant: Variant, on: Chip) -> float:
    """Flops per second that the chip reaches in this variant's products."""
    narrow = variant.kernel == "fp8"
    full = on.flops[DType.f8E4M3FN] if narrow else on.flops.get(gemm.dtype, on.flops[DType.f32])
    if variant.kernel == "rows":
        return on.flops[DType.f32] * FLOPS_SHARE / 2  # each weight is widened, multiplied, added
    if gemm.dtype is DType.f32 and not narrow:
        return full * FLOPS_SHARE
    share = FLOPS_SHARE * feed(variant)
    if not variant.direct(gemm, on):
        return full * share * (MMA_SYNC_SHARE if on.wide else 1.0)
    m, n = variant.first(gemm), variant.block_m if variant.kernel == "swap" else variant.block_n
    # Both operands come from shared memory: m once for each 256 columns, n once for each 64 rows.
    size = 1 if narrow else 2
    first: float = m * size * -(-n // 256)
    if variant.widens(gemm):  # a thread loads two bytes at a time, half of what it can
        first = 2 * m * gemm.weight_size
    read = (first + n * size * -(-m // 64)) / SHARED_READS
    multiply = 2 * m * n / (full / on.sms / on.clock)
    return full * share * min(1.0, multiply / read)


def widening(gemm: Gemm, variant: Variant, on: Chip) -> float:
    """Seconds in which a program of packed weights makes them what tensor cores multiply, or scales what they made."""
    if gemm.packing == "plain":
        return 0.0
    steps = -(-gemm.inner // (variant.block_k * variant.split))
    if variant.kernel == "rows":
        return steps * variant.products(gemm) * WIDENING / (ISSUED * on.clock)
    columns, each = variant.block_n * gemm.parts, WIDENING_FOR_WGMMA if variant.direct(gemm, on) else WIDENING
    widened = 0.0 if variant.kernel == "fp8" else columns * variant.block_k * each
    scaled = columns * variant.block_m * SCALING if gemm.packing == "fp8" else 0
    return steps * (widened + scaled) / (ISSUED * on.clock)


def feed(variant: Variant) -> float:
    """The share of their rates that L2 and tensor cores reach, by how operands come to shared memory."""
    if variant.kernel in ("tiles", "rows", "fp8"):
        return POINTERS
    return 1.0 if variant.stays else GATHERED
