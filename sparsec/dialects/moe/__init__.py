"""Sparse experts: routing, grouping, and the two GEMMs of an expert layer.

Words: T tokens, k experts chosen per token, E experts, H hidden width, I expert width. A (token, slot) pair has the
number `token * k + slot`. An id outside 0..E-1 means "skip": the pair costs nothing and adds nothing.

Arithmetic: GEMMs accumulate in f32; the k results of a token are weighted and added in f32 in the order of its slots,
and rounded once.
"""

from __future__ import annotations

from sparsec.dialects.moe.banks import ExpertBank, Experts, GroupedLinear, Layer
from sparsec.dialects.moe.common import (
    TILE_DTYPES,
    TILE_ROWS,
    BlockPacking,
    Layout,
    Packing,
    bank_columns,
    bytes_of,
    experts_hit,
    packed_bias_type,
    packed_type,
    scale_type,
)
from sparsec.dialects.moe.gemms import GatherGemm, GemmCombine
from sparsec.dialects.moe.gradients import BankGrad, BiasGrad, HiddenGrad
from sparsec.dialects.moe.packing import Pack, PackBias, Scales
from sparsec.dialects.moe.references import (
    capacity_reference,
    gather_gemm_reference,
    gemm_combine_reference,
    group_reference,
    split_parts,
    tiles_reference,
)
from sparsec.dialects.moe.routing import Capacity, Group, Route, RouteGroup, group_types

__all__ = [
    "TILE_DTYPES",
    "TILE_ROWS",
    "BankGrad",
    "BiasGrad",
    "BlockPacking",
    "Capacity",
    "ExpertBank",
    "Experts",
    "GatherGemm",
    "GemmCombine",
    "Group",
    "GroupedLinear",
    "HiddenGrad",
    "Layer",
    "Layout",
    "Pack",
    "PackBias",
    "Packing",
    "Route",
    "RouteGroup",
    "Scales",
    "bank_columns",
    "bytes_of",
    "capacity_reference",
    "experts_hit",
    "gather_gemm_reference",
    "gemm_combine_reference",
    "group_reference",
    "group_types",
    "packed_bias_type",
    "packed_type",
    "scale_type",
    "split_parts",
    "tiles_reference",
]
