"""ScatterMoE: two `parallel_linear` and the activation between them, as its GLU layer writes it."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.gpu.engines import Engine, Setting, trained, without_gradients
from benchmarks.gpu.peers import folder_of


def engine(setting: Setting) -> Engine:
    folder_of(setting, "scattermoe")
    layer: Any = import_module("scattermoe.parallel_experts")
    linear, sort = layer.parallel_linear, layer.flatten_sort_count
    _, banks = trained(setting.module, "eager")
    experts, k = setting.shape.experts, setting.shape.k

    def run(x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        with torch.no_grad():
            plan = sort(ids, experts)
        up, down = (bank.transpose(1, 2) for bank in banks)
        gate, value = linear(x, up, k, *plan, grouped_out=True).chunk(2, -1)
        return linear(F.silu(gate) * value, down, 1, *plan, gates=weights, grouped_in=True)

    # torch.bincount waits for the GPU.
    return Engine(without_gradients(run), lambda tokens: "parallel_linear", run, banks=banks, graph=False)
