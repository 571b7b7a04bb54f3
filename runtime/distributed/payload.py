"""How the rows of a dispatch travel. What comes back by a combine, and gradients, keep their own dtype."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

BLOCK = 128
"""Values of an fp8 row that share a scale, as in DeepSeek-V3's dispatch."""

FP8 = torch.float8_e4m3fn
LARGEST = torch.finfo(FP8).max


@dataclass(frozen=True)
class Payload:
    """`encode` makes of rows [T, H] what is sent; `decode` takes that, the dtype and H."""

    encode: Callable[[Tensor], Tensor]
    decode: Callable[[Tensor, torch.dtype, int], Tensor]


def _encode_fp8(x: Tensor) -> Tensor:
    """-> [T, blocks * 128 + blocks * 4] bytes: the values, and an f32 scale for every block."""
    blocks = -(-x.shape[1] // BLOCK)
    padded = torch.nn.functional.pad(x.float(), (0, blocks * BLOCK - x.shape[1])).view(len(x), blocks, BLOCK)
    scale = padded.abs().amax(2).clamp_min(1e-12) / LARGEST
    values = (padded / scale[:, :, None]).clamp(-LARGEST, LARGEST).to(FP8).view(torch.uint8)
    scale = scale.clone(memory_format=torch.contiguous_format)  # a view as bytes wants its strides, without rows too
    return torch.cat([values.flatten(1), scale.view(torch.uint8)], 1)


def _decode_fp8(sent: Tensor, dtype: torch.dtype, width: int) -> Tensor:
    blocks = -(-width // BLOCK)
    values = sent[:, : blocks * BLOCK].contiguous().view(FP8).float().view(len(sent), blocks, BLOCK)
    scale = sent[:, blocks * BLOCK :].contiguous().view(torch.float32)
    return (values * scale[:, :, None]).flatten(1)[:, :width].to(dtype)


PAYLOADS = {
    "model": Payload(lambda x: x, lambda sent, dtype, width: sent),
    "bf16": Payload(lambda x: x.bfloat16(), lambda sent, dtype, width: sent.to(dtype)),
    "fp8": Payload(_encode_fp8, _decode_fp8),
}
"""model: as they are; bf16; fp8: e4m3 with an f32 scale for every 128 values."""
