"""Which replica of its expert a token goes to, before any rank has run: by the runtime's own rule, for all ranks."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sparsec.diagnostics import SparsecError

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]

POLICIES = ("static", "local", "batch")


@dataclass(frozen=True)
class Table:
    """One layer's placement.

    Args:
        slots: [P], the expert in each slot; as many slots on each rank.
        shares: [P], of the expert's tokens.
        width: ranks per node.
    """

    slots: Ints
    shares: Floats
    experts: int
    ranks: int
    width: int

    @property
    def rank_of_slot(self) -> Ints:
        return np.arange(len(self.slots)) // (len(self.slots) // self.ranks)


def remap(table: Table, ids: list[Ints], policy: str = "static") -> list[Ints]:
    """The slot of every pick of every rank.

    Args:
        ids: per rank [T, k], experts; outside of 0..experts-1: skip.

    Returns: per rank [T, k]; P: skip.

    Raises:
        SparsecError: there is no such policy.
    """
    import torch

    from sparsec.runtime.distributed.remap import count, physical

    if policy not in POLICIES:
        raise SparsecError(f"there is no policy '{policy}'\n  hint: {', '.join(POLICIES)}")
    given = [torch.from_numpy(one) for one in ids]
    slots, shares = torch.from_numpy(table.slots), torch.from_numpy(table.shares)
    counts = torch.stack([count(one, table.experts) for one in given]) if policy == "batch" else None
    size = {"experts": table.experts, "ranks": table.ranks, "width": table.width}
    return [
        physical(one, slots, shares, rank=rank, policy=policy, counts=counts, **size).numpy()
        for rank, one in enumerate(given)
    ]
