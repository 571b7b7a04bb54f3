"""An expert layer outside of a compiled program: the CPU kernels for whoever holds plain tensors.

Weights are packed when the same bank is seen for the second time, so that a bank that lives for one call costs
nothing. Packed copies are dropped when the tensor they were made of dies, moves or changes. A change is noticed by
the tensor's version counter, which `tensor.data` bypasses: after writing through `.data`, call `forget()`.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sparsec.runtime import cpu_kernels
from sparsec.runtime.cpu_kernels import Activation
from sparsec.runtime.packing import Bank, can_pack, compute_dtype


@dataclass
class _Entry:
    """A bank that was seen: the tensors it is made of, their state then, and the packed copy from the second time."""

    tensors: tuple[weakref.ref[Tensor], ...]
    state: tuple[Any, ...]
    bank: Bank | None = None

    def holds(self, tensors: tuple[Tensor, ...]) -> bool:
        return all(ref() is tensor for ref, tensor in zip(self.tensors, tensors, strict=True))


_seen: dict[tuple[Any, ...], _Entry] = {}


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
) -> Tensor:
    """What `moe.experts` computes, on any device; fast on a CPU.

    Args:
        x: [T, H].
        ids: [T, k], integer; an id outside 0..E-1 is skipped.
        weights: [T, k], float.
        up: [E, P * I, H] ([E, H, P * I] if `up_transposed`), P = 1 if `layout` is "single", else 2.
        down: [E, H, I] ([E, I, H] if `down_transposed`).
        up_bias, down_bias: [E, P * I], [E, H] or None.
        activation: takes the list of P parts, each [n, I], and returns [n, I].
        layout: "concat", "interleaved" or "single", as of `moe.experts`.

    Returns: [T, H], dtype of `x`.
    """
    with torch.no_grad():
        up_bank = _bank(up, up_bias, x.dtype, up_transposed, layout == "interleaved")
        down_bank = _bank(down, down_bias, x.dtype, down_transposed, False)
        order, offsets = cpu_kernels.group(ids, up_bank.experts)
        parts = 1 if layout == "single" else 2
        batched = order.shape[0] <= cpu_kernels.BATCHED_ROWS
        return cpu_kernels.experts(x, order, offsets, weights, up_bank, down_bank, activation, parts, batched)


def forget() -> None:
    """Drop every packed bank."""
    _seen.clear()


def _bank(weight: Tensor, bias: Tensor | None, dtype: torch.dtype, transposed: bool, interleaved: bool) -> Bank:
    made = (dtype, transposed, interleaved)
    tensors = (weight,) if bias is None else (weight, bias)
    if weight.device.type != "cpu" or any(t.is_inference() for t in tensors) or not _worth_packing(weight, dtype):
        return Bank(weight, bias, *made, pack=False)
    key = (*(id(tensor) for tensor in tensors), *made)
    state = tuple((t.data_ptr(), t._version, t.shape, t.stride()) for t in tensors)
    entry = _seen.get(key)
    if (
        entry is None
        or entry.state != state
        or any(ref() is not t for ref, t in zip(entry.tensors, tensors, strict=True))
    ):
        _seen[key] = _Entry(tuple(weakref.ref(tensor, lambda _: _seen.pop(key, None)) for tensor in tensors), state)
        return Bank(weight, bias, *made, pack=False)
    if entry.bank is None:
        entry.bank = Bank(weight, bias, *made)
    return entry.bank


def _worth_packing(weight: Tensor, dtype: torch.dtype) -> bool:
    return weight.numel() > 0 and can_pack(compute_dtype(dtype, weight.dtype))
