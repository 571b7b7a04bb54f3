"""What the ops of the dialect share: checks of ranks, of tables, and of where ranks meet."""

from __future__ import annotations

from collections.abc import Iterator

from sparsec.ir.core import Func, Op, Value
from sparsec.ir.derived import is_derivation
from sparsec.ir.opdef import OpDef
from sparsec.ir.types import DType, TensorType


def rank_problems(ranks: int, width: int) -> Iterator[str]:
    if ranks < 1 or width < 1 or ranks % width:
        yield f"has {ranks} ranks in nodes of {width}: each node needs as many ranks"


def table_type(ranks: int, slots: int) -> TensorType:
    return TensorType((ranks * slots,), DType.i64)


def table_problems(table: Value, experts: int, ranks: int) -> Iterator[str]:
    type, ranks = table.tensor, max(ranks, 1)
    size = type.shape[0] if type.rank == 1 else None
    if not isinstance(size, int) or type.dtype is not DType.i64:
        yield f"the table of slots is {type}, must be tensor<Pxi64>"
    elif size % ranks:
        yield f"{size} slots cannot be shared out to {ranks} ranks: every rank needs as many"
    elif size < experts:
        yield f"{size} slots cannot hold {experts} experts: {-(-experts // ranks)} for each of {ranks} ranks can"
    elif size // ranks > experts:
        yield f"a rank has {size // ranks} slots for {experts} experts, and needs none twice"


def collective_problems(op: OpDef) -> Iterator[str]:
    """Why some rank might not come to an op that all ranks must reach together."""
    parent = op.block.parent if op.block is not None else None
    if isinstance(parent, Op):
        yield f"stands in a region of '{parent.name}': all ranks must reach it, so it stands in the function itself"
    elif isinstance(parent, Func) and is_derivation(parent):
        yield f"stands in @{parent.name}, which computes weights once, while no other rank is there to exchange with"
