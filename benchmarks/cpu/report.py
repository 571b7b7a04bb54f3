"""Results as Markdown: ratios first, then every time with its spread."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from benchmarks.cpu.engines import COMPILED, OURS, TRANSFORMERS, VLLM
from benchmarks.cpu.layers import UNIFORM, best_of_transformers
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
from benchmarks.shapes import SHAPES

TARGETS: dict[str, dict[int, float]] = {
    "transformers": {1: 1.9, 8: 1.9, 64: 2.1, 512: 2.3, 2048: 2.0},
    "transformers, Mixtral": {1: 1.65, 8: 1.4, 64: 1.7, 512: 1.4, 2048: 1.3},
    "vLLM": {1: 1.05, 8: 1.05, 64: 1.1, 512: 1.25, 2048: 1.15},
    "roof": {1: 0.92, 8: 0.92, 64: 0.92, 512: 0.75, 2048: 0.85},
}
"""What each ratio of the project's own shapes is to be at least, by number of tokens."""

BUSY = 0.1  #: share of the processors that other processes may take before a row is marked
SKEW_TARGET = 1.15  #: most that a skewed routing may cost over a uniform one
START, END = "<!-- benchmark: cpu -->", "<!-- end of benchmark: cpu -->"


def render(results: Row) -> str:
    """The whole report."""
    layers, models = results["layers"], results["models"]
    parts = [f"# Expert layers on {results['machine']['cpu']}", *_machine(results), *_notes()]
    for (threads, clock), rows in _by_threads(layers):
        parts += [f"## Ratios, {_clock(threads, clock)}", _ratios(rows)]
    for section in (_targets, _skew, _quantised):
        parts += section(layers)
    parts += ["## Times", "Milliseconds: median [quartiles]."] if layers else []
    for (shape, threads, clock), rows in grouped(layers, "shape", "threads", "clock"):
        parts += [f"### {_title(shape)}, {_clock(threads, clock)}", _times(rows)]
    parts += _errors(layers)
    parts += ["## Whole model", _models(models)] if models else []
    parts += _missing([*layers, *models], results.get("missing", {}))
    return "\n\n".join(part for part in parts if part) + "\n"


def summary(results: Row) -> str:
    """What the README says: the ratios with all threads, and of which machine."""
    found = results["machine"]
    threads, clock = max((row["threads"], row["clock"]) for row in results["layers"])
    rows = [row for row in results["layers"] if row["threads"] == threads]
    unit = "AMX" if "amx_bf16" in found["flags"] else "AVX512" if "avx512f" in found["flags"] else "AVX2"
    said = (
        f"Measured on {found['cpu']} ({found['cores']} cores, {unit}), {_clock(threads, clock)}. Each cell: speed "
        "against the faster of transformers' eager and grouped_mm / against vLLM's kernel / share of the measured roof."
    )
    return f"{said}\n\n{_ratios(rows)}"


def put_into(text: str, results: Row, link: str) -> str:
    """A document with the summary between its two marks. Raises: ValueError if it has no marks."""
    return put_between(text, START, END, f"{summary(results)}\n\nAll times, spreads and errors: [{link}]({link}).")


def write_readme(readme: Path, results: Row, link: str) -> None:
    """Bring the README's numbers up to date."""
    readme.write_text(put_into(readme.read_text(encoding="utf-8"), results, link), encoding="utf-8")


def ours_against(row: Row, base: float | None) -> float | None:
    """How many times faster sparsec is than something that takes `base` milliseconds."""
    own = row["engines"].get(OURS)
    return base / own["median"] if own and base else None


def against_vllm(row: Row) -> float | None:
    peer = row["engines"].get(VLLM)
    return ours_against(row, peer["median"] if peer else None)


def share_of_roof(row: Row, engine: str = OURS) -> float | None:
    """The least time that the machine allows, as a share of the time taken."""
    figures = row["engines"].get(engine)
    return figures["roof_ms"] / figures["median"] if figures and "roof_ms" in figures else None


def _machine(results: Row) -> Iterator[str]:
    found, roof = results["machine"], results["roof"]
    caches = ", ".join(f"{name} {size}" for name, size in found["caches"].items())
    packages = ", ".join(f"{name} {version}" for name, version in found["packages"].items())
    changed = ", with changes" if found["changed"] else ""
    rates = "; ".join(
        f"{threads} thread{'s' * (threads != '1')} {rate['gbps']:.1f} GB/s, {rate['tflops']:.2f} TFLOP/s"
        for threads, rate in roof["threads"].items()
    )
    yield table(
        ["", ""],
        [
            ["processor", f"{found['cpu']}, {found['cores']} cores, {' '.join(found['flags'])}"],
            ["memory", f"{found['memory_gib']} GiB; caches {caches}; huge pages: {found['huge_pages']}"],
            ["roof", f"{rates} ({roof['how']})"],
            ["software", f"Python {found['python']}, {packages}, {found['compiler'] or 'no C++ compiler'}"],
            [
                "sparsec",
                f"commit {found['commit'] or 'unknown'}{changed}; ran {', '.join(_paths(results['layers']))}",
            ],
            ["load", f"{found['load_before']} before, {found.get('load_after')} after (processes, one minute)"],
            ["date", results["date"]],
        ],
    )


