"""The text of a module with the cost of each op behind it, as a comment: the text still parses to the same module.

%h = moe.gather_gemm(%x, %order, %tiles, %up) {k = 2} : tensor<(2*s0)x48xbf16> {  // 2.4 MB, 98 MFLOP ...
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from sparsec.diagnostics import SparsecError
from sparsec.dialects.dist import CombineStart, DispatchStart
from sparsec.inspect.costs import OpCost, Roof, op_costs, roof, sizes, total
from sparsec.ir.core import Module, Op
from sparsec.ir.printer import Printer, format_attr, print_module

COLUMN = 100
"""Where comments begin, if the op's own text leaves room."""


def text_of(module: Module, cost: str | None, given: Sequence[str]) -> str:
    """The text of a module as the command line asks for it: with costs on the chip `cost`, if one is named.

    Args:
        given: sizes, `s0=4`.

    Raises: SparsecError for a chip or a size that there is not.
    """
    if cost is None:
        if given:
            raise SparsecError("--size goes with --cost CHIP")
        return print_module(module)
    return print_costs(module, dict(map(size_of, given)), roof(cost))


def size_of(text: str) -> tuple[str, int]:
    """A size as the command line gives it. Raises: SparsecError."""
    name, _, value = text.partition("=")
    if not value.isdigit():
        raise SparsecError(f"--size takes a name and a number, s0=4, not {text!r}")
    return name, int(value)


def print_costs(module: Module, given: Mapping[str, int], on: Roof | None = None) -> str:
    """The short form with costs.

    Args:
        given: values of symbolic sizes; the rest are taken as `costs.SIZE`.
        on: the chip for times.

    Raises: SparsecError for a size that the module does not have.
    """
    env = sizes(module, given)
    costs = op_costs(module, env, on)
    us = sum(cost.us for op, cost in costs.items() if op.block is module.main.body)
    parts = [f"// {head}" for head in _heads(env, on, us)]
    parts += [f"// most: {line}, {ops} ops: {_comment(cost)}" for line, ops, cost in slowest(module, costs, 3)]
    parts += [f"module {format_attr(module.attrs)}"] if module.attrs else []
    for func in module.funcs.values():
        printer = Printer()
        printer.func(func)
        for op, (first, _) in printer.spans.items():
            if comment := ", ".join(filter(None, (_comment(costs.get(op)), _links(op, env)))):
                printer.lines[first] = f"{printer.lines[first]:<{COLUMN}}  // {comment}"
        parts += ["", *printer.lines]
    return "\n".join(parts) + "\n"


def _heads(env: Mapping[str, int], on: Roof | None, us: float) -> list[str]:
    taken = ", ".join(f"{name} = {value}" for name, value in env.items())
    heads = [f"costs with {taken}"] if env else ["costs"]
    return [*heads, f"on {on.name}: {time(us)} at best, launches and caches left out"] if on else heads


def _comment(cost: OpCost | None) -> str:
    if cost is None or not (cost.bytes or cost.flops):
        return ""
    text = f"{quantity(cost.bytes)}B, {quantity(cost.flops)}FLOP, {cost.intensity:.3g} FLOP/B"
    return f"{text}, {time(cost.us)} {cost.limiter}" if cost.limiter else text


def _links(op: Op, env: Mapping[str, int]) -> str:
    """What an exchange sends, with random routing: a chip's own roof does not count it."""
    if not isinstance(op, DispatchStart | CombineStart):
        return ""
    inside, outside = op.sent(env)
    return f"sends {quantity(inside)}B in its node, {quantity(outside)}B to others"


def quantity(value: float) -> str:
    """A number in three digits with its prefix and a space before the unit: `2.41 M`."""
    for prefix, scale in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= scale:
            return f"{value / scale:.3g} {prefix}"
    return f"{value:.3g} "


def time(us: float) -> str:
    """Microseconds in three digits: `18 us`, `1.2 ms`."""
    for unit, scale in (("s", 1e6), ("ms", 1e3), ("us", 1.0)):
        if us >= scale:
            return f"{us / scale:.3g} {unit}"
    return f"{us * 1e3:.3g} ns"


def slowest(module: Module, costs: Mapping[Op, OpCost], count: int) -> list[tuple[str, int, OpCost]]:
    """The user's lines whose ops in `main` take most time at best, or move most bytes where no chip is named.

    Returns: line, number of ops, their cost in all.
    """
    lines = dict[str, list[OpCost]]()
    for op, cost in costs.items():
        if op.block is module.main.body and cost.bytes:
            lines.setdefault(str(op.loc), []).append(cost)
    found = [(line, len(of), total(of)) for line, of in lines.items()]
    return sorted(found, key=lambda item: (-item[2].us, -item[2].bytes))[:count]
