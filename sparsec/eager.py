"""Experts in eager mode and under torch.compile: by sparsec's operators, which the runtime's kernels carry out.

On a CPU each bank is packed when it is first used again.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from sparsec.codegen.emit import region
from sparsec.frontend.adapters import registry as adapters
from sparsec.frontend.capture import EXPERTS, configs_of
from sparsec.frontend.experts_op import set_experts_kernel
from sparsec.frontend.region import decode
from sparsec.runtime.backends import region_call
from sparsec.runtime.cpu_kernels import Activation
from sparsec.runtime.experts import run_experts


@lru_cache(256)
def _function(text: str, device: torch.device) -> Activation:
    """A region, as `sparsec::experts` takes it, as a function of the list of its arguments."""
    run = region_call(region(decode(text)), device)
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


def use_experts(model: nn.Module) -> Used:
    """Run the experts of `model` as sparsec's operators: banks of transformers' experts interface, and every module
    whose class is registered (`sparsec.register_experts`).

    From then on the model runs so in eager mode, and can go through `torch.compile(model, backend="sparsec")`, also
    where its own code could not be traced. No other model and no parameter is changed.

        sparsec.use_experts(model)  # until .restore() is called on what it returns
        with sparsec.use_experts(model): ...
    """
    configs = [config for config in configs_of(model) if EXPERTS in vars(config)]
    if configs:
        from sparsec.frontend import experts_hook

        experts_hook.register()
    used = Used(adapters.install(model), [(config, vars(config)[EXPERTS]) for config in configs])
    for config in configs:
        setattr(config, EXPERTS, "sparsec")
    return used


class Used:
    """What `use_experts` changed. As a context manager it restores that at the end."""

    def __init__(self, methods: list[tuple[nn.Module, str]], implementations: list[tuple[Any, Any]]) -> None:
        self._methods, self._implementations = methods, implementations

    def restore(self) -> None:
        """Let the model run its experts as before. Doing it again changes nothing."""
        adapters.remove(self._methods)
        for config, implementation in self._implementations:
            setattr(config, EXPERTS, implementation)
        self._methods, self._implementations = [], []

    def __enter__(self) -> Used:
        return self

    def __exit__(self, *exception: object) -> None:
        self.restore()


set_experts_kernel(run)
