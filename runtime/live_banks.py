"""Packed banks for weights that a caller holds, not a program: eager experts, graphs with their weights as inputs.

A bank is packed when it is seen for the second time, so that one that lives for one call costs nothing. The packed
copy is dropped when the memory it was made of is released, moves or changes. A change is noticed by the tensor's
version counter, which `tensor.data` bypasses: after writing through `.data`, call `forget()`.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sparsec.runtime.packing import Bank, compute_dtype, should_pack


@dataclass
class _Entry:
    """A bank that was seen: its memory, its state then, and the packed copy from the second time on."""

    storages: tuple[weakref.ref[torch.UntypedStorage], ...]
    state: tuple[Any, ...]
    bank: Bank | None = None


_seen: dict[tuple[Any, ...], _Entry] = {}


def live_bank(weight: Tensor, bias: Tensor | None, dtype: torch.dtype, transposed: bool, interleaved: bool) -> Bank:
    """A bank as of `packing.Bank`, packed if these tensors were seen before and have not changed."""
    made = (dtype, transposed, interleaved)
    if not should_pack(weight, compute_dtype(dtype, weight.dtype)):
        return Bank(weight, bias, *made, pack=False)
    tensors = (weight,) if bias is None else (weight, bias)
    return remembered(tensors, made, lambda pack: Bank(weight, bias, *made, pack))


def remembered(tensors: Sequence[Tensor], kind: tuple[Any, ...], make: Callable[[bool], Bank]) -> Bank:
    """The bank that `make(pack)` makes of `tensors`: not packed the first time, then packed and kept."""
    if any(tensor.is_inference() for tensor in tensors):  # made in inference mode: no version counter
        return make(False)
    storages = [tensor.untyped_storage() for tensor in tensors]
    key = (*map(id, storages), *kind, *((t.storage_offset(), t.shape, t.stride()) for t in tensors))
    state = tuple((t.data_ptr(), t._version) for t in tensors)
    entry = _seen.get(key)
    if entry is None or entry.state != state:
        refs = tuple(weakref.ref(storage, lambda _: _seen.pop(key, None)) for storage in storages)
        _seen[key] = _Entry(refs, state)
        return make(False)
    if entry.bank is None:
        entry.bank = make(True)
    return entry.bank


def forget() -> None:
    """Drop every packed bank."""
    _seen.clear()
