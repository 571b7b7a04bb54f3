"""Validation points 1 to 5: the simulator within the stated tolerances of what others measured."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from benchmarks.published_ep import DEVIATION, EXCHANGES, IMBALANCES, TOLERANCE, Exchange, Imbalance
from benchmarks.simulate import V3, exchange, fit, imbalance
from sparsec.passes.placement import read_loads
from sparsec.simulate.links import LOW_LATENCY, THROUGHPUT
from sparsec.simulate.routing import histogram

RECORDED = Path(__file__).parents[3] / "shared" / "traces" / "deepseek_v3_sglang_expert_load.npz"

Floats = NDArray[np.float64]


@pytest.mark.parametrize("row", EXCHANGES, ids=lambda row: f"{row.what}, EP{row.ranks}")
def test_dispatch_and_combine(row: Exchange) -> None:
    """Points 1 to 4."""
    dispatch, combine = exchange(row)
    assert dispatch == pytest.approx(row.dispatch, rel=TOLERANCE[row.point])
    assert combine == pytest.approx(row.combine, rel=TOLERANCE[row.back])


def shares(source: str) -> Floats:
    """[layers, experts]"""
    if source == "drawn":
        return histogram(V3, 24, np.random.default_rng(0))
    if not RECORDED.is_file():
        pytest.skip("no recorded loads here")
    counts = read_loads([RECORDED]).counts[:, ::16]
    return (counts / counts.sum(2, keepdims=True)).reshape(-1, counts.shape[2])


@pytest.mark.parametrize("source", ["drawn", "recorded"])
@pytest.mark.parametrize("row", IMBALANCES, ids=lambda row: row.what)
def test_imbalance(row: Imbalance, source: str) -> None:
    """Point 5, for expert loads that are drawn by our recipe, and for recorded ones."""
    excess, deviation = imbalance(row, shares(source), np.random.default_rng(0), count=8)
    if row.slots:
        assert excess == pytest.approx(row.excess, abs=row.tolerance)
    else:
        assert excess == pytest.approx(row.excess, rel=row.tolerance)
    if row.ranks == 32 and row.slots:
        assert deviation == pytest.approx(DEVIATION, rel=0.1)


def test_the_constants_are_what_the_fit_gives() -> None:
    found = fit()
    for name, kernel in (("low latency, dispatch", LOW_LATENCY[0]), ("low latency, combine", LOW_LATENCY[1])):
        latency, share = found[name]
        assert kernel.latency * 1e6 == pytest.approx(latency, rel=0.02)
        assert kernel.net == kernel.inside == pytest.approx(share, abs=0.005)
    latency, net, inside = found["throughput"]
    assert THROUGHPUT[0] == THROUGHPUT[1]
    assert THROUGHPUT[0].latency * 1e6 == pytest.approx(latency, rel=0.02)
    assert (THROUGHPUT[0].net, THROUGHPUT[0].inside) == pytest.approx((net, inside), abs=0.005)


def test_no_constant_knows_which_row_it_is_for() -> None:
    """Scaling links and rows alike scales all but the latency: nothing depends on the number of ranks or the GPU."""
    row = EXCHANGES[3]
    faster = replace(row, nvlink=row.nvlink * 2, net=row.net * 2, tokens=row.tokens * 2)
    assert exchange(faster) == pytest.approx(exchange(row), rel=1e-6)
