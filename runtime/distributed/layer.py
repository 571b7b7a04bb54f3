"""A layer of experts over all ranks, forward and backward, for training with sharded banks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from sparsec.runtime.distributed.exchange import combine_start, combine_wait, dispatch_start, dispatch_wait
from sparsec.runtime.distributed.legs import Leg, Split, back_start, back_wait, forth_start, forth_wait
from sparsec.runtime.distributed.remap import remap
from sparsec.runtime.distributed.world import World

Experts = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]
"""rows [u, H], local slots [u, k] (S: skip), weights [u, k], up and down [S, ...] -> [u, H]; differentiable."""


def experts_layer(
    world: World,
    x: Tensor,
    ids: Tensor,
    weights: Tensor,
    up: Tensor,
    down: Tensor,
    slots: Tensor,
    shares: Tensor,
    *,
    experts: int,
    activation: Callable[[list[Tensor]], Tensor] | None = None,
    parts: int = 2,
    run: Experts | None = None,
    meanwhile: Callable[[Tensor], Tensor] | None = None,
    policy: str = "static",
    dedup: str = "rank",
    algo: str = "flat",
    payload: str = "model",
) -> Tensor:
    """What `moe.experts` computes, with each expert on the ranks that have it. Every rank must call this.

    Gradients of the banks are those of all ranks' tokens; replicas of an expert get the same gradient, the sum of
    theirs, so that they stay alike.

    Args:
        x: [T, H], tokens of this rank; T may differ by rank and be 0.
        ids: [T, k], integer; an expert outside of 0..experts-1 is skipped.
        weights: [T, k], float.
        up, down: this rank's banks, [S, parts * I, H] and [S, H, I].
        slots, shares: [P], as of `remap`.
        activation: takes the list of parts, each [n, I], and returns [n, I]; SwiGLU if left out.
        run: the local bank, in place of PyTorch operators, such as one that calls `sparsec::bank`.
        meanwhile: what else is made of x [T, H] and added, such as a shared expert; runs while rows are under way.
        policy, dedup, algo, payload: as of `remap` and `dispatch_start`.

    Returns: [T, H], dtype of x.

    Raises:
        InputError: shapes, names or tables are wrong.
        RankError: a rank is dead or does not answer.
    """
    up, down = same_gradients(world, slots, up, down)
    where = remap(world, ids, slots, shares, experts=experts, policy=policy)
    sent = dispatch_start(world, x, where, weights, slots=len(up), dedup=dedup, algo=algo, payload=payload)
    beside = None if meanwhile is None else meanwhile(x)
    rows, local, w = dispatch_wait(sent)
    if run is None:
        y = plain_experts(rows, local, w, up, down, activation or _swiglu, parts)
    else:
        y = run(rows, local, w, up, down)
    out = combine_wait(combine_start(y, sent))
    return out if beside is None else out + beside


def plain_experts(
    rows: Tensor,
    local: Tensor,
    weights: Tensor,
    up: Tensor,
    down: Tensor,
    activation: Callable[[list[Tensor]], Tensor],
    parts: int,
) -> Tensor:
    """A bank by PyTorch operators, expert by expert, summed in f32 (f64 for f64) in the order of the slots."""
    wide = torch.float64 if rows.dtype == torch.float64 else torch.float32
    y = torch.zeros(len(rows), down.shape[1], dtype=wide, device=rows.device)
    for slot in range(len(up)):
        row, pick = torch.where(local == slot)
        hidden = activation(list((rows[row] @ up[slot].t()).chunk(parts, 1)))
        y = y.index_add(0, row, (hidden @ down[slot].t()).to(wide) * weights[row, pick, None].to(wide))
    return y.to(rows.dtype)


def _swiglu(parts: list[Tensor]) -> Tensor:
    gate, up = parts
    return torch.nn.functional.silu(gate) * up


def same_gradients(world: World, slots: Tensor, *banks: Tensor) -> tuple[Tensor, ...]:
    """The banks [S, ...] of this rank as they are; backward, every slot gets the sum over its expert's slots.

    The sum is made in f32 in ascending order of ranks, by the first rank that has the expert. Every rank must do the
    backward pass of every bank.
    """
    per_rank = len(slots) // world.size
    table = slots.tolist()
    copies = {expert: [slot for slot, other in enumerate(table) if other == expert] for expert in set(table)}
    several = sorted(mine for mine in copies.values() if len(mine) > 1)
    if not several:
        return banks
    return tuple(_SameGradient.apply(world, several, per_rank, bank) for bank in banks)


class _SameGradient(torch.autograd.Function):
    """See `same_gradients`."""

    @staticmethod
    def forward(ctx: Any, world: World, several: Sequence[Sequence[int]], per_rank: int, bank: Tensor) -> Tensor:
        ctx.given = world, several, per_rank
        return bank.view_as(bank)

    @staticmethod
    @once_differentiable  # which hides the names of the parameters
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grad_outputs: Tensor
    ) -> tuple[None, None, None, Tensor]:
        world, several, per_rank = ctx.given
        return None, None, None, sum_replicas(world, grad_outputs[0], several, per_rank)


def sum_replicas(world: World, grad: Tensor, several: Sequence[Sequence[int]], per_rank: int) -> Tensor:
    """[S, ...]: rows of this rank, those of slots that belong together (`several`, ascending) replaced by their sum.

    Their first rank is to the others what a token's rank is to those of its experts: what they have is combined there,
    and the sum is dispatched.
    """
    here = [mine for mine in several if mine[0] // per_rank == world.rank]
    pairs = sorted((slot // per_rank, row) for row, mine in enumerate(here) for slot in mine)
    by_home = sorted(several, key=lambda mine: mine[0] // per_rank)
    held = [(mine[0] // per_rank, slot) for mine in by_home for slot in mine if slot // per_rank == world.rank]
    send, receive = ([sum(other == to for other, _ in rows) for to in range(world.size)] for rows in (pairs, held))
    index = torch.tensor(pairs, dtype=torch.int64, device=grad.device).view(-1, 2)
    split = Split(
        (len(here), 1), index[:, 0], index[:, 1], torch.ones_like(index[:, :1], dtype=torch.bool), index[:, 1]
    )
    legs = [Leg(world, "whole", split, send, receive)]
    at = torch.tensor([slot % per_rank for _, slot in held], dtype=torch.int64, device=grad.device)
    total = back_wait(legs, back_start(legs, grad[at]))
    out = grad.clone()
    out[at] = forth_wait(legs, forth_start(legs, total))
    return out
