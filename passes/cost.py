"""The choice between ways of computing an expert GEMM: which there are, how they compare, and what ranges share one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from itertools import product
from math import inf
from typing import Any, TypeAlias

from sparsec.diagnostics import CompileError
from sparsec.ir.types import DType
from sparsec.passes.chips import CHIPS, Chip
from sparsec.passes.roofline import Prediction, predict
from sparsec.passes.variants import DIVIDED, Family, Gemm, Variant

FAMILIES: tuple[Family, ...] = ("tiles", "tma", "swap", "persistent", "gathered", "rows", "fp8")
"""The families of kernels that there are, as of `codegen/triton/families.py`."""

BUCKETS = tuple(sorted({1 << i for i in range(16)} | {3 << i for i in range(14)}))
"""Upper ends of the ranges of token counts that are told apart: 1, 2, 3, 4, 6, 8, 12 ... 32768, which stands for all
larger numbers. Powers of two alone would leave tiles of 128 rows for a third fewer rows than they are chosen for."""

TILES_EACH = 4
"""Tiles for each multiprocessor from which persistent programs are tried."""

MOST_SLOTS = 32
"""Most experts of a token that `rows` keeps side by side."""

STEP = 8192
"""Bytes of weights that one step of `rows` loads."""

SLACK = (1.005, 1.01, 1.02, 1.04)
"""How much longer than the fastest a variant may take where it spares another binary: more, until FEW suffice."""

FEW = 6
"""Binaries of one GEMM: more are not worth compiling and loading for what they gain."""


@dataclass(frozen=True)
class Candidate:
    """A variant and what it is expected to do."""

    variant: Variant
    made: Prediction


def obstacle(kernel: Family, gemm: Gemm, on: Chip) -> str:
    """Why a family of kernels cannot compute a GEMM on a chip, or is not tried; "" if it can."""
    if kernel not in FAMILIES:
        return "there is no such family of kernels"
    if kernel == "swap":
        return _engine(gemm, on, widens=True)
    if kernel == "tma":
        return _engine(gemm, on)
    if kernel == "persistent":
        if gemm.half == "up":
            return "rows that are gathered do not come by the copy engine"
        return _engine(gemm, on) or _list(gemm)
    if kernel == "gathered":
        return "rows lie in order already" if gemm.half == "down" else _engine(gemm, on) or _list(gemm)
    if kernel == "fp8":
        if gemm.activations != "fp8":
            return "rows stay as they are, and it multiplies those that are rounded to fp8"
        if on.lanes == 64 and gemm.inner % 128:  # as of `_tiles`
            return f"sums of {gemm.inner} terms: blocks of 128 are needed on {on.name}"
        return "" if DType.f8E4M3FN in on.flops else f"{on.name} does not multiply e4m3"
    if kernel == "rows":
        if gemm.tail:
            return "it adds up columns, and the tail takes whole rows"
        return "" if gemm.k <= MOST_SLOTS else f"it keeps {MOST_SLOTS} experts of a token side by side"
    return ""


def _list(gemm: Gemm) -> str:
    return "" if gemm.listed else "it reads its tiles from a list, which the op lacks"


def _engine(gemm: Gemm, on: Chip, widens: bool = False) -> str:
    """Why weights cannot come by the copy engine of Hopper and later; "" if they can.

    Args:
        widens: whether the family widens packed ones.
    """
    row = (gemm.columns * gemm.parts if gemm.transposed else gemm.inner) * gemm.dtype.itemsize
    if not on.engine:
        return f"{on.name} has no copy engine for tensors"
    if gemm.packing != "plain" and not widens:
        return f"it does not widen weights, which are packed as {gemm.packing}"
    if gemm.dtype is DType.f32:
        return "f32 is not multiplied by tensor cores"
    if gemm.packing != "plain" and gemm.parts == 2 and gemm.columns % 8:
        return f"{gemm.columns} columns of each kind: both come together, by eights"
    if gemm.packing != "plain":
        aligned = gemm.packing == "mxfp4" or gemm.inner % 16 == 0
        return "" if aligned else f"rows of {gemm.inner} bytes: it takes multiples of 16"
    if gemm.inner % 64 or row % 16:
        return f"sums of {gemm.inner} terms in rows of {row} bytes: blocks of 64 and 16 are needed"
    return ""


def candidates(gemm: Gemm, on: Chip) -> Iterator[Variant]:
    """The variants that are tried: of each family that can compute the GEMM on the chip."""
    for kernel in FAMILIES:
        if not obstacle(kernel, gemm, on):
            yield from TRIED[kernel](gemm, on)


def _tiles(gemm: Gemm, on: Chip) -> Iterator[Variant]:
    shallow = gemm.packing == "plain" and (on.lanes == 64 or gemm.dtype is DType.f32)
    depths: tuple[int, ...]
    depths = (128,) if gemm.packing == "mxfp4" else (32, 64, 128) if shallow else (64, 128)
    if on.lanes == 64:  # masks of what is left over take registers that loads need there
        depths = tuple(depth for depth in depths if gemm.inner % depth == 0) or depths
    stages = (2, 3) if on.lanes == 64 else (3, 4, 5)  # there, no asynchronous copies to keep under way
    for m, n, k, warps, deep in product((16, 32, 64, 128), (32, 64, 128, 256), depths, (4, 8), stages):
        if not _spills(gemm, on, m, n, warps):
            yield Variant("tiles", m, n, k, warps, deep)


def _spills(gemm: Gemm, on: Chip, m: int, n: int, warps: int) -> bool:
    """Whether LLVM spills with registers left: eight warps along a tile of 32 on one side, with two sums of fp8."""
    return on.lanes == 64 and gemm.packing == "fp8" and gemm.parts == 2 and warps == 8 and 32 in (m, n)


def _tma(gemm: Gemm, on: Chip) -> Iterator[Variant]:
    for m, n, k, warps, deep in product((64, 128), (64, 128, 256), _depths(gemm), (4, 8), (3, 4, 5)):
        yield Variant("tma", m, n, k, warps, deep)


def _swap(gemm: Gemm, on: Chip) -> Iterator[Variant]:
    if gemm.packing != "plain":
        columns = (32, 64, 128) if gemm.parts == 2 else (64, 128)
        for m, n, k, warps, deep in product((16, 32, 64, 128), columns, _depths(gemm), (4, 8), (3, 4, 5, 6)):
            variant = Variant("swap", m, n, k, warps, deep)
            # As below: of sums of fp8 on top of others, which registers hold there too.
            spills = on is CHIPS["cuda:sm_100"] and gemm.packing == "fp8" and (gemm.parts, m, n) == (1, 128, 128)
            if warps <= variant.first(gemm) // 16 and not spills:
                yield variant
        return
    for m, n, k, warps, deep in product((16, 32, 64), (64, 128), _depths(gemm), (4, 8), (3, 4, 5, 6)):
        # ptxas of CUDA 12.9 keeps 8 bytes of two sums on the stack for the B200, with registers left.
        spills = on is CHIPS["cuda:sm_100"] and gemm.parts == 2 and (m, k, warps) == (32, 128, 4)
        if warps <= n // 16 and not spills:
            yield Variant("swap", m, n, k, warps, deep)


def _persistent(gemm: Gemm, on: Chip) -> Iterator[Variant]:
    tried = [(128, DIVIDED, 4), (128, DIVIDED, 5), (256, DIVIDED, 3), (256, DIVIDED, 4)] if on.divides else []
    for n, warps, deep in [*tried, (128, 8, 4), (256, 8, 3), (256, 8, 4)]:
        yield Variant("persistent", 128, n, 64, warps, deep)


def _gathered(gemm: Gemm, on: Chip) -> Iterator[Variant]:
    for n, deep in product((64, 128, 256), (3, 4)):
        yield Variant("gathered", 128, n, 64, 8, deep)


def _fp8(gemm: Gemm, on: Chip) -> Iterator[Variant]:
    """Of as many rows as the instruction takes: Triton has none for fewer."""
    stages = (2, 3) if on.lanes == 64 else (3, 4, 5)
    for m, n, warps, deep in product((16, 32, 64, 128), (32, 64, 128, 256), (4, 8), stages):
        if m >= on.wide and not _spills(gemm, on, m, n, warps):
            yield Variant("fp8", m, n, 128, warps, deep)


def _rows(gemm: Gemm, on: Chip) -> Iterator[Variant]:
    """Steps of 8 KB, of which three are on their way: several programs then share an SM, and no load waits alone."""
    beside = gemm.parts if gemm.half == "up" else gemm.slots
    if gemm.packing != "plain":
        yield from _packed_rows(gemm, beside)
        return
    size = gemm.dtype.itemsize
    apart = gemm.transposed  # columns lie together: a piece is as long as they are
    split = (1, 2, 4, 8) if gemm.half == "down" and apart else (1,)
    for n, m, parts in product((16, 32, 64) if apart else (4, 8, 16), (1, 2, 4), split):
        k = STEP // (size * beside * n)
        if k >= 8 and (gemm.half == "up" or m == 1):
            yield Variant("rows", m, n, k if apart else min(k, 512 // size), 4, 4, parts)


def _packed_rows(gemm: Gemm, beside: int) -> Iterator[Variant]:
    """Steps of 128 of K, of up to 8 KB. A thread loads 16 bytes, so that all add in one order: warps may be few."""
    loaded = 128 if gemm.packing == "fp8" else 32
    for n, m in product((4, 8, 16, 32, 64), (1, 2, 4) if gemm.half == "up" else (1,)):
        tile = n * loaded * (1 if gemm.half == "up" else gemm.slots)
        if tile >= 512 and n * beside * 128 * gemm.weight_size <= 1.1 * STEP:
            yield Variant("rows", m, n, 128, min(4, tile // 512), 4)


def _depths(gemm: Gemm) -> tuple[int, ...]:
    """Steps along the inner dimension that divide it, or of whole blocks."""
    if gemm.packing != "plain":
        return (128,)
    return tuple(depth for depth in (64, 128) if gemm.inner % depth == 0)


TRIED: Mapping[Family, Callable[[Gemm, Chip], Iterator[Variant]]] = {
    "tiles": _tiles,
    "tma": _tma,
    "swap": _swap,
    "persistent": _persistent,
    "gathered": _gathered,
    "rows": _rows,
    "fp8": _fp8,
}


@cache
def ranked(gemm: Gemm, tokens: int, on: Chip) -> tuple[Candidate, ...]:
    """All variants that fit the chip, the fastest for `tokens` tokens first; of equals that of least memory.

    Raises: CompileError if none fits.
    """
    made = [(variant, predict(gemm, variant, tokens, on)) for variant in candidates(gemm, on)]
    found = [Candidate(variant, p) for variant, p in made if p is not None and _worth(variant, p, on)]
    if not found:
        raise CompileError(f"no tile of {gemm} fits {on.name}")
    return tuple(sorted(found, key=lambda c: (c.made.us, c.variant.block_m, c.variant.shared(gemm, on))))


def _worth(variant: Variant, made: Prediction, on: Chip) -> bool:
    """Whether a variant is tried: programs that stay have to have tiles to go over. That they gain is not measured."""
    return not variant.stays or made.work.programs >= TILES_EACH * on.sms


def best(gemm: Gemm, tokens: int, on: Chip) -> Candidate:
    """The fastest variant for `tokens` tokens. Raises: CompileError if none fits."""
    return ranked(gemm, tokens, on)[0]


def by_family(gemm: Gemm, tokens: int, on: Chip) -> tuple[Candidate, ...]:
    """The fastest variant of each family, the fastest family first."""
    found = dict[Family, Candidate]()
    for candidate in ranked(gemm, tokens, on):
        found.setdefault(candidate.variant.kernel, candidate)
    return tuple(found.values())


Orders: TypeAlias = frozenset[str]
"""Orders of adding, as of `Variant.order`."""


def of_orders(gemm: Gemm, tokens: int, on: Chip, orders: Orders) -> tuple[Candidate, ...]:
    """`ranked`, those that add a row's terms in one of some orders."""
    return tuple(c for c in ranked(gemm, tokens, on) if c.variant.order(gemm, on) in orders)


