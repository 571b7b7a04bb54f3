"""The numbers of a model that a simulation needs."""

from __future__ import annotations

from dataclasses import dataclass

from sparsec.diagnostics import SparsecError

BYTES = {"fp8": 1, "bf16": 2, "f16": 2, "f32": 4}
"""Of one weight, by the name of its type."""

MATRICES = 3
"""Of one expert: gate, up and down."""


@dataclass(frozen=True)
class MoE:
    """A model's expert layers, all alike.

    Args:
        hidden: width of a token.
        intermediate: width of an expert.
        experts, k: per layer, and how many of them a token uses.
        layers: with experts.
        dtype: of the weights: a key of `BYTES`. Activations between ranks have 2 bytes, or 4 for f32.
        shared: experts, in size, that every token goes to.
        groups, top_groups: experts are chosen from the best `top_groups` of so many equal groups.
        rest: parameters of a layer beside its experts: attention, norms.
        memory: bytes that attention reads for one token of context, in one layer.
        attention: flops for a token and one token of its context, in one layer.
    """

    hidden: int
    intermediate: int
    experts: int
    k: int
    layers: int
    dtype: str = "bf16"
    shared: float = 0.0
    groups: int = 1
    top_groups: int = 1
    rest: int = 0
    memory: float = 0.0
    attention: float = 0.0

    def __post_init__(self) -> None:
        if self.dtype not in BYTES:
            raise SparsecError(f"there is no dtype '{self.dtype}' of experts\n  hint: {', '.join(BYTES)}")
        if not 0 < self.k <= self.experts:
            raise SparsecError(f"a token cannot use {self.k} of {self.experts} experts")
        if self.experts % self.groups or not 0 < self.top_groups <= self.groups:
            raise SparsecError(f"{self.experts} experts in {self.groups} groups, of which {self.top_groups} are chosen")
        if self.k > self.experts // self.groups * self.top_groups:
            raise SparsecError(f"{self.top_groups} groups of {self.experts // self.groups} experts hold no {self.k}")

    @property
    def expert_parameters(self) -> int:
        """Of one expert."""
        return MATRICES * self.hidden * self.intermediate

    @property
    def weight(self) -> int:
        """Bytes of one weight."""
        return BYTES[self.dtype]

    @property
    def row(self) -> int:
        """Bytes of one token between layers."""
        return self.hidden * max(2, self.weight)
