"""The choice between ways of computing an expert GEMM: which there are, how they compare, and what ranges share one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import product

from sparsec.diagnostics import CompileError
from sparsec.ir.types import DType
from sparsec.passes.chips import Chip
from sparsec.passes.roofline import Family, Gemm, Prediction, Variant, predict

FAMILIES: tuple[Family, ...] = ("tiles",)
"""The families of kernels that there are, as of `codegen/triton/families.py`."""

BUCKETS = tuple(1 << i for i in range(16))
"""Upper ends of the ranges of token counts that are told apart; the last one stands for all larger numbers."""

SLACK = 1.005
"""How much longer than the fastest a variant may take where it spares another binary."""


@dataclass(frozen=True)
class Candidate:
    """A variant and what it is expected to do."""

    variant: Variant
    made: Prediction


def obstacle(kernel: Family, gemm: Gemm, on: Chip) -> str:
    """Why a family of kernels cannot compute a GEMM on a chip; "" if it can."""
    if kernel not in FAMILIES:
        return "there is no such family of kernels"
    return ""


def candidates(gemm: Gemm, on: Chip) -> Iterator[Variant]:
    """The variants that are tried: of each family that can compute the GEMM on the chip."""
    for kernel in FAMILIES:
        if not obstacle(kernel, gemm, on):
            yield from _tiles(gemm, on)


def _tiles(gemm: Gemm, on: Chip) -> Iterator[Variant]:
    shallow = gemm.packing == "plain" and (on.lanes == 64 or gemm.dtype is DType.f32)
    depths = (32, 64, 128) if shallow else (64, 128)
    stages = (2, 3) if on.lanes == 64 else (3, 4, 5)  # there, no asynchronous copies to keep under way
    for m, n, k, warps, deep in product((16, 32, 64, 128), (32, 64, 128, 256), depths, (4, 8), stages):
        yield Variant("tiles", m, n, k, warps, deep)


@cache
def ranked(gemm: Gemm, tokens: int, on: Chip) -> tuple[Candidate, ...]:
    """All variants that fit the chip, the fastest for `tokens` tokens first; of equals that of least memory.

    Raises: CompileError if none fits.
    """
    made = [(variant, predict(gemm, variant, tokens, on)) for variant in candidates(gemm, on)]
    found = [Candidate(variant, prediction) for variant, prediction in made if prediction is not None]
    if not found:
        raise CompileError(f"no tile of {gemm} fits {on.name}")
    return tuple(sorted(found, key=lambda c: (c.made.us, c.variant.block_m, c.variant.shared(gemm))))


def best(gemm: Gemm, tokens: int, on: Chip) -> Candidate:
    """The fastest variant for `tokens` tokens. Raises: CompileError if none fits."""
    return ranked(gemm, tokens, on)[0]


def by_family(gemm: Gemm, tokens: int, on: Chip) -> tuple[Candidate, ...]:
    """The fastest variant of each family, the fastest family first."""
    found = dict[Family, Candidate]()
    for candidate in ranked(gemm, tokens, on):
        found.setdefault(candidate.variant.kernel, candidate)
    return tuple(found.values())


@dataclass(frozen=True)
class Range:
    """The variant for up to `up_to` tokens (None: any number), with what it is expected to do at the upper end."""

    up_to: int | None
    chosen: Candidate


@cache
def ranges(gemm: Gemm, on: Chip, buckets: Sequence[int] = BUCKETS) -> tuple[Range, ...]:
    """The variants by ascending token count: as few as stay within SLACK of the fastest in each bucket."""
    found = list[Range]()
    good, first = set[Variant](), 0
    for i, tokens in enumerate((*buckets, 0)):
        here = _near(gemm, tokens, on) if tokens else set[Variant]()
        if i and not good & here:
            found.append(_settled(gemm, on, buckets[first:i], good))
            good, first = here, i
        else:
            good = good & here if i else here
    last = found[-1]
    return (*found[:-1], Range(None, last.chosen))


def _near(gemm: Gemm, tokens: int, on: Chip) -> set[Variant]:
    """The variants within SLACK of the fastest."""
    order = ranked(gemm, tokens, on)
    return {c.variant for c in order if c.made.us <= order[0].made.us * SLACK}


def _settled(gemm: Gemm, on: Chip, buckets: Sequence[int], good: set[Variant]) -> Range:
    """A range over some buckets by the best of the variants that are good in all of them."""
    cost = dict.fromkeys(good, 0.0)
    at = dict[Variant, Candidate]()
    for tokens in buckets:
        order = ranked(gemm, tokens, on)
        for candidate in order:
            if candidate.variant in cost:
                cost[candidate.variant] += candidate.made.us / order[0].made.us
                at[candidate.variant] = candidate
    variant = min(good, key=lambda v: (round(cost[v], 6), v.block_m, v.shared(gemm), v.num_warps, str(v)))
    return Range(buckets[-1], at[variant])
