"""Times of one expert layer: shapes, token counts, routings and threads, every engine in every round."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.cpu.engines import OURS, TRANSFORMERS, Engine, engines
from benchmarks.cpu.roof import Roof
from benchmarks.cpu.timing import Foreign, clock_for, interleave
from benchmarks.figures import one_line, spread
from benchmarks.shapes import Case, Routing, Shape, bank, cases, reference

CHECKED_ROWS = 16  #: of the output, compared with f32
UNIFORM = f"{OURS}, uniform"  #: the row of a skewed table that says what the same number of tokens costs unskewed


@dataclass(frozen=True)
class Settings:
    """What is to be measured."""

    shapes: Sequence[Shape]
    tokens: Sequence[int]
    zipf_tokens: Sequence[int]
    threads: Sequence[int]
    rounds: int
    seconds: float
    peers: Sequence[str]
    weights: Sequence[str]

    def rows(self) -> Iterator[tuple[Routing, int]]:
        for tokens in self.tokens:
            yield "uniform", tokens
        for tokens in self.zipf_tokens:
            yield "zipf", tokens


def measure_shape(shape: Shape, settings: Settings) -> Iterator[dict[str, Any]]:
    """The measurements of a shape, one at a time."""
    print(f"{shape}", flush=True)
    module = bank(shape)
    torch.set_num_threads(max(settings.threads))
    example = cases(shape, 3, "uniform", 1)[0]
    ready, missing = engines(module, example, settings.peers, settings.weights)
    for routing, tokens in settings.rows():
        inputs = cases(shape, tokens, routing, max(2, min(settings.rounds, 1 << 15 // tokens)), seed=tokens)
        errors, failed = _check(module, ready, inputs[0])
        works = {name: engine for name, engine in ready.items() if name not in failed}
        for threads in settings.threads:
            torch.set_num_threads(threads)
            row = _row(shape, works, inputs, tokens, routing, threads, settings)
            for name, figures in row["engines"].items():
                figures["error"] = errors.get(name)
            row["missing"] = missing | failed
            print(line(row), flush=True)
            yield row
    torch.compiler.reset()  # its graphs hold weights


def set_roof(rows: Sequence[dict[str, Any]], roof: Roof) -> None:
    """Say of each time what the roof, as measured by now, would allow."""
    for row in rows:
        shape = Shape.parse(row["shape"])
        for name, figures in row["engines"].items():
            if name != UNIFORM:
                least = roof.least_ms(shape, row["tokens"], row["experts_hit"], row["threads"], figures["weights"])
                figures["roof_ms"] = round(least, 4)


def line(row: dict[str, Any]) -> str:
    """One measurement, short."""
    cells = "  ".join(f"{name} {figures['median']:.2f}" for name, figures in row["engines"].items())
    return f"  T {row['tokens']:<5}{row['routing']:<8} {row['threads']} thr {row['clock']:<5}{cells}  ms"


def _check(module: Any, ready: dict[str, Engine], case: Case) -> tuple[dict[str, float], dict[str, str]]:
    """The error of each engine's output against f32, relative to its norm; and the engines that fail, with why."""
    rows = torch.randperm(len(case.x), generator=torch.Generator().manual_seed(1))[:CHECKED_ROWS]
    right = reference(module, case, rows)
    errors, failed = dict[str, float](), dict[str, str]()
    for name, engine in ready.items():
        try:
            out = engine.run(*engine.prepare(case))[rows].float()
        except RuntimeError as error:
            failed[name] = one_line(error)
            continue
        errors[name] = round(((out - right).norm() / right.norm()).item(), 5)
        if not errors[name] < 0.5:
            failed[name] = f"wrong: error {errors[name]} of the norm"
    return errors, failed


def _row(
    shape: Shape,
    works: dict[str, Engine],
    inputs: list[Case],
    tokens: int,
    routing: Routing,
    threads: int,
    settings: Settings,
) -> dict[str, Any]:
    name_of_clock, clock = clock_for(threads)
    # Engines of one round take different inputs, so that none finds weights in the cache that another has just read.
    step = max(1, len(inputs) // max(1, len(works)))
    runs = {name: _run(engine, inputs, i * step) for i, (name, engine) in enumerate(works.items())}
    if routing == "zipf" and OURS in works:
        uniform = cases(shape, tokens, "uniform", len(inputs), seed=tokens)
        runs[UNIFORM] = _run(works[OURS], uniform, 0)
    for run in runs.values():
        run(-1)
    foreign = Foreign()
    taken = interleave(runs, clock=clock, rounds=settings.rounds, seconds=settings.seconds)
    hit = statistics.fmean(case.hit for case in inputs)
    figures = dict[str, Any]()
    for name, times in taken.items():
        engine = works[OURS if name == UNIFORM else name]
        figures[name] = spread(times) | {"path": engine.path, "weights": engine.weights}
    return {
        "shape": shape.name,
        "tokens": tokens,
        "routing": routing,
        "threads": threads,
        "clock": name_of_clock,
        "experts_hit": round(hit, 2),
        "other_load": foreign.share(),
        "engines": figures,
    }


def _run(engine: Engine, inputs: list[Case], offset: int) -> Callable[[int], object]:
    prepared = [engine.prepare(case) for case in inputs]

    def run(turn: int) -> object:
        return engine.run(*prepared[(turn + offset) % len(prepared)])

    return run


def best_of_transformers(row: dict[str, Any]) -> float | None:
    """Median milliseconds of the faster one; None where neither was measured."""
    return min((row["engines"][name]["median"] for name in TRANSFORMERS if name in row["engines"]), default=None)
