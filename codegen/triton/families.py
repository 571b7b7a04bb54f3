"""The families of kernels for the two GEMMs of an expert layer, and how a kernel is put together of them.

Every family of an op reads the same operands and leaves the same result, so that a kernel may run each range of token
counts by another one: a variant names its family as `kernel` (`tiles` where it names none). Row i of `h` belongs to
pair order[i] whatever the family.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol, TypeAlias

from sparsec.codegen.triton import combine, decode, experts, fp8, gathered, persistent, swap
from sparsec.codegen.triton.gemm import GroupedGemm, family_of
from sparsec.codegen.triton.launch import Entry, Schedule, Sketch, Wiring
from sparsec.codegen.triton.rounding import Behind, Rounding
from sparsec.codegen.triton.source import module_text
from sparsec.codegen.triton.tile import unsupported
from sparsec.dialects.moe import GatherGemm, GemmCombine
from sparsec.ir.core import Func


class Family(Protocol):
    """One way to compute a GEMM of an expert layer."""

    def functions(self) -> list[str]:
        """The texts of its @triton.jit functions, written once per kernel: those that families share, equal."""
        ...

    def launches(self, variant: Mapping[str, Any]) -> tuple[Entry, ...]:
        """How to run one of its variants. Raises: CompileError for tile sizes that it cannot take."""
        ...


Up: TypeAlias = Callable[[Func, GatherGemm, GroupedGemm, Wiring], Family]
Down: TypeAlias = Callable[[Func, GemmCombine, GroupedGemm, Wiring], Family]
"""Makes a family for an op. The GroupedGemm holds the family's variants only; the wiring is the family's own.

Raises: CompileError for an op that the family cannot compute.
"""

UP: Mapping[str, Up] = {
    "tiles": experts.Tiles,
    **swap.UP,
    "gathered": gathered.Gathered,
    "rows": decode.Up,
    "fp8": fp8.up,
}
DOWN: Mapping[str, Down] = {
    "tiles": combine.Tiles,
    **swap.DOWN,
    "persistent": persistent.Persistent,
    "rows": decode.Down,
    "fp8": fp8.down,
}
"""The families of `moe.gather_gemm` and of `moe.gemm_combine` by name."""


PACKED = {"tiles", "rows", "swap", "fp8"}
"""The families that read packed weights: with rows that are rounded to fp8 too, which all but `fp8` read as rows."""


def gemm_sketch(func: Func, op: GatherGemm | GemmCombine) -> Sketch:
    """Text and launches of a GEMM of an expert layer, by the families that its variants name.

    Raises: CompileError for what no kernel can hold, for a family that is not there or cannot compute this op.
    """
    gemm = GroupedGemm(func, op)
    if gemm.packing != "plain" and (others := {*map(family_of, gemm.variants)} - PACKED):
        raise unsupported(op, f"the family '{min(others)}' reads plain weights, these are {gemm.packing}")
    made = dict[str, tuple[Family, Wiring]]()
    for name in dict.fromkeys(map(family_of, gemm.variants)):
        wiring, own = Wiring(op), GroupedGemm(func, op, name)
        match op:
            case GatherGemm() if name in UP:
                made[name] = UP[name](func, op, own, wiring), wiring
            case GemmCombine() if name in DOWN:
                made[name] = DOWN[name](func, op, own, wiring), wiring
            case _:
                there = ", ".join(UP if isinstance(op, GatherGemm) else DOWN)
                raise unsupported(op, f"there is no family of kernels '{name}' (there are: {there})")
        if op.activations != "model" and name != "fp8":
            made[name] = Behind(Rounding(func, own, wiring), made[name][0]), wiring
    texts = dict.fromkeys(text for family, _ in made.values() for text in family.functions())
    summary = experts.up_summary(op) if isinstance(op, GatherGemm) else combine.down_summary(op)
    source = module_text(func, op, summary, gemm.constants(), list(texts))
    schedules = list[Schedule]()
    for variant in gemm.variants:
        family, wiring = made[family_of(variant)]
        schedules.append(
            Schedule(variant.get("up_to"), family.launches(variant), tuple(wiring.scratch), tuple(wiring.state))
        )
    return Sketch(source, tuple(schedules))
