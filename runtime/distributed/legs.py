"""A leg: rows that go to other ranks in one exchange, and the way back of what was made of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from sparsec.runtime.distributed.world import Pending, Span, World


@dataclass(frozen=True)
class Split:
    """Which rows of an input [rows, k] are sent, and which of their k entries each of the copies carries.

    Args:
        shape: of the input's picks, (rows, k).
        owner: [sent], whom a copy is for, ascending.
        source: [sent], the row that it is a copy of.
        kept: [sent, k'], true where the copy carries an entry; k' is k, or 1 where every entry is a copy of its own.
        entries: where the kept entries are in the input, as indices of the flat [rows * k].
    """

    shape: tuple[int, int]
    owner: Tensor
    source: Tensor
    kept: Tensor
    entries: Tensor

    @classmethod
    def by_entry(cls, owner: Tensor) -> Split:
        """A copy for every entry that has an owner. [rows, k], -1: none."""
        rows, k = owner.shape
        flat = owner.reshape(-1)
        ordered, entries = torch.sort(flat, stable=True)
        first = int((flat < 0).sum())
        ordered, entries = ordered[first:], entries[first:]
        kept = torch.ones(len(entries), 1, dtype=torch.bool, device=owner.device)
        return cls((rows, k), ordered, entries // max(k, 1), kept, entries)

    @classmethod
    def by_owner(cls, owner: Tensor) -> Split:
        """A copy for every distinct owner of a row. [rows, k], -1: none."""
        rows, k = owner.shape
        row = torch.arange(rows, device=owner.device)[:, None]
        keys = torch.unique((owner * rows + row)[owner >= 0])
        ordered, source = keys // max(rows, 1), keys % max(rows, 1)
        kept = owner[source] == ordered[:, None]
        entries = (source[:, None] * k + torch.arange(k, device=owner.device))[kept]
        return cls((rows, k), ordered, source, kept, entries)

    def carried(self, values: Tensor, otherwise: int) -> Tensor:
        """[rows, k] -> [sent, k']: the entries that each copy carries."""
        out = values.new_full(self.kept.shape, otherwise)
        out[self.kept] = values.reshape(-1)[self.entries]
        return out

    def placed(self, values: Tensor) -> Tensor:
        """[sent, k'] -> [rows, k]: the adjoint of `carried`."""
        out = values.new_zeros(self.shape[0] * self.shape[1])
        out[self.entries] = values[self.kept]
        return out.view(self.shape)

    def summed(self, values: Tensor) -> Tensor:
        """[sent, ...] -> [rows, ...]: what was made of each row's copies, in f32, in ascending order of the owners."""
        wide = torch.float64 if values.dtype == torch.float64 else torch.float32
        out = values.new_zeros(self.shape[0], *values.shape[1:], dtype=wide)
        for at in self._rounds:  # no row twice in one of them: the order of the sum is the same on every device
            out.index_add_(0, self.source[at], values[at].to(wide))
        return out.to(values.dtype)

    @cached_property
    def _rounds(self) -> list[Tensor]:
        """The first copy of every row, the second of every row that has two, ..."""
        order = torch.argsort(self.source, stable=True)
        by_row = self.source[order]
        nth = torch.arange(len(order), device=order.device) - torch.searchsorted(by_row, by_row)
        return [order[nth == n] for n in range(int(nth.max()) + 1 if len(order) else 0)]


@dataclass(frozen=True)
class Leg:
    """One hop of a dispatch: `send` and `receive` count rows per rank of the span."""

    world: World
    span: Span
    split: Split
    send: list[int]
    receive: list[int]

    @classmethod
    def make(cls, world: World, span: Span, split: Split, dest: Tensor) -> Leg:
        """A leg to places in the span, [sent], ascending. The ranks tell each other how many rows come."""
        members = world.members(span)
        send, receive = world.counts(span, torch.bincount(dest, minlength=len(members)), "counts of a dispatch")
        world.links[world.rank, members.start : members.stop : members.step] += torch.tensor(send)
        return cls(world, span, split, send, receive)

    def forth(self, tensor: Tensor) -> Pending:
        """Start to send [sent, ...]."""
        return self.world.exchange(self.span, tensor, self.send, self.receive, "dispatch")

    def back(self, tensor: Tensor) -> Pending:
        """Start to send [received, ...] to where it came from."""
        return self.world.exchange(self.span, tensor, self.receive, self.send, "combine")


Merge = Callable[[Split, Tensor], Tensor]


def forth_start(legs: Sequence[Leg], rows: Tensor) -> Pending:
    """Send rows [T, ...] on the first leg."""
    return legs[0].forth(rows[legs[0].split.source])


def forth_wait(legs: Sequence[Leg], pending: Pending) -> Tensor:
    """Send what arrives on to the last leg. -> [received by it, ...]"""
    for leg in legs[1:]:
        pending = forth_start([leg], leg.world.finish(pending))
    return legs[0].world.finish(pending)


def back_start(legs: Sequence[Leg], rows: Tensor, merge: Merge = Split.summed) -> Pending:
    """Send rows [received by the last leg, ...] back as far as the first leg, which stays under way."""
    for leg in legs[:0:-1]:
        rows = merge(leg.split, leg.world.finish(leg.back(rows)))
    return legs[0].back(rows)


def back_wait(legs: Sequence[Leg], pending: Pending, merge: Merge = Split.summed) -> Tensor:
    """-> [T, ...]"""
    return merge(legs[0].split, legs[0].world.finish(pending))
