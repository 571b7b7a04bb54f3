"""Tokens to the ranks of their experts, and results back: each in two halves."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Literal, TypeVar

from sparsec.dialects.dist.common import collective_problems, rank_problems, table_type
from sparsec.dialects.dist.references import Dispatched, combine, rows_sent, splits
from sparsec.dialects.dist.tables import Remap
from sparsec.dialects.moe.banks import ExpertBank, GroupedLinear
from sparsec.dialects.moe.common import bytes_of, results_are
from sparsec.ir.core import Value
from sparsec.ir.opdef import Cost, Env, HandleOperand, HandleResult, OpDef, Operand, Result
from sparsec.ir.types import HANDLE, DType, Sym, TensorType, Type, evaluate

Dedup = Literal["none", "rank", "node"]
"""What a token is sent once for: each expert that it chose, each rank that has one, or each node that has one."""

Algo = Literal["flat", "two_level"]
"""Straight to the rank; or over the network to the rank of the same number in the node, and from there inside it."""

Payload = Literal["model", "bf16", "fp8"]
"""How rows travel to experts: in the model's dtype, in bf16, or in fp8 with a scale for each 128 columns."""

ADJOINTS = {
    "dist.dispatch_start": "dist.combine_wait",
    "dist.dispatch_wait": "dist.combine_start",
    "dist.combine_start": "dist.dispatch_wait",
    "dist.combine_wait": "dist.dispatch_start",
}
"""The op that a gradient takes on its way back through an op: what it takes is the gradient of the op's results."""

DefT = TypeVar("DefT", bound=OpDef)


class DispatchStart(OpDef, name="dist.dispatch_start"):
    """Begin to send each token to the ranks of its slots.

    For example:

        %h = dist.dispatch_start(%x, %where, %weights) {ranks = 4, width = 2, slots = 3, dedup = "rank"} : handle
        %rows, %local, %w = dist.dispatch_wait(%h) : tensor<u0x64xf32>, tensor<u0x2xi64>, tensor<u0x2xf32>

    A handle is waited for once, and one combine may send back on it.
    """

    x: Operand  #: [T, H]
    where: Operand  #: [T, k], i64: slots, as of dist.remap
    weights: Operand  #: [T, k], float
    handle: HandleResult
    ranks: int
    width: int  #: ranks of a node
    slots: int  #: S, of each rank
    dedup: Dedup = "none"
    algo: Algo = "flat"
    payload: Payload = "model"
    pure = False

    @property
    def k(self) -> int:
        """How many slots a token has."""
        k = self.where.tensor.shape[-1]
        assert isinstance(k, int)
        return k

    def sent(self, env: Mapping[str, int]) -> tuple[float, float]:
        """Bytes that a rank sends to ranks of its node, and to other nodes."""
        columns = self.x.tensor.shape[-1]
        assert isinstance(columns, int)
        row = row_bytes(columns, self.x.tensor.dtype, self.payload)
        chosen = (1 if self.dedup == "none" else self.k) * (4 + self.weights.tensor.dtype.itemsize)
        return _sent(self, row + chosen, env)

    def infer(self) -> tuple[Type, ...]:
        return (HANDLE,)

    def verify(self) -> Iterator[str]:
        yield from collective_problems(self)
        yield from rank_problems(self.ranks, self.width)
        if self.slots < 1:
            yield f"a rank has {self.slots} slots, must have one at least"
        x, where, weights = self.x.tensor, self.where.tensor, self.weights.tensor
        if x.rank != 2 or where.rank != 2 or where.shape[0] != x.shape[0] or where.dtype is not DType.i64:
            yield f"x is {x} and where {where}, must be [tokens, columns] and [tokens, k] of i64"
        elif not isinstance(where.shape[1], int):
            yield f"where is {where}: k must be known"
        if weights.shape != where.shape or not weights.dtype.is_float:
            yield f"weights are {weights}, must be floats for where, {where}"
        if self.dedup == "node" and self.algo != "two_level":
            yield 'dedup = "node" sends a token once to a node, so it needs algo = "two_level"'
        remap = self.where.op
        if isinstance(remap, Remap) and (remap.ranks, remap.slots.type) != (
            self.ranks,
            table_type(self.ranks, self.slots),
        ):
            yield (
                f"where comes from a dist.remap for {remap.ranks} ranks and a table {remap.slots.type}; "
                f"this is for {self.ranks} ranks of {self.slots} slots"
            )
        yield from _handle_problems(self, DispatchWait, (CombineStart,))

    def cost(self, env: Mapping[str, int]) -> Cost:
        return Cost(sum(bytes_of(value.type, env) for value in self.operands) + int(sum(self.sent(env))), 0)

    def reference(self, env: Env, *args: Any) -> Any:
        given = env.peers.gather(args)
        if len(given) != self.ranks:
            raise ValueError(f"it is for {self.ranks} ranks and runs on {len(given)}; the module says `devices`")
        return Dispatched(given, env.peers.rank, self.slots, self.dedup == "none", self.payload)


class DispatchWait(OpDef, name="dist.dispatch_wait"):
    """Wait for the rows that all ranks sent here.

    For example:

        %h = dist.dispatch_start(%x, %where, %weights) {ranks = 4, width = 2, slots = 3} : handle
        %rows, %local, %w = dist.dispatch_wait(%h) : tensor<u0x64xf32>, tensor<u0x1xi64>, tensor<u0x1xf32>

    The number of rows is a size of its own. Rows come in the order of ranks, then of their tokens. With dedup "none" a
    row has one slot; else it has the token's k choices in order, those of other ranks as "skip" with a weight of zero.
    """

    handle: HandleOperand
    rows: Result  #: [u, H], dtype of x
    local: Result  #: [u, n], i64: slots of this rank; S for "skip"
    weights: Result  #: [u, n]
    pure = False

    def verify(self) -> Iterator[str]:
        start = _start(self.handle, DispatchStart)
        if start is None:
            yield _no_start(DispatchStart)
            return
        u, x = self.rows.tensor.shape[0] if self.rows.tensor.rank else 0, start.x.tensor
        if not isinstance(u, Sym) or not u.isidentifier():
            yield f"rows are {self.rows.type}: their number must be a size of its own, as in tensor<u0x64xf32>"
            return
        chosen = (u, 1 if start.dedup == "none" else start.k)
        wanted = (
            TensorType((u, x.shape[-1]), x.dtype),
            TensorType(chosen, DType.i64),
            TensorType(chosen, start.weights.tensor.dtype),
        )
        yield from results_are(self, wanted)
        for bank in self.local.users:
            if isinstance(bank, ExpertBank | GroupedLinear) and bank.num_experts != start.slots:
                yield (
                    f"gives slots of {start.slots} to '{bank.name}', whose banks have {bank.num_experts}: banks of a "
                    f"rank come from dist.local, or the dispatch needs slots = {bank.num_experts}"
                )

    def cost(self, env: Mapping[str, int]) -> Cost:
        return Cost(sum(bytes_of(value.type, env) for value in self.results), 0)

    def reference(self, env: Env, *args: Any) -> Any:
        return args[0].received()


class CombineStart(OpDef, name="dist.combine_start"):
    """Begin to send results back to the ranks that rows came from.

    For example:

        %h = dist.dispatch_start(%x, %where, %weights) {ranks = 4, width = 2, slots = 3} : handle
        %rows, %local, %w = dist.dispatch_wait(%h) : tensor<u0x64xf32>, tensor<u0x1xi64>, tensor<u0x1xf32>
        %c = dist.combine_start(%rows, %h) : handle
        %y = dist.combine_wait(%c) : tensor<s0x64xf32>
    """

    rows: Operand  #: [u, N]: a result for each row that was received
    dispatched: HandleOperand  #: of the dispatch
    handle: HandleResult
    pure = False

    def sent(self, env: Mapping[str, int]) -> tuple[float, float]:
        """Bytes that come to a rank from ranks of its node, and from other nodes; as many as it sends."""
        start, columns = _start(self.dispatched, DispatchStart), self.rows.tensor.shape[-1]
        assert start is not None and isinstance(columns, int)
        return _sent(start, columns * self.rows.tensor.dtype.itemsize, env)

    def infer(self) -> tuple[Type, ...]:
        return (HANDLE,)

    def verify(self) -> Iterator[str]:
        yield from collective_problems(self)
        start = _start(self.dispatched, DispatchStart)
        if start is None:
            yield _no_start(DispatchStart)
            return
        for wait in self.dispatched.users:
            if isinstance(wait, DispatchWait) and wait.rows.tensor.shape[0] != self.rows.tensor.shape[0]:
                yield f"sends {self.rows.type} back; the dispatch received {wait.rows.type}: it needs a row for each"
        if not isinstance(self.rows.tensor.shape[-1], int):
            yield f"rows are {self.rows.type}: the number of columns must be known"
        yield from _handle_problems(self, CombineWait, ())

    def cost(self, env: Mapping[str, int]) -> Cost:
        return Cost(bytes_of(self.rows.type, env) + int(sum(self.sent(env))), 0)

    def reference(self, env: Env, *args: Any) -> Any:
        rows, dispatched = args
        return combine(env.peers.gather(splits(rows, dispatched)), dispatched)


