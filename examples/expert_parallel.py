"""Run one mixture of experts on four processes, and move its experts while it runs.

    torchrun --nproc-per-node 4 examples/expert_parallel.py

Each process stands for a device: two nodes of two. All have attention, the router and everything else that is dense;
of the eight experts of a layer each holds three, so that some live twice. A prompt starts and ends in its own process,
and only its rows travel to the experts that the router picks.

Then the experts' loads are counted, a plan is made of them, and the program goes over to it: weights travel, tables
change, nothing is compiled anew, and the tokens stay the same.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, distributed
from transformers import OlmoeConfig, OlmoeForCausalLM

import sparsec
from sparsec.passes.placement import Loads, Options, parse_topology, plan, write_plan
from sparsec.runtime.artifact import rank_folder
from sparsec.runtime.generate import Generator

EXPERTS, SLOTS, LAYERS = 8, 3, 2
PROMPTS = ([7, 21, 42], [9, 9, 9, 31, 5], [60], [3, 14, 15, 9, 2, 6])


def model() -> OlmoeForCausalLM:
    """A small model with random weights, the same in every process."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": LAYERS}
    sizes |= {"num_attention_heads": 4, "num_experts": EXPERTS, "num_experts_per_tok": 2, "pad_token_id": 0}
    made = OlmoeForCausalLM(OlmoeConfig(**sizes, eos_token_id=None, max_position_embeddings=64))
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.2)
    return made.eval()


def counted(made: OlmoeForCausalLM, texts: list[list[int]]) -> Loads:
    """How many tokens of some texts each expert of each layer gets."""
    counts = np.zeros((1, LAYERS, EXPERTS))
    for text in texts:
        with torch.no_grad():
            logits: tuple[Tensor, ...] = made(torch.tensor([text]), output_router_logits=True).router_logits
        for layer, scores in enumerate(logits):
            picked = scores.topk(2).indices.flatten()
            counts[0, layer] += torch.bincount(picked, minlength=EXPERTS).numpy()
    return Loads(counts, ("prompts",), tuple(range(LAYERS)))


def planned(loads: Loads, path: Path) -> Path:
    """A plan for two nodes of two ranks, three slots each."""
    write_plan(plan(loads, parse_topology("2x2"), Options(slots=SLOTS, seconds=5)), path)
    return path


def prepare(folder: Path) -> None:
    """Compile for experts that are used alike, and make a plan for how they are used."""
    made = model()
    alike = Loads(np.ones((1, LAYERS, EXPERTS)), ("alike",), tuple(range(LAYERS)))
    first = planned(alike, folder / "first.json")
    sparsec.compile_language_model(made, plan=first, dispatch="node").save(folder / "model.sparsec")
    planned(counted(made, [*PROMPTS]), folder / "better.json")


def main() -> None:
    """What every process runs."""
    distributed.init_process_group("gloo")
    rank = distributed.get_rank()
    place: list[Any] = [tempfile.mkdtemp() if rank == 0 else None]
    distributed.broadcast_object_list(place)
    folder = Path(place[0])
    if rank == 0:
        prepare(folder)
    distributed.barrier()

    generator = Generator.load(folder / "model.sparsec")
    program, world = generator.program, generator.program.world
    assert world is not None
    own = sum(file.stat().st_size for file in (folder / "model.sparsec" / rank_folder(rank)).iterdir())
    before = [token.id for token in generator.stream(PROMPTS[rank], 8 + rank)]
    say(rank, f"rank {rank}: {own / 1e3:.0f} kB of experts, tokens {before}")

    moved = sum(1 for _ in program.replan(folder / "better.json", budget_bytes=100_000))
    after = [token.id for token in generator.stream(PROMPTS[rank], 8 + rank)]
    say(rank, f"rank {rank}: the same tokens after {moved} steps of moving: {after == before}")
    distributed.destroy_process_group()
    if rank == 0:
        shutil.rmtree(folder)


def say(rank: int, text: str) -> None:
    """Print, one rank after the other."""
    for turn in range(distributed.get_world_size()):
        if turn == rank:
            print(text, flush=True)
        distributed.barrier()


if __name__ == "__main__":
    main()
