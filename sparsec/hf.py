"""Importing this module makes `model.set_experts_implementation("sparsec")` work for transformers' MoE models.

In eager mode the experts then run by the runtime's kernels: on a CPU each bank is packed when it is first used again.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from sparsec.codegen.emit import region as steps_of
from sparsec.frontend.experts_hook import NAME, register
from sparsec.frontend.experts_op import set_experts_kernel
from sparsec.frontend.region import decode
from sparsec.runtime.backends import region_of
from sparsec.runtime.cpu_kernels import Activation
from sparsec.runtime.experts import run_experts


@lru_cache(256)
def _function(text: str, device: torch.device) -> Activation:
    """A region, as `sparsec::experts` takes it, as a function of the list of its arguments."""
    made = steps_of(decode(text))
    run = region_of(made["body"], made["body_params"], made["body_outs"], device)
    return lambda args: run(args)[0]


def run(
    x: Tensor,
    ids: Tensor,
    weights: Tensor,
    up: Tensor,
    down: Tensor,
    up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    tail_params: Sequence[Tensor] | None = None,
    *,
    activation: str,
    tail: str = "",
    **layout: Any,
) -> Tensor:
    """`sparsec::experts` by the runtime's kernels; arguments are the operator's."""
    end = _function(tail, x.device) if tail else None
    finish = None if end is None else lambda rows: end([rows, *(tail_params or ())])
    function = _function(activation, x.device)
    return run_experts(x, ids, weights, up, down, up_bias, down_bias, function, tail=finish, **layout)


register()
set_experts_kernel(run)

__all__ = ["NAME", "run"]