def _notes() -> Iterator[str]:
    yield (
        "Engines take turns in each round, in a random order. The part measured is that of the experts: rows, experts' "
        "numbers and weights in, rows out, bf16. A single token takes the experts in turn, so that weights come from "
        "memory. With one thread the time is the process's CPU time, with more it is wall time. The roof of a row is "
        "the larger of its multiply-adds at the measured peak and one read of each expert that is hit at the measured "
        "bandwidth; what lies in a cache can beat it. Where other processes took more than a tenth of the processors, "
        "ratios are marked \\*: measure again. Errors are relative to the norm of an f32 result."
    )


def _ratios(rows: Sequence[Row]) -> str:
    """A row for each shape, a column for each number of tokens."""
    rows = [row for row in rows if row["routing"] == "uniform"]
    counts = sorted({row["tokens"] for row in rows})

    def cell(row: Row | None) -> str:
        if row is None:
            return ""
        ratios = [ours_against(row, best_of_transformers(row)), against_vllm(row)]
        busy = "\\*" if (row["other_load"] or 0) > BUSY else ""
        return " / ".join([*map(times_faster, ratios), percent(share_of_roof(row))]) + busy

    lines = list[list[str]]()
    for (shape,), found in grouped(rows, "shape"):
        by_count = {row["tokens"]: row for row in found}
        lines.append([_title(shape), *(cell(by_count.get(count)) for count in counts)])
    return table(["transformers / vLLM / roof", *(f"T = {count}" for count in counts)], lines)


def _targets(layers: Sequence[Row]) -> Iterator[str]:
    """The worst ratio of each kind beside what it is to be; only shapes that the targets are for."""
    measured = [row for row in layers if row["routing"] == "uniform" and row["shape"] in SHAPES]
    kinds: dict[str, tuple[Callable[[Row], float | None], Callable[[str], bool]]] = {
        "transformers": (lambda row: ours_against(row, best_of_transformers(row)), lambda shape: shape != "mixtral"),
        "transformers, Mixtral": (
            lambda row: ours_against(row, best_of_transformers(row)),
            lambda shape: shape == "mixtral",
        ),
        "vLLM": (against_vllm, lambda shape: True),
        "roof": (share_of_roof, lambda shape: shape in ("olmoe", "qwen3")),
    }
    counts = sorted({row["tokens"] for row in measured} & TARGETS["roof"].keys())
    lines = list[list[str]]()
    for (threads, clock), rows in _by_threads(measured):
        for kind, (value, belongs) in kinds.items():
            cells = list[str]()
            for count in counts:
                here = [row for row in rows if row["tokens"] == count and belongs(row["shape"])]
                values = [(found, row["shape"]) for row in here if (found := value(row)) is not None]
                target = TARGETS[kind][count]
                spelled = percent if kind == "roof" else times_faster
                if values:
                    worst, shape = min(values)
                    met = "met" if worst >= target else "**missed**"
                    cells.append(f"{spelled(worst)} ({shape}) of {spelled(target)}: {met}")
                else:
                    cells.append("")
            lines.append([f"{kind}, {_clock(threads, clock)}", *cells])
    if counts and any(cell for line in lines for cell in line[1:]):
        yield "## Targets"
        yield "The worst of the shapes that each target is for."
        yield table(["", *(f"T = {count}" for count in counts)], lines)


def _skew(layers: Sequence[Row]) -> Iterator[str]:
    lines = list[list[str]]()
    for row in layers:
        skewed, uniform = row["engines"].get(OURS), row["engines"].get(UNIFORM)
        if row["routing"] != "zipf" or not skewed or not uniform:
            continue
        ratio = skewed["median"] / uniform["median"]
        met = "" if ratio <= SKEW_TARGET else " **missed**"
        where = [_title(row["shape"]), str(row["tokens"]), _clock(row["threads"], row["clock"])]
        peers = [times_faster(ours_against(row, best_of_transformers(row))), times_faster(against_vllm(row))]
        lines.append([*where, with_quartiles(skewed), with_quartiles(uniform), f"{ratio:.2f}{met}", *peers])
    if lines:
        yield "## Skewed routing"
        yield f"Experts asked for by Zipf's law, beside as many rows spread evenly: to be at most {SKEW_TARGET} of it."
        head = [
            "",
            "T",
            "time",
            "skewed, ms",
            "uniform, ms",
            "skewed / uniform",
            "transformers",
            "vLLM",
        ]
        yield table(head, lines)


