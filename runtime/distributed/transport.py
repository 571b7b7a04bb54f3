"""How rows get to other ranks: one interface, and the collectives of `torch.distributed` behind it.

`World.of` takes any object of this interface. Symmetric memory and DeepEP are looked for and never needed: sparsec has
no code for them that was ever run, so it says what is there and goes no further.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from typing import Protocol, cast

import torch
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


def missing(name: str) -> str:
    """Why the transport "symm_mem" or "deep_ep" cannot be taken here, as a sentence. Loads neither."""
    if not torch.cuda.is_available():
        return f"transport '{name}' needs CUDA devices, and this process sees none"
    if name == "deep_ep" and importlib.util.find_spec("deep_ep") is None:
        return "transport 'deep_ep' needs the package deep_ep, which is not installed"
    if name == "symm_mem" and not _has_nvshmem():
        return "transport 'symm_mem' needs a PyTorch with NVSHMEM, and this one was built without it"
    return f"transport '{name}' is installed here, but sparsec has no code for it that was ever run"


def _has_nvshmem() -> bool:
    if importlib.util.find_spec("torch.distributed._symmetric_memory") is None:
        return False
    from torch.distributed import _symmetric_memory

    return _symmetric_memory.is_nvshmem_available()
