"""Greedy text generation with a compiled language model.

`generation.json` says how the program is to be used:

    {"kind": "static-cache", "max_len": 4096, "batch": 1, "eos": [50279], "inputs": ["input_ids", "start"]}
    {"kind": "recompute", "max_len": 4096, "batch": 1, "eos": [50279], "inputs": ["input_ids"]}

A `static-cache` program keeps keys and values of `max_len` positions in its buffers: it is called once with the
prompt and then with one token at a time. Its second input, `start` [1], is the position of the first token given. A
`recompute` program is called with the whole text for every token.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sparsec.runtime.artifact import open_artifact, rank_of
from sparsec.runtime.errors import ArtifactError, InputError
from sparsec.runtime.executor import Program

if TYPE_CHECKING:
    from sparsec.runtime.distributed import World

INPUTS = {"static-cache": ["input_ids", "start"], "recompute": ["input_ids"]}
"""The inputs of each kind of program."""


@dataclass(frozen=True)
class Token:
    """A generated token: its id, and the text that it adds ("" without a tokenizer, or amid a character)."""

    id: int
    text: str


@dataclass
class Stats:
    """Counts and seconds of one generation, up to date whenever a token comes out."""

    prompt_tokens: int = 0
    new_tokens: int = 0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0

    @property
    def tokens_per_second(self) -> float:
        """New tokens per second after the first, which the prefill yields; 0 before there are any."""
        return (self.new_tokens - 1) / self.decode_seconds if self.new_tokens > 1 and self.decode_seconds else 0.0


class Generator:
    """A program that yields text.

    Args:
        program: as loaded.
        settings: the content of `generation.json`.
        tokenizer: the content of `tokenizer.json`, for prompts and results as text.

    Raises:
        ArtifactError: the settings do not describe the program.
    """

    def __init__(self, program: Program, settings: Any, tokenizer: bytes | None = None) -> None:
        self.program = program
        self.kind, self.max_len, self.eos = _checked(program, settings)
        self.stats = Stats()
        self._tokenizer: Any = None if tokenizer is None else _tokenizer(tokenizer)

    @classmethod
    def load(
        cls,
        path: str | Path,
        device: str | torch.device | None = None,
        *,
        trust_code: bool = False,
        huge_pages: bool = False,
        world: World | None = None,
    ) -> Generator:
        """From an artifact; the options are as of `sparsec.runtime.artifact.load`.

        Raises: ArtifactError, also where its model generates no text.
        """
        artifact = open_artifact(path, rank=rank_of(Path(path), world))
        settings = artifact.json("generation.json")
        if settings is None:
            raise ArtifactError(f"{path} has no generation.json: it was not compiled for generating text")
        has_tokenizer = "tokenizer.json" in artifact.manifest["files"]
        program = artifact.program(device, trust_code=trust_code, huge_pages=huge_pages, world=world)
        return cls(program, settings, artifact.read("tokenizer.json") if has_tokenizer else None)

    def encode(self, prompt: str | Sequence[int]) -> list[int]:
        """Token ids of a prompt. Raises: InputError for text where there is no tokenizer, and for no tokens."""
        if isinstance(prompt, str):
            if self._tokenizer is None:
                raise InputError(
                    "a prompt of text needs a tokenizer.json in the artifact and the package tokenizers: "
                    "install it, or give token ids"
                )
            prompt = self._tokenizer.encode(prompt).ids
        ids = [int(token) for token in prompt]
        if not ids:
            raise InputError("the prompt has no tokens")
        if wrong := [token for token in ids if not 0 <= token < 1 << 63]:
            raise InputError(f"the prompt has the token id {wrong[0]}")
        return ids

    def stream(self, prompt: str | Sequence[int], max_new_tokens: int | None = None) -> Iterator[Token]:
        """The most likely continuation, token by token, each as soon as it is known.

        Ends with the first token of `eos` (which is yielded), after `max_new_tokens`, or when `max_len` is reached if
        no number is given. Starting a generation ends the one before: the program has one cache. Where several ranks
        run the program, each generates from a prompt of its own, and the last token is followed by taking part in what
        the others still generate.

        Raises:
            InputError: the prompt, or prompt and new tokens, are longer than the program allows.
        """
        ids = self.encode(prompt)
        room = self.max_len - len(ids)
        wanted = room if max_new_tokens is None else max_new_tokens
        if room < 1 or wanted > room:
            raise InputError(
                f"{len(ids)} tokens of prompt and {max(wanted, 1)} new ones are more than the {self.max_len} positions "
                "that the program was compiled for: shorten the prompt, or compile with a larger maximum length"
            )
        return self._stream(ids, wanted)

    def _stream(self, ids: list[int], wanted: int) -> Iterator[Token]:
        try:
            yield from self._tokens(ids, wanted)
        except GeneratorExit:  # nobody wants more; other ranks may
            self.program.finish()
            raise
        self.program.finish()

    def _tokens(self, ids: list[int], wanted: int) -> Iterator[Token]:
        self.stats = stats = Stats(prompt_tokens=len(ids))
        self.program.reset()
        decoder = self._decoder()
        given, start = ids, 0
        for _ in range(wanted):
            began = time.perf_counter()
            token = int(self._logits(given, start).argmax())
            taken = time.perf_counter() - began
            if stats.new_tokens == 0:
                stats.prefill_seconds = taken
            else:
                stats.decode_seconds += taken
            stats.new_tokens += 1
            yield Token(token, decoder(token))
            if token in self.eos:
                return
            ids = [*ids, token]
            given, start = ([token], len(ids) - 1) if self.kind == "static-cache" else (ids, 0)

    def _logits(self, ids: list[int], start: int) -> Tensor:
        """Logits [vocabulary] after the last of `ids`, the first of which is at position `start`."""
        device = self.program.device
        tensors = [torch.tensor([ids], device=device)]
        if self.kind == "static-cache":
            tensors.append(torch.tensor([start], device=device))
        logits = self.program(*tensors)[0]
        return logits.reshape(-1, logits.shape[-1])[-1]

    def _decoder(self) -> Any:
        """A function from each token in turn to the text that it adds."""
        if self._tokenizer is None:
            return lambda token: ""
        from tokenizers.decoders import DecodeStream

        stream = DecodeStream(skip_special_tokens=True)
        return lambda token: stream.step(self._tokenizer, token) or ""


def _tokenizer(content: bytes) -> Any:
    """A tokenizer, None where the package is not installed. Raises: ArtifactError for a damaged file."""
    try:
        from tokenizers import Tokenizer
    except ImportError:
        return None
    try:
        return Tokenizer.from_str(content.decode())
    except Exception as error:  # the package raises bare exceptions
        raise ArtifactError(f"tokenizer.json cannot be read: {error}") from None


def _checked(program: Program, settings: Any) -> tuple[str, int, frozenset[int]]:
    """Kind, max_len and eos of the settings. Raises: ArtifactError."""
    if not isinstance(settings, dict) or settings.get("kind") not in INPUTS:
        raise ArtifactError(f"generation.json names no kind of generation (there are: {', '.join(INPUTS)})")
    kind: str = settings["kind"]
    inputs: Any = settings.get("inputs")
    max_len, eos = settings.get("max_len"), settings.get("eos", [])
    if inputs != INPUTS[kind]:
        raise ArtifactError(f"generation.json: the inputs of kind '{kind}' are {inputs!r}, not {INPUTS[kind]}")
    if type(max_len) is not int or max_len < 1:
        raise ArtifactError(f"generation.json: max_len is {max_len!r}, not a number of positions")
    if not isinstance(eos, list) or not all(type(token) is int for token in eos):
        raise ArtifactError(f"generation.json: eos is {eos!r}, not a list of token ids")
    if settings.get("batch", 1) != 1:
        raise ArtifactError(
            f"the program runs {settings['batch']} sequences at once, generation takes one: use batch 1"
        )
    taken = sum(arg.kind == "input" for arg in program.plan.args)
    if taken != len(inputs):
        raise ArtifactError(f"generation.json names {len(inputs)} inputs, the program takes {taken}")
    return kind, max_len, frozenset(eos)
