"""`sparsec run`."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

import click

from sparsec.commands.join import joined, wait_for_all
from sparsec.console import err
from sparsec.runtime.generate import Generator, Stats

DEFAULT_TOKENS = 64


def run(
    artifact: Path,
    prompt: tuple[str, ...],
    prompt_ids: tuple[str, ...],
    max_new_tokens: int | None,
    trust_code: bool,
    huge_pages: bool,
    as_json: bool,
) -> None:
    """Generate and print; of several ranks the first prints, or all with `as_json`.

    Raises: ArtifactError, InputError, RankError, click.UsageError.
    """
    if bool(prompt) == bool(prompt_ids):
        raise click.UsageError("give one of --prompt and --prompt-ids")
    with joined() as (rank, size):
        given = _own(prompt or [_ids(text) for text in prompt_ids], rank, size)
        generator = Generator.load(artifact, trust_code=trust_code, huge_pages=huge_pages)
        wait_for_all(size)
        if max_new_tokens is None:
            max_new_tokens = max(1, min(DEFAULT_TOKENS, generator.max_len - len(generator.encode(given))))
        tokens, texts = list[int](), list[str]()
        for token in generator.stream(given, max_new_tokens):
            tokens.append(token.id)
            texts.append(token.text)
            if not as_json and rank == 0:
                sys.stdout.write(token.text if prompt else f"{token.id} ")
                sys.stdout.flush()
        stats = generator.stats
    if as_json:
        print(
            json.dumps(
                {"tokens": tokens, "text": "".join(texts), **({"rank": rank} if size > 1 else {})} | _figures(stats)
            )
        )
    elif rank == 0:
        sys.stdout.write("\n")
        err.print(
            f"{stats.prompt_tokens} tokens read in {stats.prefill_seconds:.2f} s, "
            f"{stats.new_tokens} written at {stats.tokens_per_second:.1f} tokens/s",
            style="dim",
        )


def _own(prompts: Sequence[str | list[int]], rank: int, size: int) -> str | list[int]:
    """The prompt of a rank: its own, or the one for all. Raises: UsageError."""
    if len(prompts) not in (1, size):
        ranks = "one process, which takes one" if size == 1 else f"{size} ranks: give one for all, or one for each"
        raise click.UsageError(f"{len(prompts)} prompts for {ranks}")
    return prompts[rank % len(prompts)]


def _figures(stats: Stats) -> dict[str, float]:
    return {
        "prompt_tokens": stats.prompt_tokens,
        "prefill_seconds": stats.prefill_seconds,
        "decode_seconds": stats.decode_seconds,
        "tokens_per_second": stats.tokens_per_second,
    }


def _ids(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise click.UsageError(f"--prompt-ids takes numbers separated by commas, not {text!r}") from None
