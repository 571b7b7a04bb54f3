"""Both GEMMs of a layer by every family of kernels, measured beside what the cost model predicts.

    python -m benchmarks.gpu.variants --shapes qwen3 mixtral --tokens 1 64 1024 8192 32768 --minutes 3

For each number of tokens: the model's best variants of each family (of `persistent` both forms), compiled side by side
before anything is timed. A variant whose numbers differ from those of `tiles` is told and not timed. Writes
benchmarks/results/gpu-CHIP-variants.json and .md.
"""

from __future__ import annotations

import argparse
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from benchmarks import machine
from benchmarks.figures import Row, grouped, one_line, save, table
from benchmarks.gpu import ahead
from benchmarks.gpu.__main__ import PACKAGES, RESULTS
from benchmarks.gpu.device import Gpu
from benchmarks.shapes import SHAPES, Shape
from sparsec.codegen.plan import tensor
from sparsec.codegen.triton.emit import TritonKernel, emit_kernel
from sparsec.diagnostics import CompileError
from sparsec.passes.chips import Chip, chip
from sparsec.passes.cost import candidates
from sparsec.passes.roofline import predict
from sparsec.passes.schedule import gemm_of
from sparsec.passes.variants import Gemm, Variant

HALVES = ("moe.gather_gemm", "moe.gemm_combine")
WORST = 0.01  #: by which numbers may differ from those of `tiles`, of the norm


@dataclass(frozen=True)
class Job:
    """One variant of one kernel, for up to as many tokens."""

    shape: Shape
    target: str
    op: str
    variant: Variant
    tokens: int


def tried(gemm: Gemm, tokens: int, on: Chip, each: int) -> list[tuple[Variant, float]]:
    """The best `each` of every family, by the model, and its microseconds; `persistent` by the number of warps too."""
    found = dict[tuple[str, int], list[tuple[Variant, float]]]()
    for variant in candidates(gemm, replace(on, divides=on.name.startswith("NVIDIA H100") or on.divides)):
        made = predict(gemm, variant, tokens, on)
        if made is not None:
            form = variant.num_warps if variant.kernel == "persistent" else 0
            found.setdefault((variant.kernel, form), []).append((variant, made.us))
    ranked = [sorted(group, key=lambda pair: pair[1])[:each] for group in found.values()]
    return sorted((pair for group in ranked for pair in group), key=lambda pair: pair[1])


@cache
def kernels(shape: Shape, target: str) -> dict[str, Any]:
    """The layer's kernel functions by op."""
    funcs = ahead.compiled(shape, target).result.module.funcs.values()
    return {func.body.ops[0].name: func for func in funcs if func.name != "main"}


def compile_job(job: Job) -> TritonKernel | str:
    """The kernel with this variant alone, or why there is none."""
    func = kernels(job.shape, job.target)[job.op]
    func.body.ops[0].attrs["variants"] = ({"up_to": job.tokens, **asdict(job.variant)},)
    try:
        return emit_kernel(func, job.target)
    except CompileError as error:
        return one_line(error)


class Comparison:
    """Times variants on the GPU, each against the numbers of the first that is given for the same operands."""

    def __init__(self, target: str) -> None:
        from sparsec.inspect.timing import GpuTimer

        self.timer = GpuTimer(target)
        self.right: tuple[tuple[str, int] | None, torch.Tensor | None] = (None, None)

    def __call__(self, job: Job, made: TritonKernel) -> Row:
        """`us`, or `failed`."""
        from sparsec.runtime import triton_kernels
        from sparsec.runtime.context import Context
        from sparsec.runtime.plan import Kernel
        from sparsec.runtime.plan import Variant as Compiled

        func = kernels(job.shape, job.target)[job.op]
        op = func.body.ops[0]
        params = tuple(None if value is None else tensor(value.tensor) for value in op.arguments)
        results = tuple(tensor(value.tensor) for value in op.results)
        variants = [Compiled(None, made.variants[0].config)]
        kernel = Kernel(func.name, job.op, "triton", params, results, "t", {}, {}, variants)
        operands = self.timer._operands(func, job.tokens)
        context = Context(self.timer.device, made.files, lambda slot: None)
        result = triton_kernels.bind(kernel, [None] * len(kernel.params), context)(operands)[0].float()
        key = (f"{job.shape} {job.op}", job.tokens)
        if self.right[0] != key:
            self.right = key, result
        wanted = self.right[1]
        assert wanted is not None
        error = float((result - wanted).norm() / wanted.norm())
        if not error <= WORST:
            return {"failed": f"wrong: differs by {error:.2%} of the norm"}
        return {"us": round(self.timer(func, kernel, made.files, job.tokens), 2), "error": round(error, 5)}


