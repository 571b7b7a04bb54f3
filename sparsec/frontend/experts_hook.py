"""transformers' experts interface: under the name `sparsec`, every bank of experts is one `sparsec::experts`."""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from sparsec.diagnostics import CompileError
from sparsec.frontend import locations, region
from sparsec.frontend.functional import kinds_of, module_of, tail_region, tensors_of

NAME = "sparsec"

Regions = tuple[str, str, str]
"""Layout of the up-projection, activation, and what follows each expert ("" for nothing)."""

_traced: WeakKeyDictionary[nn.Module, dict[torch.dtype, Regions]] = WeakKeyDictionary()


def register() -> None:
    """Make `model.set_experts_implementation("sparsec")` valid. Doing it again changes nothing."""
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    ALL_EXPERTS_FUNCTIONS.register(NAME, forward)


def forward(self: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """A bank's forward: x [T, H], ids and weights [T, k] -> [T, H], dtype of x. `self` is the module of the bank."""
    bank: Any = self
    layout, activation, tail = _regions_by_id(id(self), hidden_states.dtype)
    gated, bias = bank.has_gate, bank.has_bias
    return torch.ops.sparsec.experts(
        hidden_states,
        top_k_index,
        top_k_weights,
        bank.gate_up_proj if gated else bank.up_proj,
        bank.down_proj,
        (bank.gate_up_proj_bias if gated else bank.up_proj_bias) if bias else None,
        bank.down_proj_bias if bias else None,
        activation=activation,
        layout=layout,
        up_transposed=bank.is_transposed,
        down_transposed=bank.is_transposed,
        tail=tail,
        tail_params=tensors_of(bank.post_expert_norm) if tail else (),
    )


@torch._dynamo.assume_constant_result
def _regions_by_id(bank: int, dtype: torch.dtype) -> Regions:
    """`regions_of` the module with this id: on older versions of torch a module is no constant of a traced graph."""
    return regions_of(module_of(bank), dtype)


def regions_of(bank: nn.Module, dtype: torch.dtype) -> Regions:
    """What a bank's own code does around its two projections, recorded once per module and dtype.

    Raises: CompileError for a bank that `sparsec::experts` cannot express.
    """
    known = _traced.setdefault(bank, {})
    if dtype not in known:
        known[dtype] = _record(bank, dtype)
    return known[dtype]


def _record(bank: Any, dtype: torch.dtype) -> Regions:
    cls = type(bank)
    width, columns = bank.down_proj.shape[1:] if bank.is_transposed else reversed(bank.down_proj.shape[1:])
    fn = bank._apply_gate if bank.has_gate else bank.act_fn
    try:
        layout, activation = region.record(fn, width, bank.has_gate, dtype)
    except region.UnsupportedActivation as error:
        raise CompileError(
            f"the activation of {cls.__name__} is not pointwise over the rows of an expert: {error}",
            locations.of_class(cls),
            hint="write it as a function of the gate half and the up half, e.g. silu(gate) * up",
        ) from error
    if not getattr(bank, "has_post_expert_norm", False):
        return layout, activation, ""
    norm = bank.post_expert_norm
    return layout, activation, tail_region(columns, dtype, norm, *kinds_of(tensors_of(norm)))
