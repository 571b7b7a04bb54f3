"""Experts that move while the program goes on: right after every step, and no more bytes than allowed."""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sparsec.runtime.distributed import World, combine_start, combine_wait, dispatch_start, dispatch_wait, remap
from sparsec.runtime.distributed.migrate import _ordered, _State, migrate
from sparsec.runtime.errors import InputError
from tests.runtime.distributed.ranks import Ranks
from tests.runtime.distributed.test_exchange import EXPERTS, RANKS, SLOTS, H, S, bank, experts, tokens

NEW = torch.tensor([2, 0, 3, 5, 1, 6, 4, 0, 7, 0, 6, 1])  # swaps inside a rank and between, replicas that come and go
EXPERT_BYTES = 4 * H * H + 2 * H


def held(slots: Tensor, rank: int) -> list[Tensor]:
    mine = slots[rank * S : rank * S + S]
    return [bank()[mine], (torch.arange(H) + 100 * mine[:, None]).bfloat16()]


def migrate_case(world: World, budget: int | None, in_inference: bool) -> tuple[int, list[list[int]], list[int]]:
    """Steps, tables, bytes received in each step; fails where the layer is not right after a step."""
    with torch.inference_mode(in_inference):
        banks = held(SLOTS, world.rank)
    x, ids, weights = tokens((11,), 3, "random")
    want = experts(x, ids, weights, bank())
    tables, received = list[list[int]](), list[int]()
    exchange = world.exchange

    def counted(*args: Any, **kwargs: Any) -> Any:
        received.append(sum(n for rank, n in enumerate(args[3]) if rank != world.rank))
        assert sum(n for rank, n in enumerate(args[2]) if rank != world.rank) <= (budget or 10**9)
        return exchange(*args, **kwargs)

    moving = migrate(world, banks, SLOTS, NEW, budget_bytes=budget)
    while True:
        with patch.object(world, "exchange", counted):
            slots = next(moving, None)
        if slots is None:
            break
        tables.append(slots.tolist())
        shares = 1.0 / torch.bincount(slots, minlength=EXPERTS)[slots]
        where = remap(world, ids, slots, shares, experts=EXPERTS, policy="batch")
        sent = dispatch_start(world, x, where, weights, slots=S, dedup="node", algo="two_level")
        rows, local, w = dispatch_wait(sent)
        out = combine_wait(combine_start(experts(rows, local, w, banks[0].clone()), sent))
        assert torch.allclose(out, want, rtol=0, atol=1e-5)
        for found, right in zip(banks, held(slots, world.rank), strict=True):
            assert torch.equal(found, right)
    return len(tables), tables, received


@pytest.mark.parametrize("budget", [None, EXPERT_BYTES, 250])
def test_results_are_right_at_every_step(ranks: Ranks, budget: int | None) -> None:
    answers = ranks.run(migrate_case, budget, budget is None)
    steps, tables, _ = answers[0]
    assert all(answer[:2] == (steps, tables) for answer in answers)
    assert tables[-1] == NEW.tolist()
    assert all(max(received, default=0) <= (budget or 10**9) for _, _, received in answers)
    assert (steps > 1) == (budget is not None), tables
    moved = sum(sum(received) for _, _, received in answers)
    across = [slot for slot in range(len(NEW)) if NEW[slot] not in SLOTS[slot // S * S : slot // S * S + S]]
    assert moved == len(across) * EXPERT_BYTES  # what the rank has already is not sent


def test_a_lone_process_moves_inside() -> None:
    banks = [torch.arange(4.0)[:, None].expand(4, 3).clone()]
    steps = list(migrate(World.of(), banks, torch.arange(4), torch.tensor([3, 0, 1, 2]), budget_bytes=1))
    assert [step.tolist() for step in steps] == [[3, 0, 1, 2]]
    assert banks[0][:, 0].tolist() == [3, 0, 1, 2]


@settings(max_examples=200, deadline=None)
@given(data=st.data(), ranks=st.sampled_from([1, 2, 4]), per_rank=st.integers(1, 4))
def test_no_expert_is_ever_lost(data: st.DataObject, ranks: int, per_rank: int) -> None:
    """Any two tables: every step makes progress, copies come from slots that hold the expert, and the end is right."""
    total = ranks * per_rank
    several = data.draw(st.integers(1, total))
    table = st.lists(st.integers(0, several - 1), min_size=total, max_size=total)
    old = data.draw(table)
    new = [expert if expert in old else old[0] for expert in data.draw(table)]
    state = _State(World(0, ranks, 1, 1.0), list(old), per_rank, 10, _ordered(old, new))
    assert sorted(move.slot for move in state.moves) == [slot for slot in range(total) if old[slot] != new[slot]]
    for _ in range(20 * total):
        if not state.moves:
            break
        pieces = state.pieces(data.draw(st.sampled_from([1, 4, 15, None])))
        ended = list(state.ready())
        assert pieces or ended
        for piece in pieces:
            assert state.table[piece.source] == piece.move.expert
            piece.move.done = piece.stop
        for move in state.ready():
            state.table[move.slot] = move.expert
            state.moves.remove(move)
        assert set(new) <= set(state.table)
    assert state.table == new


def test_wrong_tables_are_refused() -> None:
    world, banks = World.of(), [torch.zeros(2, 3)]
    with pytest.raises(InputError, match="expert 7 is in no old slot"):
        migrate(world, banks, torch.tensor([0, 1]), torch.tensor([0, 7]))
    with pytest.raises(InputError, match="do not fit 1 ranks"):
        migrate(world, banks, torch.tensor([0, 1, 2]), torch.tensor([0, 1, 2]))
    with pytest.raises(InputError, match="moves nothing"):
        migrate(world, banks, torch.tensor([0, 1]), torch.tensor([1, 0]), budget_bytes=0)
    assert len(SLOTS) == RANKS * S
