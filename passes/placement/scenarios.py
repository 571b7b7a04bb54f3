"""Loads to hold on: those measured, and others near them, which stand for traffic that nobody has seen yet."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

STEADINESS = 12_000.0
"""How closely a batch's expert probabilities follow the average (Dirichlet); from imbalances published for 32 ranks."""

DRIFT = 0.3
"""Standard deviation of the logarithm of an expert's load in other traffic, where one scenario tells nothing of it."""


def drifted(counts: Floats, number: int, rng: np.random.Generator) -> Floats:
    """Scenarios of other traffic: each a measured one, changed half as much as measured ones differ from each other.

    The changes are those of the measured experts' logarithms, dealt to other experts by chance: as large, with as
    heavy a tail, but none knows which experts the next traffic will favour.

    Args:
        counts: [scenarios, layers, experts].
        number: how many to return, the measured ones first.

    Returns:
        [number, layers, experts], of any scale.
    """
    logs = np.log(np.maximum(counts, np.maximum(1e-3 * counts.mean(2, keepdims=True), 1e-300)))
    made = list(logs)
    while len(made) < number:
        base = logs[int(rng.integers(len(logs)))]
        if len(logs) == 1:
            made.append(base + DRIFT * rng.standard_normal(base.shape))
            continue
        one, other = rng.choice(len(logs), 2, replace=False)
        made.append(base + 0.5 * rng.permuted(logs[one] - logs[other], axis=1))
    return np.exp(np.stack(made))


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
