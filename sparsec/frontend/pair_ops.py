"""`sparsec::grouped_linear` and `sparsec::capacity`: operators over (token, slot) pairs, as graphs carry them.

They compute what `moe.grouped_linear` and `moe.capacity` say, and become these ops at capture.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sparsec.dialects.moe import capacity_reference, gemm_combine_reference, group_reference
from sparsec.frontend.experts_op import fits


@torch.library.custom_op(
    "sparsec::grouped_linear",
    mutates_args=(),
    schema="(Tensor x, Tensor ids, Tensor w, Tensor? bias=None, Tensor? weights=None, *, bool transposed=False)"
    " -> Tensor",
)
def grouped_linear(
    x: Tensor,
    ids: Tensor,
    w: Tensor,
    bias: Tensor | None = None,
    weights: Tensor | None = None,
    *,
    transposed: bool = False,
) -> Tensor:
    (tokens, k), columns = ids.shape, w.shape[2 if transposed else 1]
    order, offsets = group_reference(ids, w.shape[0])
    pairs = order.long()
    rows = x.reshape(tokens * k, -1)[pairs] if x.dim() == 3 else x[pairs // k]
    if weights is not None:
        return gemm_combine_reference(rows, order, offsets, weights, w, bias, transposed, x.dtype)
    alone = ids.new_ones(tokens * k, 1)
    y = gemm_combine_reference(rows, order, offsets, alone, w, bias, transposed, x.dtype)
    return y.reshape(tokens, k, columns)


@grouped_linear.register_fake
def _fake_grouped_linear(
    x: Tensor, ids: Tensor, w: Tensor, bias: Any = None, weights: Any = None, *, transposed: bool = False
) -> Tensor:
    fits(x, ids, w.shape[1 if transposed else 2], weights)
    columns = w.shape[2 if transposed else 1]
    return x.new_empty(*(ids.shape if weights is None else ids.shape[:1]), columns)


@torch.library.custom_op(
    "sparsec::capacity",
    mutates_args=(),
    schema='(Tensor ids, int num_experts, SymInt capacity, *, str order="slot", SymInt groups=1) -> Tensor',
)
def capacity(ids: Tensor, num_experts: int, capacity: int, *, order: str = "slot", groups: int = 1) -> Tensor:
    return capacity_reference(ids, num_experts, capacity, order == "slot", groups).clone()


@capacity.register_fake
def _fake_capacity(ids: Tensor, num_experts: int, capacity: Any, **kwargs: Any) -> Tensor:
    return torch.empty_like(ids)


GROUPED_LINEAR = torch.ops.sparsec.grouped_linear.default
CAPACITY = torch.ops.sparsec.capacity.default
