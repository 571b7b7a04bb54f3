"""Expert banks in the block formats that the generated GPU kernels read: fp8 and mxfp4.

    fp8     float8_e4m3fn [E, N, K]; scales f32 [E, NB, KB], one for each block of 128 x 128 values: w = q * scale
    mxfp4   uint8 [E, KB, N, 64]; scales uint8 [E, KB, N, 4], one for each 32 values of a column: w = q 2^(scale - 127)

A value of mxfp4 is a sign over one of 0, 0.5, 1, 1.5, 2, 3, 4 and 6, in four bits. Block b of a column holds its values
from 128 b on: byte j < 32 has value j in its lower half and 32 + j in its upper one, byte 32 + j those 64 places on. So
32 bytes yield twice 32 neighbouring values that share a scale for each column, and what a tile of columns reads is in
one piece. Zeros fill what lies beyond K. No scale is above 128: kernels multiply by 2^(scale - 1), which bf16 can hold.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses import FakeTensor

BLOCK = 128
"""Rows and columns of a block of fp8; values of a column that lie together in mxfp4."""

GROUP = 32
"""Values of a column that share a scale in mxfp4."""

PACKINGS = ("fp8", "mxfp4")

MOST = 128
"""The largest scale of mxfp4; values up to 12 need none above."""

LARGEST = 448.0
"""The largest number in float8_e4m3fn."""

FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""The magnitudes of four-bit floats (e2m1), by their lower three bits; the fourth is the sign."""

_CHUNK = 1 << 16  # values that are rounded at a time: they stay in the cache


