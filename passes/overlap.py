"""Let a layer compute what needs no other rank while its tokens are under way."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from sparsec.diagnostics import CompileError
from sparsec.dialects.aten import AtenOp
from sparsec.dialects.moe import ExpertBank
from sparsec.ir.core import Block, Module, Op
from sparsec.ir.opdef import OpDef
from sparsec.passes.base import Pass, PassContext, register
from sparsec.passes.chunk_tokens import cut
from sparsec.passes.exchange import Exchange, depending, exchanges

_PRODUCTS = frozenset({"linear", "mm", "addmm", "bmm", "matmul", "baddbmm", "scaled_dot_product_attention"})
_SIZE = 128  # what an unknown size is taken for, to weigh ops against each other


@register
@dataclass(frozen=True)
class Overlap(Pass):
    """Move what neither needs the rows of a dispatch nor makes what it sends between its start and its wait, and the
    rest of that between start and wait of the combine: shared experts, in halves of equal flops.

    Moved are pure ops between the definition of the tokens and the next exchange, if a product of matrices is among
    them.

    With `chunks` the tokens of a placed layer are dispatched in so many parts: each travels while another is computed.
    The module's attribute `chunks` comes before the option.
    """

    name: ClassVar[str] = "overlap"
    chunks: int = 1  #: parts that the tokens of a layer are dispatched in

    def run(self, module: Module, ctx: PassContext) -> None:
        block, chunks = module.main.body, module.attrs.get("chunks", self.chunks)
        if type(chunks) is not int or chunks < 1:
            raise CompileError(f"'chunks' must be a whole number from 1, not {chunks!r}")
        for exchange in exchanges(block):
            if moved := _Filler(exchange).fill(block):
                ctx.changed("ops moved", moved)
                ctx.passed(exchange.start, f"{moved} ops run while tokens of this layer are under way")
            if chunks > 1:
                cut(block, exchange, chunks)
                ctx.changed("layers cut into chunks")
                ctx.passed(exchange.start, f"tokens of this layer travel in {chunks} parts")


class _Filler:
    """Fills the time of an exchange."""

    def __init__(self, exchange: Exchange) -> None:
        self.start, self.wait, self.back, self.end = exchange.start, exchange.wait, exchange.back, exchange.end

    def fill(self, block: Block) -> int:
        """Move ops into the exchange. Returns: how many run in it; 0 if all were where they are."""
        first, last = self.span(block)
        ops = block.ops[first:last]
        after = depending(ops, self.start)
        late = depending(ops, self.end)
        inside = [op for op in ops if op in after and op not in late]
        free = self.independent(ops, after, inside)
        if not any(_is_product(op) for op in free):
            return 0
        early, later = _halves(free)
        kept = [op for op in ops if op not in after and op not in free]
        cut = inside.index(self.back) + 1
        between = [op for op in inside[:cut] if op not in (self.start, self.wait)]
        order = [*kept, self.start, *early, self.wait, *between, *later, *inside[cut:], self.end]
        order += [op for op in ops if op in late and op is not self.end]
        block.ops[first:last] = order
        return len(free) if order != ops else 0

    def span(self, block: Block) -> tuple[int, int]:
        """Where ops may move: from the tokens' definition to the next exchange, and past nothing that has an effect."""
        ops, source = block.ops, self.start.x
        while isinstance(source.op, AtenOp) and _is_view(source.op):
            source = source.op.operands[0]
        at = {op: i for i, op in enumerate(ops)}
        begin, end = at[self.start], at[self.end]
        floor = at[source.op] + 1 if source.op in at else 0
        first = begin
        while first > floor and _is_pure(ops[first - 1]):
            first -= 1
        last = end + 1
        while last < len(ops) and _is_pure(ops[last]):
            last += 1
        return first, last

    def independent(self, ops: Sequence[Op], after: set[Op], inside: Sequence[Op]) -> dict[Op, None]:
        """Of `ops` those that may stand anywhere in the exchange, in order."""
        begin = ops.index(self.start)
        ahead = set(ops[:begin])
        needed = set[Op]()
        for op in reversed(ops):
            if op in inside or op in needed:
                needed.update(value.op for value in op.operands if value.op is not None and value.op not in after)
        free = set[Op]()
        for i in range(len(ops) - 1, -1, -1):
            op = ops[i]
            users = {user for result in op.results for user in result.users}
            if op not in after and op not in needed and (i > begin or users & ahead <= free):
                free.add(op)
        return {op: None for op in ops if op in free}


def _halves(ops: Sequence[Op] | dict[Op, None]) -> tuple[list[Op], list[Op]]:
    """Ops in two parts of nearly equal flops, in order."""
    flops = {op: _flops(op) for op in ops}
    half, done = sum(flops.values()) / 2, 0.0
    early, later = list[Op](), list[Op]()
    for op, cost in flops.items():
        (early if done + cost / 2 <= half and not later else later).append(op)
        done += cost
    return early, later


def _flops(op: Op) -> int:
    cost = op.cost(defaultdict(lambda: _SIZE)) if isinstance(op, OpDef) else None
    return cost.flops if cost is not None else 0


def _is_pure(op: Op) -> bool:
    return isinstance(op, OpDef) and op.pure


def _is_view(op: AtenOp) -> bool:
    returns = op.target._schema.returns
    return bool(returns) and returns[0].alias_info is not None


def _is_product(op: Op) -> bool:
    return isinstance(op, ExpertBank) or (op.dialect == "aten" and op.name.split(".")[1] in _PRODUCTS)
