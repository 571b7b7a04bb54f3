"""Ranks that run one program together in one process: a thread for each, which meet where values are exchanged."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier, BrokenBarrierError
from typing import Any, TypeVar

from sparsec.diagnostics import CompileError
from sparsec.ir.opdef import Peers

PATIENCE = 120.0
"""Seconds that ranks wait for one that does not come."""

ResultT = TypeVar("ResultT")


class Alone:
    """A rank that exchanges nothing: the only one, or one whose weights are computed."""

    count = 1

    def __init__(self, rank: int = 0) -> None:
        self.rank = rank

    def gather(self, value: Any) -> list[Any]:
        return [value]


class _Peer:
    """One of several ranks; they share the list and the barrier."""

    def __init__(self, rank: int, given: list[Any], barrier: Barrier) -> None:
        self.rank, self.count, self.given, self.barrier = rank, len(given), given, barrier

    def gather(self, value: Any) -> list[Any]:
        self.given[self.rank] = value
        self._meet()
        found = list(self.given)
        self._meet()  # nobody gives the next value before all have this one
        return found

    def _meet(self) -> None:
        try:
            self.barrier.wait(PATIENCE)
        except BrokenBarrierError:
            raise _StoppedError from None


class _StoppedError(Exception):
    """Another rank failed, or did not come."""


def run_together(count: int, run: Callable[[Peers], ResultT]) -> list[ResultT]:
    """What `run` gives on each of `count` ranks.

    Raises: what the first rank that failed raised; the others are stopped. CompileError where a rank waits in vain.
    """
    given, barrier = [None] * count, Barrier(count)

    def one(rank: int) -> ResultT:
        try:
            return run(_Peer(rank, given, barrier))
        except BaseException:
            barrier.abort()
            raise

    with ThreadPoolExecutor(count, thread_name_prefix="rank") as pool:
        runs = [pool.submit(one, rank) for rank in range(count)]
    failed = [error for run_ in runs if (error := run_.exception()) is not None]
    if not failed:
        return [run_.result() for run_ in runs]
    cause = next((error for error in failed if not isinstance(error, _StoppedError)), None)
    if cause is None:
        raise CompileError(f"a rank did not reach an exchange within {PATIENCE:.0f} s")
    raise cause
