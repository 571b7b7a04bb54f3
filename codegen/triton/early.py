"""Which kernels may start before the launch in front of them has ended, and read ahead (programmatic dependent launch).

A launch waits, by `arrive`, until the one in front of it has ended, before it writes or leaves. So what was written
before that one began may be read ahead of `arrive`. The down-projection does so: it looks its tile up in what the sort
left. That holds as long as the launch in front of it is not the sort, which nothing but the order of the launches says.
"""

from __future__ import annotations

from sparsec.dialects.kernel import Launch
from sparsec.dialects.moe import GemmCombine
from sparsec.ir.core import Func, Value


def may_start(func: Func, main: Func) -> bool:
    """Whether the first launch of a kernel may start early wherever `main` launches it.

    A kernel that reads nothing ahead may, as one whose first launch rounds the rows: it is in between then. The
    down-projection may where its rows come from a kernel that is launched after all have been written that it reads
    ahead: as there are rows, that kernel has programs, and is in between.
    """
    op = func.body.ops[0]
    if not isinstance(op, GemmCombine) or op.activations != "model":
        return True
    place = {op: i for i, op in enumerate(main.body.ops)}
    for launch in main.body.ops:
        if not isinstance(launch, Launch) or launch.callee != func.name:
            continue
        given = dict(zip(op.arguments, launch.inputs, strict=False))
        rows, written = given[op.h].op, [given[value].op for value in reads_ahead(op)]
        if not isinstance(rows, Launch) or any(place[writer] >= place[rows] for writer in written if writer):
            return False
    return True


def reads_ahead(op: GemmCombine) -> list[Value]:
    """What the kernels of a down-projection read before the launch in front of them has ended."""
    return [value for value in (op.order, op.offsets, op.tiles) if value is not None]
