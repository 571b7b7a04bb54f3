"""The processes that torchrun started, as one world."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def joined() -> Iterator[tuple[int, int]]:
    """Join the other processes of torchrun for as long as the block takes; none where torchrun did not start this one.

    Yields: rank and number of processes.
    """
    size = int(os.environ.get("WORLD_SIZE", "1")) if "RANK" in os.environ else 1
    if size == 1:
        yield 0, 1
        return
    import torch
    from torch import distributed

    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    distributed.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    try:
        yield distributed.get_rank(), size
    finally:
        distributed.destroy_process_group()


def wait_for_all(size: int) -> None:
    """Wait until all processes are here, however long they take to load."""
    if size > 1:
        from torch import distributed

        distributed.barrier()