@torch.no_grad()
def find_scales(weight: Tensor, transposed: bool = False, packing: str = "fp8") -> Tensor:
    """Scales of a bank to be stored in blocks.

    Those of fp8 take the largest value of a block to 448, or are the next power of two; those of mxfp4 are the power of
    two that takes the largest of its 32 to 4 up to 8, or the next one: whichever leaves the smaller squared error. So
    weights that were fp8 or mxfp4 before they were widened come back as they were, scales of fp8 but for rounding.

    Args:
        weight: [E, N, K], or [E, K, N] if transposed; any floats.

    Raises: ValueError for a packing that is none, and for weights that are not finite or too large for it.
    """
    _check(weight, packing)
    experts, columns, inner = _sizes(weight, transposed)
    if packing == "fp8":
        out = weight.new_empty((experts, -(-columns // BLOCK), -(-inner // BLOCK)), dtype=torch.float32)
    else:
        out = weight.new_empty((experts, -(-inner // BLOCK), columns, BLOCK // GROUP), dtype=torch.uint8)
    for e in range(0 if _has_no_values(weight) else experts):
        rows = _rows(weight[e], transposed)
        if not rows.isfinite().all():
            raise ValueError(f"expert {e} has weights that are not finite: they cannot be {packing}")
        if packing == "fp8":
            for place, part in zip(out[e], rows.split(BLOCK), strict=True):
                place.copy_(_best_scales(_blocks(part)))
        else:
            groups = _groups(rows)
            if groups.abs().amax() > FP4[-1] * 2 ** (MOST - 127):
                raise ValueError(f"expert {e} has weights beyond {FP4[-1] * 2 ** (MOST - 127)}: they cannot be mxfp4")
            out[e] = _exponents(groups).unflatten(1, (-1, BLOCK // GROUP)).transpose(0, 1)
    return out


@torch.no_grad()
def pack(weight: Tensor, scales: Tensor, transposed: bool = False, packing: str = "fp8") -> Tensor:
    """A bank in blocks, each value the nearest that there is with the scales that `find_scales` gives.

    Raises: ValueError, as of `find_scales`.
    """
    _check(weight, packing)
    experts, columns, inner = _sizes(weight, transposed)
    if packing == "fp8":
        out = weight.new_empty((experts, columns, inner), dtype=torch.float8_e4m3fn)
    else:
        out = weight.new_empty((experts, -(-inner // BLOCK), columns, BLOCK // 2), dtype=torch.uint8)
    for e in range(0 if _has_no_values(weight) else experts):
        rows = _rows(weight[e], transposed)
        if packing == "fp8":
            scaled = (rows / _over(scales[e], columns, inner)).clamp_(-LARGEST, LARGEST)
            out[e] = scaled.to(torch.float8_e4m3fn)
        else:
            low, high = _codes(_groups(rows), _per_group(scales[e])).unflatten(1, (-1, 2, 2)).unbind(3)
            out[e] = (low | high << 4).flatten(2).transpose(0, 1)
    return out


@torch.no_grad()
def unpack(packed: Tensor, scales: Tensor, packing: str, inner: int) -> Tensor:
    """The bank [E, N, K] that blocks stand for, in f32; `inner` is K."""
    if packing not in PACKINGS:
        raise ValueError(f"banks in blocks are {' or '.join(PACKINGS)}, not '{packing}'")
    experts, columns = packed.shape[0], packed.shape[1 if packing == "fp8" else 2]
    out = packed.new_empty((experts, columns, inner), dtype=torch.float32)
    for e in range(experts):
        if packing == "fp8":
            out[e] = packed[e].float() * _over(scales[e], columns, inner)
        else:
            pairs = packed[e].transpose(0, 1).unflatten(2, (2, 1, GROUP))  # [N, KB, 2, 1, 32]
            codes = torch.cat([pairs & 15, pairs >> 4], 3).flatten(1, 3)  # [N, 4 KB, 32]
            exponents = _per_group(scales[e]).int().unsqueeze(-1) - 127
            out[e] = torch.ldexp(_values(codes), exponents).flatten(1)[:, :inner]
    return out


def _check(weight: Tensor, packing: str) -> None:
    if packing not in PACKINGS:
        raise ValueError(f"banks in blocks are {' or '.join(PACKINGS)}, not '{packing}'")
    if weight.dim() != 3 or 0 in weight.shape:
        raise ValueError(f"a bank has three sizes above zero, this one is {list(weight.shape)}")
    if not weight.dtype.is_floating_point:
        raise ValueError(f"weights of {weight.dtype} cannot be quantised")


def _has_no_values(tensor: Tensor) -> bool:
    return tensor.is_meta or isinstance(tensor, FakeTensor)


def _sizes(weight: Tensor, transposed: bool) -> tuple[int, int, int]:
    """E, N and K."""
    experts, columns, inner = weight.shape
    return (experts, inner, columns) if transposed else (experts, columns, inner)


def _rows(weight: Tensor, transposed: bool) -> Tensor:
    """One expert's weight as [N, K] in f32."""
    return (weight.t().contiguous() if transposed else weight).float()


def _blocks(rows: Tensor) -> Tensor:
    """[n, K] as [n, KB, 128], zeros beyond."""
    return F.pad(rows, (0, -rows.shape[1] % BLOCK)).unflatten(1, (-1, BLOCK))


def _best_scales(blocks: Tensor) -> Tensor:
    """The scales [KB] of [n, KB, 128]: the best of those tried, as they are and fitted to the values that they give."""
    widest = blocks.abs().amax((0, 2), keepdim=True) / LARGEST
    widest = torch.where(widest == 0, 1.0, widest)
    fraction, exponent = torch.frexp(widest)
    best, least = widest, torch.full_like(widest, torch.inf)
    for scale in (widest, torch.ldexp(torch.ones_like(widest), exponent - (fraction == 0.5).int())):
        q = (blocks / scale).clamp_(-LARGEST, LARGEST).to(torch.float8_e4m3fn).float()
        fitted = (blocks * q).sum((0, 2), keepdim=True) / q.square().sum((0, 2), keepdim=True)
        for tried in (scale, fitted):
            error = (blocks - q * tried).square_().sum((0, 2), keepdim=True)
            better = error < least
            best, least = torch.where(better, tried, best), torch.where(better, error, least)
    return best[0, :, 0]


def _over(scales: Tensor, columns: int, inner: int) -> Tensor:
    """The scale of each value: [NB, KB] -> [N, K]."""
    return scales.repeat_interleave(BLOCK, 0)[:columns].repeat_interleave(BLOCK, 1)[:, :inner]


def _groups(rows: Tensor) -> Tensor:
    """[N, K] as [N, 4 KB, 32], zeros beyond."""
    return F.pad(rows, (0, -rows.shape[1] % BLOCK)).unflatten(1, (-1, GROUP))


def _per_group(scales: Tensor) -> Tensor:
    """The scales of an expert [KB, N, 4] as [N, 4 KB]."""
    return scales.transpose(0, 1).flatten(1)


def _exponents(groups: Tensor) -> Tensor:
    """The scales of [N, G, 32], uint8 [N, G]: for each the better of two."""
    flat, chunk = groups.flatten(0, 1), _chunk(groups)
    out = flat.new_empty(flat.shape[0], dtype=torch.uint8)
    for place, part in zip(out.split(chunk), flat.split(chunk), strict=True):
        largest = part.abs().amax(1, keepdim=True)
        _, exponent = torch.frexp(largest)  # largest < 2^exponent <= 2 largest
        low = torch.where(largest == 0, 127, (exponent - 3 + 127).clamp_(1, MOST - 1))
        errors = list[Tensor]()
        for scale in (low, low + 1):
            by = _power(127 - scale)
            scaled = part.abs() * by
            errors.append((_nearest(scaled) - scaled).square_().sum(1, keepdim=True) / by.square())
        place.copy_(torch.where(errors[1] < errors[0], low + 1, low).squeeze(1))
    return out.unflatten(0, groups.shape[:2])


def _chunk(groups: Tensor) -> int:
    """How many groups are rounded at a time."""
    return _CHUNK // GROUP if groups.device.type == "cpu" else max(1, groups.numel() // GROUP)


def _power(exponents: Tensor) -> Tensor:
    """2 to the power of integers from -126 to 127."""
    return ((exponents.int() + 127) << 23).view(torch.float32)


def _nearest(size: Tensor) -> Tensor:
    """The magnitudes of four-bit floats that are nearest to numbers from 0 on, of two the even one."""
    step = torch.where(size < 2, 0.5, torch.where(size < 4, 1.0, 2.0))
    return (size / step).round_().mul_(step).clamp_(max=FP4[-1])


def _codes(groups: Tensor, scales: Tensor) -> Tensor:
    """The nearest four-bit floats to [N, G, 32] over 2^(scales - 127), uint8 below 16."""
    out = groups.new_empty(groups.shape, dtype=torch.uint8).flatten(0, 1)
    flat, chunk = groups.flatten(0, 1), _chunk(groups)
    parts = zip(out.split(chunk), flat.split(chunk), scales.flatten().split(chunk), strict=True)
    for place, part, scale in parts:
        size = _nearest(part.abs() * _power(127 - scale.int()).unsqueeze(1))
        code = torch.where(size < 2, size * 2, torch.where(size < 4, size + 2, size / 2 + 4))
        place.copy_(code + torch.where(part < 0, 8, 0))
    return out.unflatten(0, groups.shape[:2])


def _values(codes: Tensor) -> Tensor:
    """What four-bit floats mean, f32."""
    numbers = torch.tensor([*FP4, *(-value for value in FP4)], device=codes.device)
    return numbers[codes.long()]
