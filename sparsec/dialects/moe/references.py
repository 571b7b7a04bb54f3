"""What the ops compute, expert by expert in plain torch."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from sparsec.dialects.moe.common import TILE_ROWS
from sparsec.ir.opdef import Body, Env

if TYPE_CHECKING:
    from torch import Tensor

GROUP = 128
"""Columns of rows that share a scale where they are rounded: to int8 of activated ones, to fp8 of all."""


def group_reference(ids: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """A stable counting sort of the pairs by expert, skipped ones last: `order` and `offsets`, i32."""
    import torch

    flat = ids.reshape(-1).long()
    flat = torch.where((flat < 0) | (flat >= num_experts), num_experts, flat)
    counts = torch.bincount(flat, minlength=num_experts + 1)[:num_experts]
    offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    return torch.argsort(flat, stable=True).int(), offsets.int()


def tiles_reference(offsets: Tensor, pairs: int) -> Tensor:
    """The tile lists of `moe.group`, [4, pairs // 16 + E + 2, 4] i32; entries that it does not define are -1."""
    import torch

    bounds = [*offsets.tolist(), pairs]
    experts = len(bounds) - 2
    tiles = torch.full((len(TILE_ROWS), pairs // TILE_ROWS[0] + experts + 2, 4), -1, dtype=torch.int32)
    for found, rows in zip(tiles, TILE_ROWS, strict=True):
        entries = [
            (e, start, stop, block)
            for e, (start, stop) in enumerate(pairwise(bounds))
            for block in range(-(-(stop - start) // rows))
        ]
        listed = sum(e < experts for e, *_ in entries)
        unused = pairs // rows + min(experts + 1, pairs) - len(entries)
        entries = [(listed, len(entries), 0, 0), *entries, *[(experts + 1, pairs, pairs, 0)] * unused]
        found[: len(entries)] = torch.tensor(entries)
    return tiles.to(offsets.device)


def gather_gemm_reference(
    env: Env,
    activation: Body,
    layout: str,
    x: Tensor,
    order: Tensor,
    offsets: Tensor,
    up: Tensor,
    up_bias: Tensor | None,
    transposed: bool,
    k: int,
    weights: Tensor | None = None,
    activations: str = "model",
) -> Tensor:
    """Expert by expert: activation(x[rows] @ up[e].T + bias), accumulated in f32, rounded to x's dtype.

    With `weights` [T, k] each row of x is multiplied by its pair's first.

    Args:
        activations: how rows of x are rounded: to int8, each by a scale of its own, or to fp8 in groups of columns.
    """
    import torch

    columns = up.shape[2 if transposed else 1]
    projected = torch.zeros(order.shape[0], columns, dtype=torch.float32, device=x.device)
    wide = rounded(x, activations, x.shape[1])
    bounds = offsets.tolist()
    for e, (start, stop) in enumerate(pairwise(bounds)):
        pairs = order[start:stop].long()
        rows = wide[pairs // k]
        if weights is not None:
            rows = rows * weights.reshape(-1, 1)[pairs].float()
        weight = up[e].float() if transposed else up[e].float().T
        projected[start:stop] = rows @ weight + (up_bias[e].float() if up_bias is not None else 0)
    (h,) = env.run(activation, split_parts(projected.to(x.dtype), layout))
    return h.to(x.dtype)


def gemm_combine_reference(
    h: Tensor,
    order: Tensor,
    offsets: Tensor,
    weights: Tensor,
    down: Tensor,
    down_bias: Tensor | None,
    transposed: bool,
    dtype: Any,
    weighted: bool = True,
    tail: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """Expert by expert h @ down[e].T + bias, scattered to [T, k, H], weighed and summed over k in f32.

    Args:
        weighted: whether the rows are weighed; if not, only the shape [T, k] of `weights` counts.
        tail: what becomes of the rows [T * k, H], in `dtype`, before.
    """
    import torch

    tokens, k = weights.shape
    out = torch.zeros(tokens * k, down.shape[2 if transposed else 1], dtype=torch.float32, device=h.device)
    bounds = offsets.tolist()
    for e, (start, stop) in enumerate(pairwise(bounds)):
        weight = down[e].float() if transposed else down[e].float().T
        y = h[start:stop].float() @ weight + (down_bias[e].float() if down_bias is not None else 0)
        out[order[start:stop].long()] = y
    if tail is not None:
        out = tail(out.to(dtype)).float()
    if weighted:
        out = out * weights.reshape(-1, 1).float()
    # A pair that is skipped adds nothing, even where its weight is not a number.
    used = torch.zeros(tokens * k, 1, dtype=torch.bool, device=h.device)
    used[order[: bounds[-1]].long()] = True
    return torch.where(used, out, 0.0).reshape(tokens, k, out.shape[1]).sum(1).to(dtype)


def capacity_reference(ids: Tensor, num_experts: int, capacity: int, slots_first: bool, groups: int) -> Tensor:
    """`ids` [T, k] with those pairs as `num_experts` whose expert has had `capacity` pairs of their group before.

    Args:
        slots_first: whether all tokens' first choices come before any second choice; else token by token.
        groups: of how many groups of consecutive tokens each is counted alone.
    """
    import torch

    split = ids.reshape(groups, -1, ids.shape[-1]) if ids.numel() else ids.reshape(groups, 0, ids.shape[-1])
    arrival = (split.transpose(1, 2) if slots_first else split).reshape(groups, -1)
    experts = torch.arange(num_experts, device=ids.device)
    hits = arrival.unsqueeze(-1) == experts
    over = (hits & (hits.cumsum(1) > capacity)).any(-1)
    kept = arrival.masked_fill(over, num_experts)
    if slots_first:
        kept = kept.reshape(groups, ids.shape[-1], -1).transpose(1, 2)
    return kept.reshape(ids.shape)


def unpack_reference(
    packed: Tensor, bias: Tensor | None, scales: Tensor | None, packing: str, parts: int, n: int, k: int
) -> tuple[Tensor, Tensor | None]:
    """A packed bank and its bias as [E, n, k] and [E, n]; the columns of two parts one after the other."""
    from sparsec.runtime.tiles import unpack, unpack_bias

    plain_bias = None if bias is None else unpack_bias(bias, parts, n)
    return unpack(packed, scales, packing, parts, n, k), plain_bias


def unblock_reference(bank: Tensor, scales: Tensor | None, packing: str, inner: int) -> Tensor:
    """A bank of `packing` as [E, N, inner] in f32; a plain one as it is."""
    if scales is None:
        return bank
    from sparsec.runtime.blocks import unpack

    return unpack(bank, scales, packing, inner)


def rounded(rows: Tensor, activations: str, group: int = GROUP) -> Tensor:
    """Rows as `activations` has them multiplied, f32; `group`: columns that share a scale in int8."""
    if activations == "int8":
        return rounded_to_int8(rows, group)
    return rounded_to_fp8(rows) if activations == "fp8" else rows.float()


def rounded_to_fp8(rows: Tensor) -> Tensor:
    """Rows [n, K] whose values in each group of 128 columns are e4m3 times a power of two: the least normal one of f32
    that the group's largest is at most 448 times. f32, though the dtype of `rows` holds every value.

    A group that is not finite, or whose largest would be rounded beyond what its dtype holds, becomes NaN.
    """
    import math

    import torch
    import torch.nn.functional as F

    groups = F.pad(rows.float(), (0, -rows.shape[1] % GROUP)).unflatten(1, (-1, GROUP))
    largest = groups.abs().amax(-1, keepdim=True)
    fraction, exponent = torch.frexp(largest)
    exponent = (exponent - 9 + (fraction > 0.875)).clamp(-126)  # 448 is 0.875 * 2^9
    q = torch.ldexp(groups, -exponent).to(torch.float8_e4m3fn).float()
    # Three bits follow the first one: what lies half way between 15/16 of a power of two and it becomes that power.
    beyond = math.ldexp(31 / 32, math.frexp(torch.finfo(rows.dtype).max)[1])
    return torch.where(largest < beyond, torch.ldexp(q, exponent), torch.nan).flatten(1)[:, : rows.shape[1]]


def rounded_to_int8(rows: Tensor, group: int) -> Tensor:
    """Rows [n, K] whose values in each group of columns are multiples, -127 to 127, of their largest / 127; f32.

    A group that is not finite becomes NaN; one too small for 127 / largest to be finite becomes zeros.
    """
    import torch
    import torch.nn.functional as F

    groups = F.pad(rows.float(), (0, -rows.shape[1] % group)).unflatten(1, (-1, group))
    largest = groups.abs().amax(-1, keepdim=True)
    factor = 127 / largest
    rounded = torch.where(factor.isfinite(), (groups * factor).round() * (largest / 127), 0.0)
    rounded = torch.where(largest.isfinite(), rounded, torch.nan)
    return rounded.flatten(1)[:, : rows.shape[1]]


def split_parts(projected: Tensor, layout: str) -> list[Tensor]:
    """The columns of an up-projection as the activation's arguments."""
    if layout == "single":
        return [projected]
    if layout == "interleaved":
        return [projected[..., ::2], projected[..., 1::2]]
    return list(projected.chunk(2, dim=-1))
