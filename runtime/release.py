"""Gives back the memory of weights that a packed copy has replaced, without taking their tensors away.

A tensor whose storage is resized to nothing makes PyTorch's CPU operators crash, and one of another device or size
would have `torch.compile` start again. So the pages of a released tensor are replaced by pages of NaNs that all of them
share: whatever is computed of it is NaN, and no memory is held.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import sys
import weakref
from collections.abc import Iterable
from functools import cache
from typing import Any

import torch
from torch import Tensor

SHARED = 1 << 24
"""Bytes of NaNs that all released tensors share."""

SMALLEST = 1 << 18
"""Bytes of a tensor from which on it is released."""

_MAP_FIXED = 0x10
_released: dict[int, weakref.ref[torch.UntypedStorage]] = {}


def release(tensor: Tensor) -> int:
    """Give back the memory of a CPU tensor's storage; its values become NaN. Not for storage that others still read.

    Returns: the bytes given back; 0 where it has too few for that to pay, is on another device or shared, or the
    system is not Linux.
    """
    storage = tensor.untyped_storage()
    small = storage.nbytes() < SMALLEST or not tensor.is_floating_point()
    if sys.platform != "linux" or small or storage.device.type != "cpu" or storage.is_shared() or is_released(tensor):
        return 0
    start = -(-storage.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    end = (storage.data_ptr() + storage.nbytes()) // mmap.PAGESIZE * mmap.PAGESIZE
    access, flags = mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_PRIVATE | _MAP_FIXED
    given = 0
    for at in range(start, end, SHARED):
        size = min(SHARED, end - at)
        if _map()(at, size, access, flags, _nans(), 0) != at:
            break  # the system has no more mappings to give: what is left keeps its memory
        given += size
    if given:
        key = id(storage)
        _released[key] = weakref.ref(storage, lambda _: _released.pop(key, None))
    return given


def is_released(tensor: Tensor) -> bool:
    """Whether the values of a tensor are gone."""
    storage = tensor.untyped_storage()
    known = _released.get(id(storage))
    return known is not None and known() is storage


def require(parts: Iterable[Tensor]) -> None:
    """Raises: RuntimeError if the values of a tensor are gone."""
    if any(is_released(part) for part in parts):
        raise RuntimeError(
            "a weight is needed whose memory was given back once it was packed (free_weights=True), or which was "
            "changed since: load the model again and compile it without free_weights"
        )


@cache
def _nans() -> int:
    """A file in memory, all bits set: NaN in every float format."""
    file = os.memfd_create("sparsec-nan", os.MFD_CLOEXEC)
    os.write(file, b"\xff" * SHARED)
    return file


@cache
def _map() -> Any:
    """The system's mmap."""
    function = ctypes.CDLL(None).mmap
    function.restype = ctypes.c_void_p
    function.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
    return function
