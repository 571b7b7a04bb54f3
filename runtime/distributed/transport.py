"""How rows get to other ranks: one interface, and the collectives of `torch.distributed` behind it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, cast

import torch.distributed as dist
from torch import Tensor


class Transport(Protocol):
    """Moves rows between the ranks of a process group. Both calls return what will be there once the work is done."""

    def all_to_all(
        self, group: dist.ProcessGroup, rows: Tensor, send: Sequence[int], receive: Sequence[int]
    ) -> tuple[Tensor, dist.Work]:
        """Rows [sum(send), ...] for the group's ranks in order -> rows [sum(receive), ...] from them in order."""
        ...

    def all_gather(self, group: dist.ProcessGroup, tensor: Tensor) -> tuple[Tensor, dist.Work]:
        """-> [ranks of the group, *tensor.shape], the same on all of them."""
        ...


class Collectives:
    """The collectives of whatever backend a process group has (gloo, NCCL)."""

    def all_to_all(
        self, group: dist.ProcessGroup, rows: Tensor, send: Sequence[int], receive: Sequence[int]
    ) -> tuple[Tensor, dist.Work]:
        out = rows.new_empty(sum(receive), *rows.shape[1:])
        work = dist.all_to_all_single(out, rows.contiguous(), list(receive), list(send), group=group, async_op=True)
        return out, cast(dist.Work, work)

    def all_gather(self, group: dist.ProcessGroup, tensor: Tensor) -> tuple[Tensor, dist.Work]:
        flat = tensor.reshape(-1).contiguous()
        out = flat.new_empty(group.size() * flat.numel())
        all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # the older name
        work = all_gather(out, flat, group=group, async_op=True)
        return out.view(group.size(), *tensor.shape), cast(dist.Work, work)
