"""The CPU expert kernels against transformers' implementations: CPU time of one thread, interleaved, medians.

    python benchmarks/cpu_experts.py [--tokens 1 8 64 512] [--experts 16] [--rounds 15] [--dtype bfloat16]

Each round gives every engine the same fresh routing, in a random order. At T = 1 successive rounds hit different
experts, so that weights do not stay in the cache as they would for one token asked again and again.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sparsec.runtime.experts import run_experts

Engine = Callable[[Tensor, Tensor, Tensor], Tensor]


def transformers_bank(experts: int, hidden: int, width: int, dtype: torch.dtype) -> Any:
    """OLMoE's module of experts, with random weights."""
    from transformers.models.olmoe.configuration_olmoe import OlmoeConfig
    from transformers.models.olmoe.modeling_olmoe import OlmoeExperts

    config = OlmoeConfig(num_experts=experts, hidden_size=hidden, intermediate_size=width)
    bank: Any = OlmoeExperts(config)
    bank = bank.requires_grad_(False).to(dtype)
    bank.gate_up_proj.normal_(0, hidden**-0.5)
    bank.down_proj.normal_(0, width**-0.5)
    return bank


def theirs(bank: Any, implementation: str) -> Engine:
    """One of transformers' experts implementations."""

    def run(x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        bank.config._experts_implementation = implementation
        return bank(x, ids, weights)

    return run


def ours(bank: Any) -> Engine:
    """The runtime's kernels on packed weights."""

    def activation(parts: Sequence[Tensor]) -> Tensor:
        return F.silu(parts[0]) * parts[1]

    def run(x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        return run_experts(x, ids, weights, bank.gate_up_proj, bank.down_proj, None, None, activation)

    return run


def routing(tokens: int, experts: int, k: int, turn: int) -> tuple[Tensor, Tensor]:
    """Uniform ids and weights; one token takes the experts in turn."""
    if tokens == 1:
        ids = (torch.arange(k) + turn * k).remainder(experts).view(1, k)
    else:
        ids = torch.rand(tokens, experts).argsort(1)[:, :k]
    return ids, torch.rand(tokens, k).softmax(-1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 8, 64, 512])
    parser.add_argument("--experts", type=int, default=16)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--k", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--dtype", default="bfloat16")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    dtype = getattr(torch, args.dtype)
    bank = transformers_bank(args.experts, args.hidden, args.width, dtype)
    engines = {"grouped_mm": theirs(bank, "grouped_mm"), "eager": theirs(bank, "eager"), "sparsec": ours(bank)}
    clock = time.process_time if args.threads == 1 else time.perf_counter
    print(f"E {args.experts}, H {args.hidden}, I {args.width}, k {args.k}, {args.dtype}, {args.threads} threads; ms")
    for tokens in args.tokens:
        taken: dict[str, list[float]] = {name: [] for name in engines}
        for turn in range(-3, args.rounds):  # three to warm up
            x = torch.randn(tokens, args.hidden).to(dtype)
            ids, weights = routing(tokens, args.experts, args.k, turn)
            for name in random.sample(list(engines), len(engines)):
                start = clock()
                with torch.inference_mode():
                    engines[name](x, ids, weights.to(dtype))
                if turn >= 0:
                    taken[name].append((clock() - start) * 1e3)
        medians = {name: statistics.median(times) for name, times in taken.items()}
        best = min(medians["grouped_mm"], medians["eager"])
        cells = "  ".join(f"{name} {median:8.2f}" for name, median in medians.items())
        print(f"T {tokens:5}  {cells}  best of transformers / sparsec {best / medians['sparsec']:.2f}")


if __name__ == "__main__":
    main()
