"""Dispatch and combine, each in two halves between which rows are under way.

The two are adjoint linear maps, and the gradient of one is the other. In the backward pass the halves change places:
what ran between start and wait runs between the start and the wait of the gradient.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from sparsec.runtime.distributed.legs import Leg, Split, back_start, back_wait, forth_start, forth_wait
from sparsec.runtime.distributed.payload import PAYLOADS, Payload
from sparsec.runtime.distributed.world import Pending, World
from sparsec.runtime.errors import InputError

DEDUP = ("none", "rank", "node")
ALGO = ("flat", "two_level")


class Dispatch:
    """Rows of a layer on the way to their experts, or there. Made by `dispatch_start`.

    Args:
        where: [T, k] int64, the slot of every pick; outside of the slots: skip.
    """

    def __init__(self, world: World, where: Tensor, slots: int, dedup: str, algo: str, payload: Payload) -> None:
        self.world, self.slots, self.payload = world, slots, payload
        self.skip = slots * world.size
        where = where.long()
        self.where = where.masked_fill((where < 0) | (where >= self.skip), self.skip)
        self.dedup, self.algo = dedup, algo
        self.legs = list[Leg]()
        self.local = where  # set by `finish`
        self.token: Tensor | None = None
        self.is_received = self.is_combined = False

    def begin(self, x: Tensor, weights: Tensor) -> None:
        """Send the rows on the first leg."""
        rank = torch.where(self.where < self.skip, self.where // self.slots, -1)
        two_level = self.algo == "two_level"
        width = self.world.width if two_level else 1
        if self.dedup == "node":
            split = Split.by_owner(torch.div(rank, width, rounding_mode="floor"))
            dest = split.owner
        else:
            split = Split.by_entry(rank) if self.dedup == "none" else Split.by_owner(rank)
            dest = split.owner // width
        self.dtype, self.width = x.dtype, x.shape[1]
        self._hop(Leg.make(self.world, "rail" if two_level else "whole", split, dest), self.payload.encode(x), weights)

    def finish(self) -> tuple[Tensor, Tensor]:
        """Wait for the rows, and send them on where there are two legs. -> rows [u, H], weights [u, k']"""
        rows, weights = self._arrive()
        if self.algo == "two_level":
            members = self.world.members("node")
            place = self.where // self.slots - members.start
            split = Split.by_owner(torch.where(self.where < self.skip, place, -1))
            self._hop(Leg.make(self.world, "node", split, split.owner), rows, weights)
            rows, weights = self._arrive()
        first = self.world.rank * self.slots
        mine = (self.where >= first) & (self.where < first + self.slots)
        self.local = torch.where(mine, self.where - first, self.slots)
        return self.payload.decode(rows, self.dtype, self.width), weights

    def _hop(self, leg: Leg, rows: Tensor, weights: Tensor) -> None:
        """Send rows, and beside them the slots and weights of their picks as bytes."""
        self.legs.append(leg)
        where = leg.split.carried(self.where, self.skip).to(torch.int32)
        carried = leg.split.carried(weights, 0)
        self.weight_type = weights.dtype
        beside = torch.cat([where.view(torch.uint8), carried.view(torch.uint8)], 1)
        self.under_way = forth_start([leg], rows), leg.forth(beside)

    def _arrive(self) -> tuple[Tensor, Tensor]:
        rows, beside = (self.world.finish(pending) for pending in self.under_way)
        at = self.legs[-1].split.kept.shape[1] * 4
        self.where = beside[:, :at].contiguous().view(torch.int32).long()
        return rows, beside[:, at:].contiguous().view(self.weight_type)

    def back_begin(self, rows: Tensor, weights: Tensor) -> None:
        placed = back_start(self.legs, weights, Split.placed)
        self.under_way = back_start(self.legs, rows), placed

    def back_finish(self) -> tuple[Tensor, Tensor]:
        rows, weights = self.under_way
        return back_wait(self.legs, rows), back_wait(self.legs, weights, Split.placed)


class Combine:
    """Partial sums on the way home. Made by `combine_start`."""

    def __init__(self, legs: list[Leg]) -> None:
        self.legs = legs
        self.token: Tensor | None = None
        self.is_received = False

    def begin(self, y: Tensor) -> None:
        self.under_way: Pending = back_start(self.legs, y)

    def finish(self) -> tuple[Tensor]:
        return (back_wait(self.legs, self.under_way),)

    def back_begin(self, grad: Tensor) -> None:
        self.under_way = forth_start(self.legs, grad)

    def back_finish(self) -> tuple[Tensor]:
        return (forth_wait(self.legs, self.under_way),)


def dispatch_start(
    world: World,
    x: Tensor,
    where: Tensor,
    weights: Tensor,
    *,
    slots: int,
    dedup: str = "rank",
    algo: str = "flat",
    payload: str = "model",
) -> Dispatch:
    """Start to send tokens to the ranks of their experts. Every rank must call this, without tokens too.

    Args:
        x: [T, H].
        where: [T, k], integer: slots of all ranks (`remap`); outside of 0..size * slots - 1: skip.
        weights: [T, k], float.
        slots: of each rank.
        dedup: "none" (a row for every pick), "rank" (a row for every distinct rank of a token) or "node" (over the
            network a row for every distinct node, then one for every distinct rank in it).
        algo: "flat" (straight) or "two_level" (to the rank of the same index in the other node, and on from there).
            "node" needs "two_level".
        payload: how rows travel, as of `payload.PAYLOADS`.

    Raises:
        InputError: shapes or names are wrong.
        RankError: a rank is dead or does not answer.
    """
    if dedup not in DEDUP or algo not in ALGO or payload not in PAYLOADS:
        raise InputError(
            f"dispatch with dedup '{dedup}', algo '{algo}', payload '{payload}': there are dedup {', '.join(DEDUP)}; "
            f"algo {', '.join(ALGO)}; payload {', '.join(PAYLOADS)}"
        )
    if dedup == "node" and algo == "flat":
        raise InputError("a dispatch with dedup 'node' goes through one rank of each node: it needs algo 'two_level'")
    if x.dim() != 2 or where.shape != weights.shape or where.dim() != 2 or len(where) != len(x):
        raise InputError(
            f"dispatch takes x [T, H], where and weights [T, k]; got {list(x.shape)}, {list(where.shape)}, "
            f"{list(weights.shape)}"
        )
    handle = Dispatch(world, where, slots, dedup, algo, PAYLOADS[payload])
    handle.token = _Start.apply(handle, x, weights)
    return handle


def dispatch_wait(handle: Dispatch) -> tuple[Tensor, Tensor, Tensor]:
    """Wait for the tokens that are for this rank.

    Returns:
        rows [u, H] of x's dtype; local slots [u, k'] int64, `slots` where a pick is not of this rank; weights [u, k'],
        0 there. k' is 1 with dedup "none", else k. u is a matter of all ranks' tokens and may be 0.

    Raises:
        InputError: the handle was waited for before.
        RankError: a rank is dead or does not answer.
    """
    if handle.is_received:
        raise InputError("this dispatch was waited for before: a handle is used once")
    handle.is_received = True
    rows, weights = _Wait.apply(handle, handle.token)
    return rows, handle.local, weights


def combine_start(y: Tensor, handle: Dispatch) -> Combine:
    """Start to send what experts made of the rows [u, H'] back to the tokens' ranks.

    Raises:
        InputError: the handle was not waited for yet or combined before, or y has not one row for each of its rows.
        RankError: a rank is dead or does not answer.
    """
    if not handle.is_received:
        raise InputError("combine of a dispatch that was not waited for: there are no rows yet")
    if handle.is_combined:
        raise InputError("this dispatch was combined before: a handle is used once")
    if y.dim() != 2 or len(y) != len(handle.local):
        raise InputError(f"combine takes [{len(handle.local)}, H], a row for each that was dispatched; {list(y.shape)}")
    handle.is_combined = True
    combine = Combine(handle.legs)
    combine.token = _Start.apply(combine, y)
    return combine


def combine_wait(handle: Combine) -> Tensor:
    """Wait for the results of this rank's tokens.

    Returns:
        [T, H'], dtype of y: the sum of a token's rows, in f32, in ascending order of ranks; of the sums of its nodes
        where the dispatch had dedup "node". 0 for a token without picks.

    Raises:
        InputError: the handle was waited for before.
        RankError: a rank is dead or does not answer.
    """
    if handle.is_received:
        raise InputError("this combine was waited for before: a handle is used once")
    handle.is_received = True
    (out,) = _Wait.apply(handle, handle.token)
    return out


class _Transfer(Protocol):
    """Something in two halves, both ways."""

    def begin(self, *tensors: Tensor) -> None: ...
    def finish(self) -> tuple[Tensor, ...]: ...
    def back_begin(self, *grads: Tensor) -> None: ...
    def back_finish(self) -> tuple[Tensor, ...]: ...


class _Start(torch.autograd.Function):
    """The first half. Yields an empty tensor by which autograd finds the second half's gradient."""

    @staticmethod
    def forward(ctx: Any, handle: _Transfer, *tensors: Tensor) -> Tensor:
        ctx.handle = handle
        handle.begin(*tensors)
        return tensors[0].new_empty(0)

    @staticmethod
    @once_differentiable  # which hides the names of the parameters
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grad_outputs: Tensor
    ) -> tuple[Tensor | None, ...]:
        return (None, *ctx.handle.back_finish())


class _Wait(torch.autograd.Function):
    """The second half."""

    @staticmethod
    def forward(ctx: Any, handle: _Transfer, token: Tensor) -> tuple[Tensor, ...]:
        ctx.handle = handle
        ctx.save_for_backward(token)
        return handle.finish()

    @staticmethod
    @once_differentiable  # which hides the names of the parameters
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grad_outputs: Tensor
    ) -> tuple[None, Tensor]:
        ctx.handle.back_begin(*grad_outputs)
        return None, torch.zeros_like(ctx.saved_tensors[0])
