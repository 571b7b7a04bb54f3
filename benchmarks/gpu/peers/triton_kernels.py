"""OpenAI's triton_kernels: two `matmul_ogs`, gather and activation in the first, weights and scatter in the second."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.engines import Engine, Setting, without_gradients
from benchmarks.gpu.peers import folder_of


def engine(setting: Setting) -> Engine:
    """Gate and up are interleaved once, as it wants them; its weights are a second copy of that bank."""
    folder_of(setting, "triton_kernels")
    from benchmarks.gpu.peers.kernels import silu_pairs

    calls: Any
    routing: Any
    topk: Any
    calls, routing, topk = (import_module(f"triton_kernels.{name}") for name in ("matmul_ogs", "routing", "topk"))
    experts, k = setting.shape.experts, setting.shape.k
    gate, up = setting.module.gate_up_proj.detach().chunk(2, 1)
    # [E, 2I, H], rows gate, up, gate, ...; the products want [E, H, 2I].
    first = torch.stack((gate, up), 2).flatten(1, 2).transpose(1, 2)
    second = setting.module.down_proj.detach().transpose(1, 2)
    activation = calls.FusedActivation(calls.FnSpecs("silu_pairs", silu_pairs, ()), (), 2)

    def run(x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        # Only its top-k makes the bit matrix that its sort reads: with the experts given, it just looks values up.
        logits = x.new_empty(len(x), experts)
        _, _, bits = topk.topk(logits, k, apply_softmax=False, y_indx=ids)
        plan, gather, scatter = routing.routing_from_bitmatrix(bits, weights, ids, experts, k)
        config = calls.PrecisionConfig()
        h = calls.matmul_ogs(x, first, None, plan, gather, precision_config=config, fused_activation=activation)
        return calls.matmul_ogs(
            h, second, None, plan, scatter_indx=scatter, precision_config=config, gammas=plan.gate_scal
        )

    return Engine(
        without_gradients(run),
        lambda tokens: "matmul_ogs",
        prepare=lambda case: (case.x, case.ids.int(), case.weights),
    )
