"""Routing that is drawn, after what was recorded of DeepSeek-V3: skewed experts, and batches that differ.

Expert loads follow a power law: with the exponent 0.5, the hottest of 256 experts has 8 times the mean, the hottest
tenth 28 % of all tokens, and the coefficient of variation is 0.8, as recorded loads have (5 to 8 times, 27 to 34 %,
0.7 to 1.0). Hot experts are near each other, as groups of experts that are chosen together have much in common:
recorded loads of groups of 32 vary by 0.38 of their mean (0.14 if experts were shuffled). A batch's own probabilities
are a Dirichlet draw around all that (`passes/placement/scenarios.py`).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from sparsec.simulate.model import MoE

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]

SLOPE = 0.5
"""Of the power law."""

COMMON = 0.43
"""How much of what decides how hot an expert is, it shares with its group: the share of the variance."""

MOST = 0.98
"""The largest share of all tokens that one expert can be asked to get."""

CHUNK = 4096
"""Tokens that are drawn at a time."""


def histogram(model: MoE, layers: int, rng: np.random.Generator) -> Floats:
    """[layers, experts]: the share of the picks that each expert gets; which experts are hot is drawn per layer."""
    share = np.arange(1, model.experts + 1, dtype=np.float64) ** -SLOPE
    own = rng.standard_normal((layers, model.experts))
    if model.groups > 1:
        group = np.repeat(rng.standard_normal((layers, model.groups)), model.experts // model.groups, axis=1)
        own = COMMON**0.5 * group + (1 - COMMON) ** 0.5 * own
    place = np.argsort(np.argsort(-own, axis=1), axis=1)
    return (share / share.sum())[place]


def tokens(model: MoE, share: Floats, number: int, rng: np.random.Generator) -> Ints:
    """Distinct experts of every token, such that each expert gets its share of all picks.

    A token takes the experts of the k highest scores, a bias and Gumbel noise; from few groups, by the sum of each
    group's two best scores, where the model does. Without groups the biases are close in closed form: experts arrive
    as Poisson processes. With them they are fitted by trial.

    Args:
        share: [experts].

    Returns:
        [number, k].
    """
    wanted = np.clip(share * model.k, 1e-9, MOST)
    bias = np.log(-np.log1p(-wanted)).astype(np.float32)
    for _ in range(8 if model.top_groups < model.groups else 0):
        drawn = _draw(model, bias, CHUNK // 2, rng)
        got = np.bincount(drawn.ravel(), minlength=model.experts) / len(drawn)
        bias += 0.7 * (np.log(wanted + 1e-3) - np.log(got + 1e-3))
    return np.concatenate([_draw(model, bias, min(CHUNK, number - at), rng) for at in range(0, number, CHUNK)])


def _draw(model: MoE, bias: NDArray[np.float32], number: int, rng: np.random.Generator) -> Ints:
    arrival = rng.standard_exponential((number, model.experts), np.float32)
    score = bias - np.log(np.maximum(arrival, 1e-30))
    if model.top_groups < model.groups:
        grouped = score.reshape(number, model.groups, -1)
        best = np.partition(grouped, -2, axis=2)[:, :, -2:].sum(2) if grouped.shape[2] > 1 else grouped[:, :, 0]
        out = np.argsort(best, axis=1)[:, : model.groups - model.top_groups]
        np.put_along_axis(grouped, out[:, :, None], -np.inf, 1)
    if model.k == model.experts:
        return np.tile(np.arange(model.experts), (number, 1))
    return np.argpartition(-score, model.k - 1, axis=1)[:, : model.k].astype(np.int64)
