"""Devices and the links between them, from a text such as `8x8:nvlink=450GB/s,ib=50GB/s,memory=80GB`."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from sparsec.diagnostics import SparsecError

if TYPE_CHECKING:
    import networkx as nx

MOST_RANKS = 8192
LONGEST = 4096  #: characters of a text
SPEEDS = (1e-3, 1e3)
_UNITS = {
    "": 1.0,
    "B": 1.0,
    "KB": 1e3,
    "MB": 1e6,
    "GB": 1e9,
    "TB": 1e12,
    "KIB": 2.0**10,
    "MIB": 2.0**20,
    "GIB": 2.0**30,
}
_LINKS = {"nvlink": "inside", "link": "inside", "ib": "outside", "net": "outside"}


@dataclass(frozen=True)
class Rank:
    """One device.

    Args:
        node: which node it is in.
        memory: bytes, 0 where not known.
        speed: relative to the others.
        slots: experts that it holds per layer; 0: as many as asked for.
        inside: bytes/s to the ranks of its node.
        outside: bytes/s to other nodes.
    """

    node: int
    memory: float = 0.0
    speed: float = 1.0
    slots: int = 0
    inside: float = 450e9
    outside: float = 50e9


@dataclass(frozen=True)
class Topology:
    """The ranks, in order, and the text that said so."""

    text: str
    ranks: tuple[Rank, ...]

    @property
    def nodes(self) -> int:
        return self.ranks[-1].node + 1

    def graph(self) -> nx.Graph[object]:
        """Ranks ("rank", i) and switches ("node", n) and "net", with `bandwidth` in bytes/s on the edges."""
        import networkx as nx

        graph: nx.Graph[object] = nx.Graph()
        for index, rank in enumerate(self.ranks):
            graph.add_edge(("rank", index), ("node", rank.node), bandwidth=rank.inside)
            graph.add_edge(("rank", index), "net", bandwidth=rank.outside)
        return graph


def parse_topology(text: str) -> Topology:
    """Read `NODESxRANKS[:key=value,...]`; groups of unlike nodes are joined by `+`.

    Keys: `nvlink` (or `link`) and `ib` (or `net`) in bytes/s, `memory`, `speed` (relative), `slots` (per layer).

    Raises:
        SparsecError: says which part is wrong.
    """
    if len(text) > LONGEST:
        raise SparsecError(f"topology '{text[:40]}...': has more than {LONGEST} characters")
    ranks: list[Rank] = []
    node = 0
    for group in text.split("+"):
        head, _, tail = group.strip().partition(":")
        match = re.fullmatch(r"(\d{1,5})(?:x(\d{1,5}))?", head.strip())
        if not match:
            raise SparsecError(
                f"topology '{text}': '{head}' is not NODESxRANKS\n  hint: 8x8:nvlink=450GB/s,ib=50GB/s,memory=80GB"
            )
        nodes, width = (int(match[1]), int(match[2])) if match[2] else (1, int(match[1]))
        if not 0 < nodes * width <= MOST_RANKS - len(ranks):
            raise SparsecError(f"topology '{text}': there must be 1 to {MOST_RANKS} ranks")
        values = _values(text, tail)
        for _ in range(nodes):
            ranks += [
                Rank(
                    node,
                    values.get("memory", 0.0),
                    values.get("speed", 1.0),
                    int(values.get("slots", 0)),
                    values.get("inside", Rank.inside),
                    values.get("outside", Rank.outside),
                )
            ] * width
            node += 1
    return Topology(text, tuple(ranks))


def slots_per_rank(topology: Topology, slots: int, experts: int, layers: int, expert_bytes: float) -> list[int]:
    """How many experts of a layer each rank holds. Raises: SparsecError where they do not fit, or are too few."""
    sizes = [rank.slots or slots for rank in topology.ranks]
    for index, (rank, size) in enumerate(zip(topology.ranks, sizes, strict=True)):
        needed = size * layers * expert_bytes
        if rank.memory and needed > rank.memory:
            fits = int(rank.memory // (layers * expert_bytes))
            raise SparsecError(
                f"rank {index} (node {rank.node}) cannot hold {size} slots in {layers} layers: {needed / 1e9:.1f} GB "
                f"of experts, {rank.memory / 1e9:.1f} GB of memory\n  hint: {fits} slots fit"
            )
        if size > experts:
            raise SparsecError(
                f"rank {index} has {size} slots, but a layer has {experts} experts and a rank needs none twice\n"
                f"  hint: --slots {experts} holds them all"
            )
    if sum(sizes) < experts:
        raise SparsecError(
            f"{len(sizes)} ranks with {sum(sizes)} slots cannot hold {experts} experts\n"
            f"  hint: --slots {-(-experts // len(sizes))}"
        )
    return sizes


def _values(text: str, tail: str) -> dict[str, float]:
    values: dict[str, float] = {}
    for item in filter(None, (part.strip() for part in tail.split(","))):
        key, _, value = item.partition("=")
        name = _LINKS.get(key, key)
        match = re.fullmatch(r"(\d+(?:\.\d+)?(?:e\d+)?)\s*(KB|MB|GB|TB|KiB|MiB|GiB|B)?(/s)?", value, re.IGNORECASE)
        if name not in ("inside", "outside", "memory", "speed", "slots"):
            raise SparsecError(f"topology '{text}': no key '{key}'\n  hint: nvlink, ib, memory, speed, slots")
        number = float(match[1]) * _UNITS[(match[2] or "").upper()] if match else 0.0
        if not match or not 0 < number < 1e18 or not np.isfinite(number):
            raise SparsecError(
                f"topology '{text}': '{item}' has no value above 0\n  hint: memory=80GB, ib=50GB/s, speed=0.5"
            )
        if name in ("speed", "slots") and match[2]:
            raise SparsecError(f"topology '{text}': '{item}' takes a number without a unit")
        if name == "speed" and not SPEEDS[0] <= number <= SPEEDS[1]:
            raise SparsecError(f"topology '{text}': '{item}' is not from {SPEEDS[0]:g} to {SPEEDS[1]:g}")
        if name == "slots" and number != int(number):
            raise SparsecError(f"topology '{text}': '{item}' takes a whole number")
        values[name] = number
    return values
