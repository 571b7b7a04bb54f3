"""A load that no placement can beat."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]


def lower_bound(loads: Floats, size: Ints, speed: Floats) -> Floats:
    """The least load that the fullest rank can have, over its speed, whatever the placement and the split.

    No slot can hold more than T times the fastest speed, so an expert needs ceil(load / (T * fastest)) slots, and
    all of them must fit; and the mean cannot be beaten. Without spare slots the hottest expert's rank is full of
    others, at best of the coldest.

    Args:
        loads: [..., experts].
        size: [ranks], the slots of each.
        speed: [ranks].

    Returns:
        [...], in the unit of the loads.
    """
    slots = int(size.sum())
    flat = loads.reshape(-1, loads.shape[-1])
    fastest = float(speed.max())
    mean = flat.sum(1) / float(speed.sum())
    low, high = mean.copy(), np.maximum(mean, flat.max(1) / fastest)
    for _ in range(60):
        middle = (low + high) / 2
        with np.errstate(divide="ignore", invalid="ignore"):
            needed = np.ceil(flat / (middle * fastest)[:, None] - 1e-9)
        fits = np.maximum(np.nan_to_num(needed, nan=1.0), 1).sum(1) <= slots
        low, high = np.where(fits, low, middle), np.where(fits, middle, high)
    first = np.maximum(np.nan_to_num(np.ceil(flat / np.maximum(mean * fastest, 1e-300)[:, None] - 1e-9)), 1).sum(1)
    bound = np.where(first <= slots, mean, low)
    if slots == flat.shape[1]:
        ordered = np.sort(flat, axis=1)
        bound = np.maximum(bound, (ordered[:, -1] + ordered[:, : int(size.min()) - 1].sum(1)) / fastest)
    return bound.reshape(loads.shape[:-1])
