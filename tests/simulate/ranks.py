"""One of 4 ranks, as 2 nodes of 2: every dispatch variant on the tokens of a file, and the rows that were counted."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from sparsec.runtime.distributed import World, combine_start, combine_wait, dispatch_start, dispatch_wait, remap

RANKS, WIDTH = 4, 2
VARIANTS = (("none", "flat"), ("rank", "flat"), ("none", "two_level"), ("rank", "two_level"), ("node", "two_level"))
POLICIES = ("static", "local", "batch")


def main(folder: Path, rank: int) -> None:
    """Run all variants, and write what rank 0 gathered."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=RANKS)
    given = np.load(folder / "given.npz")
    ids, slots, shares = (torch.from_numpy(given[name]) for name in (f"ids{rank}", "slots", "shares"))
    world = World.of(width=WIDTH, timeout=30)
    x, weights = torch.randn(len(ids), 8), torch.rand(ids.shape)
    found: dict[str, np.ndarray] = {}
    for policy in POLICIES:
        where = remap(world, ids, slots, shares, experts=int(given["experts"]), policy=policy)
        for dedup, algo in VARIANTS:
            world.reset_links()
            sent = dispatch_start(world, x, where, weights, slots=len(slots) // RANKS, dedup=dedup, algo=algo)
            rows, local, _ = dispatch_wait(sent)
            combine_wait(combine_start(rows, sent))
            held = torch.bincount(local.flatten(), minlength=len(slots) // RANKS + 1)[: len(slots) // RANKS]
            found[f"{policy} {dedup} {algo} links"] = world.all_links().numpy()
            found[f"{policy} {dedup} {algo} picks"] = world.gather(held).flatten().numpy()
    if rank == 0:
        np.savez(folder / "found.npz", allow_pickle=False, **found)
    world.close()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