def _quantised(layers: Sequence[Row]) -> Iterator[str]:
    lines = list[list[str]]()
    for row in layers:
        for kind in ("int8", "int4"):
            figures = row["engines"].get(f"{OURS} {kind}")
            if figures and OURS in row["engines"] and row["routing"] == "uniform":
                faster = row["engines"][OURS]["median"] / figures["median"]
                where = [_title(row["shape"]), kind, str(row["tokens"]), _clock(row["threads"], row["clock"])]
                share, error = share_of_roof(row, f"{OURS} {kind}"), figures.get("error")
                lines.append([*where, with_quartiles(figures), times_faster(faster), percent(share), error_of(error)])
    if lines:
        yield "## Quantised weights"
        yield table(["", "weights", "T", "time", "ms", "against own bf16", "of the roof", "error"], lines)


def _times(rows: Sequence[Row]) -> str:
    names = list(dict.fromkeys(name for row in rows for name in row["engines"] if name != UNIFORM))
    missing = {name: why for row in rows for name, why in row["missing"].items()}
    lines = [
        [str(row["tokens"]), row["routing"], f"{row['experts_hit']:.1f}", _load(row)]
        + [_roof_ms(row)]
        + [with_quartiles(row["engines"][name]) if name in row["engines"] else "failed" for name in names]
        + ["missing" for name in missing if name not in names]
        for row in rows
    ]
    gone = [name for name in missing if name not in names]
    return table(["T", "routing", "experts hit", "other load", "roof", *names, *gone], lines)


def _errors(layers: Sequence[Row]) -> Iterator[str]:
    names = list(dict.fromkeys(name for row in layers for name in row["engines"] if name != UNIFORM))
    lines = list[list[str]]()
    for (shape,), rows in grouped(layers, "shape"):
        worst = [[row["engines"].get(name, {}).get("error") for row in rows] for name in names]
        found = [max((error for error in errors if error is not None), default=None) for errors in worst]
        lines.append([_title(shape), *map(error_of, found)])
    if lines:
        yield "## Largest error"
        yield table(["", *names], lines)


def _models(models: Sequence[Row]) -> str:
    order = [*TRANSFORMERS, COMPILED, OURS]
    names = [name for name in order if any(name in row["engines"] for row in models)]
    lines = list[list[str]]()
    for row in models:
        compiled = row["engines"].get(COMPILED)
        ratios = [ours_against(row, best_of_transformers(row)), ours_against(row, compiled and compiled["median"])]
        lines.append(
            [row["model"], f"{row['phase']} {row['tokens']}", _clock(row["threads"], row["clock"]), _load(row)]
            + [with_quartiles(row["engines"][name]) if name in row["engines"] else "missing" for name in names]
            + [times_faster(ratio) for ratio in ratios]
        )
    head = ["", "tokens", "time", "other load", *names, "against transformers", "against torch.compile"]
    return table(head, lines)


def _missing(rows: Iterable[Row], more: dict[str, str]) -> Iterator[str]:
    reasons = dict[tuple[str, str], None]()
    for row in rows:
        reasons |= {(name, why): None for name, why in row["missing"].items()}
    reasons |= {(name, why): None for name, why in more.items()}
    if reasons:
        yield "## Not measured"
        yield table(["", "reason"], [[name, why.replace("|", "\\|")] for name, why in reasons])


def _by_threads(layers: Sequence[Row]) -> Iterator[tuple[tuple[int, str], list[Row]]]:
    for threads, clock in sorted({(row["threads"], row["clock"]) for row in layers}):
        yield (threads, clock), [row for row in layers if row["threads"] == threads]


def _paths(layers: Sequence[Row]) -> list[str]:
    found = (row["engines"].get(OURS, {}).get("path") for row in layers)
    return list(dict.fromkeys(path for path in found if path)) or ["nothing"]


def _title(shape: str) -> str:
    return str(SHAPES.get(shape, shape))


def _clock(threads: int, clock: str) -> str:
    return "one thread, CPU time" if clock == "cpu" else f"{threads} threads, wall time"


def _roof_ms(row: Row) -> str:
    plain = (figures for figures in row["engines"].values() if figures["weights"] == "bf16")
    return next((f"{figures['roof_ms']:.2f}" for figures in plain if "roof_ms" in figures), "")


def _load(row: Row) -> str:
    return "" if row["other_load"] is None else f"{row['other_load']:.0%}"
