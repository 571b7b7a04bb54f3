"""Results as Markdown: targets first, then shares of the roof and ratios, then every time with its spread."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.figures import (
    Row,
    error_of,
    grouped,
    percent,
    put_between,
    table,
    times_faster,
    with_quartiles,
)  # fmt: skip
from benchmarks.gpu.engines import COMPILED, GROUPED, OURS, PACKED, VLLM_DEFAULT, VLLM_TUNED
from benchmarks.shapes import SHAPES, Shape

START, END = "<!-- benchmark: gpu -->", "<!-- end of benchmark: gpu -->"
STREAMING = 267  #: times E / k: tokens below which an H100 waits for weights, not for arithmetic
GAP = 3.0  #: microseconds between kernels of a layer
NOTHING = (
    "No GPU was available: not measured. `python -m benchmarks.gpu --minutes 8` measures on a machine that has one, "
    "and `python -m benchmarks.gpu --readme` brings its results here."
)


def render(results: Row) -> str:
    """The whole report."""
    parts = [f"# Expert layers on {results['machine']['chip']}", _machine(results), _notes(results)]
    parts += ["## Targets", targets(results["rows"])]
    for (routing, mode), rows in grouped(results["rows"], "routing", "mode"):
        parts += [f"## {mode.capitalize()}, {routing} routing", _shares(rows)]
    parts += _launches(results["rows"])
    parts += ["## Times", "Milliseconds of one layer: median [quartiles]; error against f64, of the norm."]
    for (shape, routing, mode), rows in grouped(results["rows"], "shape", "routing", "mode"):
        if any(row["engines"] for row in rows):
            parts += [f"### {_title(shape)}, {routing}, {mode}", _times(rows)]
    parts += _missing(results)
    return "\n\n".join(part for part in parts if part) + "\n"


def summary(results: Row) -> str:
    """What the README says."""
    rows = [row for row in results["rows"] if row["routing"] == "uniform" and row["mode"] == "forward"]
    said = (
        f"Measured on {results['machine']['chip']}, bf16, uniform routing, forward. Each cell: share of the roof "
        "measured in the same run (m: memory, c: compute) / speed against vLLM's Triton kernel / against grouped_mm."
    )
    return f"{said}\n\n{_shares(rows)}"


def put_into(text: str, results: Row | None, link: str) -> str:
    """A document with the summary between its two marks; without results it says that. Raises: ValueError."""
    block = NOTHING if results is None else f"{summary(results)}\n\nAll times, spreads and errors: [{link}]({link})."
    return put_between(text, START, END, block)


def write_readme(readme: Path, results: Row | None, link: str) -> None:
    """Bring the README's numbers up to date."""
    readme.write_text(put_into(readme.read_text(encoding="utf-8"), results, link), encoding="utf-8")


def against(row: Row, *names: str) -> float | None:
    """How many times faster sparsec is than the fastest of some engines."""
    own = row["engines"].get(OURS)
    base = [row["engines"][name]["median"] for name in names if name in row["engines"]]
    return min(base) / own["median"] if own and base else None


def against_vllm(row: Row) -> float | None:
    return against(row, VLLM_TUNED, VLLM_DEFAULT)


def share(row: Row, engine: str = OURS) -> float | None:
    """The least time that the machine allows, as a share of the time taken."""
    figures = row["engines"].get(engine)
    return figures["roof_ms"] / figures["median"] if figures and "roof_ms" in figures else None


