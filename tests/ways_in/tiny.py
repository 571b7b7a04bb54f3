"""Tiny models of transformers, built from configurations written here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "num_experts_per_tok": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def model(family: str) -> Any:
    """A random model in f32: mixtral, olmoe or qwen3_moe."""
    import transformers as t

    torch.manual_seed(0)
    if family == "mixtral":
        made: Any = t.MixtralForCausalLM(t.MixtralConfig(**SIZES, intermediate_size=48, num_local_experts=4))
    elif family == "olmoe":
        made = t.OlmoeForCausalLM(t.OlmoeConfig(**SIZES, intermediate_size=48, num_experts=4))
    else:
        sizes: dict[str, Any] = {**SIZES, "head_dim": 16, "moe_intermediate_size": 24}
        made = t.Qwen3MoeForCausalLM(t.Qwen3MoeConfig(**sizes, intermediate_size=48, num_experts=4))
    # The usual initialisation is so small that every expert is alike: spread the weights.
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.2)
    return made.eval()


def folder(parent: Path, family: str = "mixtral", **changes: Any) -> Path:
    """A folder with the configuration and weights of a tiny model."""
    place = parent / family
    made = model(family)
    for name, value in changes.items():
        setattr(made.config, name, value)
    made.save_pretrained(place)
    return place


def ids(batch: int, tokens: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, 64, (batch, tokens), generator=torch.Generator().manual_seed(seed))
