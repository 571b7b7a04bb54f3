"""Slots: which one a token goes to, which part of a bank they hold, and another placement."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Literal

from sparsec.dialects.dist.common import collective_problems, rank_problems, table_problems, table_type
from sparsec.dialects.moe.common import bytes_of, results_are
from sparsec.ir.opdef import Cost, Env, OpDef, Operand, Operands, Result, Results
from sparsec.ir.types import DType, TensorType, Type

Policy = Literal["static", "local", "batch"]
"""Who decides which replica a token goes to: the placement's shares; a replica on its own rank, else its node, before
those; or the best split of the batch, from all ranks' counts."""


class Remap(OpDef, name="dist.remap"):
    """Choose a slot for each (token, expert): one of those that hold the expert.

    For example:

        %where = dist.remap(%ids, %slots, %shares) {experts = 8, ranks = 4, width = 2} : tensor<s0x2xi64>

    The rule is that of `sparsec.runtime.distributed.remap`.
    """

    ids: Operand  #: [T, k], integer: experts
    slots: Operand  #: [P], i64: the expert in each slot
    shares: Operand  #: [P], f64: the share of its expert's tokens that each slot gets
    where: Result  #: [T, k], i64: slots; P for an id that means "skip"
    experts: int
    ranks: int
    width: int  #: ranks of a node
    policy: Policy = "static"

    def infer(self) -> tuple[Type, ...]:
        return (TensorType(self.ids.tensor.shape, DType.i64),)

    def verify(self) -> Iterator[str]:
        if self.policy == "batch":
            yield from collective_problems(self)
        if self.ids.tensor.rank != 2 or self.ids.tensor.dtype.is_float:
            yield f"ids are {self.ids.type}, must be [tokens, k] integers"
        yield from rank_problems(self.ranks, self.width)
        yield from table_problems(self.slots, self.experts, self.ranks)
        if (wanted := TensorType(self.slots.tensor.shape, DType.f64)) != self.shares.type:
            yield f"shares are {self.shares.type}, must be {wanted}: one for each slot"
        yield from results_are(self, self.infer())

    def cost(self, env: Mapping[str, int]) -> Cost:
        return Cost(sum(bytes_of(value.type, env) for value in (*self.operands, self.where)), 0)

    def reference(self, env: Env, *args: Any) -> Any:
        import torch

        from sparsec.runtime.distributed.remap import count, physical

        ids, slots, shares = args
        counts = torch.stack(env.peers.gather(count(ids, self.experts))) if self.policy == "batch" else None
        return physical(
            ids, slots, shares, experts=self.experts, ranks=self.ranks, width=self.width, rank=env.peers.rank,
            policy=self.policy, counts=counts,
        )  # fmt: skip


class Local(OpDef, name="dist.local"):
    """The part of a bank that this rank holds: its slots' rows of what has a row for each expert.

    For example:

        %here = dist.local(%up, %slots) {ranks = 4, slots = 3} : tensor<3x96x64xf32>

    It stands in functions that compute weights: a rank computes and keeps no more of a bank than this.
    """

    bank: Operand  #: [E, ...]
    table: Operand  #: [P], i64: the expert in each slot
    here: Result  #: [S, ...]
    ranks: int
    slots: int  #: S, of each rank

    def infer(self) -> tuple[Type, ...]:
        return (TensorType((self.slots, *self.bank.tensor.shape[1:]), self.bank.tensor.dtype),)

    def verify(self) -> Iterator[str]:
        experts = self.bank.tensor.shape[0] if self.bank.tensor.rank else None
        if not isinstance(experts, int):
            yield f"bank is {self.bank.type}: the number of its experts must be known"
            return
        yield from table_problems(self.table, experts, self.ranks)
        if self.table.tensor.shape[0] != self.ranks * self.slots:
            yield f"the table {self.table.type} is not for {self.ranks} ranks of {self.slots} slots"
        yield from results_are(self, self.infer())

    def cost(self, env: Mapping[str, int]) -> Cost:
        return Cost(2 * bytes_of(self.here.type, env), 0)

    def reference(self, env: Env, *args: Any) -> Any:
        bank, table = args
        first = env.peers.rank * self.slots
        return bank[table[first : first + self.slots]]


class Migrate(OpDef, name="dist.migrate"):
    """Bring a rank's parts of banks from one placement to another.

    For example:

        %here = dist.local(%up, %slots) {ranks = 4, slots = 3} : tensor<3x96x64xf32>
        %moved = dist.migrate(%slots, %slots, %here) {ranks = 4, slots = 3, budget = 65536} : tensor<3x96x64xf32>

    What runs goes on between the steps that this takes, each of which lets a rank send `budget` bytes and receive as
    many (`sparsec.runtime.distributed.migrate`).
    """

    before: Operand  #: [P], i64: the expert in each slot now
    after: Operand  #: [P], i64: the expert that it is to hold
    parts: Operands  #: [S, ...] each: weights, biases, scales
    moved: Results  #: the same for the placement `after`
    ranks: int
    slots: int  #: S, of each rank
    budget: int = 0  #: bytes that a rank sends in a step, and that it receives; 0: no limit
    pure = False

    def infer(self) -> tuple[Type, ...]:
        return tuple(part.type for part in self.parts)

    def verify(self) -> Iterator[str]:
        yield from collective_problems(self)
        wanted = table_type(self.ranks, self.slots)
        for name, table in (("before", self.before), ("after", self.after)):
            if table.type != wanted:
                yield f"'{name}' is {table.type}; {self.ranks} ranks of {self.slots} slots need {wanted}"
        if self.budget < 0:
            yield f"a budget of {self.budget} bytes moves nothing: leave it out for no limit"
        if len(self.moved) != len(self.parts):
            yield f"has {len(self.parts)} parts of banks and {len(self.moved)} results: each part needs one"
        for part, moved in zip(self.parts, self.moved, strict=False):
            if part.tensor.shape[:1] != (self.slots,):
                yield f"part %{part.name} is {part.type}: a rank has {self.slots} slots of each bank"
            if moved.type != part.type:
                yield f"part %{part.name} is {part.type}, its result {moved.type}"

    def cost(self, env: Mapping[str, int]) -> Cost:
        """If every slot gets another expert."""
        return Cost(4 * sum(bytes_of(part.type, env) for part in self.parts), 0)

    def reference(self, env: Env, *args: Any) -> Any:
        import torch

        before, after, *parts = args
        known, wanted = env.peers.gather(parts), after[env.peers.rank * self.slots :][: self.slots]
        if lost := set(wanted.tolist()) - set(before.tolist()):
            raise ValueError(f"expert {min(lost)} is in no slot that it could come from")
        source = torch.stack([(before == expert).nonzero()[0, 0] for expert in wanted])
        return tuple(torch.cat(banks)[source] for banks in zip(*known, strict=True))


__all__ = ["Local", "Migrate", "Policy", "Remap"]
