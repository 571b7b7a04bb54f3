"""Rows on every link, exactly, for tokens whose slots are known: what the runtime counts in `World.links`."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sparsec.diagnostics import SparsecError
from sparsec.simulate.remap import Table, remap

Ints = NDArray[np.int64]

DEDUP, ALGO = ("none", "rank", "node"), ("flat", "two_level")


@dataclass(frozen=True)
class Traffic:
    """Rows of one dispatch; its combine sends the same rows back.

    Args:
        rows: [ranks, ranks] int64, from -> to, what stays on its rank included; a row that goes by way of another
            rank counts on both hops.
        picks: [slots] int64, tokens of each slot.
        nodes, ranks: distinct ones of a token, on average, its own included.
    """

    rows: Ints
    picks: Ints
    nodes: float
    ranks: float


def traffic(home: Ints, where: Ints, rank_of_slot: Ints, node: Ints, dedup: str, algo: str) -> Traffic:
    """Count the rows of one dispatch.

    - dedup `none`: a row for each pick; `rank`: for each distinct rank of a token; `node`: for each distinct node of a
      token into the node, for each distinct rank inside it.
    - `flat`: straight to the rank; `two_level`: first to the rank of the sender's index in the node that it goes to
      (its own node included), then inside.

    Args:
        home: [tokens], the rank that each token starts on.
        where: [tokens, k], physical slots; outside 0..slots-1: no row.
        rank_of_slot: [slots].
        node: [ranks], ascending.

    Raises:
        SparsecError: no such variant.
    """
    if dedup not in DEDUP or algo not in ALGO or (dedup == "node" and algo == "flat"):
        raise SparsecError(
            f"there is no dispatch with dedup '{dedup}' and algorithm '{algo}'\n"
            f"  hint: {', '.join(DEDUP)}; {', '.join(ALGO)}; dedup node needs two_level"
        )
    ranks, slots = len(node), len(rank_of_slot)
    token, _ = np.nonzero((where >= 0) & (where < slots))
    slot = where[(where >= 0) & (where < slots)]
    to = rank_of_slot[slot]
    picks = np.bincount(slot, minlength=slots)
    pairs = np.unique(token * ranks + to)
    nodes = np.unique(token * ranks + node[to])
    if dedup != "none":
        token, to = np.divmod(pairs, ranks)
    start = home[token]
    reached = len(nodes) / max(1, len(home)), len(pairs) / max(1, len(home))
    if algo == "flat":
        return Traffic(_count(start, to, ranks), picks, *reached)
    first, width = np.searchsorted(node, np.arange(int(node[-1]) + 1)), np.bincount(node)
    index = start - first[node[start]]
    entry = first[node[to]] + index % width[node[to]]
    rows = _count(entry, to, ranks)
    if dedup == "node":
        token, target = np.divmod(nodes, ranks)
        start = home[token]
        entry = first[target] + (start - first[node[start]]) % width[target]
    rows += _count(start, entry, ranks)
    return Traffic(rows, picks, *reached)


def _count(start: Ints, to: Ints, ranks: int) -> Ints:
    return np.bincount(start * ranks + to, minlength=ranks * ranks).reshape(ranks, ranks)


def predict(table: Table, ids: list[Ints], *, dedup: str, algo: str, policy: str = "static") -> Traffic:
    """Rows of a dispatch of tokens whose experts are known, on every link.

    Args:
        ids: per rank [T, k], experts; outside of 0..experts-1: skip.

    Raises:
        SparsecError: no such variant or policy.
    """
    where = np.concatenate(remap(table, ids, policy))
    home = np.repeat(np.arange(len(ids)), [len(one) for one in ids])
    node = np.arange(table.ranks) // table.width
    return traffic(home, where, table.rank_of_slot, node, dedup, algo)
