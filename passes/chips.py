"""The GPUs that the cost model knows: rates, sizes and limits."""

from __future__ import annotations

from dataclasses import dataclass

from sparsec.diagnostics import CompileError
from sparsec.ir.types import DType


@dataclass(frozen=True)
class Chip:
    """A GPU. Rates are the vendor's for dense matrices, in 1/s.

    Args:
        bandwidth: memory, bytes/s.
        cache_bandwidth: L2 to the SMs, bytes/s.
        cache: bytes of the L2 (AMD: of the Infinity Cache).
        flops: tensor-core (or matrix-core) rate by dtype; of e4m3 where there is one for it.
        sms: multiprocessors (compute units).
        clock: of the SMs, under boost, 1/s.
        shared: bytes of shared memory that one block may use.
        registers: of a thread, by the cost model's count, from which compilers begin to spill.
        lanes: threads of a warp (wavefront).
        wide: rows of the first operand that the matrix instruction reading shared memory takes (0: there is none).
        engine: whether there is a copy engine for blocks of tensors (TMA).
        divides: whether persistent programs are tried whose warps Triton divides into those that fetch and those that
            multiply. Nowhere yet: nothing says that it gains. `benchmarks.gpu.variants` times both forms on an H100.
    """

    name: str
    bandwidth: float
    cache_bandwidth: float
    cache: int
    flops: dict[DType, float]
    sms: int
    clock: float
    shared: int
    registers: int = 255
    lanes: int = 32
    wide: int = 0
    engine: bool = False
    divides: bool = False

    def __hash__(self) -> int:
        return hash(self.name)


def _flops(half: float, single: float, e4m3: float | None = None) -> dict[DType, float]:
    rates = {DType.bf16: half, DType.f16: half, DType.f32: single}
    return rates if e4m3 is None else {**rates, DType.f8E4M3FN: e4m3}


# Data sheets: NVIDIA A100 (NVIDIA-1758950), H100 SXM (2287922), Blackwell B200 (DGX B200), AMD MI300X and MI355X (data
# sheets, CDNA 3 and CDNA 4 white papers). The MI300X multiplies an e4m3 that is not that of checkpoints. L2: A100 5,120
# B/clock (white paper); H100 and B200 scaled by SMs and clock; MI300X and MI355X are their Infinity Cache.
CHIPS = {
    "cuda:sm_80": Chip(
        "NVIDIA A100 SXM 80 GB", 2.04e12, 5.5e12, 40 << 20, _flops(312e12, 19.5e12), 108, 1.41e9, 163 << 10
    ),
    "cuda:sm_90": Chip(
        "NVIDIA H100 SXM",
        3.35e12,
        7.5e12,
        50 << 20,
        _flops(989e12, 67e12, 1979e12),
        132,
        1.83e9,
        227 << 10,
        wide=64,
        engine=True,
    ),
    "cuda:sm_100": Chip(
        "NVIDIA B200",
        8.0e12,
        11e12,
        126 << 20,
        _flops(2250e12, 80e12, 4500e12),
        148,
        1.85e9,
        227 << 10,
        wide=64,
        engine=True,
    ),
    "hip:gfx942": Chip(
        "AMD MI300X", 5.3e12, 17.2e12, 256 << 20, _flops(1307e12, 163e12), 304, 2.1e9, 64 << 10, 210, lanes=64
    ),
    "hip:gfx950": Chip(
        "AMD MI355X", 8.0e12, 17.2e12, 256 << 20, _flops(2516e12, 157e12, 5033e12), 256, 2.4e9, 160 << 10, 210, lanes=64
    ),
}


def chip(target: str) -> Chip:
    """The chip of a GPU target. Raises: CompileError for one that is not known."""
    if target not in CHIPS:
        raise CompileError(f"there is no target '{target}' (there are: cpu, {', '.join(CHIPS)})")
    return CHIPS[target]