def targets(rows: Sequence[Row]) -> str:
    """What the kernels are to reach, and what was reached; only what was measured counts as met."""
    uniform = [row for row in rows if row["routing"] == "uniform"]
    forward = [row for row in uniform if row["mode"] == "forward"]

    def flops(row: Row) -> float | None:
        return row["engines"].get(OURS, {}).get("tflops")

    def streams(row: Row) -> bool:
        shape = Shape.parse(row["shape"])
        return bool(row["tokens"] < STREAMING * shape.experts / shape.k)

    def of(found: Sequence[Row], shape: str, least: int) -> list[Row]:
        return [row for row in found if row["shape"] == shape and row["tokens"] >= least]

    ahead = [row for row in rows if row["mode"] == "forward"]
    ratios = [ratio for row in ahead if (ratio := against_vllm(row))]
    mean = math.exp(sum(map(math.log, ratios)) / len(ratios)) if ratios else None
    training = [row for row in uniform if row["mode"] == "training" and row["tokens"] >= 32768]
    gaps = [(row["launches"]["largest_gap_us"], row) for row in forward if row.get("launches")]
    same = [row for row in forward if OURS in row.get("invariant", {})]
    lines = [
        ["weights streamed: share of the copy", *_worst(filter(streams, forward), share, 0.9, percent)],
        ["qwen3, 32768 tokens: TFLOP/s", *_worst(of(forward, "qwen3", 32768), flops, 520, "{:.0f}".format)],
        ["mixtral, 32768 tokens: TFLOP/s", *_worst(of(forward, "mixtral", 32768), flops, 580, "{:.0f}".format)],
        ["forward and backward, 32768 tokens: TFLOP/s", *_worst(training, flops, 400, "{:.0f}".format)],
        ["against vLLM, every cell", *_worst(ahead, against_vllm, 1, times_faster)],
        ["against vLLM, geometric mean", *_met(mean, 1.25, times_faster(mean), times_faster(1.25))],
    ]
    if gaps:
        worst, row = max(gaps, key=lambda pair: pair[0])
        met = "met" if worst <= GAP else "**missed**"
        lines.append(["largest gap between kernels, us", f"{worst:.1f} ({_where(row)})", f"{GAP:.1f}", met])
    else:
        lines.append(["largest gap between kernels, us", "not measured", f"{GAP:.1f}", ""])
    bad = [_where(row) for row in same if not row["invariant"][OURS]]
    said = "not measured" if not same else f"{len(same) - len(bad)} of {len(same)} cells" + _but(bad)
    lines.append(["a row's bits in any batch", said, "all cells", "" if not same else "**missed**" if bad else "met"])
    return table(["", "worst", "target", ""], lines)


def _worst(
    rows: Iterable[Row],
    value: Callable[[Row], float | None],
    target: float,
    spelled: Callable[[Any], str],
) -> list[str]:
    found = [(number, row) for row in rows if (number := value(row)) is not None]
    if not found:
        return _met(None, target, "", spelled(target))
    worst, row = min(found, key=lambda pair: pair[0])
    return _met(worst, target, f"{spelled(worst)} ({_where(row)})", spelled(target))


def _met(number: float | None, target: float, said: str, wanted: str) -> list[str]:
    if number is None:
        return ["not measured", wanted, ""]
    return [said, wanted, "met" if number >= target else "**missed**"]


def _but(cells: Sequence[str]) -> str:
    return f"; not {', '.join(cells[:6])}{' ...' if len(cells) > 6 else ''}" if cells else ""


def _where(row: Row) -> str:
    return f"{row['shape']} T {row['tokens']}" + ("" if row["routing"] == "uniform" else f" {row['routing']}")


def _machine(results: Row) -> str:
    found, roofs = results["machine"], results["roofs"]
    packages = ", ".join(f"{name} {version}" for name, version in found.get("packages", {}).items())
    rates = "; ".join(f"{roof['tbps']:.2f} TB/s, {roof['tflops']:.0f} TFLOP/s" for roof in roofs) or "not measured"
    chip = f"{found['chip']}, {found.get('multiprocessors')} multiprocessors, {found.get('memory_gib')} GiB"
    clocks = f"SM {found.get('clocks.sm')} of {found.get('clocks.max.sm')} MHz, memory {found.get('clocks.mem')} MHz"
    changed = ", with changes" if found.get("changed") else ""
    return table(
        ["", ""],
        [
            ["chip", f"{chip}, L2 {found.get('cache_mib')} MiB; driver {found.get('driver_version')}; {clocks}"],
            ["roof", f"{rates} (a copy, bytes read and written; a bf16 matmul of 8192 cubed; the best counts)"],
            ["software", f"Python {found.get('python')}, {packages}"],
            ["sparsec", f"commit {found.get('commit') or 'unknown'}{changed}"],
            ["date", f"{results['date']}, {results['settings']['minutes']:.1f} minutes"],
        ],
    )


