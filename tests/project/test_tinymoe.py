"""The committed checkpoint is a real mixture of experts: small, trained, every expert in use, decoding without ties."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers")

MODEL = Path(__file__).parents[2] / "examples" / "tinymoe" / "model"
PROMPT = "class Server:\n    def run(self):\n"  # as in examples/demo.py
TEXT = Path(json.__file__).read_text()[:2048]  # the standard library's, as its training text was


@pytest.fixture(scope="module")
def model() -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return transformers.AutoTokenizer.from_pretrained(MODEL)


def test_it_is_small() -> None:
    assert (MODEL / "model.safetensors").stat().st_size <= 8 << 20


def test_a_token_is_a_byte(tokenizer: Any) -> None:
    text = "def é(x):\n\treturn 'a  b'\x00 # <end>\n"
    assert tokenizer(text)["input_ids"] == list(text.encode())
    assert tokenizer.decode(list(text.encode())) == text
    assert tokenizer("a<|endoftext|>")["input_ids"] == [97, 256]


def test_it_has_learnt(model: Any, tokenizer: Any) -> None:
    """Under 2.5 bits for a byte of Python; a uniform guess needs 8."""
    ids = tokenizer(TEXT, return_tensors="pt")["input_ids"][0, :2048].reshape(8, 256)
    with torch.no_grad():
        loss = torch.nn.functional.cross_entropy(model(ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    assert loss.item() / math.log(2) < 2.5


def test_every_expert_works(model: Any, tokenizer: Any) -> None:
    """In each layer each expert gets at least a fifth of an even share of the tokens."""
    ids = tokenizer(TEXT, return_tensors="pt")["input_ids"][0, :2048].reshape(8, 256)
    with torch.no_grad():
        layers = model(ids, output_router_logits=True).router_logits
    experts, k = model.config.num_experts, model.config.num_experts_per_tok
    assert len(layers) == model.config.num_hidden_layers
    for logits in layers:
        chosen = logits.topk(k).indices.flatten()
        assert torch.bincount(chosen, minlength=experts).min() >= chosen.numel() / experts / 5


def test_greedy_decoding_is_stable_in_f32(model: Any, tokenizer: Any) -> None:
    """No choice of an expert or of a byte is so close that the order of a sum in f32 could turn it."""
    ids = tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    out = model.generate(ids, max_new_tokens=120)
    with torch.no_grad():
        scores = model(out, output_router_logits=True)
    k = model.config.num_experts_per_tok
    for logits in scores.router_logits:
        top = logits.topk(k + 1).values
        assert (top[:, k - 1] - top[:, k]).min() > 1e-4
    best = scores.logits[0, ids.shape[1] - 1 : -1].topk(2).values
    assert (best[:, 0] - best[:, 1]).min() > 1e-4