@dataclass(frozen=True)
class Invariance:
    """How far the order of adding is one for all numbers of tokens.

    Args:
        orders: that variants may have. If it is one, a row gets the same bits in whatever batch it comes.
        loss: how much longer the fastest variants of them take than the fastest of all: the worst share over BUCKETS.
        tokens: where that is.
    """

    orders: Orders
    loss: float
    tokens: int


@cache
def invariance(gemm: Gemm, on: Chip, most: float) -> Invariance:
    """The fewest orders of adding that make no number of tokens slower by more than a share of `most`.

    One order; or those of `rows`, for a few tokens, and one for all others; or any.
    """
    by_kernel = {c.variant.order(gemm, on): c.variant.kernel for t in BUCKETS for c in ranked(gemm, t, on)}
    few = frozenset(order for order, kernel in by_kernel.items() if kernel == "rows")
    for sets in ([frozenset({o}) for o in by_kernel], [few | {o} for o in by_kernel if o not in few]):
        one = min((_loss(gemm, on, orders) for orders in sets), key=lambda found: found.loss)
        if one.loss <= most:
            return one
    return Invariance(frozenset(by_kernel), 0.0, BUCKETS[0])


def _loss(gemm: Gemm, on: Chip, orders: Orders) -> Invariance:
    losses = list[tuple[float, int]]()
    for tokens in BUCKETS:
        found = of_orders(gemm, tokens, on, orders)
        losses.append((found[0].made.us / best(gemm, tokens, on).made.us - 1 if found else inf, tokens))
    return Invariance(orders, *max(losses))