def measure(
    shapes: Sequence[Shape],
    tokens: Sequence[int],
    target: str,
    each: int,
    build: Callable[[Sequence[Job]], Iterator[TritonKernel | str]],
    compare: Callable[[Job, TritonKernel], Row],
    going: Callable[[], bool],
) -> Iterator[Row]:
    """Rows, as they come, while `going` says that there is time."""
    on = chip(target)
    jobs, predicted = list[Job](), dict[Job, float]()
    for shape in shapes:
        for op in HALVES:
            gemm = gemm_of(kernels(shape, target)[op].body.ops[0])
            for count in tokens:
                found = tried(gemm, count, on, each)
                found.sort(key=lambda pair: pair[0].kernel != "tiles")  # what the others are compared with
                for variant, us in found:
                    jobs.append(Job(shape, target, op, variant, count))
                    predicted[jobs[-1]] = us
    for job, made in zip(jobs, build(jobs), strict=True):
        row: Row = {"shape": job.shape.name, "op": job.op, "tokens": job.tokens, "variant": asdict(job.variant)}
        row["predicted_us"] = round(predicted[job], 2)
        if not going():
            yield row | {"failed": "the time was up"}
            continue
        try:
            yield row | ({"failed": made} if isinstance(made, str) else compare(job, made))
        except Exception as error:  # it is told; a dead context ends the run at the next one
            yield row | {"failed": one_line(error)}


def render(results: Row) -> str:
    """As Markdown: the fastest first, and how far the model is off by family."""
    parts = [f"# Variants on {results['machine']['chip']}", f"{results['machine']['packages']}, {results['date']}"]
    timed = [row for row in results["rows"] if "us" in row]
    ratios = dict[str, list[float]]()
    for row in timed:
        ratios.setdefault(row["variant"]["kernel"], []).append(row["us"] / row["predicted_us"])
    lines = [
        [family, str(len(found)), f"{math.exp(sum(map(math.log, found)) / len(found)):.2f}", f"{max(found):.2f}"]
        for family, found in sorted(ratios.items())
    ]
    parts += ["## Measured over predicted", table(["family", "variants", "geometric mean", "largest"], lines)]
    for (shape, op, tokens), rows in grouped(results["rows"], "shape", "op", "tokens"):
        ordered = sorted(rows, key=lambda row: row.get("us", math.inf))
        lines = [
            [
                *(spelled(row["variant"]), f"{row['us']:.1f}" if "us" in row else "-", f"{row['predicted_us']:.1f}"),
                row.get("failed", "").replace("|", "\\|"),
            ]
            for row in ordered
        ]
        title = f"## {SHAPES.get(shape, shape)}, {op}, {tokens} tokens"
        parts += [title, table(["variant", "us", "predicted", ""], lines)]
    return "\n\n".join(parts) + "\n"


def spelled(variant: Row) -> str:
    sizes = "x".join(str(variant[f"block_{axis}"]) for axis in "mnk")
    split = f" split {variant['split']}" if variant.get("split", 1) != 1 else ""
    return f"{variant['kernel']} {sizes}, {variant['num_warps']} warps, {variant['num_stages']} stages{split}"


def main(words: Sequence[str] | None = None) -> None:
    shown = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("python -m benchmarks.gpu.variants", description=__doc__, formatter_class=shown)
    add: Any = parser.add_argument
    add("--shapes", nargs="+", default=["qwen3", "mixtral"], help=f"{', '.join(SHAPES)}, or ExHxIxk")
    add("--tokens", nargs="+", type=int, default=[1, 64, 1024, 8192, 32768])
    add("--minutes", type=float, default=3.0)
    add("--each", type=int, default=2, help="variants of each family")
    add("--processes", type=int, default=os.cpu_count() or 1, help="that compile side by side")
    add("--results", type=Path, default=RESULTS, help="folder to write to")
    options = parser.parse_args(words)
    began = time.monotonic()
    device = Gpu()
    found = device.describe() | machine.software(PACKAGES)
    results: Row = {"machine": found, "date": time.strftime("%Y-%m-%d"), "rows": []}
    output = options.results / f"gpu-{machine.slug(found['chip'])}-variants"
    with ProcessPoolExecutor(options.processes, mp_context=get_context("spawn")) as pool:
        rows = measure(
            [Shape.parse(text) for text in options.shapes], options.tokens, device.target, options.each,
            lambda jobs: pool.map(compile_job, jobs), Comparison(device.target),
            lambda: time.monotonic() - began < 60 * options.minutes,
        )  # fmt: skip
        for row in rows:
            results["rows"].append(row)
            save(output, results, render(results))
            print(f"  {row['shape']} {row['op']} T {row['tokens']}: {spelled(row['variant'])}: "
                  f"{row.get('us', row.get('failed'))} of {row['predicted_us']} us", flush=True)  # fmt: skip
    print(f"{len(results['rows'])} variants in {output}.json and .md")


if __name__ == "__main__":
    main()
