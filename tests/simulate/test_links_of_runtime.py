"""What is predicted is what runs: rows on every link and tokens of every slot, counted by 4 processes."""

from __future__ import annotations

import os
import subprocess
import sys
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from sparsec.simulate.remap import Table, remap
from sparsec.simulate.traffic import predict

ROOT = Path(__file__).parents[2]
RANKS, WIDTH, EXPERTS, SLOTS, K = 4, 2, 12, 5, 3
VARIANTS = (("none", "flat"), ("rank", "flat"), ("none", "two_level"), ("rank", "two_level"), ("node", "two_level"))

Ints = NDArray[np.int64]


def table() -> Table:
    rng = np.random.default_rng(3)
    spare = rng.choice(EXPERTS, RANKS * SLOTS - EXPERTS, replace=False)
    slots = np.concatenate([np.arange(EXPERTS), spare]).astype(np.int64)
    shares = rng.uniform(0.2, 1.0, len(slots))
    shares /= np.bincount(slots, shares)[slots]
    return Table(slots, shares, EXPERTS, RANKS, WIDTH)


def tokens() -> list[Ints]:
    """Of every rank as many as it likes, of one rank none; some picks are skipped."""
    rng = np.random.default_rng(4)
    ids = [np.argsort(rng.random((number, EXPERTS)), axis=1)[:, :K] for number in (37, 0, 64, 5)]
    for one in ids:
        one[rng.random(one.shape) < 0.1] = EXPERTS
    return ids


@pytest.fixture(scope="module")
def counted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Ints]:
    """What 4 processes counted."""
    folder = tmp_path_factory.mktemp("ranks")
    given = {f"ids{rank}": ids for rank, ids in enumerate(tokens())}
    np.savez(
        folder / "given.npz", allow_pickle=False, slots=table().slots, shares=table().shares, experts=EXPERTS, **given
    )
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen(
            [sys.executable, str(Path(__file__).parent / "ranks.py"), str(folder), str(rank)],
            env=env,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(RANKS)
    ]
    errors = [rank.communicate(timeout=120)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0] * RANKS, errors
    return dict(np.load(folder / "found.npz"))


@pytest.mark.parametrize(("policy", "variant"), list(product(("static", "local", "batch"), VARIANTS)))
def test_prediction_is_what_the_runtime_counts(counted: dict[str, Ints], policy: str, variant: tuple[str, str]) -> None:
    dedup, algo = variant
    made = predict(table(), tokens(), dedup=dedup, algo=algo, policy=policy)
    assert made.rows.sum() > 100
    assert (made.rows == counted[f"{policy} {dedup} {algo} links"]).all()
    assert (made.picks == counted[f"{policy} {dedup} {algo} picks"]).all()


def test_dedup_saves_rows() -> None:
    def across(dedup: str, algo: str, policy: str = "static") -> int:
        rows = predict(table(), tokens(), dedup=dedup, algo=algo, policy=policy).rows
        return int(rows[:WIDTH, WIDTH:].sum() + rows[WIDTH:, :WIDTH].sum())

    flat, rank, node = across("none", "flat"), across("rank", "flat"), across("node", "two_level")
    assert flat == across("none", "two_level") > rank == across("rank", "two_level") > node
    assert across("node", "two_level", "local") < node


def test_skipped_picks_and_empty_ranks() -> None:
    nobody = np.zeros((0, 2), np.int64)
    where = remap(table(), [np.full((3, 2), -1), nobody, np.full((1, 2), EXPERTS), nobody])
    assert all((one == RANKS * SLOTS).all() for one in where)
