"""Compile the small trained mixture of experts beside this file, and hold the result against transformers.

    make demo

It shows what the compiler found in the model, what each pass did, where the artifact is, and that the artifact writes
the same text as transformers' greedy search, byte for byte in f32, with the time that both take.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.panel import Panel
from rich.syntax import Syntax
from rich.table import Table

import sparsec
from sparsec.inspect.info import info, render
from sparsec.pipeline import PassRecord

MODEL = Path(__file__).parent / "tinymoe" / "model"
ARTIFACT = Path("out") / "tinymoe.sparsec"
PROMPT = "def read_lines(path):\n"
NEW_TOKENS = 96

console = Console()


def main() -> None:
    """Load, compile, save, load again, generate, compare, time."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    model: Any = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()
    tokenizer: Any = AutoTokenizer.from_pretrained(MODEL)
    ids: torch.Tensor = tokenizer(PROMPT, return_tensors="pt")["input_ids"]

    console.rule("[bold]what is in the model")
    console.print(render(info(model, (ids,))))

    began = time.perf_counter()
    compiled = sparsec.compile(model, (ids,))
    took = time.perf_counter() - began
    console.rule(f"[bold]what the compiler did in {took:.1f} s")
    console.print(passes(compiled.result.records))

    compiled.save(ARTIFACT)
    console.rule("[bold]the artifact")
    console.print(contents(ARTIFACT))
    artifact = sparsec.load(ARTIFACT)

    with torch.no_grad():
        expected: torch.Tensor = model.generate(ids, max_new_tokens=NEW_TOKENS, do_sample=False)
        written = greedy(lambda ids: artifact(ids).logits, ids, expected.shape[1])
        console.rule("[bold]what it writes")
        console.print(Panel(Syntax(tokenizer.decode(written[0]), "python", theme="ansi_dark")))
        if not torch.equal(written, expected):
            at = int((written != expected)[0].nonzero()[0, 0])
            raise SystemExit(f"token {at} differs: sparsec {written[0, at]}, transformers {expected[0, at]}")
        count = written.shape[1] - ids.shape[1]
        console.print(f"[green]all {count} new tokens are those of transformers' greedy search in f32")
        console.rule("[bold]how fast, on this CPU")
        console.print(speed(model, artifact))


def passes(records: tuple[PassRecord, ...]) -> Table:
    """What each pass did to the number of ops, and how long it took."""
    table = Table("phase", "pass", "ops before", "after", "ms", "did", box=None)
    for record in records:
        did = sum(record.counts.values())
        row = (record.phase, record.name, str(record.ops_before), str(record.ops_after), f"{record.ms:.1f}")
        table.add_row(*row, f"{did} changes" if did else "", style="" if did else "dim")
    return table


def contents(folder: Path) -> Table:
    """The files of an artifact."""
    table = Table("", "", show_header=False, box=None)
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    for path in files:
        table.add_row(str(path), f"{path.stat().st_size:,} bytes")
    return table


def greedy(logits: Callable[[torch.Tensor], torch.Tensor], ids: torch.Tensor, length: int) -> torch.Tensor:
    """Append the likeliest token to ids [1, n] until there are `length`."""
    while ids.shape[1] < length:
        ids = torch.cat([ids, logits(ids)[:, -1:].argmax(-1)], dim=1)
    return ids


def speed(model: Any, artifact: Any) -> Table:
    """Tokens per second of whole calls, eager and compiled: medians of calls that alternate for about two seconds."""
    table = Table("tokens in a call", "transformers, tokens/s", "sparsec, tokens/s", "ratio", box=None)
    for tokens in (1, 16, 128, 512):
        ids = torch.arange(tokens).remainder(96).add(32).unsqueeze(0)
        eager, ours = list[float](), list[float]()
        ends = time.perf_counter() + 2
        while time.perf_counter() < ends or len(eager) < 3:
            eager.append(seconds(lambda ids=ids: model(ids, use_cache=False)))
            ours.append(seconds(lambda ids=ids: artifact(ids)))
        before, after = median(eager), median(ours)
        table.add_row(str(tokens), f"{tokens / before:,.0f}", f"{tokens / after:,.0f}", f"{before / after:.2f}")
    return table


def seconds(call: Callable[[], Any]) -> float:
    """How long one call takes."""
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
