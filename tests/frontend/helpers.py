"""Small models of real families, and how far a captured module is from the model that it came from."""

from __future__ import annotations

import importlib.util
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sparsec.frontend.capture import Captured
from sparsec.ir.interp import evaluate_module

VOCABULARY = 128
ZOO = Path(__file__).parents[3] / "shared" / "zoo"


def mixtral(**changes: Any) -> Any:
    """A Mixtral of two layers with eight experts, as eager transformers runs it."""
    transformers = pytest.importorskip("transformers")
    config = transformers.MixtralConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, num_local_experts=8, max_position_embeddings=128, **changes,
    )  # fmt: skip
    return randomised(transformers.MixtralForCausalLM(config))


def randomised(model: nn.Module) -> Any:
    """`model` with weights large enough that its routers have preferences."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() >= 2:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.15)
    return model.eval()


@cache
def zoo() -> Any:
    """The zoo beside the repository, under a name that nothing else can have; skips the test where there is none."""
    pytest.importorskip("transformers")
    if not (ZOO / "zoo.py").is_file():
        pytest.skip("no zoo beside the repository")
    spec = importlib.util.spec_from_file_location("zoo_beside_the_repository", ZOO / "zoo.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def zoo_model(family: str) -> tuple[Any, dict[str, Tensor]]:
    """A tiny model of a family of the zoo; skips the test where this transformers lacks it."""
    families = zoo().FAMILIES
    try:
        return families[family]()  # type: ignore[no-any-return]
    except ModuleNotFoundError as error:
        pytest.skip(f"this transformers has no {error.name}")


def token_ids(batch: int, sequence: int) -> Tensor:
    generator = torch.Generator().manual_seed(batch * 100 + sequence)
    return torch.randint(3, VOCABULARY, (batch, sequence), generator=generator)


def outputs(captured: Captured, *inputs: Tensor) -> list[Tensor]:
    """What the captured module computes, by the reference of every op."""
    return evaluate_module(captured.module, inputs, captured.weights)


def relative_error(result: Tensor, expected: Tensor) -> float:
    return ((result - expected).abs().max() / expected.abs().max()).item()


def logits(model: Any, ids: Tensor) -> Tensor:
    """What transformers' own eager experts give."""
    model.set_experts_implementation("eager")
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits
