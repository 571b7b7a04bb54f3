"""Who is missing: ranks whose exchange fails tell each other, and name those that do not tell anything."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch.distributed as dist


class Watch:
    """A rank's view of the others, through the store by which they met.

    The store is asked by threads of its own, since whoever holds it may be the one who hangs.

    Args:
        name: of the world, the same on all its ranks.
    """

    def __init__(self, rank: int, size: int, name: str) -> None:
        self.rank, self.size = rank, size
        self.failed = threading.Event()
        store: Any = dist.distributed_c10d._get_default_store()
        self._store: Any = store.clone()  # a connection of its own
        self._key = f"sparsec/{name}"
        self._looking: threading.Thread | None = None

    def wait(self, work: Any, timeout: float, slice: float) -> None:
        """Wait for work, no longer than until another rank has given up.

        Raises: RuntimeError.
        """
        give_up = time.monotonic() + timeout - min(2.0, timeout / 4)  # the rest is for finding out who is missing
        while True:
            left = max(give_up - time.monotonic(), 0.001)
            try:
                work.wait(timedelta(seconds=min(slice, left)))
                return
            except RuntimeError:
                if work.is_completed():
                    raise
            if self.failed.is_set():
                raise RuntimeError("another rank has given up")
            if time.monotonic() >= give_up:
                raise RuntimeError(f"no answer for {timeout:g} s")
            if self._looking is None or not self._looking.is_alive():
                self._looking = _start(self._look)

    def missing(self, what: str, seconds: float) -> str:
        """Tell the others that this rank has given up, and wait that long for those who tell the same.

        Returns: who did not, as the start of a sentence.
        """
        heard = {self.rank}
        asked = threading.Event()

        def tell() -> None:
            self._store.set(f"{self._key}/failed", what)
            self._store.set(f"{self._key}/alive/{self.rank}", what)
            end = time.monotonic() + seconds
            while len(heard) < self.size and time.monotonic() < end:
                heard.update(r for r in range(self.size) if self._store.check([f"{self._key}/alive/{r}"]))
                asked.set()
                time.sleep(0.02)

        thread = _start(tell)
        thread.join(seconds + 0.1)
        silent = sorted(set(range(self.size)) - heard)
        if not asked.is_set():
            return "the process that holds the store (rank 0, or torchrun) does not answer"
        if not silent:
            return "all ranks answer, but an exchange failed"
        if len(silent) == 1:
            return f"rank {silent[0]} does not answer: it is dead, hangs or is busy elsewhere"
        return f"ranks {', '.join(map(str, silent))} do not answer: they are dead, hang or are busy elsewhere"

    def _look(self) -> None:
        if self._store.check([f"{self._key}/failed"]):
            self.failed.set()


def _start(run: Callable[[], None]) -> threading.Thread:
    def guarded() -> None:
        try:
            run()
        except RuntimeError:  # the store is gone: whoever waits for the answer says so
            return

    thread = threading.Thread(target=guarded, daemon=True)
    thread.start()
    return thread
