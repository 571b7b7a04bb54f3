"""Triton kernels that stand in for CUDA operators which peers' own wheels bring compiled."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor


def kernel(function: Any) -> Any:
    return triton.jit(function)


@kernel
def silu_pairs(pairs: tl.tensor) -> tl.tensor:
    """silu(gate) * up of columns gate, up, gate, ...; triton_kernels calls it on a tile of f32."""
    gate, up = tl.split(tl.reshape(pairs, (pairs.shape[0], pairs.shape[1] // 2, 2)))  # type: ignore
    return gate / (1 + tl.exp(-gate)) * up


@kernel
def _silu_and_mul(wide: tl.tensor, out: tl.tensor, WIDTH: tl.constexpr, BLOCK: tl.constexpr) -> None:
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < WIDTH
    gate = tl.load(wide + row * 2 * WIDTH + columns, mask=inside).to(tl.float32)
    up = tl.load(wide + row * 2 * WIDTH + WIDTH + columns, mask=inside).to(tl.float32)
    tl.store(out + row * WIDTH + columns, gate / (1 + tl.exp(-gate)) * up, mask=inside)


def silu_and_mul(out: Tensor, wide: Tensor) -> None:
    """out [n, I] = silu(wide[:, :I]) * wide[:, I:]."""
    rows, width = out.shape
    _silu_and_mul[(rows, triton.cdiv(width, 1024))](wide, out, width, 1024)


@kernel
def _sum(parts: tl.tensor, out: tl.tensor, K: tl.constexpr, H: tl.constexpr, BLOCK: tl.constexpr) -> None:
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < H
    total = tl.zeros([BLOCK], tl.float32)
    for slot in tl.static_range(K):
        total += tl.load(parts + (token * K + slot) * H + columns, mask=inside, other=0).to(tl.float32)
    tl.store(out + token * H + columns, total, mask=inside)


def sum_of_slots(parts: Tensor, out: Tensor) -> None:
    """out [T, H] = parts [T, k, H] summed over k."""
    tokens, k, hidden = parts.shape
    _sum[(tokens, triton.cdiv(hidden, 1024))](parts, out, k, hidden, 1024)


FEW = 8192  #: pairs that one program counts as it goes


@kernel
def _count(ids: tl.tensor, counts: tl.tensor, PAIRS: tl.tensor, BLOCK: tl.constexpr) -> None:
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.atomic_add(counts + tl.load(ids + at, mask=at < PAIRS, other=0), 1, mask=at < PAIRS)


@kernel
def _blocks(
    ids: tl.tensor,
    counts: tl.tensor,
    starts: tl.tensor,
    rows: tl.tensor,
    owners: tl.tensor,
    total: tl.tensor,
    PAIRS: tl.tensor,
    E: tl.constexpr,
    BINS: tl.constexpr,
    SIZE: tl.constexpr,
    COUNTED: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """One program: where each expert's blocks start, who owns them, and padding at their ends."""
    experts = tl.arange(0, BINS)
    if COUNTED:
        count = tl.load(counts + experts, mask=experts < E, other=0)
    else:
        count = tl.zeros([BINS], tl.int32)
        for first in range(0, PAIRS, BLOCK):
            at = first + tl.arange(0, BLOCK)
            count += tl.histogram(tl.load(ids + at, mask=at < PAIRS, other=BINS - 1), BINS)
        count = tl.where(experts < E, count, 0)
    blocks = (count + SIZE - 1) // SIZE
    ends = tl.cumsum(blocks, 0)
    begin = ends - blocks
    tl.store(starts + experts, begin * SIZE, mask=experts < E)
    tl.store(total, tl.sum(blocks, 0) * SIZE)
    for turn in range(0, tl.max(blocks, 0)):
        tl.store(owners + begin + turn, experts, mask=turn < blocks)
    for turn in range(0, SIZE):
        at = count + turn
        tl.store(rows + begin * SIZE + at, PAIRS, mask=at < blocks * SIZE)


@kernel
def _place(ids: tl.tensor, starts: tl.tensor, rows: tl.tensor, PAIRS: tl.tensor, BLOCK: tl.constexpr) -> None:
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    row = tl.atomic_add(starts + tl.load(ids + at, mask=at < PAIRS, other=0), 1, mask=at < PAIRS)
    tl.store(rows + row, at, mask=at < PAIRS)


def align(ids: Tensor, experts: int, size: int, rows: Tensor, owners: Tensor, total: Tensor) -> None:
    """vLLM's moe_align_block_size: pairs sorted by expert, every expert's padded to blocks of `size` rows.

    Pairs of one expert come in any order, which changes no row of the result.

    Args:
        ids: [T, k], i32.
        rows: a pair's number, or T k where a row is padding.
        owners: the expert of each block.
        total: [1], padded rows.
    """
    pairs, block = ids.numel(), 256
    grid, counted = (triton.cdiv(pairs, block),), pairs > FEW
    starts = torch.empty(experts, dtype=torch.int32, device=ids.device)
    counts = starts
    if counted:
        counts = torch.zeros_like(starts)
        _count[grid](ids, counts, pairs, block)
    bins = triton.next_power_of_2(experts + 1)
    _blocks[(1,)](ids, counts, starts, rows, owners, total, pairs, experts, bins, size, counted, 1024)
    _place[grid](ids, starts, rows, pairs, block)
