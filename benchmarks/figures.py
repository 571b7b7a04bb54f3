"""Figures of repeated measurements, and reports: what every benchmark writes the same way."""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]


def spread(taken: Sequence[float]) -> dict[str, float]:
    """Median, quartiles, least and most of some milliseconds, and how many there are."""
    low, median, high = statistics.quantiles(taken, n=4, method="inclusive") if len(taken) > 1 else [*taken] * 3
    figures = {"median": median, "q1": low, "q3": high, "min": min(taken), "max": max(taken)}
    return {name: round(value, 4) for name, value in figures.items()} | {"rounds": len(taken)}


def one_line(error: BaseException) -> str:
    """What an error says, short, without paths."""
    first = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    words = [Path(word).name if word.startswith("/") else word for word in first.split()]
    text = " ".join(words)
    return text if len(text) <= 200 else text[:197] + "..."


def grouped(rows: Sequence[Row], *keys: str) -> Iterator[tuple[tuple[Any, ...], list[Row]]]:
    """Rows that have the same values of some keys, in the order of the first of each."""
    for values in dict.fromkeys(tuple(row[key] for key in keys) for row in rows):
        yield values, [row for row in rows if tuple(row[key] for key in keys) == values]


def table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A table of Markdown."""
    rows = [head, ["---"] * len(head), *lines]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def with_quartiles(figures: Row) -> str:
    """Median and quartiles of milliseconds, in as many digits as say something."""
    digits = 0 if figures["median"] >= 100 else 1 if figures["median"] >= 10 else 2
    low, middle, high = (f"{figures[name]:.{digits}f}" for name in ("q1", "median", "q3"))
    return f"{middle} [{low}, {high}]"


def times_faster(ratio: float | None) -> str:
    return "-" if ratio is None else f"{ratio:.2f}x"


def percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.0%}"


def error_of(error: float | None) -> str:
    return "-" if error is None else f"{error:.2%}"


def put_between(text: str, start: str, end: str, block: str) -> str:
    """A document with `block` between two marks. Raises: ValueError if it has not each mark once."""
    if text.count(start) != 1 or text.count(end) != 1:
        raise ValueError(f"the document needs the marks {start} and {end} once")
    whole = f"{start}\n{block}\n{end}"
    return re.sub(re.escape(start) + ".*?" + re.escape(end), lambda _: whole, text, flags=re.DOTALL)


def save(output: Path, results: Row, report: str) -> None:
    """Write `output`.json and `output`.md, each whole or not at all."""
    output.parent.mkdir(parents=True, exist_ok=True)
    for suffix, text in ((".json", json.dumps(results, indent=1) + "\n"), (".md", report)):
        partial = output.with_name(output.name + suffix + ".part")
        partial.write_text(text, encoding="utf-8")
        partial.replace(output.with_name(output.name + suffix))
