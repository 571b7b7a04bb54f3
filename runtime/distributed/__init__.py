"""Expert parallelism on `torch.distributed`: tokens go to the ranks that hold their experts, and results come back.

Every rank runs the same program. Each of R ranks has S slots per layer, and slot p of P = R * S lives on rank p // S.
Placement tables (which expert is in which slot, and what share of its tokens a slot gets) are tensors, so a new plan
is a change of their values.

    world = World.of()
    where = remap(world, ids, slots, shares, experts=64)
    sent = dispatch_start(world, x, where, weights, slots=S, dedup="node", algo="two_level")
    shared = shared_expert(x)                     # while rows are under way
    rows, local, w = dispatch_wait(sent)
    y = experts(rows, local, w, up, down)         # banks of this rank: [S, ...]
    out = shared + combine_wait(combine_start(y, sent))
"""

from __future__ import annotations

from sparsec.runtime.distributed.exchange import (
    Combine,
    Dispatch,
    combine_start,
    combine_wait,
    dispatch_start,
    dispatch_wait,
)
from sparsec.runtime.distributed.layer import experts_layer, same_gradients
from sparsec.runtime.distributed.migrate import migrate
from sparsec.runtime.distributed.remap import remap
from sparsec.runtime.distributed.world import World
from sparsec.runtime.errors import RankError

__all__ = [
    "Combine",
    "Dispatch",
    "RankError",
    "World",
    "combine_start",
    "combine_wait",
    "dispatch_start",
    "dispatch_wait",
    "experts_layer",
    "migrate",
    "remap",
    "same_gradients",
]
