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
        paths: who runs the kernels that come as native code, and why, by the kernels' names.
    """

    device: torch.device
    files: Mapping[str, bytes]
    constant: Callable[[int], Operand]
    live: bool = False
    banks: dict[tuple[Any, ...], Bank] = field(default_factory=dict)
    trust_code: bool = False
    paths: dict[str, str] = field(default_factory=dict)
