"""Loads to hold on: those measured, and others near them, which stand for traffic that nobody has seen yet."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

STEADINESS = 12_000.0
"""How closely a batch's expert probabilities follow the average (Dirichlet); from imbalances published for 32 ranks."""


SURGE = 0.25
"""How likely an expert is as hot as in the scenario where it was hottest."""


def drifted(counts: Floats, number: int, rng: np.random.Generator, drift: float = 0.3) -> Floats:
    """Scenarios of other traffic: a measured one, some experts as hot as ever measured, and each shifted by chance.

    Args:
        counts: [scenarios, layers, experts].
        number: how many to return, the measured ones first.
        drift: standard deviation of the loads' logarithms.

    Returns:
        [number, layers, experts], of any scale.
    """
    floor = 1e-3 * counts.mean(2, keepdims=True)
    made = list(np.maximum(counts, floor))
    hottest = np.maximum(counts, floor).max(0)
    while len(made) < number:
        base = made[int(rng.integers(len(counts)))]
        base = np.where(rng.random(base.shape) < SURGE, hottest, base)
        made.append(base * np.exp(drift * rng.standard_normal(base.shape)))
    return np.stack(made)


def batches(counts: Floats, number: int, picks: int, rng: np.random.Generator) -> Floats:
    """Single batches of the measured scenarios, each with its own noise.

    Args:
        counts: [scenarios, layers, experts].
        picks: tokens times experts per token, of a batch over all ranks.

    Returns:
        [number, layers, experts]; every row of experts sums to `picks`.
    """
    share = counts / counts.sum(2, keepdims=True)
    result = np.empty((number, *counts.shape[1:]))
    for index in range(number):
        gamma = rng.standard_gamma(STEADINESS * share[index % len(share)])
        result[index] = rng.multinomial(picks, gamma / gamma.sum(1, keepdims=True))
    return result
