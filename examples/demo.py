"""Compile the small trained mixture of experts beside this file, and hold the result against transformers.

    make demo

It shows what is in the model, what each pass did, where the artifact is, and that the artifact writes the same text as
transformers' greedy search, token for token in f32, with the speed of both.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.panel import Panel
from rich.syntax import Syntax
from rich.table import Table

import sparsec
from sparsec.console import passes_table
from sparsec.inspect.info import info, render
from sparsec.runtime.generate import Generator

MODEL = Path(__file__).parent / "tinymoe" / "model"
ARTIFACT = Path("out") / "tinymoe.sparsec"
PROMPT = "class Server:\n    def run(self):\n"
NEW_TOKENS = 120
ROUNDS = 5  # of timing, in which both take turns

console = Console()


def main() -> None:
    """Load, compile, save, load the artifact, generate, compare, time."""
    os.environ["TRANSFORMERS_VERBOSITY"] = "error"
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    torch.set_num_threads(1)  # the model is too small to share its work among threads
    model: Any = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()
    tokenizer: Any = AutoTokenizer.from_pretrained(MODEL)
    ids: torch.Tensor = tokenizer(PROMPT, return_tensors="pt")["input_ids"]

    console.rule("[bold]what is in the model")
    console.print(render(info(model)))

    began = time.perf_counter()
    compiled = sparsec.compile_language_model(model)
    took = time.perf_counter() - began
    console.rule(f"[bold]what the compiler did with it in {took:.1f} s")
    console.print(passes_table(compiled.result.records))

    compiled.save(ARTIFACT, tokenizer=MODEL / "tokenizer.json")
    console.rule("[bold]the artifact")
    console.print(contents(ARTIFACT))

    generator = Generator.load(ARTIFACT)
    expected: torch.Tensor = model.generate(ids, max_new_tokens=NEW_TOKENS, do_sample=False)
    wanted = expected[0, ids.shape[1] :].tolist()
    tokens = list(generator.stream(PROMPT, NEW_TOKENS))
    written = [token.id for token in tokens]
    console.rule("[bold]what the artifact writes")
    text = PROMPT + "".join(token.text for token in tokens)
    console.print(Panel(Syntax(text, "python", theme="ansi_dark", background_color="default")))
    if written != wanted:
        at = next((i for i, (a, b) in enumerate(zip(written, wanted, strict=False)) if a != b), len(wanted))
        sys.exit(f"different from transformers' greedy search from new token {at} on")
    console.print(f"[green]all {len(written)} new tokens are those of transformers' greedy search in f32")

    console.rule("[bold]how fast, on one thread of this CPU")
    console.print(speed(model, generator, ids))
    console.print(f"\nagain: [bold]sparsec run {ARTIFACT} --prompt 'import '")


def contents(folder: Path) -> Table:
    """The files of an artifact."""
    table = Table(show_header=False, box=None)
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        table.add_row(str(path), f"{path.stat().st_size:,} bytes")
    return table


def speed(model: Any, generator: Generator, ids: torch.Tensor) -> Table:
    """Tokens per second of reading a text of 384 tokens and of writing, both with a key/value cache: medians."""
    text = ids.repeat(1, 13)[:, :384]
    reading: dict[str, list[float]] = {"eager": [], "sparsec": []}
    writing: dict[str, list[float]] = {"eager": [], "sparsec": []}
    for _ in range(ROUNDS):
        began = time.perf_counter()
        model.generate(text, max_new_tokens=1, do_sample=False)
        first = time.perf_counter() - began
        model.generate(text, max_new_tokens=33, do_sample=False, min_new_tokens=33)
        rest = time.perf_counter() - began - 2 * first
        reading["eager"].append(text.shape[1] / first)
        writing["eager"].append(32 / rest)
        for _ in generator.stream(text[0].tolist(), 33):
            pass
        reading["sparsec"].append(text.shape[1] / generator.stats.prefill_seconds)
        writing["sparsec"].append(generator.stats.tokens_per_second)
    table = Table("", "transformers, tokens/s", "sparsec, tokens/s", "ratio", box=None)
    for what, rates in {f"read {text.shape[1]} tokens": reading, "write, one by one": writing}.items():
        eager, ours = median(rates["eager"]), median(rates["sparsec"])
        table.add_row(what, f"{eager:,.0f}", f"{ours:,.0f}", f"{ours / eager:.2f}")
    return table


if __name__ == "__main__":
    main()
