"""The cost model: how long a tile shape takes for one of the two expert GEMMs on one chip.

Roofline with four limits, the worst of which counts:

- compute: padded flops over the tensor cores' rate, in whole waves of tiles over the SMs;
- memory: the weights of the experts hit plus activations over the memory bandwidth;
- cache: every tile's operands over the L2 bandwidth;
- latency: a block has `stages - 1` steps of its inner loop under way, and a step takes a load's latency.

Rows per expert follow from uniform routing: E (1 - (1 - k/E)^T) experts are hit. Skewed routing hits fewer, so that
the figures are an upper bound for memory and a lower bound for padding.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from itertools import product
from typing import Literal

from sparsec.diagnostics import CompileError
from sparsec.dialects.moe import experts_hit
from sparsec.ir.types import DType
from sparsec.passes.chips import Chip

BANDWIDTH_SHARE = 0.90  # H100: a copy reaches 3.0 of 3.35 TB/s
FLOPS_SHARE = 0.80  # H100: cuBLAS reaches 798 of 989 TFLOP/s (bf16, 8192 cubed)
MMA_SYNC_SHARE = 0.62  # what mma.sync reaches of wgmma's rate: Luo et al., arXiv 2402.13499
LATENCY = 600e-9  # seconds from a load's issue to its data under load, between L2's and memory's
LAUNCH = 3e-6  # seconds
PIECE = 16  # bytes that starting a piece of a row costs; fitted to the tiles that vLLM's tuning prefers on H100
ROW_REGISTERS = 64  # registers of a thread beside its accumulators


@dataclass(frozen=True)
class Gemm:
    """A grouped GEMM: `pairs` rows in `experts` groups, [rows, inner] by [inner, parts * columns].

    Args:
        row_bytes: what one row of the result moves, intermediate results included.
    """

    experts: int
    k: int
    inner: int
    columns: int
    parts: int
    dtype: DType
    row_bytes: int


@dataclass(frozen=True)
class Tile:
    """A variant of the kernel: its tile, warps per block, and stages of loads under way."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int

    def shared(self, gemm: Gemm) -> int:
        """Bytes of shared memory of one block."""
        return self.num_stages * self.step(gemm)

    def step(self, gemm: Gemm) -> int:
        """Bytes of operands that one step of the inner loop loads."""
        return (self.block_m + self.block_n * gemm.parts) * self.block_k * gemm.dtype.itemsize


@dataclass(frozen=True)
class Prediction:
    """What a tile is expected to do.

    Args:
        us: time in microseconds.
        limiter: which roof it hits.
        waste: rows computed for nothing, as a share of those needed.
        hit: experts expected to have rows.
    """

    us: float
    limiter: Literal["memory", "compute"]
    waste: float
    hit: float


def predict(gemm: Gemm, tile: Tile, tokens: int, on: Chip) -> Prediction | None:
    """Time of a grouped GEMM for `tokens` tokens; None where the tile does not fit the chip."""
    shared = tile.shared(gemm)
    threads = tile.num_warps * on.lanes
    registers = tile.block_m * tile.block_n * gemm.parts / threads + ROW_REGISTERS
    if shared > on.shared or registers > 255:
        return None
    resident = max(1, min(on.shared // shared, int(65536 * (on.lanes // 32) / (registers * threads)), 2048 // threads))
    hit, pairs = experts_hit(gemm.experts, gemm.k, tokens), tokens * gemm.k
    blocks = max(1.0, pairs / hit / tile.block_m + (1 - 1 / tile.block_m) / 2)
    tiles = hit * blocks * -(-gemm.columns // tile.block_n)
    inner = -(-gemm.inner // tile.block_k) * tile.block_k

    rate = on.flops.get(gemm.dtype, on.flops[DType.f32]) * FLOPS_SHARE
    if gemm.dtype is not DType.f32 and tile.block_m < on.wide:
        rate *= MMA_SYNC_SHARE
    waves = max(1.0, -(-tiles // on.sms)) * on.sms / tiles
    compute = 2 * tiles * tile.block_m * tile.block_n * gemm.parts * inner / rate * waves

    weights = hit * gemm.columns * gemm.parts * gemm.inner * gemm.dtype.itemsize
    moved = weights + pairs * gemm.row_bytes + min(tokens, pairs) * gemm.inner * gemm.dtype.itemsize
    steps = inner // tile.block_k
    piece = tile.block_k * gemm.dtype.itemsize
    memory = moved / (on.bandwidth * BANDWIDTH_SHARE) * (1 + PIECE / piece)
    cached = tiles * steps * tile.step(gemm) / on.cache_bandwidth
    waiting = max(1.0, tiles / (on.sms * resident)) * steps * LATENCY / (tile.num_stages - 1)

    slowest = max(compute, memory, cached, waiting)
    seconds = slowest + LAUNCH
    limiter: Literal["memory", "compute"] = "compute" if compute == slowest else "memory"
    return Prediction(seconds * 1e6, limiter, hit * blocks * tile.block_m / pairs - 1, hit)


def candidates(on: Chip) -> Iterator[Tile]:
    """The tiles that are tried, small ones first."""
    for m, n, k, warps, stages in product((16, 32, 64, 128), (32, 64, 128, 256), (32, 64, 128), (4, 8), (2, 3, 4, 5)):
        if on.lanes == 32 or stages <= 3:  # a wavefront machine has no asynchronous copies to keep under way
            yield Tile(m, n, k, warps, stages)


@cache
def best(gemm: Gemm, tokens: int, on: Chip) -> tuple[Tile, Prediction]:
    """The fastest tile for `tokens` tokens; among those within 2 % one of few rows with much under way."""
    timed = [(tile, made) for tile in candidates(on) if (made := predict(gemm, tile, tokens, on)) is not None]
    if not timed:
        raise CompileError(f"no tile of {gemm} fits {on.name}")
    limit = min(made.us for _, made in timed) * 1.02
    return min(
        (pair for pair in timed if pair[1].us <= limit),
        key=lambda pair: (pair[0].block_m, -pair[0].step(gemm) * (pair[0].num_stages - 1), pair[0].num_warps),
    )
