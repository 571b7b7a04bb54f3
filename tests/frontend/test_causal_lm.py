"""Static caches: generation by the captured program against transformers' own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from sparsec.frontend.capture import Captured
from sparsec.ir.interp import evaluate_module
from sparsec.ir.verify import verify_module
from tests.frontend.helpers import mixtral, token_ids, zoo_model

FAMILIES = ["olmoe", "qwen3_moe", "qwen2_moe", "gpt_oss", "granitemoe", "glm4_moe", "deepseek_v2", "deepseek_v3"]
NEW = 6


def generate(captured: Captured, prompt: Tensor) -> Tensor:
    """Greedy decoding: prefill, then one token at a time, with the buffers carried from call to call."""
    attrs, weights = captured.module.main.result_attrs, dict(captured.weights)
    ids, given, start = prompt, prompt, 0
    for _ in range(NEW):
        results = evaluate_module(captured.module, [given, torch.tensor([start])], weights)
        for i, result in enumerate(results):
            if attrs[i]["kind"] == "mutation":
                weights[str(attrs[i]["source"])] = result
        start += given.shape[1]
        given = results[0][:, -1].argmax(-1, keepdim=True)
        ids = torch.cat([ids, given], dim=1)
    return ids


def check(model: Any, batch: int = 1) -> None:
    causal_lm = pytest.importorskip("sparsec.frontend.causal_lm")
    captured = causal_lm.CausalLM(model, max_length=24, batch=batch).capture()
    verify_module(captured.module)
    assert set(captured.weights) >= {"lm_head.weight", "cache.0.keys", "cache.1.values"}
    model.set_experts_implementation("eager")
    for length in (1, 12):
        prompt = token_ids(batch, length)
        expected = model.generate(
            prompt, do_sample=False, max_new_tokens=NEW, eos_token_id=None, attention_mask=torch.ones_like(prompt)
        )
        assert torch.equal(generate(captured, prompt), expected)


def test_mixtral_generates_the_same_tokens() -> None:
    check(mixtral())


def test_a_batch_and_a_sliding_window() -> None:
    check(mixtral(sliding_window=8), batch=3)


@pytest.mark.parametrize("family", FAMILIES)
def test_families_generate_the_same_tokens(family: str) -> None:
    check(zoo_model(family)[0])


def test_all_logits_on_demand() -> None:
    causal_lm = pytest.importorskip("sparsec.frontend.causal_lm")
    model, ids = mixtral(), token_ids(1, 5)
    with torch.no_grad():
        every = causal_lm.CausalLM(model, 24, all_logits=True)(ids, torch.tensor([0]))
        last = causal_lm.CausalLM(model, 24)(ids, torch.tensor([0]))
    assert every.shape[1] == 5
    assert torch.allclose(every[:, -1:], last, atol=1e-6)


def test_other_states_than_keys_and_values_are_refused() -> None:
    causal_lm = pytest.importorskip("sparsec.frontend.causal_lm")
    with pytest.raises(causal_lm.UnsupportedCache, match="no keys and values"):
        causal_lm.CausalLM(zoo_model("qwen3_5_moe")[0], max_length=24)
