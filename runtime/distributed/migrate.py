"""Experts from their old slots to their new ones, some bytes at a time, while the program goes on between the steps.

What arrives is kept aside. A slot serves its old expert until its new one is whole and no expert is left without a
slot: slots that wait for each other change together. All ranks work out the same from the same tables.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from sparsec.runtime.distributed.world import World
from sparsec.runtime.errors import InputError


def migrate(
    world: World,
    banks: Sequence[Tensor],
    old_slots: Tensor,
    new_slots: Tensor,
    *,
    budget_bytes: int | None = None,
) -> Iterator[Tensor]:
    """Move the experts of one layer. Every rank must call this with the same tables, and take the same steps.

    Between steps the program may run with the table that the last step yielded, and with any shares: each of its slots
    holds, in every bank, the expert that it names. The banks are written in place. They must not change otherwise until
    the end, so whoever trains them takes all steps between two updates.

    Args:
        banks: tensors [S, ...] of this rank (weights, biases, optimizer states), as many and as large on every rank.
        old_slots: [P] integer, the expert in each slot now.
        new_slots: [P] integer.
        budget_bytes: the most that a rank sends, and the most that it receives, in a step; None: no limit.

    Yields: after each step the table [P] int64 that holds from now on; the last one is `new_slots`.

    Raises:
        InputError: a table does not fit, or the new one has an expert that no old slot holds.
        RankError: a rank is dead or does not answer. Tables and banks are as after the last step.
    """
    old, new = old_slots.tolist(), new_slots.tolist()
    slots = len(banks[0]) if banks else 0
    if len(old) != len(new) or len(old) != slots * world.size or any(len(bank) != slots for bank in banks):
        raise InputError(
            f"migrate: tables of {len(old)} and {len(new)} slots and banks of "
            f"{', '.join(str(len(bank)) for bank in banks)} do not fit {world.size} ranks"
        )
    if not set(new) <= set(old):
        raise InputError(f"migrate: expert {min(set(new) - set(old))} is in no old slot: there is nothing to move")
    if budget_bytes is not None and budget_bytes < 1:
        raise InputError(f"migrate: a budget of {budget_bytes} bytes moves nothing")
    return _steps(world, banks, old, new, budget_bytes)


@dataclass
class _Move:
    """An expert on its way to a slot: `done` of its bytes are there, kept in `aside` on the rank of the slot."""

    slot: int
    expert: int
    done: int = 0
    aside: Tensor | None = None


@dataclass(frozen=True)
class _Piece:
    """Bytes of a move that go from a slot of one rank to another rank in one step."""

    move: _Move
    source: int
    start: int
    stop: int


@dataclass
class _State:
    """What every rank knows."""

    world: World
    table: list[int]
    per_rank: int
    size: int  # bytes of an expert
    moves: list[_Move] = field(default_factory=list)

    def rank(self, slot: int) -> int:
        return slot // self.per_rank

    def nearest(self, move: _Move) -> int:
        """The slot to copy from: on the same rank, else in the same node, else the next rank round."""
        world, to = self.world, self.rank(move.slot)

        def distance(slot: int) -> tuple[bool, bool, int, int]:
            rank = self.rank(slot)
            return rank != to, rank // world.width != to // world.width, (rank - to) % world.size, slot

        return min((slot for slot, expert in enumerate(self.table) if expert == move.expert), key=distance)

    def pieces(self, budget: int | None) -> list[_Piece]:
        """What to copy in the next step; copies inside a rank cost nothing."""
        limit = budget or self.size * len(self.table)
        sent, received = [0] * self.world.size, [0] * self.world.size
        pieces = list[_Piece]()
        for move in self.moves:
            source = self.nearest(move)
            a, b = self.rank(source), self.rank(move.slot)
            room = self.size if a == b else min(limit - sent[a], limit - received[b])
            stop = min(self.size, move.done + room)
            if stop > move.done:
                pieces.append(_Piece(move, source, move.done, stop))
                if a != b:
                    sent[a] += stop - move.done
                    received[b] += stop - move.done
        return pieces

    def ready(self) -> list[_Move]:
        """The moves that can be ended together now: the most of those that are whole, so that no expert is lost."""
        ready = {move.slot: move for move in self.moves if move.done == self.size}
        while True:
            table = [ready[slot].expert if slot in ready else expert for slot, expert in enumerate(self.table)]
            lost = set(self.table) - set(table) - self.dropped
            if not lost:
                return list(ready.values())
            for expert in lost:
                del ready[min(slot for slot in ready if self.table[slot] == expert)]

    @property
    def dropped(self) -> set[int]:
        """Experts that the new table does not have."""
        final = {move.slot: move.expert for move in self.moves}
        return set(self.table) - {final.get(slot, expert) for slot, expert in enumerate(self.table)}


def _steps(
    world: World, banks: Sequence[Tensor], old: list[int], new: list[int], budget: int | None
) -> Iterator[Tensor]:
    size = sum(bank[0].numel() * bank.element_size() for bank in banks)
    state = _State(world, list(old), len(old) // world.size, size)
    state.moves = _ordered(old, new)
    while state.moves:
        _copy(state, banks, state.pieces(budget))
        for move in state.ready():
            if move.aside is not None:
                _store(banks, move.slot % state.per_rank, move.aside)
            state.table[move.slot] = move.expert
            state.moves.remove(move)
        yield torch.tensor(state.table)


def _ordered(old: list[int], new: list[int]) -> list[_Move]:
    """The moves, such that what must come first to free a slot is begun first: less is kept aside."""
    waiting = {slot: expert for slot, expert in enumerate(new) if old[slot] != expert}
    copies = {expert: old.count(expert) for expert in set(old)}
    moves = list[_Move]()
    while waiting:
        slot = next((slot for slot in waiting if copies[old[slot]] > 1), next(iter(waiting)))
        chain = [slot]
        while copies[old[chain[-1]]] == 1:  # another slot must get this one's expert first
            after = next((s for s, expert in waiting.items() if expert == old[chain[-1]] and s not in chain), None)
            if after is None:
                break
            chain.append(after)
        for slot in reversed(chain):
            expert = waiting.pop(slot)
            copies[expert] += 1
            copies[old[slot]] -= 1
            moves.append(_Move(slot, expert))
    return moves


def _copy(state: _State, banks: Sequence[Tensor], pieces: list[_Piece]) -> None:
    """One step: every piece to the rank of its move."""
    me, ranks = state.world.rank, state.world.size
    send, receive = [0] * ranks, [0] * ranks
    out, into = list[_Piece](), list[_Piece]()
    for piece in pieces:
        a, b, length = state.rank(piece.source), state.rank(piece.move.slot), piece.stop - piece.start
        if a == me:
            send[b] += length
            out.append(piece)
        if b == me:
            receive[a] += length
            into.append(piece)
    out.sort(key=lambda piece: state.rank(piece.move.slot))
    into.sort(key=lambda piece: state.rank(piece.source))
    device = banks[0].device
    parts = [_bytes(banks, piece.source % state.per_rank, piece.start, piece.stop) for piece in out]
    sent = torch.cat(parts) if parts else torch.empty(0, dtype=torch.uint8, device=device)
    arrived = state.world.finish(state.world.exchange("whole", sent, send, receive, "migration"))
    at = 0
    for piece in into:
        move, length = piece.move, piece.stop - piece.start
        if move.aside is None:
            move.aside = torch.empty(state.size, dtype=torch.uint8, device=device)
        move.aside[piece.start : piece.stop] = arrived[at : at + length]
        at += length
    for piece in pieces:
        piece.move.done = piece.stop


def _bytes(banks: Sequence[Tensor], slot: int, start: int, stop: int) -> Tensor:
    """Bytes start..stop of a slot, its banks one after the other."""
    parts = list[Tensor]()
    for bank in banks:
        flat = bank[slot].detach().contiguous().view(-1).view(torch.uint8)
        parts.append(flat[max(start, 0) : max(stop, 0)])
        start, stop = start - len(flat), stop - len(flat)
    return torch.cat(parts)


def _store(banks: Sequence[Tensor], slot: int, data: Tensor) -> None:
    at = 0
    for bank in banks:
        with torch.inference_mode(bank.is_inference()), torch.no_grad():
            length = bank[slot].numel() * bank.element_size()
            bank[slot] = data[at : at + length].clone().view(bank.dtype).view(bank[slot].shape)
            at += length
