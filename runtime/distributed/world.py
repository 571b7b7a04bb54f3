"""The ranks that run a program together, and what they exchange."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from sparsec.runtime.distributed.transport import Collectives, Transport, missing
from sparsec.runtime.distributed.watch import Watch
from sparsec.runtime.errors import InputError, RankError

Span = Literal["whole", "rail", "node"]
"""Whom an exchange is with: all ranks; those of the same index in all nodes; those of the same node."""

SPANS: tuple[Span, ...] = ("whole", "rail", "node")
SLICE = 0.5
"""Seconds of waiting after which a rank looks whether others have given up."""


@dataclass
class Pending:
    """Rows under way. `out` is whole once the world has finished it."""

    out: Tensor
    work: Any = None
    what: str = ""


@dataclass
class World:
    """Ranks 0..size-1 in nodes of `width` ranks each, in order.

    Args:
        rank: this process.
        groups: the process group of each span; none where a span is this rank alone.
        timeout: seconds that an exchange may take, finding out who is missing included.
        links: [size, size] int64 on the CPU, rows that this rank sent by dispatches since `reset_links`: its own row of
            the matrix from -> to, rows that stay on the rank included. A combine sends the same rows back. Of a
            two-level dispatch both hops count, the second one from the rank in between. What autograd sends backward
            and what `migrate` moves does not count.
    """

    rank: int
    size: int
    width: int
    timeout: float
    groups: dict[str, Any] = field(default_factory=dict)
    transport: Transport | None = None
    watch: Watch | None = None
    links: Tensor = field(init=False)
    _broken: str = ""

    def __post_init__(self) -> None:
        self.reset_links()

    @classmethod
    def of(
        cls,
        group: Any = None,
        width: int | None = None,
        timeout: float = 60.0,
        transport: Transport | str = "collectives",
    ) -> World:
        """The world of this process. Every rank of it must call this.

        A process in which `torch.distributed` was not initialised is a world of its own.

        Args:
            group: a process group, or a DeviceMesh of (ranks) or (nodes, ranks of a node); all ranks if left out. The
                world numbers its ranks in ascending order.
            width: ranks per node; without it what the mesh or torchrun (LOCAL_WORLD_SIZE) says, else all ranks are one
                node.
            timeout: seconds.
            transport: "collectives", or an object that moves rows by other means.

        Raises:
            InputError: the ranks do not fill nodes of this width, or there is no such transport here.
            RankError: not all ranks came.
        """
        if isinstance(transport, str) and transport != "collectives":
            known = transport in ("symm_mem", "deep_ep")
            raise InputError(missing(transport) if known else f"there is no transport '{transport}'")
        if not dist.is_available() or not dist.is_initialized():
            if width not in (None, 1):
                raise InputError(f"a lone process is a world of 1 rank, not of nodes of {width}: start it by torchrun")
            return cls(0, 1, 1, timeout)
        if isinstance(group, DeviceMesh):
            ranks = sorted(group.mesh.flatten().tolist())
            width = width or (group.size(1) if group.ndim == 2 else None)
        else:
            ranks = sorted(dist.get_process_group_ranks(group if group is not None else dist.group.WORLD))
        rank, size = ranks.index(dist.get_rank()), len(ranks)
        if width is None:
            local = int(os.environ.get("LOCAL_WORLD_SIZE", size))
            width = local if 0 < local <= size and size % local == 0 else size
        if width < 1 or size % width:
            raise InputError(f"{size} ranks do not fill nodes of {width} ranks")
        world = cls(rank, size, width, timeout, transport=Collectives() if isinstance(transport, str) else transport)
        made = dict[range, Any]()
        for span in SPANS:
            members = world.members(span)
            if len(members) > 1 and members not in made:
                made[members] = _group([ranks[member] for member in members], timeout)
            world.groups[span] = made.get(members)
        if size > 1:
            world.watch = Watch(rank, size, world.groups["whole"].group_name)
        return world

    @property
    def nodes(self) -> int:
        return self.size // self.width

    def members(self, span: Span) -> range:
        """The ranks of a span that this rank is in."""
        if span == "whole":
            return range(self.size)
        if span == "rail":
            return range(self.rank % self.width, self.size, self.width)
        first = self.rank - self.rank % self.width
        return range(first, first + self.width)

    def reset_links(self) -> None:
        self.links = torch.zeros(self.size, self.size, dtype=torch.int64)

    def all_links(self) -> Tensor:
        """[size, size], the links of all ranks. Every rank must call this."""
        return self.gather(self.links[self.rank].to(self._device())).cpu()

    def exchange(self, span: Span, rows: Tensor, send: Sequence[int], receive: Sequence[int], what: str) -> Pending:
        """Start to send rows [sum(send), ...], in the order of the span's ranks. Raises: RankError."""
        self._check()
        group = self.groups.get(span)
        if group is None:
            return Pending(rows)
        assert self.transport is not None
        try:
            out, work = self.transport.all_to_all(group, rows, send, receive)
        except RuntimeError as error:
            raise self._failure(what, error) from error
        return Pending(out, work, what)

    def counts(self, span: Span, send: Tensor, what: str) -> tuple[list[int], list[int]]:
        """How many rows go to each rank of a span, and how many come from each. Raises: RankError."""
        ones = [1] * len(send)
        receive = self.finish(self.exchange(span, send, ones, ones, what))
        return send.tolist(), receive.tolist()

    def gather(self, tensor: Tensor) -> Tensor:
        """[size, ...]: the tensor of every rank; they have the same shape and dtype. Raises: RankError."""
        self._check()
        group = self.groups.get("whole")
        if group is None:
            return tensor[None]
        assert self.transport is not None
        try:
            out, work = self.transport.all_gather(group, tensor)
        except RuntimeError as error:
            raise self._failure("gather", error) from error
        return self.finish(Pending(out, work, "gather"))

    def all_true(self, flag: bool) -> bool:
        """Whether the flag is set on every rank. Every rank must call this. Raises: RankError."""
        return bool(self.gather(torch.tensor([flag], dtype=torch.uint8, device=self._device())).all())

    def finish(self, pending: Pending) -> Tensor:
        """Wait for rows that are under way.

        Raises:
            RankError: a rank is dead or does not answer within the timeout.
        """
        if pending.work is None:
            return pending.out
        self._check()
        assert self.watch is not None
        try:
            if pending.out.is_cuda:
                pending.work.wait()  # in the order of the stream; NCCL's own watchdog has the group's timeout
            else:
                self.watch.wait(pending.work, self.timeout, SLICE)
        except RuntimeError as error:
            raise self._failure(pending.what, error) from error
        return pending.out

    def _device(self) -> torch.device:
        """Where the backend takes small tensors."""
        nccl = self.size > 1 and "nccl" in dist.get_backend(self.groups["whole"])
        return torch.device("cuda", torch.cuda.current_device()) if nccl else torch.device("cpu")

    def close(self) -> None:
        """Leave the groups that this world made."""
        for group in {id(group): group for group in self.groups.values() if group is not None}.values():
            dist.destroy_process_group(group)
        self.groups, self._broken = {}, "it was closed"

    def _check(self) -> None:
        if self._broken:
            raise RankError(f"this world of {self.size} ranks cannot be used any more: {self._broken}")

    def _failure(self, what: str, error: RuntimeError) -> RankError:
        assert self.watch is not None
        who = self.watch.missing(what, min(2.0, self.timeout / 4))
        reason = str(error).splitlines()[0]
        self._broken = f"{who} in '{what}'"
        return RankError(
            f"rank {self.rank} of {self.size}: {who} in '{what}' ({reason})\n"
            "  hint: look at that rank's own output for the first error, then start all ranks again; "
            f"if it was only slow, give World.of a timeout above {self.timeout:g} s"
        )


def _group(ranks: list[int], timeout: float) -> Any:
    try:
        return dist.new_group(ranks, timeout=timedelta(seconds=timeout), use_local_synchronization=True)
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise RankError(
            f"ranks {', '.join(map(str, ranks))} did not all call World.of in time ({timeout:g} s: {reason})\n"
            "  hint: look at the output of each of them for the first error, then start all ranks again"
        ) from error
