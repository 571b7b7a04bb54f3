"""Experts on several devices: which rank has an expert, and how tokens come to it and back.

Every rank runs the same program on tokens of its own and holds S slots of each expert bank. Slots are numbered over all
ranks: slot p of P = R * S lives on rank p // S and is its slot p % S. Which expert a slot holds, and what share of the
expert's tokens it gets, are tables that are given at run time: another placement needs no other program.

Out of range means "skip" everywhere: an expert outside 0..E-1, a slot outside 0..P-1, a local slot outside 0..S-1.

An exchange is a pair: `_start` sends, `_wait` needs what came; between them stands what depends on neither. A dispatch
and the combine on its handle are adjoint maps, <dispatch(x), y> = <x, combine(y)>, so that the gradient of one is the
other (`ADJOINTS`).

Costs are bytes of memory: what is read, sent and received, for tokens that choose experts independently of each other;
`sent` says how many of them go over links.
"""

from __future__ import annotations

from sparsec.dialects.dist.exchanges import (
    ADJOINTS,
    Algo,
    CombineStart,
    CombineWait,
    Dedup,
    DispatchStart,
    DispatchWait,
    Payload,
    row_bytes,
)
from sparsec.dialects.dist.references import rows_sent
from sparsec.dialects.dist.tables import Local, Migrate, Policy, Remap

__all__ = [
    "ADJOINTS",
    "Algo",
    "CombineStart",
    "CombineWait",
    "Dedup",
    "DispatchStart",
    "DispatchWait",
    "Local",
    "Migrate",
    "Payload",
    "Policy",
    "Remap",
    "row_bytes",
    "rows_sent",
]
