"""Measure expert layers and a whole model on this processor, beside transformers, torch.compile and vLLM.

    python -m benchmarks.cpu                                # everything, about half an hour
    python -m benchmarks.cpu --shapes olmoe --tokens 1 64   # a part
    python -m benchmarks.cpu --shapes 8x256x128x2 --layers 0 --rounds 3 --peers eager
    python -m benchmarks.cpu --readme                       # put the results of this machine into the README

Writes benchmarks/results/cpu-NAME.json and .md, after every shape.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.cpu import machine
from benchmarks.cpu.engines import OURS, PEERS
from benchmarks.cpu.layers import Settings, measure_shape, set_roof
from benchmarks.cpu.model import measure_model
from benchmarks.cpu.report import render, write_readme
from benchmarks.cpu.roof import Meter, Roof
from benchmarks.figures import save
from benchmarks.shapes import CPU_SHAPES, SHAPES, Shape

RESULTS = Path(__file__).parents[1] / "results"
README = Path(__file__).parents[2] / "README.md"


def main(words: Sequence[str] | None = None) -> None:
    """Run what the command line asks for."""
    parser = _parser()
    options = parser.parse_args(words)
    name = f"cpu-{machine.slug(machine.cpu_name())}"
    if options.readme:
        results = json.loads((options.results / f"{name}.json").read_text(encoding="utf-8"))
        write_readme(README, results, f"benchmarks/results/{name}.md")
        return
    warnings.filterwarnings("ignore", message=".*lru_cache.*", category=UserWarning)
    shapes = [Shape.argument(parser, text) for text in options.shapes]
    tokens = options.tokens if "uniform" in options.routing else []
    skewed = options.zipf_tokens if "zipf" in options.routing else []
    settings = Settings(
        shapes, tokens, skewed, options.threads, options.rounds, options.seconds, options.peers, options.weights
    )
    results = measure(settings, options.layers, options.prompt, options.results / name)
    print(f"wrote {name}.json and .md: {len(results['layers'])} rows of layers, {len(results['models'])} of models")


def measure(settings: Settings, layers: int, prompt: int, output: Path) -> dict[str, Any]:
    """Measure all, and keep `output`.json and .md up to date on the way."""
    meter = Meter(settings.threads)
    results: dict[str, Any] = {
        "format": 1,
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "machine": machine.describe(),
        "settings": {"rounds": settings.rounds, "seconds": settings.seconds, "dtype": "bf16"},
        "layers": [],
        "models": [],
        "missing": {},
    }
    roof = meter.measure()
    for shape in settings.shapes:
        results["layers"] += measure_shape(shape, settings)
        meter.measure()
        _save(results, roof, output)
    if layers:
        try:
            results["models"] += measure_model(
                layers,
                prompt=prompt,
                threads=settings.threads,
                rounds=settings.rounds,
                seconds=settings.seconds,
                peers=settings.peers,
            )
        except MemoryError as error:
            results["missing"]["whole model"] = str(error)
    meter.measure()
    _save(results, roof, output)
    return results


def _save(results: dict[str, Any], roof: Roof, output: Path) -> None:
    results["roof"] = roof.json()
    set_roof(results["layers"], roof)
    results["machine"]["load_after"] = machine.load()
    save(output, results, render(results))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "python -m benchmarks.cpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    cores = os.cpu_count() or 1
    add = parser.add_argument
    add("--shapes", nargs="+", default=list(CPU_SHAPES), help=f"{', '.join(SHAPES)}, or ExHxIxk")
    add("--tokens", nargs="+", type=int, default=[1, 8, 64, 512, 2048])
    add("--routing", nargs="+", choices=["uniform", "zipf"], default=["uniform", "zipf"])
    add("--zipf-tokens", nargs="+", type=int, default=[512], help="numbers of tokens that are routed by Zipf's law")
    add("--threads", nargs="+", type=int, default=sorted({1, cores}), help="one thread is timed by CPU time")
    add("--rounds", type=int, default=15, help="calls of each engine in a row of the table")
    add("--seconds", type=float, default=30.0, help="most for a row, if it has three rounds by then")
    add("--peers", nargs="*", choices=list(PEERS), default=list(PEERS))
    add("--weights", nargs="+", choices=["bf16", "int8", "int4"], default=["bf16", "int8", "int4"], help=f"of {OURS}")
    add("--layers", type=int, default=4, help="of the whole model, which has 16; 0: no whole model")
    add("--prompt", type=int, default=512, help="tokens of the whole model's prompt")
    add("--results", type=Path, default=RESULTS, help="folder to write to")
    add("--readme", action="store_true", help="measure nothing; put this machine's results into the README")
    return parser


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
