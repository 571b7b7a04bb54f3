"""Cut the tokens of a placed layer into parts, so that one travels while another is computed."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Sequence
from itertools import pairwise

from sparsec.ir.core import Block, Op, Value
from sparsec.ir.equal import ValueMap, clone_op
from sparsec.ir.opdef import OpDef, make
from sparsec.ir.types import Dim, Sym, TensorType, dims_of, symbols
from sparsec.passes.exchange import Exchange
from sparsec.passes.rules import renamers


def cut(block: Block, exchange: Exchange, chunks: int) -> None:
    """Put `chunks` exchanges in the place of one: all dispatches begin, then each part is computed and sent back as its
    rows are there, and the results are put together.

    Part i has the tokens from T * i // chunks on.
    """
    start, end = exchange.start, exchange.end
    between = exchange.between(block)
    tokens = start.x.tensor.shape[0]
    bounds = [_times(tokens, i, chunks) for i in range(chunks + 1)]
    fresh = _unbacked(block)
    starts = list[Op]()
    parts = list[tuple[list[Op], Op]]()
    for first, last in pairwise(bounds):
        values: ValueMap = {}
        for value in dict.fromkeys((start.x, *start.arguments[1:3])):
            assert isinstance(value, Value)
            piece = _slice(value, first, last, start)
            values[value] = piece.result
            starts.append(piece)
        map_type, map_attr = renamers(exchange.rows, next(fresh))
        begun = clone_op(start, values)
        starts.append(begun)
        ops: list[Op] = [clone_op(op, values, map_type, map_attr) for op in (exchange.wait, *between, exchange.back)]
        done = clone_op(end, values)
        assert isinstance(done, OpDef)
        (done.result.type,) = done.infer()
        parts.append((ops, done))
    whole = make("aten.cat", [tuple(done.result for _, done in parts)], [end.y.type], loc=end.loc)
    whole.result.name = end.y.name
    end.y.replace_by(whole.result)
    computed, ended = [op for ops, _ in parts for op in ops], [done for _, done in parts]
    _put(block, exchange, between, starts, computed, [*ended, whole])


def _put(
    block: Block, exchange: Exchange, between: Sequence[Op], starts: list[Op], computed: list[Op], ended: list[Op]
) -> None:
    """New ops for those of an exchange; what else stands in it runs while the same half of it is under way."""
    old = {exchange.start, exchange.wait, *between, exchange.back, exchange.end}
    at = [block.ops.index(op) for op in (exchange.start, exchange.back, exchange.end)]
    early, late = ([op for op in block.ops[a:b] if op not in old] for a, b in pairwise(at))
    new = [*starts, *early, *computed, *late, *ended]
    block.ops[at[0] : at[-1] + 1] = new
    for op in new:
        op.block = block
    for op in old:
        for inner in op.walk():
            inner.operands = ()
        op.block = None


def _slice(value: Value, first: Dim, last: Dim, near: Op) -> OpDef:
    """Rows first..last of a tensor."""
    type = value.tensor
    made = TensorType((_minus(last, first), *type.shape[1:]), type.dtype)
    piece = make("aten.slice.Tensor", [value], [made], {"dim": 0, "start": first, "end": last}, loc=near.loc)
    piece.result.name = value.name
    return piece


def _times(tokens: Dim, part: int, of: int) -> Dim:
    """tokens * part // of."""
    if part in (0, of):
        return tokens if part else 0
    return tokens * part // of if isinstance(tokens, int) else _sym(f"({tokens}){f'*{part}' * (part > 1)}//{of}")


def _minus(last: Dim, first: Dim) -> Dim:
    if isinstance(last, int) and isinstance(first, int):
        return last - first
    return last if first == 0 else _sym(f"({last})-({first})")


def _sym(text: str) -> Sym:
    return Sym(ast.unparse(ast.parse(text, mode="eval")).replace(" ", ""))


def _unbacked(block: Block) -> Iterator[Sym]:
    """Sizes that nothing in a function is called."""
    values = [*block.args, *(result for op in block.ops for result in op.results)]
    taken = {name for value in values for dim in dims_of(value.type) for name in symbols(dim)}
    number = max((int(name[1:]) + 1 for name in taken if re.fullmatch(r"u\d+", name)), default=0)
    while True:
        yield Sym(f"u{number}")
        number += 1
