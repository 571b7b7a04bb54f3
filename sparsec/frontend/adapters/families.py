"""Adapters for families of transformers whose experts lie outside its experts interface, by the class of the module.

Each says in a few lines what a module's own code computes; the routers in them are plain operators, so that they are
raised like any other.
"""

from __future__ import annotations

from functools import cache, partial
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from sparsec.frontend import experts_hook
from sparsec.frontend.adapters.registry import Registered
from sparsec.frontend.functional import capacity, experts, glu, grouped_linear

ADAPTERS: dict[tuple[str, str], Registered] = {}


@cache
def _installed() -> tuple[int, ...]:
    """The version of transformers; () for none."""
    try:
        return tuple(int(part) for part in version("transformers").split(".")[:2])
    except PackageNotFoundError:
        return ()


def _for(family: str, target: str, warning: str = "", since: tuple[int, ...] = ()) -> Any:
    """Make a function the adapter of a method of a family, from a version of transformers on that computes the same."""
    cls, _, method = target.partition(".")

    def register(adapter: Any) -> Any:
        if _installed() < since:
            return adapter
        path = f"transformers.models.{family}.modeling_{family}:{cls}"
        ADAPTERS[path, method or "forward"] = Registered(adapter, warning)
        return adapter

    return register


@_for("dbrx", "DbrxExperts")
def dbrx(module: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """Three flat weights [E * I, H]; the down-projection lies transposed."""
    mlp = module.mlp
    gate, up, down = (weight.view(module.num_experts, -1, module.hidden_size) for weight in (mlp.w1, mlp.v1, mlp.w2))
    return experts(
        hidden_states,
        top_k_index,
        top_k_weights,
        up,
        down,
        gate=gate,
        activation=glu(mlp.activation_fn),
        down_transposed=True,
    )


@_for("longcat_flash", "LongcatFlashExperts")
def longcat_flash(module: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """Ids from E on are experts that return their input: the bank skips them."""
    routed = module.num_routed_experts
    returned = torch.where(top_k_index >= routed, top_k_weights, 0.0).sum(-1, keepdim=True)
    identity = (hidden_states * returned).to(hidden_states.dtype)
    if module.gate_up_proj is None:
        return identity
    y = experts(
        hidden_states,
        top_k_index,
        top_k_weights,
        module.gate_up_proj[:routed],
        module.down_proj,
        activation=glu(module.act_fn),
    )
    return y + identity


@_for("step3p7", "Step3p7Experts")
def step3p7(module: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """Clamps after the activation, in some layers."""
    limited = partial(_limited, module.act_fn, module.limit)
    activation = glu(module.act_fn) if module.limit == float("inf") else limited
    return experts(
        hidden_states, top_k_index, top_k_weights, module.gate_up_proj, module.down_proj, activation=activation
    )


def _limited(act: Any, limit: float, gate: Tensor, up: Tensor) -> Tensor:
    return act(gate).clamp(max=limit) * up.clamp(min=-limit, max=limit)


@_for("llama4", "Llama4Router")
def llama4_router(module: Any, hidden_states: Tensor) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """Ids and weights [T, k] in the place of scores for all experts."""
    logits = F.linear(hidden_states, module.weight, module.bias)
    values, ids = logits.topk(module.top_k, dim=1)
    return (ids, values.float().sigmoid().to(logits.dtype)), logits


@_for("llama4", "Llama4TextMoe")
def llama4(module: Any, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
    """Weights scale what goes into the experts."""
    hidden_states = hidden_states.reshape(-1, module.hidden_dim)
    (ids, weights), logits = module.router(hidden_states)
    bank = module.experts
    y = experts(
        hidden_states,
        ids,
        weights,
        bank.gate_up_proj,
        bank.down_proj,
        activation=glu(bank.act_fn),
        up_transposed=True,
        down_transposed=True,
        weight_on="input",
    )
    return module.shared_expert(hidden_states) + y, logits


@_for("jetmoe", "JetMoeTopKGating")
def jetmoe_router(module: Any, hidden_states: Tensor) -> tuple[Tensor, Tensor, None, None, Tensor]:
    """Ids and weights [T, k] in the place of an order sorted by expert; logits stay last."""
    logits = module.layer(hidden_states).float()
    values, ids = logits.topk(module.top_k, dim=1)
    return ids, values.softmax(dim=1).type_as(hidden_states), None, None, logits


@_for("jetmoe", "JetMoeMoE")
def jetmoe(module: Any, layer_input: Tensor) -> Tensor:
    """One bias after the sum of the experts."""
    x = layer_input.reshape(-1, layer_input.shape[-1])
    ids, weights, *_ = module.router(x)
    y = experts(
        x,
        ids,
        weights,
        module.input_linear.weight,
        module.output_linear.weight,
        activation=glu(module.activation),
    )
    return y.view(layer_input.shape) + module.bias


@_for("jetmoe", "JetMoeMoA.map")
def jetmoe_queries(module: Any, layer_input: Tensor) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
    """A query projection per expert: [B, S, k, N]. The routing goes on to the output projections."""
    x = layer_input.reshape(-1, layer_input.shape[-1])
    ids, weights, *_, logits = module.router(x)
    queries = grouped_linear(x, ids, module.input_linear.weight)
    return queries.view(*layer_input.shape[:-1], module.top_k, -1), logits, (ids, weights)


@_for("jetmoe", "JetMoeMoA.reduce")
def jetmoe_outputs(module: Any, layer_input: Tensor, topo_info: tuple[Tensor, Tensor]) -> Tensor:
    """An output projection per expert, weighed and added."""
    ids, weights = topo_info
    batch, length, k, width = layer_input.shape
    x = layer_input.reshape(-1, k, width)
    y = grouped_linear(x, ids, module.output_linear.weight, weights=weights)
    return y.view(batch, length, -1) + module.bias


@_for("switch_transformers", "SwitchTransformersTop1Router", since=(5, 23))
def switch_router(module: Any, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Ids and weights [T, 1] and logits. Each sequence counts its own tokens; those beyond the capacity are skipped."""
    bias = module.classifier.bias
    x = hidden_states.to(module.dtype).reshape(-1, hidden_states.shape[-1])
    logits = F.linear(x, module.classifier.weight.to(module.dtype), None if bias is None else bias.to(module.dtype))
    probs = logits.softmax(dim=-1, dtype=module.dtype).to(hidden_states.dtype)
    weights, ids = probs.topk(1, dim=-1)
    ids = capacity(ids, module.num_experts, module.expert_capacity, groups=hidden_states.shape[0])
    return ids, weights, logits.view(*hidden_states.shape[:-1], -1)


@_for("switch_transformers", "SwitchTransformersSparseMLP", since=(5, 23))
def switch(module: Any, hidden_states: Tensor) -> Tensor:
    """Experts are modules of their own."""
    ids, weights, _ = module.router(hidden_states)
    bank = list(module.experts.values())
    return experts(
        hidden_states,
        ids,
        weights,
        [expert.wi.weight for expert in bank],
        [expert.wo.weight for expert in bank],
        activation=bank[0].act,
    )


@_for("switch_transformers", "SwitchTransformersStack", since=(5, 23))
def switch_stack(module: Any, input_ids: Any = None, attention_mask: Any = None, **kwargs: Any) -> Any:
    """The encoder makes its mask of ones when it is not traced, and fails without one when it is."""
    if attention_mask is None and not module.is_decoder:
        given = kwargs["inputs_embeds"] if input_ids is None else input_ids
        attention_mask = torch.ones(given.shape[:2], device=given.device)
    return type(module).forward(module, input_ids, attention_mask, **kwargs)


@_for("ernie4_5_vl_moe", "Ernie4_5_VLMoeMoeBlock")
def ernie_vl(module: Any, hidden_states: Tensor, moe_mm_token_type_ids: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Text and vision tokens have a bank each: every token goes through both, and is skipped by one."""
    x = hidden_states.reshape(-1, hidden_states.shape[-1])
    text, vision = module.text_moe, module.vision_moe
    logits, weights, ids = text.gate(x)
    if moe_mm_token_type_ids is None:
        y = text.experts(x, ids, weights)
    else:
        if (given := moe_mm_token_type_ids.shape) != (tokens := hidden_states.shape[:-1]):
            raise ValueError(f"moe_mm_token_type_ids are {[*given]}, the tokens {[*tokens]}")
        seen = moe_mm_token_type_ids.bool().reshape(-1, 1)
        vision_logits, vision_weights, vision_ids = vision.gate(x)
        # Not by the banks' own forward: some implementations of it take no id that is to be skipped.
        y = experts_hook.forward(text.experts, x, torch.where(seen, text.num_experts, ids), weights)
        vision_ids = torch.where(seen, vision_ids, vision.num_experts)
        y = y + experts_hook.forward(vision.experts, x, vision_ids, vision_weights)
        logits = torch.where(seen, vision_logits, logits)
    y = y.view(hidden_states.shape)
    return (y if module.shared_experts is None else y + module.shared_experts(hidden_states)), logits


@_for("nllb_moe", "NllbMoeTop2Router")
def nllb_router(module: Any, hidden_states: Tensor, padding_mask: Tensor | None = None) -> tuple[Tensor, ...]:
    """Casts the classifier's weight for the call, and leaves the module's capacity as it was."""
    bias = module.classifier.bias
    weight = module.classifier.weight.to(module.dtype)
    logits = F.linear(hidden_states.to(module.dtype), weight, None if bias is None else bias.to(module.dtype))
    given = module.expert_capacity
    try:
        mask, probs = module.route_tokens(logits, hidden_states.dtype, padding_mask)
    finally:
        module.expert_capacity = given
    return mask, probs, logits


@_for(
    "nllb_moe",
    "NllbMoeExperts",
    "this version of transformers takes the router's mask of zeros and ones for expert ids: expert_0 and expert_1 are "
    "the only ones that it ever applies, to every token, and so they are compiled as dense layers",
)
def nllb(module: Any, hidden_states: Tensor, router_mask: Tensor, router_probs: Tensor) -> Tensor:
    """What one_hot(mask, E) makes of a mask [T, E]: expert 1 where it is set, expert 0 everywhere else."""
    y = torch.zeros_like(hidden_states)
    for i in range(2):
        share = torch.where(router_mask == i, router_probs, 0.0).sum(-1, keepdim=True)
        y = y + module[f"expert_{i}"](hidden_states) * share
    return y * (1 - module.moe_token_dropout)


@_for(
    "doge",
    "DogeCDMoE",
    "its two halves of router logits come from different tokens (view(2, tokens, -1)), so that a token's experts "
    "depend on the other tokens of the batch: there is no routing token by token to fuse, and the layer stays dense",
)
def doge(module: Any, hidden_states: Tensor, **_: Any) -> tuple[Tensor, Tensor]:
    """Product keys over experts of one row each, with sizes that do not fix the batch."""
    x, keys = hidden_states.reshape(-1, module.hidden_size), module.num_keys
    logits = module.router_gate(x).flatten().view(2, x.shape[0], keys)
    values, places = logits.topk(keys, dim=-1)
    sums = (values[0].unsqueeze(-1) + values[1].unsqueeze(-2)).flatten(1)
    pairs = (places[0].unsqueeze(-1) * keys + places[1].unsqueeze(-2)).flatten(1)
    scores, best = sums.topk(module.top_k, dim=-1)
    ids, weights = pairs.gather(-1, best), scores.softmax(-1)
    if module.norm_topk_prob:
        weights = weights / weights.sum(-1, keepdim=True)
    h = module.act_fn((module.down_embed(ids) @ x.unsqueeze(-1)).squeeze(-1)) * weights
    routed = (h.unsqueeze(1) @ module.up_embed(ids)).view(hidden_states.shape)
    shared = module.down_proj(module.act_fn(module.gate_proj(hidden_states)) * module.up_proj(hidden_states))
    return shared + routed, logits
