"""Interleaved timing: every engine in every round, in a random order."""

from __future__ import annotations

import gc
import os
import random
import time
from collections.abc import Callable, Mapping
from pathlib import Path

Run = Callable[[int], object]
MIN_ROUNDS = 3


def interleave(
    runs: Mapping[str, Run], *, clock: Callable[[], float], rounds: int, seconds: float
) -> dict[str, list[float]]:
    """Milliseconds of each call by name. `runs[name](turn)` is called once a round, turn 0, 1, ...

    Ends after `rounds`, or after `seconds` if there were `MIN_ROUNDS` by then.
    """
    taken: dict[str, list[float]] = {name: [] for name in runs}
    order = random.Random(0)
    began = time.perf_counter()
    gc.collect()
    gc.disable()
    try:
        for turn in range(rounds):
            if turn >= MIN_ROUNDS and time.perf_counter() - began > seconds:
                break
            for name in order.sample(list(runs), len(runs)):
                run = runs[name]
                start = clock()
                run(turn)
                taken[name].append((clock() - start) * 1e3)
    finally:
        gc.enable()
    return taken


def clock_for(threads: int) -> tuple[str, Callable[[], float]]:
    """What is measured: CPU time of the process for one thread, which other load does not change; wall time else."""
    return ("cpu", time.process_time) if threads == 1 else ("wall", time.perf_counter)


class Foreign:
    """The share of the processors' time that other processes took since this was made; None where unknown."""

    def __init__(self) -> None:
        self._busy, self._own = self._read(), time.process_time()
        self._began = time.perf_counter()

    def share(self) -> float | None:
        now, wall = self._read(), time.perf_counter() - self._began
        if now is None or self._busy is None or wall < 0.2:  # the kernel counts in hundredths of a second
            return None
        others = now - self._busy - (time.process_time() - self._own)
        return round(min(1.0, max(0.0, others / (wall * (os.cpu_count() or 1)))), 3)

    @staticmethod
    def _read() -> float | None:
        """Seconds that the processors were busy since the machine started."""
        try:
            fields = [int(field) for field in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]]
        except (OSError, ValueError):
            return None
        user, nice, system, _, _, irq, softirq, steal, *_ = fields
        return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")