def _notes(results: Row) -> str:
    return (
        "One expert layer in bf16 from rows, experts' numbers and weights to rows; no router on any side. Times are of "
        "CUDA graphs of a few layers with other inputs each, other memory read into the L2 in between, engines in turn "
        f"A B B A, up to {results['settings']['rounds']} rounds. Engines marked (no graph) wait for the GPU in the "
        "middle and are timed as called. The roof of a cell is the larger of its operations at the measured matmul and "
        "its bytes at the measured copy: the weights of the experts that are hit once, rows in and out; in training "
        "weights twice, their gradients, rows four times. An engine that is wrong against f64 is not timed."
    )


def _shares(rows: Sequence[Row]) -> str:
    """A row for each shape, a column for each number of tokens."""
    counts = sorted({row["tokens"] for row in rows})

    def cell(row: Row | None) -> str:
        if row is None:
            return ""
        figures = row["engines"].get(OURS)
        if figures is None:
            return "not measured"
        limit = figures.get("limiter", "")[:1]
        ratios = [times_faster(against_vllm(row)), times_faster(against(row, GROUPED, COMPILED))]
        return " / ".join([f"{percent(share(row))} {limit}".strip(), *ratios])

    lines = list[list[str]]()
    for (shape,), found in grouped(rows, "shape"):
        by_count = {row["tokens"]: row for row in found}
        lines.append([_title(shape), *(cell(by_count.get(count)) for count in counts)])
    return table(["roof / vLLM / grouped_mm", *(f"T = {count}" for count in counts)], lines)


def _launches(rows: Sequence[Row]) -> Iterator[str]:
    found = [row for row in rows if row.get("launches")]
    if found:
        yield "## Launches of sparsec"
        yield "In one graph, by the profiler: kernels, their summed time, and from first to last, in microseconds."
        keys = ("kernels", "kernels_us", "span_us", "largest_gap_us", "median_gap_us")
        lines = [
            [_where(row) + ("" if row["mode"] == "forward" else f" {row['mode']}")]
            + [f"{row['launches'][key]}" for key in keys]
            for row in found
        ]
        yield table(["", "kernels", "summed", "span", "largest gap", "median gap"], lines)


def _times(rows: Sequence[Row]) -> str:
    names = list(dict.fromkeys(name for row in rows for name in row["engines"]))
    lines = list[list[str]]()
    for row in rows:
        own = row["engines"].get(OURS, {})
        rate = f"{own['tbps']:.2f} TB/s, {own['tflops']:.0f} TFLOP/s" if "tbps" in own else ""
        roof = next((f"{found['roof_ms']:.3f}" for found in row["engines"].values() if "roof_ms" in found), "")
        cells = [_cell(row, name) for name in names]
        lines.append([str(row["tokens"]), f"{row.get('experts_hit', '')}", roof, rate, own.get("path", ""), *cells])
    return table(["T", "experts hit", "roof", OURS, "variants", *names], lines)


def _cell(row: Row, name: str) -> str:
    figures = row["engines"].get(name)
    if figures is None:
        return "failed" if name in row["failed"] else "not measured"
    few = f", {figures['rounds']} rounds" if figures["rounds"] < 50 else ""
    how = "" if figures["graph"] else ", no graph"
    path = "" if name == OURS or name.removeprefix(f"{OURS} ") in PACKED else f", {figures['path']}"
    return f"{with_quartiles(figures)} ({error_of(figures['error'])}{how}{few}{path})"


def _missing(results: Row) -> Iterator[str]:
    lines = [[str(where), _plain(why)] for where, why in results["missing"].items() if isinstance(why, str)]
    for shape, reasons in results["missing"].items():
        if isinstance(reasons, dict):
            lines += [[f"{shape}: {name}", _plain(why)] for name, why in reasons.items()]
    for row in results["rows"]:
        where = f"{_where(row)}, {row['mode']}"
        lines += [[where, _plain(row["not_measured"])]] if "not_measured" in row else []
        lines += [[f"{where}: {name}", _plain(why)] for name, why in row["failed"].items()]
    if lines:
        yield "## Not measured"
        yield table(["", "reason"], lines)


def _plain(why: str) -> str:
    return why.replace("|", "\\|")


def _title(shape: str) -> str:
    return str(SHAPES.get(shape, shape))
