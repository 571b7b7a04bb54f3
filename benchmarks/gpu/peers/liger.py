"""Liger's fused MoE: LigerFusedMoEFunction."""

from __future__ import annotations

import os
from importlib import import_module
from typing import Any

from torch import Tensor

from benchmarks.gpu.engines import Engine, Setting, narrow, trained, without_gradients
from benchmarks.gpu.peers import folder_of

AUTOTUNE = "LIGER_FUSED_MOE_AUTOTUNE"


def engine(setting: Setting) -> Engine:
    """Its autotuner compiles a hundred kernels for each shape; it is off unless the environment turns it on."""
    folder_of(setting, "liger_kernel")
    tuned = os.environ.setdefault(AUTOTUNE, "0") not in ("0", "false", "no")
    function: Any = import_module("liger_kernel.ops.fused_moe").LigerFusedMoEFunction
    _, banks = trained(setting.module, "eager")

    def run(x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        return function.apply(x, *banks, ids, weights)

    path = "autotuned" if tuned else "autotuner off"
    # It asks the GPU for a number of tiles in the middle, which no graph can hold.
    return Engine(without_gradients(run), lambda tokens: path, run, banks=banks, prepare=narrow, graph=False)
