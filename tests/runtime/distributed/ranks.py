"""Processes that are ranks of a world, started once and given functions to run together."""

from __future__ import annotations

import importlib
import os
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import TCPStore

TIMEOUT = 30.0


class Ranks:
    """`size` gloo processes as nodes of `width`. The store by which they meet is of this process, as under torchrun.

    With `holds_store`, rank 0 has it instead.
    """

    def __init__(self, size: int = 4, width: int = 2, timeout: float = TIMEOUT, holds_store: bool = False) -> None:
        context = get_context("forkserver")  # which imports PyTorch once for all of them
        context.set_forkserver_preload(["torch", "sparsec.runtime.distributed"])
        self._store = None if holds_store else TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        port = _free_port() if self._store is None else self._store.port
        self.pipes: list[Connection] = []
        self.processes: list[Any] = []
        for rank in range(size):
            here, there = context.Pipe()
            given = (rank, size, width, timeout, port, holds_store, there)
            process = context.Process(target=_serve, args=given, daemon=True)
            process.start()
            there.close()
            self.pipes.append(here)
            self.processes.append(process)

    def run(self, case: Callable[..., Any], *args: Any) -> list[Any]:
        """`case(world, *args)` on every rank, a function of a module. -> what each returns."""
        self.start(case, *args)
        answers = [self.answer(rank) for rank in range(len(self.pipes))]
        failed = [f"rank {rank}: {text}" for rank, (ok, text) in enumerate(answers) if not ok]
        assert not failed, "\n".join(failed)
        return [value for _, value in answers]

    def start(self, case: Callable[..., Any], *args: Any) -> None:
        for pipe in self.pipes:
            pipe.send((case.__module__, case.__name__, args))

    def answer(self, rank: int, seconds: float = 2 * TIMEOUT) -> tuple[bool, Any]:
        """What a rank returned, or the text of what it raised."""
        assert self.pipes[rank].poll(seconds), f"rank {rank} hangs"
        return self.pipes[rank].recv()

    def close(self) -> None:
        for pipe in self.pipes:
            pipe.close()
        for process in self.processes:
            process.join(5)
            if process.is_alive():
                process.kill()
                process.join()


def _free_port() -> int:
    import socket

    with socket.socket() as made:
        made.bind(("127.0.0.1", 0))
        return int(made.getsockname()[1])


def _serve(
    rank: int, size: int, width: int, timeout: float, port: int, holds_store: bool, pipe: Connection
) -> None:  # fmt: skip
    from sparsec.runtime.distributed import World

    torch.set_num_threads(1)
    patience = timedelta(seconds=TIMEOUT)
    holder = holds_store and rank == 0
    store = TCPStore("127.0.0.1", port, is_master=holder, wait_for_workers=False, timeout=patience)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=patience)
    world = World.of(width=width, timeout=timeout)
    while True:
        try:
            module, name, args = pipe.recv()
        except EOFError:
            break
        try:
            answer = True, getattr(importlib.import_module(module), name)(world, *args)
        except Exception as error:
            answer = False, f"{type(error).__name__}: {error}\n{traceback.format_exc()}"
        pipe.send(answer)
    world.close()
    dist.destroy_process_group()
    os._exit(0)  # taking down an interpreter with PyTorch in it takes longer than most tests