class CombineWait(OpDef, name="dist.combine_wait"):
    """Wait for the results of a rank's own tokens: their sum over ranks, in f32 in the order of ranks, rounded once.

    For example:

        %h = dist.dispatch_start(%x, %where, %weights) {ranks = 4, width = 2, slots = 3} : handle
        %rows, %local, %w = dist.dispatch_wait(%h) : tensor<u0x64xf32>, tensor<u0x1xi64>, tensor<u0x1xf32>
        %c = dist.combine_start(%rows, %h) : handle
        %y = dist.combine_wait(%c) : tensor<s0x64xf32>
    """

    handle: HandleOperand
    y: Result  #: [T, N], zeros for a token that went nowhere
    pure = False

    def infer(self) -> tuple[Type, ...]:
        begun = _start(self.handle, CombineStart)
        start = _start(begun.dispatched, DispatchStart) if begun is not None else None
        if begun is None or start is None:
            raise TypeError(_no_start(CombineStart))
        rows = begun.rows.tensor
        return (TensorType((start.x.tensor.shape[0], *rows.shape[1:]), rows.dtype),)

    def verify(self) -> Iterator[str]:
        if _start(self.handle, CombineStart) is None:
            yield _no_start(CombineStart)
        else:
            yield from results_are(self, self.infer())

    def cost(self, env: Mapping[str, int]) -> Cost:
        return Cost(2 * bytes_of(self.y.type, env), 0)

    def reference(self, env: Env, *args: Any) -> Any:
        return args[0]


# ------------------------------------------------------------------------------------------------------------- handles
def _handle_problems(
    op: DispatchStart | CombineStart, wait: type[OpDef], others: tuple[type[OpDef], ...]
) -> Iterator[str]:
    """How the handle of `op` is not used as it must: by one `wait`, and by `others` once at most."""
    uses = [user for user, count in op.handle.users.items() for _ in range(count)]
    waits = sum(isinstance(user, wait) for user in uses)
    if waits == 0:
        yield f"is begun and never waited for: add `{wait.op_name}(%{op.handle.name})` to its block"
    elif waits > 1:
        yield f"is waited for {waits} times: a handle is used once, so begin another exchange"
    for other in others:
        if (count := sum(isinstance(user, other) for user in uses)) > 1:
            yield f"is the way back of {count} '{other.op_name}': a handle is used once, so add their rows first"
    for user in uses:
        if not isinstance(user, (wait, *others)):
            yield f"gives its handle to '{user.name}', which takes none"


def _start(handle: Value, kind: type[DefT]) -> DefT | None:
    return handle.op if isinstance(handle.op, kind) else None


def _no_start(kind: type[OpDef]) -> str:
    return f"takes a handle that no '{kind.op_name}' gives"


def row_bytes(columns: int, dtype: DType, payload: str) -> int:
    """Bytes of a row on its way to experts."""
    blocks = -(-columns // 128)
    return {"fp8": blocks * (128 + 4), "bf16": 2 * columns}.get(payload, columns * dtype.itemsize)


def _sent(start: DispatchStart, row_bytes: float, env: Mapping[str, int]) -> tuple[float, float]:
    tokens = evaluate(start.x.tensor.shape[0], env)
    inside, outside = rows_sent(start.k, start.ranks, start.width, start.dedup, start.algo)
    return tokens * inside * row_bytes, tokens * outside * row_bytes
