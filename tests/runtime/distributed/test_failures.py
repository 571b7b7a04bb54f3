"""A rank that dies or hangs in the middle of a step ends in a RankError on all others, in time, that names it."""

from __future__ import annotations

import os
import signal
import time

import pytest
import torch

from sparsec.runtime.distributed import World, combine_start, combine_wait, dispatch_start, dispatch_wait
from sparsec.runtime.errors import RankError
from tests.runtime.distributed.ranks import Ranks

PATIENCE = 5.0


def failing_case(world: World, victim: int, how: int, at: str) -> tuple[str, str, float]:
    """Steps of a layer; in the third one the victim gets a signal. -> both errors' texts, seconds until the first."""
    x, where = torch.ones(6, 4), torch.arange(6)[:, None] % world.size
    begin = time.monotonic()
    text = ""
    try:
        for step in range(5):
            begin = time.monotonic()
            if step == 2 and world.rank == victim and at == "before":
                os.kill(os.getpid(), how)
            sent = dispatch_start(world, x, where, torch.ones(6, 1), slots=1, algo="two_level")
            if step == 2 and world.rank == victim and at == "between":
                os.kill(os.getpid(), how)
            rows, _, _ = dispatch_wait(sent)
            combine_wait(combine_start(rows, sent))
    except RankError as error:
        text = str(error)
    seconds = time.monotonic() - begin
    try:
        world.all_true(True)
    except RankError as error:
        return text, str(error), seconds
    return text, "", seconds


@pytest.mark.parametrize(
    ("size", "victim", "how", "at", "holds_store"),
    [
        (4, 2, signal.SIGKILL, "between", False),
        (4, 1, signal.SIGSTOP, "between", False),
        (3, 0, signal.SIGKILL, "before", True),
        pytest.param(3, 0, signal.SIGSTOP, "before", True, marks=pytest.mark.slow),
    ],
    ids=["killed", "hanging", "killed with the store", "hanging with the store"],
)
def test_all_others_end(size: int, victim: int, how: int, at: str, holds_store: bool) -> None:
    ranks = Ranks(size, 2 if size == 4 else 1, timeout=PATIENCE, holds_store=holds_store)
    try:
        ranks.start(failing_case, victim, how, at)
        for rank in range(size):
            if rank == victim:
                continue
            ok, answer = ranks.answer(rank)
            assert ok, answer
            text, again, seconds = answer
            assert f"rank {rank} of {size}: " in text
            assert "hint: look at that rank's own output" in text
            assert seconds < (PATIENCE if how == signal.SIGKILL else PATIENCE + 3)
            named = "that holds the store (rank 0" if holds_store else f"rank {victim} does not answer"
            assert named in text, text
            assert "cannot be used any more" in again
    finally:
        pid = ranks.processes[victim].pid
        if how == signal.SIGSTOP:
            os.kill(pid, signal.SIGKILL)
        ranks.close()
    codes = [process.exitcode for process in ranks.processes]
    assert codes[victim] == -signal.SIGKILL
    assert all(code == 0 for rank, code in enumerate(codes) if rank != victim), codes


def absent_case(world: World) -> tuple[str, float]:
    begin = time.monotonic()
    if world.rank == 3:
        return "", 0.0
    try:
        World.of(width=2, timeout=1.0)
    except RankError as error:
        return str(error), time.monotonic() - begin
    return "no error", 0.0


@pytest.mark.slow
def test_a_rank_that_makes_no_world_is_an_error_on_the_others(ranks: Ranks) -> None:
    for text, seconds in ranks.run(absent_case)[:3]:
        assert "ranks 0, 1, 2, 3 did not all call World.of in time (1 s" in text
        assert seconds < 15  # gloo tries some times to reach the rank
