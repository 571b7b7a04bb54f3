"""What the kernels of one program share, whoever runs them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import Tensor

from sparsec.runtime.packing import Bank

Operand: TypeAlias = Tensor | None
KernelCall: TypeAlias = Callable[[Sequence[Operand]], Sequence[Tensor]]
"""A kernel ready to run: its operands, in order, to its results."""

RegionCall: TypeAlias = Callable[[Sequence[Tensor]], list[Tensor]]
"""The region of a kernel: what it yields for its arguments."""


@dataclass(frozen=True)
class Choice:
    """Who runs a kernel that comes as native code.

    Args:
        isa: the instruction set of the library that runs; None where PyTorch operators run it instead.
        why: the reason for that; "" for native code.
    """

    isa: str | None
    why: str = ""

    def __str__(self) -> str:
        return f"PyTorch's oneDNN: {self.why}" if self.isa is None else f"native code for {self.isa}"


@dataclass
class Context:
    """What the kernels of one program share.

    Args:
        device: where they run.
        files: files of the artifact (kernel sources and binaries) by relative name.
        constant: gives the tensor behind a slot that never changes (None for other slots); loads it where it must.
        live: whether banks that are no constants are the caller's and are packed as of `live_banks`.
        banks: packed banks, by the slots they were made of, for every launch that reads the same.
        trust_code: whether native code that was not compiled by this user may run.
        paths: who runs the kernels that come as native code, by their names.
    """

    device: torch.device
    files: Mapping[str, bytes]
    constant: Callable[[int], Operand]
    live: bool = False
    banks: dict[tuple[Any, ...], Bank] = field(default_factory=dict)
    trust_code: bool = False
    paths: dict[str, Choice] = field(default_factory=dict)
