"""An expert layer outside of a compiled program: the CPU kernels for whoever holds plain tensors."""

from __future__ import annotations

import torch
from torch import Tensor

from sparsec.runtime import cpu_kernels
from sparsec.runtime.cpu_kernels import Activation, Tail
from sparsec.runtime.live_banks import live_bank


def run_experts(
    x: Tensor,
    ids: Tensor,
    weights: Tensor,
    up: Tensor,
    down: Tensor,
    up_bias: Tensor | None,
    down_bias: Tensor | None,
    activation: Activation,
    layout: str = "concat",
    up_transposed: bool = False,
    down_transposed: bool = False,
    weight_on: str = "output",
    tail: Tail | None = None,
) -> Tensor:
    """What `moe.experts` computes, on any device; on a CPU with banks packed as of `live_banks`.

    Args:
        x: [T, H].
        ids: [T, k], integer; an id outside 0..E-1 is skipped.
        weights: [T, k], float.
        up: [E, P * I, H] ([E, H, P * I] if `up_transposed`), P = 1 if `layout` is "single", else 2.
        down: [E, H, I] ([E, I, H] if `down_transposed`).
        up_bias, down_bias: [E, P * I], [E, H] or None.
        activation: takes the list of P parts, each [n, I], and returns [n, I].
        layout: "concat", "interleaved" or "single", as of `moe.experts`.
        weight_on: "output", or "input" to multiply x instead of the results.
        tail: takes whole rows [n, H] of what an expert yields and returns those that are added.

    Returns: [T, H], dtype of `x`.
    """
    with torch.no_grad():
        up_bank = live_bank(up, up_bias, x.dtype, up_transposed, layout == "interleaved")
        down_bank = live_bank(down, down_bias, x.dtype, down_transposed, False)
        order, offsets = cpu_kernels.group(ids, up_bank.experts)
        parts = 1 if layout == "single" else 2
        batched = cpu_kernels.is_few(order.shape[0], x, up_bank, parts)
        late = weight_on == "output"
        early = None if late else weights
        return cpu_kernels.experts(
            x, order, offsets, weights, up_bank, down_bank, activation, parts, batched, early, late, tail
        )
