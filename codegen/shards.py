"""Writes tensors into a safetensors file, at places from which kernels can read them as they lie.

The library's own writer copies all tensors of a file first and begins them on 8-byte boundaries; here a file takes no
memory beside its tensors, is hashed on the way, and what has a multiple of 64 bytes begins on a cache line.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from sparsec.runtime.dtypes import NAMES, SAFETENSORS

ALIGNMENT = 64
_PIECE = 1 << 24


def write_shard(place: Path, tensors: Mapping[str, Tensor]) -> tuple[int, str]:
    """Write a safetensors file. Returns: its size in bytes, and its SHA-256 in hexadecimal."""
    # Tensors of a file lie without gaps: those of whole cache lines come first, then others, wide elements first.
    order = sorted(tensors, key=lambda name: (_size(tensors[name]) % ALIGNMENT > 0, -tensors[name].itemsize))
    header, end = dict[str, object](), 0
    for name in order:
        tensor, start = tensors[name], end
        end += _size(tensor)
        dtype = SAFETENSORS[NAMES[tensor.dtype]]
        header[name] = {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    digest = hashlib.sha256()
    with place.open("wb", buffering=0) as file:
        head = memoryview(len(text).to_bytes(8, "little") + text)
        for content in (head, *map(_bytes_of, map(tensors.__getitem__, order))):
            for at in range(0, len(content), _PIECE):
                piece = content[at : at + _PIECE]
                digest.update(piece)
                while piece:
                    piece = piece[file.write(piece) :]
    return 8 + len(text) + end, digest.hexdigest()


def _size(tensor: Tensor) -> int:
    return tensor.numel() * tensor.itemsize


def _bytes_of(tensor: Tensor) -> memoryview:
    plain = tensor.detach().to("cpu").contiguous().reshape(-1)
    return plain.view(torch.uint8).numpy().data
