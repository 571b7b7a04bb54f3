"""Which experts a token goes to: routers, capacities, and the order of the pairs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Literal

from sparsec.dialects.moe.common import bytes_of, region_takes, region_yields, results_are, tiles_type
from sparsec.dialects.moe.references import capacity_reference, group_reference, tiles_reference
from sparsec.ir.core import Value
from sparsec.ir.opdef import Body, Cost, Env, OpDef, Operand, Operands, Result, Results
from sparsec.ir.types import Dim, DType, TensorType, Type, evaluate, product


class Route(OpDef, name="moe.route"):
    """Choose k experts for each token and weigh them.

    The region is the model's own router from the logits on: row-local ops (one token is one row) that yield the ids
    and the weights, then whatever else the model reads of its router: the scores, the shared experts' share of a
    normalisation over all. Nothing else about a router is fixed. Of the operands, tensors of rank 2 have one row per
    token, as the logits do (ids that are looked up by the token's number, a mask of padding); vectors and scalars are
    parameters.

        %ids, %weights = moe.route(%logits) : tensor<s0x2xi64>, tensor<s0x2xf32> {
          body(%z: tensor<s0x8xf32>):
            %p = aten.softmax.int(%z) {dim = -1} : tensor<s0x8xf32>
            %w, %e = aten.topk(%p) {k = 2} : tensor<s0x2xf32>, tensor<s0x2xi64>
            yield %e, %w
        }
    """

    logits: Operand  #: [T, E]
    params: Operands  #: what else the region reads: selection bias [E], per-expert scale [E], given ids [T, k] ...
    ids: Result  #: [T, k], integer
    weights: Result  #: [T, k], float
    extras: Results  #: [T, n] each: what else the region yields
    body: Body  #: (logits, *params) -> (ids, weights, *extras)

    @property
    def num_experts(self) -> Dim:
        return self.logits.tensor.shape[-1]

    @property
    def k(self) -> Dim:
        return self.ids.tensor.shape[-1]

    def infer(self) -> tuple[Type, ...]:
        return tuple(value.type for value in self.body.terminator.operands)

    def verify(self) -> Iterator[str]:
        yield from region_takes(self.body, [value.type for value in self.operands])
        yield from region_yields(self.body, [result.type for result in self.results])
        yield from route_problems(self.logits, self.ids, self.weights, self.extras)

    def cost(self, env: Mapping[str, int]) -> Cost:
        tokens = evaluate(self.logits.tensor.shape[0], env)
        moved = sum(bytes_of(value.type, env) for value in (*self.operands, *self.results))
        return Cost(moved, tokens * evaluate(self.num_experts, env) * len(self.body.ops))

    def reference(self, env: Env, *args: Any) -> Any:
        return env.run(self.body, args)


class Group(OpDef, name="moe.group"):
    """Sort the (token, slot) pairs by expert, keeping their order within an expert; skipped pairs go last.

    For example:

        %order, %offsets = moe.group(%ids) {num_experts = 8} : tensor<(2*s0)xi32>, tensor<9xi32>

    With `listed`, it also lists the tiles that kernels cut the pairs of an expert into, for tiles of 16, 32, 64 and 128
    rows: tiles[j] is for those of 16 << j. Its entry 0 holds the number of tiles of experts, the number of tiles of all
    pairs, and two zeros. Entry 1 + i is tile i, in the order of experts: the expert, where its pairs start and stop in
    `order`, and which of its row blocks the tile is. Skipped pairs count as those of expert E. Past the last tile the
    expert is E + 1, as far as T * k // rows + min(E + 1, T * k) entries go; those beyond are not defined.

        %order, %offsets, %tiles = moe.group(%ids) {num_experts = 8, listed = true}
            : tensor<(2*s0)xi32>, tensor<9xi32>, tensor<4x(2*s0//16+10)x4xi32>
    """

    ids: Operand  #: [T, k], integer
    order: Result  #: [T * k], i32: pair numbers, expert by expert
    offsets: Result  #: [E + 1], i32: expert e owns order[offsets[e]:offsets[e + 1]]
    lists: Results  #: if listed, [4, T * k // 16 + E + 2, 4], i32
    num_experts: int
    listed: bool = False  #: whether there are tile lists
    variants: tuple[dict[str, Any], ...] = ()  #: as of moe.gather_gemm

    @property
    def tiles(self) -> Value | None:
        """The tile lists."""
        return self.lists[0] if self.listed else None

    def infer(self) -> tuple[Type, ...]:
        return group_types(self.ids.tensor, self.num_experts, self.listed)

    def verify(self) -> Iterator[str]:
        yield from results_are(self, self.infer())

    def cost(self, env: Mapping[str, int]) -> Cost:
        return Cost(sum(bytes_of(value.type, env) for value in (*self.operands, *self.results)), 0)

    def reference(self, env: Env, *args: Any) -> Any:
        return group_results(args[0], self.num_experts, self.listed)


class RouteGroup(OpDef, name="moe.route_group"):
    """`moe.route` and `moe.group` in one kernel: choose, weigh, and sort the pairs by expert.

    For example:

        %ids, %weights, %order, %offsets = moe.route_group(%logits) {num_experts = 8}
            : tensor<s0x2xi64>, tensor<s0x2xf32>, tensor<(2*s0)xi32>, tensor<9xi32> {
          body(%z: tensor<s0x8xf32>):
            %p = aten.softmax.int(%z) {dim = -1} : tensor<s0x8xf32>
            %w, %e = aten.topk(%p) {k = 2} : tensor<s0x2xf32>, tensor<s0x2xi64>
            yield %e, %w
        }
    """

    logits: Operand  #: [T, E]
    params: Operands
    ids: Result  #: [T, k], integer
    weights: Result  #: [T, k], float
    order: Result  #: [T * k], i32, as of moe.group
    offsets: Result  #: [experts + 1], i32, as of moe.group
    others: Results  #: the extras, [T, n] each, as of moe.route; then, if listed, the tile lists, as of moe.group
    num_experts: int  #: of the expert bank that the offsets are for; logits may have further columns
    listed: bool = False  #: whether there are tile lists
    variants: tuple[dict[str, Any], ...] = ()  #: as of moe.gather_gemm
    body: Body  #: as of moe.route

    @property
    def extras(self) -> tuple[Value, ...]:
        """What else the region yields, [T, n] each."""
        return tuple(self.others[: len(self.others) - self.listed])

    @property
    def tiles(self) -> Value | None:
        """The tile lists."""
        return self.others[-1] if self.listed else None

    def infer(self) -> tuple[Type, ...]:
        ids, weights, *extras = self.body.terminator.operands
        order, offsets, *lists = group_types(ids.tensor, self.num_experts, self.listed)
        return (ids.type, weights.type, order, offsets, *(value.type for value in extras), *lists)

    def verify(self) -> Iterator[str]:
        yield from region_takes(self.body, [value.type for value in self.operands])
        yield from region_yields(self.body, [value.type for value in (self.ids, self.weights, *self.extras)])
        yield from route_problems(self.logits, self.ids, self.weights, self.extras)
        yield from results_are(self, self.infer())

    def cost(self, env: Mapping[str, int]) -> Cost:
        tokens = evaluate(self.logits.tensor.shape[0], env)
        moved = sum(bytes_of(value.type, env) for value in (*self.operands, *self.results))
        return Cost(moved, tokens * evaluate(self.logits.tensor.shape[-1], env) * len(self.body.ops))

    def reference(self, env: Env, *args: Any) -> Any:
        ids, weights, *extras = env.run(self.body, args)
        order, offsets, *lists = group_results(ids, self.num_experts, self.listed)
        return (ids, weights, order, offsets, *extras, *lists)


class Capacity(OpDef, name="moe.capacity"):
    """Let each expert take so many pairs and no more: those beyond become `num_experts`, which is skipped.

    Pairs are counted as they arrive: all tokens' first choices, then all second ones (`order = "slot"`), or token by
    token. Each of `groups` groups of consecutive tokens is counted alone. Ids that are out of range already are not
    counted and stay.

        %kept = moe.capacity(%ids) {num_experts = 8, capacity = 64} : tensor<s0x2xi64>
    """

    ids: Operand  #: [T, k], integer
    kept: Result  #: [T, k], dtype of ids
    num_experts: int
    capacity: Dim  #: pairs that an expert takes of each group
    order: Literal["slot", "token"] = "slot"
    groups: Dim = 1  #: T is a multiple of it

    def infer(self) -> tuple[Type, ...]:
        return (self.ids.type,)

    def verify(self) -> Iterator[str]:
        if self.ids.tensor.rank != 2 or self.ids.tensor.dtype.is_float:
            yield f"ids are {self.ids.type}, must be [tokens, k] integers"
        yield from results_are(self, self.infer())

    def cost(self, env: Mapping[str, int]) -> Cost:
        return Cost(2 * bytes_of(self.ids.type, env), 0)

    def reference(self, env: Env, *args: Any) -> Any:
        capacity, groups = env.dim(self.capacity), env.dim(self.groups)
        return capacity_reference(args[0], self.num_experts, capacity, self.order == "slot", groups)


def group_types(ids: TensorType, num_experts: int, listed: bool = False) -> tuple[TensorType, ...]:
    """Types of `order` and `offsets`, and of the tile lists where there are any."""
    pairs = product(ids.shape)
    found = TensorType((pairs,), DType.i32), TensorType((num_experts + 1,), DType.i32)
    return (*found, tiles_type(pairs, num_experts)) if listed else found


def group_results(ids: Any, num_experts: int, listed: bool) -> tuple[Any, ...]:
    """`order` and `offsets` of ids [T, k], and the tile lists where they are asked for."""
    order, offsets = group_reference(ids, num_experts)
    return (order, offsets, tiles_reference(offsets, order.shape[0])) if listed else (order, offsets)


def route_problems(logits: Operand, ids: Result, weights: Result, extras: Results) -> Iterator[str]:
    """Problems of what a router yields."""
    if ids.tensor.shape != weights.tensor.shape:
        yield f"ids are {ids.type}, weights {weights.type}: shapes differ"
    if ids.tensor.dtype.is_float:
        yield f"ids are {ids.tensor.dtype}, not integers"
    for extra in extras:
        if extra.tensor.rank != 2 or extra.tensor.shape[0] != logits.tensor.shape[0]:
            yield f"extra result %{extra.name} is {extra.type}: the logits {logits.type} have other rows"
