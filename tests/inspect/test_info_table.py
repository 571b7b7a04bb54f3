"""`sparsec info` on published models: our exact counts, and the publishers' rounded ones."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from sparsec.inspect.accounting import ModelInfo
from sparsec.inspect.info import info

transformers = pytest.importorskip("transformers")


@dataclass(frozen=True)
class Row:
    """A published model.

    Args:
        model, config: classes of transformers; `options` is what differs from the config's defaults.
        experts, k, shared: of the expert layers.
        layers: all, and those with experts.
        counts: total, active, active without the input embedding: exact.
        kv: bytes per token in bf16.
        published: total and active in 10^9; None where no figure was found or it is of another model.
        loose: the published total is a round name (8B for 8.5), no figure.
    """

    model: str
    config: str
    experts: int
    k: int
    shared: float
    layers: tuple[int, int]
    counts: tuple[int, int, int]
    kv: int
    published: tuple[float | None, float | None]
    options: dict[str, Any] = field(default_factory=dict[str, Any])
    loose: bool = False


SCOUT_VISION = {
    "hidden_size": 1408,
    "num_hidden_layers": 34,
    "num_attention_heads": 16,
    "intermediate_size": 5632,
    "vision_output_dim": 4096,
    "image_size": 336,
    "patch_size": 14,
    "projector_input_dim": 4096,
    "projector_output_dim": 4096,
}
DEEPSEEK_V2 = {
    "hidden_size": 5120,
    "intermediate_size": 12288,
    "num_hidden_layers": 60,
    "num_attention_heads": 128,
    "num_key_value_heads": 128,
    "first_k_dense_replace": 1,
    "n_routed_experts": 160,
    "n_shared_experts": 2,
    "moe_intermediate_size": 1536,
    "num_experts_per_tok": 6,
    "n_group": 8,
    "topk_group": 3,
    "topk_method": "group_limited_greedy",
    "routed_scaling_factor": 16.0,
    "kv_lora_rank": 512,
    "q_lora_rank": 1536,
}
DEEPSEEK_V2_LITE = {
    "hidden_size": 2048,
    "intermediate_size": 10944,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "first_k_dense_replace": 1,
    "n_routed_experts": 64,
    "n_shared_experts": 2,
    "moe_intermediate_size": 1408,
    "num_experts_per_tok": 6,
    "q_lora_rank": None,
}
QWEN3_30B = {"num_hidden_layers": 48, "head_dim": 128, "num_experts": 128, "moe_intermediate_size": 768}
QWEN3_235B = {
    "hidden_size": 4096,
    "num_hidden_layers": 94,
    "num_attention_heads": 64,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "num_experts": 128,
    "moe_intermediate_size": 1536,
}
SWITCH = {"d_ff": 3072, "num_sparse_encoder_layers": 6, "num_sparse_decoder_layers": 6}
JETMOE = {
    "num_hidden_layers": 24,
    "hidden_size": 2048,
    "num_key_value_heads": 16,
    "kv_channels": 128,
    "intermediate_size": 5632,
}

# fmt: off
ROWS = {
    "Mixtral-8x7B": Row("MixtralForCausalLM", "MixtralConfig", 8, 2, 0, (32, 32),
        (46702792704, 12879925248, 12748853248), 131072, (46.7, 12.9)),
    "OLMoE-1B-7B": Row("OlmoeForCausalLM", "OlmoeConfig", 64, 8, 0, (16, 16),
        (6919161856, 1282017280, 1178994688), 131072, (6.9, 1.3), {"intermediate_size": 1024}),
    "DeepSeek-V2": Row("DeepseekV2ForCausalLM", "DeepseekV2Config", 160, 6, 2, (60, 59),
        (235741434880, 21375800320, 20851512320), 69120, (236, 21), DEEPSEEK_V2),
    "DeepSeek-V2-Lite": Row("DeepseekV2ForCausalLM", "DeepseekV2Config", 64, 6, 2, (27, 26),
        (15706484224, 2661150208, 2451435008), 31104, (15.7, 2.4), DEEPSEEK_V2_LITE),
    "DeepSeek-V3": Row("DeepseekV3ForCausalLM", "DeepseekV3Config", 256, 8, 1, (61, 58),
        (671026404352, 37552282624, 36625603584), 70272, (671, 37)),
    "Qwen3-30B-A3B": Row("Qwen3MoeForCausalLM", "Qwen3MoeConfig", 128, 8, 0, (48, 48),
        (30532122624, 3353032704, 3041867776), 98304, (30.5, 3.3), QWEN3_30B),
    "Qwen3-235B-A22B": Row("Qwen3MoeForCausalLM", "Qwen3MoeConfig", 128, 8, 0, (94, 94),
        (235093634560, 22190763520, 21568433664), 192512, (235, 22), QWEN3_235B),
    "Qwen3.6-35B-A3B, text": Row("Qwen3_5MoeForCausalLM", "Qwen3_5MoeTextConfig", 256, 8, 1.001, (40, 40),
        (34660610688, 3454988928, 2946429568), 20480, (35, 3)),
    "Qwen3.6-35B-A3B": Row("Qwen3_5MoeForConditionalGeneration", "Qwen3_5MoeConfig", 256, 8, 1.001, (40, 40),
        (35114261360, 3908639600, 3400080240), 20480, (35.1, None)),  # "A3B" is the text model
    "Qwen3-Next-80B-A3B": Row("Qwen3NextForCausalLM", "Qwen3NextConfig", 512, 10, 1.001, (48, 48),
        (79674391296, 3874929408, 3563764480), 24576, (80, None)),  # "A3B" is 3.56
    "gpt-oss-120b": Row("GptOssForCausalLM", "GptOssConfig", 128, 4, 0, (36, 36),
        (116829156672, 5711982912, 5132849472), 73728, (116.8, 5.1)),
    "gpt-oss-20b": Row("GptOssForCausalLM", "GptOssConfig", 32, 4, 0, (24, 24),
        (20914757184, 4187440704, 3608307264), 49152, (20.9, 3.6), {"num_hidden_layers": 24, "num_local_experts": 32}),
    "Llama-4-Scout, text": Row("Llama4ForCausalLM", "Llama4TextConfig", 16, 1, 1, (48, 48),
        (107769861120, 17172894720, 16138408960), 196608, (109, 17)),
    "Llama-4-Scout": Row("Llama4ForConditionalGeneration", "Llama4Config", 16, 1, 1, (48, 48),
        (108641793536, 18044827136, 17010341376), 196608, (109, 17), {"vision_config": SCOUT_VISION}),
    "Switch-base-8": Row("SwitchTransformersForConditionalGeneration", "SwitchTransformersConfig", 8, 1, 0, (24, 12),
        (619339008, 222977280, 222977280), 73728, (None, None), SWITCH),
    "Switch-base-128": Row(
        "SwitchTransformersForConditionalGeneration", "SwitchTransformersConfig", 128, 1, 0, (24, 12),
        (7415217408, 224083200, 224083200), 73728, (None, None), SWITCH | {"num_experts": 128}),
    "JetMoE-8B": Row("JetMoeForCausalLM", "JetMoeConfig", 8, 2, 0, (24, 24),
        (8522237952, 2331445248, 2331445248), 196608, (8, 2.2), JETMOE, loose=True),
}
# fmt: on


def account(row: Row) -> ModelInfo:
    config = getattr(transformers, row.config)(**row.options)
    with torch.device("meta"):
        return info(getattr(transformers, row.model)(config).to(torch.bfloat16))


@pytest.mark.parametrize("name", ROWS)
def test_published_model(name: str) -> None:
    row = ROWS[name]
    start = time.monotonic()
    found = account(row)
    assert time.monotonic() - start < 60

    assert (found.total, found.active, found.active_without_embedding) == row.counts
    assert (found.layers, found.moe_layers) == row.layers
    assert found.weight_bytes == 2 * found.total
    assert found.kv_bytes_per_token == row.kv
    for routed in found.routed:
        assert (routed.experts, routed.k, routed.layers) == (row.experts, row.k, row.layers[1])
    assert found.routed[0].shared_experts == row.shared
    config = getattr(transformers, row.config)(**row.options)
    assert {routed.hidden for routed in found.routed} == {config.get_text_config().hidden_size}

    total, active = row.published
    if total is not None:
        assert found.total / 1e9 == pytest.approx(total, rel=0.07 if row.loose else 0.012)
    if active is not None:
        assert found.active_without_embedding / 1e9 * 0.93 <= active <= found.active / 1e9 * 1.07


def test_two_kinds_of_routed_blocks_in_a_layer() -> None:
    found = account(ROWS["JetMoE-8B"])
    assert [routed.place for routed in found.routed] == ["model.layers.0.mlp", "model.layers.0.self_attention.experts"]


def test_vision_tower_is_counted_and_named_as_unreached() -> None:
    found = account(ROWS["Llama-4-Scout"])
    assert found.unreached == ROWS["Llama-4-Scout"].counts[0] - ROWS["Llama-4-Scout, text"].counts[0]
