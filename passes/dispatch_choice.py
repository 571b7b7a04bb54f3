"""How the tokens of a layer should travel to the ranks of their experts: the cost model behind `place-experts`.

Rows are counted for tokens that choose k slots independently of each other (`rows_sent`). Links inside a node and those
of the network are busy at the same time where rows go straight (`flat`); with two levels one hop follows the other, but
a rank speaks to fewer others. A combine sends rows of as many bytes back the same way. So for n rows a token and hop:

    flat:       2 * max(n_inside * bytes / inside, n_outside * bytes / outside) + 2 * MESSAGE * (ranks - 1)
    two_level:  2 * (n_inside * bytes / inside + n_outside * bytes / outside) + 2 * MESSAGE * (nodes - 1 + width - 1)
"""

from __future__ import annotations

from dataclasses import dataclass

from sparsec.dialects.dist import rows_sent

MESSAGE = 1e-6
"""Seconds that each further rank to speak to adds to a hop."""

WAYS = (("none", "flat"), ("rank", "flat"), ("rank", "two_level"), ("node", "two_level"))
"""What there is to choose from, as (dedup, algo), the plainest first. Two levels without dedup are never better than
with it: every rank of the path sees all of a token's choices."""


@dataclass(frozen=True)
class Links:
    """What connects ranks.

    Args:
        ranks, width: ranks in all, and of a node.
        inside, outside: bytes/s of a rank to others of its node, and to other nodes.
    """

    ranks: int
    width: int
    inside: float
    outside: float


@dataclass(frozen=True)
class Way:
    """A way to dispatch and combine.

    Args:
        seconds: both, for so many tokens on each rank.
        inside, outside: bytes that a rank sends in a dispatch.
    """

    dedup: str
    algo: str
    seconds: float
    inside: float
    outside: float


def ways(links: Links, k: int, row: int, tokens: int) -> list[Way]:
    """Every way, fastest first; of equals the plainest.

    Args:
        k: slots of a token.
        row: bytes of a row.
        tokens: on each rank.
    """
    return sorted((a_way(links, k, row, tokens, *way) for way in WAYS), key=lambda way: way.seconds)


def a_way(links: Links, k: int, row: int, tokens: int, dedup: str, algo: str) -> Way:
    """What one way costs; arguments as of `ways`."""
    near, far = rows_sent(k, links.ranks, links.width, dedup, algo)
    carried = row + (1 if dedup == "none" else k) * 8  # with slots and weights
    inside, outside = near * tokens * carried, far * tokens * carried
    hops, nodes = (inside / links.inside, outside / links.outside), links.ranks // links.width
    if algo == "flat":
        seconds, peers = max(hops), links.ranks - 1
    else:
        seconds, peers = sum(hops), nodes - 1 + links.width - 1
    return Way(dedup, algo, 2 * (seconds + MESSAGE * peers), inside, outside)
