"""`sparsec run`."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import click

from sparsec.console import err
from sparsec.runtime.generate import Generator, Stats

DEFAULT_TOKENS = 64


def run(
    artifact: Path,
    prompt: str | None,
    prompt_ids: str | None,
    max_new_tokens: int | None,
    trust_code: bool,
    huge_pages: bool,
    as_json: bool,
) -> None:
    """Generate and print. Raises: ArtifactError, InputError, click.UsageError."""
    if (prompt is None) == (prompt_ids is None):
        raise click.UsageError("give one of --prompt and --prompt-ids")
    given: str | list[int] = prompt if prompt is not None else _ids(prompt_ids or "")
    generator = Generator.load(artifact, trust_code=trust_code, huge_pages=huge_pages)
    if max_new_tokens is None:
        max_new_tokens = max(1, min(DEFAULT_TOKENS, generator.max_len - len(generator.encode(given))))
    tokens, texts = list[int](), list[str]()
    for token in generator.stream(given, max_new_tokens):
        tokens.append(token.id)
        texts.append(token.text)
        if not as_json:
            sys.stdout.write(token.text if prompt is not None else f"{token.id} ")
            sys.stdout.flush()
    stats = generator.stats
    if as_json:
        print(json.dumps({"tokens": tokens, "text": "".join(texts), **_figures(stats)}))
        return
    sys.stdout.write("\n")
    err.print(
        f"{stats.prompt_tokens} tokens read in {stats.prefill_seconds:.2f} s, "
        f"{stats.new_tokens} written at {stats.tokens_per_second:.1f} tokens/s",
        style="dim",
    )


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
