"""Tiny random models of every family of transformers with experts.

A family's configuration is derived: the default of its class, with every size that has a known meaning made small by
the rules below, by name of the key. `FAMILIES` lists the families with what the rules do not know of them.
"""

from __future__ import annotations

import importlib
import inspect
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
from torch import Tensor, nn

VOCABULARY, WIDTH, INNER, LAYERS, EXPERTS, CHOSEN = 128, 64, 48, 2, 8, 2

# The first rule that matches a key gives its value. None of them adds a key that the configuration does not have.
RULES: tuple[tuple[str, Any], ...] = (
    (r"(unpadded_)?vocab_size(_per_layer_input)?", VOCABULARY),
    (r"hidden_size|d_model", WIDTH),
    (r"hidden_size_per_layer_input|d_rel|altup_num_inputs", 4),
    (r"(moe_)?latent_size|moe_hidden_size", 32),
    (r".*intermediate_size(_mlp)?|.*ffn_hidden_size|.*ffn_dim|d_ff|share_expert_dim", INNER),
    (r"num_(hidden_|decoder_|sparse_encoder_|sparse_decoder_)?layers|n_layers|(en|de)coder_layers", LAYERS),
    (r"num_nextn_predict_layers|num_mtp_layers|num_kv_shared_layers", 0),
    (r"(swa_)?num_key_value_heads|linear_num_key_heads", 2),
    (r"(swa_)?num_attention_heads|n(um)?_heads|(en|de)coder_attention_heads|num_sliding_attention_heads", 4),
    (r"linear_num_(value_)?heads|mamba_(n|num)_heads", 4),
    (r"(swa_|qk_nope_|v_|index_|global_|linear_|linear_key_|linear_value_|mamba_)?head_dim|d_kv|kv_channels", 16),
    (r"mamba_d_head|mamba_d_state|ssm_state_size|rel_extent|router_hidden_size", 16),
    (r"qk_rope_head_dim|rotary_dim", 8),
    (r"qk_head_dim", 24),
    (r".*lora_rank|.*lowrank|gated_norm_rank|laurel_rank|mamba_dt_rank", 16),
    (r"index_n_heads|o_groups|hc_mult|hc_count|n_groups", 2),
    (r"index_topk|index_block_size|sliding_window(_size)?|.*chunk_size|block_size|floor_scale", 8),
    (r"index_topk_blocks|index_kpool", 2),
    (r"(n_routed|num|num_local|moe_num)_experts", EXPERTS),
    (r"num_experts_per_tok(en)?|moe_topk|moe_k|top_k_experts", CHOSEN),
    (r"(n|num|moe_num)_shared_experts", 1),
    (r"n_group|num_expert_group", 4),
    (r"topk_group", 2),
    (r"first_k_dense_replace|num_dense_layers|moe_layer_start_index|expert_layer_offset", 0),
    (r"expert_layer_period|interleave_moe_layer_step|decoder_sparse_step|encoder_sparse_step", 1),
    (r"moe_layer_end_index", -1),
    (r"mlp_only_layers", []),
    (r"mlp_layer_types", ["sparse"] * LAYERS),
    (r"routed_scaling_factor|route_scale|(moe_)?router_scaling_factor|moe_routed_scaling_factor", 1.5),
    (r"norm_topk_prob|moe_renormalize|enable_moe_block|is_moe", True),
    (r"use_mamba_kernels", False),
    (r".*layerdrop", 0.0),
    (r"expert_capacity", 64),
    (r"max_position_embeddings|model_max_length|max_seq_len", 512),
    (r"pad_token_id", 0),
    (r"bos_token_id", 1),
    (r"eos_token_id", 2),
)
OPTIONAL = re.compile(r"sliding_window")  # keys for which None says that there is none of it, and that stay so
DENSE = {"dense", "mlp"}


@dataclass(frozen=True)
class Family:
    """What the rules do not know of a family.

    Args:
        changes: entries of its configuration.
        model: the class; by default the first causal language model, or the first text model.
        keep: keys that stay at their default.
        block: the class of its expert layers, where shapes do not tell (`tests.zoo.layers.paths`).
        inputs: further inputs of zeros and ones, a number for each token.
    """

    changes: Mapping[str, Any] = field(default_factory=dict[str, Any])
    model: str = ""
    keep: frozenset[str] = frozenset()
    block: str = ""
    inputs: tuple[str, ...] = ()


def family(
    *, model: str = "", keep: Iterable[str] = (), block: str = "", inputs: Iterable[str] = (), **changes: Any
) -> Family:
    return Family(changes, model, frozenset(keep), block, tuple(inputs))


