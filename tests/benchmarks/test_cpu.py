"""The benchmark of the CPU measures what it says, and reports what it measured."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.cpu import engines, machine, roof
from benchmarks.cpu.__main__ import main
from benchmarks.cpu.engines import Engine, Missing
from benchmarks.cpu.layers import UNIFORM, Settings, measure_shape, set_roof
from benchmarks.cpu.report import END, START, put_into, render, summary
from benchmarks.cpu.roof import Meter, Roof
from benchmarks.cpu.timing import Foreign, interleave
from benchmarks.figures import one_line, spread
from benchmarks.shapes import SHAPES, Shape, bank, cases, reference

pytest.importorskip("transformers")
ROOT = Path(__file__).parents[2]
TINY = Shape.parse("8x64x32x2")


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def settings(**given: Any) -> Settings:
    plain: dict[str, Any] = {"shapes": [TINY], "tokens": [5], "zipf_tokens": [], "threads": [1], "rounds": 1}
    plain |= {"seconds": 1.0, "peers": ["eager"], "weights": ["bf16"]}
    return Settings(**(plain | given))


def test_shapes_by_name_and_by_sizes() -> None:
    assert Shape.parse("olmoe") == Shape("olmoe", 64, 2048, 1024, 8)
    assert (TINY.experts, TINY.hidden, TINY.width, TINY.k) == (8, 64, 32, 2)
    assert TINY.flops(3) == 2 * 3 * 2 * 3 * 64 * 32
    for text in ("olmo", "8x64x32", "8x64x0x2", "2x64x32x4"):
        with pytest.raises(ValueError, match=text):
            Shape.parse(text)


def test_a_single_token_takes_the_experts_in_turn() -> None:
    ids = [case.ids[0].tolist() for case in cases(TINY, 1, "uniform", 5)]
    assert ids == [[0, 1], [2, 3], [4, 5], [6, 7], [0, 1]]


def test_zipf_routing_is_skewed_and_uniform_is_not() -> None:
    def share_of_most_asked(routing: Any) -> float:
        (case,) = cases(TINY, 4000, routing, 1)
        assert (case.ids.sort(1).values.diff(dim=1) > 0).all()  # no expert twice for one row
        return case.ids.flatten().bincount(minlength=8).max().item() / 4000

    assert 0.22 < share_of_most_asked("uniform") < 0.28
    assert share_of_most_asked("zipf") > 0.5


def test_the_reference_is_what_transformers_computes() -> None:
    module, (case,) = bank(TINY), cases(TINY, 7, "uniform", 1)
    rows = torch.tensor([6, 0, 3])
    right = reference(module, case, rows)
    out = module(case.x, case.ids, case.weights)[rows].float()
    assert 0 < (out - right).norm() / right.norm() < 0.02


def test_every_engine_is_called_in_every_round() -> None:
    called = list[tuple[str, int]]()
    runs = {name: lambda turn, name=name: called.append((name, turn)) for name in "abc"}
    ticks = iter(range(100))
    taken = interleave(runs, clock=lambda: float(next(ticks)), rounds=4, seconds=100)
    assert sorted(called) == [(name, turn) for name in "abc" for turn in range(4)]
    assert [turn for _, turn in called] == sorted(turn for _, turn in called)
    assert taken == {name: [1000.0] * 4 for name in "abc"}


def test_time_is_up_after_three_rounds_at_the_earliest() -> None:
    taken = interleave({"a": lambda turn: None}, clock=lambda: 0.0, rounds=50, seconds=0)
    assert len(taken["a"]) == 3


def test_spread() -> None:
    assert spread([5.0, 1.0, 2.0, 4.0, 3.0]) == {"median": 3, "q1": 2, "q3": 4, "min": 1, "max": 5, "rounds": 5}
    assert spread([2.0])["q3"] == 2.0
    assert Foreign().share() is None  # too short to say


def test_roof_is_the_larger_of_arithmetic_and_reading() -> None:
    found = Roof("by hand", gbps={1: 10.0}, tflops={1: 2.0})
    shape = SHAPES["olmoe"]
    assert found.least_ms(shape, 1, 8, 1) == pytest.approx(8 * 3 * 2048 * 1024 * 2 / 10e9 * 1e3)
    assert found.least_ms(shape, 1, 8, 1, "int8") == pytest.approx(8 * 3 * 2048 * 1024 / 10e9 * 1e3)
    assert found.least_ms(shape, 2048, 64, 1) == pytest.approx(2048 * 8 * 3 * 2048 * 1024 * 2 / 2e12 * 1e3)


def test_roof_is_measured() -> None:
    meter = Meter([1])
    if meter._program is None:
        pytest.skip(meter.roof.how)
    gbps, tflops = roof._run(meter._program, 1, 8 << 20)
    assert 0.5 < gbps < 5000
    assert 0.001 < tflops < 100


def test_without_a_compiler_the_roof_is_an_estimate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "compiler", lambda: None)
    monkeypatch.setattr(roof, "_by_torch", lambda threads: (3.0, 0.5))
    meter = Meter([1])
    assert meter.measure().json()["threads"] == {"1": {"gbps": 3.0, "tflops": 0.5}}
    assert "no C++ compiler" in meter.roof.how


def test_a_row_of_a_layer() -> None:
    found = settings(zipf_tokens=[6])
    plain, skewed = measure_shape(TINY, found)
    set_roof([plain, skewed], Roof("by hand", gbps={1: 10.0}, tflops={1: 2.0}))
    assert (plain["tokens"], plain["routing"], plain["clock"]) == (5, "uniform", "cpu")
    assert set(plain["engines"]) == {"transformers eager", "sparsec"}
    for figures in plain["engines"].values():
        assert 0 < figures["error"] < 0.02
        assert 0 < figures["roof_ms"] < figures["median"]
    assert set(skewed["engines"]) == {"transformers eager", "sparsec", UNIFORM}


def test_a_missing_peer_is_a_reason(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(engines.VLLM_VARIABLE, str(tmp_path / "none.so"))
    (row,) = measure_shape(TINY, settings(peers=["vllm"]))
    assert set(row["engines"]) == {"sparsec"}
    assert row["missing"]["vllm"].startswith("not installed: ")


def test_a_library_that_does_not_load_is_a_reason(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    library = tmp_path / "broken.so"
    library.write_text("no library")
    monkeypatch.setenv(engines.VLLM_VARIABLE, str(library))
    with pytest.raises(Missing, match=r"does not fit PyTorch .*: broken.so: file too short") as raised:
        engines.load_vllm()
    assert str(tmp_path) not in str(raised.value)


def test_a_wrong_engine_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = Engine(lambda x, ids, weights: torch.zeros_like(x), "zeros")
    monkeypatch.setattr(engines, "transformers", lambda module, implementation: wrong)
    (row,) = measure_shape(TINY, settings())
    assert set(row["engines"]) == {"sparsec"}
    assert row["missing"] == {"transformers eager": "wrong: error 1.0 of the norm"}


def test_errors_are_told_without_paths() -> None:
    assert one_line(RuntimeError("\ncannot open /some/where/file.so: no\nmore")) == "cannot open file.so: no"
    assert one_line(ValueError()) == "ValueError"


def timed(median: float, error: float = 0.004, **more: Any) -> dict[str, Any]:
    plain: dict[str, Any] = {"median": median, "q1": median * 0.9, "q3": median * 1.1, "min": 0.1, "max": 99.0}
    return plain | {"rounds": 9, "path": "cpp, amx", "weights": "bf16", "roof_ms": 3.0, "error": error} | more


def results() -> dict[str, Any]:
    """Two rows of OLMoE and one of a model, by hand."""
    row: dict[str, Any] = {"shape": "olmoe", "tokens": 1, "routing": "uniform", "threads": 2, "clock": "wall"}
    row |= {"experts_hit": 8.0, "other_load": 0.02, "missing": {"torch.compile": "is | not here"}}
    peers = {"transformers eager": timed(9.0), "transformers grouped_mm": timed(8.0), "vllm": timed(4.2)}
    plain = row | {"engines": peers | {"sparsec": timed(4.0), "sparsec int8": timed(2.0, 0.012, weights="int8")}}
    skewed = row | {"routing": "zipf", "tokens": 512, "other_load": 0.5}
    skewed |= {"engines": peers | {"sparsec": timed(5.0), UNIFORM: timed(4.0)}}
    model = {"model": "small", "phase": "decode", "tokens": 1, "threads": 2, "clock": "wall", "other_load": None}
    model |= {"missing": {}, "engines": {"transformers eager": timed(30.0), "sparsec": timed(15.0)}}
    host: dict[str, Any] = {"cpu": "A CPU", "cores": 2, "flags": ["avx2", "amx_bf16"], "caches": {"L2": "2M"}}
    host |= {"memory_gib": 23.5, "huge_pages": "madvise", "python": "3.11.7", "packages": {"torch": "2.13"}}
    host |= {"compiler": None, "commit": "abc", "changed": False, "load_before": 0.1, "load_after": 0.2}
    rates = {"how": "by hand", "threads": {"1": {"gbps": 18.0, "tflops": 3.5}, "2": {"gbps": 36.0, "tflops": 7.0}}}
    return {
        "machine": host,
        "roof": rates,
        "date": "today",
        "layers": [plain, skewed],
        "models": [model],
        "missing": {},
    }


def test_report() -> None:
    lines = render(results()).splitlines()
    name = "olmoe (E 64, H 2048, I 1024, k 8)"
    assert f"| {name} | 2.00x / 1.05x / 75% |" in lines
    assert any("2.00x (olmoe) of 1.90x: met" in line for line in lines)
    assert any("75% (olmoe) of 92%: **missed**" in line for line in lines)
    skew = "512 | 2 threads, wall time | 5.00 [4.50, 5.50] | 4.00 [3.60, 4.40] | 1.25 **missed** | 1.60x | 0.84x |"
    assert f"| {name} | {skew}" in lines
    assert f"| {name} | int8 | 1 | 2 threads, wall time | 2.00 [1.80, 2.20] | 2.00x | 150% | 1.20% |" in lines
    assert "| torch.compile | is \\| not here |" in lines
    assert "| small | decode 1 | 2 threads, wall time |  | 30.0 [27.0, 33.0] | 15.0 [13.5, 16.5] | 2.00x | - |" in lines
    times = next(line for line in lines if line.startswith("| 1 | uniform |"))
    assert times.endswith("| 4.00 [3.60, 4.40] | 2.00 [1.80, 2.20] | missing |")


def test_ratios_beside_other_load_are_marked() -> None:
    busy = results()
    busy["layers"][0]["other_load"] = 0.3
    assert "2.00x / 1.05x / 75%\\* |" in summary(busy)
    assert "\\*" not in summary(results())


def test_a_report_of_nothing_but_sparsec() -> None:
    alone = copy.deepcopy(results())
    for row in [*alone["layers"], *alone["models"]]:
        row["engines"] = {"sparsec": timed(4.0)}
    assert "| - / - / 75% |" in render(alone)


def test_the_summary_goes_between_its_marks() -> None:
    text = put_into(f"before\n{START}\nold\n{END}\nafter\n", results(), "cpu.md")
    assert text.startswith(f"before\n{START}\nMeasured on A CPU (2 cores, AMX), 2 threads, wall time.")
    assert "old" not in text
    assert text.endswith(f"[cpu.md](cpu.md).\n{END}\nafter\n")
    with pytest.raises(ValueError, match="marks"):
        put_into("no marks", results(), "cpu.md")


def test_the_readme_says_what_was_measured() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    linked = [path for path in (ROOT / "benchmarks/results").glob("cpu-*.json") if path.stem in readme]
    for path in linked:
        found = json.loads(path.read_text(encoding="utf-8"))
        assert put_into(readme, found, f"benchmarks/results/{path.stem}.md") == readme
    assert linked or f"{START}\n{END}" in readme


def test_reports_are_what_their_numbers_say() -> None:
    for path in (ROOT / "benchmarks/results").glob("cpu-*.json"):
        assert render(json.loads(path.read_text(encoding="utf-8"))) == path.with_suffix(".md").read_text(
            encoding="utf-8"
        )


def test_the_command_writes_both_files(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(machine, "cpu_name", lambda: "Some(R) CPU @ 3 GHz")
    monkeypatch.setattr(machine, "compiler", lambda: None)
    monkeypatch.setattr(roof, "_by_torch", lambda threads: (3.0, 0.5))
    words = (
        "--shapes 8x64x32x2 --tokens 2 --routing uniform --threads 1 --rounds 1 --peers eager --weights bf16 --layers 0"
    )
    main([*words.split(), "--results", str(tmp_path)])
    found = json.loads((tmp_path / "cpu-some-cpu.json").read_text())
    assert [row["tokens"] for row in found["layers"]] == [2]
    assert found["layers"][0]["engines"]["sparsec"]["rounds"] == 1
    text = (tmp_path / "cpu-some-cpu.md").read_text()
    assert text == render(found)
    assert str(tmp_path) not in text
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cpu-some-cpu.json", "cpu-some-cpu.md"]


def test_an_unknown_shape_ends_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--shapes", "olmo"])
    assert "there is no shape 'olmo'" in capsys.readouterr().err
