"""Expert banks in the order in which the generated CPU kernels read them.

A bank is cut into blocks of 32 columns, two tiles of 16, and into steps of S = 16 V values along K, where V values fill
the four bytes of a dot-product lane:

    packed[e, b, s, j, r, c, v] = W[e][column(b, j, c)][(s * 16 + r) * V + v]        [E, NB, KB, 2, 16, 16, V]

An up bank of two parts (gate and up, I columns each) has in tile j of block b the columns 16 b ... of part j, so that
what an activation takes lies side by side; a bank of one part has the columns 32 b ... in order. Zeros fill what lies
beyond the bank.

    tiles   the values themselves, bit by bit: bf16 (V = 2) or f32 (V = 1)
    int8    V = 4; scales f32 [E, NB, 1, 2, 16], one per column
    int4    uint8 [E, NB, G, 2, 16, 16, 4], G groups of 128 values of a column: a byte is (q0 + 8) | (q1 + 8) << 4 with
            q0 of the group's first 64 values and q1 of its last; scales f32 [E, NB, G, 2, 16]

A quantised value is q * scale. Scales may be negative: the value of an int4 group farthest from zero tends to be -8.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses import FakeTensor

from sparsec.runtime import huge_pages

GROUP = 128
"""Values of a column that share a scale in int4."""

PACKINGS = ("tiles", "int8", "int4")

_CHUNK = 1 << 16  # values whose scales are searched at a time: they stay in the cache
_RANGE = {"int8": (-127, 127), "int4": (-8, 7)}
_TRIED = {"int8": (1.0, 0.985, 0.97), "int4": (1.04, 0.98, 0.92, 0.86, 0.8, 0.74)}


@torch.no_grad()
def pack(
    weight: Tensor,
    parts: int = 1,
    transposed: bool = False,
    interleaved: bool = False,
    packing: str = "tiles",
    scales: Tensor | None = None,
) -> Tensor:
    """A bank in tiles, made expert by expert: beside the result it takes the memory of one expert (in f32 to quantise).

    Args:
        weight: [E, N, K], or [E, K, N] if transposed; bf16 or f32 for `tiles`, any floats to be quantised.
        parts: 2 if the columns are gate and up, else 1.
        interleaved: whether the columns of two parts alternate.
        scales: what `find_scales` gives for the same bank; computed if left out.

    Raises:
        ValueError: a packing that there is none of for this dtype or these parts, or a value that is not finite where
            it is to be quantised.
    """
    _check(weight, parts, interleaved, packing)
    experts, columns, inner = _sizes(weight, transposed)
    lane = weight.dtype if packing == "tiles" else torch.int8 if packing == "int8" else torch.uint8
    values = 4 // lane.itemsize
    step = GROUP if packing == "int4" else 16 * values
    blocks = -(-columns // parts // (32 // parts))
    shape = (experts, blocks, -(-inner // step), 2, 16, 16, values)
    if _has_no_values(weight):
        return weight.new_empty(shape, dtype=lane)
    out = huge_pages.empty(shape, lane)
    if packing != "tiles" and scales is None:
        scales = find_scales(weight, parts, transposed, interleaved, packing)
    for e in range(experts):
        block = _block(weight[e], parts, transposed, interleaved, step)
        if scales is not None:
            block = _quantised(block.float(), scales[e], packing)
        lanes = _lanes(block).unflatten(-1, (-1, 16)).permute(0, 3, 1, 4, 2)  # [NB, KB, 2, 16, 16]
        out[e].view(torch.int32).squeeze(-1).copy_(lanes)
    return out


@torch.no_grad()
def find_scales(
    weight: Tensor, parts: int = 1, transposed: bool = False, interleaved: bool = False, packing: str = "int8"
) -> Tensor:
    """Scales of a bank to be quantised, each the best of a few for the squared error of its values.

    Args: as of `pack`.

    Returns: f32 [E, NB, G, 2, 16]; G is 1 for int8.

    Raises: ValueError, as of `pack`.
    """
    _check(weight, parts, interleaved, packing)
    if packing == "tiles":
        raise ValueError("tiles hold the values themselves: they have no scales")
    experts, columns, inner = _sizes(weight, transposed)
    blocks, groups = -(-columns // parts // (32 // parts)), -(-inner // GROUP) if packing == "int4" else 1
    out = weight.new_empty((experts, blocks, groups, 2, 16), dtype=torch.float32)
    for e in range(0 if _has_no_values(weight) else experts):
        block = _block(weight[e], parts, transposed, interleaved, GROUP if packing == "int4" else 64)
        block = block.unflatten(-1, (groups, -1))
        rows = block.reshape(-1, block.shape[-1])
        found = rows.new_empty(rows.shape[0], dtype=torch.float32)
        chunk = max(1, _CHUNK // rows.shape[-1])
        for place, part in zip(found.split(chunk), rows.split(chunk), strict=True):
            place.copy_(_best_scales(part.float(), packing))
        if not found.isfinite().all():
            raise ValueError(f"expert {e} has weights that are not finite: they cannot be {packing}")
        out[e] = found.reshape(block.shape[:-1]).permute(0, 3, 1, 2)
    return out


@torch.no_grad()
def pack_bias(bias: Tensor, parts: int = 1, interleaved: bool = False) -> Tensor:
    """The bias [E, N] of a bank in the order of its columns: f32 [E, NB, 2, 16], zeros beyond."""
    return _block(bias.float().t(), parts, False, interleaved, 1).permute(3, 0, 1, 2).contiguous()


@torch.no_grad()
def unpack(
    packed: Tensor,
    scales: Tensor | None,
    packing: str,
    parts: int,
    columns: int,
    inner: int,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """The bank [E, N, K] of which tiles were made, gate columns before up columns.

    Args:
        packed: as `pack` gives it; `packed[e : e + 1]` for one expert alone.
        scales: as `find_scales` gives them, None for `tiles`.
        columns, inner: N and K.
        dtype: of the result; the tiles' own by default, f32 where they are quantised.
    """
    if packing not in PACKINGS or (scales is None) != (packing == "tiles"):
        raise ValueError(f"banks are packed as {', '.join(PACKINGS)}, and quantised ones have scales; not '{packing}'")
    dtype = dtype or (packed.dtype if scales is None else torch.float32)
    out = packed.new_empty((packed.shape[0], columns, inner), dtype=dtype)
    for e in range(packed.shape[0]):
        lanes = packed[e].view(torch.int32).squeeze(-1).permute(0, 2, 4, 1, 3).contiguous()  # [NB, 2, 16, KB, 16]
        block = lanes.flatten(-2).view(packed.dtype)
        if scales is not None:
            block = _restored(block, scales[e], packing)
        rows = block.transpose(0, 1) if parts == 2 else block.unsqueeze(0)
        rows = rows.reshape(parts, -1, block.shape[-1])[:, : columns // parts, :inner]
        out[e].view(parts, -1, inner).copy_(rows)
    return out


@torch.no_grad()
def unpack_bias(packed: Tensor, parts: int, columns: int) -> Tensor:
    """The bias [E, N] of which `pack_bias` made `packed`; gate columns before up columns."""
    rows = packed.transpose(1, 2) if parts == 2 else packed.unsqueeze(1)
    return rows.reshape(packed.shape[0], parts, -1)[..., : columns // parts].flatten(1)


def _check(weight: Tensor, parts: int, interleaved: bool, packing: str) -> None:
    if packing not in PACKINGS:
        raise ValueError(f"banks are packed as {', '.join(PACKINGS)}, not as '{packing}'")
    if weight.dim() != 3 or 0 in weight.shape:
        raise ValueError(f"a bank has three sizes above zero, this one is {list(weight.shape)}")
    if parts not in (1, 2) or (interleaved and parts == 1):
        raise ValueError(f"a bank has one part, or two that may be interleaved; not {parts}")
    if packing == "tiles" and weight.dtype not in (torch.bfloat16, torch.float32):
        raise ValueError(f"tiles are bf16 or f32, not {weight.dtype}")
    if not weight.dtype.is_floating_point:
        raise ValueError(f"weights of {weight.dtype} cannot be quantised")


def _sizes(weight: Tensor, transposed: bool) -> tuple[int, int, int]:
    """E, N and K."""
    experts, columns, inner = weight.shape
    return (experts, inner, columns) if transposed else (experts, columns, inner)


def _has_no_values(tensor: Tensor) -> bool:
    return tensor.is_meta or isinstance(tensor, FakeTensor)


def _block(weight: Tensor, parts: int, transposed: bool, interleaved: bool, step: int) -> Tensor:
    """An expert's weight [N, K] as [NB, 2, 16, K up to a multiple of `step`], the last axis contiguous."""
    rows = weight.t().contiguous() if transposed else weight
    rows = rows.unflatten(0, (-1, 2)).transpose(0, 1) if interleaved else rows.unflatten(0, (parts, -1))
    width = 32 // parts
    beyond = (0, -rows.shape[2] % step, 0, -rows.shape[1] % width)
    if any(beyond):
        rows = F.pad(rows, beyond)
    elif rows.stride(-1) != 1:
        rows = rows.contiguous()
    rows = rows.unflatten(1, (-1, width))
    return rows.transpose(0, 1) if parts == 2 else rows[0].unflatten(1, (2, 16))


