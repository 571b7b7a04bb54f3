"""Train the small mixture-of-experts language model that the demo compiles.

The model is an `OlmoeForCausalLM` of transformers: 4 layers, 16 experts per layer of which 2 work for each token,
3.5 million parameters of which 0.7 million work for each token. It reads bytes. Its text is what every Python
installation has, the standard library's own sources, so that nothing is downloaded. One CPU thread needs about half
an hour:

    python examples/tinymoe/train.py --out examples/tinymoe/model

Same Python, same torch, same seed: same checkpoint.
"""

from __future__ import annotations

import argparse
import math
import sysconfig
import time
from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import GenerationConfig, OlmoeConfig, OlmoeForCausalLM, PreTrainedTokenizerFast
from transformers.models.olmoe.modeling_olmoe import load_balancing_loss_func

END_OF_TEXT = 256  #: the one token that is not a byte; it stands between two files
BALANCE_WEIGHT = 0.02  #: of the load-balancing loss beside the cross-entropy
LEFT_OUT = {"test", "tests", "idlelib", "lib2to3", "encodings", "pydoc_data", "turtledemo", "site-packages"}


def read_corpus() -> torch.Tensor:
    """The standard library's Python sources and the license as one row of bytes and `END_OF_TEXT`: [tokens], int64."""
    root = Path(sysconfig.get_path("stdlib"))
    files = sorted(path for path in root.rglob("*.py") if not LEFT_OUT & set(path.relative_to(root).parts))
    files += sorted(root.glob("LICENSE*"))
    parts: list[torch.Tensor] = []
    for path in files:
        parts.append(torch.frombuffer(bytearray(path.read_bytes() or b"\n"), dtype=torch.uint8).long())
        parts.append(torch.tensor([END_OF_TEXT]))
    return torch.cat(parts)


def byte_tokenizer() -> Tokenizer:
    """A tokenizer whose token id is the byte's value: the byte-level alphabet in byte order, and no merges."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    shifted = (byte for byte in range(256) if byte not in printable)
    letters = {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(shifted)}
    tokenizer = Tokenizer(models.BPE(vocab={letters[byte]: byte for byte in range(256)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken("<|endoftext|>", special=True)])
    return tokenizer


def build_model() -> OlmoeForCausalLM:
    """The untrained model, f32."""
    config = OlmoeConfig(
        vocab_size=END_OF_TEXT + 1,
        hidden_size=128,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        num_experts=16,
        num_experts_per_tok=2,
        norm_topk_prob=True,
        max_position_embeddings=512,
        eos_token_id=END_OF_TEXT,
        pad_token_id=None,
        initializer_range=0.05,
    )
    return OlmoeForCausalLM(config)


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Linear warm-up over the first 3 % of the steps, then a cosine down to 2 % of the peak."""
    warmup = max(1, steps * 3 // 100)
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup))))


def balance_loss(model: OlmoeForCausalLM, router_logits: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """How unevenly the experts are used, averaged over the layers: 1 where every expert of a layer gets the same share.

    transformers' own auxiliary loss pools all layers, and so would accept layers that each use a few experts only.
    """
    experts, top_k = model.config.num_experts, model.config.num_experts_per_tok
    losses = [torch.as_tensor(load_balancing_loss_func((logits,), experts, top_k)) for logits in router_logits]
    return torch.stack(losses).mean() / top_k


def train(model: OlmoeForCausalLM, corpus: torch.Tensor, *, steps: int, batch: int, length: int, peak: float) -> None:
    """Train `model` in place on windows of `length` bytes drawn from `corpus`; prints the loss in bits per byte."""
    decayed = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() <= 1]
    groups = [{"params": decayed, "weight_decay": 0.05}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.97), eps=1e-9)
    model.train()
    began, smooth = time.monotonic(), 0.0
    for step in range(steps):
        starts = torch.randint(len(corpus) - length, (batch,))
        ids = torch.stack([corpus[start : start + length] for start in starts.tolist()])
        out = model(input_ids=ids, output_router_logits=True, use_cache=False)
        loss = torch.nn.functional.cross_entropy(out.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        balance = balance_loss(model, out.router_logits)
        (loss + BALANCE_WEIGHT * balance).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, peak)
        optimizer.step()
        optimizer.zero_grad()
        bits = loss.item() / math.log(2)
        smooth = bits if step == 0 else 0.98 * smooth + 0.02 * bits
        if step % 50 == 0 or step == steps - 1:
            seconds = time.monotonic() - began
            print(f"step {step:5d}  {smooth:.3f} bits/byte  balance {balance.item():.3f}  {seconds:.0f} s", flush=True)


def save(model: OlmoeForCausalLM, folder: Path) -> None:
    """Write the checkpoint in bf16 with its tokenizer and generation settings, in the Hugging Face layout."""
    model.generation_config = GenerationConfig(
        do_sample=False, max_new_tokens=200, eos_token_id=END_OF_TEXT, pad_token_id=END_OF_TEXT
    )
    model.bfloat16().save_pretrained(folder)
    PreTrainedTokenizerFast(
        tokenizer_object=byte_tokenizer(), eos_token="<|endoftext|>", pad_token="<|endoftext|>", model_max_length=512
    ).save_pretrained(folder)


def main() -> None:
    """Read the options, train, save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for the checkpoint")
    parser.add_argument("--steps", type=int, default=6500)
    parser.add_argument("--batch", type=int, default=8, help="windows per step")
    parser.add_argument("--length", type=int, default=256, help="bytes per window")
    parser.add_argument("--peak", type=float, default=3e-3, help="highest learning rate")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(options.seed)
    model = build_model()
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters")
    train(model, read_corpus(), steps=options.steps, batch=options.batch, length=options.length, peak=options.peak)
    save(model, options.out)


if __name__ == "__main__":
    main()
