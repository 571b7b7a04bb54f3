"""`sparsec simulate`: models by name and by numbers, plans, sweeps, and what it says of bad input."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from sparsec.cli import cli
from sparsec.diagnostics import SparsecError
from sparsec.passes.placement import Plan, parse_topology, write_plan
from sparsec.simulate import packed

TINY = Path(__file__).parents[2] / "examples" / "tinymoe" / "model"
NUMBERS = ["--hidden", "512", "--intermediate", "256", "--experts", "32", "--top-k", "4", "--layers", "6"]


def simulate(*args: str | Path | int) -> Any:
    """Its JSON."""
    done = CliRunner().invoke(cli, ["simulate", *map(str, args), "--json"], catch_exceptions=False)
    return json.loads(done.stdout)


def refused(*args: str | Path) -> str:
    """What it says of bad input."""
    with pytest.raises(SparsecError) as caught:
        CliRunner().invoke(cli, ["simulate", *map(str, args)], catch_exceptions=False)
    return str(caught.value)


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """A plan of 4 layers of 16 experts, its loads, and tokens."""
    rng = np.random.default_rng(0)
    counts = rng.integers(10, 1000, (4, 16)).astype(np.float64)
    topology = parse_topology("2x2")
    made = packed(counts / counts.sum(1, keepdims=True), [5] * 4, topology)
    write_plan(Plan(topology, (0, 1, 2, 3), 16, (5,) * 4, made.slots, made.split), tmp_path / "plan.json")
    np.save(tmp_path / "load.npy", counts)
    np.save(tmp_path / "routing.npy", np.argsort(rng.random((200, 4, 16)), axis=2)[:, :, :2])
    return tmp_path


def test_sweep() -> None:
    found = simulate("--devices", "8..16,512", *NUMBERS, "--schedule", "shared", "--shared", "1")
    assert [point["ranks"] for point in found["points"]] == [8, 16, 512]
    assert [point["extrapolated"] for point in found["points"]] == [False, False, True]
    assert "nothing is published beyond EP256" in found["origin"]["*"]
    assert found["origin"]["dispatch, combine"].startswith("fitted")
    assert found["origin"]["links"].startswith("data sheet")
    assert found["points"][0]["bytes"]["outside"] == 0 < found["points"][1]["bytes"]["outside"]
    for point in found["points"]:
        us = point["layer_us"]
        parts = us["rest"] + us["shared"] + us["dispatch"] + us["experts"] + us["combine"] - us["hidden"]
        assert us["total"] == pytest.approx(parts)
        assert point["step_ms"] == pytest.approx(us["total"] * 6 / 1e3)


def test_the_same_seed_draws_the_same() -> None:
    once, again, other = (simulate("--devices", "8", *NUMBERS, "--seed", seed) for seed in (0, 0, 1))
    assert once == again != other


@pytest.mark.parametrize(("tokens", "scale"), [("128", 1.0), ("500000", 1e-3)], ids=["us", "ms"])
@pytest.mark.parametrize("devices", ["64,512", pytest.param("64,2048", marks=pytest.mark.slow)])
def test_tables_are_whole_on_a_narrow_terminal(devices: str, tokens: str, scale: float) -> None:
    """Every figure, and where it comes from, at 80 columns."""
    args = ["--devices", devices, *NUMBERS, "--shared", "1", "--rest", "9000000", "--schedule", "two-batch"]
    found = simulate(*args, "--tokens", tokens)["points"]
    shown = CliRunner().invoke(cli, ["simulate", *args, "--tokens", tokens], env={"COLUMNS": "80"}).stdout
    rows = [line.replace(",", "").split() for line in shown.splitlines()]
    assert "…" not in shown
    assert max(map(len, shown.splitlines())) <= 80
    for point in found:
        name, us = f"{point['ranks']}{'*' if point['extrapolated'] else ''}", point["layer_us"]
        first, second = (list(map(float, row[1:])) for row in rows if row[:1] == [name])
        moved = [point["bytes"][side] / 1e6 for side in ("inside", "outside")]
        whole = [point["slots_per_rank"], point["load"], point["nodes_per_token"], *moved]
        assert first == pytest.approx(whole, rel=5e-3, abs=5e-3)
        parts = ("rest", "shared", "dispatch", "experts", "combine", "hidden", "total")
        times = [us[part] * (-scale if part == "hidden" else scale) for part in parts]
        times += [point["step_ms"], point["tokens_per_second_per_rank"]]
        assert second == pytest.approx(times, rel=5e-3, abs=5e-3)
    for said in ("fitted", "data sheet", "drawn", "extrapolated"):
        assert said in shown


def test_what_does_not_fit_is_said() -> None:
    found = simulate("--devices", "8,16", *NUMBERS, "--topology", "1x8:memory=20MB")
    assert [point["ranks"] for point in found["points"]] == [16]
    assert "cannot hold 5 slots in 6 layers" in found["unfit"]["8 ranks"]
    assert "cannot hold" in refused("--devices", "8", *NUMBERS, "--topology", "1x8:memory=1MB")
    assert "on no number of devices" in refused("--devices", "8..16", *NUMBERS, "--topology", "1x8:memory=1MB")


def test_plan_of_a_model(files: Path) -> None:
    drawn = simulate(TINY, "--plan", files / "plan.json")
    numbers = ("--hidden", 128, "--intermediate", 128, "--top-k", 2, "--rest", drawn["model"]["rest"])
    base = ("--plan", files / "plan.json", *numbers)
    recorded = simulate(*base, "--load", files / "load.npy")
    assert (drawn["model"]["hidden"], drawn["model"]["intermediate"], drawn["model"]["layers"]) == (128, 128, 4)
    assert recorded["points"][0]["load"] < drawn["points"][0]["load"]
    assert (recorded["origin"]["routing"][:8], drawn["origin"]["routing"][:5]) == ("recorded", "drawn")
    tokens = (*base, "--routing", files / "routing.npy", "--dedup", "node")
    static, local = (simulate(*tokens, "--policy", policy)["points"][0] for policy in ("static", "local"))
    assert static["bytes"]["outside"] > local["bytes"]["outside"] > 0
    assert simulate(*tokens, "--policy", "batch")["points"][0]["load"] < static["load"]


def test_bad_input(files: Path) -> None:
    plan_, numbers = ("--plan", files / "plan.json"), NUMBERS[:4]
    assert "--plan plan.json, or --devices" in refused(*NUMBERS)
    assert "layers missing" in refused("--devices", "8", *NUMBERS[:-2])
    assert "'x' is no number" in refused("--devices", "8,x", *NUMBERS)
    assert "there must be 1 to" in refused("--devices", "16..8", *NUMBERS)
    assert "do not fill nodes of 8" in refused("--devices", "12", *NUMBERS)
    assert "the plan is of 16 experts, the model has 32" in refused(*plan_, *NUMBERS)
    assert "needs tokens" in refused(*plan_, *numbers, "--top-k", "2", "--policy", "local")
    assert "the plan has its own" in refused(*plan_, *numbers, "--top-k", "2", "--slots", "8")
    assert "is of a plan's layers" in refused("--devices", "8", *NUMBERS, "--routing", files / "routing.npy")
    assert "the loads are of 16 experts" in refused("--devices", "8", *NUMBERS, "--load", files / "load.npy")
    assert "no such file" in refused("--plan", files / "nothing.json", *numbers)