@dataclass(frozen=True)
class Range:
    """The variant for up to `up_to` tokens (None: any number), with what it is expected to do at the upper end."""

    up_to: int | None
    chosen: Candidate


@cache
def ranges(gemm: Gemm, on: Chip, orders: Orders) -> tuple[Range, ...]:
    """The variants by ascending token count: as few as stay near the fastest of each bucket.

    Args:
        orders: of adding that they may have.
    """
    return fewest(lambda tokens: of_orders(gemm, tokens, on, orders), partial(_spare, gemm, on))


Ranking: TypeAlias = Callable[[int], Sequence[Candidate]]
"""The candidates for a number of tokens, the fastest first."""


def fewest(ranking: Ranking, spare: Callable[[Variant], Any], few: int = FEW) -> tuple[Range, ...]:
    """Ranges of buckets, `few` if they can be had by staying within the last of SLACK; `spare` as of `merged`."""
    tables = (_table(ranking, spare, slack) for slack in SLACK)
    return next((table for table in tables if len(table) <= few), _table(ranking, spare, SLACK[-1]))


def _table(ranking: Ranking, spare: Callable[[Variant], Any], slack: float) -> tuple[Range, ...]:
    """Ranges with every bucket within `slack` of its fastest."""
    near, at = list[dict[Variant, float]](), list[dict[Variant, Candidate]]()
    for tokens in BUCKETS:
        found = ranking(tokens)
        least = found[0].made.us
        at.append({c.variant: c for c in found if c.made.us <= least * slack})
        near.append({variant: c.made.us / least for variant, c in at[-1].items()})
    return tuple(
        Range(None if last == len(BUCKETS) - 1 else BUCKETS[last], at[last][variant])
        for _, last, variant in merged(near, spare)
    )


def _spare(gemm: Gemm, on: Chip, variant: Variant) -> tuple[Any, ...]:
    """Of equals, that of few rows, few warps and least memory."""
    return variant.block_m, variant.num_warps, variant.shared(gemm, on), str(variant)


def merged(
    near: Sequence[Mapping[Variant, float]], spare: Callable[[Variant], Any] = str
) -> list[tuple[int, int, Variant]]:
    """The fewest ranges of buckets that one variant each can have: first and last bucket, and the best of those.

    Args:
        near: for each bucket the variants that are good enough, with their time over the fastest's.
        spare: which of equals to take: that of the least.
    """
    found, first = list[tuple[int, int, Variant]](), 0
    good = set(near[0])
    for i in range(1, len(near) + 1):
        here = good & set(near[i]) if i < len(near) else set[Variant]()
        if not here:
            cost = {variant: round(sum(times[variant] for times in near[first:i]), 6) for variant in good}
            found.append((first, i - 1, min(good, key=lambda variant: (cost[variant], spare(variant)))))
            good, first = set(near[i]) if i < len(near) else good, i
        else:
            good = here
    return found
