"""How long a rank computes: the larger of flops over what a GEMM reaches and bytes over what a copy reaches."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sparsec.diagnostics import SparsecError
from sparsec.ir.types import DType
from sparsec.passes.chips import CHIPS, Chip, chip
from sparsec.passes.roofline import BANDWIDTH_SHARE, FLOPS_SHARE, LAUNCH
from sparsec.simulate.model import MoE

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

FP8 = {"cuda:sm_90": 2.0, "cuda:sm_100": 2.0, "hip:gfx942": 2.0, "hip:gfx950": 2.0}
"""The rate of fp8 over bf16, by the vendors' data sheets; others have no fp8."""

TILES = (16, 32, 64, 128)
"""Rows of a GEMM's tile: the smallest that holds the mean of an expert's rows, else the largest."""


@dataclass(frozen=True)
class Device:
    """A GPU by its target, `cuda:sm_90`. Rates are of its data sheet, less what kernels are known to lose."""

    target: str

    @property
    def chip(self) -> Chip:
        return chip(self.target)

    @property
    def bandwidth(self) -> float:
        """Bytes/s that kernels reach."""
        return self.chip.bandwidth * BANDWIDTH_SHARE

    def flops(self, dtype: str) -> float:
        """Flops/s that GEMMs reach. Raises: SparsecError for a type that the chip has not."""
        if dtype == "fp8":
            if self.target not in FP8:
                raise SparsecError(f"{self.chip.name} has no fp8\n  hint: one of {', '.join(FP8)}, or --dtype bf16")
            return self.chip.flops[DType.bf16] * FP8[self.target] * FLOPS_SHARE
        return self.chip.flops[DType.f32 if dtype == "f32" else DType.bf16] * FLOPS_SHARE

    def seconds(self, flops: float, bytes_: float, dtype: str) -> float:
        """Of work that either limits."""
        return max(flops / self.flops(dtype), bytes_ / self.bandwidth)


def device(target: str) -> Device:
    """A device by its target. Raises: SparsecError for one that there is not."""
    if target not in CHIPS:
        raise SparsecError(f"there is no chip '{target}'\n  hint: {', '.join(CHIPS)}")
    return Device(target)


def tile(rows: Floats) -> int:
    """Rows of the GEMMs' tile for so many rows per slot."""
    mean = float(rows[rows > 0].mean()) if (rows > 0).any() else 0.0
    return next((size for size in TILES if size >= mean), TILES[-1])


def expert_seconds(model: MoE, on: Device, rows: Floats, rank_of_slot: Ints, speed: Floats) -> Floats:
    """[ranks]: seconds that each rank needs for its experts.

    Rows are rounded up to the tile in every slot; weights are read of slots that have any.

    Args:
        rows: [slots].
        speed: [ranks], relative.
    """
    size = tile(rows)
    padded = np.ceil(rows / size) * size
    flops = np.bincount(rank_of_slot, padded, len(speed)) * 2 * model.expert_parameters
    weights = np.bincount(rank_of_slot, rows > 0, len(speed)) * model.expert_parameters * model.weight
    wide = model.row + model.row // model.hidden * model.intermediate  # bytes of a row outside, and in between
    activations = np.bincount(rank_of_slot, rows, len(speed)) * 2 * wide
    busy = np.maximum(flops / on.flops(model.dtype), (weights + activations) / on.bandwidth)
    return (busy + 2 * LAUNCH * (busy > 0)) / speed


def shared_seconds(model: MoE, on: Device, tokens: float) -> float:
    """Of the experts that every token goes to."""
    parameters = model.shared * model.expert_parameters
    return on.seconds(2 * parameters * tokens, parameters * model.weight, model.dtype) if parameters else 0.0


def rest_seconds(model: MoE, on: Device, tokens: float, context: float) -> float:
    """Of what a layer has beside experts: its GEMMs, then attention over `context` tokens each."""
    gemms = on.seconds(2 * model.rest * tokens, model.rest * model.weight, model.dtype)
    dtype = "f32" if model.dtype == "f32" else "bf16"
    attended = tokens * context
    return gemms + on.seconds(attended * model.attention, attended * model.memory, dtype)
