"""The same experts on both sides: choices between scores that are as good as equal are held to what another run chose.

Rounding may let a tie between two experts fall the other way, which is no bug and changes everything behind it. So what
a run of the captured module chose (`Choices`) is put in the place of what a rewritten one chooses, row by row, but only
where that choice is as good by the captured module's own scores. A choice that is worse stays, and shows.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from sparsec.ir.core import Module, Op, Value
from sparsec.ir.loc import Loc
from sparsec.passes.rules import attr

CLOSE = 1e-5
"""How far two scores that count as equal may be apart, relative to the largest of their row."""

_INDICES = {
    "aten.topk": 1,
    "aten.sort": 1,
    "aten.sort.stable": 1,
    "aten.max.dim": 1,
    "aten.min.dim": 1,
    "aten.argsort": 0,
    "aten.argsort.stable": 0,
    "aten.argmax": 0,
    "aten.argmin": 0,
}
"""Ops that choose the best of a row of scores, and which of their results says whom."""


@dataclass(frozen=True)
class _Choice:
    """What one op chose: `ids` [rows, k], the value `indices`, of `scores` [rows, n]."""

    indices: Value
    scores: Tensor
    ids: Tensor
    loc: Loc
    ordered: bool


@dataclass
class Choices:
    """What a module chooses in one run, and how another is held to it.

    Args:
        module: whose ops are watched: `observe` is an observer of its evaluation.
        close: as of `CLOSE`.
    """

    module: Module
    close: float = CLOSE
    made: list[_Choice] = field(default_factory=list[_Choice])
    given: dict[Value, Any] = field(default_factory=dict[Value, Any])  #: scores, by the value that they are

    def __post_init__(self) -> None:
        self._scores = {op.operands[0] for op in self.module.walk() if _dim(op) is not None}

    def observe(self, op: Op, results: tuple[Any, ...]) -> None:
        """Remember what an op chose, if it does choose."""
        for value, result in zip(op.results, results, strict=True):
            if value in self._scores:
                self.given[value] = result
        dim = _dim(op)
        if dim is not None and isinstance(scores := self.given.get(op.operands[0]), Tensor):
            rows = _rows(scores, dim, scores.dim())
            ids = _rows(results[_INDICES[op.name]], dim, scores.dim())
            indices = op.results[_INDICES[op.name]]
            self.made.append(_Choice(indices, rows.double(), ids, op.loc.alone(), _is_ordered(op)))

    def force(self, value: Value, computed: Any) -> Any:
        """An override of another module's evaluation: indices that are as good as those remembered become those."""
        op = value.op
        dim = None if op is None else _dim(op)
        if op is None or dim is None or _INDICES[op.name] != value.index or not isinstance(computed, Tensor):
            return computed
        scores = op.operands[0].tensor
        flat = _rows(computed, dim, scores.rank)
        kept, open_ = flat.clone(), torch.ones(len(flat), dtype=torch.bool)
        fitting = [one for one in self.made if _fits(one, flat, scores.shape[dim])]
        for one in sorted(fitting, key=lambda one: one.loc != op.loc.alone()):
            wanted = one.ids[:, : flat.shape[1]]
            same = _as_good(one, flat, wanted, self.close) & open_
            kept[same] = wanted[same]
            open_ &= ~same
        if torch.equal(kept, flat):
            return computed
        moved = computed.movedim(dim, -1).shape if computed.dim() == scores.rank else (*computed.shape, 1)
        whole = kept.reshape(moved).movedim(-1, dim)
        return whole if computed.dim() == scores.rank else whole.squeeze(dim)

    def held_to(self, ids: Tensor, others: Tensor) -> dict[Value, Tensor]:
        """For an op that chose `ids` [rows, k]: in rows where `others` are as good, `others` in their place."""
        for one in self.made:
            if torch.equal(one.ids, ids.long()) and others.shape == ids.shape:
                good = _as_good(one, others.long(), one.ids, self.close)
                return {one.indices: torch.where(good[:, None], others.long(), one.ids)}
        return {}


def _fits(one: _Choice, ids: Tensor, size: Any) -> bool:
    return len(one.ids) == len(ids) and one.ids.shape[1] >= ids.shape[1] and one.scores.shape[1] == size


def _as_good(one: _Choice, ids: Tensor, wanted: Tensor, close: float) -> Tensor:
    """Which rows of `ids` choose as well as `wanted` does, by the scores of `one`: [rows], bool."""
    known = ((ids >= 0) & (ids < one.scores.shape[1])).all(-1)
    theirs, best = one.scores.gather(1, ids * known[:, None]), one.scores.gather(1, wanted)
    if not one.ordered:
        theirs, best = theirs.sort(-1).values, best.sort(-1).values
    scale = one.scores.masked_fill(~one.scores.isfinite(), 0).abs().amax(-1, keepdim=True)
    return known & ((theirs == best) | ((theirs - best).abs() <= close * scale)).all(-1)


def _dim(op: Op) -> int | None:
    """The axis along which an op chooses by scores; None for an op that does not."""
    if op.name not in _INDICES or not op.operands[0].tensor.dtype.is_float or not op.operands[0].tensor.rank:
        return None
    dim = attr(op, "dim")
    return dim if isinstance(dim, int) else None


def _is_ordered(op: Op) -> bool:
    return op.name != "aten.topk" or bool(attr(op, "sorted"))


def _rows(tensor: Tensor, dim: int, rank: int) -> Tensor:
    """A tensor as [rows, n] with axis `dim` last; of less than `rank` axes, the axis is gone and n is 1."""
    if tensor.dim() < rank:
        return tensor.reshape(-1, 1)
    moved = tensor.movedim(dim, -1)
    return moved.reshape(-1, moved.shape[-1])
