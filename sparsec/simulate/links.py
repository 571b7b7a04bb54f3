"""How long rows take over the links: a latency, and a share of the links' bandwidth. The constants, and their origin.

There is one set of constants for every number of ranks, token count and GPU. They are fitted, by the least eighth
power of relative errors (`python -m benchmarks.simulate --fit`), to what DeepEP publishes of its kernels for hidden
size 7168, top 8 of 256 experts, fp8 out and bf16 back (github.com/deepseek-ai/DeepEP, README.md and docs/legacy.md):

- low latency: 128 tokens a rank, H800, EP 8 to 256; latency and share, each for dispatch and combine;
- throughput: 4,096 tokens on H800 at EP 8 to 64, and 8,192 tokens of the second version on SM90 and SM100; one latency
  and the shares of network and NVLink, for both ways.

Bandwidths are the topology's, from data sheets: 50 GB/s for a CX7, 160 GB/s for the NVLink of an H800 (as DeepEP says).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sparsec.passes.placement.topology import Topology
from sparsec.simulate.model import MoE

Floats = NDArray[np.float64]
Numbers = NDArray[np.float64] | NDArray[np.int64]

FITTED_RANKS = 256
"""Beyond this, there is no measurement that is public: times are extrapolated."""

SCALES, HEADER = 128, 16
"""An fp8 row has a 4-byte scale for so many values, and so many bytes of header."""


@dataclass(frozen=True)
class Kernel:
    """One way.

    Args:
        latency: seconds.
        net, inside: the share of the bandwidth between nodes, and inside a node, that is reached.
    """

    latency: float
    net: float
    inside: float


LOW_LATENCY = (Kernel(33.4e-6, 0.92, 0.92), Kernel(10.9e-6, 0.81, 0.81))
"""Dispatch and combine of one row per pick, straight to its rank."""

THROUGHPUT = (Kernel(69e-6, 0.89, 0.84), Kernel(69e-6, 0.89, 0.84))
"""Dispatch and combine of one row per rank or node; the hops of two levels go on at the same time."""


def kernels(dedup: str, algo: str) -> tuple[Kernel, Kernel]:
    """Dispatch and combine of a variant."""
    return LOW_LATENCY if dedup == "none" and algo == "flat" else THROUGHPUT


def row_bytes(model: MoE, payload: str) -> tuple[int, int]:
    """Bytes of a row on its way out and back. `payload`: `fp8` or `model` (as wide as activations)."""
    if payload == "fp8":
        return model.hidden + 4 * -(-model.hidden // SCALES) + HEADER, model.row
    return model.row + HEADER, model.row


@dataclass(frozen=True)
class Rows:
    """Rows that leave and reach each rank ([ranks] each): on the links inside nodes, and between them."""

    inside_out: Floats
    inside_in: Floats
    net_out: Floats
    net_in: Floats

    @property
    def back(self) -> Rows:
        """The same rows the other way."""
        return Rows(self.inside_in, self.inside_out, self.net_in, self.net_out)

    def times(self, factor: float) -> Rows:
        """So many times as many."""
        return Rows(*(one * factor for one in (self.inside_out, self.inside_in, self.net_out, self.net_in)))


def mean_rows(every: list[Rows]) -> Rows:
    """On average."""
    pairs = [(one.inside_out, one.inside_in, one.net_out, one.net_in) for one in every]
    return Rows(*np.mean(pairs, axis=0))


def rows_of(links: Numbers, node: NDArray[np.int64]) -> Rows:
    """Sum [ranks, ranks] rows by rank and kind of link; what stays on a rank is on no link."""
    same = node[:, None] == node[None, :]
    moved = links.astype(np.float64)
    np.fill_diagonal(moved, 0)
    inside, net = np.where(same, moved, 0), np.where(same, 0, moved)
    return Rows(inside.sum(1), inside.sum(0), net.sum(1), net.sum(0))


def link_seconds(kernel: Kernel, rows: Rows, size: float, topology: Topology) -> float:
    """Seconds until the fullest link is through. `size`: bytes of a row. Nothing to send takes no time."""
    inside = np.array([rank.inside for rank in topology.ranks]) * kernel.inside
    net = np.array([rank.outside for rank in topology.ranks]) * kernel.net
    most = max(
        float((np.maximum(rows.inside_out, rows.inside_in) / inside).max()),
        float((np.maximum(rows.net_out, rows.net_in) / net).max()),
    )
    return kernel.latency + most * size if most else 0.0
