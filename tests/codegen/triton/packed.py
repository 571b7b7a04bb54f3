"""Kernel functions whose banks are packed, made of those that `build` makes."""

from __future__ import annotations

from typing import Any

import torch

from sparsec.dialects.moe import packed_type, scale_type
from sparsec.ir.core import Func
from sparsec.ir.types import DType
from sparsec.runtime import blocks


def packed(func: Func, packing: str, activations: str = "model") -> Func:
    """A kernel function on a plain bank [E, N, K] as one on a packed bank, with its scales as a further parameter."""
    old: Any = func.body.ops[0]
    name = "up" if old.name == "moe.gather_gemm" else "down"
    bank: Any = getattr(old, name)
    experts, columns, inner = (int(str(size)) for size in bank.tensor.shape)
    bank.type = packed_type(packing, 1, experts, columns, inner, DType.f32)
    scales = scale_type(packing, 1, experts, columns, inner)
    assert scales is not None
    scale = func.body.add_arg(scales, f"{name}_scale")
    places, arguments = list(old.fields().operands), list(old.arguments)
    at = places.index(f"{name}_scale")
    arguments += [None] * (at + 1 - len(arguments))
    arguments[at] = scale
    attrs = {key: value for key, value in old.attrs.items() if key != f"{name}_transposed"}
    regions = list(old.regions)
    old.regions = ()
    new = type(old)(arguments, None, {**attrs, "packing": packing, "activations": activations}, regions)
    func.body.insert_before(old, new)
    for result, other in zip(old.results, new.results, strict=True):
        result.replace_by(other)
    old.erase()
    return func


def quantised(bank: torch.Tensor, packing: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A bank [E, N, K] packed, its scales, and what they stand for in f32."""
    scales = blocks.find_scales(bank, False, packing)
    made = blocks.pack(bank, scales, False, packing)
    return made, scales, blocks.unpack(made, scales, packing, bank.shape[2])
