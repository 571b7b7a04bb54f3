"""Why kernels for GPUs are scheduled as they are: for each GEMM and number of tokens, what every family would take.

Everything here is predicted by the cost model (`sparsec.passes.roofline`, of backward ops `sparsec.passes.gradients`);
nothing is measured.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sparsec.dialects.moe import BankGrad, GatherGemm, GemmCombine, HiddenGrad
from sparsec.ir.core import Module
from sparsec.passes import gradient_variants
from sparsec.passes.chips import Chip, chip
from sparsec.passes.cost import (
    BUCKETS,
    FAMILIES,
    Candidate,
    Invariance,
    Range,
    by_family,
    invariance,
    obstacle,
    of_orders,
    ranges,
    ranked,
)
from sparsec.passes.gradient_variants import gradient_ranges, gradient_ranked
from sparsec.passes.gradients import Bank, Gradient, foresee, gradient_of
from sparsec.passes.roofline import Limiter, Prediction, predict
from sparsec.passes.schedule import allowed_loss, gemm_of
from sparsec.passes.variants import Family, Gemm

if TYPE_CHECKING:
    from rich.console import RenderableType


@dataclass(frozen=True)
class Offer:
    """What one family would take, or one variant of it.

    Args:
        variant: as text, a family's fastest; "" where it has none.
        us, limiter, roofs: as of `roofline.Prediction`; 0, "", {} where it has none.
        why: why it is not chosen, or that it is.
    """

    family: Family
    variant: str
    us: float
    limiter: Limiter | str
    roofs: dict[str, float]
    why: str


@dataclass(frozen=True)
class Choice:
    """What runs for a number of tokens, and what else might: what runs first, then by time."""

    tokens: int
    offers: list[Offer]

    @property
    def chosen(self) -> Offer:
        return self.offers[0]


@dataclass(frozen=True)
class Explained:
    """One GEMM or backward op of one shape.

    Args:
        title: which, and its sizes.
        ops: how many ops of the module are alike.
        orders: in which its variants add a row's terms; one if a row gets the same bits in every batch. None of a
            backward op: gradients of banks are sums over the batch.
        loss: what that costs at worst, as a share.
    """

    title: str
    ops: int
    orders: list[str]
    loss: float
    choices: list[Choice]


SHOWN = tuple(tokens for tokens in BUCKETS if tokens.bit_count() == 1)
"""Numbers of tokens that are explained where none are named: powers of two."""


def explain(module: Module, target: str, tokens: Sequence[int] = SHOWN, every: bool = False) -> list[Explained]:
    """Why the GEMMs and backward ops of a module (from phase `fuse` on) run on a GPU target as they do.

    `every`: offers are all variants that were compared, not only the fastest of each family.

    Raises: CompileError.
    """
    on, most, counts = chip(target), allowed_loss(module), dict[Gemm | Gradient, int]()
    for op in module.walk():
        if isinstance(op, GatherGemm | GemmCombine | HiddenGrad | BankGrad):
            shape = gemm_of(op) if isinstance(op, GatherGemm | GemmCombine) else gradient_of(op)
            counts[shape] = counts.get(shape, 0) + 1
    return [
        _explained(shape, count, on, most, tokens, every)
        if isinstance(shape, Gemm)
        else Explained(_title(shape, on), count, [], 0.0, [_backward(shape, on, number, every) for number in tokens])
        for shape, count in counts.items()
    ]


def _explained(gemm: Gemm, count: int, on: Chip, most: float, tokens: Sequence[int], every: bool) -> Explained:
    same = invariance(gemm, on, most)
    table = ranges(gemm, on, same.orders)
    used = dict.fromkeys(range_.chosen.variant.order(gemm, on) for range_ in table)
    choices = [_choice(gemm, on, same, table, number, every) for number in tokens]
    return Explained(_title(gemm, on), count, list(used), same.loss, choices)


def _backward(grad: Gradient, on: Chip, tokens: int, every: bool) -> Choice:
    """`_choice` of a backward op."""
    table, compared = gradient_ranges(grad, on), gradient_ranked(grad, tokens, on)
    chosen = next(range_ for range_ in table if range_.up_to is None or tokens <= range_.up_to).chosen.variant
    made = foresee(grad, chosen, tokens, on)
    assert made is not None
    there = dict[Family, Candidate]()
    for candidate in compared:
        there.setdefault(candidate.variant.kernel, candidate)
    offers = [
        _offer(candidate, _why(candidate, made, allowed=True))
        for candidate in (compared if every else there.values())
        if (candidate.variant != chosen if every else candidate.variant.kernel != chosen.kernel)
    ]
    few = "fewer tokens than a block of rows" if isinstance(grad, Bank) else "no tile of it fits the chip"
    without = [
        Offer(family, "", 0.0, "", {}, gradient_variants.obstacle(family, grad, on) or few)
        for family in gradient_variants.FAMILIES
        if family not in there and family != chosen.kernel
    ]
    return Choice(tokens, [_offer(Candidate(chosen, made), "chosen"), *offers, *without])


def _title(gemm: Gemm | Gradient, on: Chip) -> str:
    if not isinstance(gemm, Gemm):
        return f"{gemm}, {gemm.k} of {gemm.experts} experts, {gemm.dtype.value}, on {on.name}"
    parts = f"{gemm.parts} x {gemm.columns}" if gemm.parts > 1 else str(gemm.columns)
    packing = "" if gemm.packing == "plain" else f" by {gemm.packing}"
    packing += "" if gemm.activations == "model" else f" of rows in {gemm.activations}"
    sizes = f"{gemm.inner} -> {parts}, {gemm.k} of {gemm.experts} experts, {gemm.dtype.value}{packing}"
    return f"{gemm.half}-projection {sizes}, on {on.name}"


def _choice(gemm: Gemm, on: Chip, same: Invariance, table: Sequence[Range], tokens: int, every: bool) -> Choice:
    chosen = next(range_ for range_ in table if range_.up_to is None or tokens <= range_.up_to).chosen.variant
    made = predict(gemm, chosen, tokens, on)
    assert made is not None
    compared = ranked(gemm, tokens, on)
    there = dict.fromkeys(candidate.variant.kernel for candidate in compared)
    offers = [
        _offer(candidate, _why(candidate, made, candidate.variant.order(gemm, on) in same.orders))
        for candidate in (compared if every else _of_families(gemm, tokens, on, same))
        if (candidate.variant != chosen if every else candidate.variant.kernel != chosen.kernel)
    ]
    without = [
        Offer(family, "", 0.0, "", {}, obstacle(family, gemm, on) or _absence(family))
        for family in FAMILIES
        if family not in there and family != chosen.kernel
    ]
    here = _offer(Candidate(chosen, made), "chosen")
    return Choice(tokens, [here, *sorted(offers, key=lambda offer: offer.us), *without])


def _of_families(gemm: Gemm, tokens: int, on: Chip, same: Invariance) -> list[Candidate]:
    """The fastest of each family, of those that add in an order that is allowed where it has one."""
    allowed = dict[str, Candidate]()
    for candidate in of_orders(gemm, tokens, on, same.orders):
        allowed.setdefault(candidate.variant.kernel, candidate)
    return [allowed.get(one.variant.kernel, one) for one in by_family(gemm, tokens, on)]


def _offer(candidate: Candidate, why: str) -> Offer:
    variant, made = candidate.variant, candidate.made
    return Offer(variant.kernel, str(variant), made.us, made.limiter, _roofs(made), why)


def _why(candidate: Candidate, chosen: Prediction, allowed: bool) -> str:
    """Why a variant is not the chosen one."""
    why = f"{100 * (candidate.made.us / chosen.us - 1):+.1f} %"
    if not allowed:
        return f"{why}, and adds in another order"
    return f"{why}, not worth another binary" if candidate.made.us <= chosen.us else why


def _absence(family: Family) -> str:
    match family:
        case "persistent" | "gathered":
            return "too few tiles for programs that stay"
        case "rows":
            return "more pairs than a program looks through"
        case _:
            return "no tile of it fits the chip"


def _roofs(made: Prediction) -> dict[str, float]:
    return {str(name): round(us, 2) for name, us in made.roofs.items()}


def render(found: Sequence[Explained], detailed: bool) -> RenderableType:
    """The choices as tables for a terminal: a line for each number of tokens, or (`detailed`) for each offer."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    shown: list[RenderableType] = []
    for one in found:
        same = f"a row gets the same bits in every batch (at most {100 * one.loss:.1f} % slower)"
        orders = (
            same if len(one.orders) == 1 else f"terms are added in {len(one.orders)} orders: {', '.join(one.orders)}"
        )
        title = f"{one.title} ({one.ops} alike)" if one.ops > 1 else one.title
        table = Table(title=Text(title), title_justify="left", title_style="bold", box=None,
                      caption=Text(orders) if one.orders else None, caption_justify="left",
                      header_style="dim")  # fmt: skip
        for column in ("tokens", "us", "limiter", "variant", "memory", "compute", "cache", "latency"):
            table.add_column(column, justify="left" if column in ("limiter", "variant") else "right")
        table.add_column("", ratio=1)
        for choice in one.choices:
            if detailed:
                for offer in choice.offers:
                    table.add_row(str(choice.tokens), *_cells(offer), Text(offer.why))
            else:
                rest = "; ".join(f"{o.family} {o.why}" for o in choice.offers[1:] if o.variant)
                table.add_row(str(choice.tokens), *_cells(choice.chosen), Text(rest, style="dim"))
        shown += [table, ""]
    return Group(*shown[:-1])


def _cells(offer: Offer) -> list[str]:
    if not offer.variant:
        return ["", "", offer.family, "", "", "", ""]
    return [f"{offer.us:.1f}", str(offer.limiter), offer.variant, *(f"{us:.1f}" for us in offer.roofs.values())]
