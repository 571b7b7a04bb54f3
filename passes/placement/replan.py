"""What a new plan changes of an old one, and how much each layer may change."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sparsec.diagnostics import SparsecError
from sparsec.passes.placement.loads import Loads
from sparsec.passes.placement.plan_file import Plan
from sparsec.passes.placement.search import Ranks
from sparsec.passes.placement.split import best_split

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]


def check_old(old: Plan, loads: Loads, size: Sequence[int]) -> None:
    """Raises: SparsecError unless a plan is of the model that was measured, and of ranks with so many slots."""
    shown = [f"{len(layers)} layers ({layers[0]} to {layers[-1]})" for layers in (old.layers, loads.layers)]
    for what, has, wanted in (
        ("experts per layer", old.experts, loads.counts.shape[2]),
        ("layers", shown[0] if old.layers != loads.layers else "", shown[1] if old.layers != loads.layers else ""),
        ("ranks", len(old.size), len(size)),
        ("slots", sum(old.size), sum(size)),
    ):
        if has != wanted:
            raise SparsecError(
                f"the old plan is of another model or of other devices: its {what} are {has}, not {wanted}\n"
                "  hint: plan without it, or with the slots and topology that it has"
            )
    if list(old.size) != list(size):
        rank = next(rank for rank, (one, two) in enumerate(zip(old.size, size, strict=True)) if one != two)
        raise SparsecError(f"the old plan has {old.size[rank]} slots on rank {rank}, the topology {size[rank]}")


def limits(old: Ints, shares: Floats, ranks: Ranks, moves: int) -> Ints:
    """Share the moves out over the layers, most to those that the old placement balances worst. -> [layers].

    Args:
        old: [layers, slots].
        shares: [scenarios, layers, experts], whose mean load of a rank is 1.
    """
    mean = shares.mean(0)
    over = np.array([best_split(row, mean[layer], ranks)[1] - 1 for layer, row in enumerate(old)]) + 1e-3
    exact = over / over.sum() * moves
    result = np.floor(exact).astype(np.int64)
    rest = np.argsort(-(exact - result), kind="stable")[: moves - int(result.sum())]
    result[rest] += 1
    return result


def new_on_ranks(old: Ints, slots: Ints, of_slot: Ints, experts: int) -> NDArray[np.bool_]:
    """Slots whose rank did not hold that expert. [layers, slots]."""
    holds = np.zeros((len(old), int(of_slot.max()) + 1, experts), np.bool_)
    holds[np.arange(len(old))[:, None], of_slot, old] = True
    return ~holds[np.arange(len(old))[:, None], of_slot, slots]


def moved(old: Plan, new: Plan, expert_bytes: float) -> dict[str, Any]:
    """How many experts each rank must load anew, and their bytes."""
    fresh = new_on_ranks(old.slots, new.slots, new.rank_of_slot, new.experts)
    by_rank = np.bincount(new.rank_of_slot, fresh.sum(0), len(new.size)).astype(int)
    return {
        "experts": int(fresh.sum()),
        "bytes": float(fresh.sum() * expert_bytes),
        "by_rank": by_rank.tolist(),
        "by_layer": fresh.sum(1).tolist(),
    }
