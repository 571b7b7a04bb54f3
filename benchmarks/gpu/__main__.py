"""The command `python -m benchmarks.gpu`; what it does is told by `benchmarks.gpu`."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

import benchmarks.gpu
from benchmarks import machine
from benchmarks.figures import Row, save
from benchmarks.gpu import ahead
from benchmarks.gpu.cells import MODES, TOKENS, cells
from benchmarks.gpu.crew import Inside, Process
from benchmarks.gpu.engines import GROUPED, OURS, PACKED, PEERS
from benchmarks.gpu.report import render, write_readme
from benchmarks.gpu.run import Run, Settings
from benchmarks.shapes import GPU_SHAPES, SHAPES, Shape

RESULTS = Path(__file__).parents[1] / "results"
README = Path(__file__).parents[2] / "README.md"
PACKAGES = ("torch", "triton", "transformers")
REHEARSED = ("8x64x32x2", "4x32x64x1")


def main(words: Sequence[str] | None = None) -> None:
    """Run what the command line asks for."""
    parser = _parser()
    options = parser.parse_args(words)
    if options.readme:
        found = measured(options.results)
        results = json.loads(found.read_text(encoding="utf-8")) if found else None
        write_readme(README, results, f"benchmarks/results/{found.stem}.md" if found else "")
        return
    shapes = [
        Shape.argument(parser, text) for text in options.shapes or (REHEARSED if options.rehearse else GPU_SHAPES)
    ]
    if options.compile_only:
        if options.ahead is None:
            parser.error("--compile-only needs --ahead FOLDER")
        compile_all(shapes, options.compile_only, options.ahead, options.processes)
        return
    if not options.rehearse and not torch.cuda.is_available():
        parser.error("there is no GPU that PyTorch can use; --rehearse runs without one, to test the program")
    engines = [OURS, *(f"{OURS} {kind}" for kind in options.weights if kind != "bf16")]
    engines += options.engines if options.engines is not None else [GROUPED] if options.rehearse else PEERS
    counts = options.tokens or ((1, 7) if options.rehearse else TOKENS)
    settings = Settings(
        shapes, engines, cells(shapes, counts, options.routing, options.modes), 60 * options.minutes, options.rounds,
        options.cell_seconds,
    )  # fmt: skip
    hire = partial(Inside, options.peers) if options.rehearse else partial(Process, "gpu", options.peers, options.ahead)
    kept = partial(keep, options.results)
    run = Run(settings, hire, kept, say=partial(print, flush=True), side_by_side=not options.rehearse)
    results = run.go(about)
    timed = sum(bool(row["engines"]) for row in results["rows"])
    print(f"{timed} of {len(results['rows'])} cells measured, in {options.results / name_of(results)}.json and .md")


def about(found: Row) -> Row:
    """What the results tell of the machine."""
    return found | machine.software(PACKAGES)


def name_of(results: Row) -> str:
    """Of the files: after the chip."""
    return f"gpu-{machine.slug(results.get('machine', {}).get('chip', 'unknown'))}"


def keep(folder: Path, results: Row) -> None:
    """Write both files."""
    save(folder / name_of(results), results, render(results))


def measured(folder: Path) -> Path | None:
    """The results to show: those of the chip that is here, else the first there are; None without any."""
    found = sorted(folder.glob("gpu-*.json"))
    here = f"gpu-{machine.slug(torch.cuda.get_device_name())}" if torch.cuda.is_available() else ""
    return next((path for path in found if path.stem == here), next(iter(found), None))


def compile_all(shapes: Sequence[Shape], target: str, folder: Path, processes: int) -> None:
    """Compile every shape's kernels into a folder, side by side."""
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        done = pool.map(partial(ahead.compile_only, target=target, folder=folder), shapes)
        for shape, _ in zip(shapes, done, strict=True):
            print(f"{shape} is compiled for {target}", flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "python -m benchmarks.gpu",
        description=benchmarks.gpu.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add: Any = parser.add_argument
    add("--minutes", type=float, default=8.0, help="for everything")
    add("--shapes", nargs="+", help=f"{', '.join(SHAPES)}, or ExHxIxk (default: {' '.join(GPU_SHAPES)})")
    add("--tokens", nargs="+", type=int, help=f"default: {' '.join(map(str, TOKENS))}")
    add("--routing", nargs="+", choices=["uniform", "zipf"], default=["uniform", "zipf"])
    add("--modes", nargs="+", choices=MODES, default=list(MODES))
    add("--engines", nargs="*", choices=PEERS, help=f"besides {OURS} (default: all)")
    add("--weights", nargs="+", choices=["bf16", *PACKED], default=["bf16"], help=f"of {OURS}")
    add("--peers", type=Path, metavar="DIR", help="files of peers, as described above")
    add("--rounds", type=int, default=50, help="times of each engine in a cell")
    add("--cell-seconds", type=float, default=12.0, help="most for a cell's times")
    add("--ahead", type=Path, metavar="FOLDER", help="where kernels are kept that were compiled before")
    add("--compile-only", metavar="TARGET", help="measure nothing, fill FOLDER: cuda:sm_90")
    add("--processes", type=int, default=2, help="that compile side by side")
    add("--results", type=Path, default=RESULTS, help="folder to write to")
    add("--rehearse", action="store_true", help="tiny layers on the processor, to test the program")
    add("--readme", action="store_true", help="measure nothing; put the results into the README")
    return parser


if __name__ == "__main__":
    main()
