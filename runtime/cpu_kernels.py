"""The fused ops on a CPU: sorting pairs by expert, and the two GEMMs of an expert layer over the experts that are hit.

Words as in the `moe` dialect: T tokens, k experts per token, pair number `token * k + slot`; `order` lists the pairs
expert by expert, `offsets[e]:offsets[e + 1]` are those of expert e, pairs beyond the last offset are skipped.

Two ways through an expert layer. `batched` gathers all rows and activates them at once: fewest operators, for few
tokens. `streamed` takes each expert's rows through both GEMMs while they are in the cache, for many.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from sparsec.runtime.packing import Bank

Activation = Callable[[Sequence[Tensor]], Tensor]
"""One tensor [n, I] per part of the up-projection -> [n, I]."""
Tail = Callable[[Tensor], Tensor]
"""Rows [n, H] of what experts yield -> what is weighed and added in their place, [n, H]."""

CACHE = 8 << 20
"""Bytes of rows between the GEMMs up to which a layer is `batched`."""
FEW_TOKENS = 16
"""Up to this many tokens the combine weighs all pairs at once instead of slot by slot."""
BLOCK = 128
"""Tokens that the combine adds up at a time, so that the f32 sums stay in the cache."""


def group(ids: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """Sort pairs by expert, keeping their order within an expert; ids outside 0..num_experts-1 go last.

    Returns: order [T * k] and offsets [num_experts + 1], both i32.
    """
    flat = ids.reshape(-1)
    flat = torch.where((flat < 0) | (flat >= num_experts), num_experts, flat)
    ranked, order = torch.sort(flat, stable=True)
    bounds = torch.arange(num_experts + 1, dtype=ranked.dtype, device=ids.device)
    return order.int(), torch.searchsorted(ranked, bounds, out_int32=True)


def gather_gemm(
    x: Tensor,
    order: Tensor,
    offsets: Tensor,
    up: Bank,
    k: int,
    activation: Activation,
    parts: int,
    batched: bool,
    weights: Tensor | None = None,
) -> Tensor:
    """activation(x[order // k] @ up[e].T + bias) expert by expert.

    Args:
        x: [T, H].
        parts: how many equal parts of the columns the activation takes.
        weights: [T, k], by which each pair's row of x is multiplied first.

    Returns: [T * k, I]; zeros in the rows of skipped pairs.
    """
    hits, used = _hits(offsets)
    rows = _gathered(x, order[:used], k, weights)
    if batched:
        projected = _multiply(up, hits, rows(0, used))
        return _padded(_activate(activation, projected, parts).to(x.dtype), order.shape[0])
    pieces = [_activate(activation, up(e, rows(a, b)), parts) for e, a, b in hits]
    return _padded(_joined(pieces, x, up.columns // parts).to(x.dtype), order.shape[0])


def gemm_combine(
    h: Tensor,
    order: Tensor,
    offsets: Tensor,
    weights: Tensor,
    down: Bank,
    weighted: bool = True,
    tail: Tail | None = None,
) -> Tensor:
    """For each token the sum over its slots of weight * tail(h @ down[e].T + bias), in f32, in the order of its slots.

    Args:
        h: [T * k, I], as of `gather_gemm`.
        weights: [T, k].
        weighted: whether rows are weighed; if not, only the shape of `weights` counts.

    Returns: [T, H], dtype of `h`.
    """
    hits, used = _hits(offsets)
    y = _finished(tail, _multiply(down, hits, h[:used]))
    return combine(y, order, used, weights if weighted else _ones(weights), h.dtype)


def experts(
    x: Tensor,
    order: Tensor,
    offsets: Tensor,
    weights: Tensor,
    up: Bank,
    down: Bank,
    activation: Activation,
    parts: int,
    batched: bool,
    row_weights: Tensor | None = None,
    weighted: bool = True,
    tail: Tail | None = None,
) -> Tensor:
    """`gather_gemm` and `gemm_combine` in one pass over the experts that are hit.

    Args:
        row_weights: the `weights` of `gather_gemm`; all others are as there.

    Returns: [T, H], dtype of `x`.
    """
    hits, used = _hits(offsets)
    rows = _gathered(x, order[:used], weights.shape[1], row_weights)
    weights = weights if weighted else _ones(weights)
    if batched:
        h = _activate(activation, _multiply(up, hits, rows(0, used)), parts)
        return combine(_finished(tail, _multiply(down, hits, h)), order, used, weights, x.dtype)
    pieces = [_finished(tail, down(e, _activate(activation, up(e, rows(a, b)), parts))) for e, a, b in hits]
    return combine(_joined(pieces, x, down.columns), order, used, weights, x.dtype)


def is_few(pairs: int, x: Tensor, up: Bank, parts: int) -> bool:
    """Whether the rows of so many pairs stay in the cache through a layer: then it is better `batched`."""
    row = x.shape[1] + up.columns + up.columns // parts
    return pairs * row * x.itemsize <= CACHE


def combine(y: Tensor, order: Tensor, used: int, weights: Tensor, dtype: torch.dtype) -> Tensor:
    """Weigh the rows of `y`, which are in `order`, and add those of each token in the order of its slots.

    Args:
        y: [used, H].
        order: [T * k]; the pairs from `used` on are skipped and add nothing, whatever their weights.
        weights: [T, k].

    Returns: [T, H], added in f32 (f64 for f64) and rounded once to `dtype`.
    """
    tokens, k = weights.shape
    if tokens == 0 or used == 0:
        return y.new_zeros(tokens, y.shape[1], dtype=dtype)
    wide = torch.float64 if y.dtype == torch.float64 else torch.float32
    weights = weights.to(wide)
    place = torch.empty_like(order)
    place[order.long()] = torch.arange(order.shape[0], dtype=order.dtype, device=order.device)
    if used < order.shape[0]:
        # A skipped pair reads the row of zeros put last, and its weight may be NaN: it becomes zero too.
        y = torch.cat([y, y.new_zeros(1, y.shape[1])])
        skipped = place >= used
        place = torch.where(skipped, used, place)
        weights = weights.masked_fill(skipped.view(tokens, k), 0)
    if tokens <= FEW_TOKENS:
        weighed = y.index_select(0, place).view(tokens, k, -1) * weights.unsqueeze(-1)
        return weighed.sum(1).to(dtype)
    slots = place.view(tokens, k).t().contiguous()
    out = y.new_empty(tokens, y.shape[1], dtype=dtype)
    for start in range(0, tokens, BLOCK):
        stop = min(start + BLOCK, tokens)
        total = torch.zeros(stop - start, y.shape[1], dtype=wide, device=y.device)
        for slot in range(k):
            total.addcmul_(y.index_select(0, slots[slot, start:stop]).to(wide), weights[start:stop, slot, None])
        out[start:stop] = total
    return out


def _activate(activation: Activation, projected: Tensor, parts: int) -> Tensor:
    """The activation of `projected` [n, parts * I], in f32 where its dtype is narrower, rounded once: [n, I]."""
    wide = projected.float() if projected.dtype.itemsize < 4 else projected
    return activation(wide.chunk(parts, -1)).to(projected.dtype)


def _finished(tail: Tail | None, y: Tensor) -> Tensor:
    """The tail of rows [n, H], in f32 where their dtype is narrower, rounded once."""
    if tail is None:
        return y
    return tail(y.float() if y.dtype.itemsize < 4 else y).to(y.dtype)


def _gathered(x: Tensor, pairs: Tensor, k: int, weights: Tensor | None) -> Callable[[int, int], Tensor]:
    """The rows of x of some pairs, from one of them up to another, times their weights if there are any."""
    rows = torch.div(pairs, k, rounding_mode="floor")
    if weights is None:
        return lambda start, stop: x.index_select(0, rows[start:stop])
    scale = weights.reshape(-1, 1).index_select(0, pairs)
    return lambda start, stop: x.index_select(0, rows[start:stop]) * scale[start:stop]


def _ones(weights: Tensor) -> Tensor:
    return torch.ones(weights.shape, device=weights.device)


def _hits(offsets: Tensor) -> tuple[list[tuple[int, int, int]], int]:
    """The experts that have pairs, as (expert, first, last + 1), and how many pairs are not skipped."""
    bounds = offsets.tolist()
    return [(e, a, b) for e, (a, b) in enumerate(pairwise(bounds)) if b > a], bounds[-1]


def _multiply(bank: Bank, hits: list[tuple[int, int, int]], rows: Tensor) -> Tensor:
    if len(hits) == 1:
        return bank(hits[0][0], rows)
    return _joined([bank(e, rows[a:b]) for e, a, b in hits], rows, bank.columns)


def _joined(pieces: list[Tensor], like: Tensor, columns: int) -> Tensor:
    return torch.cat(pieces) if pieces else like.new_empty(0, columns)


def _padded(h: Tensor, rows: int) -> Tensor:
    """`h` with rows of zeros up to `rows`."""
    return h if h.shape[0] == rows else torch.cat([h, h.new_zeros(rows - h.shape[0], h.shape[1])])
