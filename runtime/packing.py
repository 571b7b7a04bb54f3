"""Expert banks as prepacked oneDNN linears.

A bank `[E, N, K]` becomes E weights in the blocked layout that oneDNN multiplies by; that is 1.1 to 1.4 times as fast
as the plain layout at any number of rows. Packing copies the bank once: until the original is released, a bank costs
its memory twice. `[E, K, N]` banks are transposed and interleaved gate/up columns are sorted while they are packed.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from sparsec.runtime.tiles import unpack

SMALLEST = {2: 1 << 14, 4: 1 << 20}
"""Elements of an expert's weight from which on packing pays, by bytes per element (measured on one AVX-512 core; in f32
a single row is then 15 % slower than plain and four rows 20 to 60 % faster)."""


@dataclass(frozen=True)
class Tiled:
    """A bank in tiles (`runtime.tiles`) as the bank [E, N, K] that they were made of, one expert at a time.

    Args:
        packed, scales, packing, parts: as of `tiles.unpack`.
        shape: E, N, K.
        dtype: of what is unpacked.
    """

    packed: Tensor
    scales: Tensor | None
    packing: str
    parts: int
    shape: tuple[int, int, int]
    dtype: torch.dtype

    @property
    def device(self) -> torch.device:
        return self.packed.device

    def __getitem__(self, expert: int) -> Tensor:
        """[N, K] of one expert."""
        one = slice(expert, expert + 1)
        scales = None if self.scales is None else self.scales[one]
        return unpack(self.packed[one], scales, self.packing, self.parts, *self.shape[1:], self.dtype)[0]


Weight: TypeAlias = Tensor | Tiled


@cache
def can_pack(dtype: torch.dtype) -> bool:
    """Whether this build of torch packs and multiplies weights of a dtype on this processor."""
    if not torch.backends.mkldnn.is_available():
        return False
    try:
        weight = torch.ones(16, 16, dtype=dtype)
        packed = torch.ops.mkldnn._reorder_linear_weight(weight)
        out = torch.ops.mkldnn._linear_pointwise(weight, packed, None, "none", [], "")
    except (RuntimeError, AttributeError, TypeError):  # no such operator, or no kernel for the dtype
        return False
    return out.dtype == dtype and bool((out == 16).all())


def is_small(weight: Weight, dtype: torch.dtype) -> bool:
    """Whether an expert of a bank [E, ., .] on a CPU is too small for packing to pay."""
    each = weight.shape[1] * weight.shape[2]
    return weight.device.type == "cpu" and each < SMALLEST.get(dtype.itemsize, 1 << 60)


def should_pack(weight: Weight, dtype: torch.dtype) -> bool:
    """Whether a bank [E, ., .] multiplied in `dtype` is better packed."""
    return weight.device.type == "cpu" and not is_small(weight, dtype) and can_pack(dtype)


def compute_dtype(x: torch.dtype, weight: torch.dtype) -> torch.dtype:
    """What a GEMM multiplies in: the common dtype of both, so that neither is rounded; 8-bit weights widen to x's."""
    return x if weight.itemsize == 1 else torch.promote_types(x, weight)


class Bank:
    """E linears `x @ weight[e].T + bias[e]`, each for the rows of one expert.

    A bank that is not packed holds views of `weight` where it needs no transposing, sorting or conversion.

    Attributes:
        out: dtype of the results: the rows' own, or f32 for a small bank of narrower floats.

    Args:
        weight: [E, N, K], or [E, K, N] if transposed. Not kept after construction where it could be packed.
        bias: [E, N] or None.
        dtype: what the rows will be; see `compute_dtype`.
        transposed: whether the columns of the result are the last axis of `weight`.
        interleaved: whether gate and up columns alternate; they come out as gate half and up half.
        pack: whether to pack where it pays; without it a bank is made in no time, and serves on any device.
    """

    def __init__(
        self,
        weight: Weight,
        bias: Tensor | None,
        dtype: torch.dtype,
        transposed: bool = False,
        interleaved: bool = False,
        pack: bool = True,
    ) -> None:
        self.experts = weight.shape[0]
        self.columns = weight.shape[2 if transposed else 1]
        self.out = dtype
        self.dtype = compute_dtype(dtype, weight.dtype)
        self.packed = pack and should_pack(weight, self.dtype)
        # PyTorch multiplies narrow floats into f32 without rounding only if they are widened first. A bank too small to
        # be packed can afford that; its results stay wide for whoever goes on with them.
        if pack and not self.packed and self.dtype.itemsize < 4 and is_small(weight, self.dtype):
            self.dtype = self.out = torch.float32
        self.weights = [self._prepare(weight[e], transposed, interleaved) for e in range(self.experts)]
        self.biases: list[Tensor | None] = [None] * self.experts
        if bias is not None:
            sorted_bias = bias if not interleaved else torch.cat([bias[:, ::2], bias[:, 1::2]], 1)
            self.biases = list(sorted_bias.to(self.dtype).contiguous().unbind(0))

    def _prepare(self, weight: Tensor, transposed: bool, interleaved: bool) -> Tensor:
        weight = weight.to(self.dtype)
        if transposed:
            weight = weight.t()
        if interleaved:
            weight = torch.cat([weight[::2], weight[1::2]])
        return torch.ops.mkldnn._reorder_linear_weight(weight.contiguous()) if self.packed else weight

    def __call__(self, expert: int, rows: Tensor) -> Tensor:
        """[n, K] -> [n, N] by one expert, accumulated in f32 and rounded to `out`."""
        rows = rows.to(self.dtype)
        if self.packed:
            out = torch.ops.mkldnn._linear_pointwise(rows, self.weights[expert], self.biases[expert], "none", [], "")
        else:
            out = F.linear(rows, self.weights[expert], self.biases[expert])
        return out if self.dtype == self.out else out.to(self.out)