def _lanes(block: Tensor) -> Tensor:
    """The same bytes as 32-bit lanes, which are copied several times as fast as single values."""
    values = 4 // block.itemsize
    if any(place % values for place in (*block.stride()[:-1], block.storage_offset())):
        block = block.contiguous()
    return block.view(torch.int32)


def _best_scales(rows: Tensor, packing: str) -> Tensor:
    """For each row of values [n, L] the scale of least squared error among those tried, each improved once."""
    low, high = _RANGE[packing]
    farthest = rows.gather(1, rows.abs().argmax(1, keepdim=True))
    widest = torch.where(farthest == 0, 1.0, farthest / low)
    best, gain = widest.clone(), torch.full_like(widest, -1.0)
    for factor in _TRIED[packing]:
        q = (rows / (widest * factor)).round_().clamp_(low, high)
        fit, size = (rows * q).sum(1, keepdim=True), q.square_().sum(1, keepdim=True)
        # With q fixed, fit / size is the best scale, and it leaves an error of |rows|^2 - fit^2 / size.
        better = (found := fit.square() / size) > gain
        best, gain = torch.where(better, fit / size, best), torch.where(better, found, gain)
    return best.squeeze(1)


def _quantised(block: Tensor, scales: Tensor, packing: str) -> Tensor:
    """[NB, 2, 16, K] by scales [NB, G, 2, 16]: int8 of the same shape, or half as many bytes of two int4."""
    groups = block.unflatten(-1, (scales.shape[1], -1))
    low, high = _RANGE[packing]
    q = (groups / scales.permute(0, 2, 3, 1).unsqueeze(-1)).round_().clamp_(low, high)
    if packing == "int8":
        return q.to(torch.int8).flatten(-2)
    first, last = (q.to(torch.int8) + 8).view(torch.uint8).chunk(2, -1)
    return (first | last << 4).flatten(-2)


def _restored(block: Tensor, scales: Tensor, packing: str) -> Tensor:
    """What `_quantised` was given, rounded: [NB, 2, 16, K], f32."""
    groups = block.unflatten(-1, (scales.shape[1], -1))
    if packing == "int4":
        groups = torch.cat([groups & 15, groups >> 4], -1).view(torch.int8) - 8
    return (groups.float() * scales.permute(0, 2, 3, 1).unsqueeze(-1)).flatten(-2)
