"""Times of a whole language model shaped like OLMoE-1B-7B: a prompt at once, then token by token from a static cache.

Weights are random, and so are the tokens to decode: a model that repeats itself would ask for the same experts.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.cpu import machine
from benchmarks.cpu.engines import COMPILED, OURS, PEERS, TRANSFORMERS, path_of
from benchmarks.cpu.timing import Foreign, clock_for, interleave
from benchmarks.figures import one_line, spread

LAYERS = 16  #: of OLMoE-1B-7B
SIZES: dict[str, Any] = {
    "vocab_size": 50304,
    "hidden_size": 2048,
    "intermediate_size": 1024,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "num_experts": 64,
    "num_experts_per_tok": 8,
}


@dataclass(frozen=True)
class Writer:
    """A model with its cache: `step(tokens [1, n], start)` gives the logits [V] after the last of them.

    `start` is the position of the first; at 0 the cache is empty.
    """

    step: Callable[[Tensor, int], Tensor]
    path: str


def measure_model(
    layers: int,
    *,
    prompt: int,
    threads: Sequence[int],
    rounds: int,
    seconds: float,
    peers: Sequence[str],
    sizes: dict[str, Any] | None = None,
) -> Iterator[dict[str, Any]]:
    """The measurements of the model with `layers` layers, one at a time: `prefill` and `decode` for each thread count.

    Raises: MemoryError where the model and its packed copy do not fit.
    """
    sizes = sizes or SIZES
    name = f"OLMoE-1B-7B shape, {layers} of {LAYERS} layers"
    print(name, flush=True)
    length = prompt + rounds + 2
    model = build(layers, sizes, length)
    torch.set_num_threads(max(threads))
    writers, missing = _writers(model, length, peers)
    made = torch.Generator().manual_seed(0)
    text = torch.randint(sizes["vocab_size"], (1, length), generator=made)
    errors, failed = _check(writers, text, prompt)
    writers = {name: writer for name, writer in writers.items() if name not in failed}
    for count in threads:
        torch.set_num_threads(count)
        for phase in ("prefill", "decode"):
            runs = {name: _run(writer, text, prompt, phase) for name, writer in writers.items()}
            for writer in writers.values():
                writer.step(text[:, :prompt], 0)
            for run in runs.values():
                run(-1)
            clock_name, clock = clock_for(count)
            foreign = Foreign()
            taken = interleave(runs, clock=clock, rounds=rounds, seconds=seconds)
            figures = dict[str, Any]()
            for engine, times in taken.items():
                figures[engine] = spread(times) | {"path": writers[engine].path, "error": errors[engine]}
            row = {
                "model": name,
                "phase": phase,
                "tokens": prompt if phase == "prefill" else 1,
                "threads": count,
                "clock": clock_name,
                "other_load": foreign.share(),
                "engines": figures,
                "missing": missing | failed,
            }
            cells = "  ".join(f"{name} {figure['median']:.2f}" for name, figure in figures.items())
            print(f"  {phase:<8}{count} thr {clock_name:<5}{cells}  ms", flush=True)
            yield row


def build(layers: int, sizes: dict[str, Any], positions: int) -> Any:
    """The model with random weights, bf16. Raises: MemoryError."""
    from transformers import OlmoeConfig, OlmoeForCausalLM

    config = OlmoeConfig(
        num_hidden_layers=layers, max_position_embeddings=max(positions, 4096), eos_token_id=None, **sizes
    )
    bank = 3 * sizes["num_experts"] * sizes["hidden_size"] * sizes["intermediate_size"]
    needed = 2 * (2 * layers * bank + 2 * sizes["vocab_size"] * sizes["hidden_size"])
    needed += needed // 8
    if 0 < machine.free_bytes() < needed:
        raise MemoryError(
            f"{layers} layers and their packed copy need {needed / 2**30:.1f} GiB, "
            f"{machine.free_bytes() / 2**30:.1f} are free: use fewer --layers"
        )
    config._experts_implementation = "eager"
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        model = OlmoeForCausalLM(config)
    finally:
        torch.set_default_dtype(before)
    return model.eval().requires_grad_(False)


def _writers(model: Any, length: int, peers: Sequence[str]) -> tuple[dict[str, Writer], dict[str, str]]:
    makers: dict[str, Callable[[], Writer]] = {
        TRANSFORMERS[0]: lambda: _transformers(model, "eager", length),
        TRANSFORMERS[1]: lambda: _transformers(model, "grouped_mm", length),
        COMPILED: lambda: _transformers(model, "grouped_mm", length, compile=True),
        OURS: lambda: _ours(model, length),
    }
    wanted = {OURS, *(PEERS[peer] for peer in peers)}
    ready, missing = dict[str, Writer](), dict[str, str]()
    for name, make in makers.items():
        if name not in wanted:
            continue
        start = time.perf_counter()
        try:
            ready[name] = make()
        except (RuntimeError, ValueError) as error:
            missing[name] = one_line(error)
        said = missing.get(name) or f"{ready[name].path}, set up in {time.perf_counter() - start:.1f} s"
        print(f"  {name}: {said}", flush=True)
    return ready, missing


def _ours(model: Any, length: int) -> Writer:
    import sparsec

    program = sparsec.compile_language_model(model, max_length=length, target="cpu").program

    def step(tokens: Tensor, start: int) -> Tensor:
        return program(tokens, torch.tensor([start]))[0].view(-1)

    return Writer(step, path_of(program))


def _transformers(model: Any, implementation: str, length: int, *, compile: bool = False) -> Writer:
    """The same weights in transformers' own modules, with a static cache."""
    from transformers import StaticCache

    other = copy.deepcopy(model, {id(weight): weight for weight in model.parameters()})
    other.set_experts_implementation(implementation)
    cache: Any = StaticCache(config=other.config, max_cache_len=length)

    def last(tokens: Tensor) -> Tensor:
        # Not `logits_to_keep=1`: PyTorch copies the transposed weight to multiply it with such a slice of three axes.
        hidden = other.model(input_ids=tokens, past_key_values=cache).last_hidden_state[:, -1]
        return other.lm_head(hidden).view(-1)

    run: Callable[[Tensor], Tensor] = last
    if compile:
        with torch.inference_mode():  # makes the cache's tensors, outside of the graph
            last(torch.zeros(1, 1, dtype=torch.int64))
        torch.compiler.reset()
        run = torch.compile(last, dynamic=False)

    def step(tokens: Tensor, start: int) -> Tensor:
        with torch.inference_mode():
            if start == 0:
                cache.reset()
            return run(tokens)

    return Writer(step, f"inductor, {implementation}" if compile else implementation)


def _check(writers: dict[str, Writer], text: Tensor, prompt: int) -> tuple[dict[str, float], dict[str, str]]:
    """How far logits after prompt and one token are from the first engine's, by norm; and what fails, with why."""
    errors, failed = dict[str, float](), dict[str, str]()
    right: Tensor | None = None
    for name, writer in writers.items():
        try:
            writer.step(text[:, :prompt], 0)
            logits = writer.step(text[:, prompt : prompt + 1], prompt).float()
        except RuntimeError as error:
            failed[name] = one_line(error)
            continue
        right = logits if right is None else right
        errors[name] = round(((logits - right).norm() / right.norm()).item(), 5)
    return errors, failed


def _run(writer: Writer, text: Tensor, prompt: int, phase: str) -> Callable[[int], object]:
    def prefill(turn: int) -> object:
        return writer.step(text[:, :prompt], 0)

    def decode(turn: int) -> object:
        at = prompt + 1 + turn  # turn -1 warms up
        return writer.step(text[:, at : at + 1], at)

    return prefill if phase == "prefill" else decode
