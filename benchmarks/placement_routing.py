"""Tokens' routing that has a given histogram, as routers with groups of experts choose: for traffic over nodes."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]


def choose(scores: Floats, groups: int, kept: int, picks: int) -> Ints:
    """The rule of DeepSeek-V3: the groups whose two best experts score highest, then the best experts in those.

    Args:
        scores: [tokens, experts].

    Returns:
        [tokens, picks].
    """
    tokens, experts = scores.shape
    grouped = scores.reshape(tokens, groups, -1)
    best = np.partition(grouped, -2, axis=2)[:, :, -2:].sum(2)
    out = np.argpartition(best, groups - kept, axis=1)[:, : groups - kept]
    masked = grouped.copy()
    masked[np.arange(tokens)[:, None], out] = -np.inf
    return np.argpartition(masked.reshape(tokens, experts), experts - picks, axis=1)[:, experts - picks :]


def tokens_like(
    share: Floats,
    tokens: int,
    rng: np.random.Generator,
    *,
    groups: int = 8,
    kept: int = 4,
    picks: int = 8,
    topics: int = 0,
    rounds: int = 40,
) -> Ints:
    """Tokens whose experts have this histogram: score = bias of the expert + the topic's taste + Gumbel noise.

    Args:
        share: [experts], of any scale.
        topics: how many kinds of tokens there are, each with a taste of its own (normal, 1); 0: all alike.
        rounds: of fitting the biases.

    Returns:
        [tokens, picks].
    """
    target = np.maximum(share / share.sum(), 1e-7)
    tastes = rng.standard_normal((max(topics, 1), len(target))) * (topics > 0)

    def noise(count: int) -> Floats:
        return tastes[rng.integers(len(tastes), size=count)] + rng.gumbel(size=(count, len(target)))

    bias = np.log(target)
    sample = noise(4096)
    for step in range(rounds):
        got = np.bincount(choose(bias + sample, groups, kept, picks).ravel(), minlength=len(target)) + 0.5
        bias += (0.8 if step < rounds // 2 else 0.3) * np.log(target * got.sum() / got)
    return choose(bias + noise(tokens), groups, kept, picks)