_MROPE = {"rope_type": "default", "rope_theta": 1e4}
_ERNIE_VL: dict[str, Any] = {
    "moe_intermediate_size": [INNER, 32],
    "rope_parameters": {**_MROPE, "mrope_section": [3, 3, 2]},
    "block": "Ernie4_5_VLMoeMoeBlock",
}

_AS_DERIVED = (
    "afmoe aria axk1 axk2 bailing_hybrid beam cohere2_moe deepseek_ocr2 deepseek_v3 deepseek_v32 diffusion_gemma dots1 "
    "ernie4_5_moe exaone_moe flex_olmo flint gemma4 glm4_moe glm4_moe_lite glm_moe_dsa gpt_oss granitemoe "
    "granitemoe_swa granitemoeshared hunyuan_v1_moe hy_v3 hy_v4 inkling inkling2 jetmoe kimi_linear kolibri1 mellum "
    "mimo_v2_flash minimax minimax_m2 minimax_m3_vl mistral4 mistral_large4 mixtral muse_spark olmoe "
    "openai_privacy_filter phimoe qwen2_moe qwen3_5_moe qwen3_moe qwen3_next qwen3_omni_moe qwen3_vl_moe solar_open "
    "unlimited_ocr"
)

FAMILIES: dict[str, Family] = {
    **{name: Family() for name in _AS_DERIVED.split()},
    "dbrx": family(
        attn_config={"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 1e4},
        ffn_config={"hidden_size": WIDTH, "ffn_hidden_size": INNER, "moe_num_experts": EXPERTS, "moe_top_k": CHOSEN},
        block="DbrxFFN",
    ),
    "deepseek_v2": family(topk_method="group_limited_greedy"),
    "deepseek_v4": family(
        head_dim=16, num_key_value_heads=1, partial_rotary_factor=0.5, mlp_layer_types=["hash_moe", "moe"]
    ),
    "doge": family(num_experts=64, num_experts_per_tok=4, block="DogeCDMoE"),
    "dots3_note": family(per_layer_config={"1": {"head_dim": 24}}),
    "ernie4_5_vl_moe": family(**_ERNIE_VL),
    "gemma3n": family(intermediate_size=[INNER, INNER]),
    "glm4v_moe": family(rope_parameters={**_MROPE, "partial_rotary_factor": 0.5, "mrope_section": [1, 1, 2]}),
    "glm5_next": family(qk_rope_head_dim=0, qk_head_dim=16),
    "granitemoehybrid": family(
        mamba_n_heads=8, layer_types=["linear_attention", "full_attention"], position_embedding_type="rope"
    ),
    "jamba": family(attn_layer_period=2, attn_layer_offset=1),
    "laguna": family(num_attention_heads_per_layer=[4, 4], moe_router_logit_softcapping=2.0),
    "lfm2_moe": family(layer_types=["conv", "full_attention"]),
    "llama4": family(num_experts_per_tok=1),
    "longcat_flash": family(num_layers=1, zero_expert_num=4, moe_topk=4),
    "nemotron_h": family(
        layers_block_type=["full_attention", "moe", "linear_attention", "moe"],
        keep=["num_hidden_layers"],
        moe_latent_size=32,
        mamba_num_heads=8,
    ),
    "nllb_moe": family(model="NllbMoeForConditionalGeneration"),
    "qwen4_exp": family(
        indexer_n_heads=2, indexer_kv_heads=1, indexer_head_dim=16, indexer_budget=8, indexer_compress_ratio=2,
        ple_embed_dim=16, ngram_vocab_size_base=64, heads_per_ngram=2, split_ngram_parts=1,
        make_ngram_vocab_size_divisible_by=1,
    ),
    "step3p7": family(sliding_window=8, swiglu_limits=[0.5, None], swiglu_limits_shared=[0.5, None]),
    "switch_transformers": family(model="SwitchTransformersForConditionalGeneration"),
    "vitpose_backbone": family(
        image_size=[32, 32], patch_size=[8, 8], num_experts=6, part_features=16, out_features=["stage2"],
        out_indices=[2],
    ),
    "zaya": family(num_experts_per_tok=1),
    # Families again, configured otherwise.
    "cohere2_moe+sigmoid": family(expert_selection_fn="sigmoid"),
    "deepseek_v2+greedy": family(topk_method="greedy"),
    "ernie4_5_vl_moe+images": family(**_ERNIE_VL, inputs=["moe_mm_token_type_ids"]),
    "nemotron_h+wide": family(
        layers_block_type=["full_attention", "moe"], keep=["num_hidden_layers"], mamba_num_heads=8
    ),
    "olmoe+raw": family(norm_topk_prob=False),
}  # fmt: skip


def build(name: str) -> tuple[Any, dict[str, Tensor]]:
    """A tiny model of a family, in eval mode, f32, and the inputs to call it with.

    Skips the test where this version of transformers does not have the family.
    """
    pytest.importorskip("transformers")
    folder = name.partition("+")[0]
    try:
        modeling = importlib.import_module(f"transformers.models.{folder}.modeling_{folder}")
    except ModuleNotFoundError as error:
        pytest.skip(f"this transformers has no {error.name}")
    made = FAMILIES[name]
    cls = getattr(modeling, made.model) if made.model else _text_model(modeling)
    torch.manual_seed(0)
    model = randomised(cls(configuration(cls.config_class, made)))
    return model, inputs(name, model)


def configuration(cls: Any, made: Family) -> Any:
    """The default configuration of `cls`, made small."""
    default = cls().to_dict()
    small = {key: value for key in default if key not in made.keep and (value := _small(key, default)) is not None}
    if "kv_lora_rank" in default and "num_key_value_heads" in small:
        small["num_key_value_heads"] = small["num_attention_heads"]
        small |= {"head_dim": small["qk_rope_head_dim"]} if "head_dim" in small else {}
    return cls(**{**small, **made.changes})


def _small(key: str, default: Mapping[str, Any]) -> Any:
    """The value of a key in a tiny configuration; None leaves it as it is."""
    value = default[key]
    if isinstance(value, list) and value and len(value) == default.get("num_hidden_layers"):
        kinds = [kind for kind in dict.fromkeys(value) if kind not in DENSE]
        return [kinds[i % len(kinds)] for i in range(LAYERS)]
    if isinstance(value, dict) or (value is None and OPTIONAL.fullmatch(key)):
        return None
    return next((small for rule, small in RULES if re.fullmatch(rule, key)), None)


def _text_model(modeling: Any) -> Any:
    """The class to build: a causal language model if there is one for text alone, else the text model."""
    own = [c for c in vars(modeling).values() if inspect.isclass(c) and c.__module__ == modeling.__name__]
    for ending in ("ForCausalLM", "TextModel", "Model", "Backbone"):
        for cls in own:
            if cls.__name__.endswith(ending) and not cls.__name__.endswith("PreTrainedModel"):
                return cls
    raise LookupError(f"{modeling.__name__} has no text model")


def randomised(model: nn.Module, seed: int = 0) -> Any:
    """`model` in eval mode with weights that leave nothing at zero or one and large enough for routers to choose."""
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if not p.is_floating_point() or re.search(r"A_log|dt_bias", name):
                continue
            noise = torch.randn(p.shape, generator=rng)
            p.copy_(noise * 0.15 if p.dim() >= 2 else p.nan_to_num() + noise * 0.05)
        for name, b in model.named_buffers():
            if "bias" in name and b.is_floating_point():
                b.copy_(torch.randn(b.shape, generator=rng) * 0.05)
            elif b.dtype == torch.int64 and b.dim() == 2 and b.shape[1] == CHOSEN:  # experts by token id
                b.copy_(torch.rand(b.shape[0], EXPERTS, generator=rng).topk(CHOSEN).indices)
    return model.eval()


def token_ids(batch: int = 2, length: int = 12) -> Tensor:
    rng = torch.Generator().manual_seed(100 * batch + length)
    return torch.randint(3, VOCABULARY, (batch, length), generator=rng)


def inputs(name: str, model: Any, batch: int = 2, length: int = 12) -> dict[str, Tensor]:
    """Inputs of a family's model: token ids, for an encoder and decoder of both, or images with their data sets."""
    if "pixel_values" in (taken := inspect.signature(model.forward).parameters) and "input_ids" not in taken:
        pixels = torch.randn(batch, 3, *model.config.image_size, generator=torch.Generator().manual_seed(batch))
        return {"pixel_values": pixels, "dataset_index": torch.arange(batch) % model.config.num_experts}
    ids = token_ids(batch, length)
    if model.config.is_encoder_decoder:
        ones = torch.ones_like(ids)
        other = {"decoder_input_ids": ids.flip(1), "decoder_attention_mask": ones}
        return {"input_ids": ids, "attention_mask": ones, **other}
    return {"input_ids": ids, **{key: ids % 2 for key in FAMILIES[name].inputs}}
