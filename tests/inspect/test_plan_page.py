"""The page of a plan: what is in it, how large it is, and how it behaves in a browser."""

from __future__ import annotations

from collections.abc import Generator
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from sparsec.cli import cli
from sparsec.diagnostics import SparsecError
from sparsec.inspect.html.plan_page import groups, page_data, write_plan_page
from sparsec.passes.placement import Loads, Options, Plan, check_plan, parse_topology, plan, read_plan
from sparsec.passes.placement.figures import figures, traffic
from tests.inspect.browser import Browser

MAX_BYTES, MAX_MS = 5_000_000, 2_000
EVIL = "</script><img src=x onerror='window.taken = 1'>"


def loads_of(scenarios: int, layers: int, experts: int, seed: int = 0) -> Loads:
    rng = np.random.default_rng(seed)
    counts = np.round(
        rng.lognormal(0, 1, (layers, experts)) * rng.lognormal(0, 0.3, (scenarios, layers, experts)) * 1e4
    )
    names = (EVIL, *(f"traffic {at}" for at in range(1, scenarios)))
    return Loads(counts, names, tuple(range(3, 3 + layers)))


def drawn(topology: str, slots: int, loads: Loads, seed: int) -> Plan:
    """A valid plan that nobody searched for; `slots` divides the experts."""
    rng = np.random.default_rng(seed)
    layers, experts = loads.counts.shape[1:]
    devices = parse_topology(topology)
    number = len(devices.ranks) * slots
    rows = [[rng.permutation(experts) for _ in range(-(-number // experts))] for _ in range(layers)]
    table = np.array([np.concatenate(row)[:number] for row in rows])
    split = rng.random(table.shape) + 0.2
    split /= np.stack([np.bincount(row, some, experts)[row] for row, some in zip(table, split, strict=True)])
    size = (slots,) * len(devices.ranks)
    made = Plan(devices, loads.layers, experts, size, table, split, 0, {"expert_bytes": 44e6, "row_bytes": 7168.0})
    check_plan(made)
    return made


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of a plan of 3 layers of 16 experts on 2 nodes of 4 ranks, beside an old plan."""
    loads = loads_of(3, 3, 16)
    topology = parse_topology("2x4:memory=1GB")
    old = plan(Loads(loads.counts[:1], loads.names[:1], loads.layers), topology, Options(3, rounds=2))
    made = plan(loads, topology, Options(3, rounds=2, expert_bytes=1e6, row_bytes=100.0), old=old)
    write_plan_page(path := tmp_path_factory.mktemp("plan") / "plan.html", made, loads, old)
    return path


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """58 layers of 256 experts in 320 slots, 12 scenarios."""
    loads = loads_of(12, 58, 256)
    path = tmp_path_factory.mktemp("plan") / "large.html"
    write_plan_page(path, drawn("8x10", 4, loads, 0), loads, drawn("8x10", 4, loads, 1))
    return path


def test_maps_and_matrices_are_the_figures_of_the_plan() -> None:
    loads = loads_of(2, 3, 16)
    made = drawn("2x4", 4, loads, 0)
    data, found = page_data(made, loads), figures(made, loads)
    assert np.allclose(np.array(data["maps"]["planned"]) / 1000, found.planned, atol=6e-4)
    assert np.allclose(np.array(data["maps"]["before"]) / 1000, found.before, atol=6e-4)
    even = 1e6 * 64
    assert np.allclose(np.array(data["traffic"]["local"]) / even, traffic(made, loads, "local"), atol=1e-7)
    static = np.array(data["traffic"]["static"])[:, None, :] / even
    assert np.allclose(np.broadcast_to(static, (3, 8, 8)), traffic(made, loads, "static"), atol=1e-7)
    assert data["moved"] is None and data["memory"]["held"] == [4 * 3 * 44e6] * 8


def test_many_ranks_are_shown_by_nodes_or_blocks() -> None:
    assert groups(np.arange(2048) // 8, 512)[1][-1] == "node 255"
    group, names = groups(np.zeros(2000, np.int64), 512)
    assert names[-1] == "ranks 1996 to 1999" and group.max() + 1 == len(names) == 500
    loads = loads_of(2, 2, 64)
    data = page_data(drawn("128x8", 2, loads, 0), loads)
    assert len(data["maps"]["best"][0][0]) == len(data["groups"]["names"]) == 128
    rows = np.array(data["traffic"]["static"]) * 8 / (1e6 * 1024**2)
    assert np.allclose(rows.sum(1) * 128, 1, atol=1e-4)


def test_a_page_of_320_slots_and_12_scenarios_is_small(large: Path) -> None:
    text = large.read_text()
    assert len(text) < MAX_BYTES
    assert text.count("<script") == 2 and "http://" not in text.replace("http://www.w3.org/2000/svg", "")
    assert "taken" not in text


def test_view_writes_the_page_of_a_plan(tmp_path: Path) -> None:
    np.save(load := tmp_path / "load.npy", loads_of(1, 2, 8).counts)
    given = ["plan", "--load", str(load), "--topology", "2x2", "--slots", "3", "--rounds", "1", "--workers", "1"]
    out = str(tmp_path / "plan.json")
    result = CliRunner().invoke(cli, [*given, "-o", out, "--html", str(tmp_path / "a.html")], catch_exceptions=False)
    assert "unplaced" in result.output and "gap to the bound" in result.output
    assert max(map(len, result.output.splitlines()[:-2])) <= 80
    assert read_plan(out).report["mean"]["before"]["worst"] >= 1
    shown = CliRunner().invoke(cli, ["view", out, "--load", str(load)], catch_exceptions=False)
    assert shown.output.strip() == str(tmp_path / "plan.html")
    assert (tmp_path / "a.html").stat().st_size > 10_000 < (tmp_path / "plan.html").stat().st_size
    np.save(load, loads_of(1, 3, 8).counts)
    for words, extra in (("--load", []), ("2 layers of 8 experts, the loads of 3", ["--load", str(load)])):
        with pytest.raises(SparsecError, match=words):
            CliRunner().invoke(cli, ["view", out, *extra], catch_exceptions=False)


# ---------------------------------------------------------------------------------------------------- in a browser
@pytest.fixture
def page(chromium: Browser, small: Path) -> Generator[Browser]:
    chromium.open(small)
    yield chromium
    assert not chromium.errors


def pixels(page: Browser, chart: int) -> int:
    """How many colours a map has."""
    return page.evaluate(
        f"(() => {{ const c = document.querySelectorAll('canvas')[{chart}];"
        "const d = new Uint32Array(c.getContext('2d').getImageData(0, 0, c.width, c.height).data.buffer);"
        "return new Set(d).size; })()"
    )


def test_a_large_page_is_shown_within_two_seconds(chromium: Browser, large: Path) -> None:
    assert chromium.open(large) < MAX_MS
    for key, tab in enumerate(("Summary", "Load", "Traffic", "Replicas", "Moves"), 1):
        chromium.press(str(key))
        assert tab in chromium.text('[role=tab][aria-selected="true"]')
    assert not chromium.errors


def test_the_summary_has_every_scenario_and_layer(page: Browser) -> None:
    assert EVIL in page.text(".scenarios") and page.evaluate("window.taken") is None
    assert page.count(".scenarios tbody tr") == 4
    assert page.count(".low:first-of-type .two") >= 3
    page.press("s")  # no scenario is chosen here
    assert not page.errors


def test_the_load_maps_are_linked(page: Browser) -> None:
    page.press("2")
    assert pixels(page, 0) > 5 and pixels(page, 1) > 1
    page.point("canvas")
    assert page.evaluate("[...document.querySelectorAll('.cross')].filter(c => c.style.display == 'block').length") == 4
    assert page.count(".two.lit") == 1
    assert "the mean before" in page.text("#status") and "layer 4" in page.text("#status")
    before = page.text(".layer h2")
    page.press("]", "]")
    assert page.text(".layer h2").startswith("layer 5") and page.text(".layer h2") != before
    page.press("l", "l")
    assert page.text("#status").startswith("layer 5, rank 1") and page.count(".two.lit") == 1
    page.press("s", "b", "o")
    assert page.evaluate("document.querySelector('#scenario').value") == "1"
    order = page.evaluate("[...document.querySelectorAll('.two .front')].map(i => parseFloat(i.style.height))")
    assert order == sorted(order, reverse=True) and len(order) == 8


def test_a_clicked_layer_stays_and_opens_its_replicas(page: Browser) -> None:
    page.point("tr.link", click=True)
    layer = page.text(".layer h2").split(" fullest")[0]
    page.press("4")
    assert page.evaluate("document.querySelector('select').selectedOptions[0].text") == layer
    assert page.count(".places:not(.head)") == 16
    page.press("/", *"rank 3")
    assert page.count(".places:not(.head)") == 3
    page.press("Escape")
    page.point(".places.head .c-expert", click=True)
    assert page.text(".places:not(.head) .c-expert") == "0"


def test_traffic_is_by_ranks_or_nodes(page: Browser) -> None:
    page.press("3")
    assert page.text("h2").startswith("Rank to rank")
    page.point("canvas")
    assert "per million picks" in page.text("#status")
    shares = "[...document.querySelectorAll('.side table:first-child .num')].map(c => parseFloat(c.textContent))"
    static = page.evaluate(shares)
    assert sum(static) == pytest.approx(100, abs=2)
    page.press("p")
    assert page.evaluate(shares)[0] > static[0]  # near replicas first keeps more on its rank
    page.press("n")
    assert page.text("h2").startswith("Node to node")
    assert page.count(".side table:first-child tr") == 2


def test_moves_name_what_is_loaded_anew(page: Browser, chromium: Browser, tmp_path: Path) -> None:
    page.press("5")
    assert "experts to load anew" in page.text(".facts")
    page.point("canvas")
    assert "to load anew of 3" in page.text("#status")
    loads = loads_of(1, 2, 8)
    write_plan_page(tmp_path / "alone.html", drawn("2x2", 2, loads, 0), loads)
    chromium.open(tmp_path / "alone.html")
    chromium.press("5")
    assert "No old plan" in chromium.text("#view")


def test_maps_follow_the_theme(chromium: Browser, small: Path) -> None:
    first = "[...document.querySelector('canvas').getContext('2d').getImageData(2, 2, 1, 1).data].join()"
    chromium.open(small, theme="light")
    chromium.press("2")
    light = chromium.evaluate(first)
    chromium.press("t")
    assert chromium.evaluate(first) != light
    chromium.press("t")
    assert chromium.evaluate(first) == light
    chromium.evaluate("localStorage.clear()")
    assert not chromium.errors
