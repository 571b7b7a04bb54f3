"""The benchmark of the GPU does what it says, on devices that are none."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks.gpu import ahead, variants
from benchmarks.gpu.__main__ import REHEARSED, main, measured
from benchmarks.gpu.bench import Bench
from benchmarks.gpu.cells import MODES, TOKENS, Cell, Roof, Work, cells, in_turn, work
from benchmarks.gpu.crew import Inside, Lost, Process
from benchmarks.gpu.device import Gpu, Launched, Rehearsal, gaps
from benchmarks.gpu.engines import GROUPED, OURS, VLLM_DEFAULT, VLLM_TUNED, Engine, Setting
from benchmarks.gpu.gather import gather
from benchmarks.gpu.report import END, NOTHING, START, put_into, render, summary
from benchmarks.gpu.run import Run, Settings
from benchmarks.gpu.worker import Desk
from benchmarks.shapes import GPU_SHAPES, SHAPES, Shape, bank, cases, reference
from sparsec.codegen.emit import Emitted
from sparsec.ir.core import Module
from sparsec.runtime.plan import Kernel, Plan, Variant
from tests.codegen.triton import build as build_kernel

pytest.importorskip("transformers")
ROOT = Path(__file__).parents[2]
TINY = Shape.parse("8x64x32x2")
ONE = Cell("8x64x32x2", 5, "uniform", "forward")


def test_every_combination_is_a_cell_and_the_important_ones_come_first() -> None:
    shapes = [SHAPES[name] for name in GPU_SHAPES]
    found = cells(shapes, TOKENS, ("uniform", "zipf"), MODES)
    assert len(found) == len(set(found)) == 6 * 9 * 2 * 2
    assert [str(cell) for cell in found[:2]] == ["qwen3 T 1 uniform forward", "mixtral T 1 uniform forward"]
    first = {(cell.tokens, cell.routing, cell.mode) for cell in found[: 6 * 4]}
    assert first == {(count, "uniform", "forward") for count in (1, 64, 1024, 32768)}
    assert (found[-1].routing, found[-1].mode) == ("zipf", "training")


def test_work_of_a_layer() -> None:
    shape = SHAPES["mixtral"]  # E 8, H 4096, I 14336, k 2
    expert = 3 * 4096 * 14336 * 2
    assert work(shape, Cell("mixtral", 16, "uniform", "forward"), 7.5) == Work(
        6 * 16 * 2 * 4096 * 14336, 7.5 * expert + 2 * 16 * 4096 * 2
    )
    training = work(shape, Cell("mixtral", 16, "uniform", "training"), 7.5)
    assert training == Work(18 * 16 * 2 * 4096 * 14336, (2 * 7.5 + 8) * expert + 4 * 16 * 4096 * 2)
    assert work(shape, ONE, 8, 1.0).bytes == 8 * expert / 2 + 2 * 5 * 4096 * 2


def test_the_roof_says_which_limit_counts() -> None:
    roof = Roof(tbps=3.0, tflops=800.0)
    assert roof.least(Work(flops=8e11, bytes=1e9)) == (1.0, "compute")
    assert roof.least(Work(flops=8e9, bytes=3e9)) == (1.0, "memory")


def test_engines_take_turns_forwards_and_backwards() -> None:
    assert list(in_turn(["a", "b", "c"], 3)) == [(0, ["a", "b", "c"]), (1, ["c", "b", "a"]), (2, ["a", "b", "c"])]


def test_gaps_between_launches() -> None:
    ran = [Launched("a", 0.0, 10.0), Launched("b", 12.5, 20.0), Launched("c", 19.0, 30.0)]
    found = gaps(ran)
    assert found is not None
    assert {key: found[key] for key in ("kernels", "kernels_us", "span_us", "largest_gap_us", "median_gap_us")} == {
        "kernels": 3, "kernels_us": 28.5, "span_us": 30.0, "largest_gap_us": 2.5, "median_gap_us": 1.25,
    }  # fmt: skip
    assert gaps([]) is None


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def bench(run: Callable[..., torch.Tensor], **more: Any) -> Bench:
    """One engine that is `run`, given the layer's right result."""
    module = bank(TINY)

    def layer(x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        (case,) = [type(cases(TINY, 1, "uniform", 1)[0])(x, ids, weights)]
        return run(reference(module, case, torch.arange(len(x))).bfloat16())

    made = Bench(Setting(TINY, module, Rehearsal()), [])
    made.engines["it"] = Engine(layer, lambda tokens: "by hand", invariant=True, **more)
    return made


def test_a_right_engine_is_timed_and_its_error_told() -> None:
    made = bench(lambda y: y)
    answer = made.check(ONE)
    assert answer["failed"] == {} and answer["invariant"] == {"it": True}
    assert 0 < answer["errors"]["it"]["y"] < 0.01
    timed = made.time(ONE, ["it"], 5.0, 7)
    assert timed["engines"]["it"]["rounds"] == 7 and timed["engines"]["it"]["path"] == "by hand"
    assert timed["failed"] == {}


@pytest.mark.parametrize(
    ("run", "why"),
    [
        (lambda y: y * 1.1, "of the norm (y)"),
        (torch.empty_like, "numbers that are not finite"),  # nobody writes it
        (lambda y: torch.where(torch.arange(len(y))[:, None] == 4, y.new_empty(y.shape), y), "holds 64 numbers"),
    ],
)
def test_a_wrong_engine_fails(run: Callable[..., torch.Tensor], why: str) -> None:
    answer = bench(run).check(ONE)
    assert why in answer["failed"]["it"]
    assert "it" not in answer["invariant"]


def test_rows_whose_bits_depend_on_their_batch_are_seen() -> None:
    answer = bench(lambda y: y if len(y) != 1 else y * (1 + 2**-7)).check(ONE)
    assert answer["failed"] == {} and answer["invariant"] == {"it": False}


def test_an_engine_that_cannot_be_trained_says_why() -> None:
    answer = bench(lambda y: y, untrained="it is a stub").check(Cell("8x64x32x2", 5, "uniform", "training"))
    assert answer["failed"] == {"it": "it is a stub"}


def test_gradients_are_checked_against_f64() -> None:
    module = bank(TINY)
    made = Bench(Setting(TINY, module, Rehearsal()), [GROUPED])
    cell = Cell("8x64x32x2", 40, "uniform", "training")
    answer = made.check(cell)
    assert answer["failed"] == {}
    assert set(answer["errors"][GROUPED]) == {"y", "dx", "dweights", "dgate_up", "ddown"}
    right = made.engines[GROUPED]
    assert right.train is not None
    first = right.train
    made.engines[GROUPED] = Engine(right.run, right.path, lambda x, i, w: first(x, i, w) + 0 * x, banks=right.banks)
    assert made.check(cell)["failed"] == {}
    made.engines[GROUPED] = Engine(
        right.run, right.path, lambda x, i, w: first(x, i, w) + x - x.detach(), banks=right.banks
    )
    assert "dx" in made.check(cell)["failed"][GROUPED]


class Scripted:
    """A worker that answers as told and keeps what it was asked; time passes by `clock`."""

    def __init__(self, clock: list[float], script: Callable[[Mapping[str, Any]], Any]) -> None:
        self.clock, self.script, self.closed = clock, script, False

    def ask(self, command: Mapping[str, Any], seconds: float) -> dict[str, Any]:
        self.clock[0] += 1.0
        answer = self.script(command)
        if isinstance(answer, Exception):
            raise answer
        return dict(answer)

    def close(self) -> None:
        self.closed = True


def figures(median: float, **more: Any) -> dict[str, Any]:
    plain = {"median": median, "q1": median * 0.9, "q3": median * 1.1, "min": median * 0.8, "max": median * 2}
    return plain | {"rounds": 50, "path": "a path", "graph": True} | more


def fine(command: Mapping[str, Any]) -> dict[str, Any]:
    """Answers of a worker where all goes well."""
    names = [OURS, GROUPED, VLLM_DEFAULT]
    match command["do"]:
        case "describe":
            return {"chip": "NVIDIA H100 80GB HBM3", "multiprocessors": 132}
        case "roof":
            return {"tbps": 3.0, "tflops": 800.0}
        case "set up":
            return {"engines": names, "missing": {"Liger": "DIR has no folder"}, "items": dict.fromkeys(names, 2.0)}
        case "check":
            right = [name for name in names if name not in command["without"]]
            return {"errors": {name: {"y": 0.004} for name in right}, "failed": {}, "invariant": {OURS: True}}
        case _:
            launches = {"kernels": 3, "kernels_us": 90.0, "span_us": 95.0, "largest_gap_us": 1.5, "median_gap_us": 1.0}
            timed = {name: figures(1.0 + i) for i, name in enumerate(command["engines"])}
            return {"engines": timed, "failed": {}, "experts_hit": 100.0, "launches": launches}


def run(
    script: Callable[[Mapping[str, Any]], Any] = fine, seconds: float = 1000, tokens: tuple[int, ...] = (1, 4096)
) -> tuple[dict[str, Any], list[Scripted], list[int]]:
    """Results of a scripted run over Qwen3's shape, its workers, and how many rows there were at each save."""
    clock, workers, saved = [0.0], list[Scripted](), list[int]()

    def hire() -> Scripted:
        workers.append(Scripted(clock, script))
        return workers[-1]

    shapes = [SHAPES["qwen3"]]
    settings = Settings(
        shapes, [OURS, GROUPED, VLLM_DEFAULT], cells(shapes, tokens, ("uniform",), ("forward",)), seconds
    )
    made = Run(settings, hire, lambda found: saved.append(len(found["rows"])), lambda: clock[0], lambda text: None)
    return made.go(lambda found: found), workers, saved


def test_a_run_saves_after_every_cell() -> None:
    results, workers, saved = run()
    assert saved == [0, 1, 2, 2]
    assert all(worker.closed for worker in workers)
    row = results["rows"][0]
    assert (row["tokens"], row["engines"][OURS]["error"]) == (1, 0.004)
    expert = 3 * 2048 * 768 * 2
    assert row["engines"][OURS]["roof_ms"] == pytest.approx((100 * expert + 2 * 2048 * 2) / 3e9, abs=1e-4)
    assert row["engines"][OURS]["limiter"] == "memory"
    assert row["engines"][OURS]["tbps"] == pytest.approx(100 * expert / 1e9, abs=1e-3)
    assert results["missing"]["qwen3"] == {"Liger": "DIR has no folder"}


def test_the_best_roof_counts_for_all() -> None:
    rates = iter([{"tbps": 2.0, "tflops": 700.0}, {"tbps": 3.0, "tflops": 600.0}])
    results, _, _ = run(lambda command: next(rates) if command["do"] == "roof" else fine(command))
    assert results["roofs"] == [{"tbps": 2.0, "tflops": 700.0}, {"tbps": 3.0, "tflops": 600.0}]
    many = results["rows"][1]["engines"][OURS]
    assert many["roof_ms"] == pytest.approx(6 * 4096 * 8 * 2048 * 768 / 7e11, abs=1e-3)
    assert many["limiter"] == "compute"


def test_when_the_time_is_up_cells_say_so() -> None:
    results, _, _ = run(seconds=10.0)  # describe, roof, set up, two checks, one cell
    assert ["not_measured" in row for row in results["rows"]] == [False, True]
    assert results["rows"][1]["not_measured"] == "the time was up"
    assert results["roofs"] == [{"tbps": 3.0, "tflops": 800.0}]


def test_an_engine_that_kills_the_process_is_left_out_of_its_cell_alone() -> None:
    def script(command: Mapping[str, Any]) -> Any:
        if command["do"] == "check" and command["cell"]["tokens"] == 1 and OURS not in command["without"]:
            return Lost(OURS, f"the process died at {OURS}: illegal memory access")
        return fine(command)

    results, workers, _ = run(script)
    first, second = results["rows"]
    assert first["failed"] == {OURS: f"the process died at {OURS}: illegal memory access"}
    assert set(first["engines"]) == {GROUPED, VLLM_DEFAULT}
    assert set(second["engines"]) == {OURS, GROUPED, VLLM_DEFAULT}
    assert len(workers) == 4  # roof, the one that died, its successor, roof
    assert f"qwen3 T 1, forward: {OURS}" in render(results)


def test_an_engine_that_kills_the_process_again_and_again_is_not_made_any_more() -> None:
    asked = list[tuple[int, bool]]()

    def script(command: Mapping[str, Any]) -> Any:
        if command["do"] == "time":
            asked.append((command["cell"]["tokens"], VLLM_DEFAULT in command["engines"]))
            return Lost(VLLM_DEFAULT, "it died") if VLLM_DEFAULT in command["engines"] else fine(command)
        if command["do"] == "set up":
            return fine(command) | {"engines": command["engines"]}
        return fine(command)

    results, _, _ = run(script, tokens=(1, 64, 1024, 4096))
    assert asked == [(1, True), (1, False), (64, True), (64, False), (1024, False), (4096, False)]
    assert [row["failed"] for row in results["rows"]] == [{VLLM_DEFAULT: "it died"}] * 2 + [{}] * 2
    assert all({*row["engines"]} == {OURS, GROUPED} for row in results["rows"])
    assert results["missing"]["qwen3"][VLLM_DEFAULT] == "it took its process along twice: it died"


def test_a_process_that_always_dies_is_given_up() -> None:
    def script(command: Mapping[str, Any]) -> Any:
        return Lost("check", "the process died") if command["do"] == "check" else fine(command)

    results, _, _ = run(script)
    assert all(row["not_measured"].startswith("its process died too often") for row in results["rows"])
    assert "its process died too often" in results["missing"]["qwen3"]["all"]


def test_a_wrong_engine_is_not_timed() -> None:
    def script(command: Mapping[str, Any]) -> Any:
        answer = fine(command)
        if command["do"] == "check":
            answer["failed"] = {VLLM_DEFAULT: "wrong: error 30% of the norm (y)"}
        if command["do"] == "time":
            assert command["engines"] == [OURS, GROUPED]
        return answer

    results, _, _ = run(script)
    assert [set(row["engines"]) for row in results["rows"]] == [{OURS, GROUPED}] * 2


def test_a_cell_that_lacked_memory_beside_others_is_checked_again() -> None:
    asked = list[int]()

    def script(command: Mapping[str, Any]) -> Any:
        if command["do"] == "check" and command["cell"]["tokens"] == 4096:
            asked.append(1)
            if len(asked) == 1:
                return {"errors": {}, "failed": {OURS: "CUDA out of memory. Tried ..."}, "invariant": {}}
        return fine(command)

    results, _, _ = run(script)
    assert len(asked) == 2
    assert OURS in results["rows"][1]["engines"]


def test_a_rehearsal_runs_the_whole_program(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = "--rehearse --minutes 2 --tokens 3 --routing uniform --modes forward --rounds 6 --shapes 8x64x32x2"
    main([*words.split(), "--results", str(tmp_path)])
    found = json.loads((tmp_path / "gpu-rehearsal.json").read_text())
    (row,) = found["rows"]
    assert set(row["engines"]) == {OURS, GROUPED}
    assert row["failed"] == {} and row["invariant"] == {OURS: True}
    assert (tmp_path / "gpu-rehearsal.md").read_text() == render(found)
    assert "1 of 1 cells measured" in capsys.readouterr().out
    assert str(tmp_path) not in json.dumps(found)
    assert Shape.parse(REHEARSED[0]) == TINY


def test_a_worker_in_a_process_of_its_own() -> None:
    worker = Process("rehearsal", None, None)
    try:
        assert worker.ask({"do": "describe"}, 120.0) == {"chip": "Rehearsal", "target": "cpu"}
        assert "no command 'dance'" in worker.ask({"do": "dance"}, 60.0)["error"]
        worker._process.kill()
        with pytest.raises(Lost, match=r"died at describe|is gone"):
            worker.ask({"do": "describe"}, 60.0)
    finally:
        worker.close()


def test_a_worker_tells_errors_of_a_command() -> None:
    desk = Desk(Rehearsal(), None, None, lambda name: None)
    assert "there is no shape 'none'" in desk.answer({"do": "set up", "shape": "none", "engines": []})["error"]
    assert Inside().ask({"do": "roof"}, 1.0) == {"tbps": 1.0, "tflops": 1.0}


def test_report() -> None:
    results, _, _ = run()
    lines = render(results).splitlines()
    assert "| qwen3, 32768 tokens: TFLOP/s | not measured | 520 |  |" in lines
    assert "| against vLLM, geometric mean | 3.00x | 1.25x | met |" in lines
    assert "| largest gap between kernels, us | 1.5 (qwen3 T 1) | 3.0 | met |" in lines
    assert "| a row's bits in any batch | 2 of 2 cells | all cells | met |" in lines
    share = (100 * 3 * 2048 * 768 * 2 + 8192) / 3e9
    title = "| qwen3 (E 128, H 2048, I 768, k 8) |"
    assert any(line.startswith(f"{title} {share:.0%} m / 3.00x / 2.00x |") for line in lines)
    assert "| qwen3: Liger | DIR has no folder |" in lines


def test_a_report_of_missed_targets() -> None:
    results, _, _ = run()
    for row in results["rows"]:
        row["engines"][VLLM_TUNED] = figures(0.5, error=0.004, item=2.0)
        row["launches"]["largest_gap_us"] = 4.0
        row["invariant"][OURS] = False
    text = render(results)
    assert "| against vLLM, every cell | 0.50x (qwen3 T 1) | 1.00x | **missed** |" in text
    assert "4.0 (qwen3 T 1) | 3.0 | **missed** |" in text
    assert "| a row's bits in any batch | 0 of 2 cells; not qwen3 T 1, qwen3 T 4096 | all cells | **missed** |" in text


def test_the_summary_goes_between_its_marks() -> None:
    results, _, _ = run()
    text = put_into(f"before\n{START}\nold\n{END}\nafter\n", results, "gpu.md")
    assert "old" not in text and summary(results) in text and text.endswith(f"[gpu.md](gpu.md).\n{END}\nafter\n")
    assert put_into(f"{START}{END}", None, "") == f"{START}\n{NOTHING}\n{END}"


def test_the_readme_says_what_was_measured() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    found = measured(ROOT / "benchmarks/results")
    results = json.loads(found.read_text(encoding="utf-8")) if found else None
    assert put_into(readme, results, f"benchmarks/results/{found.stem}.md" if found else "") == readme


def test_reports_are_what_their_numbers_say() -> None:
    for path in (ROOT / "benchmarks/results").glob("gpu-*.json"):
        assert render(json.loads(path.read_text(encoding="utf-8"))) == path.with_suffix(".md").read_text(
            encoding="utf-8"
        )


def test_peers_are_taken_out_of_wheels(tmp_path: Path) -> None:
    import zipfile

    experts = "vllm/model_executor/layers/fused_moe"
    names = [f"{experts}/fused_moe.py", f"{experts}/configs/E=8.json", "vllm/third_party/triton_kernels/a/b.py"]
    names += ["vllm/_moe_C.abi3.so", "liger_kernel/ops/x.py", "vllm/other.py", f"{experts}/configs/../../x.json"]
    with zipfile.ZipFile(tmp_path / "w.whl", "w") as wheel:
        for name in names:
            wheel.writestr(name, name)
    assert gather(tmp_path / "dir", [tmp_path / "w.whl"], operators=True) == 5
    kept = sorted(str(path.relative_to(tmp_path / "dir")) for path in (tmp_path / "dir").rglob("*.*") if path.is_file())
    assert kept == [
        "liger_kernel/ops/x.py", "triton_kernels/a/b.py", "vllm/_moe_C.abi3.so", "vllm/configs/E=8.json",
        "vllm/fused_moe.py",
    ]  # fmt: skip


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_command_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([])
    assert "there is no GPU" in capsys.readouterr().err


def test_variants_of_every_family_are_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is tried, in which order, and what is told of it; nothing is compiled or run."""
    shape = Shape.parse("16x512x256x4")
    silu = lambda a, b: torch.nn.functional.silu(a) * b  # noqa: E731
    funcs = {
        "moe.gather_gemm": build_kernel.gather_gemm(silu, 512, 256, 16, 4, torch.bfloat16),
        "moe.gemm_combine": build_kernel.gemm_combine(512, 256, 16, 4, torch.bfloat16, listed=True),
    }
    monkeypatch.setattr(variants, "kernels", lambda shape, target: funcs)
    families = ["tiles", "tma", "swap", "persistent", "rows"]
    built = list[variants.Job]()

    def build(jobs: Sequence[variants.Job]) -> Iterator[Any]:
        built.extend(jobs)
        return iter(["no registers left" if job.variant.kernel == "swap" else object() for job in jobs])

    def compare(job: variants.Job, made: Any) -> dict[str, Any]:
        return {"failed": "wrong"} if job.variant.kernel == "tma" else {"us": 10.0, "error": 0.001}

    rows = list(variants.measure([shape], [4096], "cuda:sm_90", 1, build, compare, lambda: True))
    assert len(rows) == len(built) >= 8
    first = [job.variant.kernel for job in built if (job.op, job.tokens) == ("moe.gemm_combine", 4096)]
    assert first[0] == "tiles" and set(first) <= {*families, "gathered"}
    warps = {job.variant.num_warps for job in built if job.variant.kernel == "persistent"}
    assert warps == {4, 8}  # both forms, whichever the schedule takes
    told = {row["variant"]["kernel"]: row.get("failed") for row in rows}
    assert told["swap"] == "no registers left" and told["tma"] == "wrong" and told["tiles"] is None
    text = variants.render({"machine": {"chip": "H", "packages": {}}, "date": "today", "rows": rows})
    assert "| no registers left |" in text and "## Measured over predicted" in text
    late = variants.measure([shape], [1], "cuda:sm_90", 1, build, compare, lambda: False)
    assert {row["failed"] for row in late} == {"the time was up"}


def test_kernels_that_were_compiled_before_are_found(tmp_path: Path) -> None:
    choice = {"kernel": "swap", "block_m": 16, "block_n": 64, "block_k": 128}
    kernel = Kernel("up", "moe.gather_gemm", "triton", (), (), "t", {}, {}, [
        Variant(64, {"choice": choice}), Variant(None, {"choice": choice | {"kernel": "tma", "block_m": 128}}),
    ])  # fmt: skip
    emitted = Emitted(Plan([], [], [], {"up": kernel}, {}, {}), {"kernels/up.cubin": b"code"})
    made = SimpleNamespace(target=SimpleNamespace(kind="cuda"), emitted=emitted)
    made.result = SimpleNamespace(module=Module([], {"phase": "lower"}))
    assert ahead.emitted(made, tmp_path) == (emitted.plan, emitted.files)
    made.emitted = None  # it is not compiled again
    plan, files = ahead.emitted(made, tmp_path)
    assert (plan, files) == (emitted.plan, emitted.files)
    assert [ahead.chosen(plan, tokens) for tokens in (64, 65)] == ["swap 16x64x128", "tma 128x64x128"]
    made.result.module.attrs["phase"] = "other"  # another program
    with pytest.raises(AttributeError):
        ahead.emitted(made, tmp_path)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_small_layer_on_the_gpu() -> None:
    """Every part that talks to the GPU: f64, poison, rows in other batches, graphs, launches, gradients."""
    device = Gpu()
    made = Bench(Setting(Shape.parse("16x256x128x4"), None, device), [OURS, GROUPED])
    assert made.missing == {}
    for tokens, routing, mode in (
        (1, "uniform", "forward"), (5, "uniform", "forward"), (64, "zipf", "forward"), (300, "uniform", "forward"),
        (5000, "zipf", "forward"), (300, "uniform", "training"), (5000, "zipf", "training"),
    ):  # fmt: skip
        cell = Cell("16x256x128x4", tokens, routing, mode)  # type: ignore[arg-type]
        answer = made.check(cell)
        assert answer["failed"] == {}, cell
        assert set(answer["errors"]) == {OURS, GROUPED}
        timed = made.time(cell, [OURS, GROUPED], 5.0, 6)
        assert timed["failed"] == {} and timed["engines"][OURS]["graph"], cell
        assert timed["launches"]["kernels"] >= 2 * cell.calls
    tbps, tflops = device.roof()
    assert 0.1 < tbps < 20 and 10 < tflops < 5000
