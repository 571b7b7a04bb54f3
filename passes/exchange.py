"""The four ops of a placed layer, and what of a block depends on which of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sparsec.dialects.dist import CombineStart, CombineWait, DispatchStart, DispatchWait
from sparsec.ir.core import Block, Op, Value
from sparsec.ir.types import Dim


@dataclass(frozen=True)
class Exchange:
    """A dispatch, and the combine on its handle."""

    start: DispatchStart
    wait: DispatchWait
    back: CombineStart
    end: CombineWait

    @classmethod
    def of(cls, start: DispatchStart) -> Exchange | None:
        """The exchange that an op begins; None if nothing comes back."""
        wait = next((user for user in start.handle.users if isinstance(user, DispatchWait)), None)
        back = next((user for user in start.handle.users if isinstance(user, CombineStart)), None)
        end = next((user for user in back.handle.users if isinstance(user, CombineWait)), None) if back else None
        return cls(start, wait, back, end) if wait and back and end else None

    @property
    def rows(self) -> Dim:
        """The size that the number of rows received is."""
        return self.wait.rows.tensor.shape[0]

    def between(self, block: Block) -> list[Op]:
        """What is computed of the rows that came, and all that is sent back depends on."""
        ops = block.ops[block.ops.index(self.start) : block.ops.index(self.back)]
        after = depending(ops, self.start)
        return [op for op in ops if op in after and op not in (self.start, self.wait)]


def exchanges(block: Block) -> list[Exchange]:
    """Every exchange of a block, in order."""
    begun = [op for op in block.ops if isinstance(op, DispatchStart)]
    return [found for op in begun if (found := Exchange.of(op)) is not None]


def depending(ops: Sequence[Op], source: Op) -> set[Op]:
    """`source` and those of `ops` that read what it yields, directly or not."""
    found, values = {source}, set[Value](source.results)
    for op in ops:
        if any(operand in values for operand in op.operands):
            found.add(op)
            values.update(op.results)
    return found
