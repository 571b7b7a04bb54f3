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
from typing import Any

import torch
from rich.console import Console
from rich.panel import Panel
from rich.syntax import Syntax
from rich.table import Table

import sparsec
from sparsec.dialects.moe import Experts
from sparsec.ir.core import Module
from sparsec.ir.types import product
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

    began = time.perf_counter()
    compiled = sparsec.compile(model, (ids,))
    seconds = time.perf_counter() - began
    console.rule("[bold]what is in the model")
    console.print(found(compiled.ir("raise")))
    console.rule(f"[bold]what the compiler did in {seconds:.1f} s")
    console.print(passes(compiled.records))

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
        console.print(f"[green]all {NEW_TOKENS} new tokens are those of transformers' greedy search in f32")
        console.rule("[bold]how fast, on this CPU")
        console.print(speed(model, artifact))


def found(module: Module) -> Table:
    """What the graph itself says about the model's experts."""
    banks = [op for op in module.walk() if isinstance(op, Experts)]
    sizes = {
        value: size
        for value, attrs in module.main.arg_attrs.items()
        if attrs["kind"] == "param" and isinstance(size := product(value.tensor.shape), int)
    }
    total = sum(sizes.values())
    idle = sum(sizes[weight] * (1 - bank.k / bank.num_experts) for bank in banks for weight in (bank.up, bank.down))
    table = Table("", "", show_header=False, box=None)
    table.add_row("layers with experts", str(len(banks)))
    table.add_row("experts in each", ", ".join(sorted({f"{bank.num_experts}, {bank.k} for a token" for bank in banks})))
    table.add_row("parameters", f"{total:,}")
    table.add_row("at work for a token", f"{total - round(idle):,} ({1 - idle / total:.0%})")
    router = next(op for op in module.walk() if op.name == "moe.route")
    table.add_row("the first router", f"{router.loc}, {len(router.regions[0].ops) - 1} ops")
    return table


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
    """Tokens per second of one call, eager and compiled; the median of repeated calls that alternate."""
    table = Table("tokens in a call", "transformers, tokens/s", "sparsec, tokens/s", "ratio", box=None)
    for tokens in (1, 16, 128, 512):
        ids = torch.arange(tokens).remainder(96).add(32).unsqueeze(0)
        runs = {"eager": lambda ids=ids: model(ids, use_cache=False), "sparsec": lambda ids=ids: artifact(ids)}
        times: dict[str, list[float]] = {name: [] for name in runs}
        for _ in range(9):
            for name, run in runs.items():
                began = time.perf_counter()
                run()
                times[name].append(time.perf_counter() - began)
        eager, ours = (sorted(times[name])[4] for name in ("eager", "sparsec"))
        table.add_row(str(tokens), f"{tokens / eager:,.0f}", f"{tokens / ours:,.0f}", f"{eager / ours:.2f}")
    return table


if __name__ == "__main__":
    main()
